"""CPU seconds of load, verify, clean and save on a graph of 20,000 nodes, as a ratio to onnx_ir's own load and save.

    python tests/benchmarks/clean.py [nodes]

The goal is 2.5 or less. Both run in this process, five times; the least of each counts.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import penjing.ir.shapes  # noqa: F401  so that imports do not count
from penjing.ir.files import load, save
from penjing.ir.match import rule
from penjing.ir.verify import verify
from penjing.passes.base import Context
from penjing.passes.instruments import Step
from penjing.passes.pipeline import Pipeline
from penjing.passes.rewrite import rewrite

CHANNELS = 4
REPETITIONS = 5


def chain(count: int) -> ir.Model:
    """Blocks of Conv, BatchNormalization, Relu, Identity, Add, MatMul, Transpose twice, and Mul by one."""
    generator = np.random.default_rng(0)
    tape = ir.tape.Tape()
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["batch", CHANNELS, 8, 8]))

    def constant(name: str, array: Any) -> ir.Value:
        return tape.initializer(ir.tensor(np.asarray(array, np.float32), name=name))

    one, value, block = constant("one", 1), x, 0
    ones = constant("ones", np.ones(CHANNELS))
    while len(tape.nodes) < count:
        weight = constant(f"w{block}", generator.normal(size=(CHANNELS, CHANNELS, 1, 1)) / 2)
        matrix = constant(f"m{block}", generator.normal(size=(8, 8)) / 8)
        skip = value
        value = tape.op("Conv", [value, weight])
        if block % 4 == 0:
            mean = constant(f"mean{block}", generator.normal(size=CHANNELS))
            value = tape.op("BatchNormalization", [value, ones, mean, mean, ones])
        value = tape.op("Relu", [value])
        value = tape.op("Identity", [value])
        value = tape.op("MatMul", [value, matrix])
        value = tape.op("Add", [value, skip])
        if block % 8 == 0:
            value = tape.op("Transpose", [value], {"perm": [0, 1, 3, 2]})
            value = tape.op("Transpose", [value], {"perm": [0, 1, 3, 2]})
            value = tape.op("Mul", [value, one])
        value = tape.op("Tanh", [value])
        block += 1
    value.name = "y"
    value.dtype, value.shape = x.dtype, x.shape
    graph = ir.Graph(
        [x], [value], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 17}, name="chain"
    )
    return ir.Model(graph, ir_version=8)


def seconds(action: Callable[[], object]) -> float:
    """CPU seconds of one call; what earlier calls left behind is collected before, as in a fresh process."""
    gc.collect()
    start = time.process_time()
    action()
    return time.process_time() - start


def fusions(count: int) -> ir.Model:
    """Pairs of MatMul and Add, and two Relu to each."""
    tape = ir.tape.Tape()
    value = x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([4, 4]))
    w = tape.initializer(ir.tensor(np.eye(4, dtype=np.float32), name="w"))
    b = tape.initializer(ir.tensor(np.zeros(4, np.float32), name="b"))
    for _ in range(count // 4):
        value = tape.op("Relu", [tape.op("Relu", [tape.op("Add", [tape.op("MatMul", [value, w]), b])])])
    graph = ir.Graph([x], [value], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=8)


@rule("Add(MatMul(x, w), b)")
def matmul_add_to_gemm(tape: Any, x: ir.Value, w: ir.Value, b: ir.Value) -> Any:
    return tape.Gemm(x, w, b)


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, other = Path(folder) / "chain.onnx", Path(folder) / "out.onnx"
        ir.save(chain(count), path)
        base = min(seconds(lambda: ir.save(ir.load(path), other)) for _ in range(REPETITIONS))
        best: dict[str, float] = {}
        for _ in range(REPETITIONS):
            model, took = load(path), {}
            took["load"] = seconds(lambda: load(path))
            took["verify"] = seconds(lambda: verify(model))  # noqa: B023
            steps: list[Step] = []
            took["clean"] = seconds(lambda: steps.extend(Pipeline.parse("clean").run(model, Context())))  # noqa: B023
            took["save"] = seconds(lambda: save(model, other))  # noqa: B023
            if not best or sum(took.values()) < sum(best.values()):
                best, last = took, steps
    print(f"onnx_ir load + save of {count} nodes: {base:.2f} s of CPU")
    for name, spent in best.items():
        print(f"  {name:8} {spent:.3f} s")
    for step in last:
        print(f"    {step.pass_.name:18} {step.seconds:.3f} s wall, {len(step.ledger.changes)} changes")
    print(f"ratio {sum(best.values()) / base:.2f} (goal 2.5)")
    model = fusions(count)
    spent = seconds(lambda: rewrite(model, [matmul_add_to_gemm], Context()))
    print(f"{count // 4} fusions in {count} nodes: {spent:.2f} s (goal 1.2)")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
