"""A file and its data file put in place together or not at all: the old ones stay until the new are on the disk."""

from __future__ import annotations

import contextlib
import os
import re
from types import TracebackType
from typing import BinaryIO


class Replacement:
    """New contents for the file ``path``, written beside it under other names until ``commit``.

    Temporaries are ``NAME.<8 hex>.partial``, data files ``NAME.<12 hex>.data``. Leaving the ``with`` block without a
    commit removes the temporaries and leaves the old file as it was; what a killed process left, the next commit
    sweeps. One process at a time may replace a path.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self.folder, self.name = os.path.split(self.path)
        self._temporaries: list[str] = []

    def __enter__(self) -> Replacement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for temporary in self._temporaries:
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    def temporary(self) -> BinaryIO:
        """A new empty file in the same folder, to be written, synced with ``settle`` and handed to ``commit``."""
        name = f"{self.path}.{os.urandom(4).hex()}.partial"
        file = open(name, "xb")  # noqa: SIM115 - the caller closes it
        self._temporaries.append(name)
        return file

    def commit(self, model: BinaryIO, data: BinaryIO | None = None, location: str = "") -> None:
        """Put ``data`` at ``location`` in the folder, then ``model`` at ``path``, then sweep what neither needs.

        Renaming the model is the moment of change. The data file's name comes from its contents, so at that moment
        the old model still finds the old one.
        """
        beside = os.path.join(self.folder, location)
        new = data is not None and not os.path.lexists(beside)
        try:
            if data is not None:
                os.replace(data.name, beside)
                sync_folder(self.folder)  # the data's name must outlive a power cut that the model's outlives
            os.replace(model.name, self.path)
        except BaseException:
            if new:
                with contextlib.suppress(OSError):
                    os.unlink(beside)
            raise
        sync_folder(self.folder)
        self._sweep(location)

    def _sweep(self, keep: str) -> None:
        ours = re.compile(re.escape(self.name) + r"\.([0-9a-f]{12}\.data|[0-9a-f]{8}\.partial)")
        for name in os.listdir(self.folder):
            if name != keep and ours.fullmatch(name):
                with contextlib.suppress(OSError):  # the new model stands; what cannot go now goes next time
                    os.unlink(os.path.join(self.folder, name))


def settle(file: BinaryIO) -> None:
    """Bring a written file to the disk and close it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def sync_folder(folder: str) -> None:
    """Bring the folder's names to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
