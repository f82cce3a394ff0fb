"""The meter of noise: where it looks, and that noise of two sources adds up there."""

import numpy as np
import onnx_ir as ir
import pytest

from penjing.passes.base import Context
from penjing.passes.judge import Judge
from penjing.passes.meter import Meter
from penjing.runtime.session import OrtRunner

RNG = np.random.default_rng(1)
WEIGHT = RNG.normal(size=(16, 8)).astype(np.float32) * 3
FEEDS = [{"x": RNG.normal(size=(4, 16)).astype(np.float32)} for _ in range(24)]


def classifier(change: float = 0.0, seed: int = 0) -> ir.Model:
    """Softmax over eight classes; ``change`` moves its weights."""
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["" : 17]> agraph (float[4, 16] x) => (float[4, 8] y)\n'
        f"<float[16, 8] w = {{{', '.join('0' for _ in range(128))}}}>"
        "{ logits = MatMul (x, w) p = Softmax (logits) q = Transpose (p) y = Transpose (q) }"
    )
    noise = np.random.default_rng(seed).normal(size=WEIGHT.shape)
    model.graph.initializers["w"].const_value = ir.Tensor((WEIGHT + change * noise).astype(np.float32), name="w")
    return model


@pytest.fixture
def meter() -> Meter:
    model = classifier()
    return Meter(model, Judge(model, Context(runner=OrtRunner(), data=FEEDS)), 16)


def test_it_looks_before_what_saturates(meter: Meter) -> None:
    assert meter.names == ["logits"]


def test_noise_of_two_sources_adds_up(meter: Meter) -> None:
    one, two = classifier(0.3, seed=1), classifier(0.6, seed=2)
    both = classifier()
    weights = [model.graph.initializers["w"].const_value for model in (one, two)]
    arrays = [weight.numpy() for weight in weights if weight is not None]
    both.graph.initializers["w"].const_value = ir.Tensor(arrays[0] + arrays[1] - WEIGHT, name="w")
    assert meter.noise(both) == pytest.approx(meter.noise(one) + meter.noise(two), rel=0.2)
    assert meter.noise(two) == pytest.approx(4 * meter.noise(one), rel=0.3)
    assert meter.noise(classifier()) == 0


def test_a_model_without_the_value_is_measured_at_its_outputs(meter: Meter) -> None:
    other = classifier(0.3)
    next(node for node in other.graph if node.op_type == "MatMul").outputs[0].name = "renamed"
    assert 0 < meter.noise(other) < 1


def test_a_masked_class_does_not_hide_the_noise() -> None:
    """Before Softmax a class that cannot be is -inf."""

    def masked(change: float) -> ir.Model:
        model = classifier(change)
        product, softmax = (
            next(node for node in model.graph if node.op_type == kind) for kind in ("MatMul", "Softmax")
        )
        mask = np.zeros(8, np.float32)
        mask[3] = -np.inf
        constant = ir.node("Constant", [], {"value": ir.Tensor(mask)})
        total = ir.node("Add", [product.outputs[0], constant.outputs[0]])
        constant.outputs[0].name, total.outputs[0].name = "mask", "masked"
        model.graph.insert_after(product, [constant, total])
        softmax.replace_input_with(0, total.outputs[0])
        return model

    model = masked(0.0)
    meter = Meter(model, Judge(model, Context(runner=OrtRunner(), data=FEEDS)), 16)
    assert meter.names == ["masked"]
    assert meter.noise(masked(0.0)) == 0
    assert 0 < meter.noise(masked(0.1)) < meter.noise(masked(0.4)) < 1
