"""A save puts the whole new model in place or leaves the old one, whatever stops it; what it may replace, and how."""

import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from reliability.kills import check_no_orphans, check_tidy, digests, end, fork, model, run_apart, which

from penjing.cli import main
from penjing.ir.atomic import NotSynced, replace_file
from penjing.ir.errors import BadFile
from penjing.ir.files import load, save
from penjing.ir.weights import weights

A, B = model(1, 3, 256), model(2, 2, 300)
KNOWN = {"A": digests(A), "B": digests(B)}


# Killed ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("form", ["external", "inline"])
def test_killed_at_every_step(form: str, when: str) -> None:
    found = run_apart(f"{form}-{when}")
    writes = found["calls"].count("write")
    # What holds the bytes is on the disk before its name, and the data's name before the model's.
    if form == "external":
        expected = ["create", "fchmod", *["write"] * (writes - 1), "fsync", "create", "fchmod", "write", "fsync"]
        expected += ["replace", "fsync", "replace", "fsync", "unlink"]
    else:
        expected = ["create", "fchmod", *["write"] * writes, "fsync", "replace", "fsync"]
    assert found["calls"] == expected
    commit = len(expected) - 1 - expected[::-1].index("replace")
    changed = commit + (when == "before")  # killed before the last rename: the old model; after it: the new one
    assert found["held"] == "A" * changed + "B" * (len(expected) - changed)


def test_killed_at_random_moments() -> None:
    found = run_apart("few", 20)
    assert sum(one["kills"] for one in found.values()) == 20


def test_two_at_once() -> None:
    assert run_apart("race")["saves"] == 40


def test_data_that_a_copied_model_names_stay(tmp_path: Path) -> None:
    save(A, tmp_path / "m.onnx", external=True)
    shutil.copy(tmp_path / "m.onnx", tmp_path / "backup.onnx")
    save(B, tmp_path / "m.onnx", external=True)
    assert digests(load(tmp_path / "backup.onnx")) == KNOWN["A"]
    os.unlink(tmp_path / "backup.onnx")
    save(B, tmp_path / "m.onnx", external=True)
    assert len(os.listdir(tmp_path)) == 2


def test_unlike_data_have_unlike_names(tmp_path: Path) -> None:
    w = np.random.default_rng(0).normal(size=(64, 64))
    flipped = w.copy()
    flipped[0, [1, 3]] *= -1
    names = []
    for array in (w, -w, flipped):
        value = ir.Value(name="w", const_value=ir.Tensor(array, name="w"))
        y = ir.node("Identity", [value])
        y.outputs[0].name = "y"
        graph = ir.Graph([], y.outputs, nodes=[y], initializers=[value], opset_imports={"": 17}, name="g")
        save(ir.Model(graph, ir_version=8), tmp_path / "m.onnx", external=True)
        names += [name for name in os.listdir(tmp_path) if name.endswith(".data")]
    assert len(set(names)) == 3


# Refused space --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["external", "inline"])
def test_every_call_fails_once_on_a_full_disk(form: str) -> None:
    found = run_apart(f"{form}-full")
    assert set(found["held"]) == {"A", "B"}


def mounted(folder: Path, options: str, script: str, *arguments: str | Path) -> None:
    """Run a Python script in a mount namespace of its own, ``folder`` being a mount with these options."""
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("mounting needs root and unshare")
    shell = f'mount {options} && exec "$0" "$@"'
    words = ["unshare", "-m", "sh", "-c", shell, sys.executable, "-c", script, str(folder), *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if "mount" in done.stderr.partition("\n")[0] or "unshare" in done.stderr.partition("\n")[0]:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr


FULL = """
import os, sys
from penjing.cli import main
from penjing.ir.errors import BadFile
from penjing.ir.files import load, save
folder, source, command = sys.argv[1:]
path = os.path.join(folder, "m.onnx")
for external in (True, False):
    for name in os.listdir(folder):
        os.unlink(os.path.join(folder, name))
    save(load(source + "/a.onnx"), path, external=external)
    before = {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}
    if command:
        words = ["run", source + "/large.onnx", "-o", path, "--force", "-p", "unify-names", "--check", "off"]
        try:
            main(words)
        except SystemExit as done:
            assert done.code == 2, done.code
    else:
        try:
            save(load(source + "/large.onnx"), path, external=external)
            raise AssertionError("it fits")
        except BadFile as error:
            expected = f"{path} cannot be written: the disk is full; what was there before is untouched"
            assert str(error) == expected, error
    assert {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)} == before
"""


@pytest.mark.parametrize("command", ["", "command"])
def test_a_disk_that_is_really_full(tmp_path: Path, command: str) -> None:
    """A file system of 2 MB, an old model of 0.8 MB and a new one of 4 MB."""
    folder, source = tmp_path / "disk", tmp_path / "source"
    folder.mkdir()
    source.mkdir()
    save(A, source / "a.onnx")
    save(model(3, 4, 512), source / "large.onnx")
    mounted(folder, f"-t tmpfs -o size=2m tmpfs {folder}", FULL, source, command)


@pytest.mark.parametrize("external", [True, False])
def test_a_limit_on_the_size_of_files(tmp_path: Path, external: bool) -> None:
    path = tmp_path / "m.onnx"
    save(A, path, external=external)

    def refused() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        with pytest.raises(BadFile, match="cannot be written: file too large"):
            save(B, path, external=external)

    assert end(fork(refused)) == 0
    check_tidy(path, external)
    assert which(path, KNOWN) == "A"


# Places that cannot be written ----------------------------------------------------------------------------------------


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user reaches, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.parametrize("old", [True, False])
def test_a_folder_without_write_permission(open_folder: Path, old: bool) -> None:
    path = open_folder / "m.onnx"
    if old:
        save(A, path, external=True)
    before = sorted(os.listdir(open_folder))

    def refused() -> None:
        if os.geteuid() == 0:  # whom no permission binds
            os.setuid(65534)
        with pytest.raises(BadFile, match=r"m.onnx cannot be written: permission denied$"):
            save(B, path)

    os.chmod(open_folder, 0o555)
    try:
        assert end(fork(refused)) == 0
    finally:
        os.chmod(open_folder, 0o755)
    assert sorted(os.listdir(open_folder)) == before


READ_ONLY = """
import sys
from penjing.ir.errors import BadFile
from penjing.ir.files import load, save
path = sys.argv[1] + "/m.onnx"
model = load(path)
for target in (path, sys.argv[1] + "/new.onnx"):
    try:
        save(model, target)
        raise AssertionError("written")
    except BadFile as error:
        assert str(error) == f"{target} cannot be written: read-only file system", error
"""


def test_a_file_system_that_is_read_only(tmp_path: Path) -> None:
    save(A, tmp_path / "m.onnx", external=True)
    mounted(tmp_path, f"--bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path}", READ_ONLY)
    check_tidy(tmp_path / "m.onnx", True)


def test_what_is_no_place_for_a_model(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"cannot be written: there is no folder .*none; make it first$"):
        save(A, tmp_path / "none" / "m.onnx")
    with pytest.raises(BadFile, match=r"cannot be written: it is a folder$"):
        save(A, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadFile, match=r"cannot be written: it is a device or a pipe$"):
        save(A, tmp_path / "pipe")
    with pytest.raises(BadFile, match=r"cannot be written: it is a device or a pipe$"):
        save(A, "/dev/null")
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_write_protected_file_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    save(A, path, external=True)
    path.chmod(0o444)
    with pytest.raises(BadFile, match=r"it is write-protected \(mode 0444\); allow writing or name another file$"):
        save(B, path)
    with pytest.raises(SystemExit) as done:
        main(["run", str(path), "-o", str(path), "--force", "-p", "unify-names"])
    assert done.value.code == 2
    assert "is write-protected; allow writing" in capsys.readouterr().err
    check_tidy(path, True)
    assert which(path, KNOWN) == "A"


# What it replaces -----------------------------------------------------------------------------------------------------


def test_permissions_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    old = os.umask(0o027)
    try:
        save(A, path, external=True)
        assert {stat.S_IMODE(item.stat().st_mode) for item in tmp_path.iterdir()} == {0o640}
        path.chmod(0o604)
        save(B, path, external=True)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(item.stat().st_mode) for item in tmp_path.iterdir()} == {0o604}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_the_owner_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(A, path, external=True)
    os.chown(path, 1234, 4321)
    save(B, path, external=True)
    assert {(item.stat().st_uid, item.stat().st_gid) for item in tmp_path.iterdir()} == {(1234, 4321)}


def test_a_link_is_replaced_and_what_it_names_stays(tmp_path: Path) -> None:
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    elsewhere.mkdir()
    here.mkdir()
    save(A, elsewhere / "m.onnx")
    before = (elsewhere / "m.onnx").read_bytes()
    for target in (elsewhere / "m.onnx", elsewhere / "nothing"):
        link = here / "m.onnx"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        save(B, link, external=True)
        assert not link.is_symlink()
        check_tidy(link, True)
        assert which(link, KNOWN) == "B"
    assert os.listdir(elsewhere) == ["m.onnx"]
    assert (elsewhere / "m.onnx").read_bytes() == before


def test_its_own_data_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    save(A, path, external=True)
    (data,) = tmp_path.glob("*.data")
    (tmp_path / "link").symlink_to(data)
    loaded = load(path)
    for value in loaded.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.Tensor(value.const_value.numpy() + 1)  # nothing of the file is left in it
    for target in (data, tmp_path / "link"):
        with pytest.raises(BadFile, match="holds weights of the model that is to be saved; name another file"):
            save(loaded, target)
        with pytest.raises(SystemExit) as done:
            main(["run", str(path), "-o", str(target), "--force", "-p", "prune-magnitude{sparsity=0.5}"])
        assert done.value.code == 2
        assert "holds weights of the model" in capsys.readouterr().err
    assert which(path, KNOWN) == "A"


def test_over_a_partner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not by the command line. In Python it is no harm: what is loaded stays mapped."""
    a, b = tmp_path / "a.onnx", tmp_path / "b.onnx"
    save(A, a, external=True)
    save(B, b, external=True)
    with pytest.raises(SystemExit) as done:
        main(["run", str(a), "--with", f"b={b}", "-o", str(b), "--force", "-p", "unify-names", "--check", "off"])
    assert done.value.code == 2
    assert "are the same file" in capsys.readouterr().err
    partner = load(b)
    save(load(a), b)
    assert digests(partner) == KNOWN["B"]
    assert which(b, KNOWN) == "A"
    assert len(list(tmp_path.glob("b.onnx.*"))) == 1


# Never more files or bytes than the model -----------------------------------------------------------------------------


def test_saving_again_leaves_no_file_and_no_byte_behind(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(A, path, external=True)
    first = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    for _ in range(3):
        save(load(path), path)
        check_tidy(path, True)
        assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == first
    for form in (False, True, None, False):
        save(load(path), path, external=form)
        check_tidy(path, form is not False)
        assert which(path, KNOWN) == "A"
    save(A, path, external=True)
    smaller = load(path)
    for weight in weights(smaller):
        weight.replace(np.ascontiguousarray(weight.array()[:, :200]))
    save(smaller, path)
    check_tidy(path, True)
    (data,) = tmp_path.glob("*.data")
    assert data.stat().st_size < len(first[next(name for name in first if name.endswith(".data"))])
    assert check_no_orphans(path) < 1 / 16


# When it is not certain -----------------------------------------------------------------------------------------------


def test_the_last_sync_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a power cut may bring the old model back, so its data must stay."""
    path = tmp_path / "m.onnx"
    save(A, path, external=True)
    old = set(os.listdir(tmp_path))
    calls, fsync = [0], os.fsync

    def failing(handle: int) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise OSError(errno.EIO, "Input/output error")
        fsync(handle)

    monkeypatch.setattr("os.fsync", failing)
    with pytest.raises(BadFile) as caught:
        save(B, path, external=True)
    sentence = "is in place, but the disk did not confirm it: input/output error; save it again"
    assert str(caught.value) == f"{path} {sentence}"
    assert isinstance(caught.value.__cause__, NotSynced)
    assert which(path, KNOWN) == "B"
    assert old < set(os.listdir(tmp_path))
    save(B, path, external=True)
    check_tidy(path, True)


def test_an_interrupt_just_after_the_last_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace = tmp_path / "m.onnx", os.replace

    def interrupted(source: str, target: str) -> None:
        replace(source, target)
        if target == str(path):
            raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(B, path, external=True)
    check_tidy(path, True)
    assert which(path, KNOWN) == "B"


def test_a_temporary_of_a_living_process_is_no_leftover(tmp_path: Path) -> None:
    from penjing.ir.atomic import Replacement

    path = tmp_path / "m.onnx"
    dead = tmp_path / "m.onnx.01234567.partial"
    dead.touch()
    with Replacement(path) as other, other.temporary() as file:
        file.write(b"new")
        save(A, path)
        assert not dead.exists()
        assert os.path.exists(file.name)
    assert os.listdir(tmp_path) == ["m.onnx"]


# Reports --------------------------------------------------------------------------------------------------------------


def test_a_small_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    replace_file(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(BadFile, match="cannot be written: the disk is full"):
            replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["report.json"]
    reader, writer = os.pipe()
    replace_file(f"/dev/fd/{writer}", b"told")
    assert os.read(reader, 10) == b"told"
