"""Native code that reads a model, in a process of its own: a crash, a hang or a flood of memory there ends there."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

from .interrupts import uninterrupted

_DONE, _RAISED = b"\0", b"\1"
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


class Gone(Exception):
    """The process crashed, or took more time or memory than it had; the message says which, as a clause."""


def apart(function: Callable[[bytes], bytes], given: bytes, *, seconds: float, room: int) -> bytes:
    """``function(given)``, computed in a fork of this process that may take ``seconds`` and ``room`` bytes more.

    Raises ``Gone``, and ``RuntimeError`` with the message of what ``function`` raised. Where the system is not
    Linux, whose limits and forks these are, it is a plain call.
    """
    if sys.platform != "linux":
        return function(given)
    inside, outside = os.pipe()
    child = 0
    try:
        with uninterrupted():  # no interrupt loses the child, or is raised in it
            try:
                child = _fork()
                if child == 0:
                    os.close(inside)  # else it would wait for ever to be read where the parent was killed
                    _answer(function, given, outside, seconds, room)
            finally:
                os.close(outside)
        answer = _read(inside, time.monotonic() + seconds)
    except TimeoutError:
        raise Gone(f"it did not end within {seconds:.0f} s") from None
    finally:
        os.close(inside)
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if not answer:
        raise Gone("it crashed, or ran out of memory")
    if answer[:1] == _RAISED:
        raise RuntimeError(answer[1:].decode(errors="replace"))
    return bytes(memoryview(answer)[1:])


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads: the child only calls function
        try:
            return os.fork()
        except OSError as error:
            raise Gone(f"no process could be started ({error.strerror})") from error


def _read(pipe: int, deadline: float) -> bytearray:
    answer, ready = bytearray(), select.poll()  # select() takes no number over 1023
    ready.register(pipe, select.POLLIN)
    while True:
        if not ready.poll(1000 * max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        part = os.read(pipe, 1 << 20)
        if not part:
            return answer
        answer += part


def _answer(function: Callable[[bytes], bytes], given: bytes, pipe: int, seconds: float, room: int) -> NoReturn:
    """What the child does: it writes to the pipe and ends, and never returns into the caller's stack."""
    try:
        import ctypes
        import faulthandler
        import resource

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)  # it ends with the parent
        faulthandler.disable()  # a crash here is an answer
        signal.set_wakeup_fd(-1)  # the parent's
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        silence = os.open(os.devnull, os.O_WRONLY)  # what native code prints may hold what a terminal acts on
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        with open("/proc/self/statm") as statm:  # the sixth number: pages of data and stack
            limit = int(statm.read().split()[5]) * resource.getpagesize() + room
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds) + 1,) * 2)  # even if the parent was gone before
        try:
            kind, answer = _DONE, function(given)
        except MemoryError:
            os._exit(1)
        except Exception as error:
            kind, answer = _RAISED, (str(error) or type(error).__name__).encode(errors="replace")
        for part in (kind, answer):
            view = memoryview(part)
            while view:
                view = view[os.write(pipe, view) :]
    finally:
        os._exit(0)
