"""Cross-layer equalization: the same bits, evener channels, and what it must not touch."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from penjing.ir.affine import S8, affine
from penjing.ir.text import text
from penjing.ir.verify import verify
from penjing.ir.weights import weights
from penjing.models import zoo
from penjing.passes.base import Context, Effect
from penjing.passes.pipeline import Pipeline
from penjing.passes.quantize.equalize import Equalize
from penjing.passes.quantize.seam_search import seams
from penjing.passes.quantize.seams import NOT_FINITE, powers, unevenness
from penjing.passes.selection import Selection
from penjing.runtime.session import OrtRunner

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Parse = Callable[[str], ir.Model]


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def uneven(channels: int, seed: int = 0) -> Array:
    """Factors between 1/32 and 32."""
    return np.exp2(np.random.default_rng(seed).uniform(-5, 5, channels)).astype(np.float32)


def equalize(model: ir.Model, **options: object) -> Context:
    ctx = Context(step="equalize")
    Equalize(**options).run(model, ctx)  # type: ignore[arg-type]
    verify(model)
    return ctx


def outputs(model: ir.Model, feed: dict[str, Array], level: str = "all") -> list[Array]:
    return list(next(iter(OrtRunner().run(model, [feed], level=level))).values())


def reasons(ctx: Context) -> dict[str, str]:
    return {skip.subject: skip.reason for skip in ctx.ledger.skips}


class Net:
    """A model written operator by operator; ``layer`` gives it uneven output channels."""

    def __init__(self, *shape: int) -> None:
        self.tape = ir.tape.Tape()
        self.x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(shape))
        self.shape = shape
        self.count = 0

    def constant(self, array: Array, name: str = "") -> ir.Value:
        self.count += 1
        return self.tape.initializer(ir.tensor(array, name=name or f"c{self.count}"))

    def op(self, op_type: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        return self.tape.op(op_type, list(inputs), attributes)  # type: ignore[arg-type]

    def conv(self, x: ir.Value, *shape: int, name: str = "", bias: bool = True, **attributes: object) -> ir.Value:
        self.count += 1
        scale = uneven(shape[0], self.count)
        weight = random(*shape, seed=self.count) * scale.reshape(-1, *[1] * (len(shape) - 1))
        inputs = [x, self.constant(weight, name)]
        if bias:
            inputs.append(self.constant(random(shape[0], seed=self.count + 50) * scale))
        return self.op("Conv", *inputs, **attributes)

    def model(self, *found: ir.Value) -> ir.Model:
        graph = ir.Graph(
            [self.x],
            found,
            nodes=self.tape.nodes,
            initializers=self.tape.initializers,
            opset_imports={"": 17},
            name="g",
        )
        model = ir.Model(graph, ir_version=8)
        for place, value in enumerate(found):
            value.name = f"y{place}"
            value.type = ir.TensorType(ir.DataType.FLOAT)
        return model

    def feed(self) -> dict[str, Array]:
        return {"x": random(*self.shape, seed=99)}


def depthwise(net: Net) -> ir.Value:
    h = net.op("Relu", net.conv(net.x, 6, 3, 3, 3))
    h = net.op("LeakyRelu", net.conv(h, 12, 1, 3, 3, group=6), alpha=0.1)
    h = net.op("MaxPool", h, kernel_shape=[2, 2])
    return net.conv(h, 4, 12, 1, 1)


def residual(net: Net) -> ir.Value:
    first = net.op("Relu", net.conv(net.x, 6, 3, 1, 1))
    second = net.conv(first, 6, 6, 3, 3, pads=[1, 1, 1, 1], bias=False)
    total = net.op("Relu", net.op("Add", first, second))
    return net.conv(net.op("AveragePool", total, kernel_shape=[3, 3]), 4, 6, 1, 1)


def concatenated(net: Net) -> ir.Value:
    parts = [net.op("Relu", net.conv(net.x, channels, 3, 1, 1)) for channels in (2, 5, 3)]
    left = net.conv(net.op("Concat", *parts, axis=1), 4, 10, 1, 1)
    return net.op("Add", left, net.conv(parts[1], 4, 5, 1, 1))


def flattened(net: Net) -> ir.Value:
    h = net.op("PRelu", net.conv(net.x, 3, 3, 3, 3), net.constant(uneven(3).reshape(3, 1, 1)))
    h = net.op("Mul", net.op("Neg", h), net.constant(np.float32(3)))
    h = net.op("Flatten", h)
    return net.op("Gemm", h, net.constant(random(5, 108)), transB=1)


def matrices(net: Net) -> ir.Value:
    h = net.op("MatMul", net.x, net.constant(random(8, 6) * uneven(6)))
    h = net.op("Max", net.op("Add", h, net.constant(random(6))), net.constant(np.float32(0)))
    h = net.op("Transpose", net.op("Div", h, net.constant(np.float32(3))), perm=[0, 1, 3, 2])
    return net.op("MatMul", net.constant(random(3, 6)), h)


@pytest.mark.parametrize("build", [depthwise, residual, concatenated, flattened, matrices])
def test_the_model_computes_the_same_bits(build: Callable[[Net], ir.Value]) -> None:
    net = Net(2, 3, 8, 8)
    model = net.model(build(net))
    before = model.clone()
    ctx = equalize(model)
    assert ctx.ledger.changes
    for level in ("off", "all"):
        for old, new in zip(outputs(before, net.feed(), level), outputs(model, net.feed(), level), strict=True):
            np.testing.assert_array_equal(old, new)
    totals = [
        sum(change.numbers[f"largest_to_mean_{when}"] ** 2 for change in ctx.ledger.changes)
        for when in ("before", "after")
    ]
    assert totals[1] < totals[0]


@pytest.mark.parametrize("build", [depthwise, residual, concatenated, flattened, matrices])
def test_twice_is_once_and_runs_agree(build: Callable[[Net], ir.Value]) -> None:
    net = Net(2, 3, 8, 8)
    model = net.model(build(net))
    twin = model.clone()
    equalize(model)
    equalize(twin)
    once = text(model)
    assert text(twin) == once
    assert not equalize(model).ledger.changes
    assert text(model) == once


def test_channels_end_within_the_square_root_of_two() -> None:
    net = Net(1, 4, 4, 4)
    model = net.model(net.conv(net.op("Relu", net.conv(net.x, 8, 4, 1, 1, name="a")), 8, 8, 1, 1, name="b"))
    equalize(model)
    found = {weight.address: weight.magnitudes() for weight in weights(model)}
    made, read = found["a"].max(axis=(1, 2, 3)), found["b"].max(axis=(0, 2, 3))
    ratio = made / read
    assert ratio.max() / ratio.min() <= 4.001  # each factor is a power of two, within sqrt(2) of the best either way


def test_it_brings_back_what_was_made_uneven() -> None:
    """One scale a tensor: a trained CNN with uneven channels, int8 weights, compared with its own float outputs."""
    feeds = [{"image": zoo.data("validation")["image"][:100]}]
    runner, plain = OrtRunner(), zoo.load("cnn-a")
    reference = next(iter(runner.run(plain, feeds)))["logits"].astype(np.float64)

    def sqnr(model: ir.Model) -> float:
        model = model.clone()
        for weight in weights(model):
            if weight.prunable:
                extent = np.abs(weight.array()).max()
                weight.replace(affine(-extent, extent, S8, symmetric=True).rounded(weight.array()))
        found = next(iter(runner.run(model, feeds)))["logits"]
        return float(10 * np.log10(np.square(reference).sum() / np.square(reference - found).sum()))

    disguised = plain.clone()
    generator = np.random.default_rng(0)
    for seam in seams(disguised):
        seam.scale(generator.integers(-4, 5, seam.size) * seam.free, "disguise")
    np.testing.assert_array_equal(next(iter(runner.run(disguised, feeds)))["logits"].astype(np.float64), reference)
    equalized = disguised.clone()
    equalize(equalized)
    assert sqnr(disguised) < 12
    assert sqnr(equalized) > sqnr(plain) - 1 > 25


# What stays ----------------------------------------------------------------------------------------------------------

STAYS = {
    "Clip (h, zero, six)": "Clip has a bound that would have to scale too",
    "Softmax <axis: int = 1> (h)": "Softmax takes no factors",
    "Sigmoid (h)": "Sigmoid makes it and takes no factors",
    "Mul (h, h)": "Mul of computed values takes no factors",
    "Add (h, one)": "Add has no constant for each channel of it",
    "Add (h, thin)": "Add stretches an operand over its channels",
}


@pytest.mark.parametrize("function", STAYS)
def test_functions_that_are_not_homogeneous_stop_it(parse: Parse, function: str) -> None:
    model = parse(f"""
        m (float[1,2,4,4] x, float[1,1,4,4] thin) => (float[1,2,4,4] y)
        <float[2,2,1,1] w = {{8, -4, 0.5, 0.25}}, float zero = {{0}}, float six = {{6}}, float one = {{1}},
         float[2,2,1,1] v = {{1, 1, 1, 1}}>
        {{ h = Conv (x, w) r = {function} y = Conv (r, v) }}""")
    ctx = equalize(model)
    assert not ctx.ledger.changes
    assert STAYS[function] in ctx.ledger.reasons()
    assert weights(model)[0].array().ravel().tolist() == [8, -4, 0.5, 0.25]


HELD = {
    "an output of a graph": ("(float[1,2,4,4] y, float[1,2,4,4] h)", "it is an output of a graph"),
    "read by another operator": ("(float[1,2,4,4] y, float[1,2,4,4] e)", "Exp reads it and takes no factors"),
    "a weight used twice": ("(float[1,2,4,4] y, float[1,2,4,4] z)", "a constant of Conv has other uses"),
}


@pytest.mark.parametrize("case", HELD)
def test_what_is_used_elsewhere_stays(parse: Parse, case: str) -> None:
    results, reason = HELD[case]
    extra = {"e": "e = Exp (h)", "z": "z = Conv (x, w)"}.get(results[-2], "")
    model = parse(f"""
        m (float[1,2,4,4] x) => {results}
        <float[2,2,1,1] w = {{8, -4, 0.5, 0.25}}, float[2,2,1,1] v = {{1, 1, 1, 1}}>
        {{ h = Conv (x, w) r = Relu (h) y = Conv (r, v) {extra} }}""")
    ctx = equalize(model)
    assert not ctx.ledger.changes
    assert reason in ctx.ledger.reasons()


def test_a_weight_that_the_caller_may_pass_stays(parse: Parse) -> None:
    model = parse("""
        m (float[1,2,4,4] x, float[2,2,1,1] w) => (float[1,2,4,4] y)
        <float[2,2,1,1] w = {8, -4, 0.5, 0.25}, float[2,2,1,1] v = {1, 1, 1, 1}>
        { h = Conv (x, w) y = Conv (h, v) }""")
    assert not equalize(model).ledger.changes


def test_half_precision_and_normalizations_stay(parse: Parse) -> None:
    half = parse("""
        m (float16[1,2,4,4] x) => (float16[1,2,4,4] y)
        <float16[2,2,1,1] w = {1, 2, 3, 4}, float16[2,2,1,1] v = {1, 1, 1, 1}>
        { h = Conv (x, w) y = Conv (h, v) }""")
    assert "a constant of Conv is not stored as floats with room for factors" in equalize(half).ledger.reasons()
    ctx = equalize(zoo.load("vit"))
    assert not ctx.ledger.changes
    assert reasons(ctx)["layer_norm"].startswith("a normalization makes it")


def test_pinned_channels_of_a_concat_stay_and_the_others_move(parse: Parse) -> None:
    model = parse("""
        m (float[1,2,4,4] x) => (float[1,1,4,4] y)
        <float[2,2,1,1] w = {64, -4, 0.5, 0.25}, float[1,4,1,1] v = {1, 1, 1, 1}>
        { h = Conv (x, w) c = Concat <axis: int = 1> (h, x) y = Conv (c, v) }""")
    before = model.clone()
    assert equalize(model).ledger.changes
    found = {weight.address: weight.array().ravel() for weight in weights(model)}
    assert found["v"][2:].tolist() == [1, 1]
    assert found["v"][:2].tolist() != [1, 1]
    feed = {"x": random(1, 2, 4, 4)}
    np.testing.assert_array_equal(outputs(before, feed)[0], outputs(model, feed)[0])


def test_only_and_keep() -> None:
    ctx = equalize(zoo.load("cnn-a"), keep=Selection(("7.branch.3.weight",)))
    assert {"relu_2", "relu_3"}.isdisjoint(change.subject for change in ctx.ledger.changes)
    assert reasons(ctx)["relu_2"] == "a weight beside it: kept by request"
    ctx = equalize(zoo.load("cnn-a"), only=Selection(("7.branch.0.weight", "7.branch.3.weight")))
    assert [change.subject for change in ctx.ledger.changes] == ["relu_2"]


def test_dead_channels_and_zero_weights_do_no_harm(parse: Parse) -> None:
    model = parse("""
        m (float[1,2,4,4] x) => (float[1,1,4,4] y)
        <float[3,2,1,1] w = {64, -4, 0, 0, 0.5, 0.25}, float[1,3,1,1] v = {1, 1, 0}, float[1,1,1,1] u = {0}>
        { h = Conv (x, w) i = Conv (h, v) y = Conv (i, u) }""")
    before = model.clone()
    equalize(model)
    feed = {"x": random(1, 2, 4, 4)}
    np.testing.assert_array_equal(outputs(before, feed)[0], outputs(model, feed)[0])


def test_figures() -> None:
    assert Equalize().effect() is Effect.ROUNDING
    assert unevenness(np.array([0.0, 1, 4])) == pytest.approx(2)
    assert unevenness(np.zeros(3)) == 1
    free = np.ones(3, bool)
    assert powers(np.array([1.2, 0.9, np.nan]), free).tolist() == [0, 0, 0]
    assert powers(np.array([3.2, 0.0, 0.0]), free).tolist() == [3, 0, 0]
    assert powers(np.array([3.2, 99.0, 0.0]), free & [True, True, False]).tolist() == [3, 24, 0]


def extreme(kind: str) -> ir.Model:
    """Two layers; some channels of the first are so large or small that factors would push them out of float32."""
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((8, 8, 1, 1)).astype(np.float32) for _ in range(2))
    if kind == "huge":
        first[2] *= 1e30
        first[3] *= 1e-3
    elif kind == "tiny":
        first[2] = 1e-40
        first[3] *= 1e3
    else:
        first[3] *= 1e3
        first[2, 1] = {"infinite": np.inf, "nan": np.nan}[kind]
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["h"]),
        onnx.helper.make_node("Relu", ["h"], ["r"]),
        onnx.helper.make_node("Conv", ["r", "v"], ["y"]),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 8, 4, 4]) for name in "xy"]
    weights = [onnx.numpy_helper.from_array(array, name) for array, name in ((first, "w"), (second, "v"))]
    graph = onnx.helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    opsets = [onnx.helper.make_opsetid("", 17)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pass_", ["equalize", "smooth", "smooth{insert=yes}"])
@pytest.mark.parametrize("kind", ["huge", "tiny", "infinite", "nan"])
def test_channels_out_of_reach_are_held(kind: str, pass_: str) -> None:
    """The others may still be scaled, and the outputs are the same to the bit."""
    model = extreme(kind)
    data = [{"x": np.random.default_rng(1).standard_normal((1, 8, 4, 4)).astype(np.float32)} for _ in range(2)]
    work = model.clone()
    (step,) = Pipeline.of(pass_).run(work, Context(runner=OrtRunner(), data=data))
    before, after = ({name: v.const_value.numpy() for name, v in m.graph.initializers.items()} for m in (model, work))
    assert np.array_equal(before["w"][2], after["w"][2], equal_nan=True)
    if kind in ("infinite", "nan"):
        assert np.array_equal(before["w"], after["w"], equal_nan=True)
        assert NOT_FINITE in step.ledger.reasons()
    else:
        assert not np.array_equal(before["w"], after["w"])
    with np.errstate(all="ignore"):
        for wanted, found in zip(OrtRunner().run(model, data), OrtRunner().run(work, data), strict=True):
            assert np.array_equal(wanted["y"], found["y"], equal_nan=True)
