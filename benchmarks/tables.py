"""Tables of results, for the terminal and for documents.

In: headings and rows of text or numbers. Out: a rich table where rich is installed, and Markdown.

>>> print(Table("t", ["name", "ms"], [["ours", 1.25], ["theirs", None]]).markdown())
| name | ms |
|---|---|
| ours | 1.25 |
| theirs | – |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Table:
    title: str
    headings: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = ["| " + " | ".join(map(text, row)) + " |" for row in (self.headings, *self.rows)]
        return "\n".join([lines[0], "|" + "---|" * len(self.headings), *lines[1:]])

    def show(self, say: Callable[..., Any]) -> None:
        """Print it, by `say`."""
        try:
            from rich.console import Console
            from rich.table import Table as Rich
        except ImportError:
            say("\n".join([self.title, self.markdown(), *self.notes]))
            return
        table = Rich(title=self.title, title_justify="left")
        for i, heading in enumerate(self.headings):
            words = any(isinstance(row[i], str) for row in self.rows)
            table.add_column(heading, justify="left" if words else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*map(text, row))
        console = Console(width=150, highlight=False, markup=False)
        with console.capture() as captured:
            console.print(table)
        say("\n".join([captured.get().rstrip(), *self.notes]))


def text(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
    return str(value).replace("|", "/").replace("\n", " ")
