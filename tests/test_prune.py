"""Magnitude pruning: exact counts, every type and place, what it refuses, and real models."""

from collections.abc import Callable, Sequence
from importlib.metadata import files

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.ir.errors import UsageError
from penjing.ir.files import load, save, saved_bytes
from penjing.ir.text import text
from penjing.ir.weights import Weight, weights
from penjing.passes.base import Context
from penjing.passes.prune import threshold
from penjing.passes.prune.magnitude import PruneMagnitude

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]
Parse = Callable[[str], ir.Model]


def chain(*arrays: Array) -> ir.Model:
    """A model that multiplies its input by each of the arrays in turn; a bias after the first."""
    tape = ir.tape.Tape()
    x = value = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([1, "k"]))
    for place, array in enumerate(arrays):
        weight = tape.initializer(ir.tensor(array, name=f"w{place}"))
        if array.dtype.kind in "iu":
            scale = tape.initializer(ir.tensor(np.float32(0.5), name=f"s{place}"))
            zero = tape.initializer(ir.tensor(np.array(3, array.dtype), name=f"z{place}"))
            weight = tape.op("DequantizeLinear", [weight, scale, zero])
        elif array.dtype != np.float32:
            weight = tape.op("Cast", [weight], {"to": ir.DataType.FLOAT})
        value = tape.op("MatMul", [value, weight])
        if place == 0:
            value = tape.op("Add", [value, tape.initializer(ir.tensor(np.ones(1, np.float32), name="bias"))])
    graph = ir.Graph([x], [value], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def prune(model: ir.Model, **options: object) -> Context:
    ctx = Context()
    PruneMagnitude(**options).run(model, ctx)  # type: ignore[arg-type]
    return ctx


def prunable(model: ir.Model) -> list[Weight]:
    return [weight for weight in weights(model) if weight.prunable]


def zeros(model: ir.Model) -> list[int]:
    return [weight.zeros() for weight in prunable(model)]


def skips(ctx: Context) -> dict[str, str]:
    return {skip.subject: skip.reason for skip in ctx.ledger.skips}


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Counts ---------------------------------------------------------------------------------------------------------------

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8, np.uint8]
TENSORS = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(-6, 6), min_size=2, max_size=30)), min_size=1, max_size=4
)


def expected_mask(model: ir.Model, count: int) -> list[list[bool]]:
    """The ``count`` smallest of all weights, equal ones in order, by a stable sort of everything."""
    found = prunable(model)
    everything = np.concatenate([weight.magnitudes().astype(np.float64).ravel() for weight in found])
    mask = np.zeros(everything.size, bool)
    mask[np.argsort(everything, kind="stable")[:count]] = True
    ends = np.cumsum([weight.size for weight in found])[:-1]
    return [part.tolist() for part in np.split(mask, ends)]


@settings(max_examples=150, deadline=None)
@given(TENSORS, st.floats(0, 1), st.sampled_from(["tensor", "model"]))
def test_counts_are_exact(tensors: list[tuple[type, list[int]]], sparsity: float, scope: str) -> None:
    arrays = [(np.array(row) + 3 * (np.dtype(kind).kind in "iu")).clip(0).astype(kind) for kind, row in tensors]
    model = chain(*[array.reshape(1, -1) for array in arrays])
    before = [weight.magnitudes() for weight in prunable(model)]
    sizes = [weight.size for weight in prunable(model)]
    copy = model.clone()
    prune(model, sparsity=sparsity, scope=scope)
    if scope == "model":
        masks = expected_mask(copy, round(sparsity * sum(sizes)))
    else:
        masks = []
        for place, array in enumerate(arrays):
            alone = chain(array.reshape(1, -1))
            masks += expected_mask(alone, round(sparsity * sizes[place]))
    for weight, old, mask in zip(prunable(model), before, masks, strict=True):
        kept = np.where(np.array(mask).reshape(old.shape), 0, old)
        np.testing.assert_array_equal(weight.magnitudes(), kept)


class Numbers:
    """Magnitudes in memory."""

    def __init__(self, array: Array) -> None:
        self.array, self.size = array, array.size

    def magnitude_reader(self, buffer: object = None) -> threshold.Read:
        del buffer
        return lambda start, stop: np.abs(self.array[start:stop])


LARGE = {
    "normal": [random(900_000), random(700_001, seed=1) * 2],
    "two types": [random(900_000), random(700_001, seed=1).astype(np.float64) * 1.5],
    "sixteen values": [np.random.default_rng(0).integers(-8, 8, 1_600_003).astype(np.float32)],
    "one value": [np.ones(1_600_000, np.float32)],
    "half zeros": [random(1_600_000) * (np.arange(1_600_000) % 2)],
    "unlike layers": [random(300_000, seed=place) * np.float32(10.0 ** (place - 4)) for place in range(7)],
    "infinities": [np.where(np.arange(1_600_000) % 2, np.inf, random(1_600_000)).astype(np.float32)],
    "misleading sample": [np.where(np.arange(1_600_000) % 96 < 64, 1e9, np.arange(1_600_000)).astype(np.float32)],
}


@pytest.mark.parametrize("arrays", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("share", [1e-6, 0.3, 0.5, 0.99999, 1.0])
def test_the_threshold_of_large_tensors(arrays: list[Array], share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold, "SMALL", 0)
    everything = np.abs(np.concatenate(arrays))
    count = round(share * everything.size)
    found = threshold.smallest([Numbers(array) for array in arrays], count)
    assert found.threshold == np.partition(everything, count - 1)[count - 1]
    assert sum(found.counts) == count
    for array, cut, until in zip(arrays, found.counts, found.until, strict=True):
        assert np.count_nonzero(threshold.cut(np.abs(array), 0, found.threshold, until)) == cut


def test_radix_selection_where_no_bracket_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold, "SMALL", 0)
    monkeypatch.setattr(threshold, "_brackets", lambda *_: [(8.0, 9.0)])
    array = np.append(random(10_000), np.float32(1e-40))
    found = threshold.smallest([Numbers(array)], 5_000)
    assert found.threshold == np.sort(np.abs(array))[4_999]


def test_equal_magnitudes_fall_in_order() -> None:
    model = chain(np.ones((2, 3), np.float32), -np.ones((3, 2), np.float32))
    prune(model, sparsity=0.75, scope="model")
    first, second = (weight.array().tolist() for weight in prunable(model))
    assert first == [[0, 0, 0], [0, 0, 0]]
    assert second == [[0, 0], [0, -1], [-1, -1]]


def test_a_threshold_includes_its_equals_in_every_type() -> None:
    floats, doubles = np.array([[0.5, -0.5, 0.51]], np.float32), np.array([[0.5, 0.6]], np.float64)
    model = chain(floats, doubles, np.array([[3, 4, 5]], np.int8))
    prune(model, threshold=0.5)
    assert zeros(model) == [2, 1, 2]  # the integers stand for 0, 0.5 and 1
    assert prunable(model)[2].array().tolist() == [[3, 3, 5]]


def test_zeros_that_are_there_count_and_nothing_else_changes() -> None:
    model = chain(random(8, 8) * (np.arange(64).reshape(8, 8) % 4 > 0))
    ctx = prune(model, sparsity=0.25)
    assert zeros(model) == [16]
    assert skips(ctx)["w0"] == "its smallest elements are zero already"
    assert not ctx.ledger.changes
    ctx = prune(model, sparsity=0.5)
    assert zeros(model) == [32]
    assert ctx.ledger.changes[0].numbers["sparsity"] == 0.5


# Where ----------------------------------------------------------------------------------------------------------------


def test_every_place_at_model_scope(parse: Parse) -> None:
    model = parse("""<ir_version: 10, opset_import: ["": 21, "local": 1]>
        g (float[2,3] x, bool c) => (float[?,?] z) <float[3,3] w = {1,2,3,4,5,6,7,8,9}, float[3] b = {1,2,3}> {
            k = Constant <value = float[3,3] {9,8,7,6,5,4,3,2,1}> ()
            h = local.Project (x, k)
            y = Gemm (h, w, b)
            [branch] z = If (c) <
                then_branch = yes () => (float[?,?] t) {
                    inner = Constant <value = float[3,2] {1,2,3,4,5,6}> ()
                    t = MatMul (y, inner)
                },
                else_branch = no () => (float[?,?] e) { e = MatMul (y, w) }
            >
        }
        <opset_import: ["": 21], domain: "local">
        Project (a, p) => (q) {
            own = Constant <value = float[3,3] {1,2,3,4,5,6,7,8,9}> ()
            d = MatMul (a, own)
            q = MatMul (d, p)
        }
    """)
    ctx = prune(model, sparsity=0.5, scope="model")
    assert {weight.address: weight.zeros() for weight in prunable(model)} == {
        "w": 4,
        "k": 4,
        "branch/then/inner": 4,
        "local::Project/own": 4,
    }  # round(33 / 2) in all: every 1 to 4
    assert skips(ctx) == {"1 bias": "not weights of a layer"}
    assert {change.subject for change in ctx.ledger.changes} == {weight.address for weight in prunable(model)}


def test_selection(parse: Parse) -> None:
    source = """g (int64[2] ids, float[2,2] x) => (float[2,2] e, float[2,2] y, float[2,2] z)
        <float[3,2] table = {1,2,3,4,5,6}, float[2,2] a = {1,2,3,4}, float[2,2] b = {1,2,3,4}, float[2] c = {1,2},
         float[2,2] both = {1,2,3,4}> {
            e = Gather (table, ids)
            e2 = Gather (both, ids)
            y = Gemm (x, a, c)
            y2 = MatMul (y, both)
            z = MatMul (y2, b)
        }"""
    model = parse(source)
    ctx = prune(model, sparsity=0.5)
    assert {weight.address: weight.zeros() for weight in weights(model)} == {
        "table": 0,
        "a": 2,
        "b": 2,
        "c": 0,
        "both": 0,
    }
    assert skips(ctx) == {
        "both": "an embedding too, and not asked for by name",
        "1 embedding": "not weights of a layer, and not asked for",
        "1 bias": "not weights of a layer",
    }
    model = parse(source)
    ctx = prune(model, sparsity=0.5, only=["table", "both", "c", "a"], keep=["op:Gemm"])
    assert [weight.address for weight in weights(model) if weight.zeros()] == ["table", "both"]
    assert skips(ctx) == {"a": "kept by request", "b": "not among those asked for", "c": "kept by request"}


def test_constants_of_unknown_scale_and_nan_are_left_with_a_reason() -> None:
    broken = random(4, 4)
    broken[1, 2] = np.nan
    for options in ({"sparsity": 0.5}, {"sparsity": 0.5, "scope": "model"}, {"threshold": 0.1}, {"pattern": "2:4"}):
        model = chain(random(4, 4), broken, random(4, 4, seed=2))
        ctx = prune(model, **options)
        assert skips(ctx)["w1"] == "holds NaN, which has no magnitude"
        assert [change.subject for change in ctx.ledger.changes][:1] == ["w0"]
        np.testing.assert_array_equal(weights(model)[2].array(), broken)


def test_tied_weights_are_pruned_once(parse: Parse) -> None:
    model = parse("""g (float[2,2] x) => (float[2,2] z) <float[2,2] w = {1,2,3,4}> {
        y = MatMul (x, w)
        z = Gemm <transB = 1> (y, w)
    }""")
    ctx = prune(model, sparsity=0.5, scope="model")
    assert [change.subject for change in ctx.ledger.changes] == ["w"]
    assert zeros(model) == [2]


# Patterns, layers, soft, size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 6), (9, 300), (70_000, 2), (4, 20_000)])
@pytest.mark.parametrize("axis", [0, 1])
def test_n_of_m_along_input_channels(shape: tuple[int, int], axis: int, parse: Parse) -> None:
    array = np.round(random(*shape), 1)
    tape = ir.tape.Tape()
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([1, shape[axis]]))
    weight = tape.initializer(ir.tensor(array, name="w"))
    output = tape.op("Gemm", [x, weight], {"transB": axis})
    graph = ir.Graph([x], [output], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 17}, name="g")
    model = ir.Model(graph, ir_version=8)
    ctx = prune(model, pattern="2:4")
    rows = np.abs(array if axis else array.T)
    whole = rows.shape[1] // 4 * 4
    expected = rows.copy()
    groups = expected[:, :whole].reshape(-1, 4)
    np.put_along_axis(groups, np.argsort(groups, axis=1, kind="stable")[:, :2], 0, axis=1)
    expected[:, :whole] = groups.reshape(len(rows), whole)
    if whole:
        found = np.abs(weights(model)[0].array())
        np.testing.assert_array_equal(found if axis else found.T, expected)
    else:
        assert skips(ctx)["w"] == "fewer than 4 input channels"
    if whole and whole < rows.shape[1]:
        assert skips(ctx)["w"] == "input channels that do not fill a group of 4 stay dense"
    again = prune(model, pattern="2:4")
    assert not again.ledger.changes


def test_n_of_m_of_a_convolution_and_of_unknown_axes(parse: Parse) -> None:
    model = parse("""g (float[1,4,2,2] x, float[2,2,2] v) => (float[1,1,1,1] y, float[2,2] u)
        <float[1,4,2,2] w = {1,5,9,13,2,6,10,14,3,7,11,15,4,8,12,16}, float[2,2,2] e = {1,2,3,4,5,6,7,8}> {
            y = Conv (x, w)
            u = Einsum <equation = "bij,ijk->bk"> (v, e)
        }""")
    ctx = prune(model, pattern="1:4")
    assert weights(model)[0].array().reshape(4, 4).tolist() == [[0] * 4] * 3 + [[4, 8, 12, 16]]
    assert skips(ctx) == {"e": "its input-channel axis is not known, or its uses disagree on it"}


def test_whole_layers() -> None:
    model = chain(random(10, 10), random(10, 10, seed=1) * np.float32(0.1), random(10, 30, seed=2) * np.float32(0.2))
    ctx = prune(model, sparsity=0.5, scope="model", granularity="tensor")
    assert zeros(model) == [0, 100, 0]  # the next would make 400 of 500
    assert skips(ctx)["w0"] == "its root mean square is above the cut"
    prune(model, threshold=0.5, scope="model", granularity="tensor")
    assert zeros(model) == [0, 100, 300]


@pytest.mark.parametrize("kind", DTYPES, ids=lambda kind: np.dtype(kind).name)
def test_soft_threshold(kind: type) -> None:
    array = (np.array([[1, 2, 2, 4, 7, -7, 0, -3]]) + 3 * (np.dtype(kind).kind in "iu")).clip(0).astype(kind)
    model = chain(array)
    before = prunable(model)[0].magnitudes()
    ctx = prune(model, sparsity=0.5, mode="soft")
    after = prunable(model)[0].magnitudes()
    alpha = ctx.ledger.changes[0].numbers["threshold"]
    assert zeros(model) == [4]
    kept = (after > 0) & (before > alpha)
    np.testing.assert_allclose(after[kept], before[kept] - alpha)
    assert (after <= before).all()


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("integers", [False, True])
def test_target_bytes_is_met_by_the_least_sparsity(scope: str, integers: bool) -> None:
    def model() -> ir.Model:
        arrays: list[Array] = [random(40, 50), random(50, 60, seed=1)]
        return chain(*(np.rint(array * 20).clip(-100, 100).astype(np.int8) if integers else array for array in arrays))

    def size(made: ir.Model) -> int:
        found = prunable(made)
        return saved_bytes(made) - sum(w.nbytes for w in found) + sum(w.entropy_bytes() for w in found)

    made = model()
    target = size(made) * 2 // 3
    prune(made, target_bytes=target, scope=scope)
    assert size(made) <= target
    count = sum(zeros(made))
    less = model()
    prune(less, sparsity=(count - 3) / 5_000, scope=scope)
    assert size(less) > target


def test_target_bytes_out_of_reach() -> None:
    with pytest.raises(UsageError, match=r"target-bytes=10 is out of reach: .* the model still takes \d+ bytes"):
        prune(chain(random(40, 50)), target_bytes=10)


def test_target_bytes_met_already() -> None:
    model = chain(random(40, 50))
    assert not prune(model, target_bytes=10**6).ledger.changes
    assert zeros(model) == [0]


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of sparsity, threshold, pattern and target-bytes; none was given"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "sparsity and pattern exclude each other"),
        ({"sparsity": 1.5}, "sparsity=1.5 is out of range; it is a share from 0 to 1"),
        ({"threshold": -1}, "threshold=-1 is out of range"),
        ({"target_bytes": -1}, "target-bytes=-1 is out of range"),
        ({"pattern": "4:2"}, "pattern=4:2 is not valid; it is N:M"),
        ({"pattern": "half"}, "pattern=half is not valid"),
        ({"pattern": "2:4", "scope": "model"}, "leave scope, granularity and mode out"),
        ({"sparsity": 0.5, "granularity": "tensor"}, "add scope=model"),
        ({"sparsity": 0.5, "scope": "model", "granularity": "tensor", "mode": "soft"}, "leave granularity=tensor out"),
    ],
)
def test_options_are_refused_in_words(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        PruneMagnitude(**options)  # type: ignore[arg-type]
    assert str(caught.value).startswith("prune-magnitude: ")
    assert message in str(caught.value)


# Files and real models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.4, "scope": "model"}, {"sparsity": 0.4, "mode": "soft"}, {"pattern": "2:4"}]
)
def test_weights_in_files_are_pruned_as_they_are_saved(tmp_path: object, options: dict[str, object]) -> None:
    arrays: Sequence[Array] = [random(300, 400), random(400, 301, seed=1).astype(np.float16)]
    save(chain(*arrays), f"{tmp_path}/in.onnx", external=True)
    model = load(f"{tmp_path}/in.onnx")
    prune(model, **options)
    assert text(model).count("lazy: prune-magnitude{") == 0  # small enough for a digest
    assert all(type(weight.tensor).__name__ == "StreamedTensor" for weight in prunable(model))
    save(model, f"{tmp_path}/out.onnx")
    in_memory = chain(*arrays)
    prune(in_memory, **options)
    for saved, expected in zip(prunable(load(f"{tmp_path}/out.onnx")), prunable(in_memory), strict=True):
        np.testing.assert_array_equal(saved.array(), expected.array())


def installed(package: str) -> list[str]:
    return sorted(str(found.locate()) for found in files(package) or [] if str(found).endswith(".onnx"))


REAL = [*installed("magika"), *installed("rapidocr-onnxruntime")]


def test_the_real_models_are_there() -> None:
    assert len(REAL) == 4


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.rpartition("/")[2])
def test_thirty_percent_of_a_real_model(path: str) -> None:
    model = load(path)
    total = sum(weight.size for weight in prunable(model))
    assert total > 100_000
    prune(model, sparsity=0.3, scope="model")
    assert sum(zeros(model)) == round(0.3 * total)
