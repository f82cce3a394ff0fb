"""hoist-loop-invariants: what loops carry unchanged is read from outside, and ONNX Runtime computes the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from penjing.ir.address import graphs
from penjing.ir.files import load, save
from penjing.ir.references import ANNOTATION, mark
from penjing.ir.text import text
from penjing.ir.verify import problems
from penjing.ir.weights import weights
from penjing.passes.base import Context
from penjing.passes.ledger import Ledger
from penjing.passes.pipeline import Pipeline
from penjing.runtime.draws import random_feeds
from penjing.runtime.session import OrtRunner

Parse = Callable[[str], ir.Model]
RUNNER = OrtRunner(prepack=False)  # packed constants are multiplied by another kernel, which may round otherwise
HOISTED = "carried unchanged, now read from outside"

LSTM = """
    m (int64 n, float[2,3] x) => (float[2,3] last, float[t,2,3] all)
    <float[3,3] w = {0.1, 0.2, 0.3, -0.1, 0.5, 0.25, 0.7, -0.3, 0.9}, float[3] b = {0.1, -0.2, 0.3}, bool go = {1}>
    { [loop] last, w_end, b_end, all =
        Loop (n, go, x, w, b) <body = step (int64 i, bool g, float[2,3] s, float[3,3] k, float[3] c)
          => (bool g2, float[2,3] s2, float[3,3] k2, float[3] c, float[2,3] row)
        { g2 = Identity (g) k1 = Identity (k) k2 = Identity (k1)
          p = MatMul (s, k) q = Add (p, c) s2 = Tanh (q) row = Identity (s2) }> }
"""


def hoist(model: ir.Model, passes: str = "hoist-loop-invariants") -> Ledger:
    """Run it, hold it to bit-identical outputs for loops of no, one and three trips, and see that it is done."""
    before = model.clone()
    (*_, step) = Pipeline.parse(passes).run(model)
    assert problems(model) == []
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    feed = next(iter(random_feeds(before, 1)))
    feeds = [{**feed, **({"n": np.array(trips, np.int64)} if "n" in feed else {})} for trips in (0, 1, 3)]
    for old, new in zip(RUNNER.run(before, feeds, level="off"), RUNNER.run(model, feeds, level="off"), strict=True):
        assert list(old) == list(new)
        for name, value in old.items():
            np.testing.assert_array_equal(new[name], value)
    once = text(model)
    (*_, again) = Pipeline.parse(passes).run(model)
    assert again.ledger.changes == []
    assert again.ledger.skips == step.ledger.skips
    assert text(model) == once
    return step.ledger


def subjects(ledger: Ledger) -> list[str]:
    return [change.subject for change in ledger.changes if change.what == HOISTED]


def loops(model: ir.Model) -> list[ir.Node]:
    return [node for _, graph in graphs(model) for node in graph if node.op_type in ("Loop", "Scan")]


def read(model: ir.Model, op_type: str) -> list[list[str | None]]:
    return [
        [value.name for value in node.inputs if value is not None]
        for _, graph in graphs(model)
        for node in graph
        if node.op_type == op_type
    ]


def test_weights_that_a_loop_carries_become_constants_of_its_body(parse: Parse) -> None:
    model = parse(LSTM)
    assert {use.port for weight in weights(model) if weight.address == "w" for use in weight.uses} != {1}
    assert subjects(hoist(model)) == ["loop/body/k", "loop/body/c"]
    (loop,) = loops(model)
    assert [value and value.name for value in loop.inputs] == ["n", "go", "x"]
    assert [value.name for value in loop.outputs] == ["last", "all"]
    body = loop.attributes["body"].as_graph()
    assert [value.name for value in body.inputs] == ["i", "g", "s"]
    assert [value.name for value in body.outputs] == ["g2", "s2", "row"]
    assert read(model, "MatMul") == [["s", "w"]]
    assert [len(body), *read(model, "Add")] == [5, ["p", "b"]]
    (weight,) = (weight for weight in weights(model) if weight.address == "w")
    assert [(use.node.op_type, use.port) for use in weight.uses] == [("MatMul", 1)]


def test_quantization_takes_the_weights_that_a_loop_carried(parse: Parse) -> None:
    rows = ", ".join(f"{number % 7 - 3}" for number in range(64 * 64))
    model = parse(f"""
        m (int64 n, float[2,64] x) => (float[2,64] last) <float[64,64] w = {{{rows}}}, bool go = {{1}}>
        {{ [loop] last, end = Loop (n, go, x, w) <body = step (int64 i, bool g, float[2,64] s, float[64,64] k)
            => (bool g, float[2,64] s2, float[64,64] k) {{ p = MatMul (s, k) s2 = Tanh (p) }}> }}
    """)
    for quantize in ("quantize-dynamic", "quantize-weights"):
        counts = []
        for passes in (quantize, f"clean,{quantize}"):
            (*_, step) = Pipeline.parse(passes).run(model.clone())
            counts.append(len(step.ledger.changes))
        assert counts == [0, 1], quantize


def test_what_is_behind_the_loop_reads_the_initial_value(parse: Parse) -> None:
    model = parse("""
        m (int64 n, float[2] x) => (float[2] y, float[2] same, float[2] z) <bool go = {1}>
        { h = Neg (x)
          a, s, same = Loop (n, go, x, h, h) <body = b (int64 i, bool g, float[2] u, float[2] v, float[2] w)
            => (bool g, float[2] u2, float[2] v, float[2] w) { u2 = Add (u, v) }>
          y = Mul (a, s)
          z = If (go) <then_branch = t () => (float[2] p) { p = Neg (s) }, else_branch = e () => (float[2] q)
            { q = Relu (s) }> }
    """)
    assert len(subjects(hoist(model))) == 2
    assert read(model, "Mul") == [["a", "same"]]  # as h is called now
    assert [value.name for value in model.graph.outputs] == ["y", "same", "z"]
    assert [*read(model, "Add"), *read(model, "Relu")] == [["u", "same"], ["same"]]


def test_an_output_of_the_model_keeps_its_name_and_comes_from_an_identity(parse: Parse) -> None:
    model = parse("""
        m (int64 n, float[2] x, float[2] w) => (float[2] y, float[2] end) <bool go = {1}>
        { y, end = Loop (n, go, x, w) <body = b (int64 i, bool g, float[2] u, float[2] v)
            => (bool g, float[2] u2, float[2] v) { u2 = Add (u, v) }> }
    """)
    assert len(subjects(hoist(model))) == 1
    assert read(model, "Identity") == [["w"]]
    assert [value.name for value in model.graph.outputs] == ["y", "end"]
    assert [str(value.shape) for value in model.graph.outputs] == ["[2]", "[2]"]


def test_a_loop_that_carries_nothing_else_goes(parse: Parse) -> None:
    model = parse("""
        m (int64 n, float[2] x) => (float[2] y) <bool go = {1}>
        { trips = Identity (n) [loop] s = Loop (trips, go, x) <body = b (int64 i, bool g, float[2] u)
            => (bool g, float[2] v) { v = Identity (u) unused = Neg (u) }>
          y = Neg (s) }
    """)
    ledger = hoist(model)
    assert [change.subject for change in ledger.changes] == ["loop/body/u", "loop"]
    assert [node.op_type for node in model.graph] == ["Neg"]
    assert not model.graph.initializers


def test_nested_loops_from_the_inside_out(parse: Parse) -> None:
    """The outer loop hands on what the inner one does; once the inner one is done the outer can be."""
    model = parse("""
        m (int64 n, float[2,2] x) => (float[2,2] y) <float[2,2] w = {1, 0.5, -2, 3}, bool go = {1}>
        { [outer] y, w_end = Loop (n, go, x, w) <body = b (int64 i, bool g, float[2,2] s, float[2,2] k)
            => (bool g, float[2,2] t, float[2,2] l)
            { [inner] t, l = Loop (n, g, s, k) <body = c (int64 j, bool h, float[2,2] a, float[2,2] e)
                => (bool h, float[2,2] d, float[2,2] e) { d = MatMul (a, e) }> }> }
    """)
    assert subjects(hoist(model)) == ["outer/body/inner/body/e", "outer/body/k"]
    assert read(model, "MatMul") == [["a", "w"]]
    assert [len(node.inputs) for node in loops(model)] == [3, 3]


def test_a_value_handed_from_one_place_to_another_is_found_in_the_next_round(parse: Parse) -> None:
    """Both places begin as w; the second takes over what the first has, which is w forever."""
    model = parse("""
        m (int64 n, float[2] x) => (float[2] y, float[t,2] rows) <float[2] w = {1, 0.5}, bool go = {1}>
        { y, a, c, rows = Loop (n, go, x, w, w) <body = b (int64 i, bool g, float[2] s, float[2] k, float[2] l)
            => (bool g, float[2] t, float[2] k, float[2] k, float[2] k) { h = Add (s, k) t = Mul (h, l) }> }
    """)
    assert sorted(name[-1] for name in subjects(hoist(model))) == ["k", "l"]
    assert [*read(model, "Add"), *read(model, "Mul")] == [["s", "w"], ["h", "w"]]
    assert [value.name for value in loops(model)[0].outputs] == ["y", "rows"]


def test_what_changes_is_carried_on(parse: Parse) -> None:
    """Places that are swapped, a value that another takes the place of, and one that only the condition reads."""
    model = parse("""
        m (int64 n, float[2] x, float[2] v, float[2] w) => (float[2] a, float[2] b, float[2] c) <bool go = {1}>
        { a, b, c = Loop (n, go, x, v, w) <body = b (int64 i, bool g, float[2] p, float[2] q, float[2] r)
            => (bool g, float[2] q, float[2] p, float[2] s) { s = Identity (x) }> }
    """)
    once = text(model)
    assert hoist(model).changes == []
    assert text(model) == once


def test_names_in_the_body_that_would_hide_the_initial_value_give_way(parse: Parse) -> None:
    """``w`` names an input of the body, and a constant and a branch's constant in it, besides the initial value."""
    model = parse("""
        m (int64 n, float[2] x) => (float[2] y, float[2] z) <float[2] w = {1, 0.5}, float[2] v = {2, 3}, bool go = {1}>
        { y, v_end, w_end = Loop (n, go, x, v, w) <body = b (int64 i, bool g, float[2] s, float[2] w, float[2] v)
            => (bool g, float[2] t, float[2] o, float[2] v)
            { h = Add (s, w) o = Neg (w)
              t = If (g) <
                then_branch = p () => (float[2] p1) <float[2] w = {7, 8}> { p0 = Add (v, w) p1 = Mul (p0, h) },
                else_branch = q () => (float[2] q1) { q1 = Neg (v) }> }>
          z = Loop (n, go, x) <body = c (int64 j, bool k, float[2] w) => (bool k, float[2] u) { u = Add (w, w_end) }> }
    """)
    assert subjects(hoist(model)) == ["Loop/body/v"]
    assert read(model, "Add") == [["s", "w_inner"], ["w", "w_inner_2"], ["w_inner_1", "w"]]
    assert [graph.name for _, graph in graphs(model)] == ["m", "b", "p", "q", "c"]


def test_a_body_input_may_have_the_name_of_its_initial_value(parse: Parse) -> None:
    model = parse("""
        m (int64 n, float[2] x) => (float[2] y) <float[2] w = {1, 0.5}, bool go = {1}>
        { y, w_end = Loop (n, go, x, w) <body = b (int64 i, bool g, float[2] x, float[2] w)
            => (bool g, float[2] t, float[2] w) { t = Add (x, w) }> }
    """)
    assert subjects(hoist(model)) == ["Loop/body/w"]
    assert read(model, "Add") == [["x", "w"]]


def test_the_state_of_a_scan(parse: Parse) -> None:
    """With an Identity, for ONNX Runtime 1.32 gives numbers out of nowhere where a Scan's state is handed on bare."""
    model = parse("""
        m (float[4,2] x, float[2] init) => (float[2] end, float[2] w_end, float[2,4] sums) <float[2] w = {1, 0.5}>
        { [scan] w_end, end, sums = Scan <num_scan_inputs = 1, scan_output_axes = [1],
            body = b (float[2] k, float[2] s, float[2] r) => (float[2] k2, float[2] t, float[2] o)
            { k2 = Identity (k) h = Mul (r, k) t = Add (s, h) o = Identity (t) }> (w, init, x) }
    """)
    assert subjects(hoist(model)) == ["scan/body/k"]
    (scan,) = loops(model)
    assert [value and value.name for value in scan.inputs] == ["init", "x"]
    assert [value.name for value in scan.outputs] == ["end", "sums"]
    assert scan.attributes["num_scan_inputs"].as_int() == 1


def test_a_loop_in_a_function(parse: Parse) -> None:
    model = parse("""
        <ir_version: 8, opset_import: ["": 17, "f": 1]>
        m (int64 n, float[2] x) => (float[2] y, float[2] z) <float[2] w = {1, 0.5}> { y, z = f.F (n, x, w) }
        <opset_import: ["": 17], domain: "f">
        F (n, x, w) => (y, z) { go = Constant <value = bool {1}> ()
            [loop] y, z = Loop (n, go, x, w) <body = b (int64 i, bool g, float[2] s, float[2] k)
                => (bool g, float[2] t, float[2] k) { t = Add (s, k) }> }
    """)
    assert subjects(hoist(model)) == ["f::F/loop/body/k"]
    assert read(model, "Add") == [["s", "w"]]
    assert read(model, "Identity") == [["w"]]


def test_sequences_and_optionals(parse: Parse) -> None:
    source = """
        <ir_version: 8, opset_import: ["": %d]>
        m (int64 n, float[2] x) => (float[2] y%s) <bool go = {1}, int64 one = {1}>
        { h = Neg (x) s = SequenceConstruct (x, h)
          y, s_end = Loop (n, go, x, s) <body = b (int64 i, bool g, float[2] p, seq(float[2]) q)
            => (bool g, float[2] t, seq(float[2]) q) { e = SequenceAt (q, one) t = Add (p, e) }> }
    """
    out = ", seq(float[2]) s_end"
    assert len(subjects(hoist(parse(source % (13, ""))))) == 1
    assert len(subjects(hoist(parse(source % (17, out))))) == 1
    ledger = hoist(parse(source % (13, out)))
    assert [skip.reason for skip in ledger.skips] == [
        "carried unchanged, but as an output it needs an Identity, which takes sequences from opset 14 on"
    ]


def test_what_an_annotation_names_is_carried_on(parse: Parse) -> None:
    model = parse(LSTM)
    body = loops(model)[0].attributes["body"].as_graph()
    body.inputs[2].meta[ANNOTATION] = {"SCALE_TENSOR": "k"}
    mark(model)
    ledger = hoist(model)
    assert subjects(ledger) == ["loop/body/c"]
    assert [(skip.subject, skip.reason) for skip in ledger.skips] == [
        ("loop/body/k", "carried unchanged, but a quantization annotation names it")
    ]


def test_a_loop_that_is_assigned_to_devices_stays(parse: Parse) -> None:
    proto = ir.to_proto(parse(LSTM))
    proto.ir_version = 11
    proto.configuration.add(name="pair", num_devices=2)
    proto.graph.node[0].device_configurations.add(configuration_id="pair")
    (step,) = Pipeline.parse("hoist-loop-invariants").run(ir.from_proto(proto))
    assert step.ledger.changes == []
    assert [skip.reason for skip in step.ledger.skips] == ["carried unchanged, but the loop is assigned to devices"] * 2


def test_an_input_of_a_body_with_a_default(parse: Parse) -> None:
    """It is an initializer too, which what the loop gives overrides."""
    model = parse("""
        m (int64 n, float[2] x, float[2] w) => (float[2] y) <bool go = {1}>
        { y, end = Loop (n, go, x, w) <body = b (int64 i, bool g, float[2] s, float[2] k)
            => (bool g, float[2] t, float[2] k) { t = Add (s, k) }> }
    """)
    body = loops(model)[0].attributes["body"].as_graph()
    body.inputs[3].const_value = ir.tensor(np.float32([5, 6]), name="k")
    body.register_initializer(body.inputs[3])
    Pipeline.parse("hoist-loop-invariants").run(model)
    assert read(model, "Add") == [["s", "w"]]
    assert not body.initializers


def test_types_and_shapes_that_the_body_knows_are_known_outside(parse: Parse) -> None:
    model = parse("""
        m (int64 n, float[2] x, int64[1] shape) => (float[2] y) <bool go = {1}>
        { k = Reshape (x, shape)
          y, end = Loop (n, go, x, k) <body = b (int64 i, bool g, float[2] s, float[2] k)
            => (bool g, float[2] t, float[2] k) { t = Add (s, k) }> }
    """)
    (value,) = (value for node in model.graph for value in node.outputs if value.name == "k")
    value.shape = None
    Pipeline.parse("hoist-loop-invariants").run(model)
    assert (value.dtype, str(value.shape)) == (ir.DataType.FLOAT, "[2]")


def test_clean_hoists_and_folds_what_is_constant_then(parse: Parse, tmp_path: Path) -> None:
    model = parse(LSTM.replace("p = MatMul (s, k)", "f = Neg (k) p = MatMul (s, f)"))
    save(model, tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    before = model.clone()
    steps = Pipeline.parse("clean").run(model, Context(runner=RUNNER))
    assert [step.pass_.name for step in steps if step.changed][:2] == ["infer-shapes", "remove-identities"]
    assert read(model, "Neg") == []
    feeds = [{"n": np.array(3, np.int64), "x": np.float32([[1, 2, 3], [-1, 0.5, 0]])}]
    (old,), (new,) = (list(RUNNER.run(one, feeds, level="off")) for one in (before, model))
    for name, value in old.items():
        np.testing.assert_allclose(new[name], value, rtol=1e-6)
