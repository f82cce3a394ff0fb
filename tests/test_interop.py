"""Passes that others wrote run as steps: onnx_ir's as they are, onnx-graphsurgeon functions under a name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

import penjing
from penjing.ir.errors import UsageError
from penjing.passes.registry import all_passes

TWICE = """
    m (float[n,2] x) => (float[n,2] y)
    <float[2,2] w = {1, -2, 3, 4}>
    { a = MatMul (x, w)  b = MatMul (x, w)  c = Add (a, b)  y = Clip (c) }
"""


def clip_to_relu(graph: gs.Graph) -> None:
    """A graphsurgeon function as users have them: edits the graph in place."""
    for node in graph.nodes:
        if node.op == "Clip":
            node.op = "Relu"
    graph.cleanup().toposort()


def test_an_onnx_ir_pass_is_a_step_as_it_is(parse: Callable[[str], ir.Model]) -> None:
    model = parse(TWICE)
    report = penjing.run(model, [CommonSubexpressionEliminationPass(), "clean"])
    assert [node.op_type for node in model.graph] == ["MatMul", "Add", "Clip"]
    assert report.passes[0].ledger.changes[0].what == "rewritten by CommonSubexpressionEliminationPass"
    assert report.passes_text.startswith("CommonSubexpressionEliminationPass,")


def test_an_onnx_ir_pass_under_a_name_is_held_to_its_effect(parse: Callable[[str], ir.Model]) -> None:
    penjing.register_onnx_ir("cse", CommonSubexpressionEliminationPass, penjing.Effect.SAME)
    model = parse(TWICE)
    report = penjing.run(model, "cse,clean")
    assert report.check.segments[0]["passes"][0] == "cse"
    assert report.check.comparison.equal
    assert [node.op_type for node in model.graph] == ["MatMul", "Add", "Clip"]


def test_a_graphsurgeon_function_is_a_step(parse: Callable[[str], ir.Model], tmp_path: Path) -> None:
    penjing.register_surgeon("clip-to-relu", clip_to_relu, penjing.Effect.LOSSY)
    model = parse(TWICE)
    model.metadata_props["kept"] = "yes"
    report = penjing.run(model, "clip-to-relu,clean")
    assert [node.op_type for node in model.graph] == ["MatMul", "MatMul", "Add", "Relu"]
    assert model.metadata_props == {"kept": "yes"}
    assert report.passes[0].ledger.changes[0].what == "rewritten by clip_to_relu"
    penjing.save(model, tmp_path / "out.onnx")
    assert penjing.load(tmp_path / "out.onnx").graph[3].op_type == "Relu"
    assert "clip-to-relu" in all_passes()


def test_a_graphsurgeon_function_that_lies_about_its_effect_is_caught(parse: Callable[[str], ir.Model]) -> None:
    penjing.register_surgeon("clip-to-relu-as-same", clip_to_relu, penjing.Effect.SAME)
    with pytest.raises(penjing.BoundExceeded, match="clip-to-relu-as-same broke its promise"):
        penjing.run(parse(TWICE), "clip-to-relu-as-same", data={"x": np.array([[1, -1]], np.float32)})


def test_a_graphsurgeon_function_that_raises_is_a_sentence(parse: Callable[[str], ir.Model]) -> None:
    def broken(graph: Any) -> None:
        raise KeyError("no such tensor")

    penjing.register_surgeon("broken-surgeon", broken, penjing.Effect.LOSSY)
    with pytest.raises(UsageError, match="no such tensor"):
        penjing.run(parse(TWICE), "broken-surgeon")


def test_a_name_stands_for_one_pass_only() -> None:
    with pytest.raises(UsageError, match="The pass name 'clean' is taken"):

        @penjing.register("clean")
        class Clean(penjing.Pass):
            """Takes a name that is taken."""

            def run(self, model: ir.Model, ctx: penjing.Context) -> None: ...

    with pytest.raises(UsageError, match="has no docstring"):

        @penjing.register("silent")
        class Silent(penjing.Pass):
            def run(self, model: ir.Model, ctx: penjing.Context) -> None: ...
