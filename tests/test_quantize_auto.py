"""The search for int8 within bounds: what it lifts, what it leaves, and how it judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from test_quantize_static import Feeds, Net, convs, feeds, quantized, sqnr

import penjing
from penjing.ir.errors import NeedsData
from penjing.ir.files import load, saved_bytes
from penjing.ir.text import text
from penjing.ir.verify import verify
from penjing.passes.base import Context, Pass
from penjing.passes.judge import Bars, Fidelity, Judge
from penjing.passes.quantize.auto import EVENING, QuantizeAuto
from penjing.passes.quantize.float16 import ToFloat16
from penjing.runtime.kernels import kernels
from penjing.runtime.session import OrtRunner

Array = np.ndarray[Any, Any]
MODELS = Path(__file__).parents[1] / "models"


def auto(model: ir.Model, data: Feeds, **given: Any) -> tuple[ir.Model, Context]:
    options = {key: given.pop(key) for key in ("max_drop", "min_sqnr", "keep") if key in given}
    work, ctx = model.clone(), Context(runner=OrtRunner(given.get("metric")), data=data, step="quantize-auto", **given)
    QuantizeAuto(**options).run(work, ctx)
    verify(work)
    return work, ctx


def images(model: ir.Model, count: int = 64) -> Feeds:
    with np.load(MODELS / "mnist-validation.npz") as arrays:
        found = next(arrays[key] for key in arrays.files if key != "labels")
    return [{model.graph.inputs[0].name or "": found[start : start + 1]} for start in range(count)]


@pytest.mark.parametrize(("name", "least"), [("mlp", 2), ("cnn-a", 10), ("vit", 12)])
def test_bundled_models_run_on_integers_and_agree(name: str, least: int) -> None:
    model = load(MODELS / f"{name}.onnx")
    data = images(model)
    work, ctx = auto(model, data)
    assert kernels(work).fused >= least
    assert saved_bytes(work) < 0.45 * saved_bytes(model)
    assert sqnr(model, work, data) > 25
    assert any(change.subject == "outputs" for change in ctx.ledger.changes)


def delicate() -> ir.Model:
    """A layer whose large output cancels against a copy in float but for a small rest, which is all that goes on."""
    net = Net()
    value = net.op("Relu", net.op("Conv", "x", net.weight(32, 32, 3, 3), pads=[1] * 4))
    large = net.op("Conv", value, net.weight(32, 32, 3, 3, scale=30), pads=[1] * 4, output="large")
    wave = net.op("Sin", large)
    net.op("Conv", wave, net.weight(32, 32, 3, 3), pads=[1] * 4)
    return net.model([1, 32, 24, 24])


def test_the_layer_that_does_harm_is_lifted_and_named() -> None:
    """A sine of hundreds of radians is noise after rounding to 8 bits; the layers behind it still gain."""
    model, data = delicate(), feeds(1, 32, 24, 24)
    static, _ = quantized(model, data, target="any")
    assert sqnr(model, static, data) < 10
    work, ctx = auto(model, data)
    assert sqnr(model, work, data) >= 20
    lifted = [skip.subject for skip in ctx.ledger.skips if skip.reason.startswith("lifted")]
    assert "n2" in lifted
    assert "n4" not in lifted
    assert kernels(work).fused >= 1


def uneven(reach: int = 5) -> ir.Model:
    """Channels that reach from 2^-5 to 2^5 where they are made, and are read by as much less: folded BatchNorms."""
    net = Net()
    factors = np.exp2(net.rng.integers(-reach, reach + 1, 32)).astype(np.float32)[:, None, None, None]
    made = net.rng.standard_normal((32, 32, 3, 3)).astype(np.float32) / 17 * factors
    read = net.rng.standard_normal((32, 32, 3, 3)).astype(np.float32) / 17 / factors.swapaxes(0, 1)
    value = net.op("Relu", net.op("Conv", "x", net.constant(made), pads=[1] * 4))
    value = net.op("Relu", net.op("Conv", value, net.constant(read), pads=[1] * 4))
    net.op("Conv", value, net.weight(32, 32, 3, 3), pads=[1] * 4)
    return net.model([1, 32, 24, 24])


@pytest.mark.parametrize("pass_", EVENING, ids=str)
def test_channels_of_unlike_reach_are_evened_out(pass_: Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    """One scale for all of them is noise to the small ones; so the whole model would have to stay in float."""
    monkeypatch.setattr("penjing.passes.quantize.auto.EVENING", (pass_,))
    model, data = uneven(), feeds(1, 32, 24, 24)
    static, _ = quantized(model, data, target="any")
    assert sqnr(model, static, data) < 10
    work, ctx = auto(model, data)
    assert sqnr(model, work, data) >= 20
    assert kernels(work).fused == 3
    assert any(change.subject == "search" and change.what.startswith(pass_.name) for change in ctx.ledger.changes)


def test_where_nothing_gains_the_model_stays_as_it_was() -> None:
    net = Net()
    net.op("Softsign", net.op("MatMul", "x", net.weight(4, 4)))
    model, data = net.model([1, 4]), feeds(1, 4)
    work, ctx = auto(model, data)
    assert text(work) == text(model)
    assert ctx.ledger.changes == []
    assert any("nothing gains" in skip.reason for skip in ctx.ledger.skips)


def test_why_a_layer_of_half_precision_stays_in_float() -> None:
    model = convs(channels=32)
    ToFloat16(mode="compute").run(model, Context(step="to-float16"))
    _, ctx = auto(model, feeds(1, 32, 12, 12))
    assert ctx.ledger.reasons()["its values are float16, and integer kernels are for float32"] == 3


def test_what_rounding_alone_moves_beyond_the_bounds_is_told() -> None:
    """The sine of a hundred million radians is another after each rounding, so that no search can help."""
    net = Net()
    value = net.op("Relu", net.op("Conv", "x", net.weight(32, 32, 3, 3), pads=[1] * 4))
    net.op("Sin", net.op("Div", value, net.constant(np.float32(0.7e-8))))
    model = net.model([1, 32, 24, 24])
    work, ctx = auto(model, feeds(1, 32, 24, 24))
    assert text(work) == text(model)
    (reason,) = ctx.ledger.reasons()
    assert "merging float operators alone moves its outputs" in reason
    assert "--metric" in reason


@pytest.mark.parametrize("last", ["Tanh", "Sigmoid"])
def test_rows_of_states_are_no_classes(last: str) -> None:
    """A word embedding's largest entry may change; that of a classifier may not."""
    net = Net()
    net.op("Squeeze", net.op(last, net.op("MatMul", "x", net.weight(64, 64))), net.constant(np.array([1])))
    model, data = net.model([4, 1, 64]), feeds(4, 1, 64)
    found = Judge(model, Context(runner=OrtRunner(), data=data)).fidelity(model)
    assert bool(found.flips) == (last == "Sigmoid")
    assert set(found.sqnr) == {"v2"}


def test_the_metric_decides() -> None:
    """A metric that only the float model satisfies: no integers, whatever the SQNR."""
    model, data = convs(channels=32), feeds(1, 32, 12, 12)
    (wanted,) = (found["v5"] for found in OrtRunner().run(model, data[:1]))

    def exact(session: Any) -> float:
        (found,) = session.run(None, data[0])
        return float(np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max())

    work, _ = auto(model, data, metric=exact)
    assert exact(OrtRunner().session(work)) == 1
    assert kernels(work).fused == 0
    free, _ = auto(model, data, metric=lambda session: 1.0)
    assert kernels(free).fused > 0


def test_kept_layers_stay_float() -> None:
    model, data = convs(channels=32), feeds(1, 32, 12, 12)
    work, _ = auto(model, data, keep="node:n2")
    weight = next(node for node in work.graph if node.name == "n2").inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    assert weight.const_value.dtype is ir.DataType.FLOAT


def test_the_same_bytes_twice() -> None:
    model, data = convs(channels=32), feeds(1, 32, 12, 12)
    first, second = (ir.to_proto(auto(model, data)[0]).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_no_data() -> None:
    with pytest.raises(NeedsData, match="quantize-auto needs --data"):
        QuantizeAuto().run(convs(), Context(runner=OrtRunner(), step="quantize-auto"))


def test_by_the_one_command(tmp_path: Path) -> None:
    model = load(MODELS / "cnn-a.onnx")
    report = penjing.run(model, "quantize-auto", data=str(MODELS / "mnist-validation.npz"))
    assert report.check.comparison is not None
    assert report.check.comparison.min_sqnr > 25


# Judging --------------------------------------------------------------------------------------------------------------


def recurrent() -> ir.Model:
    """h' = 0.98 h + x W, and y = h': an error of each step stays in the state."""
    net = Net()
    net.constants.append(onnx.numpy_helper.from_array(np.float32(0.98), "keep"))
    net.op("Mul", "h", "keep", output="kept")
    net.op("MatMul", "x", net.weight(16, 16), output="new")
    net.op("Add", "kept", "new", output="hn")
    info = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16]) for name in ("x", "h", "hn")}
    graph = helper.make_graph(net.nodes, "net", [info["x"], info["h"]], [info["hn"]], net.constants)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_feeds_that_carry_a_state_are_judged_as_sequences() -> None:
    model, rng = recurrent(), np.random.default_rng(0)
    data: Feeds = []
    for _ in range(3):
        state = np.zeros((1, 16), np.float32)
        for _ in range(10):
            data.append({"x": rng.standard_normal((1, 16)).astype(np.float32), "h": state})
            (found,) = OrtRunner().run(model, data[-1:])
            state = found["hn"]
    judge = Judge(model, Context(runner=OrtRunner(), data=data))
    assert judge.states.pairs == {"h": "hn"}
    assert judge.states.starts == {0, 10, 20}
    assert judge.fidelity(model).sqnr["hn"] > 100
    worse = model.clone()
    worse.graph.initializers["keep"].const_value = ir.tensor(np.float32(0.97), name="keep")
    alone = Judge(model, Context(runner=OrtRunner(), data=[data[0], *data[11:12]]))
    assert not alone.states
    assert judge.fidelity(worse).sqnr["hn"] < alone.fidelity(worse).sqnr["hn"]


def test_how_far_is_too_far() -> None:
    bars = Bars(max_drop=0.01, min_sqnr=20)
    assert Fidelity({"y": 20.0}).distance(bars) == pytest.approx(1)
    assert Fidelity({"y": 30.0, "z": 17.0}).distance(bars) == pytest.approx(10**0.3)
    assert Fidelity({"y": 30.0}, {"y": (4, 200)}).distance(bars) == pytest.approx(2)
    assert Fidelity({"y": 30.0}, {"y": (1, 64)}).distance(bars) == pytest.approx(1)
    assert Fidelity({"y": 30.0}, {"y": (9, 1000)}).distance(bars) == pytest.approx(0.9)
    assert Fidelity({}, {"y": (9, 1000)}).distance(bars, surely=True) == pytest.approx(1.1)
    assert Fidelity({}, {"y": (1, 64)}).distance(bars, surely=True) == pytest.approx(1)
    assert Fidelity({"y": 5.0}, drop=0.005).distance(bars) == pytest.approx(0.5)
    assert Fidelity({"y": 30.0}, {"y": (1, 200)}).distance(Bars(0.0, 20)) == float("inf")
    assert Fidelity({"y": 30.0}, {"y": (0, 200)}).distance(Bars(0.0, 20)) == pytest.approx(0.1)
