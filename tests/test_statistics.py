"""The calibration engine: what it finds, that it does not matter how samples come, and what it refuses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.ir.errors import BadFeeds, UsageError
from penjing.ir.text import text
from penjing.models import zoo
from penjing.passes.points import (
    Channels,
    Distribution,
    Histogram,
    Mean,
    Point,
    Range,
    Shape,
    Unanswered,
    Unfit,
    finest_exponent,
)
from penjing.runtime import statistics, watch
from penjing.runtime.progress import Progress
from penjing.runtime.rows import rows_stay_apart
from penjing.runtime.session import OrtRunner
from penjing.runtime.statistics import collect

Parse = Callable[[str], ir.Model]
RANDOM = np.random.default_rng(0)
NET = """n (float[batch,3,8,8] x, float[4,3,3,3] w, float[4,256] v) => (float[batch,4] y) {
    c = Conv<pads=[1,1,1,1]>(x, w)
    r = Relu(c)
    f = Flatten(r)
    y = Gemm<transB=1>(f, v)
}"""


def fill(model: ir.Model, **shapes: tuple[int, ...]) -> ir.Model:
    """Random weights, in place of inputs of these names."""
    random = np.random.default_rng(1)
    for value in [value for value in model.graph.inputs if value.name in shapes]:
        model.graph.inputs.remove(value)
        array = random.standard_normal(shapes[value.name or ""]).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    return model


@pytest.fixture
def net(parse: Parse) -> ir.Model:
    return fill(parse(NET), w=(4, 3, 3, 3), v=(4, 256))


def rows(array: np.ndarray, sizes: list[int]) -> list[dict[str, np.ndarray]]:
    return [{"x": part} for part in np.split(array, np.cumsum(sizes)[:-1])]


def histogram(array: np.ndarray, bins: int = 8192) -> Distribution:
    found = Histogram("x", bins).start()
    found.update(array)
    return found


# The statistics -----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20), max_size=6), st.data()
)
@settings(max_examples=200, deadline=None)
def test_histograms_are_equal_for_every_split_and_order(parts: list[list[float]], data: Any) -> None:
    arrays = [np.array(part, np.float32) for part in parts]
    whole = histogram(np.concatenate([*arrays, np.zeros(0, np.float32)]), 64)
    shuffled = data.draw(st.permutations(arrays))
    one_by_one, merged = Histogram("x", 64).start(), Histogram("x", 64).start()
    for array in shuffled:
        one_by_one.update(array)
        merged.merge(histogram(array, 64))
    assert one_by_one == whole == merged


def test_a_histogram_counts_what_lies_between_its_edges() -> None:
    for scale, shift in itertools.product((1e-30, 1.0, 1e30), (0.0, 3.0)):
        x = ((RANDOM.standard_normal(5000) + shift) * scale).astype(np.float32)
        found = histogram(x, 256)
        edges = found.edges()
        assert len(found.counts) <= 256
        assert len(edges) == len(found.counts) + 1
        assert (found.low, found.high, found.seen) == (x.min(), x.max(), 5000)
        assert np.abs(np.histogram(x, edges)[0] - found.counts).max() <= 1  # those on an edge
        assert (np.diff(edges)[1:-1] <= 2 * 2.0**found.exponent).all()
        extent = max(found.high, 0) - min(found.low, 0)
        assert extent / 256 <= 2.0**found.exponent <= 4 * extent / 256


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_clipping_a_histogram_is_the_histogram_of_what_was_clipped(dtype: Any) -> None:
    x = RANDOM.standard_normal((7, 500)).astype(dtype)
    for low, high in [(0, np.inf), (0, 1.25), (-0.25, 0.25), (5, 6)]:
        clipped, expected = histogram(x).clipped(low, high), histogram(np.clip(x, low, high).astype(dtype))
        assert clipped.coarse(256) == expected.coarse(256)


def test_histograms_take_extremes_of_floats() -> None:
    x = np.array([3e38, -3e38, 1e-45, 0, -0.0], np.float32)
    assert histogram(x).counts.sum() == 5
    assert histogram(np.array([1e300, -1.0])).counts.sum() == 2
    zeros = histogram(np.zeros(9, np.float32))
    assert (zeros.low, zeros.high, zeros.counts.tolist()) == (0, 0, [9])
    assert Histogram("x").start().seen == 0
    assert histogram(np.zeros((0, 3), np.float32)) == Histogram("x").start()
    assert finest_exponent(0, 1, 2048) == -10  # one bin of 2^-11 too few for the 1 itself
    with pytest.raises(Unfit, match="holds NaN"):
        histogram(np.array([1, np.nan], np.float32))
    with pytest.raises(Unfit, match="is int64, and only floats have a range"):
        histogram(np.array([1]))


def test_extremes_of_many_elements_are_exact_and_miss_no_nan() -> None:
    x = RANDOM.standard_normal((3, 200_001)).astype(np.float32)
    found = Range("x").start()
    found.update(x.T)  # in no order of memory
    found.update(np.float16(0.5) * np.ones((), np.float16))
    assert (found.low, found.high, found.seen) == (x.min(), x.max(), x.size + 1)
    for place, number in itertools.product((0, 300_000, x.size - 1), (np.nan, np.inf, -np.inf)):
        bad = x.copy()
        bad.reshape(-1)[place] = number
        with pytest.raises(Unfit, match="holds NaN" if np.isnan(number) else "holds infinity"):
            found.update(bad)
    assert (found.low, found.high, found.seen) == (x.min(), x.max(), x.size + 1)


def test_channels_and_means_are_those_of_all_samples() -> None:
    x = (1e3 * RANDOM.standard_normal((12, 5, 6))).astype(np.float32)
    channels, mean = Channels("x", axis=-1).start(), Mean("x", axis=-1).start()
    for part in np.split(x, [1, 2, 7]):
        channels.update(part)
        mean.update(part)
    assert np.array_equal(channels.low, x.min((0, 1)))
    assert np.array_equal(channels.absmax, np.abs(x).max((0, 1)))
    exact = [math.fsum(column.astype(float)) / 60 for column in x.reshape(60, 6).T]
    assert np.allclose(mean.mean, exact, rtol=1e-14, atol=0)
    with pytest.raises(Unfit, match="has 6 channels along axis -1 in one run, and 4 in another"):
        channels.update(x[:, :, :4])
    with pytest.raises(Unfit, match="has 1 dimensions, and so no axis 3"):
        Mean("x", axis=3).start().update(x[0, 0])


# The sweep ----------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_numpy(net: ir.Model) -> None:
    x = RANDOM.standard_normal((21, 3, 8, 8)).astype(np.float32)
    values = ["x", "c", "r", "f", "y"]
    seen = {name: [] for name in values}
    for run in OrtRunner().run(net, rows(x, [1] * 21), values):
        for name in values:
            seen[name].append(run[name])
    points: list[Point] = [kind(name) for kind in (Range, Histogram, Channels, Mean, Shape) for name in values]
    found = collect(net, points, rows(x, [1] * 21))
    assert list(found) == points
    for name in values:
        array = np.concatenate(seen[name])
        assert np.isclose([found[Range(name)].low, found[Range(name)].high], [array.min(), array.max()]).all()
        assert (
            found[Range(name)].seen == found[Histogram(name)].seen == found[Histogram(name)].counts.sum() == array.size
        )
        assert np.allclose(found[Channels(name)].high, array.max(tuple({*range(array.ndim)} - {1})), rtol=1e-5)
        assert np.allclose(found[Mean(name)].mean, array.mean(tuple({*range(array.ndim)} - {1})), atol=1e-5)
        assert found[Shape(name)].largest == found[Shape(name)].fullest == (1, *array.shape[1:])
        assert found[Shape(name)].seen == 21


def test_neither_grouping_nor_order_matters(net: ir.Model) -> None:
    x = RANDOM.standard_normal((24, 3, 8, 8)).astype(np.float32)
    points: list[Point] = [kind(name) for kind in (Range, Histogram, Shape) for name in ("c", "r", "f")]
    expected = collect(net, points, rows(x, [24]))
    for sizes in ([1] * 24, [8] * 3, [5, 1, 18]):
        assert collect(net, points, rows(x, sizes)) == expected
    assert collect(net, points, rows(x[::-1], [6] * 4)) == expected


def test_the_model_stays_as_it_is_and_its_weights_are_shared(net: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    before = text(net)
    opened = []
    monkeypatch.setattr(statistics, "open_session", lambda model, **_: opened.append(model) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect(net, [Range("c"), Histogram("y")], [])
    assert text(net) == before
    for name, value in net.graph.initializers.items():
        assert opened[0].graph.initializers[name].const_value is value.const_value


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    runs: list[int] = []
    real = statistics.run_feed

    def counting(session: Any, feed: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
        runs.append(len(next(iter(feed.values()))))
        return real(session, feed, *arguments, **options)

    monkeypatch.setattr(statistics, "run_feed", counting)
    return runs


def test_samples_run_in_batches_of_up_to_eight(net: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_runs(monkeypatch)
    x = RANDOM.standard_normal((20, 3, 8, 8)).astype(np.float32)
    collect(net, [Histogram("c")], rows(x, [1] * 20))
    assert runs == [1, 8, 8, 3]  # the first by itself, to see how large it is
    runs.clear()
    monkeypatch.setattr(statistics, "FETCHED", 3 * 4 * 8 * 8 * 4)  # bytes of c for 3 samples
    collect(net, [Histogram("c")], rows(x, [20]))
    assert max(runs) == 3


def test_a_sample_is_run_twice_where_operators_do_not_tell(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_runs(monkeypatch)
    summed = parse("g (float[n,3] x) => (float[n,3] y) <int64[1] one = {1}> { s = Sin(x)  y = CumSum(s, one) }")
    found = collect(summed, [Range("s")], rows(RANDOM.standard_normal((20, 3)).astype(np.float32), [20]))
    assert runs == [1, 8, 8, 4]
    assert found[Range("s")].high <= 1


@pytest.mark.parametrize(
    ("nodes", "apart"),
    [
        ("y = Gemm(x, w)", True),
        ("y = Gemm<transA=1>(x, w)", False),
        ("y = Gemm(x, w, row)", True),
        ("y = Gemm(x, w, w)", False),
        ("y = Gemm(w, x)", False),
        ("h = MatMul(x, w)  y = Add(h, row)", True),
        ("h = MatMul(x, w)  y = Add(h, w)", False),
        ("y = Add(x, cube)", False),
        ("h = Relu(x)  y = Mul(h, x)", True),
        ("y = MatMul(x, x)", False),
        ("y = Softmax(x)", True),
        ("y = Softmax<axis=-2>(x)", False),
        ("y = Concat<axis=1>(x, x)", True),
        ("y = Concat<axis=0>(x, x)", False),
        ("y = Concat<axis=1>(x, w)", False),
        ("y = Transpose<perm=[1,0]>(x)", False),
        ("y = ReduceMean<keepdims=0>(x, last)", True),
        ("y = ReduceMean(x, first)", False),
        ("y = ReduceMean(x)", False),
        ("y = Reshape(x, kept)", True),
        ("y = Reshape(x, pairs)", False),
        ("y = Reshape(x, same)", True),
        ("y = Reshape(x, flat)", False),
        ("y = Flatten<axis=0>(x)", False),
        ("y = LayerNormalization(x, row)", True),
        ("y = LayerNormalization<axis=0>(x, row)", False),
        ("r = RandomNormalLike(x)  y = Add(x, r)", False),
        ("y = CumSum(x, first)", False),
        ("h = CastLike(w, x)  y = Add(h, x)", False),
        ("h = CastLike(x, w)  y = Add(h, x)", True),
        ("y = Identity(w)", False),
    ],
)
def test_which_operators_keep_samples_apart(parse: Parse, nodes: str, apart: bool) -> None:
    """What is told is true: rows of samples that run together are those of each alone."""
    constants = """<float[4,4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}, float[4] row = {1,2,3,4}, int64[1] first = {0},
     float[1,4,4] cube = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}, int64[1] last = {1}, int64[3] kept = {0,2,2},
     int64[2] pairs = {-1,2}, int64[3] same = {-1,1,4}, int64[1] flat = {-1}>"""
    model = parse(f'<ir_version: 8, opset_import: ["": 18]> m (float[n,4] x) => (float y) {constants} {{ {nodes} }}')
    model.graph.outputs[0].shape = None
    assert rows_stay_apart(model, {"x"}) is apart
    if apart:
        x = RANDOM.standard_normal((4, 4)).astype(np.float32)
        together, *alone = (
            found["y"] for found in OrtRunner().run(model, [{"x": x}, *({"x": row[None]} for row in x)])
        )
        assert np.allclose(together, np.concatenate(alone), rtol=1e-5, atol=1e-6)


def test_a_shape_in_an_attribute_tells_nothing(parse: Parse) -> None:
    text = (
        '<ir_version: 3, opset_import: ["": 4]> m (float[n,4] x) => (float[n,2,2] y) { y = Reshape<shape=[-1,2,2]>(x) }'
    )
    assert not rows_stay_apart(parse(text), {"x"})


@pytest.mark.parametrize("name", ["mlp", "cnn-a", "cnn-a-legacy", "teacher"])
def test_bundled_networks_keep_samples_apart(name: str) -> None:
    assert rows_stay_apart(zoo.load(name), {"image"})


def test_what_mixes_samples_runs_as_it_comes(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_runs(monkeypatch)
    softmax = parse("g (float[n,2] x) => (float[n,2] y) { s = Softmax<axis=0>(x)  y = Neg(s) }")
    feeds = [{"x": RANDOM.standard_normal((4, 2)).astype(np.float32)} for _ in range(3)]
    found = collect(softmax, [Range("s"), Shape("s")], feeds)
    assert runs[-3:] == [4, 4, 4]
    assert found[Shape("s")].largest == (4, 2)
    exact = [np.exp(f["x"]) / np.exp(f["x"]).sum(0) for f in feeds]
    assert math.isclose(found[Range("s")].high, np.max(exact), rel_tol=1e-5)
    runs.clear()
    time = parse(
        "g (float[t,1,2] x, float[1,8,2] w, float[1,8,2] r) => (float[t,1,1,2] y) { y = LSTM<hidden_size=2>(x, w, r) }"
    )
    fill(time, w=(1, 8, 2), r=(1, 8, 2))
    sequences = [{"x": RANDOM.standard_normal((5, 1, 2)).astype(np.float32)} for _ in range(2)]
    found = collect(time, [Histogram("y")], sequences)
    assert runs[-2:] == [5, 5]
    [*outputs] = OrtRunner().run(time, sequences)
    assert found[Histogram("y")].high == max(output["y"].max() for output in outputs)


def test_an_open_batch_that_is_none_runs_as_it_comes(parse: Parse) -> None:
    model = parse("""g (float[n,4] x) => (float[n,4] y) {
        s = Constant<value = int64[2] {2,2}>()  q = Reshape(x, s)  t = Shape(x)  y = Reshape(q, t) }""")
    found = collect(model, [Range("q")], [{"x": np.full((1, 4), k, np.float32)} for k in range(9)])
    assert (found[Range("q")].high, found[Range("q")].seen) == (8, 36)


def test_feeds_of_unlike_shapes_and_several_inputs(parse: Parse) -> None:
    model = parse("g (float[n,k] x, float[n,k] z) => (float[n,k] y) { s = Add(x, z)  y = Relu(s) }")
    feeds = [{"x": np.full((1, k), -k, np.float32), "z": np.zeros((1, k), np.float32)} for k in (3, 3, 5, 1, 1, 9)]
    found = collect(model, [Range("s"), Histogram("y"), Shape("s")], feeds)
    assert (found[Range("s")].low, found[Range("s")].high, found[Range("s")].seen) == (-9, -1, 22)
    assert (found[Histogram("y")].low, found[Histogram("y")].high) == (0, 0)
    assert found[Shape("s")].largest == (1, 9)
    fixed = parse("g (float[2,2] x) => (float[2,2] y) { y = Neg(x) }")
    assert collect(fixed, [Range("y")], [{"x": np.ones((2, 2), np.float32)}])[Range("y")].low == -1


def test_a_clip_or_reshape_is_not_looked_at_where_what_it_takes_is(net: ir.Model) -> None:
    sweep = statistics._Sweep(net, [Histogram(name) for name in "crf"], 1)
    assert list(sweep.roots) == [Histogram("c")]
    sweep = statistics._Sweep(net, [Histogram("f"), Range("c"), Channels("r")], 1)
    assert len(sweep.roots) == 3


def test_only_in_bodies_are_extremes_found_inside_the_graph(parse: Parse, net: ir.Model) -> None:
    nodes = [node.op_type for node in statistics._Sweep(net, [Range("c"), Range("y")], 1).watched.model.graph]
    assert not any(op_type.startswith("Reduce") for op_type in nodes)
    branches = named(parse(BRANCHES), "if")
    watched = statistics._Sweep(branches, [Range("if/then/th")], 1).watched.model
    reduced = [node.op_type for node in watched.graph.all_nodes() if node.op_type.startswith("Reduce")]
    assert reduced == ["ReduceMin", "ReduceMax", "ReduceSum"]


def test_what_convolutions_make_comes_out_with_the_channels_last_where_places_do_not_matter(
    net: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_BLOCKS", True)
    x = RANDOM.standard_normal((5, 3, 8, 8)).astype(np.float32)
    asked: list[Point] = [Range("c"), Histogram("c"), Channels("r"), Histogram("y")]
    watched = statistics._Sweep(net, asked, 1).watched.model
    assert [node.op_type for node in watched.graph][len(net.graph) :] == ["Transpose"]
    turned = collect(net, asked, rows(x, [5]))
    in_order = collect(net, [*asked, Channels("c")], rows(x, [5]))
    assert all(turned[point] == in_order[point] for point in (Range("c"), Histogram("c"), Histogram("y")))
    sweep = statistics._Sweep(net, [*asked, Channels("c")], 1)
    assert len(sweep.watched.model.graph) == len(net.graph)
    monkeypatch.setattr(watch, "_BLOCKS", False)
    assert collect(net, asked, rows(x, [5]))[Histogram("c")] == turned[Histogram("c")]
    x[3, 0, 2, 2] = np.nan
    with pytest.raises(Unanswered, match=r"The value 'c' holds NaN in sample 3"):
        collect(net, [Range("c")], rows(x, [5]))
    monkeypatch.setattr(watch, "_BLOCKS", True)
    with pytest.raises(Unanswered, match=r"The value 'c' holds NaN in sample 3"):
        collect(net, [Range("c")], rows(x, [5]))


@dataclass
class Total:
    """A statistic of somebody else's."""

    arrays: list[tuple[int, ...]] = field(default_factory=list)

    def update(self, array: np.ndarray) -> None:
        self.arrays.append(array.shape)

    def merge(self, other: Total) -> None:
        self.arrays += other.arrays


@dataclass(frozen=True)
class Own(Point):
    def start(self) -> Total:
        return Total()


def test_any_point_gets_the_array_of_each_run(net: ir.Model) -> None:
    x = np.ones((3, 3, 8, 8), np.float32)
    found = collect(net, [Own("y"), Own("x")], rows(x, [3]))
    assert found[Own("y")].arrays == [(1, 4), (2, 4)]
    assert found[Own("x")].arrays == [(1, 3, 8, 8), (2, 3, 8, 8)]


def test_progress_counts_the_feeds(net: ir.Model) -> None:
    class Heard(Progress):
        said: list[object] = []

        def say(self, words: str) -> None:
            self.said.append(words)

        def count(self, done: int, total: int | None) -> None:
            self.said.append(done)

    runner = OrtRunner(progress=Heard())
    runner.statistics(net, [Range("y")], rows(np.ones((3, 3, 8, 8), np.float32), [1, 2]))
    assert Heard.said == ["calibrating", 1, 2]


# Bodies -------------------------------------------------------------------------------------------------------------

BRANCHES = """g (bool c, float[n,2] x) => (float[n,2] y) {
    y = If(c) <then_branch = t () => (float[n,2] ty) { th = Add(x, x)  ty = Relu(th) },
               else_branch = e () => (float[n,2] ey) { eh = Neg(x)  ey = Relu(eh) }>
}"""
LOOP = """g (int64 m, bool c, float[n,2] x) => (float[n,2] y) {
    y = Loop(m, c, x) <body = b (int64 i, bool go, float[n,2] a) => (bool on, float[n,2] d) {
        on = Identity(go)  h = Add(a, x)  half = Cast<to=10>(h)  d = Identity(h) }>
}"""
SCAN = """g (float[2] s, float[k,2] x) => (float[2] y, float[k,2] z) {
    y, z = Scan<num_scan_inputs=1, scan_output_axes=[0], body = b (float[2] a, float[2] v) => (float[2] d, float[2] o) {
        h = Add(a, v)  d = Identity(h)  o = Neg(h) }>(s, x)
}"""
NESTED = """g (int64 m, bool c, float[n,2] x) => (float[n,2] y) {
    y = Loop(m, c, x) <body = b (int64 i, bool go, float[n,2] a) => (bool on, float[n,2] d) {
        on = Identity(go)
        two = Constant<value = int64 {2}>()
        odd = Mod(i, two)
        is_odd = Cast<to=9>(odd)
        d = If(is_odd) <
            then_branch = t () => (float[n,2] td) {
                td = Loop(i, is_odd, a) <body = q (int64 j, bool g2, float[n,2] e) => (bool o2, float[n,2] f) {
                    o2 = Identity(g2)  deep = Add(e, e)  f = Identity(deep) }> },
            else_branch = u () => (float[n,2] ud) { ud = Neg(a) }>
    }>
}"""


def named(model: ir.Model, *names: str) -> ir.Model:
    """With names for the nodes that hold bodies, the outer ones first."""
    holders = [node for node in model.graph.all_nodes() if node.op_type in ("If", "Loop", "Scan")]
    for node, name in zip(holders, names, strict=True):
        node.name = name
    return model


def test_branches_that_were_not_taken_saw_nothing(parse: Parse) -> None:
    model = named(parse(BRANCHES), "if")
    points: list[Point] = [
        kind(f"if/{v}") for kind in (Range, Histogram, Shape) for v in ("then/th", "else/eh", "else/ey")
    ]
    x = np.array([[1, -2]], np.float32)
    found = collect(model, points, [{"c": np.array(True), "x": x}, {"c": np.array(True), "x": 3 * x}])
    assert (found[Range("if/then/th")].low, found[Range("if/then/th")].high) == (-12, 6)
    assert (found[Histogram("if/then/th")].low, found[Histogram("if/then/th")].seen) == (-12, 4)
    assert found[Shape("if/then/th")].largest == (1, 2)
    assert all(found[kind(f"if/else/{v}")].seen == 0 for kind in (Range, Histogram, Shape) for v in ("eh", "ey"))
    found = collect(model, points, [{"c": np.array(False), "x": x}, {"c": np.array(True), "x": x}])
    assert (found[Range("if/else/eh")].low, found[Histogram("if/else/ey")].low) == (-1, 0)


BRANCHES_IN_BRANCHES = """g (bool c, bool d, float[n,2] x) => (float[n,2] y) {
    y = If(c) <then_branch = t () => (float[n,2] ty) {
                   ty = If(d) <then_branch = u () => (float[n,2] uy) { s = ReduceMax<keepdims=0>(x)  uy = Mul(x, s) },
                               else_branch = v () => (float[n,2] vy) { vh = Neg(x)  vy = Relu(vh) }> },
               else_branch = e () => (float[n,2] ey) { ey = Relu(x) }>
}"""


@pytest.mark.parametrize("taken", [(True, True), (True, False), (False, True)])
def test_branches_in_branches_and_scalars(parse: Parse, taken: tuple[bool, bool]) -> None:
    model = named(parse(BRANCHES_IN_BRANCHES), "if", "in")
    expected = {"if/then/in/then/s": (True, True), "if/then/in/else/vh": (True, False)}
    points: list[Point] = [kind(value) for kind in (Range, Histogram, Shape, Own) for value in expected]
    feed = {"c": np.array(taken[0]), "d": np.array(taken[1]), "x": np.array([[2, 3]], np.float32)}
    found = collect(model, points, [feed])
    for value, way in expected.items():
        assert all((found[kind(value)].seen > 0) == (way == taken) for kind in (Range, Histogram, Shape))
        assert len(found[Own(value)].arrays) == (way == taken)
    if taken == (True, True):
        assert found[Range("if/then/in/then/s")].high == found[Histogram("if/then/in/then/s")].low == 3
        assert found[Shape("if/then/in/then/s")].largest == ()


@pytest.mark.parametrize("opset", [12, 17, 21])
def test_loops_give_all_their_iterations(parse: Parse, opset: int) -> None:
    model = named(parse(f'<ir_version: 8, opset_import: ["": {opset}]>\n' + LOOP), "loop")
    points: list[Point] = [kind(f"loop/body/{v}") for kind in (Range, Histogram, Shape) for v in "ha"]
    points += [Range("loop/body/half"), Mean("loop/body/h"), Shape("loop/body/i")]
    x = np.array([[1, -2], [0, 0]], np.float32)
    found = collect(model, points, [{"m": np.array(3), "c": np.array(True), "x": x}])
    for kind in (Range, Histogram):
        assert (found[kind("loop/body/h")].low, found[kind("loop/body/h")].high) == (-8, 4)
        assert (found[kind("loop/body/a")].low, found[kind("loop/body/a")].seen) == (-6, 12)
    assert found[Shape("loop/body/h")].largest == (2, 2)
    assert found[Shape("loop/body/i")].largest == ()
    assert (found[Range("loop/body/half")].low, found[Mean("loop/body/h")].mean.tolist()) == (-8, [1.5, -3])
    nothing = collect(model, points, [{"m": np.array(0), "c": np.array(True), "x": x}])
    assert all(nothing[point].seen == 0 for point in points)


def test_scans_give_all_their_steps(parse: Parse) -> None:
    model = named(parse(SCAN), "scan")
    feed = {"s": np.zeros(2, np.float32), "x": np.array([[1, 2], [3, -9]], np.float32)}
    found = collect(model, [Range("scan/body/h"), Histogram("scan/body/o"), Channels("scan/body/v", axis=0)], [feed])
    assert (found[Range("scan/body/h")].low, found[Range("scan/body/h")].high) == (-7, 4)
    assert (found[Histogram("scan/body/o")].high, found[Histogram("scan/body/o")].seen) == (7, 4)
    assert found[Channels("scan/body/v", axis=0)].low.tolist() == [1, -9]


def test_bodies_in_bodies_are_folded_level_by_level(parse: Parse) -> None:
    model = named(parse(NESTED), "outer", "if", "inner")
    deep = "outer/body/if/then/inner/body/deep"
    feed = {"m": np.array(4), "c": np.array(True), "x": np.array([[1, 2]], np.float32)}
    found = collect(model, [Range(deep), Shape(deep), Range("outer/body/if/else/ud")], [feed])
    # i=0: -x; i=1: once doubled; i=2: negated; i=3: doubled three times
    assert (found[Range(deep)].low, found[Range(deep)].high, found[Range(deep)].seen) == (-4, 32, 8)
    assert found[Shape(deep)].largest == (1, 2)
    assert (found[Range("outer/body/if/else/ud")].low, found[Range("outer/body/if/else/ud")].high) == (-2, 4)
    with pytest.raises(
        Unanswered, match=f"The value '{deep}' is in a Loop whose iterations cannot be put together"
    ) as e:
        collect(model, [Range(deep), Histogram(deep)], [feed])
    assert list(e.value.reasons) == [Histogram(deep)]
    assert e.value.answers == {Range(deep): found[Range(deep)]}


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Range, Histogram, Channels, Own])
@pytest.mark.parametrize(("input_", "word"), [(-1.0, "NaN"), (0.0, "infinity")])
def test_what_is_not_finite_is_named_with_its_sample(parse: Parse, kind: Any, input_: float, word: str) -> None:
    model = parse("g (float[n,3] x) => (float[n,3] y) { l = Log(x)  e = Exp(x)  y = Neg(e) }")
    x = np.ones((40, 3), np.float32)
    x[21, 1] = input_
    for sizes in ([1] * 40, [40], [7, 33]):
        with pytest.raises(Unanswered, match=rf"^The value 'l' holds {word} in sample 21; leave such samples out") as e:
            collect(model, [kind("l"), kind("e")], rows(x, sizes))
        assert list(e.value.reasons) == [kind("l")]
        assert list(e.value.answers) == [kind("e")]


def test_nan_in_a_body_is_named(parse: Parse) -> None:
    model = named(parse(LOOP), "loop")
    feed = {"m": np.array(2), "c": np.array(True), "x": np.array([[1, np.nan]], np.float32)}
    with pytest.raises(Unanswered, match=r"^The value 'loop/body/h' holds NaN in run 0 of the data; .*\.$"):
        collect(model, [Range("loop/body/h")], [feed])


def test_other_refusals_are_sentences(parse: Parse, net: ir.Model) -> None:
    x = np.ones((1, 3, 8, 8), np.float32)
    with pytest.raises(UsageError, match=r"^The model has no value 'cc' to watch\. Did you mean 'c'\?"):
        collect(net, [Range("cc")], rows(x, [1]))
    with pytest.raises(BadFeeds, match="The data hold no samples"):
        collect(net, [Range("c")], [])
    assert collect(net, [], []) == {}
    whole = parse("g (int64[n] x) => (int64[n] y) { y = Neg(x) }")
    assert collect(whole, [Shape("y")], [{"x": np.ones(2, np.int64)}])[Shape("y")].largest == (1,)
    for kind in (Range, Histogram):
        with pytest.raises(Unanswered, match=r"^The value 'y' is int64, and only floats have a range\.$"):
            collect(whole, [kind("y")], [{"x": np.ones(2, np.int64)}])
    called = parse(
        '<ir_version: 8, opset_import: ["": 17, "d": 1]>\n'
        "g (float[n] x) => (float[n] y) { y = d.twice(x) }\n"
        '<domain: "d", opset_import: ["": 17]>\ntwice (a) => (b) { b = Add(a, a) }'
    )
    with pytest.raises(Unanswered, match="'d::twice/b' is inside a function, which each call computes anew; inline"):
        collect(called, [Range("d::twice/b")], [{"x": np.ones(2, np.float32)}])


def test_memory_does_not_hold_the_samples(net: ir.Model) -> None:
    alive = 0

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        for _ in range(30):
            yield {"x": RANDOM.standard_normal((1, 3, 8, 8)).astype(np.float32)}

    class Walk:
        def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
            return feeds()

    found = collect(net, [Histogram("c"), Mean("y")], Walk())
    assert found[Histogram("c")].seen == 30 * 4 * 64
    assert alive == 0
