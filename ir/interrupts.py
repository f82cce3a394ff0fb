"""Moments that an interrupt must not split: a signal that arrives in one is acted on when it is over."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What asks a process to end and can be answered. Ctrl-C last: it is taken last, and given back last."""


class uninterrupted:
    """``with uninterrupted():`` lets its short block end before a handler written in Python acts on SIGINT or SIGTERM.

    Python acts on signals in its main thread, so in another thread there is nothing to do. Blocks nest.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._arrived: list[int] = []

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for number in self._arrived:
            signal.raise_signal(number)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._arrived.append(number)
