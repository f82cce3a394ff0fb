"""Progress of long work: nothing is shown unless the caller brings a bar, as the command line does on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from ..passes.instruments import Instrument, Step

if TYPE_CHECKING:
    import onnx_ir as ir
    from rich.console import Console

T = TypeVar("T")


class Progress(Instrument):
    """Silent progress: the words of what is going on go nowhere."""

    def say(self, words: str) -> None:
        """What is being done now."""

    def track(self, items: Iterable[T], words: str) -> Iterator[T]:
        """The items, each counted as done when the next is asked for."""
        self.say(words)
        yield from items

    def before(self, step: Step, model: ir.Model) -> None:
        self.say(f"{step.pass_.name or step.pass_}")


class Bar(Progress):
    """A spinner with what is going on, drawn by rich on standard error and gone at the end."""

    def __init__(self, console: Console) -> None:
        self._status = console.status("loading")

    def say(self, words: str) -> None:
        from rich.markup import escape

        self._status.update(escape(words))

    def track(self, items: Iterable[T], words: str) -> Iterator[T]:
        for count, item in enumerate(items, 1):
            self.say(f"{words}, {count} done")
            yield item

    @contextmanager
    def shown(self) -> Iterator[Bar]:
        with self._status:
            yield self
