"""Weights of several models in one: methods against numpy, graphs that differ, numbers that cannot be averaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from penjing.cli import cli
from penjing.ir.errors import NeedsData, PenjingError, UsageError
from penjing.ir.storage import BLOCK, StreamedTensor, reader
from penjing.models import zoo
from penjing.passes.base import Context
from penjing.passes.merge import soup as module
from penjing.passes.merge.soup import Soup
from penjing.runtime.report import Report
from penjing.runtime.run import run
from penjing.runtime.session import OrtRunner

Parse = Callable[[str], ir.Model]
Array = np.ndarray[Any, Any]

SHAPES = {"w": (4, 5), "b": (5,), "v": (5, 3)}


def filled(model: ir.Model, seed: int, near: dict[str, Array] | None = None, step: float = 1.0) -> ir.Model:
    """Random numbers in every float initializer that has none; from those of ``near`` not farther than ``step``."""
    draw = np.random.default_rng(seed)
    for name, value in model.graph.initializers.items():
        centre = 0.0 if near is None else near[name]
        array = (centre + step * draw.standard_normal(SHAPES[name])).astype(np.float32)
        value.const_value = ir.Tensor(array, name=name)
    return model


def net(parse: Parse, seed: int, near: dict[str, Array] | None = None, step: float = 1.0) -> ir.Model:
    return filled(parse(_text()), seed, near, step)


def _text() -> str:
    zeros = ", ".join(
        f"float[{','.join(map(str, shape))}] {name} = {{{','.join(['0'] * int(np.prod(shape)))}}}"
        for name, shape in SHAPES.items()
    )
    return (
        f"m (float[N,4] x) => (float[N,3] y) <{zeros}> "
        "{ h = MatMul(x, w) s = Add(h, b) r = Relu(s) y = MatMul(r, v) }"
    )


def held(model: ir.Model) -> dict[str, Array]:
    found = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: tensor.numpy() for name, tensor in found.items() if tensor is not None}


def soup(model: ir.Model, text: str, seed: int = 0, **partners: ir.Model) -> Report:
    return run(model, text, models=partners, seed=seed)


def said(report: Report) -> list[str]:
    ledger = report.passes[-1].ledger
    return [f"{one.subject}: {one.what}" for one in ledger.changes] + [f"{s.subject}: {s.reason}" for s in ledger.skips]


def refused(model: ir.Model, text: str, **partners: ir.Model) -> str:
    with pytest.raises(PenjingError) as error:
        soup(model, text, **partners)
    return str(error.value)


def near(parse: Parse, count: int) -> list[ir.Model]:
    base = net(parse, 0)
    return [base, *(net(parse, seed, held(base), 0.1) for seed in range(1, count))]


# Methods --------------------------------------------------------------------------------------------------------------


def test_uniform_is_the_mean(parse: Parse) -> None:
    models = near(parse, 3)
    wanted = {name: np.mean([held(m)[name].astype(np.float64) for m in models], axis=0) for name in SHAPES}
    report = soup(models[0], "soup{with=(b, c)}", b=models[1], c=models[2])
    for name, array in held(models[0]).items():
        assert np.array_equal(array, wanted[name].astype(np.float32))
    assert report.passes[-1].ledger.warnings == []
    assert "w: uniform of 3" in said(report)


def test_names_and_order_do_not_matter(parse: Parse) -> None:
    one = net(parse, 0)
    other = _text().replace("Add(h, b)", "Add(b, h)").replace("x", "image").replace("N,", "K,")
    renamed = filled(parse(other.replace("MatMulage", "MatMul")), 1, held(one), 0.1)
    for name in list(SHAPES):
        renamed.graph.initializers[name].name = f"layer/{name}"
    soup(one, "soup{with=b}", b=renamed)
    again = near(parse, 2)
    soup(again[0], "soup{with=b}", b=again[1])
    assert all(np.array_equal(held(one)[name], held(again[0])[name]) for name in SHAPES)


def test_weighted(parse: Parse) -> None:
    one, two = near(parse, 2)
    wanted = 0.25 * held(one)["w"].astype(np.float64) + 0.75 * held(two)["w"].astype(np.float64)
    soup(one, "soup{with=b method=weighted weights=(0.25, 0.75)}", b=two)
    assert np.array_equal(held(one)["w"], wanted.astype(np.float32))


def test_slerp_goes_along_the_arc_and_says_where_there_is_none(parse: Parse) -> None:
    one, two = net(parse, 0), net(parse, 1)
    start, end = (held(model)["w"].astype(np.float64) for model in (one, two))
    two.graph.initializers["b"].const_value = ir.Tensor(2 * held(one)["b"])
    straight = 1.5 * held(one)["b"]
    angle = np.arccos((start * end).sum() / np.linalg.norm(start) / np.linalg.norm(end))
    report = soup(one, "soup{with=b method=slerp}", b=two)
    wanted = (start + end) * np.sin(angle / 2) / np.sin(angle)
    assert np.allclose(held(one)["w"], wanted, rtol=1e-6)
    assert np.allclose(held(one)["b"], straight, rtol=1e-6)
    assert any(line.startswith("b: no arc to go along") for line in said(report))


def test_task_arithmetic(parse: Parse) -> None:
    base, one, two = near(parse, 3)
    start, a, b = (held(model)["v"].astype(np.float64) for model in (base, one, two))
    text = "soup{with=b method=task-arithmetic base=base weights=(1, -1) scale=0.5}"
    soup(one, text, b=two, base=base)
    assert np.array_equal(held(one)["v"], (start + 0.5 * (a - start) - 0.5 * (b - start)).astype(np.float32))


def test_ties_against_the_paper(parse: Parse) -> None:
    """Trim over all weights of a model, elect, merge."""
    base, one, two, three = near(parse, 4)
    flat = [np.concatenate([held(m)[n].ravel() for n in SHAPES]).astype(np.float64) for m in (base, one, two, three)]
    changes = np.stack([member - flat[0] for member in flat[1:]])
    kept = int(np.ceil(0.3 * changes.shape[1]))
    for row in changes:
        row[np.argsort(-np.abs(row))[kept:]] = 0
    sign = np.sign(changes.sum(axis=0))
    agree = np.where(np.sign(changes) == sign, changes, 0.0)
    wanted = flat[0] + agree.sum(axis=0) / np.maximum((agree != 0).sum(axis=0), 1)
    soup(one, "soup{with=(b, c) method=ties base=base density=0.3}", b=two, c=three, base=base)
    found = np.concatenate([held(one)[name].ravel() for name in SHAPES])
    assert np.array_equal(found, wanted.astype(np.float32))


def test_dare_drops_by_the_seed_and_scales_up(parse: Parse) -> None:
    found = []
    for seed in (0, 0, 1):
        base, one, two = near(parse, 3)
        change = (held(one)["w"] - held(base)["w"]).astype(np.float64)
        two.graph.initializers["w"].const_value = base.graph.initializers["w"].const_value
        soup(one, "soup{with=b method=dare base=base density=0.25 scale=1}", seed, b=two, base=base)
        found.append(held(one)["w"])
        share = (found[-1] - held(base)["w"]) / change
        assert np.all(np.isclose(share, 0, atol=1e-3) | np.isclose(share, 4, atol=1e-3))
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_large_weights_are_made_when_they_are_read(parse: Parse) -> None:
    """In any parts: what is random does not depend on how a tensor is read."""
    models = []
    for seed in range(3):
        model = parse("m (float[N,600] x) => (float[N,600] y) <float[1] w = {0}> { y = MatMul(x, w) }")
        value = model.graph.initializers["w"]
        array = np.random.default_rng(seed).standard_normal((600, 600)).astype(np.float32)
        value.const_value, value.shape = ir.Tensor(array), ir.Shape((600, 600))
        models.append(model)
    ctx = Context(models={"b": models[1], "base": models[2]}, step="soup")
    Soup(with_=("b",), method="dare", base="base").run(models[0], ctx)
    tensor = models[0].graph.initializers["w"].const_value
    assert isinstance(tensor, StreamedTensor)
    whole = tensor.numpy().ravel()
    part = reader(tensor)(BLOCK - 7, 2 * BLOCK + 9)
    assert np.array_equal(part, whole[BLOCK - 7 : 2 * BLOCK + 9])


def test_greedy_adds_while_the_metric_does_not_fall(parse: Parse) -> None:
    """The metric is the distance to the mean of the first two; the third is far off."""
    models = near(parse, 3)
    feed = {"x": np.ones((1, 4), np.float32)}
    outputs: list[Array] = []

    def metric(session: Any) -> float:
        outputs.append(session.run(None, feed)[0])
        return -float(abs(outputs[-1] - goal).max())

    middle = near(parse, 2)
    soup(middle[0], "soup{with=b}", b=middle[1])
    goal = next(iter(OrtRunner().run(middle[0], [feed])))["y"]
    for value in models[2].graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.Tensor(value.const_value.numpy() + 3)
    report = run(models[0], "soup{with=(b, c) method=greedy}", models={"b": models[1], "c": models[2]}, metric=metric)
    assert all(np.array_equal(held(models[0])[name], held(middle[0])[name]) for name in SHAPES)
    assert any(line.startswith("c: not taken: with it the metric would fall") for line in said(report))
    assert report.metric is not None
    assert report.metric.after == 0


# The proof ------------------------------------------------------------------------------------------------------------


def test_weights_of_the_wrong_place_are_noticed(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two weights of one shape, matched crosswise."""
    text = "m (float[N,2] x) => (float[N,2] y) <float[2,2] w = {K,2,3,4}, float[2,2] v = {4,3,2,K}> "
    nodes = "{ h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"
    one, two = (parse((text + nodes).replace("K", k)) for k in ("1", "2"))
    whole = module.counterparts

    def crossed(first: Any, other: Any) -> dict[ir.Value, ir.Value]:
        pairs = whole(first, other)
        return dict(zip(pairs, reversed(list(pairs.values())), strict=True))

    soup(one.clone(), "soup{with=b}", b=two)
    monkeypatch.setattr(module, "counterparts", crossed)
    message = refused(one, "soup{with=b}", b=two)
    assert "with the weights of b in what was taken for their places, 'y' is not what b has" in message


@pytest.mark.parametrize("method", ["uniform", "greedy", "slerp", "ties base=base"])
def test_a_number_that_is_off_is_noticed(parse: Parse, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    right = module.mixed

    def wrong(place: Any, mix: Any) -> ir.TensorProtocol:
        array = right(place, mix).numpy().copy()
        array.flat[-1] = np.nextafter(array.flat[-1], np.float32(9))
        return ir.Tensor(array, name=place.name)

    monkeypatch.setattr(module, "mixed", wrong)
    one, two, base = near(parse, 3)
    with pytest.raises(PenjingError, match="broke its promise"):
        run(one, f"soup{{with=b method={method}}}", models={"b": two, "base": base}, metric=lambda session: 0.0)


def test_the_proof_takes_weights_that_a_caller_may_set_and_a_batch_that_is_fixed(parse: Parse) -> None:
    """Such weights are not packed for their kernels, which moves last bits; feeds are cut to what a member takes."""
    one, two = near(parse, 2)
    wide = [np.random.default_rng(seed).standard_normal((64, 200)).astype(np.float32) for seed in range(2)]
    text = "m (float[N,64] x) => (float[N,200] y) <float[1] w = {0}> { y = MatMul(x, w) }"
    models = [parse(text), parse(text.replace("float[N,", "float[1,"))]
    for model, array in zip(models, wide, strict=True):
        value = model.graph.initializers["w"]
        value.const_value, value.shape = ir.Tensor(array, name="w"), ir.Shape(array.shape)
    models[1].graph.inputs.append(models[1].graph.initializers["w"])
    report = soup(models[0], "soup{with=b}", b=models[1])
    assert report.check.segments[-1]["breaches"] == []
    assert report.check.beside == "soup"
    soup(one, "soup{with=b}", b=two)


def test_passes_before_it_may_make_the_graphs_equal(parse: Parse) -> None:
    one, two = near(parse, 2)
    text = _text().replace("r = Relu(s)", "i = Identity(s) r = Relu(i)")
    longer = parse(text)
    for name, array in held(one).items():
        longer.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    report = run(longer, "clean,soup{with=b}", models={"b": two})
    assert report.check.comparison is not None
    assert report.check.comparison.max_error == 0


def test_the_metric_of_a_model_is_taken_once(parse: Parse) -> None:
    """The proof of a greedy soup chooses once more, at no cost."""
    models, calls = near(parse, 3), []

    def metric(session: Any) -> float:
        calls.append(session)
        return float(len(calls))

    report = run(models[0], "soup{with=(b, c) method=greedy}", models={"b": models[1], "c": models[2]}, metric=metric)
    assert len(calls) == 5  # three members, two trials
    assert report.check.comparison is not None
    assert report.check.comparison.max_error == 0


# Bundled models -------------------------------------------------------------------------------------------------------


def test_checkpoints_of_one_run_are_better_than_the_worst() -> None:
    model = zoo.load("cnn-run-1")
    partners = {"b": zoo.load("cnn-run-2"), "c": zoo.load("cnn-run-3")}
    report = run(model, "soup{with=(b, c)}", models=partners, metric=zoo.accuracy)
    assert report.metric is not None
    assert report.metric.after is not None
    assert report.metric.after >= 0.989
    assert report.passes[-1].ledger.warnings == []


def test_two_seeds_are_far_apart() -> None:
    report = run(zoo.load("cnn-a"), "soup{with=b}", models={"b": zoo.load("cnn-b")}, metric=zoo.accuracy)
    far, poor = report.passes[-1].ledger.warnings
    assert "The members model and b are far apart: the cosine of their weights is" in far
    assert "is below that of its worst member, 0.994" in poor


def test_one_model_twice_is_itself() -> None:
    model, before = zoo.load("cnn-a-legacy"), zoo.load("cnn-a-legacy")
    report = soup(model, "soup{with=b}", b=zoo.load("cnn-a-legacy"))
    assert "b: the same model as model" in said(report)
    assert all(np.array_equal(array, held(before)[name]) for name, array in held(model).items())


# BatchNormalization ---------------------------------------------------------------------------------------------------


def test_statistics_are_estimated_anew_one_after_the_other(parse: Parse) -> None:
    text = """m (float[N,2] x) => (float[N,2] y) <float[2] s = {1,2}, float[2] o = {0,1}, float[2] m1 = {0,0},
     float[2] v1 = {1,1}, float[2] m2 = {0,0}, float[2] v2 = {1,1}, float[2,2] w = {K,2,3,1}>
     { h = MatMul(x, w) n = BatchNormalization(h, s, o, m1, v1) r = Relu(n)
       y = BatchNormalization(r, s, o, m2, v2) }"""
    one, two = parse(text.replace("K", "1")), parse(text.replace("K", "2"))
    feed = np.random.default_rng(0).standard_normal((64, 2)).astype(np.float32)
    report = run(one, "soup{with=b}", models={"b": two}, data=[{"x": feed}])
    hidden = feed.astype(np.float64) @ np.array([[1.5, 2], [3, 1]])
    found = held(one)
    assert np.allclose(found["m1"], hidden.mean(axis=0), atol=1e-5)
    assert np.allclose(found["v1"], hidden.var(axis=0), rtol=1e-4)
    relu = np.maximum((hidden - hidden.mean(axis=0)) / np.sqrt(hidden.var(axis=0) + 1e-5) * [1, 2] + [0, 1], 0)
    assert np.allclose(found["m2"], relu.mean(axis=0), atol=1e-4)
    assert np.allclose(found["v2"], relu.var(axis=0), rtol=1e-3)
    assert sum("estimated anew" in line for line in said(report)) == 2


# Structure ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("Relu(s)", "Tanh(s)", "operator: Relu 'r' in model, and Tanh 'r' in b"),
        ("Relu(s)", "LeakyRelu(s)", "operator: Relu 'r' in model, and LeakyRelu 'r' in b"),
        ("MatMul(r, v)", "MatMul(s, v)", "operator: Relu 'r' in model, and Add 's' in b"),
        (
            "float[5] b = {0,0,0,0,0}",
            "float[1] b = {0}",
            "shape: Add 's' reads 'b' float32 [5] in model, and 'b' float",
        ),
        ("float[N,4] x", "float[7,4] x, float[2] u", "the number of inputs: 1 in model, and 2 in b"),
    ],
)
def test_the_first_difference_names_both_sides(parse: Parse, old: str, new: str, words: str) -> None:
    assert old in _text()
    message = refused(parse(_text()), "soup{with=b}", b=parse(_text().replace(old, new)))
    assert "soup needs models of one architecture, and b is not built as model is: " in message
    assert words in message


def test_what_reads_what(parse: Parse) -> None:
    text = "m (float[2] x) => (float[2] y) <float[2] w = {1,K}> { h = Mul(x, w) r = Relu(h) y = Sub(h, r) }"
    other = parse(text.replace("K", "3").replace("Sub(h, r)", "Sub(r, r)"))
    message = refused(parse(text.replace("K", "2")), "soup{with=b}", b=other)
    assert "connection: Sub 'y' reads 'h', made by Mul 'h' in model, and in b 'r', made by Relu 'r'" in message
    text = "m (float[2] x) => (float[1] y) <float[1] w = {K}> { a, b = Split(x) y = Mul(ONE, w) }"
    one, two = (parse(text.replace("K", k).replace("ONE", part)) for k, part in (("1", "a"), ("2", "b")))
    assert "connection: Mul 'y' reads 'a', made by Split 'a' in model, and in b 'b'" in refused(
        one, "soup{with=b}", b=two
    )


def test_sums_may_be_written_the_other_way_round(parse: Parse) -> None:
    text = (
        "m (float[2] x) => (float[2] y) <float[2] w = {1,K}> { h = Mul(x, w) r = Relu(h) t = Tanh(h) y = Add(ORDER) }"
    )
    one, two = (parse(text.replace("K", k).replace("ORDER", order)) for k, order in (("1", "r, t"), ("3", "t, r")))
    soup(one, "soup{with=b}", b=two)
    assert held(one)["w"].tolist() == [1, 2]


def test_attributes_and_their_defaults(parse: Parse) -> None:
    text = "m (float[N,4] x) => (float[N,4] y) <float[4] w = {K,1,1,1}> { h = Add(x, w) y = Softmax<axis = -1>(h) }"
    plain = parse(text.replace("K", "3").replace("<axis = -1>", ""))
    soup(model := parse(text.replace("K", "1")), "soup{with=b}", b=plain)
    assert held(model)["w"].tolist() == [2, 1, 1, 1]
    other = parse(text.replace("K", "3").replace("-1", "0"))
    assert "attribute: axis of Softmax 'y' is -1 in model, and 0 in b" in refused(model, "soup{with=b}", b=other)


def test_bodies_and_functions(parse: Parse) -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "own": 1]>
    m (float[N,2] x, bool c) => (float[N,2] y) <float[2] w = {K,1}> { h = own.Twice(x)
     y = If (c) <then_branch = t () => (float[N,2] a) { a = Add(h, w) },
                 else_branch = e () => (float[N,2] b) <float[2] v = {K,3}> { b = Mul(h, v) }> }
    <domain: "own", opset_import: ["": 17]> Twice (a) => (b) { k = Constant<value = float[1] {K}>() b = Mul(a, k) }"""
    model = parse(text.replace("K", "1"))
    soup(model, "soup{with=b}", b=parse(text.replace("K", "2")))
    body = next(node for node in model.graph if node.op_type == "If").attributes["else_branch"].as_graph()
    inner = body.initializers["v"].const_value
    assert inner is not None
    assert inner.numpy().tolist() == [1.5, 3]
    assert held(model)["w"].tolist() == [1.5, 1]
    function = next(iter(model.functions.values()))
    assert function.graph[0].attributes["value"].as_tensor().numpy().tolist() == [1.5]
    unlike = parse(text.replace("K", "2").replace("Add(h", "Sub(h"))
    assert "operator: Add 'a' in model, and Sub 'a' in b" in refused(model, "soup{with=b}", b=unlike)


def test_one_weight_for_two_that_differ_is_refused(parse: Parse) -> None:
    tied = parse("m (float[2] x) => (float[2] y) <float[2] w = {1,2}> { h = Mul(x, w) y = Add(h, w) }")
    free = "m (float[2] x) => (float[2] y) <float[2] w = {1,2}, float[2] u = {1,K}> { h = Mul(x, w) y = Add(h, u) }"
    assert "one constant, 'w', stands in model where 'u' and 'w', which are not equal" in refused(
        tied, "soup{with=b}", b=parse(free.replace("K", "3"))
    )
    soup(tied, "soup{with=b}", b=parse(free.replace("K", "2")))


def test_versions_are_raised_to_one(parse: Parse) -> None:
    text = "m (float[N,2] x) => (float[N,2] y) <float[2] w = {K,1}> { y = Add(x, w) }"
    header = '<ir_version: 9, opset_import: ["": 20]>\n'
    report = soup(model := parse(text.replace("K", "1")), "soup{with=b}", b=parse(header + text.replace("K", "2")))
    assert held(model)["w"].tolist() == [1.5, 1]
    assert "model: raised from opset 17 to 20" in said(report)


# What cannot be averaged, and options ---------------------------------------------------------------------------------


def test_quantized_and_integer_constants_are_refused(parse: Parse) -> None:
    text = """m (float[N,2] x) => (float[N,2] y) <int8[2,2] q = {K,2,3,4}, float s = {0.5}>
     { w = DequantizeLinear(q, s) y = MatMul(x, w) }"""
    message = refused(parse(text.replace("K", "1")), "soup{with=b}", b=parse(text.replace("K", "2")))
    assert "soup averages floats, and DequantizeLinear 'w' reads quantized numbers that differ" in message
    assert "dequantize" in message
    shape = "m (float[N,2] x) => (float[?,?] y) <int64[2] s = {K,2}> { y = Reshape(x, s) }"
    assert "they differ, and only floats are averaged" in refused(
        parse(shape.replace("K", "-1")), "soup{with=b}", b=parse(shape.replace("K", "1"))
    )


def test_numbers_that_are_none(parse: Parse) -> None:
    one, two = near(parse, 2)
    broken = held(two)["w"].copy()
    broken[0, 0] = np.nan
    two.graph.initializers["w"].const_value = ir.Tensor(broken)
    assert "it holds NaN or infinity in b" in refused(one, "soup{with=b}", b=two)


def test_masks_that_are_equal_stay(parse: Parse) -> None:
    text = "m (float[2] x) => (float[2] y) <float[2] w = {K,1}, float[2] m = {0,0}> { h = Mul(x, w) y = Add(h, m) }"
    one, two = parse(text.replace("K", "1")), parse(text.replace("K", "2"))
    for model in (one, two):
        model.graph.initializers["m"].const_value = ir.Tensor(np.array([0, -np.inf], np.float32))
    report = soup(one, "soup{with=b}", b=two)
    assert held(one)["m"].tolist() == [0, -np.inf]
    assert "constants: 1 of floats are equal in all models, and stay" in said(report)


def test_half_precision_is_rounded_once_and_may_overflow(parse: Parse) -> None:
    text = "m (float16[2] x) => (float16[2] y) <float16[2] w = {0,0}> { y = Mul(x, w) }"
    models = [parse(text) for _ in range(3)]
    for model, number in zip(models, (60000, 60000, -60000), strict=True):
        model.graph.initializers["w"].const_value = ir.Tensor(np.array([number, 1], np.float16))
    soup(models[0], "soup{with=b}", b=models[2])
    assert held(models[0])["w"].tolist() == [0, 1]
    text = "soup{with=b method=task-arithmetic base=base scale=1}"
    assert "does not fit into float16" in refused(models[1], text, b=models[1].clone(), base=models[2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("with=(b, c) method=weighted", "method=weighted needs weights, 3 that sum to one"),
        ("with=b method=weighted weights=(0.5, 0.6)", "the weights sum to 1.1; they have to sum to 1"),
        ("with=b method=weighted weights=(1.5, -0.5)", "the weight -0.5 is negative"),
        ("with=b method=weighted weights=1", "2 models take 2 weights, the model's own first; given: 1"),
        ("with=b method=weighted weights=(nan, 1)", "is not valid"),
        ("with=b weights=(0.5, 0.5)", "method=uniform takes no weights"),
        ("with=(b, c) method=slerp", "goes from one model to one other, and 2 partners are named"),
        ("with=b method=ties", "add base=NAME"),
        ("with=b base=c", "base is for method=task-arithmetic or ties or dare"),
        ("with=b method=ties base=c density=0", "density=0 is not a share"),
        ("with=b method=ties base=bas", "no partner is called 'bas'"),
        ("with=bb", "no partner is called 'bb'. Did you mean 'b'?"),
        ("method=uniform", "soup merges the model with others"),
    ],
)
def test_bad_options(parse: Parse, options: str, words: str) -> None:
    models = near(parse, 3)
    with pytest.raises(UsageError) as error:
        soup(models[0], f"soup{{{options}}}", b=models[1], c=models[2])
    assert words in str(error.value)


@pytest.mark.parametrize("kind", ["bfloat16", "float8e4m3fn", "double"])
def test_other_floats(parse: Parse, kind: str) -> None:
    text = f"m (float[2] x) => (float[2] y) <{kind}[2] w = {{1,1}}> {{ c = Cast<to = 1>(w) y = Mul(x, c) }}"
    header = '<ir_version: 9, opset_import: ["": 19]>'
    models = []
    for number in (1.0, 2.0):
        model = parse(header + text)
        dtype = ir.DataType[{"bfloat16": "BFLOAT16", "float8e4m3fn": "FLOAT8E4M3FN", "double": "DOUBLE"}[kind]]
        array = np.array([number, 4], np.float64).astype(dtype.numpy())
        model.graph.initializers["w"].const_value = ir.Tensor(array, dtype=dtype)
        models.append(model)
    soup(models[0], "soup{with=b}", b=models[1])
    assert held(models[0])["w"].astype(np.float64).tolist() == [1.5, 4]


def test_greedy_needs_a_metric_and_a_metric_may_fail(parse: Parse) -> None:
    one, two = near(parse, 2)
    with pytest.raises(NeedsData, match="soup needs --metric"):
        soup(one, "soup{with=b method=greedy}", b=two)

    def metric(session: Any) -> float:
        raise ValueError("no labels")

    with pytest.raises(UsageError, match="raised ValueError: no labels"):
        run(one, "soup{with=b method=greedy}", models={"b": two}, metric=metric)


def test_the_command(tmp_path: Path) -> None:
    paths = [str(zoo.path(f"cnn-run-{number}")) for number in (1, 3, 2)]
    out = tmp_path / "soup.onnx"
    arguments = ["soup", *paths[:2], "--base", paths[2], "--method", "ties", "--density", "0.5", "--check", "off"]
    done = CliRunner().invoke(cli, [*arguments, "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "26 × ties of 2" in done.output
    assert out.exists()
    done = CliRunner().invoke(cli, ["soup", *paths[:2], "--method", "weighted", "--weights", "1,x", "-o", f"{out}2"])
    assert done.exit_code != 0
