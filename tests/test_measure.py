import gc
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from penjing.ir import files
from penjing.ir.errors import BadFeeds
from penjing.models import zoo
from penjing.runtime.compare import compare_files
from penjing.runtime.measure import MemoryMeter, bench_files, interleave, latency, median_seconds
from penjing.runtime.session import DoesNotRun, open_session

MLP = str(zoo.path("mlp"))
VALIDATION = zoo.path("mlp").parent / "mnist-validation.npz"
IMAGE = {"image": np.zeros((2, 1, 28, 28), np.float32)}


def test_bench_measures_every_model(tmp_path: Path) -> None:
    files.save(files.load(MLP), tmp_path / "m.onnx", external=True)
    timings, about = bench_files([MLP, str(tmp_path / "m.onnx")], VALIDATION, seconds=0.1)
    assert about == "300 samples of mnist-validation.npz"
    first, second = timings
    assert (first.name, first.ratio, first.threads) == (MLP, 1.0, 1)
    assert min(first.latency_ms, first.load_ms, second.latency_ms, second.load_ms, second.ratio) > 0
    assert first.file_bytes == Path(MLP).stat().st_size
    assert second.file_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert first.rounds == second.rounds >= 5
    json.dumps([timing.as_json() for timing in timings])


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_holds_the_weights() -> None:
    [timing], about = bench_files([MLP], seconds=0.05)
    assert "random feeds" in about
    assert timing.peak_bytes is not None
    assert timing.file_bytes < timing.peak_bytes < timing.file_bytes + 2**26


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_meter_sees_what_was_there_between() -> None:
    gc.collect()  # what earlier tests left would go meanwhile, and count against the block
    with MemoryMeter(interval=0.001) as meter:
        block = np.ones(2**28, np.uint8)  # lives until the meter's last look
    assert meter.peak_bytes is not None
    assert 2**26 <= meter.peak_bytes < 2**29
    assert block[-1] == 1


def test_clocks_have_a_row_a_model_and_a_column_a_round() -> None:
    sessions = [open_session(MLP) for _ in range(3)]
    clocks = interleave(sessions, [IMAGE], seconds=0)
    assert clocks.wall.shape == clocks.cpu.shape == (3, 5)
    assert (clocks.wall > 0).all()
    assert len(median_seconds(sessions, [IMAGE], threads=2, seconds=0)) == 3


def test_latency_of_two_files() -> None:
    found = latency(MLP, MLP, seconds=0.05)
    assert sorted(found) == ["after_ms", "before_ms"]
    assert min(found.values()) > 0


def test_what_cannot_be_timed_is_said() -> None:
    with pytest.raises(BadFeeds, match="no samples"):
        median_seconds([open_session(MLP)], [])
    with pytest.raises(DoesNotRun, match=r"fails while it is timed: .*Invalid input name: x"):
        median_seconds([open_session(MLP)], [IMAGE | {"x": IMAGE["image"]}])


def test_files_are_compared_on_the_same_feeds(tmp_path: Path) -> None:
    model = files.load(MLP)
    model.graph.outputs[0].name = "scores"
    files.save(model, tmp_path / "renamed.onnx")
    comparison, about = compare_files(MLP, MLP, VALIDATION)
    assert comparison.equal
    assert about == "300 samples of mnist-validation.npz"
    comparison, about = compare_files(MLP, str(tmp_path / "renamed.onnx"))
    assert (comparison.missing, comparison.extra, comparison.equal) == (["logits"], ["scores"], False)
    assert "random feeds" in about
    json.dumps(comparison.as_json(), allow_nan=False)
