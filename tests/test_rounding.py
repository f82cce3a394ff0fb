"""Adaptive rounding: moments of inputs against ONNX Runtime, the search itself, and what models gain."""

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from penjing.ir.affine import Affine, Grid, affine
from penjing.ir.errors import NeedsData, UsageError
from penjing.ir.text import text
from penjing.ir.verify import verify
from penjing.ir.weights import weights
from penjing.models import zoo
from penjing.passes import gptq as carrying
from penjing.passes.base import Context
from penjing.passes.gptq import Moments
from penjing.passes.gram import Gram, Window
from penjing.passes.pipeline import Pipeline
from penjing.passes.quantize import rounding
from penjing.passes.quantize.original import remember
from penjing.passes.quantize.rounding import RoundAdaptively
from penjing.passes.selection import Selection
from penjing.runtime.session import OrtRunner

Array = np.ndarray[Any, Any]

FEEDS = [{"image": zoo.data("validation")["image"][start : start + 8]} for start in range(0, 64, 8)]
HELD_OUT = [{"image": zoo.data("test")["image"][:200]}]


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def correlated(count: int, width: int, seed: int) -> Array:
    """Inputs that occur together: a quarter as many causes as inputs, and some noise."""
    mixing = random(width // 4, width, seed=7)
    return random(count, width // 4, seed=seed) @ mixing + 0.3 * random(count, width, seed=seed + 1)


def grid(weight: Array, bits: int) -> Affine:
    """A symmetric scale for each row."""
    extent, highest = np.abs(weight).max(axis=1, keepdims=True), 2 ** (bits - 1) - 1
    return affine(-extent, extent, Grid(ir.DataType.INT8, -highest, highest), symmetric=True)


def gptq(weight: Array, gram: Array, made: Affine, count: int = 0) -> Array:
    """The integers [N, K] of a layer of one group."""
    return rounding.gptq(weight[None], Moments(gram[None], count), made)[0]


def output_error(weight: Array, integers: Array, gram: Array, made: Affine) -> Array:
    """The energy of the output error of each channel [N] of a layer of one group."""
    return rounding.output_error(weight[None], integers, Moments(gram[None]), made)[0]


def errors(weight: Array, inputs: Array, made: Affine, *found: Array) -> list[Array]:
    """The output error of each channel on ``inputs`` [K, n] with each of some integers."""
    return [output_error(weight, integers, inputs @ inputs.T, made) for integers in found]


# The search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "gain"), [(8, 8), (4, 8), (3, 6), (2, 3)])
def test_the_output_error_falls_on_inputs_seen_and_unseen(bits: int, gain: float) -> None:
    weight = random(48, 160, seed=3)
    seen, unseen = correlated(1000, 160, 1).T, correlated(1000, 160, 11).T
    made = grid(weight, bits)
    found, nearest = gptq(weight, seen @ seen.T, made, count=1000), made.quantized(weight)
    assert found.dtype == nearest.dtype
    assert np.abs(found).max() <= made.grid.highest
    for inputs in (seen, unseen):
        old, new = errors(weight, inputs, made, nearest, found)
        assert 10 * np.log10(old.sum() / new.sum()) > gain


def test_few_inputs_do_not_mislead() -> None:
    """With 40 inputs of width 160 most directions were never seen; what was not must not get much worse."""
    weight, made = random(48, 160, seed=3), grid(random(48, 160, seed=3), 4)
    seen, unseen = (random(40, 160, seed=1).T, random(1000, 160, seed=2).T)
    nearest = made.quantized(weight)
    found = gptq(weight, seen @ seen.T, made, count=40)
    old, new = errors(weight, unseen, made, nearest, found)
    assert new.sum() < 1.1 * old.sum()


def test_no_channel_gets_worse_and_none_changes_without_correlation() -> None:
    weight = random(32, 24, seed=5)
    made = grid(weight, 3)
    nearest = made.quantized(weight)
    np.testing.assert_array_equal(gptq(weight, np.diag(np.arange(1.0, 25)), made), nearest)
    for seed in range(20):
        inputs = random(24, 6, seed=seed)
        found = gptq(weight, inputs @ inputs.T, made)
        old, new = errors(weight, inputs, made, nearest, found)
        assert np.all(new <= old)


def test_near_the_best_of_all() -> None:
    """Among all integers within a step of the nearest, by trying each."""
    weight, inputs = random(8, 4, seed=1), correlated(200, 8, 3)[:, :4].T
    made, gram = grid(weight, 4), inputs @ inputs.T
    nearest = made.quantized(weight)
    steps = [np.array(step) for step in itertools.product((-1, 0, 1), repeat=4)]
    best = np.min([output_error(weight, nearest + step, gram, made) for step in steps], axis=0)
    found = output_error(weight, gptq(weight, gram, made), gram, made)
    assert best.sum() <= found.sum() < 1.5 * best.sum() < output_error(weight, nearest, gram, made).sum()


def test_degenerate_moments() -> None:
    weight, made = random(4, 6), grid(random(4, 6), 4)
    nearest = made.quantized(weight)
    np.testing.assert_array_equal(gptq(weight, np.zeros((6, 6)), made), nearest)
    one = random(6, 1, seed=2)
    one[2] = 0
    found = gptq(weight, one @ one.T, made)
    np.testing.assert_array_equal(found[:, 2], nearest[:, 2])
    assert output_error(weight, found, one @ one.T, made).sum() < output_error(weight, nearest, one @ one.T, made).sum()
    huge = 1e30 * (one @ one.T).astype(np.float64)
    np.testing.assert_array_equal(gptq(weight, huge, made), found)
    with pytest.raises(ValueError, match="not finite"):
        gptq(weight, np.full((6, 6), np.nan), made)


def test_blocks_of_columns_are_one_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = random(9, 70), correlated(300, 70, 1).T
    made, found = grid(weight, 4), []
    for block in (1, 16, 128):
        monkeypatch.setattr(carrying, "_BLOCK", block)
        found.append(gptq(weight, inputs @ inputs.T, made))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_zero_points_and_scales_for_each_element() -> None:
    weight, inputs = random(6, 64), correlated(500, 64, 1).T
    low, high = weight.reshape(6, 4, 16).min(axis=2), weight.reshape(6, 4, 16).max(axis=2)
    blocks = affine(low, high, Grid(ir.DataType.UINT8, 0, 15))
    made = Affine(np.repeat(blocks.scale, 16, axis=1), np.repeat(blocks.zero_point, 16, axis=1), blocks.grid)
    found, nearest = gptq(weight, inputs @ inputs.T, made), made.quantized(weight)
    assert found.min() >= 0
    assert found.max() <= 15
    old, new = errors(weight, inputs, made, nearest, found)
    assert new.sum() < 0.5 * old.sum()


# Moments -------------------------------------------------------------------------------------------------------------

CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 4, 9, 8), (6, 4, 3, 3), {}),
    ((2, 4, 9, 8), (6, 4, 3, 2), {"strides": [2, 3], "pads": [1, 0, 2, 1]}),
    ((2, 4, 9, 8), (6, 2, 3, 3), {"group": 2, "dilations": [2, 1], "pads": [2, 2, 0, 0]}),
    ((2, 4, 9, 8), (8, 1, 3, 3), {"group": 4}),
    ((2, 4, 9, 8), (6, 4, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ((2, 4, 9, 8), (6, 4, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [3, 2]}),
    ((2, 4, 9, 8), (6, 4, 4, 3), {"auto_pad": "VALID"}),
    ((3, 2, 11), (5, 2, 3), {"strides": [2]}),
    ((1, 2, 5, 6, 4), (5, 2, 2, 3, 2), {"pads": [1, 1, 1, 0, 0, 0]}),
]


def layer(op_type: str, shapes: list[tuple[int, ...]], weight_port: int, **attributes: Any) -> ir.Model:
    """One operator between ``x`` and ``y``, with a random weight ``w``."""
    weight = ir.val("w", const_value=ir.tensor(random(*shapes[weight_port], seed=1), name="w"))
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(shapes[1 - weight_port]))
    node = ir.node(op_type, [x, weight] if weight_port else [weight, x], attributes, name="layer")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=8)


def energy_by_ort(model: ir.Model, x: Array, axis: int) -> Array:
    """The sum of squares of each output channel."""
    found = next(iter(OrtRunner().run(model, [{"x": x}])))["y"].astype(np.float64)
    return np.asarray(np.square(np.moveaxis(found, axis, 0)).reshape(found.shape[axis], -1).sum(axis=1))


@pytest.mark.parametrize(("size", "kernel", "attributes"), CONVOLUTIONS)
def test_moments_of_a_convolution(size: tuple[int, ...], kernel: tuple[int, ...], attributes: dict[str, Any]) -> None:
    model = layer("Conv", [size, kernel], 1, **attributes)
    node, x = model.graph[0], random(*size)
    statistic = Gram("x", window=Window.of(node, kernel[2:]), positions=10_000).start()
    statistic.update(x)
    assert statistic.total is not None
    groups = attributes.get("group", 1)
    rows = weights(model)[0].array().astype(np.float64).reshape(groups, kernel[0] // groups, -1)
    found = np.einsum("gnk,gkl,gnl->gn", rows, statistic.total, rows).reshape(-1)
    np.testing.assert_allclose(found, energy_by_ort(model, x, 1), rtol=1e-5)


MATRICES: list[tuple[str, list[tuple[int, ...]], int, dict[str, Any]]] = [
    ("MatMul", [(2, 5, 12), (12, 3)], 1, {}),
    ("MatMul", [(3, 12), (2, 12, 5)], 0, {}),
    ("Gemm", [(5, 12), (12, 3)], 1, {}),
    ("Gemm", [(5, 12), (3, 12)], 1, {"transB": 1}),
    ("Gemm", [(12, 5), (12, 3)], 1, {"transA": 1}),
    ("Gemm", [(3, 12), (12, 5)], 0, {}),
    ("Gemm", [(12, 3), (5, 12)], 0, {"transA": 1, "transB": 1}),
]


@pytest.mark.parametrize(("op_type", "shapes", "port", "attributes"), MATRICES)
def test_a_product_is_rounded_for_its_inputs(
    op_type: str, shapes: list[tuple[int, ...]], port: int, attributes: dict[str, Any]
) -> None:
    """The figures in the ledger are those of the outputs that ONNX Runtime gives."""
    model = layer(op_type, shapes, port, **attributes)
    original, x = model.clone(), random(*shapes[1 - port]) + 3
    _store(model, 3)
    ctx = run(model, [{"x": x}], original)
    assert len(ctx.ledger.changes) == 1
    runs = (OrtRunner().run(one, [{"x": x}], level="off") for one in (original, model))  # else it rounds inputs too
    wanted, found = (next(iter(outputs))["y"].astype(np.float64) for outputs in runs)
    expected = 10 * np.log10(np.square(wanted).sum() / np.square(wanted - found).sum())
    assert ctx.ledger.changes[0].numbers["sqnr_after"] == pytest.approx(expected, abs=1e-3)


def _store(model: ir.Model, bits: int) -> None:
    """Weights as integers with one scale."""
    for weight in weights(model):
        extent, highest = np.abs(weight.array()).max(), 2 ** (bits - 1) - 1
        made = affine(-extent, extent, Grid(ir.DataType.INT8, -highest, highest), symmetric=True)
        scale = ir.val("scale", const_value=ir.tensor(made.scale, name="scale"))
        model.graph.register_initializer(scale)
        node = ir.node("DequantizeLinear", [weight.value, scale], name="decode")
        for user, port in weight.value.uses():
            if user is not node:
                user.replace_input_with(port, node.outputs[0])
        model.graph.insert_before(model.graph[0], node)
        weight.replace(made.quantized(weight.array()))


def test_blocks_with_scales_of_their_own() -> None:
    model, inputs = layer("MatMul", [(20, 32), (32, 5)], 1), correlated(20, 32, 1)
    model.opset_imports[""], model.ir_version = 21, 10
    original, weight = model.clone(), weights(model)[0]
    array = weight.array().reshape(4, 8, 5)
    made = affine(array.min(axis=1), array.max(axis=1), Grid(ir.DataType.UINT8, 0, 7))
    integers = Affine(made.scale[:, None], made.zero_point[:, None], made.grid).quantized(array)
    parameters = [
        ir.val(name, const_value=ir.tensor(content, name=name))
        for name, content in (("scale", made.scale), ("zero", made.zero_point))
    ]
    for value in parameters:
        model.graph.register_initializer(value)
    node = ir.node("DequantizeLinear", [weight.value, *parameters], {"axis": 0, "block_size": 8}, name="decode")
    model.graph[0].replace_input_with(1, node.outputs[0])
    model.graph.insert_before(model.graph[0], node)
    weight.replace(integers.reshape(32, 5))
    ctx = run(model, [{"x": inputs}], original)
    numbers = ctx.ledger.changes[0].numbers
    assert numbers["sqnr_after"] > numbers["sqnr_before"] + 3
    runs = (OrtRunner().run(one, [{"x": inputs}], level="off") for one in (original, model))
    wanted, found = (next(iter(outputs))["y"].astype(np.float64) for outputs in runs)
    expected = 10 * np.log10(np.square(wanted).sum() / np.square(wanted - found).sum())
    assert numbers["sqnr_after"] == pytest.approx(expected, abs=1e-3)


def test_positions_are_chosen_sample_by_sample() -> None:
    x = random(6, 3, 10, 10)
    point = Gram("x", window=Window((3, 3), (1, 1), (1, 1), (0, 0, 0, 0)), positions=5)
    whole, parts, other = point.start(), point.start(), point.start()
    whole.update(x)
    parts.update(x[:2])
    other.update(x[2:])
    parts.merge(other)
    assert whole.total is not None
    assert parts.total is not None
    assert whole.count == parts.count == 30
    np.testing.assert_allclose(whole.total, parts.total, rtol=1e-12)
    whole.update(x[:0])
    assert whole.count == 30


# Models --------------------------------------------------------------------------------------------------------------


def run(model: ir.Model, feeds: list[dict[str, Array]], original: ir.Model | None = None, **options: Any) -> Context:
    partners = None if original is None else {"original": original}
    ctx = Context(step="round-adaptively", data=feeds, runner=OrtRunner(), models=partners)
    RoundAdaptively(**options).run(model, ctx)
    verify(model)
    return ctx


def quantized(name: str, steps: str) -> ir.Model:
    model = zoo.load(name)
    remember(model)
    Pipeline.of(steps).run(model, Context(data=FEEDS, runner=OrtRunner()))
    return model


def sqnr(name: str, model: ir.Model) -> float:
    wanted, found = (
        next(iter(OrtRunner().run(one, HELD_OUT)))["logits"].astype(np.float64) for one in (zoo.load(name), model)
    )
    return float(10 * np.log10(np.square(wanted).sum() / np.square(wanted - found).sum()))


@pytest.mark.parametrize(("name", "gain"), [("cnn-a", 6), ("vit", 4)])
def test_four_bits_of_real_models(name: str, gain: float) -> None:
    model = quantized(name, "quantize-weights{bits=4}")
    before, integers = sqnr(name, model), {w.address: w.array() for w in weights(model) if w.quantization}
    known = text(model)
    ctx = run(model, FEEDS, positions=64)
    assert sqnr(name, model) > before + gain
    assert len(ctx.ledger.changes) >= 13
    for change in ctx.ledger.changes:
        assert change.numbers["sqnr_after"] > change.numbers["sqnr_before"]
        assert 0 < change.numbers["moved"] < 0.5
    for weight in weights(model):
        if weight.address in integers:
            old = integers[weight.address]
            assert weight.array().dtype == old.dtype
            assert weight.array().min() >= old.min()
            assert weight.array().max() <= old.max()
    moved = [(a, b) for a, b in zip(known.splitlines(), text(model).splitlines(), strict=True) if a != b]
    assert len(moved) == len(ctx.ledger.changes)  # nothing but the integers


def test_it_is_deterministic_and_the_partner_is_as_good_as_memory() -> None:
    one = quantized("mlp", "quantize-weights{bits=3}")
    other = one.clone()
    run(one, FEEDS)
    run(other, FEEDS, zoo.load("mlp"))
    assert [w.array().tobytes() for w in weights(one)] == [w.array().tobytes() for w in weights(other)]


def test_layers_on_integers() -> None:
    model = quantized("cnn-a", "quantize-static")
    before = sqnr("cnn-a", model)
    assert run(model, FEEDS, positions=64).ledger.changes
    assert sqnr("cnn-a", model) > before


def test_a_weight_of_two_layers_is_rounded_for_both() -> None:
    shared = ir.val("w", const_value=ir.tensor(random(16, 16), name="w"))
    inputs = [ir.val(name, dtype=ir.DataType.FLOAT, shape=ir.Shape([1, 16])) for name in ("a", "b")]
    nodes = [ir.node("MatMul", [x, shared], name=f"of_{x.name}") for x in inputs]
    for node, name in zip(nodes, ("y", "z"), strict=True):
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
    found = [node.outputs[0] for node in nodes]
    graph = ir.Graph(inputs, found, nodes=nodes, initializers=[shared], opset_imports={"": 17}, name="g")
    model = ir.Model(graph, ir_version=8)
    original = model.clone()
    _store(model, 3)
    data = correlated(64, 16, 1)
    feeds = [{"a": row[None], "b": np.roll(row, 3)[None]} for row in data]
    ctx = run(model, feeds, original)
    assert [change.subject for change in ctx.ledger.changes] == ["w"]


def test_what_it_needs_and_leaves() -> None:
    model = quantized("mlp", "quantize-weights{bits=4}")
    with pytest.raises(NeedsData, match=r"needs the float model too.* --with original=MODEL"):
        run(model.clone(), FEEDS)
    with pytest.raises(UsageError, match="damping=2 is out of range"):
        RoundAdaptively(damping=2)
    assert "it contracts 784 inputs, above limit=600" in run(model, FEEDS, limit=600).ledger.reasons()
    ctx = run(model, FEEDS, keep=Selection(("*",)))
    assert ctx.ledger.reasons() == {"kept by request": 4}
    ctx = run(model, FEEDS, zoo.load("cnn-a"))
    assert not ctx.ledger.changes
    assert "the float model has no such layer" in ctx.ledger.reasons()
    other = zoo.load("mlp")
    for weight in weights(other):
        if weight.prunable:
            weight.replace(-weight.array())
    assert "it is not what the float model's weight was rounded to" in run(model, FEEDS, other).ledger.reasons()
