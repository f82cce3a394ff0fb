"""A file and its data file put in place together or not at all: the old ones stay until the new are on the disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import stat
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO

from .address import printable
from .errors import BadFile
from .interrupts import uninterrupted


class Replacement:
    """New contents for the file ``path``, written beside it under other names until ``commit``.

    Temporaries are ``NAME.<8 hex>.partial``, data files ``NAME.<12 hex>.data``. Leaving the ``with`` block without a
    commit removes the temporaries and leaves the old file as it was; what a killed process left, the next commit
    sweeps. A file that was there passes its permissions on to the new ones. A symbolic link at ``path`` is replaced;
    what it points to stays as it is. Of processes that replace one path at the same time each puts its files in place
    whole, and the last one's stay: they take turns by a lock on the folder, and lock their temporaries, for which
    reason nobody takes these for leftovers. (Where the file system has no locks, such processes must not be.)

    Raises ``OSError`` where ``path`` is not to be replaced: a folder, a device or pipe, or without write permission.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)
        self.folder, self.name = os.path.split(self.path)
        self._old = _replaceable(self.path)
        self._temporaries: list[str] = []
        self._locks: list[int] = []  # handles; a lock goes with its handle, at the latest with the process

    def __enter__(self) -> Replacement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with uninterrupted():
            for temporary in self._temporaries:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            while self._locks:
                os.close(self._locks.pop())

    def temporary(self) -> BinaryIO:
        """A new empty file in the same folder, to be written, synced with ``settle`` and handed to ``commit``."""
        name = f"{self.path}.{os.urandom(4).hex()}.partial"
        self._temporaries.append(name)  # first, for an interrupt
        with _locked(self.folder):  # so that nobody sweeps it before it is locked
            file = open(name, "xb")  # noqa: SIM115 - the caller closes it
            self._locks.append(os.dup(file.fileno()))
            _lock(self._locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        if self._old is not None:
            _take_permissions(file.fileno(), self._old)
        return file

    def commit(self, model: BinaryIO, data: BinaryIO | None = None, location: str = "") -> None:
        """Put ``data`` at ``location`` in the folder, then ``model`` at ``path``, then sweep what neither needs.

        Renaming the model is the moment of change. The data file's name comes from its contents, so at that moment
        the old model still finds the old one. Raises ``NotSynced`` where the files are in place, but the disk did not
        confirm it; nothing is swept then.
        """
        with _locked(self.folder) as folder, uninterrupted():
            self._commit(folder, model, data, location)

    def _commit(self, folder: int, model: BinaryIO, data: BinaryIO | None, location: str) -> None:
        beside = os.path.join(self.folder, location)
        new = data is not None and not os.path.lexists(beside)
        try:
            if data is not None:
                os.replace(data.name, beside)
                _sync_folder(folder)  # the data's name must outlive a power cut that the model's outlives
            os.replace(model.name, self.path)
        except BaseException as error:  # an interrupt may come just after the model was renamed
            if new and (isinstance(error, OSError) or os.path.lexists(model.name)):
                with contextlib.suppress(OSError):
                    os.unlink(beside)
            raise
        self._temporaries.clear()
        try:
            _sync_folder(folder)
        except OSError as error:
            raise NotSynced(error.errno, error.strerror) from error
        with contextlib.suppress(OSError):
            self._sweep(location)

    def _sweep(self, keep: str) -> None:
        """Remove other data files and temporaries of this path; what cannot go now goes next time.

        A data file that another model of the folder names stays: the old model may have been copied.
        """
        ours = re.compile(re.escape(self.name) + r"\.([0-9a-f]{12}\.data|[0-9a-f]{8}\.partial)")
        names = os.listdir(self.folder)
        for name in names:
            if name == keep or not ours.fullmatch(name):
                continue
            path = os.path.join(self.folder, name)
            with contextlib.suppress(OSError):
                if name.endswith(".data"):
                    others = (os.path.join(self.folder, other) for other in names if other != self.name)
                    wanted = any(_mentions(other, name.encode()) for other in others if other.endswith(".onnx"))
                else:
                    wanted = _is_locked(path)
                if not wanted:
                    os.unlink(path)


class NotSynced(OSError):
    """The new files are in place, but a power cut may bring the old ones back."""


@contextlib.contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an ``OSError`` of replacing the file ``path`` into a ``BadFile`` that says what is the matter."""
    try:
        yield
    except NotSynced as error:
        raise BadFile(
            f"{printable(os.fspath(path))} is in place, but the disk did not confirm it: {reason_of(error)}; save it "
            "again"
        ) from error
    except OSError as error:
        folder = os.path.dirname(os.path.abspath(path))
        if error.errno == errno.ENOENT and not os.path.isdir(folder):
            reason = f"there is no folder {printable(folder)}; make it first"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full; what was there before is untouched"
        else:
            reason = reason_of(error)
        raise BadFile(f"{printable(os.fspath(path))} cannot be written: {reason}") from error


def reason_of(error: OSError) -> str:
    """What the system says, as a clause."""
    return (error.strerror or str(error)).lower()


def replace_file(path: str | os.PathLike[str], contents: bytes) -> None:
    """Let the file ``path`` hold ``contents``, or what it held before, whatever happens. Raises ``BadFile``.

    A link (``/dev/stdout`` is one), device or pipe is written to instead.
    """
    if os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path)):
        with explained(path), open(path, "wb") as plain:
            plain.write(contents)
        return
    with explained(path), Replacement(path) as replacement:
        file = replacement.temporary()
        with file:
            file.write(contents)
            settle(file)
        replacement.commit(file)


def settle(file: BinaryIO) -> None:
    """Bring a written file to the disk and close it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _mentions(path: str, words: bytes) -> bool:
    """Whether a plain file holds ``words``."""
    if not os.path.isfile(path) or not os.path.getsize(path):
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return mapped.find(words) >= 0


def _replaceable(path: str) -> os.stat_result | None:
    """What is known of the plain file ``path``; None where there is none, or a link.

    Raises ``OSError`` if it must stay: renaming asks permission of the folder only, so the file's own is asked here.
    """
    try:
        followed, found = os.stat(path), os.lstat(path)
    except OSError:
        return None
    if stat.S_ISDIR(followed.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(followed.st_mode):
        raise OSError(errno.EINVAL, "it is a device or a pipe")
    if stat.S_ISLNK(found.st_mode):
        return None
    if not found.st_mode & 0o222:
        mode = stat.S_IMODE(found.st_mode)
        raise PermissionError(
            errno.EACCES, f"it is write-protected (mode {mode:04o}); allow writing or name another file"
        )
    return found


def _take_permissions(handle: int, old: os.stat_result) -> None:
    """Give an open file the owner and the permissions of another, as far as this process may."""
    with contextlib.suppress(OSError):
        os.fchown(handle, old.st_uid, old.st_gid)
    with contextlib.suppress(OSError):
        os.fchmod(handle, stat.S_IMODE(old.st_mode) & 0o777)


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[int]:
    """A handle of the folder, whose lock is waited for and held: it is never held for longer than a commit."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int, operation: int) -> None:
    """Lock an open file or folder; without a lock where the file system has none."""
    with contextlib.suppress(OSError):
        fcntl.flock(handle, operation)


def _sync_folder(folder: int) -> None:
    """Bring the names in an open folder to the disk, where the file system can."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def _is_locked(path: str) -> bool:
    """Whether a living process holds the temporary ``path``."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False
