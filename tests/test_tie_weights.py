"""Constants kept once: equal, transposed, reshaped or near ones, in the main graph and in bodies."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

import penjing
from penjing.ir.errors import UsageError
from penjing.ir.verify import verify
from penjing.passes.base import Context, Effect
from penjing.passes.share.tie import TieWeights
from penjing.runtime.session import open_session

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model_of(constants: Mapping[str, Array], *steps: tuple[str, list[str], dict[str, int]]) -> ir.Model:
    """A chain of nodes: operator, names of constants, attributes; the first input is what came before."""
    tape, made = ir.tape.Tape(), {}
    for name, array in constants.items():
        made[name] = tape.initializer(ir.tensor(array, name=name))
    x = value = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["N", 32]))
    for op_type, names, attributes in steps:
        value = tape.op(op_type, [value, *(made[name] for name in names)], attributes)
    value.name, value.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [value], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=8)


def tie(model: ir.Model, tolerance: float = 0.0) -> tuple[Context, bool]:
    """The ledger, and whether the outputs are the same bits."""
    x = random(5, 32, seed=9)
    before = open_session(model).run(None, {"x": x})[0]
    ctx = Context()
    TieWeights(tolerance=tolerance).run(model, ctx)
    verify(model, "it")
    return ctx, np.array_equal(before, open_session(model).run(None, {"x": x})[0])


def names(model: ir.Model) -> list[str]:
    return list(model.graph.initializers)


def test_equal_ones() -> None:
    w = random(32, 32)
    model = model_of({"a": w, "b": w.copy()}, ("MatMul", ["a"], {}), ("MatMul", ["b"], {}))
    ctx, same = tie(model)
    assert same
    assert names(model) == ["a"]
    assert [change.subject for change in ctx.ledger.changes] == ["b"]


@pytest.mark.parametrize("trans", [0, 1])
def test_transposed_in_gemm_flips_an_attribute(trans: int) -> None:
    w = random(32, 32)
    model = model_of(
        {"a": w, "b": np.ascontiguousarray(w.T)}, ("MatMul", ["a"], {}), ("Gemm", ["b"], {"transB": trans})
    )
    ctx, same = tie(model)
    assert same
    assert names(model) == ["a"]
    assert [node.op_type for node in model.graph] == ["MatMul", "Gemm"]
    assert model.graph[1].attributes.get_int("transB", 0) == 1 - trans
    assert "transB" in ctx.ledger.changes[0].what


def test_transposed_elsewhere_gets_a_transpose() -> None:
    w = random(32, 48)
    model = model_of({"a": w, "b": np.ascontiguousarray(w.T)}, ("MatMul", ["a"], {}), ("MatMul", ["b"], {}))
    _, same = tie(model)
    assert same
    assert names(model) == ["a"]
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul", "MatMul"]
    penjing.run(model, "clean")  # keeps it so
    assert names(model) == ["a"]


def test_reshaped_ones() -> None:
    w = random(32, 64)
    model = model_of({"a": w, "b": w.reshape(64, 32)}, ("MatMul", ["a"], {}), ("MatMul", ["b"], {}))
    ctx, same = tie(model)
    assert same
    assert "a" in names(model)
    assert "b" not in names(model)
    assert model.graph[0].op_type == "Reshape"
    assert "another shape" in ctx.ledger.changes[0].what


def test_near_ones_only_with_a_tolerance() -> None:
    w = random(32, 32)
    near = w + np.float32(1e-3)
    steps = ("MatMul", ["a"], {}), ("MatMul", ["b"], {})
    model = model_of({"a": w, "b": near}, *steps)
    ctx, _ = tie(model)
    assert names(model) == ["a", "b"]
    assert not ctx.ledger.changes
    ctx, _ = tie(model, 1e-4)
    assert names(model) == ["a", "b"]
    ctx, _ = tie(model, 1e-3)
    assert names(model) == ["a"]
    assert ctx.ledger.changes[0].numbers["difference"] == pytest.approx(1e-3 / np.abs(w).max(), rel=0.01)


def test_nan_is_near_nothing() -> None:
    w = random(32, 32)
    other = w.copy()
    other[0, 1] = np.nan
    model = model_of({"a": w, "b": other}, ("MatMul", ["a"], {}), ("MatMul", ["b"], {}))
    tie(model, 0.5)
    assert names(model) == ["a", "b"]


def test_bodies_read_what_the_main_graph_keeps() -> None:
    w = random(32, 32)
    tape = ir.tape.Tape()
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["N", 32]))
    outer = tape.op("MatMul", [x, tape.initializer(ir.tensor(w, name="outer"))])
    branches = {}
    for place, branch in enumerate(("then_branch", "else_branch")):
        own = ir.tape.Tape()
        array = w if place == 0 else w + np.float32(1e-4)
        made = own.op("MatMul", [outer, own.initializer(ir.tensor(array, name=f"inner{place}"))])
        made.type = ir.TensorType(ir.DataType.FLOAT)
        made.name = f"made{place}"
        branches[branch] = ir.Graph([], [made], nodes=own.nodes, initializers=own.initializers, name=branch)
    condition = tape.initializer(ir.tensor(np.array(True), name="condition"))
    y = tape.op("If", [condition], dict(branches))
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 17}, name="g")
    model = ir.Model(graph, ir_version=8)
    _, same = tie(model)
    assert same
    bodies = {body.name: list(body.initializers) for body in model.graph.subgraphs()}
    assert bodies == {"then_branch": [], "else_branch": ["inner1"]}
    tie(model, 1e-3)
    assert not any(body.initializers for body in model.graph.subgraphs())


def test_scales_inputs_and_outputs_stay_apart() -> None:
    w = random(32, 32)
    model = model_of({"a": w, "b": w.copy(), "c": w.copy()}, *[("MatMul", [name], {}) for name in "abc"])
    model.graph.inputs.append(model.graph.initializers["b"])
    model.graph.outputs.append(model.graph.initializers["c"])
    ctx = Context()
    TieWeights().run(model, ctx)
    assert names(model) == ["a", "b", "c"]
    assert any(skip.subject == "c" and "output" in skip.reason for skip in ctx.ledger.skips)
    scale = np.full(600, 0.5, np.float32)
    tape = ir.tape.Tape()
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([600, 4]))
    value = x
    for place in range(2):
        own = tape.initializer(ir.tensor(scale * (1 + 1e-6 * place), name=f"scale{place}"))
        zero = tape.initializer(ir.tensor(np.zeros(600, np.int8), name=f"zero{place}"))
        value = tape.op("QuantizeLinear", [value, own, zero], {"axis": 0})
        value = tape.op("DequantizeLinear", [value, own, zero], {"axis": 0})
    graph = ir.Graph([x], [value], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 17}, name="g")
    model = ir.Model(graph, ir_version=8)
    TieWeights(tolerance=0.1).run(model, Context())
    assert names(model) == ["scale0", "zero0", "scale1", "zero1"]


def test_shapes_integers_and_empty_tensors() -> None:
    numbers = np.arange(400, dtype=np.int64)
    tape = ir.tape.Tape()
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([400]))
    value = x
    for name, array in (("one", numbers), ("two", numbers.copy()), ("bent", numbers.reshape(20, 20))):
        value = tape.op("Gather", [x, tape.initializer(ir.tensor(array, name=name))])
    empty = tape.initializer(ir.tensor(np.zeros((0, 4), np.float32), name="empty"))
    graph = ir.Graph(
        [x],
        [value, tape.op("Neg", [empty])],
        nodes=tape.nodes,
        initializers=tape.initializers,
        opset_imports={"": 17},
        name="g",
    )
    model = ir.Model(graph, ir_version=8)
    TieWeights(tolerance=0.1).run(model, Context())
    verify(model, "it")
    assert [name for name in names(model) if name in ("one", "two", "bent", "empty")] == ["one", "empty"]


def test_effect_and_range() -> None:
    assert TieWeights().effect() is Effect.SAME
    assert TieWeights(tolerance=0.1).effect() is Effect.LOSSY
    for bad in (-0.1, 1.0):
        with pytest.raises(UsageError, match="tie-weights"):
            TieWeights(tolerance=bad)
