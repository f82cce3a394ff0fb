"""The errors a user may meet. Each message is a sentence: the place, what was found, what was expected, the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PenjingError(Exception):
    """Bad input or usage: the command line prints the message without a traceback and exits with ``exit_code``."""

    exit_code = 2


class BadFile(PenjingError):
    """A model, data or output file cannot be read, trusted or written."""


class InvalidModel(PenjingError):
    """A model breaks an invariant of the IR; ``problems`` holds one sentence for each."""

    def __init__(self, place: str, problems: list[str]) -> None:
        self.problems = problems
        shown = "\n".join(f"  {problem}" for problem in problems[:10])
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        super().__init__(f"{place} is not a valid model:\n{shown}{more}")


class UsageError(PenjingError):
    """An unknown pass, option, value or name, or options that exclude each other."""


class BadFeeds(PenjingError):
    """Sample data do not fit the model: a name, shape, dtype or value."""


class NeedsData(PenjingError):
    """A pass reads something from its context that the user did not give."""


def one_line(error: BaseException) -> str:
    """Type and message of an error of somebody else's, without its line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the known name closest to ``name``, or an empty string where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
