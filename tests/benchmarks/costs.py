"""Measures what operators cost in float and on int8, and writes ``passes/quantize/costs-*.json``.

    python tests/benchmarks/costs.py                      # all of it: some ten minutes; on a processor with VNNI
    python tests/benchmarks/costs.py --only matmul,lstm   # these parts anew, the rest as it is
    python tests/benchmarks/costs.py --processor avx2     # on one that seems to have no more than AVX2: see avx2.py
    python tests/benchmarks/costs_check.py                # predicted and measured ratios of whole nets

An operator's time is a slope: that of a net with five of it, less that of a net with one, over four. So what happens
once at the ends of a chain of integer kernels does not count: QuantizeLinear, DequantizeLinear and Transpose have rows
of their own. Operators on images stand between two convolutions, for there both runtimes of a net keep to their own
layout of channels. All is CPU time of one thread, the models of a measurement take turns, the least of many rounds
counts. All is done ``--times`` over, and of these the median counts.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import platform
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import avx2
import numpy as np
import onnxruntime
from elements import ELEMENTS, chain, rows
from slopes import BOTH, Net, ending, rounded, slopes

FOLDER = Path(__file__).parents[2] / "passes/quantize"
MOST_WORK, MOST_ELEMENTS = 4e8, 3.3e6  # multiply-adds and elements of a measured operator at most
UNITS = "nanoseconds: per multiply-add in grids (axes in order, the last fastest), per element in elementwise"


# Layers ---------------------------------------------------------------------------------------------------------------


def convolution(pixels: int, inputs: int, outputs: int, window: list[int], groups: int = 1, stride: int = 1) -> Any:
    """Float and int8 nanoseconds of a convolution, and its multiply-adds; None where that is too much to measure."""
    space = len(window)
    side = round(pixels ** (1 / space))
    work = side**space * math.prod(window) * inputs * outputs / groups
    if work > MOST_WORK or side**space * max(inputs * stride**space, outputs) > MOST_ELEMENTS:
        return None

    def build(net: Net, count: int) -> None:
        x = net.input([1, inputs, *[side * stride] * space])
        for _ in range(count):
            net.corner(net.conv(x, [outputs, inputs // groups, *window], stride, groups), [side] * space)

    return slopes(build, less=ending(space)), work


def first(pixels: int, depth: int, outputs: int) -> Any:
    """A convolution of stride 2 of 1 or 3 channels; ``depth`` is what it sums over."""
    inputs, side = {9: (1, 3), 27: (3, 3), 147: (3, 7)}[depth]
    return convolution(pixels, inputs, outputs, [side, side], 1, 2)


def transposed(pixels: int, inputs: int, outputs: int) -> Any:
    """A ConvTranspose that doubles the sides; it has no integer kernel. ``pixels`` are those of its input."""
    side = math.isqrt(pixels)

    def build(net: Net, count: int) -> None:
        x = net.conv(net.input([1, inputs, side, side]), [inputs, inputs, 1, 1])
        for _ in range(count):
            y = net.node("ConvTranspose", [x, net.weight([inputs, outputs, 2, 2], 1)], strides=[2, 2])
            net.corner(y, [2 * side, 2 * side])

    return slopes(build, (False,), ending(2)), pixels * 4 * inputs * outputs


def product(rows: int, inputs: int, outputs: int) -> Any:
    """Float, static, dynamic, and weights of 8 and 4 bits in blocks of 32."""
    work = rows * inputs * outputs
    if work > MOST_WORK:
        return None

    def static(net: Net, count: int) -> None:
        x = net.input([rows, inputs])
        for _ in range(count):
            bias = net.constant(np.zeros(outputs, np.float32))
            net.end(net.operator("Gemm", [x, net.weight([inputs, outputs], 1), bias]))

    def dynamic(net: Net, count: int) -> None:
        x = net.input([rows, inputs])
        for _ in range(count):
            weight = net.constant(net.random.integers(-127, 128, (inputs, outputs), np.int8))
            scale = net.constant(net.random.uniform(0.001, 0.002, outputs).astype(np.float32))
            net.end(net.node("DynamicQuantizeMatMul", [x, weight, scale], domain="com.microsoft"))

    def blocked(bits: int, net: Net, count: int) -> None:
        x, blocks = net.input([rows, inputs]), -(-inputs // 32)
        for _ in range(count):
            weight = net.constant(net.random.integers(0, 256, (outputs, blocks, 32 * bits // 8), np.uint8))
            scale = net.constant(net.random.uniform(0.001, 0.002, outputs * blocks).astype(np.float32))
            sizes = {"K": inputs, "N": outputs, "bits": bits, "block_size": 32, "accuracy_level": 4}
            net.end(net.node("MatMulNBits", [x, weight, scale], domain="com.microsoft", **sizes))

    floats = [dynamic, functools.partial(blocked, 8), functools.partial(blocked, 4)]
    rest = [slopes(build, (False,), ending())[0] for build in floats]
    return [*slopes(static, less=ending()), *rest], work


def product_of_activations(rows: int, inputs: int, outputs: int) -> Any:
    batch = 4

    def build(net: Net, count: int) -> None:
        x = net.input([batch, rows, inputs])
        for _ in range(count):
            net.end(net.operator("MatMul", [x, net.input([batch, inputs, outputs])]))

    return slopes(build, less=ending(fed=True)), batch * rows * inputs * outputs


def recurrence(batch: int, inputs: int, hidden: int) -> Any:
    """An LSTM, float and dynamic, over 16 steps."""
    steps = 16

    def static(net: Net, count: int) -> None:
        x = net.input([steps, batch, inputs])
        for _ in range(count):
            matrices = [net.weight([1, 4 * hidden, n], 1) for n in (inputs, hidden)]
            bias = net.constant(np.zeros((1, 8 * hidden), np.float32))
            net.end(net.node("LSTM", [x, *matrices, bias], hidden_size=hidden))

    def dynamic(net: Net, count: int) -> None:
        x = net.input([steps, batch, inputs])
        for _ in range(count):
            shapes = [(1, n, 4 * hidden) for n in (inputs, hidden)]
            matrices = [net.constant(net.random.integers(-127, 128, shape, np.int8)) for shape in shapes]
            bias = net.constant(np.zeros((1, 8 * hidden), np.float32))
            scale, zero = np.full((1, 4 * hidden), 0.001, np.float32), np.zeros((1, 4 * hidden), np.int8)
            scales = [net.constant(array) for array in (scale, zero, scale, zero)]
            given = [x, *matrices, bias, "", "", "", "", *scales]
            net.end(net.node("DynamicQuantizeLSTM", given, domain="com.microsoft", hidden_size=hidden))

    times = [slopes(build, (False,), ending())[0] for build in (static, dynamic)]
    return times, steps * batch * 4 * hidden * (inputs + hidden)


def grid(axes: Sequence[Sequence[int]], measure: Callable[..., Any], columns: Sequence[str]) -> dict[str, Any]:
    """Nanoseconds per unit of work over all combinations; where ``measure`` declines, those of the nearest it took."""
    found: dict[tuple[int, ...], list[float]] = {}
    places = list(itertools.product(*(range(len(axis)) for axis in axes)))
    for place in places:
        sizes = [axis[index] for axis, index in zip(axes, place, strict=True)]
        if (answer := measure(*sizes)) is not None:
            times, work = answer
            found[place] = [spent / work for spent in times]
            print("   ", sizes, " ".join(f"{spent / 1e3:.1f}" for spent in times), "us", flush=True)
    nearest = [min(found, key=lambda known: (math.dist(known, place), known)) for place in places]
    rates = {name: [rounded(found[near][at]) for near in nearest] for at, name in enumerate(columns)}
    return {"axes": [list(axis) for axis in axes], **rates}


PIXELS = (1, 49, 196, 784, 3136, 12544)
CHANNELS = (8, 16, 32, 64, 128, 256, 512)
SOME = (8, 16, 64, 256)
ROWS, WIDTHS = (1, 4, 16, 64, 256), (16, 64, 256, 1024)

GRIDS: dict[str, Callable[[], dict[str, Any]]] = {
    "pointwise": lambda: grid((PIXELS, CHANNELS, CHANNELS), lambda p, i, o: convolution(p, i, o, [1, 1]), BOTH),
    "window": lambda: grid((PIXELS, SOME, SOME), lambda p, i, o: convolution(p, i, o, [3, 3]), BOTH),
    "first": lambda: grid(((49, 784, 12544), (9, 27, 147), (8, 16, 64)), first, BOTH),
    "depthwise": lambda: grid(
        (PIXELS[1:], (16, 64, 256), (9, 25)), lambda p, c, k: convolution(p, c, c, [math.isqrt(k)] * 2, c), BOTH
    ),
    "grouped": lambda: grid(
        ((49, 784, 12544), (2, 8, 32), (4, 16)), lambda p, g, i: convolution(p, g * i, g * i, [3, 3], g), BOTH
    ),
    "line": lambda: grid(((16, 128, 1024), SOME, SOME), lambda p, i, o: convolution(p, i, o, [3]), BOTH),
    "line-pointwise": lambda: grid(((16, 128, 1024), SOME, SOME), lambda p, i, o: convolution(p, i, o, [1]), BOTH),
    "line-depthwise": lambda: grid(
        ((16, 128, 1024), (16, 64, 256), (3, 15)), lambda p, c, k: convolution(p, c, c, [k], c), BOTH
    ),
    "transposed": lambda: grid(((196, 6400), (8, 64), (8, 64)), transposed, ("float",)),
    "matmul": lambda: grid((ROWS, WIDTHS, WIDTHS), product, (*BOTH, "dynamic", "bits8", "bits4")),
    "activations": lambda: grid(((16, 64, 256),) * 3, product_of_activations, BOTH),
    "lstm": lambda: grid(((1, 16), (32, 128, 512), (32, 128, 256)), recurrence, ("float", "dynamic")),
}


# The file -------------------------------------------------------------------------------------------------------------


def overhead() -> float:
    return round(min(slopes(chain("Neg", [16]), (False,))[0] for _ in range(5)))


def processor(kind: str) -> str:
    """What was measured: the instructions for integers that ONNX Runtime could see."""
    if kind == "avx2":
        return f"{platform.machine()} AVX2, of one with more"
    file = Path("/proc/cpuinfo")
    flags = file.read_text() if file.exists() else ""
    kinds = [name for flag, name in (("avx512_vnni", "AVX512-VNNI"), ("amx_int8", "AMX-INT8")) if f" {flag}" in flags]
    return " ".join([platform.machine(), *kinds])


def written(table: dict[str, Any]) -> str:
    """JSON with a list of numbers on one line."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


def measured(parts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"call": overhead()}
    for name in parts:
        print(name, flush=True)
        found[name] = rows() if name == "elementwise" else GRIDS[name]()
    return found


def median(tables: Sequence[Any]) -> Any:
    """Number by number."""
    if isinstance(tables[0], dict):
        return {key: median([table[key] for table in tables]) for key in tables[0]}
    if isinstance(tables[0], list):
        return [median(numbers) for numbers in zip(*tables, strict=True)]
    return statistics.median_low(tables)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processor", choices=("vnni", "avx2"), default="vnni")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[*GRIDS, "elementwise"])
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--seems", action="store_true", help=argparse.SUPPRESS)  # it does seem to have AVX2 alone
    given = parser.parse_args()
    if given.processor == "avx2" and not given.seems:
        return avx2.run([*sys.argv, "--seems"])
    file = FOLDER / f"costs-{given.processor}.json"
    table = json.loads(file.read_text()) if file.exists() else {"elementwise": {}, "grids": {}}
    found = median([measured(given.only) for _ in range(given.times)])
    known = table["grids"] | {"elementwise": table["elementwise"]} | found
    head = {
        "made by": "tests/benchmarks/costs.py",
        "machine": {"processor": processor(given.processor), "threads": 1, "onnxruntime": onnxruntime.__version__},
        "units": UNITS,
        "call": known["call"],
        "elements": list(ELEMENTS),
        "elementwise": known["elementwise"],
        "grids": {name: known[name] for name in sorted(GRIDS)},
    }
    file.write_text(written(head))
    return 0


if __name__ == "__main__":
    sys.exit(main())
