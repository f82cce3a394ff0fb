import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from penjing.ir import files
from penjing.ir.errors import BadFeeds, UsageError
from penjing.models import zoo
from penjing.runtime import draws as room
from penjing.runtime.draws import NoFeeds, random_feeds
from penjing.runtime.feeds import read_feeds, read_labels
from penjing.runtime.functions import load_function
from penjing.runtime.session import DoesNotRun, open_session, run_feed

Parse = Callable[[str], ir.Model]
VALIDATION = zoo.path("mlp").parent / "mnist-validation.npz"


@pytest.fixture
def add(parse: Parse) -> ir.Model:
    return parse("g (float[batch, 3] x, float s) => (float[batch, 3] y) { y = Add(x, s) }")


def floats(*shape: int) -> Any:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def refusal(spec: Any, model: ir.Model, **options: Any) -> str:
    with pytest.raises(BadFeeds) as refused:
        list(read_feeds(spec, model, **options))
    return str(refused.value)


# --- x.npz and mappings: batch first ---


def test_npz_is_cut_into_batches_with_labels() -> None:
    feeds = read_feeds(VALIDATION, files.load(zoo.path("mlp")))
    assert feeds.describe() == "300 samples of mnist-validation.npz"
    assert [feed["image"].shape[0] for feed in feeds] == [64, 64, 64, 64, 44]
    assert (feeds.runs, feeds.samples, feeds.random) == (5, 300, False)
    assert feeds.labels is not None
    assert (feeds.labels.dtype, feeds.labels.shape) == (np.int64, (300,))
    assert [feed["image"].shape for feed in feeds] == [feed["image"].shape for feed in feeds]


def test_arrays_without_dimensions_go_into_every_run(add: ir.Model) -> None:
    found = list(read_feeds({"x": floats(70, 3), "s": np.float32(2)}, add))
    assert [feed["x"].shape for feed in found] == [(64, 3), (6, 3)]
    assert [float(feed["s"]) for feed in found] == [2.0, 2.0]


def test_a_fixed_batch_leaves_out_what_does_not_fill_it_and_says_so(parse: Parse) -> None:
    model = parse("g (float[4, 3] x) => (float[4, 3] y) { y = Relu(x) }")
    feeds = read_feeds({"x": floats(10, 3), "labels": np.arange(10)}, model)
    assert [feed["x"].shape for feed in feeds] == [(4, 3), (4, 3)]
    assert feeds.labels is not None
    assert (feeds.samples, feeds.labels.tolist()) == (8, list(range(8)))
    assert feeds.notes == ["The last 2 samples of 10 in the data do not fill a batch of 4 and are left out."]
    assert refusal({"x": floats(3, 3)}, model) == "the data has 3 samples, and a run of the model takes 4."


def test_what_does_not_fit_is_a_sentence(add: ir.Model, tmp_path: Path) -> None:
    x, s = floats(5, 3), np.float32(1)
    takes = "'x' (float32 [batch,3]), 's' (float32 [])"
    assert refusal({"xx": x, "s": s}, add) == (
        f"the data has 'xx', which is no input of the model. Did you mean 'x'? Its inputs are {takes}."
    )
    assert refusal({"x": x}, add) == "the data has no array for the input 's' (float32 []); it has x."
    assert refusal({"x": x.astype(np.float64), "s": s}, add) == (
        "the data: 'x' is float64, the model takes float32; convert it with .astype('float32')."
    )
    assert refusal({"x": floats(5, 4), "s": s}, add) == (
        "the data: 'x' has shape [5,4]; the model takes 'x' (float32 [batch,3]), the first axis counting samples."
    )
    assert refusal({"x": floats(5), "s": s}, add).startswith("the data: 'x' has shape [5];")
    assert refusal({"x": np.where(x == 7, np.nan, x), "s": s}, add) == (
        "the data: 'x' holds NaN in sample 2; leave such samples out."
    )
    assert refusal({"x": x[:0], "s": s}, add) == "the data has 0 samples, and a run of the model takes 64."
    np.savez(tmp_path / "x.npz", x=floats(5, 3), s=np.float32(1), labels=np.arange(4))
    assert refusal(tmp_path / "x.npz", add).endswith("x.npz are 4, and x.npz has 5 samples.")


def test_unlike_lengths_are_refused(parse: Parse) -> None:
    model = parse("g (float[n] x, float[m] z) => (float[k] y) { y = Concat<axis=0>(x, z) }")
    assert "unlike numbers of samples: 'x' 3, 'z' 2." in refusal({"x": floats(3), "z": floats(2)}, model)
    model = parse("g (float[2] x, float[4] z) => (float[6] y) { y = Concat<axis=0>(x, z) }")
    assert "unlike numbers of samples a run: 'x' 2, 'z' 4." in refusal({"x": floats(8), "z": floats(8)}, model)


def test_files_that_are_not_there_or_not_numpy(add: ir.Model, tmp_path: Path) -> None:
    assert refusal("/no/such.npz", add).endswith("or FILE.py:FUNCTION; /no/such.npz is not there.")
    (tmp_path / "x.npz").write_bytes(b"nonsense")
    assert "x.npz cannot be read as numpy arrays" in refusal(tmp_path / "x.npz", add)
    np.savez(tmp_path / "x.npz", x=np.array([{}], object))
    assert "cannot be read as numpy arrays: it holds Python objects" in refusal(tmp_path / "x.npz", add)
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty", add).endswith("holds neither .npz files nor ONNX test_data_set_* folders.")


def test_types_that_npz_lacks_survive_it(parse: Parse, tmp_path: Path) -> None:
    model = parse("g (bfloat16[n] x, string[n] t) => (float[n] y) { y = Cast<to=1>(x) }")
    np.savez(tmp_path / "x.npz", x=floats(3).astype(ml_dtypes.bfloat16), t=np.array(["a", "b", "c"]))
    [feed] = read_feeds(tmp_path / "x.npz", model)
    assert feed["x"].dtype == ml_dtypes.bfloat16
    assert feed["t"].tolist() == ["a", "b", "c"]
    bad = np.array([1, np.nan, 2], ml_dtypes.bfloat16)
    assert "'x' holds NaN in sample 1" in refusal({"x": bad, "t": np.array(["a"] * 3)}, model)


def test_inputs_with_a_default_may_be_left_out(parse: Parse) -> None:
    model = parse("g (float[n] x, float w) => (float[n] y) <float w = {2}> { y = Mul(x, w) }")
    model.graph.inputs[1].const_value = ir.tensor(np.float32(2), name="w")
    assert [sorted(feed) for feed in read_feeds({"x": floats(3)}, model)] == [["x"]]


# --- folders, lists, functions ---


def test_a_folder_gives_one_run_a_file_in_name_order(add: ir.Model, tmp_path: Path) -> None:
    for name, rows in [("b", 2), ("a", 1), ("c", 7)]:
        np.savez(tmp_path / f"{name}.npz", x=floats(rows, 3), s=np.float32(0), labels=np.arange(rows))
    feeds = read_feeds(tmp_path, add)
    assert [feed["x"].shape[0] for feed in feeds] == [1, 2, 7]
    assert feeds.describe() == f"3 runs of {tmp_path.name}"
    assert feeds.labels is not None
    assert feeds.labels.tolist() == [0, 0, 1, *range(7)]
    np.savez(tmp_path / "b.npz", x=floats(2, 3))
    assert refusal(tmp_path, add) == f"{tmp_path}/b.npz has no array for the input 's' (float32 []); it has x."


def test_onnx_data_sets(add: ir.Model, tmp_path: Path) -> None:
    for number in (10, 2):
        folder = tmp_path / f"test_data_set_{number}"
        folder.mkdir()
        for place, array in enumerate([floats(number, 3), np.float32(1)]):
            proto = onnx.numpy_helper.from_array(np.asarray(array))
            (folder / f"input_{place}.pb").write_bytes(proto.SerializeToString())
    assert [feed["x"].shape for feed in read_feeds(tmp_path, add)] == [(2, 3), (10, 3)]
    assert [feed["x"].shape for feed in read_feeds(tmp_path / "test_data_set_10", add)] == [(10, 3)]
    (tmp_path / "test_data_set_2" / "input_1.pb").write_bytes(b"\x0f")
    assert "input_1.pb is not the protobuf of 's' (float32 [])" in refusal(tmp_path, add)


def test_onnx_backend_sequences_are_read(tmp_path: Path, parse: Parse) -> None:
    model = parse("g (seq(float) x) => (int64 y) { y = SequenceLength(x) }")
    sequence = onnx.numpy_helper.from_list([floats(2), floats(3)])
    (tmp_path / "input_0.pb").write_bytes(sequence.SerializeToString())
    [feed] = read_feeds(tmp_path, model)
    assert run_feed(open_session(model), feed)["y"] == 2
    assert "takes a list of arrays" in refusal({"x": floats(2)}, model)


def test_a_list_of_dicts_is_taken_as_it_is(add: ir.Model) -> None:
    runs = [{"x": floats(2, 3), "s": np.float32(1)}, {"x": floats(1, 3), "s": np.float32(2)}]
    feeds = read_feeds(iter(runs), add)
    assert [feed["x"].shape for feed in feeds] == [feed["x"].shape for feed in feeds] == [(2, 3), (1, 3)]
    assert read_feeds(feeds, add) is feeds
    assert refusal([], add) == "The data hold no samples."
    assert refusal([floats(2)], add).startswith("The data hold ndarray; each run is a dict")
    assert refusal([runs[0], {"x": floats(2, 3)}], add).startswith("run 1 of the data has no array for the input 's'")


SOURCE = """
import numpy as np

X = np.zeros((2, 3), np.float32)

def good():
    for scale in (1, 2):
        yield {"x": X + scale, "s": np.float32(0)}

def late():
    yield {"x": X, "s": np.float32(0)}
    yield {"x": X}

def unsteady():
    yield {"x": np.random.default_rng().random((2, 3), np.float32), "s": np.float32(0)}

def empty():
    return []

def raising():
    yield {"x": X, "s": np.float32(0)}
    raise KeyError("gone")

def arrays():
    yield X
"""


def test_functions_yield_runs(add: ir.Model, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    feeds = read_feeds(f"{path}:good", add)
    assert [feed["x"][0, 0] for feed in feeds] == [feed["x"][0, 0] for feed in feeds] == [1.0, 2.0]
    assert feeds.describe() == f"runs of {path}:good"
    assert "run 1 of" in refusal(f"{path}:late", add)
    assert "seed its random numbers" in refusal(f"{path}:unsteady", add)
    assert refusal(f"{path}:empty", add).endswith("yields no samples.")
    assert refusal(f"{path}:raising", add).endswith("raised KeyError: 'gone' (after 1 runs)")
    assert "it must yield dicts" in refusal(f"{path}:arrays", add)


def test_load_function_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sibling_of_mine.py").write_text("VALUE = 7\n")
    path = tmp_path / "mine.py"
    path.write_text("from sibling_of_mine import VALUE\ndef accuracy(session):\n    return VALUE\n")
    assert load_function(f"{path}:accuracy", "--metric")(None) == 7
    monkeypatch.chdir(tmp_path)
    assert load_function("math:sqrt", "--metric")(4) == 2

    def refused(spec: str) -> str:
        with pytest.raises(UsageError) as found:
            load_function(spec, "--metric")
        return str(found.value)

    assert refused("mine.py") == "--metric takes FILE.py:FUNCTION or module:FUNCTION, not 'mine.py'."
    assert refused("gone.py:f") == "--metric gone.py:f: there is no file gone.py."
    assert refused(f"{path}:acuracy").endswith("mine.py has no function 'acuracy'. Did you mean 'accuracy'?")
    assert "importing no_such_module raised ModuleNotFoundError" in refused("no_such_module:f")
    (tmp_path / "broken.py").write_text("1 +\n")
    assert "importing broken.py raised SyntaxError" in refused("broken.py:f")


def test_labels_are_integers_one_a_sample(add: ir.Model, tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.arange(5, dtype=np.uint8))
    assert read_labels(tmp_path / "labels.npy").dtype == np.int64
    data = {"x": floats(5, 3), "s": np.float32(0)}
    feeds = read_feeds(data, add, labels=tmp_path / "labels.npy")
    assert feeds.labels is not None
    assert feeds.labels.tolist() == [0, 1, 2, 3, 4]
    assert refusal(data, add, labels=np.arange(4)) == "The labels are 4, and the data has 5 samples."
    np.save(tmp_path / "objects.npy", np.array(["a", "b"], object))
    with pytest.raises(BadFeeds, match=r"it holds Python objects, .* save text with \.astype\(str\)"):
        read_labels(tmp_path / "objects.npy")
    with pytest.raises(BadFeeds, match=r"is float32 \[2,1\]; labels are integers, one for each sample"):
        read_labels(floats(2, 1))


# --- random feeds ---


def recorded(model: ir.Model, accept: Callable[[Mapping[str, Any]], bool]) -> tuple[Any, list[Any]]:
    tried: list[Any] = []

    def run(feed: Mapping[str, Any]) -> Mapping[str, Any]:
        tried.append({name: value.shape if value.ndim else int(value) for name, value in feed.items()})
        if not accept(feed):
            raise DoesNotRun("no.")
        return {"y": floats(1)}

    return random_feeds(model, 0, run), tried


def test_open_dimensions_of_one_name_get_one_size_and_batch_is_two(parse: Parse) -> None:
    model = parse("g (float[b, c, t] x, float[b, t] z) => (float[b, c, t] y) { y = Relu(x) }")
    feeds, tried = recorded(model, lambda feed: feed["x"].shape[2] == 16)
    assert [one["x"] for one in tried[:3]] == [(2, 64, 64), (2, 32, 32), (2, 16, 16)]
    assert [one["z"] for one in tried[:3]] == [(2, 64), (2, 32), (2, 16)]
    assert feeds.describe() == "3 random feeds (b=2, c=16, t=16)"
    assert feeds.random
    first, second = (list(feeds) for _ in range(2))
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0]["x"], first[1]["x"])
    assert len(first) == 3


def test_sizes_are_mixed_once_alike_ones_fail_and_batch_falls_to_one(parse: Parse) -> None:
    model = parse("g (float[b, c, t] x) => (float[b, c, t] y) { y = Relu(x) }")
    feeds, tried = recorded(model, lambda feed: feed["x"].shape == (1, 16, 64))
    shapes = [one["x"] for one in tried]
    alike = [size for size in room.SIZES if 8 * size**2 <= room.RANDOM_BYTES]
    assert shapes[: 2 * len(alike)] == [(batch, size, size) for batch in (2, 1) for size in alike]
    assert shapes[2 * len(alike) :][:3] == [(2, 64, 32), (2, 32, 64), (2, 64, 16)]
    assert feeds.describe() == "3 random feeds (b=1, c=16, t=64)"


def test_values_by_type_and_rank(parse: Parse) -> None:
    model = parse(
        "g (float[2, 50] f, int64[2, 50] i, int32[2] v, int64 rate, bool[2] b, string[2] s) => (float y) { y = Sum(f) }"
    )
    feeds, tried = recorded(model, lambda feed: int(feed["rate"]) == 16000)
    assert [one["rate"] for one in tried[:3]] == [1, 8000, 16000]
    [feed, *_] = feeds
    assert set(np.unique(feed["i"])) == {0, 1}
    assert feed["v"].tolist() == [16000, 16000]
    assert feed["b"].tolist() == [True, True]
    assert feed["s"].tolist() == ["", ""]
    assert abs(float(feed["f"].mean())) < 0.5
    assert 0.7 < float(feed["f"].std()) < 1.3


def test_reasons_for_no_feeds(parse: Parse) -> None:
    model = parse("g (float[2, 3] x, int64[1] i) => (float[1, 3] y) { j = Sub(i, i)  k = Sub(j, i)  y = Tile(x, k) }")
    with pytest.raises(NoFeeds, match="no random feed ran; of 3 tried, the first failed: a node Tile: "):
        random_feeds(model, 0)
    model = parse("g (float[2] x) => (float[2] y) { m = Sub(x, x)  y = Div(m, m) }")
    with pytest.raises(NoFeeds, match="all outputs are NaN"):
        random_feeds(model, 0)
    model = parse("g (float[2] x) => (float[2] y) { y = NoSuch(x) }")
    with pytest.raises(NoFeeds, match="the model does not run: No Op registered"):
        random_feeds(model, 0)
    model = parse("g (float[n, 100000, 10000] x) => (float[n] y) { y = ReduceSum(x) }")
    with pytest.raises(NoFeeds, match=r"its inputs take 7,629 MiB"):
        random_feeds(model, 0)
    with pytest.raises(NoFeeds, match="within 0 s"):
        random_feeds(parse("g (float[2] x) => (float[2] y) { y = Relu(x) }"), 0, seconds=0)


def test_real_models_run_on_random_feeds() -> None:
    found = 0
    for package in ("magika", "rapidocr-onnxruntime"):
        for file in importlib.metadata.files(package) or []:
            if file.suffix == ".onnx":
                assert random_feeds(files.load(str(file.locate())), 0).runs == 3
                found += 1
    assert found >= 4
