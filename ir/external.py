"""Tensors whose bytes lie in a file beside the model: opened once, checked, and mapped, so that they cost no memory."""

from __future__ import annotations

import errno
import mmap
import os
import stat

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .address import printable
from .errors import BadFile

Bytes = npt.NDArray[np.uint8]

MAPPED_FROM = 64 << 10
"""Bytes. A smaller file is read: a mapping holds a file descriptor, and some exporters write a file for each tensor."""


class MappedTensor(ir.ExternalTensor):
    """An external tensor over an open mapping: it stays readable when its file is renamed over or removed.

    ``data`` holds its bytes as ONNX stores them, little endian, sub-byte types packed: uint8, read-only.
    """

    __slots__ = ("data",)

    def __init__(self, like: ir.ExternalTensor, folder: str, data: Bytes) -> None:
        super().__init__(
            like.location,
            like.offset,
            data.size,
            like.dtype,
            shape=like.shape,
            name=like.name,
            doc_string=like.doc_string,
            metadata_props=dict(like.metadata_props),
            base_dir=folder,
        )
        self.data = data

    def numpy(self) -> npt.NDArray[np.generic]:
        """The values, read-only and unread until used; types under a byte are unpacked into memory."""
        if self.dtype.bitwidth < 8:
            return ir.PackedTensor(self.data, self.dtype, shape=self.shape).numpy()
        return self.data.view(self.dtype.numpy().newbyteorder("<")).reshape(self.shape.numpy())

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[np.generic]:
        array = self.numpy()
        return array.astype(dtype) if copy or (dtype is not None and dtype != array.dtype) else array

    def tobytes(self) -> bytes:
        return self.data.tobytes()

    def tofile(self, file: object) -> None:
        file.write(self.data.data)  # type: ignore[attr-defined]


class DataFiles:
    """The data files of one model. Nothing outside the model's folder is opened, nor anything but a plain file.

    ``place`` begins each message: the model's path as the user wrote it. Raises ``BadFile``.
    """

    def __init__(self, folder: str, place: str) -> None:
        self.folder = folder
        self.place = place
        self._files: dict[str, Bytes] = {}

    def part(self, tensor: str, location: str, offset: int, length: int) -> Bytes:
        """The bytes at ``[offset, offset + length)`` of the file at ``location``, for the tensor of that name."""
        if location not in self._files:
            self._files[location] = self._open(tensor, location)
        data = self._files[location]
        if offset + length > data.size:
            raise BadFile(
                f"{self.place}: tensor '{printable(tensor)}' needs {length} bytes at offset {offset} of its data file "
                f"'{printable(location)}', which has {data.size}; the file is cut short or not this model's"
            )
        return data[offset : offset + length]

    def _open(self, tensor: str, location: str) -> Bytes:
        def refusal(reason: str) -> BadFile:
            return BadFile(
                f"{self.place}: the data file '{printable(location)}' of tensor '{printable(tensor)}' {reason}"
            )

        if not location or "\0" in location:
            raise refusal("has no usable name; external data need the key 'location'")
        if os.path.isabs(location):
            raise refusal("is an absolute path; data files are read only from the model's own folder")
        base = os.path.realpath(self.folder)
        path = os.path.realpath(os.path.join(base, location))
        if os.path.commonpath((base, path)) != base:
            raise refusal("lies outside the model's folder; copy it into the folder and name it without '..' or links")
        try:
            handle = _open_below(base, os.path.relpath(path, base))
        except FileNotFoundError:
            raise refusal(f"is missing; it belongs beside the model, in {printable(self.folder)}") from None
        except OSError as error:
            raise refusal(f"cannot be opened: {_reason(error)}") from None
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise refusal("is not a regular file")
            if found.st_nlink > 1:
                raise refusal("is a hard link, so it may be a file from elsewhere; replace it by a copy")
            if found.st_size < MAPPED_FROM:
                return np.frombuffer(os.pread(handle, MAPPED_FROM, 0), np.uint8)
            return np.frombuffer(mmap.mmap(handle, 0, access=mmap.ACCESS_READ), np.uint8)
        except OSError as error:
            raise refusal(f"cannot be read: {_reason(error)}") from None
        finally:
            os.close(handle)


def _open_below(base: str, relative: str) -> int:
    """Open ``relative``, which holds no links, step by step: what became a link since that was seen is not followed."""
    plain = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    folder = os.open(base, plain | os.O_DIRECTORY)
    *above, name = relative.split(os.sep)
    try:
        for part in above:
            inner = os.open(part, plain | os.O_DIRECTORY, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(name, plain | os.O_NONBLOCK, dir_fd=folder)  # NONBLOCK: opening a pipe must not wait
    finally:
        os.close(folder)


def _reason(error: OSError) -> str:
    if error.errno == errno.EMFILE:
        return "too many files are open; raise the limit (ulimit -n)"
    return (error.strerror or str(error)).lower()
