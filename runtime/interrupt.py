"""Ctrl-C and SIGTERM for a program: what runs is stopped, what is half-written is removed, and one sentence says so."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar, TypeVar

from ..ir.interrupts import SIGNALS

T = TypeVar("T")

_IMPORT_SECONDS = 3.0  # for which an import may go on before it is broken off
_SHOW_CURSOR = "\x1b[?25h"
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_STOPPABLE: weakref.WeakSet[Any] = weakref.WeakSet()


def stoppable(options: T) -> T:
    """Let an interrupt end the run, or the loading of a session, that goes by these options of ONNX Runtime.

    Python hears of a signal only when native code comes back, so a thread asks the native code to come back.
    """
    _STOPPABLE.add(options)
    return options


class Interrupted(KeyboardInterrupt):
    """Not a plain one: where that leaves an ``exec``, Python takes it for unhandled and dies of the signal in the end.

    It is freed when it was dealt with. That this is so before the program ends means that somebody's code dropped it,
    a destructor or native code, so it comes again.
    """

    def __init__(self) -> None:
        Interrupts.raised = weakref.ref(self, _again)


class Interrupts:
    """``with Interrupts():`` around a whole program raises ``KeyboardInterrupt`` at the first signal, and ends with it.

    Later signals do nothing: the work is already being undone, and that must not be broken off. The exit code is
    128 + the signal: 130 for Ctrl-C, 143 for SIGTERM. Signals that the parent has set to be ignored stay so. Handlers
    are not given back, since the process ends with the block.
    """

    caught: ClassVar[signal.Signals | None] = None
    first: ClassVar[float | None] = None  # when, by the monotonic clock
    writer: ClassVar[int]  # of a pipe: each byte is a signal
    raised: ClassVar[weakref.ref[Interrupted] | None] = None

    def __enter__(self) -> None:
        reader, Interrupts.writer = os.pipe()
        os.set_blocking(Interrupts.writer, False)
        signal.set_wakeup_fd(Interrupts.writer, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(reader,), daemon=True).start()
        sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _act)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if Interrupts.caught is None and kind is not None and issubclass(kind, KeyboardInterrupt):
            Interrupts.caught = signal.SIGINT  # somebody else's code raised it
        if Interrupts.caught is not None:
            with contextlib.suppress(OSError):
                cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""
                sys.stderr.write(f"{cursor}penjing: {_WORDS[Interrupts.caught]}; nothing was left half-written.\n")
            sys.exit(128 + Interrupts.caught)


def _act(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    Interrupts.first = Interrupts.first or now
    if Interrupts.caught is None and not (_imports(frame) and now < Interrupts.first + _IMPORT_SECONDS):
        Interrupts.caught = signal.Signals(number)
        raise Interrupted


def _imports(frame: FrameType | None) -> bool:
    """Whether a native module is being imported: some drop an exception there, or are half-made and crash later."""
    while frame is not None:
        if frame.f_code.co_qualname.startswith("ExtensionFileLoader."):
            return True
        frame = frame.f_back
    return False


def _again(_: weakref.ref[Interrupted]) -> None:
    number, Interrupts.caught = Interrupts.caught, None
    if number is not None:
        os.write(Interrupts.writer, bytes([number]))


def _watch(reader: int) -> None:
    """Stop native code at each signal, and send the signal again until it was acted on."""
    while number := os.read(reader, 1)[0]:
        if number not in SIGNALS:
            continue
        for options in list(_STOPPABLE):
            if hasattr(options, "terminate"):
                options.terminate = True
            else:
                options.set_load_cancellation_flag(True)
        time.sleep(0.05)
        if Interrupts.caught is None:
            signal.pthread_kill(threading.main_thread().ident or 0, number)


def _unraisable(hook: Callable[[Any], object], lost: Any) -> None:
    if lost.exc_type is not Interrupted:
        hook(lost)
