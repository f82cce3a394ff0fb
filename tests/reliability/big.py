"""Models larger than memory should be: peaks of memory, seconds and bytes of every way that weights go.

    python -m tests.reliability.big [--record]

Each line runs in a process of its own. Memory is the peak of RssAnon + RssShmem over the value after imports; pages of
mapped files do not count. The goal is 400 MB, and 1 GB where weights are packed. ``--task`` runs one line and prints
JSON; the tests use it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import NodeProto, TensorProto, helper

from penjing.ir.files import load, save
from penjing.ir.text import text
from penjing.ir.verify import verify
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.runtime.measure import MemoryMeter

GOAL = 400e6  # bytes
PACKING_GOAL = 1e9  # bytes
SEED = 0
MIB = 1 << 20


class Chain:
    """A model written node by node, whose weights go into one data file at once, so that making it takes no memory."""

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.value, self.width = folder, "x", width
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.file = (folder / "weights.data").open("wb")
        self.noise = np.random.default_rng(SEED).standard_normal((1 << 20) + 1, np.float32)  # rows do not repeat

    def weight(self, *dims: int, seed: int | None = None, hole: bool = False) -> str:
        """A random weight; equal seeds and dims give equal ones. A hole is zeros that take no disk."""
        name, size = f"w{len(self.initializers)}", 4 * int(np.prod(dims, dtype=np.int64))
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
        start = self.file.tell()
        for key, value in {"location": "weights.data", "offset": start, "length": size}.items():
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        if hole:
            self.file.truncate(start + size)
            self.file.seek(start + size)
            return name
        factor = np.float32(1 + (len(self.initializers) if seed is None else -seed) / 997) / np.float32(self.width**0.5)
        for begin in range(0, size // 4, self.noise.size):
            self.file.write((self.noise * factor)[: size // 4 - begin].tobytes())
        return name

    def constant(self, array: Any) -> str:
        """A small initializer, in the model."""
        self.initializers.append(onnx.numpy_helper.from_array(np.asarray(array), f"w{len(self.initializers)}"))
        return self.initializers[-1].name

    def node(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """A node."""
        name = f"h{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=f"n{len(self.nodes)}", **attributes))
        return name

    def step(self, op_type: str, *others: str, **attributes: Any) -> None:
        """A node on the value that runs through the chain."""
        self.value = self.node(op_type, self.value, *others, **attributes)

    def write(self, input_shape: list[Any], output_shape: list[Any]) -> Path:
        """Finish both files."""
        self.file.close()
        self.nodes[-1].output[0] = "y"
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (("x", input_shape), ("y", output_shape))
        ]
        graph = helper.make_graph(self.nodes, "chain", ends[:1], ends[1:], self.initializers)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        path = self.folder / "model.onnx"
        onnx.save_model(proto, path)
        return path


def layers(folder: Path, weights: int = 37, width: int = 4096) -> Path:
    """Gemm, MatMul and Conv by turns; 37 weights of 4096 x 4096 float32 are 2.5 GB."""
    chain = Chain(folder, width)
    for place in range(weights):
        if place % 3 == 0:
            chain.step("Gemm", chain.weight(width, width), chain.constant(np.zeros(width, np.float32)))
        elif place % 3 == 1:
            chain.step("MatMul", chain.weight(width, width))
        else:
            chain.step("Reshape", chain.constant(np.array([-1, width, 1, 1])))
            chain.step("Conv", chain.weight(width, width, 1, 1))
            chain.step("Flatten")
        chain.step("Relu")
    return chain.write(["batch", width], ["batch", width])


def foldable(folder: Path, width: int = 8192) -> Path:
    """What clean folds: BatchNormalization, Mul and Add into two large Conv weights, transposed constants, twins.

    With width 8192 the Conv weights have 512 MiB each, and all together 2.4 GB.
    """
    chain, wide = Chain(folder, width), 2 * width
    chain.step("Conv", chain.weight(wide, width, 1, 1))
    statistics = [np.linspace(low, high, wide, dtype=np.float32) for low, high in ((0.5, 2), (-1, 1), (-1, 1), (1, 2))]
    chain.step("BatchNormalization", *map(chain.constant, statistics))
    chain.step("Conv", chain.weight(width, wide, 1, 1))
    chain.step("Mul", chain.constant(np.linspace(0.5, 1, width, dtype=np.float32).reshape(1, width, 1, 1)))
    chain.step("Add", chain.constant(np.linspace(-1, 1, width, dtype=np.float32).reshape(1, width, 1, 1)))
    chain.step("Flatten")
    for _ in range(2):
        chain.step("MatMul", chain.weight(width, width, seed=1))
    chain.step("MatMul", chain.node("Transpose", chain.weight(width, width), perm=[1, 0]))
    narrow = width * 480 // 8192  # a weight of 15 MiB: fold-constants leaves what is over 16
    for _ in range(20):
        chain.step("MatMul", chain.node("Transpose", chain.weight(narrow, width), perm=[1, 0]))
        chain.step("MatMul", chain.node("Transpose", chain.weight(width, narrow), perm=[1, 0]))
    return chain.write(["batch", width, 1, 1], ["batch", width])


def sparse(folder: Path, weights: int = 16, rows: int = 147_456) -> Path:
    """13.4 GB of zeros that take no disk: a table of 4.8 GB, and weights of 512 MiB."""
    chain = Chain(folder, 8192)
    chain.value = chain.node("Gather", chain.weight(rows, 8192, hole=True), chain.constant(np.array([0])))
    for place in range(weights):
        dims = (8192, 16384) if place % 2 == 0 else (16384, 8192)
        chain.step("MatMul", chain.weight(*dims, hole=True))
    chain.step("Add", "x")
    return chain.write([1, 1], [1, 8192 if weights % 2 == 0 else 16384])


# Tasks ----------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds and peak of each step of a task; the peak of all is the task's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak = 0

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with MemoryMeter() as meter:
            yield
        self.seconds[name] = time.perf_counter() - start
        self.peak = max(self.peak, meter.peak_bytes or 0)


PIPELINE = "clean,raise-opset{to=21},prune-magnitude{sparsity=0.5 scope=model}"
PACKING = "prune-magnitude{sparsity=0.5},share-weights{bits=4},pack-weights"


def library(path: Path, pipeline: str) -> dict[str, Any]:
    """Load, verify, run passes and save, by the library."""
    from penjing.runtime.session import OrtRunner

    clock, out, ctx = Clock(), path.with_name("out.onnx"), Context(runner=OrtRunner())
    with clock.step("all"):
        with clock.step("load"):
            model = load(path)
        with clock.step("verify"):
            verify(model)
        steps = Pipeline.parse(pipeline)
        with clock.step("passes"):
            done = steps.run(model, ctx)
        with clock.step("save"):
            save(model, out)
    deeds = {str(step.pass_): step.ledger.deeds() for step in done if step.ledger.changes}
    return finished(clock, out) | {"did": deeds}


def command(*arguments: str) -> dict[str, Any]:
    """The command line."""
    from penjing.cli import main

    clock, said = Clock(), io.StringIO()
    with clock.step("all"), contextlib.redirect_stdout(said):
        try:
            main(list(arguments))
        except SystemExit as done:
            if done.code:
                raise RuntimeError(f"exit code {done.code}") from done
    out = Path(arguments[arguments.index("-o") + 1]) if "-o" in arguments else None
    return finished(clock, out) | {"said": said.getvalue()}


def run_command(path: Path, pipeline: str) -> dict[str, Any]:
    """``penjing run`` with the check."""
    return command("run", str(path), "-o", str(path.with_name("out.onnx")), "--force", "-p", pipeline)


def look(path: Path) -> dict[str, Any]:
    """Load, verify and print."""
    clock = Clock()
    with clock.step("load"):
        model = load(path)
    with clock.step("verify"):
        verify(model)
    with clock.step("text"):
        shown = text(model)
    return finished(clock, path) | {"lines": shown.count("\n")}


def inspect(path: Path) -> dict[str, Any]:
    """``penjing inspect``."""
    return command("inspect", str(path))


def in_memory(folder: Path, gigabytes: float = 2.2) -> dict[str, Any]:
    """Save a model that was built in Python, of over 2 GB: in initializers, in a body and in Constant nodes."""
    rows = int(gigabytes * 1e9 / 4 / 3 / 1024)

    def zeros(name: str) -> ir.Tensor:
        return ir.Tensor(np.zeros((rows, 1024), np.float32), name=name)  # memory that nobody touched takes none

    clock, out = Clock(), folder / "out.onnx"
    with clock.step("save"):
        save(with_body(zeros("w"), zeros("b"), zeros("c")), out)
    found = load(out)
    assert sum(not isinstance(value.const_value, ir.ExternalTensor) for value in found.graph.initializers.values()) == 0
    return finished(clock, out)


def with_body(weight: ir.TensorProtocol, inner: ir.TensorProtocol, constant: ir.TensorProtocol) -> ir.Model:
    """y = (w + c, or b): three tensors of one shape, in an initializer, a body's initializer and a Constant node."""
    x = ir.val("x", dtype=ir.DataType.BOOL, shape=ir.Shape([]))
    held = ir.val("b", const_value=inner, type=ir.TensorType(inner.dtype), shape=ir.Shape(inner.shape.numpy()))
    main = ir.val("w", const_value=weight, type=ir.TensorType(weight.dtype), shape=ir.Shape(weight.shape.numpy()))
    made = ir.node("Constant", [], {"value": constant}, name="constant")
    made.outputs[0].name = "c"
    summed = ir.node("Add", [main, made.outputs[0]], name="add")
    kept = ir.node("Identity", [held], name="keep")
    bodies = [
        ir.Graph([], summed.outputs, nodes=[made, summed], name="then"),
        ir.Graph([], kept.outputs, nodes=[kept], initializers=[held], name="else"),
    ]
    for number, body in enumerate(bodies):
        body.outputs[0].name = f"o{number}"
        body.outputs[0].type, body.outputs[0].shape = main.type, main.shape
    branch = ir.node("If", [x], {"then_branch": bodies[0], "else_branch": bodies[1]}, name="if")
    branch.outputs[0].name = "y"
    branch.outputs[0].type, branch.outputs[0].shape = main.type, main.shape
    graph = ir.Graph([x], branch.outputs, nodes=[branch], initializers=[main], opset_imports={"": 17}, name="main")
    return ir.Model(graph, ir_version=8)


def finished(clock: Clock, path: Path | None) -> dict[str, Any]:
    """A task's figures; ``bytes`` are those of the files that begin with the name ``path``."""
    size = sum(item.stat().st_size for item in path.parent.glob(f"{path.name}*")) if path is not None else 0
    if path is not None and path.name == "model.onnx":
        size += path.with_name("weights.data").stat().st_size
    return {"peak": clock.peak, "seconds": clock.seconds, "bytes": size}


TASKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "layers": lambda folder: library(folder / "model.onnx", PIPELINE),
    "layers-run": lambda folder: run_command(folder / "model.onnx", PIPELINE),
    "layers-pack": lambda folder: library(folder / "model.onnx", PACKING),
    "layers-pack-run": lambda folder: run_command(folder / "model.onnx", PACKING),
    "foldable": lambda folder: library(folder / "model.onnx", "clean"),
    "foldable-run": lambda folder: run_command(folder / "model.onnx", "clean"),
    "sparse": lambda folder: look(folder / "model.onnx"),
    "sparse-inspect": lambda folder: inspect(folder / "model.onnx"),
    "memory": in_memory,
}


def run_apart(task: str, folder: Path) -> dict[str, Any]:
    """Run a task in a fresh process, after all imports; -> its figures."""
    command = [sys.executable, "-m", "tests.reliability.big", "--task", task, "--folder", str(folder)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise RuntimeError(f"{task} failed with exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _import_all() -> None:
    """What tasks import when they need it."""
    import onnx.reference
    import onnx.shape_inference
    import onnx.version_converter
    import onnxruntime
    import rich.console
    import rich.progress

    import penjing.cli
    import penjing.ir.summary
    import penjing.runtime.run
    import penjing.runtime.session
    import penjing.runtime.show

    del onnx.reference, onnxruntime, rich, penjing.cli
    Pipeline.parse(f"{PIPELINE},{PACKING}")
    penjing.runtime.session.limits()


# The record -----------------------------------------------------------------------------------------------------------

LINES = (
    ("layers", "load, verify, clean, raise-opset, prune-magnitude, save"),
    ("layers-run", "`penjing run` of the same passes, with the check"),
    ("layers-pack", "load, verify, prune-magnitude, share-weights, pack-weights, save"),
    ("layers-pack-run", "`penjing run` of the same passes, with the check"),
    ("foldable", "load, verify, clean, save"),
    ("foldable-run", "`penjing run -p clean`, with the check"),
    ("sparse", "load, verify, text"),
    ("sparse-inspect", "`penjing inspect`"),
    ("memory", "save of arrays, in initializers, a body and a Constant node"),
)
MAKERS = {"layers": layers, "foldable": foldable, "sparse": sparse}


def record_all() -> str:
    """The table."""
    rows = ["| model | what | bytes written | peak MB | seconds |", "| --- | --- | --- | --- | --- |"]
    for maker in ("layers", "foldable", "sparse", "memory"):
        with tempfile.TemporaryDirectory(prefix="penjing-big-") as folder:
            if maker in MAKERS:
                MAKERS[maker](Path(folder))
                os.sync()
            for task, what in LINES:
                if task.partition("-")[0] != maker:
                    continue
                found = run_apart(task, Path(folder))
                seconds = found["seconds"].get("all", sum(found["seconds"].values()))
                parts = ", ".join(f"{name} {spent:.2f}" for name, spent in found["seconds"].items() if name != "all")
                size = sum(item.stat().st_size for item in Path(folder).glob("*.data") if item.name[0] != "o")
                written = f"{found['bytes']:,}" if maker != "sparse" else "none"
                rows.append(
                    f"| {maker}, {(size or found['bytes']) / 1e9:.2f} GB | {what} | {written} "
                    f"| {found['peak'] / 1e6:.0f} | {seconds:.1f}{f' ({parts})' * (', ' in parts)} |"
                )
                print(rows[-1], flush=True)
                assert found["peak"] < (PACKING_GOAL if "-pack" in task else GOAL), found
    docs = [" ".join((MAKERS[name].__doc__ or "").split()) for name in MAKERS]
    notes = [f"- {name}: {doc}" for name, doc in zip(MAKERS, docs, strict=True)]
    return "\n".join([*rows, "", *notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write big.md beside this script")
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.task:
        _import_all()
        print(json.dumps(TASKS[given.task](given.folder)))
        return
    body = record_all()
    if given.record:
        from .record import record

        record("big", "python -m tests.reliability.big --record", body)


if __name__ == "__main__":
    main()
