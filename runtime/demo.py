"""The main job on a bundled model, told step by step; every figure is measured while it is told."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from rich.console import Console

from ..ir.files import load, save
from ..models import zoo
from .measure import latency
from .run import run
from .show import show_report

MODEL = "cnn-a-legacy"
PASSES = "clean,prune-magnitude{sparsity=0.3 scope=model}"
MAX_DROP = 0.01


def tell(console: Console, output: str | None = None) -> None:
    """Load, rewrite, check, save and measure; the result goes to ``output``, or to a folder that is then removed."""
    entry = zoo.ENTRIES[MODEL]
    test = zoo.path(MODEL).parent / "mnist-test.npz"
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(output or Path(scratch, "small.onnx"))
        console.print(f"[bold]1.[/] The model: {entry.file}, {entry.about}")
        console.print("   It reads handwritten digits (MNIST); 1,000 labelled test images come with it.\n")
        model = load(zoo.path(MODEL))
        console.print("[bold]2.[/] The passes: clean it up, then make 30 % of its weights zero, the smallest first.")
        console.print(f"   [cyan]{PASSES}[/]\n")
        console.print(
            "[bold]3.[/] The proof: every pass is held to what it promises, on the test images in ONNX Runtime;"
        )
        console.print(f"   accuracy may fall by {MAX_DROP} at most, else nothing is written.\n")
        report = run(
            model,
            PASSES,
            data=test,
            metric="penjing.models.zoo:accuracy",
            max_drop=MAX_DROP,
        )
        report.input = dataclasses.replace(report.input, bytes=zoo.path(MODEL).stat().st_size)
        save(model, target)
        report.latency = latency(zoo.path(MODEL), target, test)
        show_report(report, console)
        console.print("\n[bold]4.[/] In a shell, with your own model and data, that is")
        for line in (
            f"penjing run model.onnx -p '{PASSES}' -o small.onnx \\",
            "    --data samples.npz --metric my.py:accuracy --max-drop 0.01",
        ):
            console.print(f"   {line}", style="cyan", soft_wrap=True)
        if output:
            console.print(f"\nThe result is in {output}.")
