"""What happens in a process of its own stays there."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from penjing.ir.apart import Gone, apart
from penjing.ir.files import load
from penjing.ir.shapes import infer_shapes, inferred

LIMITS = {"seconds": 20.0, "room": 1 << 28}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and limits are Linux's")


def children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def test_an_answer_of_any_length() -> None:
    for size in (0, 1, 65_537, 5_000_000):
        assert apart(lambda given: given * 2, bytes(size), **LIMITS) == bytes(2 * size)
    assert children() == ""


def test_an_error_comes_back_as_its_message() -> None:
    def fails(_: bytes) -> bytes:
        raise KeyError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"):
        apart(fails, b"", **LIMITS)


def test_crash_hang_and_hunger_end_there() -> None:
    def hungry(_: bytes) -> bytes:
        return np.ones(1 << 28, np.uint8).tobytes()

    def crashes(_: bytes) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        return b""

    def hangs(_: bytes) -> bytes:
        time.sleep(60)
        return b""

    for function, seconds, reason in (
        (hungry, 20, "crashed, or ran"),
        (crashes, 20, "crashed, or ran"),
        (hangs, 0.2, "did"),
    ):
        with pytest.raises(Gone, match=f"it {reason}"):
            apart(function, b"", seconds=seconds, room=1 << 28)
    assert children() == ""


def test_what_it_prints_is_not_seen(capfd: pytest.CaptureFixture[str]) -> None:
    assert apart(lambda _: b"%d" % os.write(2, b"\x1b[2J"), b"", **LIMITS) == b"4"
    assert capfd.readouterr() == ("", "")


def test_shapes_are_inferred_though_a_vector_is_too_long_to_follow(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (int64[4611686018427387904] v, float[N, 3] x) => (float[A, B] y, int64[C] w)
        { one = Constant <value_ints = [1]> ()  w = Sub (v, one)  y = Relu (x) }"""
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    model = load(path)
    found = {value.name: item.dims for value, item in inferred(model).items()}
    assert found["w"] == (1 << 62,)
    assert infer_shapes(model).failure is None
    assert list(model.graph.outputs[0].shape or ())[1] == 3  # a name is kept, a number takes its place


def for_ever() -> bytes:
    while True:
        time.sleep(0.1)


@pytest.mark.parametrize("rest", [lambda: bytes(1 << 22), for_ever])
def test_it_ends_where_its_parent_is_killed(rest: Callable[[], bytes]) -> None:
    parent = os.fork()
    if parent == 0:
        try:
            os.setpgid(0, 0)
            apart(lambda _: os.kill(os.getppid(), signal.SIGKILL) or rest(), b"", **LIMITS)
        finally:
            os._exit(0)
    _, status = os.waitpid(parent, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    for _ in range(500):  # the group is gone when its last process is
        try:
            os.killpg(parent, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    os.killpg(parent, signal.SIGKILL)
    raise AssertionError("the process waits for a reader that is gone")
