"""What `autoshard train` reads: a YAML file and `--set a.b=c` → a `Config`, or every fault at once with file:line:column.

The dataclasses below are the format: a field's type, bounds, default and comment stand in one place, and reading, checking and
`--print-config` all follow from them. No torch here.

>>> config = parse("model: {source: gpt.py:build}\\ndata: {sources: [{path: a.txt}]}\\nrun: {steps: 7}", "a.yaml")
>>> config.run.steps, config.optimizer.lr
(7, 0.0003)
>>> parse("model: {source: 1}\\nrun: {steps: -7, stepz: 1}\\ndata: {sources: [{path: a.txt}]}", "a.yaml")
Traceback (most recent call last):
autoshard.errors.ConfigError: 3 faults in a.yaml
  a.yaml:1:17: expected text, found the number 1
  a.yaml:2:18: unknown key 'stepz'; expected steps, seed, log_every, max_nonfinite
  a.yaml:2:14: expected at least 1, found -7
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import AutoshardError, ConfigError
from .mesh import Mesh
from .plan.strict_yaml import Faults, Marks, load_strict

MAX_FILE = 1 << 20
MAX_INT = 1 << 53
At = tuple[str | int, ...]
_MISSING = object()


def key(default: Any, comment: str, **bounds: Any) -> Any:
    """A field: its default (or `...`: it must be given), what it means, and `low`, `high`, `positive`, `choices`."""
    made: dict[str, Any] = {"metadata": {"comment": comment, "required": default is ..., **bounds}}
    if default is ...:
        return field(default=typing.cast(Any, None), **made)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), **made)
    return field(default=default, **made)


def section(cls: type, comment: str) -> Any:
    return field(default_factory=cls, metadata={"comment": comment, "required": False})


@dataclass
class Model:
    source: str = key(..., "file.py:function, a Hugging Face config.json or its folder, or a preset (llama3-8b, ...)")
    arguments: dict[str, Any] = key({}, "keyword arguments of the function, or keys of the config to override")
    dtype: str | None = key(None, "of the parameters; null: as the model makes them", choices=("float32", "bfloat16", "float16", "float64"))
    pretrained: str | None = key(None, "a folder of Hugging Face weights to start from")
    deferred: bool = key(False, "make the weights in shards, never whole on one host")


@dataclass
class DataSource:
    path: str = key(..., "a file, a folder of files, or a pattern such as corpus/**/*.txt; for megatron the path without .bin")
    format: str = key(
        "text", "text (tokenized here), tokens (raw token ids) or megatron (.bin and .idx)", choices=("text", "tokens", "megatron")
    )
    dtype: str = key("uint16", "of raw token ids", choices=("uint8", "uint16", "uint32", "int32"))
    weight: float = key(1.0, "its part of the samples, against the other sources'", positive=True)


@dataclass
class Data:
    sources: list[DataSource] = key(..., "what to train on; several are blended by weight")
    tokenizer: str = key("bytes", "bytes, or a Hugging Face tokenizer's folder")
    batch: int = key(8, "sequences in the global batch of a step; any number, also one that ranks don't divide", low=1)
    seq: int = key(128, "tokens in a sequence", low=1)
    order: str = key(
        "random", "random windows, shuffled (each window once an epoch) or sequential", choices=("random", "shuffled", "sequential")
    )
    held_out: float = key(0.05, "the last part of each source, kept for evaluation (0: none)", low=0, high=0.5)
    fields: dict[str, Any] = key({}, "the model's arguments and what fills each: tokens, or next (one place further); {}: by their names")


@dataclass
class Group:
    match: str = key(..., "parameters whose name matches this pattern (as files: *norm*)")
    lr: float | None = key(None, "their own learning rate", low=0)
    weight_decay: float | None = key(None, "their own weight decay", low=0)


@dataclass
class Optimizer:
    lr: float = key(3e-4, "peak learning rate of AdamW", low=0)
    betas: list[float] = key([0.9, 0.95], "decay of the two moments", low=0, high=0.999999, length=2)
    eps: float = key(1e-8, "added to the root of the second moment", positive=True)
    weight_decay: float = key(0.1, "of every parameter but those of no_decay", low=0)
    no_decay: list[str] = key(["*bias", "*norm*"], "patterns of names without weight decay; those that match nothing are passed over")
    groups: list[Group] = key([], "parameters with options of their own; the first pattern that matches decides, no_decay comes last")
    clip: float = key(1.0, "limit of the gradient's global norm (0: none)", low=0)
    masters: bool = key(True, "step parameters of low precision in float32")


@dataclass
class Schedule:
    kind: str = key("cosine", "after the warm-up: cosine, linear or constant", choices=("cosine", "linear", "constant"))
    warmup: int = key(0, "steps over which the learning rate rises", low=0)
    floor: float = key(0.1, "the part of the peak at which it ends", low=0, high=1)


@dataclass
class Run:
    steps: int = key(100, "steps in all, those before a resume included; the schedule ends with them", low=1)
    seed: int = key(0, "of weights, data and dropout", low=0)
    log_every: int = key(10, "steps between metrics", low=1)
    max_nonfinite: int = key(5, "stop after so many steps in a row whose loss or gradient isn't finite (each is skipped)", low=1)


@dataclass
class Parallel:
    mesh: str | None = key(None, 'degrees to hold fixed, as "dp=2 tp=2"; null: the planner chooses')
    cluster: str | None = key(None, "a YAML file or a catalogue name with a count (h100x8); null: this machine")
    plan: str | None = key(None, "a plan's file (autoshard plan --save) instead of a search")
    microbatches: int | None = key(None, "their count; null: the planner chooses", low=1)
    pins: dict[str, Any] = key(
        {}, "decisions to hold fixed: schedule, cuts, zero, storage, ops, divide, merge, buckets, kernels, precision"
    )
    device: str | None = key(None, "cpu or cuda; null: a GPU where there is one", choices=("cpu", "cuda"))
    compile: bool | None = key(None, "whether graphs go through torch.compile; null: on cuda")


@dataclass
class Evaluation:
    every: int = key(0, "steps between evaluations (0: only at the end, where there is something held out)", low=0)
    batches: int = key(8, "batches that an evaluation takes, the same ones each time", low=1)
    sources: list[DataSource] = key([], "what to evaluate on, instead of what data.held_out keeps")


@dataclass
class Checkpoints:
    folder: str | None = key(None, "where they go; null: none are written")
    every: int = key(0, "steps between checkpoints (0: only at the end, and when told to stop)", low=0)
    keep: int | None = key(3, "how many to keep (null: all)", low=1)
    background: bool = key(False, "write them beside training, from a copy in host memory; one that fails ends the run at the next")


@dataclass
class Metrics:
    file: str | None = key("metrics.jsonl", "one JSON object a line; begun anew unless the run is resumed")
    tensorboard: str | None = key(None, "a folder for TensorBoard (needs the package tensorboard)")
    wandb: str | None = key(None, "a Weights & Biases project (needs the package wandb); a resumed run goes on there")


@dataclass
class Config:
    model: Model = section(Model, "what is trained")
    data: Data = section(Data, "on what")
    optimizer: Optimizer = section(Optimizer, "AdamW")
    schedule: Schedule = section(Schedule, "the learning rate over the steps")
    run: Run = section(Run, "how long")
    parallel: Parallel = section(Parallel, "on which ranks")
    evaluation: Evaluation = section(Evaluation, "the loss on text that is never trained on")
    checkpoints: Checkpoints = section(Checkpoints, "to resume from")
    metrics: Metrics = section(Metrics, "where they are written")


# ---- reading --------------------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a file and apply `a.b=c` overrides. Raises ConfigError with every fault."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes; a config has at most {MAX_FILE}", where=f"{path}:1:1")
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise ConfigError("there is no such config", where=f"{path}:1:1", hint="autoshard train --print-config writes one") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read the config: {error}", where=f"{path}:1:1") from error
    return parse(text, str(path), overrides)


def parse(text: str, filename: str = "config", overrides: Sequence[str] = ()) -> Config:
    """Read YAML text. Raises ConfigError."""
    faults = Faults(filename, ConfigError)
    data, marks = load_strict(text, filename, ConfigError, faults)
    reader = _Reader({} if data is None else data, marks, faults)
    for override in overrides:
        reader.override(override)
    config = reader.section(Config, ())
    if config is not None and not reader.faults.found:
        _check(config, reader)
    reader.faults.raise_any()
    assert isinstance(config, Config)
    return config


def value_of(text: str, filename: str) -> Any:
    """The meaning of one value on a command line. Raises ConfigError."""
    return load_strict(text, filename, ConfigError)[0]


class _Reader:
    """Data → dataclasses. Every fault is noted, so that one pass finds them all."""

    def __init__(self, data: Any, marks: Marks, faults: Faults) -> None:
        self.data, self.marks, self.faults = data, marks, faults
        self.overridden: dict[At, str] = {}

    def override(self, text: str) -> None:
        path, equals, value = text.partition("=")
        where = f"--set {text}"
        if not equals or not path:
            self.faults.add(where, "expected a.b=value")
            return
        try:
            found = value_of(value, where)
        except ConfigError as error:
            self.faults.found += str(error).splitlines()[1:]
            return
        keys: At = tuple(int(k) if k.isdigit() else k for k in path.split("."))
        at = self.data
        for i, k in enumerate(keys):
            last = i == len(keys) - 1
            if isinstance(at, dict) and isinstance(k, str):
                at = at.setdefault(k, {} if not last else None) if not last else _put(at, k, found)
            elif isinstance(at, list) and isinstance(k, int) and k < len(at):
                at = at[k] if not last else _put(at, k, found)
            else:
                self.faults.add(where, f"there is no {'.'.join(map(str, keys[: i + 1]))}")
                return
            if at is None and not last:
                self.faults.add(where, f"{'.'.join(map(str, keys[: i + 1]))} holds nothing")
                return
        self.overridden[keys] = where

    def where(self, at: At, of_key: bool = False) -> str:
        for n in range(len(at), 0, -1):
            if at[:n] in self.overridden:
                return self.overridden[at[:n]]
        return self.marks.key(at) if of_key else self.marks(at)

    def fault(self, at: At, message: str, of_key: bool = False) -> None:
        self.faults.add(self.where(at, of_key), message)

    def get(self, at: At) -> Any:
        found = self.data
        for k in at:
            found = found[k]
        return found

    def section(self, cls: type, at: At) -> Any:
        """One dataclass, or None where there is a fault in it."""
        found = self.get(at)
        if not isinstance(found, dict):
            self.fault(at, f"expected keys and values, found {_what(found)}")
            return None
        fields = {f.name: f for f in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        for name in found:
            if name not in fields:
                self.fault((*at, name), f"unknown key {str(name)[:60]!r}; expected {', '.join(fields)}", of_key=True)
        values = {}
        for name, f in fields.items():
            inner = _section_of(hints[name])
            if name not in found and inner is not None and _has_required(inner):
                self.fault(at, f"{name!r} is missing")
            elif name in found and (found[name] is not None or not inner):
                values[name] = self.value(hints[name], (*at, name), f.metadata)
            elif f.metadata.get("required"):
                self.fault(at, f"{name!r} is missing")
        return cls(**{k: v for k, v in values.items() if v is not _MISSING})

    def value(self, hint: Any, at: At, meta: Mapping[str, Any]) -> Any:
        found = self.get(at)
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if found is None:
            if type(None) in options:
                return None
            self.fault(at, "expected a value, found nothing")
            return _MISSING
        hint = next(o for o in options if o is not type(None))
        inner = _section_of(hint)
        if inner is not None:
            return self.section(inner, at) or _MISSING
        origin = typing.get_origin(hint)
        if origin is list:
            return self.list(typing.get_args(hint)[0], at, meta)
        if origin is dict:
            if isinstance(found, dict):
                return found
            self.fault(at, f"expected keys and values, found {_what(found)}")
            return _MISSING
        return self.scalar(hint, at, meta)

    def list(self, of: Any, at: At, meta: Mapping[str, Any]) -> Any:
        found = self.get(at)
        if not isinstance(found, list):
            self.fault(at, f"expected a list, found {_what(found)}")
            return _MISSING
        if meta.get("length", len(found)) != len(found):
            self.fault(at, f"expected {meta['length']} values, found {len(found)}")
        if meta.get("required") and not found:
            self.fault(at, "expected at least one")
        return [v for v in (self.value(of, (*at, i), meta) for i in range(len(found))) if v is not _MISSING]

    def scalar(self, hint: type, at: At, meta: Mapping[str, Any]) -> Any:
        found = self.get(at)
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        fits = isinstance(found, (int, float) if hint is float else hint) and (hint is bool or not isinstance(found, bool))
        if not fits:
            self.fault(at, f"expected {names[hint]}, found {_what(found)}")
            return _MISSING
        low, high = meta.get("low"), meta.get("high", MAX_INT if hint is int else None)
        if hint in (int, float):
            if meta.get("positive") and found <= 0:
                self.fault(at, f"expected more than 0, found {found}")
            elif low is not None and found < low:
                self.fault(at, f"expected at least {low}, found {found}")
            elif high is not None and found > high:
                self.fault(at, f"expected at most {high}, found {found}")
            elif hint is int or abs(found) < 1e300:
                return hint(found)
            else:
                self.fault(at, f"{found} is too large a number")
            return _MISSING
        if hint is str and (not found.strip() or "\0" in found):
            self.fault(at, "expected text, found nothing" if not found.strip() else "expected text without a zero byte")
            return _MISSING
        if "choices" in meta and found not in meta["choices"]:
            self.fault(at, f"expected one of {', '.join(meta['choices'])}, found {found!r}")
            return _MISSING
        return found


def _check(config: Config, reader: _Reader) -> None:
    """What one field can't say alone."""
    if config.schedule.warmup > config.run.steps:
        reader.fault(("schedule", "warmup"), f"a warm-up of {config.schedule.warmup} steps in a run of {config.run.steps}")
    mb = config.parallel.microbatches
    if mb is not None and config.data.batch % mb:
        reader.fault(("parallel", "microbatches"), f"a batch of {config.data.batch} doesn't divide into {mb} microbatches")
    if config.parallel.mesh is not None:
        try:
            Mesh.of(dict(zip(*(lambda m: (m.names, m.sizes))(Mesh.parse(config.parallel.mesh)), strict=True)))
        except AutoshardError as error:
            reader.fault(("parallel", "mesh"), str(error).splitlines()[0])
        if config.parallel.cluster is not None:
            reader.fault(("parallel", "cluster"), "both mesh and cluster are given; the mesh says how many ranks there are")
    for at, message in _without_effect(config):
        reader.fault(at, message, of_key=True)
    for name, what in config.data.fields.items():
        if what not in ("tokens", "next"):
            reader.fault(("data", "fields", name), f"expected tokens or next, found {_what(what)}")
    for pin, message in _pin_faults(config.parallel.pins):
        reader.fault(("parallel", "pins", pin), message, of_key=True)


def _without_effect(config: Config) -> Iterator[tuple[At, str]]:
    """Keys that are given and can't do anything, and why."""
    data, evaluation, parallel = config.data, config.evaluation, config.parallel
    sources = [(("data", "sources", i), s) for i, s in enumerate(data.sources)]
    sources += [(("evaluation", "sources", i), s) for i, s in enumerate(evaluation.sources)]
    written = config.checkpoints
    nothing = not data.held_out and not evaluation.sources
    whys: list[tuple[Any, str, At, bool, str]] = [
        (data, "tokenizer", ("data",), all(s.format != "text" for _, s in sources), "no source is text"),
        (data, "held_out", ("data",), bool(evaluation.sources and data.held_out), "evaluation.sources are evaluated on"),
        *((evaluation, k, ("evaluation",), nothing, "nothing is held out") for k in ("every", "batches")),
        (config.schedule, "floor", ("schedule",), config.schedule.kind == "constant", "the schedule is constant"),
        *((written, k, ("checkpoints",), written.folder is None, "there is no folder") for k in ("every", "keep", "background")),
        *((parallel, k, ("parallel",), parallel.plan is not None, "the plan decides it") for k in ("microbatches", "pins")),
        *((s, "dtype", at, s.format != "tokens", f"the format is {s.format}") for at, s in sources),
    ]
    for part, name, at, useless, why in whys:
        # one that is as it would be anyway does no harm: --print-config prints them all
        if useless and getattr(part, name) != _usual(part, name):
            yield (*at, name), f"{name} has no effect: {why}"
    for i, group in enumerate(config.optimizer.groups):
        if group.lr is None and group.weight_decay is None:
            yield ("optimizer", "groups", i, "match"), "a group with neither lr nor weight_decay has no effect"


def _usual(part: Any, name: str) -> Any:
    """A field's default."""
    found = next(f for f in dataclasses.fields(part) if f.name == name)
    return found.default if found.default_factory is dataclasses.MISSING else found.default_factory()


def check_pins(pins: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError where a pin can't be one."""
    faults = Faults(where, ConfigError)
    for pin, message in _pin_faults(pins):
        faults.add(f"{where} {pin}", message)
    faults.raise_any()


def _pin_faults(pins: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for pin, value in pins.items():
        expected = _PINS.get(pin)
        if expected is None:
            yield pin, f"unknown pin {str(pin)[:60]!r}; expected {', '.join(_PINS)}"
        elif not expected[1](value):
            yield pin, f"pin {pin}: expected {expected[0]}, found {_what(value)}"


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _lists_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, list) and all(isinstance(t, str) for t in v) for v in value)


def _starts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)


_PINS: dict[str, tuple[str, Any]] = {
    "schedule": ("a schedule's name", lambda v: isinstance(v, str)),
    "cuts": ("a list of whole numbers", _starts),
    "zero": ("true or false", lambda v: isinstance(v, bool)),
    "storage": ("parameter: type", _texts),
    "ops": ("op: strategy", _texts),
    "divide": ("true or false", lambda v: isinstance(v, bool)),
    "merge": ("true, false, or lists of parameters", lambda v: isinstance(v, bool) or _lists_of_text(v)),
    "precision": ("a recipe's name", lambda v: isinstance(v, str)),
    "kernels": ("a list of names", lambda v: _lists_of_text([v])),
    "buckets": ("a number of bytes", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0),
}


def _section_of(hint: Any) -> type | None:
    return hint if dataclasses.is_dataclass(hint) and isinstance(hint, type) else None


def _has_required(cls: type) -> bool:
    return any(f.metadata.get("required") for f in dataclasses.fields(cls))


def _put(container: Any, at: Any, value: Any) -> Any:
    container[at] = value
    return value


def _what(found: Any) -> str:
    kinds = {dict: "keys and values", list: "a list", str: "text", bool: "a truth value", type(None): "nothing"}
    shown = f" {found[:40]!r}" if isinstance(found, str) else f" {str(found).lower()}" if isinstance(found, bool) else ""
    return kinds.get(type(found), f"the number {str(found)[:40]}") + shown


# ---- quantities and text ----------------------------------------------------------------------------------------------

_UNITS = {"": 1, "b": 1, **{f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}, **{f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}}


def bytes_of(text: str) -> float:
    """
    >>> bytes_of("64GiB") == 64 * 2**30, bytes_of("1.5 GB")
    (True, 1500000000.0)
    """
    found = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{0,9})?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].lower() not in _UNITS or not float(found[1]):
        raise ConfigError(f"{text!r} is not an amount of memory", hint="write it as 64GiB or 80GB")
    return float(found[1]) * _UNITS[found[2].lower()]


def to_yaml(config: Config | None = None) -> str:
    """Every key with its value (or default) and what it means, as a file that `load` reads."""
    return "\n".join(_lines(config or Config(), 0)) + "\n"


def _lines(part: Any, depth: int) -> Iterator[str]:
    pad = "  " * depth
    for f in dataclasses.fields(part):
        value, comment = getattr(part, f.name), f.metadata["comment"]
        if dataclasses.is_dataclass(value):
            yield f"{pad}{f.name}:  # {comment}"
            yield from _lines(value, depth + 1)
        elif (f.name == "sources" and f.metadata["required"]) or (isinstance(value, list) and value and dataclasses.is_dataclass(value[0])):
            yield f"{pad}{f.name}:  # {comment}"
            for item in value or [DataSource()]:
                first, *rest = _lines(item, depth + 2)
                yield f"{pad}  - {first.strip()}"
                yield from rest
        else:
            must = "must be given: " if f.metadata["required"] else ""
            yield f"{pad}{f.name}: {_flow(value, f.metadata['required'])}  # {must}{comment}"


def _flow(value: Any, required: bool = False) -> str:
    if value is None:
        return "..." if required else "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(str(k))}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z/][\w./-]*", value) and value not in ("null", "true", "false")
        return value if plain else "'" + value.replace("'", "''") + "'"
    return repr(value)
