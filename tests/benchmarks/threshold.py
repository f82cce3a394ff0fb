"""CPU time and memory of pruning a model of large external data at model scope, as ratios to copying its bytes.

    python tests/benchmarks/threshold.py [gigabytes]

The goals, at 2.5 GB: finding the exact threshold at most 4 times ``np.copyto`` of the same bytes into a buffer that has
been touched; finding, applying and writing at most 12 times; memory under 400 MB over that after imports.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from penjing.ir.files import load, save
from penjing.ir.weights import weights
from penjing.passes.base import Context
from penjing.passes.prune.magnitude import PruneMagnitude
from penjing.passes.prune.threshold import smallest
from penjing.runtime.measure import MemoryMeter

WIDTH = 4096  # a weight is WIDTH x WIDTH float32: 64 MiB


def make(folder: Path, gigabytes: float) -> Path:
    """A chain of MatMuls whose normally distributed weights lie in one data file."""
    count = max(1, round(gigabytes * 1e9 / (4 * WIDTH * WIDTH)))
    generator, nodes, initializers = np.random.default_rng(0), [], []
    with (folder / "weights.data").open("wb") as file:
        for place in range(count):
            tensor = TensorProto(name=f"w{place}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH])
            tensor.data_location = TensorProto.EXTERNAL
            where = {"location": "weights.data", "offset": file.tell(), "length": 4 * WIDTH * WIDTH}
            for key, value in where.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(generator.standard_normal((WIDTH, WIDTH), np.float32).tobytes())
            nodes.append(helper.make_node("MatMul", [f"x{place}", f"w{place}"], [f"x{place + 1}"]))
            initializers.append(tensor)
    ends = [helper.make_tensor_value_info(f"x{place}", TensorProto.FLOAT, [1, WIDTH]) for place in (0, count)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    onnx.save_model(model, path)
    return path


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 2.5
    with tempfile.TemporaryDirectory() as folder:
        path, out = make(Path(folder), gigabytes), Path(folder) / "pruned.onnx"

        def whole() -> None:
            model = load(path)
            PruneMagnitude(sparsity=0.5, scope="model").run(model, Context())
            save(model, out)

        with MemoryMeter() as memory:
            writing = min(cpu_seconds(whole) for _ in range(3))  # the first often pays for memory new to the machine
        held = weights(load(path))
        total = sum(weight.size for weight in held)
        finding = min(cpu_seconds(lambda: smallest(held, total // 2)) for _ in range(3))
        zeros = sum(weight.zeros() for weight in weights(load(out)))

        buffer = np.ones((WIDTH, WIDTH), np.float32).repeat(len(held), axis=0).reshape(len(held), WIDTH, WIDTH)

        def copy() -> None:
            for place, weight in enumerate(held):
                np.copyto(buffer[place], weight.array())

        copying = min(cpu_seconds(copy) for _ in range(3))
        print(f"{total * 4 / 1e9:.2f} GB of float32, {zeros} of {total} elements pruned")
        print(f"copyto                         {copying:6.2f} s CPU   1.00")
        print(f"finding the threshold          {finding:6.2f} s CPU   {finding / copying:.2f} (goal 4)")
        print(f"finding, applying and writing  {writing:6.2f} s CPU   {writing / copying:.2f} (goal 12)")
        print(f"memory                         {(memory.peak_bytes or 0) / 1e6:6.0f} MB       (goal 400)")


if __name__ == "__main__":
    main()
