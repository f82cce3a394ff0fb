"""Branches of one architecture apart and together: prints ratios; with ``--write`` measures the table of costs.

    python -m tests.benchmarks.branches                  # ratios of whole models, about two minutes
    python -m tests.benchmarks.branches --write          # passes/merge/branches-costs.json, some five minutes

What is compared runs in one process, by turns, on one thread; CPU time. In the table a
layer's time is a slope: that of a model with five of them, less that of one with one, over four.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.runtime.measure import interleave
from penjing.runtime.run import run
from penjing.runtime.session import bare_run, open_session

from .merging import ratio

TABLE = Path(__file__).parents[2] / "passes/merge/branches-costs.json"


class Net:
    """A model under construction: one input, one output, layers in a row."""

    def __init__(self, seed: int, sizes: Sequence[int | str]) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.input = helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)
        self.last = "x"

    def weight(self, *shape: int) -> str:
        fan_in = max(1, int(np.prod(shape[1:])))
        array = (self.random.standard_normal(shape) * (2 / fan_in) ** 0.5).astype(np.float32)
        self.constants.append(numpy_helper.from_array(array, f"w{len(self.constants)}"))
        return str(self.constants[-1].name)

    def node(self, op_type: str, *more: str, **attributes: Any) -> None:
        made = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, [self.last, *more], [made], made, **attributes))
        self.last = made

    def model(self) -> ir.Model:
        output = helper.make_tensor_value_info(self.last, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "net", [self.input], [output], self.constants)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return ir.from_proto(proto)


def perceptron(seed: int, widths: Sequence[int]) -> ir.Model:
    net = Net(seed, ["batch", widths[0]])
    for place, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        net.node("Gemm", net.weight(outputs, inputs), net.weight(outputs), transB=1)
        if place < len(widths) - 2:
            net.node("Relu")
    return net.model()


def convolutions(seed: int, channels: int, side: int, layers: int, kind: str = "window", inputs: int = 0) -> ir.Model:
    """Convolutions with Relu, a pool, ten classes. ``inputs`` are channels of the image, 0 for as many as behind."""
    given = inputs or channels
    net = Net(seed, ["batch", given, side, side])
    kernel = 1 if kind == "pointwise" else 3
    for place in range(layers):
        depthwise = kind == "depthwise" and place
        group = channels if depthwise else 1
        weight = net.weight(channels, 1 if depthwise else given if place == 0 else channels, kernel, kernel)
        shape = {"kernel_shape": [kernel] * 2, "pads": [kernel // 2] * 4, "group": group}
        net.node("Conv", weight, net.weight(channels), **shape)
        net.node("Relu")
    net.node("GlobalAveragePool")
    net.node("Flatten")
    net.node("Gemm", net.weight(10, channels), net.weight(10), transB=1)
    return net.model()


def pair(members: Sequence[ir.Model]) -> tuple[ir.Model, ir.Model]:
    """The mean of members, apart and together."""
    apart, partners = members[0].clone(), {f"m{number}": member for number, member in enumerate(members[1:], 1)}
    run(apart, f"ensemble{{with=({','.join(partners)})}}", models=partners, check="off")
    together = apart.clone()
    Pipeline.of("fuse-branches{when=always}").run(together, Context(step="fuse-branches"))
    return apart, together


def times(models: Sequence[ir.Model], shape: Sequence[int], seconds: float) -> list[float]:
    """Seconds of each."""
    feed = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    sessions = [open_session(model, threads=1) for model in models]
    clocks = interleave(sessions, [feed], seconds=seconds * len(models))
    return [float(spent) for spent in np.median(clocks.cpu, axis=1)]


# Ratios ---------------------------------------------------------------------------------------------------------------


def show() -> None:
    """Of models as users have them, with what the table decides.

    How much faster fused members are than their ensemble in one graph, and than sessions of the members, called one
    after the other without any combination.
    """
    tiny = [128] * 4 + [10]
    nets: list[tuple[str, Callable[[int], ir.Model], int, tuple[int, ...], str]] = [
        ("8 MLPs, 4 x 128, batch 1", lambda seed: perceptron(seed, tiny), 8, (1, 128), "1.5"),
        ("8 MLPs, 4 x 128, batch 16", lambda seed: perceptron(seed, tiny), 8, (16, 128), ""),
        ("8 MLPs, 4 x 64, batch 1", lambda seed: perceptron(seed, [64] * 4 + [10]), 8, (1, 64), "1.5"),
        ("8 MLPs, 4 x 32, batch 1", lambda seed: perceptron(seed, [32] * 4 + [4]), 8, (1, 32), "1.5"),
        ("2 MLPs, 4 x 128, batch 1", lambda seed: perceptron(seed, tiny), 2, (1, 128), ""),
        ("8 MLPs, 4 x 256, batch 1", lambda seed: perceptron(seed, [256] * 4 + [10]), 8, (1, 256), ""),
        ("2 MLPs, 4 x 512, batch 1", lambda seed: perceptron(seed, [512] * 4 + [10]), 2, (1, 512), ""),
        ("2 MLPs, 4 x 512, batch 64", lambda seed: perceptron(seed, [512] * 4 + [10]), 2, (64, 512), ""),
        ("8 CNNs, 8 channels", lambda seed: convolutions(seed, 8, 14, 4, inputs=3), 8, (1, 3, 14, 14), ""),
        ("8 CNNs, 12 channels", lambda seed: convolutions(seed, 12, 14, 4, inputs=3), 8, (1, 3, 14, 14), ""),
        ("8 CNNs, 16 channels", lambda seed: convolutions(seed, 16, 14, 4, inputs=3), 8, (1, 3, 14, 14), ""),
        ("2 CNNs, 32 channels", lambda seed: convolutions(seed, 32, 28, 4, inputs=3), 2, (1, 3, 28, 28), ""),
    ]
    print(f"{'':28} {'fused us':>9} {'to one graph':>13} {'to sessions':>12} {'goal':>5}  by the table")
    for name, build, count, shape, goal in nets:
        members = [build(seed) for seed in range(count)]
        apart, together = pair(members)
        for model in (*members, apart, together):
            for value in model.graph.inputs:
                value.shape = ir.Shape([shape[0], *value.shape[1:]])  # type: ignore[index]
        feed = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
        fused, graph, *alone = [bare_run(open_session(one, threads=1), feed) for one in (together, apart, *members)]
        (to_graph, spent), (to_sessions, _) = (ratio([fused], others, 4.0) for others in ([graph], alone))
        (report,) = Pipeline.of("fuse-branches").run(apart, Context(step="fuse-branches"))
        said = f"{report.ledger.changes[0].numbers['speedup']}" if report.ledger.changes else "left apart"
        print(
            f"{name:28} {spent * 1e3:9.1f} {1 / to_graph:13.2f} {1 / to_sessions:12.2f} {goal:>5}  {said}", flush=True
        )


# The table ------------------------------------------------------------------------------------------------------------

COUNTS = (2, 4, 8)


def layer(kind: str, count: int, width: int, pixels: int) -> tuple[float, float]:
    """Nanoseconds of one layer of all branches, apart and together."""
    form, side = kind.removesuffix(" of odd width"), round(pixels**0.5)
    if form == "matrix":
        builds = [lambda seed, more=more: perceptron(seed, [width] * more + [10]) for more in (7, 3)]
        shape: tuple[int, ...] = (pixels, width)
    else:
        builds = [lambda seed, more=more: convolutions(seed, width, side, more, form) for more in (6, 2)]
        shape = (1, width, side, side)
    models = [model for build in builds for model in pair([build(seed) for seed in range(count)])]
    more_apart, more_together, less_apart, less_together = times(models, shape, 0.25)
    return tuple(  # type: ignore[return-value]
        max((more - less) / 4 * 1e9, 50.0) for more, less in ((more_apart, less_apart), (more_together, less_together))
    )


def call() -> float:
    """Nanoseconds of a node that does next to nothing."""
    nets = [Net(0, [1, 4, 4]) for _ in range(2)]
    for net, pairs in zip(nets, (100, 20), strict=True):
        for _ in range(pairs):
            net.node("Transpose", perm=[0, 2, 1])
            net.node("Add", net.weight(1))
    more, less = times([net.model() for net in nets], (1, 4, 4), 1.0)
    return (more - less) / 160 * 1e9


GRIDS: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "matrix": ((16, 32, 64, 128, 256, 512), (1, 16, 64)),
    "matrix of odd width": ((20, 50, 100, 200), (1, 16, 64)),
    "window": ((8, 16, 32, 64), (49, 784)),
    "window of odd width": ((6, 12, 20, 36), (49, 784)),
    "pointwise": ((8, 16, 32, 64, 128), (49, 784)),
    "pointwise of odd width": ((6, 12, 20, 36), (49, 784)),
    "depthwise": ((8, 16, 48, 96), (49, 784)),
}


def write() -> None:
    grids: dict[str, Any] = {}
    for kind, (widths, pixels) in GRIDS.items():
        found = []
        for count, width, size in itertools.product(COUNTS, widths, pixels):
            found.append(layer(kind, count, width, size))
            print(kind, count, width, size, f"{found[-1][0] / found[-1][1]:.2f}", flush=True)
        rows = {form: [int(float(f"{one[at]:.3g}")) for one in found] for at, form in enumerate(("apart", "together"))}
        grids[kind] = {"axes": [list(COUNTS), list(widths), list(pixels)], **rows}
    table = {
        "made by": "tests.benchmarks.branches --write",
        "machine": {"processor": f"{platform.machine()} AVX512", "threads": 1, "onnxruntime": onnxruntime.__version__},
        "units": "nanoseconds of one layer of all branches; axes are branches, channels, pixels, the last fastest",
        "call": round(call()),
        "grids": grids,
    }
    lines = json.dumps(table, indent=1)
    TABLE.write_text(_flat(lines) + "\n", encoding="utf-8")


def _flat(text: str) -> str:
    """Lists of numbers on one line."""
    import re

    return re.sub(r"\[[\s\d,]+\]", lambda found: re.sub(r"\s+", " ", found.group()), text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="measure the table of costs")
    if parser.parse_args().write:
        write()
    show()
