"""The clean-up family: what each pass does and leaves, and that ONNX Runtime computes the same after it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  numpy knows bfloat16 with it
import numpy as np
import onnx_ir as ir
import pytest

import penjing.models
from penjing.ir.errors import UsageError
from penjing.ir.files import load
from penjing.ir.text import text
from penjing.ir.verify import problems
from penjing.passes.base import Context, Effect
from penjing.passes.ledger import Ledger
from penjing.passes.pipeline import Pipeline
from penjing.runtime.draws import random_feeds
from penjing.runtime.session import OrtRunner

Parse = Callable[[str], ir.Model]
RUNNER = OrtRunner()


def clean(model: ir.Model, passes: str, **given: Any) -> Ledger:
    """Run passes, hold the outcome to their promise on random feeds, and return what they wrote down."""
    before = model.clone()
    pipeline = Pipeline.parse(passes)
    steps = pipeline.run(model, Context(**given))
    assert problems(model) == []
    compare(before, model, exact=all(step.pass_.effect() is Effect.SAME for step in steps))
    ledger = Ledger()
    for step in steps:
        ledger.changes += step.ledger.changes
        ledger.skips += step.ledger.skips
    return ledger


def compare(before: ir.Model, after: ir.Model, exact: bool) -> None:
    feeds = list(random_feeds(before, 1))
    assert feeds
    noisy = [] if exact else list(RUNNER.run(before, feeds, level="all"))
    for place, (old, new) in enumerate(
        zip(RUNNER.run(before, feeds, level="off"), RUNNER.run(after, feeds, level="off"), strict=True)
    ):
        assert list(old) == list(new)
        for name, value in old.items():
            if exact or np.asarray(value).dtype.kind != "f":
                np.testing.assert_array_equal(new[name], value)
                continue
            noise = np.max(np.abs(noisy[place][name].astype(float) - value), initial=0)
            eps = 1e-5 if value.dtype.itemsize > 2 else 4 * np.finfo(value.dtype).eps
            bound = eps * np.max(np.abs(value), initial=0) + 4 * noise
            assert np.max(np.abs(new[name].astype(float) - value), initial=0) <= bound, name


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type != "Constant"]


def reasons(ledger: Ledger) -> list[str]:
    return [skip.reason for skip in ledger.skips]


# remove-identities ----------------------------------------------------------------------------------------------------

NOTHING_LEFT = {
    "identity": "y = Identity (h)",
    "cast": "y = Cast <to = 1> (h)",
    "cast there and back": "a = Cast <to = 11> (h) y = Cast <to = 1> (a)",
    "dropout": "y = Dropout (h)",
    "dropout told so": "t = Constant <value = bool {0}> () r = Constant <value = float {0.5}> () y = Dropout (h, r, t)",
    "transpose": "y = Transpose <perm = [0, 1, 2]> (h)",
    "transposes": "a = Transpose <perm = [1, 2, 0]> (h) y = Transpose <perm = [2, 0, 1]> (a)",
    "reversals": "a = Transpose (h) y = Transpose (a)",
    "concat of one": "y = Concat <axis = 0> (h)",
    "sum of one": "y = Sum (h)",
    "max of one": "y = Max (h)",
    "reshape": "s = Constant <value = int64[3] {0, 3, -1}> () y = Reshape (h, s)",
    "slice": (
        "b = Constant <value_ints = [0]> () e = Constant <value_ints = [9223372036854775807]> ()"
        " a = Constant <value_ints = [1]> () y = Slice (h, b, e, a)"
    ),
    "pad": "p = Constant <value_ints = [0, 0, 0, 0, 0, 0]> () y = Pad (h, p)",
    "expand": "s = Constant <value_ints = [1, 1, 4]> () y = Expand (h, s)",
    "tile": "s = Constant <value_ints = [1, 1, 1]> () y = Tile (h, s)",
    "times one": "o = Constant <value = float[1,4] {1, 1, 1, 1}> () y = Mul (o, h)",
    "over one": "o = Constant <value = float {1}> () y = Div (h, o)",
    "minus zero": "o = Constant <value = float {0}> () y = Sub (h, o)",
}


@pytest.mark.parametrize("name", NOTHING_LEFT)
def test_what_does_nothing_goes(parse: Parse, name: str) -> None:
    model = parse(f"m (float[2,3,4] x) => (float[2,3,4] y) {{ h = Relu (x) {NOTHING_LEFT[name]} }}")
    clean(model, "infer-shapes,remove-identities")
    assert [node.op_type for node in model.graph] == ["Relu"]
    assert [value.name for value in model.graph.outputs] == ["y"]


STAYS = {
    "plus zero": "o = Constant <value = float {0}> () y = Add (h, o)",
    "minus a negative zero": "o = Constant <value = float {-0.0}> () y = Sub (h, o)",
    "one that spreads": "o = Constant <value = float[2,1,1] {1, 1}> () g = ReduceMax <axes = [0]> (h) y = Mul (g, o)",
    "lossy cast": "a = Cast <to = 10> (h) y = Cast <to = 1> (a)",
    "slice backwards": (
        "b = Constant <value_ints = [-1]> () e = Constant <value_ints = [-9223372036854775807]> ()"
        " a = Constant <value_ints = [1]> () s = Constant <value_ints = [-1]> () y = Slice (h, b, e, a, s)"
    ),
    "pad that shifts": "p = Constant <value_ints = [0, 0, 1, 0, 0, -1]> () y = Pad (h, p)",
    "zero divided": "o = Constant <value = float {1}> () y = Div (o, h)",
}


@pytest.mark.parametrize("name", STAYS)
def test_what_does_something_stays(parse: Parse, name: str) -> None:
    model = parse(f"m (float[2,3,4] x) => (float[2,3,4] y) {{ h = Relu (x) {STAYS[name]} }}")
    before = operators(model)
    clean(model, "infer-shapes,remove-identities")
    assert operators(model) == before


def test_chains_shrink(parse: Parse) -> None:
    model = parse("""
        m (float[2,3,4] x) => (float[3,8] y, float[4,2,3] z)
        <int64[2] a = {4, 6}, int64[2] b = {3, 8}>
        { h = Reshape (x, a) y = Reshape (h, b)
          t = Transpose <perm = [1, 2, 0]> (x) z = Transpose <perm = [1, 2, 0]> (t) }
    """)
    clean(model, "remove-identities")
    assert operators(model) == ["Reshape", "Transpose"]
    assert list(model.graph.initializers) == ["b"], "what the dead node read goes too"


def test_interface_is_kept(parse: Parse) -> None:
    model = parse("""
        m (float[2] x) => (float[2] through, float[2] one, float[2] two, float[2] constant)
        <float[2] w = {1, 2}>
        { through = Identity (x) one = Relu (x) two = Identity (one) constant = Identity (w) }
    """)
    ledger = clean(model, "remove-identities")
    assert operators(model) == ["Identity", "Relu", "Identity", "Identity"]
    assert len(ledger.skips) == 3
    assert all(reason.startswith("identity: ") for reason in reasons(ledger))


def test_bodies_and_functions(parse: Parse) -> None:
    model = parse("""
        <ir_version: 8, opset_import: ["": 17, "own": 1]>
        m (float[2] x, bool c) => (float[2] y)
        { y = If (c) <then_branch = t () => (float[2] p) { a = Identity (x) b = Relu (a) p = Identity (b) },
                      else_branch = e () => (float[2] q) { q = own.twice (x) }> }
        <domain: "own", opset_import: ["": 17]>
        twice <to: int = 1> (x) => (y) { a = Identity (x) b = Cast <to: int = @to> (a) y = Relu (b) }
    """)
    clean(model, "remove-identities")
    (then, other) = (model.graph[0].attributes[name].as_graph() for name in ("then_branch", "else_branch"))
    assert [node.op_type for node in then] == ["Relu"]
    assert [node.op_type for node in other] == ["twice"]
    (function,) = model.functions.values()
    assert [node.op_type for node in function] == ["Cast", "Relu"], "a type that the caller sets is no known type"


def test_dropout_that_trains_or_may_stays(parse: Parse) -> None:
    model = parse("""
        m (float[2] x, bool t) => (float[2] y, bool[2] mask)
        <float r = {0.0}, bool yes = {1}>
        { a = Dropout (x, r, t) b = Dropout (a, r, yes) y, mask = Dropout (b) }
    """)
    assert reasons(clean(model, "remove-identities")) == [
        "dropout at inference: whether it trains is known only when it runs",
        "dropout at inference: it is told to train",
        "dropout at inference: its mask is used",
    ]


# fold-constants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"runner": RUNNER}], ids=["reference", "runtime"])
def test_constants_fold(parse: Parse, given: dict[str, Any]) -> None:
    model = parse("""
        m (float[n,4] x) => (float[n,4] y, int64[2] shape)
        <float[4] w = {1, 2, 3, 4}, float[4] v = {4, 3, 2, 1}>
        { c = Constant <value = float {2}> () s = Mul (w, c) t = Add (s, v) y = Add (x, t)
          three = Constant <value_ints = [1, 2]> () shape = Neg (three) }
    """)
    ledger = clean(model, "fold-constants", **given)
    assert operators(model) == ["Add"]
    assert list(model.graph.initializers) == ["t"]
    assert [change.numbers["bytes"] for change in ledger.changes] == [16, 16]
    assert model.graph.outputs[1].producer().op_type == "Constant"


def test_known_shapes_fold(parse: Parse) -> None:
    model = parse("""
        m (float[2,3,4] x, float[n,4] z) => (float[6,4] y, float[n,2,2] w)
        <int64[1] zero = {0}, int64[1] one = {1}, int64[2] rest = {2, -1}, int64 last = {2}>
        { s = Shape (x) e = Gather (s, last) u = Unsqueeze (e, zero) m = Constant <value_ints = [-1]> ()
          t = Concat <axis = 0> (m, u) y = Reshape (x, t)
          p = Shape (z) q = Slice (p, zero, one) r = Concat <axis = 0> (q, rest) w = Reshape (z, r) }
    """)
    clean(model, "fold-constants")
    assert operators(model) == ["Reshape", "Reshape"]
    assert [model.graph.initializers[node.inputs[1].name].const_value.numpy().tolist() for node in model.graph] == [
        [-1, 4],
        [0, 2, -1],
    ]


def test_packed_weights_stay_packed(parse: Parse) -> None:
    codes = "{" + ", ".join(str(i % 4) for i in range(4096)) + "}"
    model = parse(f"""
        <ir_version: 10, opset_import: ["": 21]>
        m (float[1,64] x) => (float[1,64] y, float[1,64] z)
        <uint8[64,64] codes = {codes}, float[4] palette = {{-1, 0, 0.5, 1}}, int8[64,64] q = {codes},
         float[1] s = {{0.5}}, float[1] f = {{2}}>
        {{ i = Cast <to = 6> (codes) w = Gather (palette, i) h = Mul (w, f) y = MatMul (x, h)
          d = DequantizeLinear (q, s) z = MatMul (x, d) }}
    """)
    before = operators(model)
    ledger = clean(model, "fold-constants")
    assert operators(model) == before
    assert set(reasons(ledger)) == {"not folded: the result is larger than the constants that it is made of"}


def test_what_shrinks_folds_and_what_is_shared_does_not_grow_the_file(parse: Parse) -> None:
    weights = "{" + ", ".join(str(i) for i in range(1024)) + "}"
    model = parse(f"""
        m (float[32,32] x) => (float[32,32] y, float[32,32] z)
        <float[32,32] w = {weights}, float[32,32] v = {weights}>
        {{ t = Transpose (w) y = MatMul (x, t) u = Transpose (v) a = MatMul (x, u) z = Add (a, v) }}
    """)
    clean(model, "fold-constants")
    assert operators(model) == ["MatMul", "Transpose", "MatMul", "Add"]
    assert sorted(model.graph.initializers) == ["t", "v"]


def test_what_cannot_or_must_not_be_computed_is_left(parse: Parse) -> None:
    model = parse("""
        m (float[2] x) => (float[2] y, float[2] z, float[2] f)
        <float[1] w = {1}, float[1] v = {0}, int64[1] far = {7}, int64[1] huge = {100000000}>
        { g = Gather (w, far) y = Add (x, g)
          r = RandomNormalLike (w) n = Mul (r, v) z = Add (x, n)
          e = Expand (w, huge) s = ReduceMax (e) f = Add (x, s) }
    """)
    before = operators(model)
    (step,) = Pipeline.parse("fold-constants").run(model, Context(runner=RUNNER))
    assert operators(model) == before
    assert [reason.split(":")[1].strip() for reason in reasons(step.ledger)] == ["over 16 MiB", "computing it failed"]


@pytest.mark.parametrize("given", [{}, {"runner": RUNNER}], ids=["reference", "runtime"])
def test_what_is_no_plain_tensor_is_not_folded(parse: Parse, given: dict[str, Any]) -> None:
    model = parse("""
        m (float[2] x) => (float[2] y, float[2] z, int64[1] n)
        <float[2] w = {1, 2}, int64 first = {0}>
        { seq = SequenceConstruct (w, w) y = SequenceAt (seq, first)
          narrow = Cast <to = 16> (w) z = Cast <to = 1> (narrow)
          words = Constant <value_strings = ["7"]> () n = Cast <to = 7> (words) }
    """)
    before = operators(model)
    ledger = Pipeline.parse("infer-shapes,fold-constants").run(model, Context(**given))[1].ledger
    assert operators(model) == before
    assert reasons(ledger) == [
        "not folded: string is not computed ahead",
        "not folded: a sequence or optional",
        "not folded: bfloat16 is not computed ahead",
    ]


def test_bodies_functions_and_captured_constants_fold(parse: Parse) -> None:
    model = parse("""
        <ir_version: 8, opset_import: ["": 17, "own": 1]>
        m (float[2] x, bool c) => (float[2] y)
        <float[2] w = {1, 2}>
        { y = If (c) <then_branch = t () => (float[2] p)
                      { k = Constant <value = float {3}> () a = Mul (w, k) p = Add (x, a) },
                      else_branch = e () => (float[2] q) { q = own.shift (x) }> }
        <domain: "own", opset_import: ["": 17]>
        shift <alpha: float = 1.0> (x) => (y)
        { k = Constant <value = float[2] {3, 4}> () n = Neg (k)
          e = LeakyRelu <alpha: float = @alpha> (n) y = Add (x, e) }
    """)
    clean(model, "fold-constants")
    then = model.graph[0].attributes["then_branch"].as_graph()
    assert [node.op_type for node in then] == ["Add"]
    assert list(then.initializers) == ["a"]
    assert list(model.graph.initializers) == []
    (function,) = model.functions.values()
    assert [node.op_type for node in function] == ["Constant", "LeakyRelu", "Add"]


# fold-batchnorm -------------------------------------------------------------------------------------------------------


def normalized(layer: str, channels: int, weight: list[int], **attributes: Any) -> ir.Model:
    """x -> layer -> BatchNormalization -> y, with random numbers."""
    generator = np.random.default_rng(0)
    dtype = attributes.pop("dtype", np.float32)
    bias = attributes.pop("bias", True)
    tape = ir.tape.Tape()
    sizes = attributes.pop("sizes")
    x = ir.val("x", dtype=ir.DataType.from_numpy(np.dtype(dtype)), shape=ir.Shape(sizes))

    def constant(name: str, array: Any) -> ir.Value:
        return tape.initializer(ir.tensor(np.asarray(array).astype(dtype), name=name))

    inputs = [x, constant("w", generator.normal(size=weight))]
    if bias:
        inputs.append(constant("b", generator.normal(size=channels)))
    h = tape.op(layer, inputs, attributes)
    numbers = [constant(name, generator.normal(size=channels)) for name in ("scale", "shift", "mean")]
    y = tape.op(
        "BatchNormalization", [h, *numbers, constant("var", generator.uniform(0.5, 2, channels))], {"epsilon": 1e-3}
    )
    y.name, y.dtype = "y", x.dtype
    graph = ir.Graph([x], [y], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 17}, name="m")
    return ir.Model(graph, ir_version=8)


LAYERS = {
    "conv": ("Conv", 6, [6, 4, 3, 3], {"sizes": [2, 4, 8, 8]}),
    "conv of groups": ("Conv", 6, [6, 2, 3], {"sizes": [2, 4, 8], "group": 2, "bias": False}),
    "transposed": ("ConvTranspose", 6, [4, 6, 3, 3], {"sizes": [2, 4, 8, 8]}),
    "transposed in groups": ("ConvTranspose", 6, [4, 3, 2, 2], {"sizes": [2, 4, 5, 5], "group": 2, "bias": False}),
    "gemm": ("Gemm", 6, [4, 6], {"sizes": [3, 4], "alpha": 0.5, "beta": 2.0}),
    "gemm transposed": ("Gemm", 6, [6, 4], {"sizes": [3, 4], "transB": 1}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_batchnorm_folds_into_every_layer(name: str) -> None:
    layer, channels, weight, options = LAYERS[name]
    model = normalized(layer, channels, weight, **dict(options))
    model.graph[0].name, model.graph[1].name = "layer", "normalization"
    clean(model, "fold-batchnorm")
    assert operators(model) == [layer]
    assert model.graph[0].name == "layer"  # by which users know it: keep=node:layer
    folded = model.graph.initializers["w"].const_value
    assert folded is not None
    assert list(folded.shape.numpy()) == weight
    assert folded.dtype == model.graph.inputs[0].dtype
    assert len(model.graph.initializers) == 2


def test_half_precision_weights_are_not_rounded_once_more() -> None:
    model = normalized("Conv", 6, [6, 4, 3, 3], sizes=[2, 4, 8, 8], dtype=np.float16)
    (step,) = Pipeline.parse("fold-batchnorm").run(model)
    assert operators(model) == ["Conv", "BatchNormalization"]
    assert reasons(step.ledger) == ["batchnorm into layer: scaling would round the float16 weight once more"]


def test_batchnorm_folds_into_matmul_and_add_and_scales_into_conv(parse: Parse) -> None:
    model = parse("""
        m (float[n,2] x, float[n,2,4,4] i) => (float[n,2] y, float[n,2,4,4] z)
        <float[2,2] w = {1, 2, 3, 4}, float[2] b = {1, -1}, float[2] s = {2, 0.5}, float[2] v = {1, 2},
         float[2,2,1,1] k = {1, -2, 3, -4}, float[1,2,1,1] m = {2, 4}, float[2,1,1] a = {3, 5}, float t = {2}>
        { h = MatMul (x, w) g = Add (h, b) y = BatchNormalization (g, s, b, b, v)
          c = Conv (i, k) d = Mul (m, c) e = Add (d, a) f = Div (e, t) z = Sub (f, a) }
    """)
    clean(model, "infer-shapes,fold-batchnorm")
    assert operators(model) == ["MatMul", "Add", "Conv"]


def test_batchnorm_says_why_it_stays(parse: Parse) -> None:
    model = parse("""
        m (float[1,2,4,4] x, float[2] live) =>
        (float[1,2,4,4] p, float[1,2,4,4] q, float[1,2,4,4] r, float[1,2,4,4] d, float[1,2,4,4] u)
        <float[2,2,1,1] k = {1, -2, 3, -4}, float[2] s = {1, 2}, float[2] v = {1, 2}, float[2] n = {-1, 2},
         float[2,2,1,1] over = {1, 2, 3, 4}>
        { a = Conv (x, k) p = BatchNormalization (a, s, live, s, v)
          b = Conv (x, k) e = Relu (b) q = BatchNormalization (b, s, s, s, v)
          d = Conv (x, k) r = BatchNormalization (d, s, s, s, v)
          f = Conv (e, k) u = BatchNormalization (f, s, s, s, n) }
    """)
    (step,) = Pipeline.parse("fold-batchnorm").run(model)
    assert [reason.removeprefix("batchnorm into layer: ") for reason in reasons(step.ledger)] == [
        "its statistics are no constants, or a caller may override them",
        "the layer's output is used elsewhere",
        "the layer's output is an output of the graph",
        "a variance is negative",
    ]


def test_a_shared_weight_is_copied_only_where_it_is_small() -> None:
    for size, folds in ((4, True), (64, False)):
        model = normalized("Conv", size, [size, 4, 3, 3], sizes=[1, 4, 5, 5])
        x, w = model.graph[0].inputs[:2]
        other = ir.node("Conv", [x, w])
        other.outputs[0].name, other.outputs[0].dtype = "z", x.dtype
        model.graph.append(other)
        model.graph.outputs.append(other.outputs[0])
        ledger = clean(model, "fold-batchnorm")
        assert ("BatchNormalization" not in operators(model)) is folds
        assert len(reasons(ledger)) == (not folds)
        assert other.inputs[1].name == "w"


def test_a_weight_that_callers_may_override_stays() -> None:
    model = normalized("Conv", 6, [6, 4, 3, 3], sizes=[1, 4, 5, 5])
    model.graph.inputs.append(model.graph.initializers["w"])
    before = operators(model)
    ctx = Context()
    Pipeline.parse("fold-batchnorm").run(model, ctx)
    assert operators(model) == before


def test_training_batchnorm_stays(parse: Parse) -> None:
    model = parse("""
        m (float[2,2,4,4] x) => (float[2,2,4,4] y, float[2] a, float[2] b)
        <float[2,2,1,1] k = {1, -2, 3, -4}, float[2] s = {1, 2}, float[2] v = {1, 2}>
        { h = Conv (x, k) y, a, b = BatchNormalization <training_mode = 1> (h, s, s, s, v) }
    """)
    (step,) = Pipeline.parse("fold-batchnorm").run(model)
    assert reasons(step.ledger) == ["batchnorm into layer: it is in training mode"]


# merge-duplicates -----------------------------------------------------------------------------------------------------


def test_equal_constants_merge_but_not_scales_inputs_or_outputs(parse: Parse) -> None:
    model = parse("""
        m (float[2] x, float[2] given) => (float[2] y, float[2] out, float[2] z)
        <float[2] a = {1, 2}, float[2] b = {1, 2}, float[2] other = {1, 3}, float[2] given = {1, 2},
         float[2] out = {1, 2},
         float s = {0.5}, float t = {0.5}, float u = {0.5}, float v = {0.5}, float[2] minus = {-0.0, 0},
         float[2] plus = {0, 0}>
        { c = Constant <value = float[2] {1, 2}> ()
          d = Add (x, a) e = Add (d, b) f = Add (e, c) g = Add (f, given) h = Add (g, other)
          i = Mul (h, u) k = Mul (i, v)
          l = Add (k, minus) n = Add (l, plus) y = Add (n, out)
          q = QuantizeLinear (x, s) z = DequantizeLinear (q, t) }
    """)
    ledger = clean(model, "merge-duplicates")
    assert list(model.graph.initializers) == ["a", "other", "given", "out", "s", "t", "u", "minus", "plus"]
    assert [change.subject for change in ledger.changes] == ["b", "c", "v"]
    assert {skip.subject: skip.reason for skip in ledger.skips} == {
        "out": "has an equal twin, but is an output",
        "s": "has an equal twin, but is a scale or zero point, which ONNX Runtime fuses only where each has its own",
        "t": "has an equal twin, but is a scale or zero point, which ONNX Runtime fuses only where each has its own",
    }


def test_equal_strings_stay_and_the_ledger_tells(parse: Parse) -> None:
    model = parse("""
        m (string[2] x) => (string[2] y)
        <string[2] a = {"one", "two"}, string[2] b = {"one", "two"}, string[2] c = {"one", "three"}>
        { k = Equal (x, a) l = Equal (x, b) n = Equal (x, c) o = Or (k, l) p = Or (o, n) y = Where (p, x, a) }
    """)
    model.opset_imports[""] = 19  # the first whose Equal takes strings
    ledger = clean(model, "merge-duplicates")
    assert [(skip.subject, skip.reason) for skip in ledger.skips] == [
        ("a", "has an equal twin, but holds strings"),
        ("b", "has an equal twin, but holds strings"),
    ]


def test_bodies_merge_among_themselves_and_large_ones_with_the_main_graph(parse: Parse) -> None:
    numbers = "{" + ", ".join(str(i) for i in range(512)) + "}"
    model = parse(f"""
        m (float[512] x, bool c) => (float[512] y)
        <float[512] w = {numbers}, float s = {{2}}>
        {{ h = Add (x, w) g = Mul (h, s)
          y = If (c) <then_branch = t () => (float[512] p)
                      {{ k = Constant <value = float[512] {numbers}> () o = Constant <value = float {{2}}> ()
                        n = Constant <value = float {{2}}> () a = Add (g, k) b = Mul (a, o) p = Mul (b, n) }},
                      else_branch = e () => (float[512] q) {{ q = Neg (g) }}> }}
    """)
    ledger = clean(model, "merge-duplicates")
    assert [change.subject.split("/")[-1] for change in ledger.changes] == ["k", "n"]


def test_large_external_twins_merge(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(600, 600)).astype(np.float32)
    near = weight.copy()
    near[-1, -1] += 1
    tape = ir.tape.Tape()
    value = x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([1, 600]))
    for name, array in (("a", weight), ("b", weight.copy()), ("c", near)):
        value = tape.op("MatMul", [value, tape.initializer(ir.tensor(array, name=name))])
    value.name, value.dtype = "y", x.dtype
    graph = ir.Graph([x], [value], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 17}, name="m")
    ir.save(ir.Model(graph, ir_version=8), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = load(tmp_path / "m.onnx")
    clean(model, "merge-duplicates")
    assert list(model.graph.initializers) == ["a", "c"]


# remove-dead-code, unify-names, infer-shapes, strip-metadata ----------------------------------------------------------


def test_dead_code_goes(parse: Parse) -> None:
    model = parse("""
        <ir_version: 8, opset_import: ["": 17, "own": 1]>
        m (float[4] x, float[2] unused, bool c) => (float[2] y, float[4] z)
        <int64[1] k = {2}, float[4] w = {1, 2, 3, 4}, float[4] d = {1, 2, 3, 4}, float[2] unused = {1, 2}>
        { y, i = TopK (x, k) a = Mul (x, d) b = Relu (a) l = own.live (x)
          z = If (c) <then_branch = t () => (float[4] p) { n = Neg (w) r, m = Dropout (l) p = Neg (r) },
                      else_branch = e () => (float[4] q) { q = Neg (l) }> }
        <domain: "own", opset_import: ["": 17, "own": 1]>
        live (x) => (y) { h = own.inner (x) u = Neg (h) y = Relu (h) }
        <domain: "own", opset_import: ["": 17]>
        inner (x) => (y) { y = Neg (x) }
        <domain: "own", opset_import: ["": 17, "own": 1]>
        dead (x) => (y) { y = own.inner (x) }
    """)
    clean(model, "remove-dead-code")
    assert operators(model) == ["TopK", "live", "If"]
    assert list(model.graph.initializers) == ["k", "unused"], "w was captured by dead code only"
    then = model.graph[2].attributes["then_branch"].as_graph()
    assert [(node.op_type, len(node.outputs)) for node in then] == [("Dropout", 1), ("Neg", 1)]
    assert [function.name for function in model.functions.values()] == ["live", "inner"]
    assert [len(function) for function in model.functions.values()] == [2, 1]
    assert len(model.graph[0].outputs) == 2, "the indices of TopK are not optional"


def test_a_captured_constant_is_alive(parse: Parse) -> None:
    model = parse("""
        m (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}>
        { k = Constant <value = float[2] {3, 4}> ()
          y = If (c) <then_branch = t () => (float[2] p) { p = Add (x, w) },
                      else_branch = e () => (float[2] q) { q = Add (x, k) }> }
    """)
    ledger = clean(model, "remove-dead-code,merge-duplicates")
    assert ledger.changes == []


def test_names_become_unique_and_printable(parse: Parse) -> None:
    model = parse("""
        m (float[2] x, bool c) => (float[2] y)
        { h = Relu (x)
          z = If (c) <then_branch = t () => (float[2] p) { a = Relu (h) p = Neg (a) },
                      else_branch = e () => (float[2] p) { a = Neg (h) p = Relu (a) }>
          y = Relu (z) }
    """)
    for node, name in zip(model.graph, ("same", "same", None), strict=True):
        node.name = name
    model.graph[0].outputs[0].name = "bell\a"
    Pipeline.parse("unify-names").run(model)
    assert problems(model) == []
    nodes = list(model.graph.all_nodes())
    names = [node.name for node in nodes]
    values = [value.name for node in nodes for value in node.outputs]
    assert len(set(names)) == len(names)
    assert len(set(values)) == len(values)
    assert all(name and name.isprintable() for name in (*names, *values))
    assert (names[0], values[0]) == ("same", "bell_")


def test_shapes_are_refined_and_contradictions_told(parse: Parse) -> None:
    model = parse("""
        m (float[batch,3] x, bool c) => (float[batch,4] y, float[k,4] z)
        <float[3,4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>
        { h = MatMul (x, w) r = Relu (h) n = NonZero (r)
          y = If (c) <then_branch = t () => (float[batch,4] p) { a = Neg (h) p = Neg (a) },
                      else_branch = e () => (float[batch,4] q) { q = Neg (h) }>
          z = Identity (r) }
    """)
    nodes = {node.outputs[0].name: node.outputs[0] for node in model.graph.all_nodes()}
    nodes["h"].shape = ir.Shape([7, 4])
    nodes["r"].shape = ir.Shape([7, 5])
    ctx = Context()
    (step,) = Pipeline.parse("infer-shapes").run(model, ctx)
    assert str(nodes["h"].shape) == "[7,4]", "the file knows more"
    assert str(nodes["a"].shape) in ("[7,4]", "[batch,4]")
    assert nodes["n"].dtype == ir.DataType.INT64
    assert str(nodes["n"].shape) == "[2,None]", "no invented names"
    assert str(nodes["z"].shape) == "[k,4]"
    assert [skip.subject for skip in step.ledger.skips] == ["r"]
    assert "the file says its shape is [7, 5]" in step.ledger.skips[0].reason


def test_metadata_goes_except_what_is_kept_and_the_models_own(parse: Parse) -> None:
    model = parse("m (float[2] x) => (float[2] y) { y = Relu (x) }")
    model.metadata_props["labels"], model.doc_string = "a,b", "mine"
    node = model.graph[0]
    node.metadata_props.update({"pkg.trace": "line 1", "author": "me"})
    node.doc_string, model.graph.doc_string = "activation", "graph"
    node.outputs[0].metadata_props["pkg.trace"] = "x"
    with pytest.raises(UsageError, match=r"keep=autor matches no metadata key .* Did you mean 'author'\?"):
        clean(model, "strip-metadata{keep=(pkg*, autor)}")
    ledger = clean(model, "strip-metadata{keep=auth*}")
    assert reasons(ledger) == ["metadata kept by request: auth*"]
    assert dict(node.metadata_props) == {"author": "me"}
    assert (node.doc_string, node.outputs[0].metadata_props, model.graph.doc_string) == (None, {}, None)
    assert (dict(model.metadata_props), model.doc_string) == ({"labels": "a,b"}, "mine")
    assert [(change.subject, change.numbers) for change in ledger.changes] == [
        ("main graph", {"bytes": len("pkg.traceline 1" + "activation" + "graph" + "pkg.tracex")})
    ]


# the whole family -----------------------------------------------------------------------------------------------------


def real_models() -> list[Path]:
    found = []
    for package in ("rapidocr_onnxruntime", "magika"):
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found += [Path(str(file.locate())) for file in files if file.suffix == ".onnx"]
    return [*found, *sorted(Path(penjing.models.__path__[0]).glob("*.onnx"))]


NODES_AT_MOST = {
    "ch_PP-OCRv3_det_infer": 229,
    "ch_PP-OCRv3_rec_infer": 274,
    "ch_PP-OCRv4_det_infer": 269,
    "ch_PP-OCRv4_rec_infer": 342,
    "ch_ppocr_mobile_v2.0_cls_infer": 180,
}


@pytest.mark.parametrize("path", real_models(), ids=lambda path: path.stem)
def test_clean_on_real_models(path: Path) -> None:
    model = load(path)
    clean(model, "clean", runner=RUNNER)
    assert len(operators(model)) <= NODES_AT_MOST.get(path.stem, 200)
    once = text(model)
    again = Pipeline.parse("clean").run(model, Context(runner=RUNNER))
    assert [step.ledger.changes for step in again] == [[]] * len(again)
    assert text(model) == once


def test_clean_leaves_quantized_models_as_they_are(parse: Parse) -> None:
    model = parse("""
        m (float[1,2,4,4] x) => (float[1,2,4,4] y)
        <float s = {0.1}, uint8 z = {128}, float ws = {0.02}, int8 wz = {0}, int8[2,2,1,1] k = {1, -2, 3, -4},
         float os = {0.1}, uint8 oz = {128}>
        { q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) w = DequantizeLinear (k, ws, wz)
          h = Conv (d, w) o = QuantizeLinear (h, os, oz) y = DequantizeLinear (o, os, oz) }
    """)
    before = [(node.op_type, [value.name for value in node.inputs if value]) for node in model.graph]
    clean(model, "clean")
    assert [(node.op_type, [value.name for value in node.inputs if value]) for node in model.graph] == before


def test_a_shape_that_a_value_takes_over_from_an_output_brings_its_node_back(parse: Parse) -> None:
    model = parse("""
        m (float[2,3] x, bool b) => (float[2,3] y)
        { v = If (b) <then_branch = t () => (float[2,3] p) { p = Identity (x) },
                      else_branch = e () => (float[2,3] q) { q = Neg (x) }>
          s = Shape (x) i = Identity (s) r = Reshape (v, i) y = Cast <to = 1> (r) }
    """)
    clean(model, "infer-shapes,remove-identities")
    assert operators(model) == ["If"]


def test_fold_constants_casts_like_a_type_that_is_known_once_something_has_folded(parse: Parse) -> None:
    model = parse(
        "g (float[2] x, int64[2] n) => (float[2] y) {"
        "  one = Constant<value_int=1>()  like = CastLike(one, x)  c = CastLike(n, like)  y = Add(c, like) }"
    )
    clean(model, "fold-constants")
    assert [node.op_type for node in model.graph] == ["Cast", "Add"]
    assert not clean(model, "fold-constants").changes
