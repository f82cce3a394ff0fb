"""raise-opset and lower-ir: the same outputs in ONNX Runtime, the same names and weights, or a sentence why not.

``opset_cases.txt`` holds models of the operators that changed, each with the opsets at which its text is valid.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.defs import OpSchema

import penjing
from penjing.ir.errors import UsageError
from penjing.ir.files import load, save
from penjing.ir.opset import NoConversion, newest_opset, raise_opset
from penjing.ir.tensors import tensors
from penjing.ir.text import text
from penjing.ir.upgrades import RULES
from penjing.ir.verify import problems
from penjing.ir.versions import greatest_need
from penjing.passes.base import Context
from penjing.passes.convert.opset import RaiseOpset
from penjing.passes.ledger import Ledger
from penjing.passes.pipeline import Pipeline
from penjing.runtime.check import judge_passes
from penjing.runtime.session import OrtRunner, run_feed

Parse = Callable[[str], ir.Model]
RUNNER = OrtRunner()
NO_KERNEL = {"roialign": 22, "roialign max": 22}  # ONNX Runtime lacks these versions
SIZES = {"N": 2, "M": 3, "C": 4}


def cases() -> Iterator[Any]:
    for block in Path(__file__).with_name("opset_cases.txt").read_text(encoding="utf-8").split("\n\n"):
        head, body = block.split("\n", 1)
        name, _, versions = head.partition(":")
        yield pytest.param(name, [int(version) for version in versions.split()], body, id=name)


def model_of(body: str, version: int) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 8, opset_import: ["": {version}, "com.microsoft": 1]>\nm {body}')


def drawn(model: ir.Model) -> list[dict[str, Any]]:
    """Two feeds, between which booleans change."""
    rng, feeds = np.random.default_rng(0), []
    for turn in (True, False):
        feed = {}
        for value in model.graph.inputs:
            if value.is_initializer():
                continue
            assert value.shape is not None
            assert value.dtype is not None
            array = 3 * rng.standard_normal([d if isinstance(d, int) else SIZES[str(d.value)] for d in value.shape])
            array = np.full(array.shape, turn) if value.dtype == ir.DataType.BOOL else np.abs(array) ** turn * array
            feed[value.name or ""] = array.astype(value.dtype.numpy())
        feeds.append(feed)
    return feeds


def raised(model: ir.Model, to: int, **given: Any) -> Ledger:
    """The ledger of ``raise-opset``, after which the model is valid and a second run does nothing."""
    (step,) = Pipeline.parse(f"raise-opset{{to={to}}}").run(model, Context(**given))
    assert problems(model) == []
    once = text(model)
    (again,) = Pipeline.parse(f"raise-opset{{to={to}}}").run(model, Context(**given))
    assert (again.ledger.changes, text(model)) == ([], once)
    return step.ledger


def holds(before: ir.Model, after: ir.Model, feeds: list[dict[str, Any]]) -> None:
    assert judge_passes([RaiseOpset()], before, after, feeds, RUNNER, Context()) == []


@pytest.mark.parametrize(("name", "versions", "body"), list(cases()))
def test_raised_models_compute_the_same(name: str, versions: list[int], body: str) -> None:
    for version in versions:
        for to in (13, 17, 21, 26):
            before = model_of(body, version)
            if to <= version or to >= NO_KERNEL.get(name, 99):
                continue
            after = before.clone()
            raised(after, to)
            onnx.checker.check_model(ir.to_proto(after))
            assert [value.name for value in after.graph.outputs] == [value.name for value in before.graph.outputs]
            holds(before, after, drawn(before))


_X = np.arange(24, dtype=np.float32).reshape(2, 3, 4) - 11
EARLY: list[tuple[int, str, Callable[[np.ndarray], Any]]] = [
    (6, "<float[3] b = {1, 2, 3}> { y = Add <broadcast = 1, axis = 1> (x, b) }",
     lambda x: x + np.array([[1], [2], [3]])),
    (6, "<float[4] b = {1, 2, 3, 4}> { y = Mul <broadcast = 1> (x, b) }", lambda x: x * np.array([1, 2, 3, 4])),
    (1, "{ y = Relu <consumed_inputs = [0]> (x) }", lambda x: np.maximum(x, 0)),
    (6, "<float[3] s = {1, 2, 3}> { y = PRelu (x, s) }", lambda x: np.where(x < 0, x * np.array([[1], [2], [3]]), x)),
    (6, "{ y = Dropout <is_test = 1, ratio = 0.9> (x) }", lambda x: x),
    (1, '{ z = Cast <to = "INT32"> (x) y = Cast <to = "float"> (z) }', np.trunc),
    (3, "{ y = Concat (x, x) }", lambda x: np.concatenate([x, x], axis=1)),
    (1, "{ y = Reshape <shape = [4, -1]> (x) }", lambda x: x.reshape(4, -1)),
    (1, "{ y = Pad <paddings = [0, 0, 1, 0, 0, 1], value = 2.0> (x) }",
     lambda x: np.pad(x, ((0, 0), (0, 0), (1, 1)), constant_values=2)),
    (1, "<float t = {3}, float a = {2}> { y = Tile (x, t, a) }", lambda x: np.tile(x, (1, 1, 3))),
    (1, "<float[2] p = {1, 3}> { z, y = Split <axis = 2> (x, p) }", lambda x: x[:, :, 1:]),
    (1, "{ y = Slice <starts = [1], ends = [9], axes = [1]> (x) }", lambda x: x[:, 1:]),
    (5, "{ y = Selu (x) }", lambda x: 1.0507 * np.where(x > 0, x, 1.6732 * (np.exp(x) - 1))),
    (1, "{ z = Unsqueeze <axes = [0]> (x) y = Upsample <height_scale = 2.0, width_scale = 1.0> (z) }",
     lambda x: np.repeat(x[None], 2, axis=2)),
    (1, "{ y = GlobalLpPool <p = 1.0> (x) }", lambda x: np.abs(x).sum(axis=2, keepdims=True)),
    (6, "<float[3] s = {1, 2, 3}, float[3] b = {1, 0, 3}, float[3] m = {1, 2, 3}, float[3] v = {1, 4, 9}> "
     "{ y = BatchNormalization <is_test = 1, epsilon = 0.0> (x, s, b, m, v) }",
     lambda x: x - np.array([[1], [2], [3]]) + np.array([[1], [0], [3]])),
]  # fmt: skip


@pytest.mark.parametrize(("version", "body", "expected"), EARLY)
def test_early_opsets(version: int, body: str, expected: Callable[[np.ndarray], Any]) -> None:
    """ONNX Runtime takes none of these, so numpy says what is right."""
    model = model_of(f"(float[2,3,4] x) => (float[] y) {body}", version)
    model.graph.outputs[0].shape = None
    raised(model, 21)
    found = run_feed(RUNNER.session(model), {"x": _X})["y"]
    np.testing.assert_allclose(found, expected(_X), rtol=1e-6)


REFUSED = [
    (8, "(float[1,3,2] x) => (float[1,2] y, float[1,3,2] z) <float[1,2] i = {0, 0}> { [s] y, z = Scan <num_scan_inputs "
     "= 1, body = b (float[2] a, float[2] e) => (float[2] c, float[2] d) { c = Add (a, e) d = Abs (e) }> (, i, x) }",
     r"^s: Scan of opset 8 has no exact conversion to 9: it runs over batches.* The model stays as it was\.$"),
    (7, "(float[2] x) => (float[2] y, float[2] m) { [d] y, m = Dropout (x) }",
     r"d: Dropout of opset 7 .* to 10: its mask is used.* The model stays as it was; it can be raised to 9\."),
    (6, "(float[2] x) => (float[2] y) { y = Dropout (x) }", "it trains, since is_test is not set"),
    (9, "(float[2,1,3] x) => (float[2,1,3] y) <float[1] s = {1}> { y, a, b = BatchNormalization (x, s, s, s, s) }",
     "to 14: it has the outputs of training.* can be raised to 13"),
    (11, '(float[1,1,3,4] x) => (float[a,b,c,d] y) <float[0] r = {}, float[4] s = {1, 1, 2, 2}> { y = Resize <mode = '
     '"linear", coordinate_transformation_mode = "tf_half_pixel_for_nn"> (x, r, s) }',
     "Resize of opset 11 .* to 13: its coordinate_transformation_mode 'tf_half_pixel_for_nn' is no more"),
    (10, "(float[1,1,3,4] x, float[4] s) => (float[a,b,c,d] y) { y = Resize (x, s) }", "its scales are not constant"),
    (13, "(float[2,3] x) => (float[2,3] y) <float[3] s = {1, 1, 1}> { [n] y = LayerNormalization (x, s) }",
     "^n: LayerNormalization is no operator of ONNX at opset 13"),
    (1, "(float[2,3,4] x) => (float[2,3,1] y) { y = GlobalLpPool <p = 1.5> (x) }", "its p is 1.5, and must be whole"),
    (9, "(float[2,3] x) => (float[2,1] y) { y = TopK (x) }", "TopK .*(input|K|k)"),
    (7, "(float[3] x) => (float[1,3] y) { y = Unsqueeze (x) }", "axes"),
]  # fmt: skip


@pytest.mark.parametrize(("version", "body", "words"), REFUSED)
def test_refusals_name_the_node_and_change_nothing(version: int, body: str, words: str) -> None:
    model = model_of(body, version)
    before, nodes = text(model), list(model.graph)
    with pytest.raises(NoConversion, match=words):
        raise_opset(model, 21)
    assert text(model) == before
    assert all(node is old for node, old in zip(model.graph, nodes, strict=True))


def test_versions_that_are_no_choice(parse: Parse) -> None:
    model = parse("m (float[2] x) => (float[2] y) { y = Relu (x) }")
    with pytest.raises(
        UsageError, match=r"The model is at opset 17, above 13; opsets are raised here, never lowered\."
    ):
        raised(model, 13)
    with pytest.raises(UsageError, match=f"to=99 is not a known opset; 1 to {newest_opset()} are known here"):
        Pipeline.parse("raise-opset{to=99}")
    with pytest.raises(UsageError, match=rf"to={newest_opset()} is newer than the ONNX Runtime here takes \(\d+\)"):
        raised(model, newest_opset(), runner=SimpleNamespace(newest_opset=lambda: newest_opset() - 1))
    raised(model, newest_opset())
    assert [skip.reason for skip in raised(model, newest_opset()).skips] == [f"it is at opset {newest_opset()} already"]


FUNCTIONS = """<ir_version: 9, opset_import: ["": 17, "own": 1]>
m (float[2,3] x, float[1,2,3] z) => (float[2,1] y, float[1,1,2] k) {
    y = own.Mean <axes = [1]> (x)
    k, i = own.Largest <count = 1, axes = [1]> (z)
}
<domain: "own", opset_import: ["": 10]>
Mean <axes: ints = [0], low: float = 0.1> (x) => (y) {
    mean = ReduceMean <axes: ints = @axes> (x)
    y = Clip <min: float = @low> (mean)
}
<domain: "own", opset_import: ["": 9]>
Largest <count, axes> (x) => (k, i) {
    s = Squeeze <axes = [0]> (x)
    t = Unsqueeze <axes: ints = @axes> (s)
    k, i = TopK <k: int = @count> (t)
}
"""


def test_functions_are_raised_with_what_their_callers_set(parse: Parse) -> None:
    model = parse(FUNCTIONS)
    ledger = raised(model, 21)
    assert [(change.subject, change.what) for change in ledger.changes if "to 21" in change.what] == [
        ("main graph", "opset 17 to 21"), ("own::Mean", "opset 10 to 21"), ("own::Largest", "opset 9 to 21"),
    ]  # fmt: skip
    assert all(function.opset_imports[""] == 21 for function in model.functions.values())
    x = np.array([[1, 2, 3], [-1, -2, -3]], np.float32)
    found = run_feed(RUNNER.session(model), {"x": x, "z": x[None]})
    assert found["y"].tolist() == [[2.0], [np.float32(0.1)]]
    assert found["k"].tolist() == [[[3.0]], [[-1.0]]]


def test_functions_that_cannot_be_raised(parse: Parse) -> None:
    model = parse(FUNCTIONS.replace("axes: ints = [0], low: float = 0.1", "axes, low"))
    with pytest.raises(
        NoConversion, match=r"own::Mean/.*ReduceMean .* a caller of the function may leave out .*'axes'"
    ):
        raised(model, 21)
    model = parse(FUNCTIONS.replace('["": 10]', '["": 22]'))
    with pytest.raises(UsageError, match="The function own::Mean is at opset 22, above 21"):
        raised(model, 21)


def test_what_stays_and_what_the_ledger_says() -> None:
    body = "(float[1,3] x) => (float[3] y) <float[1,3] w = {1, 2, 3}> { h = com.microsoft.Gelu (x) s = Mul (h, w) "
    model = model_of(body + "[last] y = Squeeze <axes = [0]> (s) }", 11)
    node, value = list(model.graph)[-1], model.graph.outputs[0]
    node.doc_string, node.metadata_props["by"], value.metadata_props["of"] = "a row", "me", "you"
    model.graph.initializers["w"].const_value = ir.LazyTensor(
        lambda: pytest.fail("a weight was read"), ir.DataType.FLOAT, ir.Shape([1, 3]), name="w"
    )
    held = [tensor for _, tensor in tensors(model)]
    ledger = Pipeline.parse("raise-opset").run(model)[0].ledger
    assert all(now is old for (_, now), old in zip(tensors(model), held, strict=False))
    assert (node.name, node.doc_string, node.metadata_props, value.metadata_props) == (
        "last", "a row", {"by": "me"}, {"of": "you"},
    )  # fmt: skip
    assert model.graph.outputs[0] is value
    assert node.outputs[0] is value
    assert [value.name for value in node.inputs if value] == ["s", "last_axes"]
    assert model.opset_imports == {"": 21, "com.microsoft": 1}
    assert [(change.subject, change.what) for change in ledger.changes] == [
        ("main graph", "opset 11 to 21"),
        ("last", "rewritten: Squeeze of opset 11 as Squeeze of 13"),
    ]
    assert [(skip.subject, skip.reason) for skip in ledger.skips] == [
        ("domain com.microsoft", "another domain, whose version stays (1 nodes)")
    ]


LATER = """
    select_last_index left_window_size right_window_size dilations count_include_pad ceil_mode saturate round_mode
    sparse_value value_float value_floats value_int value_ints value_string value_strings axis block_size output_dtype
    precision mode seed layout linear_before_reset batch_dims storage_order allowzero antialias axes reduction start end
    keep_aspect_ratio_policy largest sorted stash_type
"""  # attributes whose defaults say what was so before there were any
TYPING_ERROR = ("GRU", 3)  # its direction was 'foward' by default


def _differs(old: OpSchema, new: OpSchema) -> bool:
    """Whether something that the old schema takes means something else under the new one, or nothing."""
    single = OpSchema.FormalParameterOption.Single
    if new.deprecated or old.min_input < new.min_input or old.max_input > new.max_input:
        return True
    if any(b.option == single != a.option for a, b in zip(old.inputs, new.inputs, strict=False)):
        return True
    if old.max_output > new.max_output or old.min_output < new.min_output:
        return True
    before, after = (
        {name: (a.type, a.required, a.default_value) for name, a in s.attributes.items()} for s in (old, new)
    )
    same = all(after.get(name) == kept for name, kept in before.items() if name not in ("sparse_value", "value"))
    return not same or any(
        new.attributes[name].required or name not in LATER.split() for name in after.keys() - before.keys()
    )


def test_every_change_of_a_schema_has_its_rule() -> None:
    history: dict[str, list[OpSchema]] = {}
    for schema in sorted(onnx.defs.get_all_schemas_with_history(), key=lambda schema: schema.since_version):
        if schema.domain == "" and schema.since_version <= newest_opset():
            history.setdefault(schema.name, []).append(schema)
    steps = [(old, new) for found in history.values() for old, new in itertools.pairwise(found)]
    changed = {(new.name, new.since_version) for old, new in steps if _differs(old, new)}
    hidden = {("Softmax", 13), ("BatchNormalization", 14)}
    assert hidden <= changed
    assert changed - RULES.keys() == {TYPING_ERROR, ("GroupNormalization", 18)} & changed
    assert RULES.keys() <= {(new.name, new.since_version) for _, new in steps}


def corpus(every: int) -> Iterator[tuple[str, ir.Model, list[dict[str, Any]]]]:
    """ONNX's own cases of one node below opset 21, one of ``every`` by a hash of the name."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    for case in found:
        if zlib.crc32(case.name.encode()) % every == 3 and case.model.opset_import[0].version < 21:
            names = [value.name for value in case.model.graph.input]
            feeds = [dict(zip(names, map(_fed, given), strict=False)) for given, _ in case.data_sets]
            yield case.name, ir.from_proto(case.model), feeds


def _fed(value: Any) -> Any:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def test_every_tenth_model_of_one_node() -> None:
    held = 0
    for name, model, feeds in corpus(every=10):
        before = model.clone()
        if name == "test_scan_sum":
            continue  # of opset 8, refused
        raised(model, 21)
        try:
            list(RUNNER.run(before, feeds))
        except Exception:
            continue  # it did not run before
        holds(before, model, feeds)
        held += 1
    assert held > 60


def installed() -> list[Path]:
    files = [file for name in ("magika", "rapidocr-onnxruntime") for file in importlib.metadata.files(name) or []]
    return [Path(str(file.locate())) for file in files if file.suffix == ".onnx" and "det" not in file.name]


@pytest.mark.parametrize("path", installed(), ids=lambda path: path.stem)
def test_real_models(path: Path) -> None:
    model = load(path)
    report = penjing.run(model, "raise-opset")
    assert model.opset_imports[""] == 21
    assert report.check.comparison is not None
    assert not report.warnings


# IR versions ----------------------------------------------------------------------------------------------------------

PLAIN = "(float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Mul (x, w) }"


def lowered(model: ir.Model, options: str = "") -> Ledger:
    return Pipeline.parse(f"lower-ir{options}").run(model)[0].ledger


def test_lower_ir(tmp_path: Path) -> None:
    model = model_of(PLAIN, 21)
    model.ir_version = 14
    before = model.clone()
    assert [change.what for change in lowered(model, "{to=10}").changes] == ["IR version 14 to 10"]
    assert lowered(model, "{to=10}").reasons() == {"it has IR version 10 already": 1}
    assert [change.what for change in lowered(model).changes] == ["IR version 10 to 4"]
    assert lowered(model).reasons() == {
        "it has IR version 4, and can have no lower one: initializer 'w' is no input": 1
    }
    save(model, tmp_path / "m.onnx")
    assert onnx.load(tmp_path / "m.onnx").ir_version == 4
    feed = drawn(before)[0]
    assert run_feed(RUNNER.session(before), feed)["y"].tolist() == run_feed(RUNNER.session(model), feed)["y"].tolist()


def test_a_stamp_that_is_too_new_is_no_bar(tmp_path: Path) -> None:
    proto = ir.to_proto(model_of(PLAIN, 21))
    proto.ir_version = 14
    onnx.save(proto, tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    penjing.run(model, "lower-ir{to=13}")
    assert model.ir_version == 13


def test_lower_ir_refuses_with_what_needs_more(parse: Parse) -> None:
    model = model_of(PLAIN, 21)
    model.ir_version = 12
    model.graph.initializers["w"].const_value = ir.Tensor(np.zeros(2, np.int8), ir.DataType.INT4, name="w")
    model.graph.initializers["w"].type = ir.TensorType(ir.DataType.INT4)
    with pytest.raises(UsageError) as refused:
        lowered(model, "{to=9}")
    assert str(refused.value) == (
        "lower-ir: to=9 is too low: initializer 'w' is int4, which needs IR version 10, the least that this model can "
        "have."
    )
    ledger = lowered(model, "{to=13}")
    assert [skip.reason for skip in ledger.skips] == ["it has IR version 12 already"]
    with pytest.raises(UsageError, match="to=2 is too low"):
        lowered(model, "{to=2}")
    assert model.ir_version == 12
    assert greatest_need(parse(FUNCTIONS)).reason == "an attribute of the function own::Mean has a default"
    body = "g (optional(float[2]) x) => (bool y) { y = OptionalHasElement (x) }"
    assert greatest_need(parse(body)).reason == "value 'x' is optional"
    assert greatest_need(parse("g (float x) => (float y) { y = Abs (x) }")).version == 3
    cast = greatest_need(parse("g (float x) => (float y) { c = Cast <to = 17> (x) y = Cast <to = 1> (c) }"))
    assert (cast.version, cast.reason) == (9, "node 'Cast' names float8e4m3fn")
    maybe = "g () => (bool y) { o = Optional <type = float[2]> () y = OptionalHasElement (o) }"
    assert greatest_need(parse(maybe)).version == 8


def test_an_unused_mask_of_dropout_says_its_new_type(parse: Parse) -> None:
    model = parse("""<ir_version: 8, opset_import: ["": 9]>
        m (float[2] x) => (float[2] y) <float[2] mask> { y, mask = Dropout <ratio = 0.5> (x) }""")
    raised(model, 21)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
