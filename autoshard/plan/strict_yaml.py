"""Strict YAML: text from a user → plain dicts, lists, strings, ints, floats, bools, None; with every fault at once, and where it stands.

Stricter than yaml.safe_load, which keeps the last of two equal keys in silence and reads `1e-3` as text, `1:30` as 90 and `no` as
False. Here: duplicate keys, anchors, aliases, tags, several documents and non-text keys are faults; numbers are decimal; only `true` and
`false` are bools; depth and size are limited before anything is built. PyYAML's parser supplies the events; nothing of it makes objects.

>>> data, mark_of = load_strict("rate: 1e-3\\nsizes: [1, 2]\\n", "a.yaml")
>>> data, mark_of(("sizes", 1))
({'rate': 0.001, 'sizes': [1, 2]}, 'a.yaml:2:12')
>>> load_strict("a: 1\\nb: &x 2\\na: 3\\n", "a.yaml")
Traceback (most recent call last):
autoshard.errors.PlanFileError: 2 faults in a.yaml
  a.yaml:2:4: anchors and aliases are not allowed
  a.yaml:3:1: key 'a' a second time
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from ..errors import AutoshardError, PlanFileError

Path = tuple[str | int, ...]

MAX_BYTES = 64 << 20
MAX_DEPTH = 24
MAX_FAULTS = 50
_INT = re.compile(r"[-+]?[0-9]{1,40}\Z")
_FLOAT = re.compile(r"[-+]?([0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][-+]?[0-9]{1,4})?\Z")
_WORDS: dict[str, Any] = {"": None, "~": None, "null": None, "true": True, "false": False}


class Marks:
    """`file:line:column` of a value by its path of keys and indices; of the nearest thing around it if the path isn't there."""

    def __init__(self, filename: str) -> None:
        self.filename = filename
        self.values: dict[Path, tuple[int, int]] = {}
        self.keys: dict[Path, tuple[int, int]] = {}

    def __call__(self, path: Path) -> str:
        return self._text(self.values, path)

    def key(self, path: Path) -> str:
        """Where the key stands, not its value."""
        return self._text(self.keys if path in self.keys else self.values, path)

    def _text(self, table: dict[Path, tuple[int, int]], path: Path) -> str:
        while path and path not in table:
            path = path[:-1]
        line, column = table.get(path, (0, 0))
        return f"{self.filename}:{line + 1}:{column + 1}"


class Faults:
    """Collects what is wrong with a file, so that all of it is told at once."""

    def __init__(self, filename: str, error: type[AutoshardError]) -> None:
        self.filename, self.error = filename, error
        self.found: list[str] = []

    def add(self, where: str, message: str) -> None:
        self.found.append(f"  {where}: {message}")

    def raise_any(self) -> None:
        if self.found:
            count = len(self.found)
            shown = self.found[:MAX_FAULTS] + ([f"  … and {count - MAX_FAULTS} more"] if count > MAX_FAULTS else [])
            raise self.error("\n".join([f"{count} fault{'s' * (count > 1)} in {self.filename}", *shown]))


def load_strict(
    text: str, filename: str, error: type[AutoshardError] = PlanFileError, faults: Faults | None = None
) -> tuple[Any, Marks]:
    """Parse one YAML document. Returns its data and its marks; raises `error` naming every fault with file:line:column. With `faults`,
    those that leave data to go on with are put there instead, so that a reader can tell of its own in the same breath."""
    collected, faults = faults is not None, faults or Faults(filename, error)
    if len(text) > MAX_BYTES:
        faults.add(f"{filename}:1:1", f"{len(text)} characters; at most {MAX_BYTES} are read")
        faults.raise_any()
    builder, broken = _Builder(Marks(filename), faults), True
    try:
        broken = not all(builder.take(event) for event in yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as problem:
        faults.add(_where(problem, filename, text), str(getattr(problem, "problem", None) or getattr(problem, "reason", None) or problem))
    except (ValueError, OverflowError) as problem:  # PyYAML lets bad escapes such as "\UFFFFFFFF" through to chr()
        bad = re.search(r"\\U(?!000|0010)", text)
        faults.add(_place(filename, text, bad.start() if bad else 0), str(problem))
    if broken or not collected:
        faults.raise_any()
    return builder.root, builder.marks


def _where(problem: yaml.YAMLError, filename: str, text: str) -> str:
    mark = getattr(problem, "problem_mark", None)
    return f"{filename}:{mark.line + 1}:{mark.column + 1}" if mark is not None else _place(filename, text, getattr(problem, "position", 0))


def _place(filename: str, text: str, position: int) -> str:
    """Where a character stands."""
    before = text[:position]
    return f"{filename}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


def _at(event: yaml.Event) -> tuple[int, int]:
    mark = event.start_mark
    assert mark is not None
    return mark.line, mark.column


class _Builder:
    """Builds data from parser events, without recursion."""

    def __init__(self, marks: Marks, faults: Faults) -> None:
        self.marks, self.faults = marks, faults
        self.root: Any = None
        self.documents = 0
        # one frame per open container: the container, its path, and the key that waits for its value
        self.stack: list[tuple[Any, Path]] = []
        self.pending: list[str | None] = []

    def take(self, event: yaml.Event) -> bool:
        """Consume one event. False: stop reading."""
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                return self.fault(event, "a second document; one file holds one") and False
        elif isinstance(event, yaml.AliasEvent):
            self.fault(event, "anchors and aliases are not allowed")
            self.put(event, None, is_key=False)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            return self.open(event, {} if isinstance(event, yaml.MappingStartEvent) else [])
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            self.stack.pop()
            self.pending.pop()
        elif isinstance(event, yaml.ScalarEvent):
            self.check_node(event)
            wants_key = bool(self.stack) and isinstance(self.stack[-1][0], dict) and self.pending[-1] is None
            plain = event.implicit[0] and event.style is None
            self.put(event, self.scalar(event) if plain and not wants_key else event.value, is_key=wants_key)
        return True

    def fault(self, event: yaml.Event, message: str) -> bool:
        line, column = _at(event)
        self.faults.add(f"{self.marks.filename}:{line + 1}:{column + 1}", message)
        return True

    def check_node(self, event: Any) -> None:
        if event.anchor is not None:
            self.fault(event, "anchors and aliases are not allowed")
        if event.tag is not None:
            self.fault(event, f"tags are not allowed, found {event.tag!r}")

    def open(self, event: Any, container: Any) -> bool:
        self.check_node(event)
        if len(self.stack) >= MAX_DEPTH:
            self.fault(event, f"nested deeper than {MAX_DEPTH} levels")
            return False
        path = self.put(event, container, is_key=False)
        self.stack.append((container, path))
        self.pending.append(None)
        return True

    def put(self, event: yaml.Event, value: Any, is_key: bool) -> Path:
        """Place a finished scalar or a container just opened; returns its path."""
        at = _at(event)
        if not self.stack:
            self.root = value
            self.marks.values[()] = at
            return ()
        container, path = self.stack[-1]
        if isinstance(container, list):
            container.append(value)
            path = (*path, len(container) - 1)
        elif self.pending[-1] is None:
            if not is_key:
                self.fault(event, "a key must be plain text")
                value = f"<key {len(container)}>"
            elif value in container:
                self.fault(event, f"key {value[:60]!r} a second time")
            self.pending[-1] = value
            container.setdefault(value, None)
            self.marks.keys[(*path, value)] = at
            return (*path, value)
        else:
            key = self.pending[-1]
            container[key], self.pending[-1] = value, None
            path = (*path, key)
        self.marks.values[path] = at
        return path

    def scalar(self, event: Any) -> Any:
        """The meaning of an unquoted word."""
        text = event.value
        if text in _WORDS:
            return _WORDS[text]
        if _INT.match(text):
            return int(text)
        if _FLOAT.match(text):
            number = float(text)
            if not math.isfinite(number):
                self.fault(event, f"{text} is too large a number")
            return number
        return text
