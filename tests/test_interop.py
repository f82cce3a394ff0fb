"""Passes that others wrote run as steps: onnx_ir's as they are, onnx-graphsurgeon functions under a name."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
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


def test_a_third_party_is_found_through_its_entry_points(tmp_path: Path) -> None:
    """Passes and pipelines of a plug-in run; one that does not import is said, and costs nobody else anything."""
    package = tmp_path / "plug"
    (package / "plug-1.0.dist-info").mkdir(parents=True)
    (package / "plug_passes.py").write_text(PLUGIN, encoding="utf-8")
    (package / "plug-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n", "utf-8"
    )
    points = "[penjing.passes]\nplug = plug_passes\nbroken = no_such_module\n"
    (package / "plug-1.0.dist-info" / "entry_points.txt").write_text(points, encoding="utf-8")
    script = (
        "import penjing, onnx_ir as ir\n"
        "model = penjing.load({!r})\n"
        "report = penjing.run(model, 'plug-line')\n"
        "print(report.passes_text, report.passes[0].ledger.changes[0].what)\n"
    ).format(str(Path(penjing.__file__).parent / "models" / "mlp.onnx"))
    environment = os.environ | {"PYTHONPATH": str(package)}
    run = functools.partial(subprocess.run, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    done = run([sys.executable, "-c", script])
    assert done.stdout == "plug-line marked\n", done.stderr
    done = run([sys.executable, "-m", "penjing", "passes"])
    assert done.returncode == 0
    assert "plug-pass" in done.stdout
    assert "plug-line" in done.stdout
    assert "The plug-in 'broken' (no_such_module) does not import: ModuleNotFoundError" in done.stderr


PLUGIN = """
import penjing
from penjing.passes.registry import register_pipeline

@penjing.register("plug-pass")
class PlugPass(penjing.Pass):
    \"\"\"Marks the model.\"\"\"

    def run(self, model, ctx):
        model.metadata_props["marked"] = "yes"
        ctx.change("model", "marked")

register_pipeline("plug-line", "plug-pass")
"""


def test_what_is_registered_is_a_pass_with_a_name_that_text_can_say() -> None:
    with pytest.raises(UsageError, match="it must be a subclass"):
        penjing.register("not-a-pass")(dict)  # type: ignore[type-var]
    with pytest.raises(UsageError, match="No pipeline text can say"):
        penjing.register("bad name{")(penjing.Pass)
