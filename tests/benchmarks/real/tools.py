"""Quantize one model with one tool, in a process of its own: ``python tools.py TOOL MODEL CALIBRATION OUT``.

It says ``ready`` when all is imported, goes on when it is given a line, and then prints the CPU seconds that it took.
It needs no penjing, unless the tool is a pipeline of passes: nncf lives in an environment of its own.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Feeds = list[dict[str, Any]]
Quantize = Callable[[str, str, str], None]  # model, calibration data, output: paths
ORT = {"ort-minmax": "MinMax", "ort-percentile": "Percentile", "ort-entropy": "Entropy"}
NAMES = ("quantize-auto", "quantize-static", *ORT, "ort-dynamic", "nncf")


def read(calibration: str | Path, count: int | None = None) -> Feeds:
    """Feeds of one sample each from an ``x.npz`` or a folder of ``.npz``."""
    path = Path(calibration)
    if path.is_dir():
        return [dict(np.load(file)) for file in sorted(path.glob("*.npz"))[:count]]
    arrays = dict(np.load(path))
    arrays.pop("labels", None)
    samples = min(len(array) for array in arrays.values())
    return [{key: array[place : place + 1] for key, array in arrays.items()} for place in range(samples)[:count]]


def tool(name: str) -> Quantize:
    """The tool called ``name``, imported and ready to run; a name that is none is taken for a pipeline of passes."""
    if name in ORT:
        return _ort_static(ORT[name])
    if name == "ort-dynamic":
        return _ort_dynamic()
    return _nncf() if name == "nncf" else _penjing(name)


def _penjing(pipeline: str) -> Quantize:
    import onnxruntime  # noqa: F401  so that imports do not count

    import penjing.runtime.measure
    import penjing.runtime.run  # noqa: F401
    from penjing.cli import main

    def quantize(model: str, calibration: str, out: str) -> None:
        sys.argv = ["penjing", "run", model, "-p", pipeline, "--data", calibration, "-o", out, "--force"]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise

    return quantize


def _prepared(model: str, folder: str) -> str:
    """The model after the preparation that ONNX Runtime asks for; symbolic shapes fail on some models."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = os.path.join(folder, "prepared.onnx")
    try:
        quant_pre_process(model, path)
    except Exception:
        quant_pre_process(model, path, skip_symbolic_shape=True)
    return path


def _ort_static(calibrator: str) -> Quantize:
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self, feeds: Feeds) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    def quantize(model: str, calibration: str, out: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            quantization.quantize_static(
                _prepared(model, folder),
                out,
                Reader(read(calibration)),
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,  # what x86 runs fastest
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod[calibrator],
            )

    return quantize


def _ort_dynamic() -> Quantize:
    from onnxruntime import quantization

    def quantize(model: str, calibration: str, out: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            quantization.quantize_dynamic(_prepared(model, folder), out)

    return quantize


def _nncf() -> Quantize:
    import nncf
    import onnx

    def quantize(model: str, calibration: str, out: str) -> None:
        feeds = read(calibration)
        onnx.save(nncf.quantize(onnx.load(model), nncf.Dataset(feeds), subset_size=len(feeds)), out)

    return quantize


def _cpu_seconds() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def main(name: str, *paths: str) -> None:
    """Report on standard output; what the tool prints goes to standard error."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    quantize = tool(name)
    print("ready", file=report, flush=True)
    sys.stdin.readline()
    start = _cpu_seconds()
    with contextlib.redirect_stdout(sys.stderr):
        quantize(*paths)
    print(_cpu_seconds() - start, file=report, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
