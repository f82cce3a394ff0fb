"""Patterns and the rewriter: what matches, what replaces it, and what happens to names, outputs and what died."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from penjing.ir.errors import PenjingError, UsageError
from penjing.ir.match import decline, parse, rule
from penjing.ir.verify import problems
from penjing.passes.base import Context
from penjing.passes.rewrite import RULE, rewrite

Parse = Callable[[str], ir.Model]


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def matches(pattern: str, model: ir.Model, **options: Any) -> list[dict[str, Any]]:
    """What the names of ``pattern`` stand for at each node that it matches."""
    names = sorted({name for name in parse(pattern).names() if name != "_"})
    scope: dict[str, Any] = {}
    exec(f"def found(tape, {', '.join(names)}): pass", scope)
    made = rule(pattern, **options)(scope["found"])
    return [match.names for node in model.graph for match in made.matches(node, model.opset_imports)]


@rule("Add(MatMul(x, w), b)")
def matmul_add_to_gemm(tape: Any, x: ir.Value, w: ir.Value, b: ir.Value) -> Any:
    if b.shape is None or b.shape.rank() != 1:
        decline("what is added is no vector")
    return tape.Gemm(x, w, b)


def test_replacement_takes_name_type_shape_and_place_among_the_outputs(parse: Parse) -> None:
    model = parse("m (float[2,3] x, float[3,4] w, float[4] b) => (float[2,4] y) { h = MatMul (x, w) y = Add (h, b) }")
    root = model.graph[1]
    root.name, ctx = "/dense", Context()
    assert rewrite(model, [matmul_add_to_gemm], ctx) == 1
    node, output = model.graph[0], model.graph.outputs[0]
    assert operators(model) == ["Gemm"]
    assert (node.name, output.name, str(output.shape)) == ("/dense", "y", "[2,4]")
    assert output.producer() is node
    assert node.meta[RULE] == "matmul add to gemm"
    assert [(change.subject, change.what) for change in ctx.ledger.changes] == [("/dense", "matmul add to gemm")]
    assert problems(model) == []


def test_commutative_operators_match_both_ways(parse: Parse) -> None:
    model = parse("m (float[2,3] x, float[3,4] w, float[4] b) => (float[2,4] y) { h = MatMul (x, w) y = Add (b, h) }")
    assert rewrite(model, [matmul_add_to_gemm], Context()) == 1
    assert [value.name for value in model.graph[0].inputs if value is not None] == ["x", "w", "b"]
    assert len(matches("Sub(MatMul(x, w), b)", model)) == 0
    assert len(matches("Add(x, x)", parse("m (float[2] a) => (float[2] y) { y = Add (a, a) }"))) == 1


def test_a_nested_node_with_other_uses_is_left(parse: Parse) -> None:
    text = """
        m (float[2,3] x, float[3,4] w, float[4] b) => (float[2,4] y, float[2,4] z)
        {{ h = MatMul (x, w) y = Add (h, b) {} }}
    """
    used, output = parse(text.format("z = Relu (h)")), parse(text.replace("] z", "] h").format(""))
    for model in (used, output):
        before = operators(model)
        assert rewrite(model, [matmul_add_to_gemm], Context()) == 0
        assert operators(model) == before
    assert len(matches("Add(MatMul(x, w), b)", used, shared=True)) == 1


def test_a_use_in_a_body_counts(parse: Parse) -> None:
    model = parse("""
        m (float[2,3] x, float[3,4] w, float[4] b, bool c) => (float[2,4] y, float[2,4] z)
        { h = MatMul (x, w)
          y = Add (h, b)
          z = If (c) <then_branch = t () => (float[2,4] p) { p = Relu (h) },
                      else_branch = e () => (float[2,4] q) { q = Neg (h) }> }
    """)
    assert rewrite(model, [matmul_add_to_gemm], Context()) == 0


def test_bodies_and_functions_are_rewritten(parse: Parse) -> None:
    model = parse("""
        <ir_version: 8, opset_import: ["": 17, "own": 1]>
        m (float[2,3] x, float[3,4] w, float[4] b, bool c) => (float[2,4] y)
        { y = If (c) <then_branch = t () => (float[2,4] p) { h = MatMul (x, w) p = Add (h, b) },
                      else_branch = e () => (float[2,4] q) { q = own.dense (x, w, b) }> }
        <domain: "own", opset_import: ["": 17]>
        dense (x, w, b) => (y) { v = Constant <value = float[1] {1.0}> () h = MatMul (x, w) y = Add (h, v) }
    """)
    for function in model.functions.values():
        for node in function:
            node.outputs[0].shape = ir.Shape([1])
    ctx = Context()
    assert rewrite(model, [matmul_add_to_gemm], ctx) == 2
    assert [change.subject.rsplit("/", 1)[0] for change in ctx.ledger.changes] == [
        f"{model.graph[0].name or 'If'}/then",
        "own::dense",
    ]
    assert problems(model) == []


def test_attributes_bind_test_and_default(parse: Parse) -> None:
    model = parse("m (float[2,3] x) => (float[3,2] y) { a = Softmax <axis = 0> (x) y = Transpose (a) }")
    assert matches("Softmax(x, axis=a)", model)[0]["a"] == 0
    assert len(matches("Softmax(x, axis=0)", model)) == 1
    assert len(matches("Softmax(x, axis=-1)", model)) == 0
    assert matches("Transpose(x, perm=p)", model)[0]["p"] is None
    gemm = parse("m (float[2,3] x, float[3,4] w) => (float[2,4] y) { y = Gemm (x, w) }")
    assert matches("Gemm(x, w, transA=0, alpha=a)", gemm)[0]["a"] == 1.0


def test_omitted_inputs_rest_and_nodes(parse: Parse) -> None:
    model = parse("m (float[2] x, float h) => (float[2] y) { y = Clip (x, , h) }")
    assert len(matches("Clip(x, low, high)", model)) == 0, "a name is a value"
    assert len(matches("Clip(x, _, high)", model)) == 1
    assert len(matches("Clip(x)", model)) == 0, "inputs that are not listed must be absent"
    found = matches("clip @ Clip(x, *rest)", model)[0]
    assert found["clip"] is model.graph[0]
    assert [value and value.name for value in found["rest"]] == [None, "h"]
    assert len(matches("Clip(x, *_)", model)) == 1


def test_other_domains_are_written_out(parse: Parse) -> None:
    model = parse("""
        <ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        m (float[2] x) => (float[2] y) { y = com.microsoft.Gelu (x) }
    """)
    assert len(matches("com.microsoft.Gelu(x)", model)) == 1
    assert len(matches("Gelu(x)", model)) == 0


def test_declining_says_why_and_leaves_no_trace(parse: Parse) -> None:
    model = parse("m (float[2,3] x, float[3,4] w, float[2,4] b) => (float[2,4] y) { h = MatMul (x, w) y = Add (h, b) }")

    @rule("Relu(x)")
    def never(tape: Any, x: ir.Value) -> Any:
        tape.Neg(x)

    ctx = Context()
    assert rewrite(model, [matmul_add_to_gemm, never], ctx) == 0
    assert [skip.reason for skip in ctx.ledger.skips] == ["matmul add to gemm: what is added is no vector"]
    relu = parse("m (float[2] x) => (float[2] y) { y = Relu (x) }")
    assert rewrite(relu, [never], ctx) == 0
    assert len(relu.graph.inputs[0].uses()) == 1
    assert problems(relu) == []


def test_a_graph_output_is_never_an_input_or_two_outputs(parse: Parse) -> None:
    @rule("Identity(x)")
    def identity(tape: Any, x: ir.Value) -> Any:
        return x

    model = parse(
        "m (float[2] x) => (float[2] y, float[2] r, float[2] s) { y = Identity (x) r = Relu (x) s = Identity (r) }"
    )
    ctx = Context()
    assert rewrite(model, [identity], ctx) == 0
    assert [skip.reason for skip in ctx.ledger.skips] == [
        "identity: an output would be an input or a constant",
        "identity: two outputs would be one value",
    ]


def test_several_outputs_and_constants(parse: Parse) -> None:
    @rule("Split(x, axis=1)")
    def split_by_slices(tape: Any, x: ir.Value) -> Any:
        zero, one, two = (tape.constant(np.array([number], np.int64), "bound") for number in (0, 1, 2))
        return tape.Slice(x, zero, one, one), tape.Slice(x, one, two, one)

    model = parse("m (float[3,2] x) => (float[3,1] a, float[3,1] b) { a, b = Split <axis = 1> (x) }")
    assert rewrite(model, [split_by_slices], Context()) == 1
    assert [value.name for value in model.graph.outputs] == ["a", "b"]
    assert list(model.graph.initializers) == ["bound", "bound_1", "bound_2"]
    assert problems(model) == []


def test_rules_in_circles_are_stopped_and_named(parse: Parse) -> None:
    @rule("Relu(x)")
    def relu_to_relu(tape: Any, x: ir.Value) -> Any:
        return tape.Relu(x)

    with pytest.raises(PenjingError, match="most by 'relu to relu'"):
        rewrite(parse("m (float[2] x) => (float[2] y) { y = Relu (x) }"), [relu_to_relu], Context())


def test_bad_patterns_are_refused() -> None:
    def nothing(tape: Any) -> Any: ...

    for pattern, message in (
        ("Add(x", "cannot be read"),
        ("x", "must begin with an operator"),
        ("Add(1, x)", "neither a name nor an operator"),
        ("Add(x, y)", "must be the same"),
    ):
        with pytest.raises(UsageError, match=message):
            rule(pattern)(nothing)


def test_long_chains_of_rewrites_reach_a_fixed_point(parse: Parse) -> None:
    @rule("Neg(Neg(x))")
    def twice_negative(tape: Any, x: ir.Value) -> Any:
        return x

    count = 41
    lines = "".join(f"v{i + 1} = Neg (v{i}) " for i in range(count))
    model = parse(f"m (float[2] v0) => (float[2] v{count}) {{ {lines} }}")
    rewrite(model, [twice_negative], Context())
    assert operators(model) == ["Neg"]
    assert model.graph.outputs[0].name == f"v{count}"
