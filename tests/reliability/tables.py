"""Tables of counts for records, and lists of names by reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table: the first column is text, the others are numbers or say so themselves."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def by_reason(title: str, pairs: Iterable[tuple[str, str]], *, listed: str = "names") -> str:
    """Who is out for which reason, from (reason, name): counts as a table, most first, and all names folded away.

    A name counts once for a reason. Empty where there is nobody.
    """
    groups: dict[str, dict[str, None]] = {}
    for reason, name in pairs:
        groups.setdefault(reason, {})[name] = None
    if not groups:
        return f"{title}: none\n"
    ranked = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    everyone = {name for names in groups.values() for name in names}
    counts = table([title, "models"], [*((reason, len(names)) for reason, names in ranked), ("all", len(everyone))])
    lists = "".join(f"- {_cell(reason)}: {', '.join(names)}\n" for reason, names in ranked)
    return f"{counts}\n<details><summary>{listed}</summary>\n\n{lists}\n</details>\n"


def _cell(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
