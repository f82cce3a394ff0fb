"""How well the cost table foretells whole nets: predicted and measured int8/float ratios, side by side.

    python tests/benchmarks/costs_check.py [names]
    python tests/benchmarks/avx2.py tests/benchmarks/costs_check.py avx2 [names]    # of the table for AVX2, on such

Every net is quantized by onnxruntime.quantization (QDQ, uint8 activations, int8 weights per channel) wherever it can,
also where that loses; the interesting figure is whether the table tells which. CPU time of one thread, interleaved.
"""

from __future__ import annotations

import importlib.metadata
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from nets import mobilenetv2, resnet18
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from slopes import opened, seconds

import penjing
from penjing.ir.files import load, save
from penjing.ir.kernels import bounds, integer, obstacle
from penjing.ir.shapes import infer_shapes
from penjing.models import zoo
from penjing.passes.quantize.costs import Table
from penjing.runtime.kernels import kernels

Feed = dict[str, Any]


class OneFeed(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feed: Feed) -> None:
        self.feeds = iter([feed])

    def get_next(self) -> Feed | None:
        return next(self.feeds, None)


def cases() -> Iterator[tuple[str, ir.Model, list[int]]]:
    """Name, float model and the sizes of its input."""
    yield "resnet18", ir.from_proto(resnet18()), [1, 3, 224, 224]
    yield "mobilenetv2", ir.from_proto(mobilenetv2()), [1, 3, 224, 224]
    for name in ("mlp", "cnn-a", "vit"):
        yield name, zoo.load(name), [1, 1, 28, 28]
    root = Path(str(importlib.metadata.distribution("rapidocr-onnxruntime").locate_file("rapidocr_onnxruntime/models")))
    for part, sizes in (("det", [1, 3, 320, 320]), ("rec", [1, 3, 48, 320]), ("cls", [1, 3, 48, 192])):
        (path,) = root.glob(f"*_{part}_infer.onnx")
        yield f"PP-OCR {part}", load(path), sizes


def prepared(model: ir.Model, sizes: list[int], path: Path) -> Feed:
    """Write the model with fixed sizes, cleaned, of opset 17; return a feed."""
    for value in model.graph.inputs:
        value.shape = ir.Shape(sizes)
    for value in (*model.graph.outputs, *(value for node in model.graph for value in node.outputs)):
        value.shape = None  # what the file says holds for any size
    old = model.opset_imports.get("", 17) < 17
    penjing.run(model, "clean,raise-opset{to=17},clean" if old else "clean", check="off")
    LiftConstantsToInitializersPass()(model)  # else onnxruntime.quantization takes weights for activations
    save(model, path)
    random = np.random.default_rng(0)
    return {value.name or "": random.random(sizes, np.float32) for value in model.graph.inputs}


def predicted(model: ir.Model, table: Table) -> tuple[float, int]:
    """Seconds by the table, and how many layers it takes for integer."""
    infer_shapes(model)
    on_integers = {node for node in model.graph if integer(node) and obstacle(node) is None}
    total, layers = 0.0, 0
    for node in model.graph:
        total += cost(node, on_integers, table)
        layers += node in on_integers and node.op_type in ("Conv", "MatMul", "Gemm")
    return total / 1e9, layers


def cost(node: ir.Node, on_integers: set[ir.Node], costs: Table) -> float:
    size = math.prod(size if isinstance(size, int) else 1 for size in node.outputs[0].shape or ())
    if node.op_type == "QuantizeLinear":
        maker = node.inputs[0].producer() if node.inputs[0] else None
        if maker in on_integers or (maker and bounds(maker) and maker.inputs[0].producer() in on_integers):
            return 0.0
        return costs.quantize_cost(size)
    readers = [use.node for use in node.outputs[0].uses()]
    if node.op_type == "DequantizeLinear":
        if all(reader in on_integers for reader in readers):
            return 0.0
        return costs.dequantize_cost(size)
    if bounds(node) and [reader.op_type for reader in readers] == ["QuantizeLinear"]:
        maker = node.inputs[0].producer() if node.inputs[0] else None
        if maker in on_integers:
            return 0.0
    return costs.integer_cost(node) if node in on_integers else costs.float_cost(node)


def main() -> None:
    print(f"{'':12} {'float ms':>9} {'foretold':>9} {'int8 ms':>9} {'foretold':>9} {'ratio':>6} {'foretold':>9} layers")
    names = [name for name in sys.argv[1:] if name != "avx2"]
    table = Table.of("cpu-avx2" if "avx2" in sys.argv[1:] else "cpu-vnni")
    for name, model, sizes in cases():
        if names and name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path, to = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
            feed = prepared(model, sizes, path)
            kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
            quantize_static(path, to, OneFeed(feed), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
            before, after = seconds([opened(str(path), feed), opened(str(to), feed)], 40)
            float_model, int8_model = load(path), load(to)
            (told, _), (told_after, layers) = predicted(float_model, table), predicted(int8_model, table)
            found = kernels(int8_model)
        figures = f"{before * 1e3:9.3f} {told * 1e3:9.3f} {after * 1e3:9.3f} {told_after * 1e3:9.3f}"
        counts = f"{layers} for {found.fused} of {found.layers}"
        print(f"{name:12} {figures} {after / before:6.2f} {told_after / told:9.2f} {counts}", flush=True)


if __name__ == "__main__":
    main()
