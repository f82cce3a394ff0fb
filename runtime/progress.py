"""Progress of long work: nothing is shown unless the caller brings a bar, as the command line does on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..passes.base import Feeds
from ..passes.instruments import Instrument, Step

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir
    from rich.console import Console

    from ..passes.base import Array


class Progress(Instrument):
    """Silent progress: the words of what is going on go nowhere."""

    def say(self, words: str) -> None:
        """What is being done now."""

    def count(self, done: int, total: int | None) -> None:
        """How much of it is done."""

    def watched(self, feeds: Feeds, words: str) -> Feeds:
        """The same feeds; each walk over them is counted run by run."""
        return _Watched(feeds, words, self)

    def before(self, step: Step, model: ir.Model) -> None:
        self.say(step.pass_.name or str(step.pass_))


@dataclass(frozen=True)
class _Watched:
    feeds: Feeds
    words: str
    progress: Progress

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        self.progress.say(self.words)
        for done, feed in enumerate(self.feeds, 1):
            yield feed
            self.progress.count(done, getattr(self.feeds, "runs", None))


class Bar(Progress):
    """A bar with what is going on, drawn by rich on standard error and gone at the end; off if that is no terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        off = not console.is_terminal
        self._bar = RichProgress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=off)
        self._task = self._bar.add_task("loading", total=None)

    def say(self, words: str) -> None:
        from rich.markup import escape

        self._bar.remove_task(self._task)  # a task's total cannot be taken back
        self._task = self._bar.add_task(escape(words), total=None)

    def count(self, done: int, total: int | None) -> None:
        self._bar.update(self._task, completed=done, total=total)

    @contextmanager
    def shown(self) -> Iterator[Bar]:
        with self._bar:
            yield self
