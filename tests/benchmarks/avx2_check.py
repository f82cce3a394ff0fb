"""int8 for processors with AVX2 alone, on one that seems to be such: accuracy and speed beside float, model by model.

    python tests/benchmarks/avx2.py tests/benchmarks/avx2_check.py [names]

``cpu-avx2`` takes 7 bits of weights and the table of such processors; ``cpu-vnni`` is wrong there: its products may
saturate, and more of it is slower than float. CPU time of one thread, interleaved; 1,000 test images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from nets import mobilenetv2, resnet18
from slopes import opened, seconds

import penjing
from penjing.ir.files import save
from penjing.models import zoo

WIDE = {"resnet18": resnet18, "mobilenetv2": mobilenetv2}  # with weights of no training
TARGETS = ("cpu-avx2", "cpu-vnni")


def saturates() -> bool:
    """Whether a product of uint8 and int8 overflows the 16 bits that instructions of AVX2 add pairs in."""
    weight = ir.tensor(np.full((64, 16), 127, np.int8), name="w")
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> m (uint8[4,64] x, int8[64,16] w) => (int32[4,16] y) '
        "{ y = MatMulInteger (x, w) }"
    )
    model.graph.inputs[1].const_value = weight
    model.graph.register_initializer(model.graph.inputs.pop(1))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((4, 64), 255, np.uint8)})
    return bool((found != 64 * 255 * 127).any())


def cases() -> Iterator[tuple[str, ir.Model, Any]]:
    """Name, model, and the feeds for calibration."""
    images = zoo.data("validation")["image"][:64]
    for name in ("mlp", "cnn-a", "teacher", "vit"):
        yield name, zoo.load(name), [{"image": image[None]} for image in images]
    random = np.random.default_rng(0)
    for name, build in WIDE.items():
        model = ir.from_proto(build())
        image = model.graph.inputs[0].name or ""
        yield name, model, [{image: random.standard_normal((1, 3, 224, 224), np.float32)} for _ in range(4)]


def accuracy(path: Path) -> float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return zoo.accuracy(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))


def main() -> None:
    print("products of 8 bits saturate here" if saturates() else "products of 8 bits are right here")
    print(f"{'':12} {'':8} {'accuracy':>8} {'layers':>6} {'time':>5}")
    for name, model, feeds in cases():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        with TemporaryDirectory() as folder:
            paths = {"float": Path(folder, "float.onnx")}
            save(model, paths["float"])
            layers = {"float": 0}
            for target in TARGETS:
                made = model.clone()
                report = penjing.run(made, f"quantize-static{{target={target}}}", data=feeds, check="off")
                told = [change.what for change in report.passes[0].ledger.changes]
                layers[target] = sum(what.endswith("on integers") for what in told)
                paths[target] = Path(folder, f"{target}.onnx")
                save(made, paths[target])
            spent = seconds([opened(str(path), dict(feeds[0])) for path in paths.values()], 30)
            for (kind, path), one in zip(paths.items(), spent, strict=True):
                found = f"{accuracy(path):8.3f}" if name not in WIDE else f"{'':8}"
                print(f"{name:12} {kind:8} {found} {layers[kind]:6} {one / spent[0]:5.2f}", flush=True)


if __name__ == "__main__":
    main()
