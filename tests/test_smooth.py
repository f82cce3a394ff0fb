"""Smoothing: outliers of activations go into weights, the bits stay, and int8 gains."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import pytest

from penjing.ir.affine import U8, affine
from penjing.ir.edit import Names, insert_after
from penjing.ir.errors import NeedsData, UsageError
from penjing.ir.text import text
from penjing.ir.verify import verify
from penjing.ir.weights import weights
from penjing.models import zoo
from penjing.passes.base import Context, Effect, Feeds
from penjing.passes.points import Range
from penjing.passes.quantize.seam_search import seams
from penjing.passes.quantize.smooth import Smooth
from penjing.passes.selection import Selection
from penjing.runtime.session import OrtRunner

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Parse = Callable[[str], ir.Model]

IMAGES = zoo.data("validation")["image"]
FEEDS = [{"image": IMAGES[start : start + 20]} for start in range(0, 80, 20)]

NORMED = """
    m (float[1,5,4] x) => (float[1,5,3] y)
    <float[4] gamma = {1, 40, 1, 1}, float[4] beta = {0, 8, 0, 0}, float[3] bias = {1, 2, 3},
     float[4] delta = {2, 3, 4, 5},
     float[4,3] w = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, float[4,3] v = {1, -1, 1, 1, -1, 1, 1, -1, 1, 1, 1, 1}>"""


def smooth(model: ir.Model, feeds: Feeds, **options: object) -> Context:
    ctx = Context(step="smooth", data=feeds, runner=OrtRunner())
    Smooth(**options).run(model, ctx)  # type: ignore[arg-type]
    verify(model)
    return ctx


def feed(*shape: int) -> list[dict[str, Array]]:
    return [{"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}]


def outputs(model: ir.Model, feeds: Feeds, level: str = "all") -> list[Array]:
    return [next(iter(found.values())) for found in OrtRunner().run(model, feeds, level=level)]


def assert_same(one: ir.Model, other: ir.Model, feeds: Feeds) -> None:
    for level in ("off", "all"):
        np.testing.assert_array_equal(outputs(one, feeds, level), outputs(other, feeds, level))


def arrays(model: ir.Model) -> dict[str, list[float]]:
    return {weight.address: weight.array().ravel().tolist() for weight in weights(model)}


def with_outliers(name: str) -> ir.Model:
    """A trained model whose activations have a few channels 64 times the others', and that computes the same bits."""
    model = zoo.load(name)
    for place, seam in enumerate(seams(model)):
        exponents = np.zeros(seam.size, np.int64)
        exponents[place % 7 :: 23] = -6
        seam.scale(exponents * seam.free, "outliers")
    return model


def rounded_activations(model: ir.Model, feeds: Feeds) -> ir.Model:
    """What layers read goes through uint8 with one scale, from its least and greatest number in ``feeds``."""
    points = list(dict.fromkeys(Range(vertex[0].name or "") for seam in seams(model) for vertex in seam.inputs()))
    known = OrtRunner().statistics(model, points, feeds)
    model = model.clone()
    values = {value.name: value for node in model.graph for value in node.outputs}
    names = Names(model)
    for point in points:
        made = affine(known[point].low, known[point].high, U8)
        constants = []
        for array in (np.asarray(made.scale, np.float32), np.asarray(made.zero_point)):
            name = names.fresh("parameter")
            constants.append(ir.val(name, const_value=ir.tensor(array, name=name)))
            model.graph.register_initializer(constants[-1])
        quantize = ir.node("QuantizeLinear", [values[point.value], *constants])
        insert_after(
            values[point.value], [quantize, ir.node("DequantizeLinear", [*quantize.outputs, *constants])], names
        )
    return model


def sqnr(reference: Sequence[Array], found: Sequence[Array]) -> float:
    one, other = np.concatenate(reference).astype(np.float64), np.concatenate(found)
    return float(10 * np.log10(np.square(one).sum() / np.square(one - other).sum()))


def test_vit_with_outliers_comes_back() -> None:
    """Activations in uint8 with one scale: outliers cost 15 dB and more, and smoothing brings all of it back."""
    plain, model = zoo.load("vit"), with_outliers("vit")
    reference = outputs(plain, FEEDS)
    smoothed = model.clone()
    ctx = smooth(smoothed, FEEDS)
    assert len(ctx.ledger.changes) == 9
    assert_same(model, smoothed, FEEDS)
    np.testing.assert_array_equal(reference, outputs(smoothed, FEEDS))
    found = [sqnr(reference, outputs(rounded_activations(one, FEEDS), FEEDS)) for one in (plain, model, smoothed)]
    assert found[1] < found[0] - 15
    assert found[2] > found[0] - 4
    for change in ctx.ledger.changes:
        assert change.numbers["activations_after"] < change.numbers["activations_before"]


def test_through_layers_and_residuals() -> None:
    plain, model = zoo.load("cnn-a"), with_outliers("cnn-a")
    smoothed = model.clone()
    ctx = smooth(smoothed, FEEDS)
    assert ctx.ledger.changes
    assert_same(model, smoothed, FEEDS)
    reference = outputs(plain, FEEDS)
    found = [sqnr(reference, outputs(rounded_activations(one, FEEDS), FEEDS)) for one in (model, smoothed)]
    assert found[1] > found[0] + 15


@pytest.mark.parametrize(
    "norm",
    [
        "n = LayerNormalization (x, gamma, beta)",
        "m = ReduceMean <axes: ints = [-1]> (x) c = Sub (x, m) g = Mul (c, gamma) n = Add (g, beta)",
        "d = Div (x, delta) g = Sub (beta, d) n = Mul (g, gamma)",
    ],
)
def test_all_that_read_a_normalization_share_its_factors(parse: Parse, norm: str) -> None:
    model = parse(f"{NORMED} {{ {norm} p = MatMul (n, w) a = Add (p, bias) b = MatMul (n, v) y = Mul (a, b) }}")
    before = model.clone()
    ctx = smooth(model, feed(1, 5, 4), strength=1.0)
    assert len(ctx.ledger.changes) == 1
    assert arrays(model)["w"] != arrays(before)["w"]
    assert [abs(number) for number in arrays(model)["v"]] == arrays(model)["w"]
    assert_same(before, model, feed(1, 5, 4))


def test_strength(parse: Parse) -> None:
    found = []
    for strength in (0.0, 0.5, 1.0):
        model = parse(f"{NORMED} {{ n = LayerNormalization (x, gamma, beta) y = MatMul (n, w) }}")
        ctx = smooth(model, feed(1, 5, 4), strength=strength)
        found.append([change.numbers["activations_after"] for change in ctx.ledger.changes])
    assert found[0] == []  # the weights alone are even
    assert found[2][0] < found[1][0]


def test_another_reader_stops_it(parse: Parse) -> None:
    model = parse(f"""{NORMED}
        {{ n = LayerNormalization (x, gamma, beta) p = MatMul (n, w) e = Exp (n) s = ReduceSum (e) y = Mul (p, s) }}""")
    before = text(model)
    ctx = smooth(model, feed(1, 5, 4))
    assert ctx.ledger.reasons() == {"Exp reads it and takes no factors": 1}
    assert text(model).count("MatMul") == before.count("MatMul")


def test_insert_puts_a_mul_before_the_layers(parse: Parse) -> None:
    model = parse(f"""{NORMED}
        {{ n = LayerNormalization (x, gamma, beta) p = MatMul (n, w) q = MatMul (n, v) e = Exp (n) s = ReduceSum (e)
          r = Mul (p, q) y = Mul (r, s) }}""")
    before = model.clone()
    ctx = smooth(model, feed(1, 5, 4), insert="yes", strength=1.0)
    assert [change.what for change in ctx.ledger.changes] == ["outliers moved into the weights by a Mul"]
    made = next(node for node in model.graph if node.name == "n_Mul")
    assert [node.op_type for node in made.outputs[0].consumers()] == ["MatMul", "MatMul"]
    assert_same(before, model, feed(1, 5, 4))
    assert not smooth(model, feed(1, 5, 4), insert="yes", strength=1.0).ledger.changes


def test_insert_of_an_input_and_of_channels_that_a_reshape_groups(parse: Parse) -> None:
    model = parse("""
        m (float[1,2,6] x) => (float[1,2,1] y)
        <int64[4] heads = {1, 2, 2, 3}, int64[3] flat = {1, 2, 6}, float[6,1] w = {1, 1, 1, 1, 1, 1}>
        { h = Reshape (x, heads) s = Softplus (h) r = Reshape (s, flat) y = MatMul (r, w) }""")
    feeds = [{"x": np.array([[[1, 2, 500, 1, 2, 1], [1, 2, -3, 1, 2, 1]]], np.float32)}]
    before = model.clone()
    ctx = smooth(model, feeds, insert="yes", strength=1.0)
    assert len(ctx.ledger.changes) == 1
    assert arrays(model)["w"][2] > 32 * arrays(model)["w"][1]
    assert_same(before, model, feeds)


def test_what_it_needs_and_refuses() -> None:
    with pytest.raises(NeedsData, match="smooth needs --data; none was given"):
        Smooth().run(zoo.load("vit"), Context(step="smooth", runner=OrtRunner()))
    with pytest.raises(UsageError, match=r"strength=1.5 is out of range; it is from 0 to 1"):
        Smooth(strength=1.5)
    assert Smooth().effect() is Effect.ROUNDING


def test_zeros_nan_and_keep(parse: Parse) -> None:
    body = "{ n = LayerNormalization (x, gamma, beta) y = MatMul (n, w) }"
    model = parse(f"{NORMED} {body}")
    ctx = smooth(model, [{"x": np.full((1, 5, 4), np.nan, np.float32)}])
    assert not ctx.ledger.changes
    assert any("NaN" in reason for reason in ctx.ledger.reasons())
    ctx = smooth(model, feed(1, 5, 4), keep=Selection(("w",)))
    assert ctx.ledger.reasons() == {"kept by request": 1}
    dead = parse("""
        m (float[1,2,1,1] x) => (float[1,1,1,1] y) <float[2,2,1,1] w = {1, 2, 3, 4}, float[1,2,1,1] v = {1, 9}>
        { h = Conv (x, w) r = Relu (h) y = Conv (r, v) }""")
    assert not smooth(dead, [{"x": np.zeros((1, 2, 1, 1), np.float32)}]).ledger.changes
