"""Ctrl-C and SIGTERM for a program: what runs is stopped, what is half-written is removed, and one sentence says so."""

from __future__ import annotations

import _thread
import contextlib
import functools
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar, TypeVar

from ..ir.interrupts import SIGNALS

T = TypeVar("T")

_SHOW_CURSOR = "\x1b[?25h"
_WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_STOPPABLE: weakref.WeakSet[Any] = weakref.WeakSet()


def stoppable(options: T) -> T:
    """Let an interrupt end the run, or the loading of a session, that goes by these options of ONNX Runtime.

    Python hears of a signal only when native code comes back, so a thread asks the native code to come back.
    """
    _STOPPABLE.add(options)
    return options


class Interrupted(KeyboardInterrupt):
    """Not a plain one: where that leaves an ``exec``, Python takes it for unhandled and dies of the signal in the end."""


class Interrupts:
    """``with Interrupts():`` around a whole program raises ``KeyboardInterrupt`` at the first signal, and ends with it.

    Later signals do nothing: the work is already being undone, and that must not be broken off. The exit code is
    128 + the signal: 130 for Ctrl-C, 143 for SIGTERM. Signals that the parent has set to be ignored stay so. Handlers
    are not given back, since the process ends with the block.
    """

    caught: ClassVar[int | None] = None

    def __enter__(self) -> None:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=_stop_native, args=(reader,), daemon=True).start()
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


def _act(number: int, _: FrameType | None) -> None:
    if Interrupts.caught is None:
        Interrupts.caught = number
        raise Interrupted


def _unraisable(hook: Callable[[Any], object], lost: Any) -> None:
    """An interrupt that came where Python can raise nothing, as in a destructor, comes again."""
    number = Interrupts.caught
    if number is None or lost.exc_type is not Interrupted:
        hook(lost)
        return
    Interrupts.caught = None
    threading.Timer(0.01, _thread.interrupt_main, (number,)).start()


def _stop_native(reader: int) -> None:
    while os.read(reader, 1):
        for options in list(_STOPPABLE):
            if hasattr(options, "terminate"):
                options.terminate = True
            else:
                options.set_load_cancellation_flag(True)
