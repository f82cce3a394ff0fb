"""int8 for processors without integer dot products, in ONNX Runtime's own kernels for those: see benchmarks/avx2.py."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parent / "benchmarks" / "avx2.py"
CODE = """
import sys
import numpy as np
import onnx_ir as ir
sys.path.insert(0, sys.argv[1])
import avx2_check
import penjing
from penjing.models import zoo
from penjing.runtime.session import open_session

print(avx2_check.saturates())
model, images = zoo.load("teacher"), zoo.data("validation")["image"][:32]
penjing.run(model, "quantize-static{target=cpu-avx2}", data=[{"image": images}], check="off")
print(sum(node.op_type == "QuantizeLinear" for node in model.graph) > 10)
print(zoo.accuracy(open_session(model)))
"""


@pytest.mark.skipif(bool(runpy.run_path(str(LAUNCHER))["obstacle"]()), reason="cannot hide instructions here")
def test_seven_bits_are_right_where_eight_saturate() -> None:
    command = [sys.executable, LAUNCHER, "-c", CODE, LAUNCHER.parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    saturates, quantized, accuracy = done.stdout.split()
    assert (saturates, quantized) == ("True", "True")
    assert float(accuracy) >= 0.993  # in float 0.995
