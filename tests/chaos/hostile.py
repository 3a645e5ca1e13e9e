# ruff: noqa: E501
"""Checkpoints made by an enemy, hashes and all: paths that leave the folder, lies about sizes, depth, code. Each has to be refused with a
CheckpointError, in little memory and time; nothing outside is touched, no code runs.

`CASES`: name → what it does to a good checkpoint. A case changes the manifest (which is sealed anew), or the files (which are hashed
anew), or what lies in the folder; `run` repeats those that draw at random.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from autoshard.errors import CheckpointError
from autoshard.runtime import checkpoint
from autoshard.runtime.checkpoint.manifest import MANIFEST, SEAL, seal
from autoshard.runtime.in_process import InProcess

from .damage import trained

Change = Callable[[Path, dict[str, Any], random.Random], None]
"""(the checkpoint's folder, its manifest to change, a source of randomness)."""
CASES: dict[str, Change] = {}
FIRST = "rank-00000.safetensors"
WEIGHT = "weights/a"


class Boom:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch " + os.environ.get("AUTOSHARD_CANARY", "/dev/null"),)


def case(name: str, change: Change) -> None:
    assert name not in CASES
    CASES[name] = change


def put(path: str, value: Any) -> Change:
    """Set one place of the manifest; "~" stands for a/b's slash."""
    keys = [int(k) if k.isdigit() else k.replace("~", "/") for k in path.split("/")]

    def change(folder: Path, manifest: dict[str, Any], draw: random.Random) -> None:
        at: Any = manifest
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value

    return change


def raw(data: bytes | Callable[[bytes], bytes]) -> Change:
    """Another text for the manifest, well sealed."""

    def change(folder: Path, manifest: dict[str, Any], draw: random.Random) -> None:
        text = data(json.dumps(manifest).encode()) if callable(data) else data
        (folder / MANIFEST).write_bytes(text)
        (folder / SEAL).write_bytes(seal(text))
        manifest.clear()

    return change


def block(make: Callable[[bytes, Path], bytes]) -> Change:
    """Another first file, well hashed."""

    def change(folder: Path, manifest: dict[str, Any], draw: random.Random) -> None:
        data = make((folder / FIRST).read_bytes(), folder)
        (folder / FIRST).write_bytes(data)
        manifest["files"][0] |= {"size": len(data), "sha256": [hashlib.sha256(data).hexdigest()] if data else []}

    return change


def header(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """Another header for the first file."""

    def make(data: bytes, folder: Path) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        found = json.loads(data[8 : 8 + size])
        text = edit(found)
        text = text if isinstance(text, bytes) else json.dumps(found).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return block(make)


def instead(name: str, make: Callable[[Path], None]) -> Change:
    """Something else under a file's name."""

    def change(folder: Path, manifest: dict[str, Any], draw: random.Random) -> None:
        target = folder / name
        shutil.copy(target, folder.parent.parent / f"outside-{name}")
        target.unlink()
        make(target)
        if name != FIRST:
            manifest.clear()

    return change


for i, name in enumerate(
    ["../outside", "/etc/passwd", "../../outside-rank-00000.safetensors", "rank-00000.safetensors/../../x", "", ".", "..", "rank-00000.safetensors\0",
     "rank-00000.safetensors\n", "RANK-00000.safetensors", "rank-0.safetensors", "manifest.json", "~/x", "C:\\x", 5, None, ["rank-00000.safetensors"]]
):  # fmt: skip
    case(f"file name {i}", put("files/0/name", name))
for i, value in enumerate([-1, 1 << 62, 1 << 70, 0, 7, True, "12", 1e300, None, [1]]):
    case(f"file size {i}", put("files/0/size", value))
for i, value in enumerate([None, "x", [], ["x"], ["0" * 64], ["0" * 64] * 100, [1]]):
    case(f"hashes {i}", put("files/0/sha256", value))
for i, value in enumerate(
    [[1 << 62], [-4, -4], [4, 4, 1], [1 << 40, 1 << 40], [True, 4], [4.0, 4], "44", None, [1] * 10000, [0, 4], [1 << 20, 1 << 20]]
):
    case(f"shape {i}", put(f"tensors/{WEIGHT.replace('/', '~')}/shape", value))
for i, value in enumerate(["F64", "PICKLE", "F999", None, 5, ["F32"], "BOOL", "f32"]):
    case(f"dtype {i}", put(f"tensors/{WEIGHT.replace('/', '~')}/dtype", value))
for i, value in enumerate([[], [[0, [None, None]]] * 2, [[9, [None, None]]], [[-1, [None, None]]], [[0, [None]]], [[0, [None, None, None]]],
                           [[0, [0, None]]], [[0, [99, None]]], [[True, [None, None]]], [[0, None]], [0], None, [[0, [None, None]], [1, [None, None]]],
                           [["rank-00000.safetensors", [None, None]]], [[1, [None, None]]], [[0, [None, None]]] * 5000]):  # fmt: skip
    case(f"pieces {i}", put(f"tensors/{WEIGHT.replace('/', '~')}/pieces", value))
for i, value in enumerate([[[0, 2], [1, 4]], [[2, 0], [2, 4]], [[0, 2], [2, 1 << 60]], [[0, 1, 1, 2], [2, 4]], [[-2, 2], [2, 4]], [[0, 1], [2, 4]], [[], []],
                           [[0], [2, 4]], None, [None, [2, 4]], [[0, 2.0], [2, 4]]]):  # fmt: skip
    case(f"cuts {i}", put("cuts", value))
for i, value in enumerate([-1, 1 << 80, "1", None, 1.5, True, {}]):
    case(f"step {i}", put("step", value))
for i, value in enumerate([None, [], {"a": 1}, {"a": "a", "b": "a"}, {"a": "nowhere"}, {"": "a"}, {"x" * 5000: "a"}, {"b": "a"}]):
    case(f"tied {i}", put("tied", value))
for key in ("files", "tensors", "state", "cuts", "format", "version", "chunk"):
    for i, value in enumerate([None, 0, "x", [], {}, [[]], -1]):
        if (key, value) not in (("cuts", []),):
            case(f"{key} is {i}", put(key, value))
for i, value in enumerate([None, "x", {}, [1], [{"class": "AdamW"}], [{"class": "SGD", "groups": []}], [{"class": "AdamW", "groups": [1]}],
                           [{"class": "AdamW", "groups": [{"params": [1]}]}], [{"class": "AdamW", "groups": [{"lr": "0.1"}]}],
                           [{"class": "AdamW", "groups": [{"lr": {"!scalar": ["os", 1]}}]}], [{"class": "AdamW", "groups": [{"betas": [1, 2]}]}],
                           [{"class": "AdamW", "groups": [{"__class__": "x"}, {}]}]]):  # fmt: skip
    case(f"optimizers {i}", put("state/optimizers", value))
for i, value in enumerate([None, "x", 1.5, 1 << 70, True, [1]]):
    case(f"seed {i}", put("state/seed", value))
    case(f"steps taken {i}", put("state/steps_taken", value))
for i, value in enumerate([5, "x", [1], {"!tuple": [1]}, {"!pickle": "gASV"}, {"!scalar": ["__import__", 1]}, {"!dict": [[{"!dict": []}, 1]]}, {"!float": "1"},
                           {"!counter": 5}, {"a": {"!tuple": {}}}]):  # fmt: skip
    case(f"data {i}", put("state/data", value))
    case(f"extra {i}", put("state/extra", value))
    case(f"scheduler {i}", put("state/scheduler", value))
for i, key in enumerate(["__class__", "step", "optimizer", "__dict__", "load_state_dict", "lr_lambdas"]):
    case(f"scheduler's {i}", put("state/scheduler", {key: 1}))
case("values", put("state/values", 5))
case("values tagged", put("state/values", {"optimizer.0.step/a": {"!pickle": 1}}))
case("deep manifest", raw(b"[" * 1_000_000))
case("deep state", raw(lambda text: text.replace(b'"data": null', b'"data": ' + b'{"a":' * 900 + b"1" + b"}" * 900)))
case("deeper state", raw(lambda text: text.replace(b'"data": null', b'"data": ' + b'{"a":' * 100000 + b"1" + b"}" * 100000)))
case("brackets", raw(b"[" + b"[]," * 3_000_000 + b"[]]"))
case("duplicate keys", raw(lambda text: text[:-1] + b', "step": 2}'))
case("duplicate tensors", raw(lambda text: text.replace(b'"weights/a"', b'"weights/b"')))
case("cut short", raw(lambda text: text[:-20]))
case("NaN", raw(lambda text: text.replace(b'"data": null', b'"data": NaN')))
case("huge number", raw(lambda text: text.replace(b'"step": 1', b'"step": ' + b"9" * 100000)))
case("not UTF-8", raw(b"\xff\xfe\x00"))
case("empty", raw(b""))
case("list", raw(b"[]"))
case("pickled manifest", raw(lambda text: pickle.dumps(Boom())))
case("huge manifest", raw(b" " * (129 << 20)))
case("pickled file", block(lambda data, folder: pickle.dumps(Boom())))
case("pickle after the header", block(lambda data, folder: data + pickle.dumps(Boom())))
case("torch file", block(lambda data, folder: (torch.save({"a": torch.ones(2)}, folder / "t"), (folder / "t").read_bytes())[1]))
case("empty file", block(lambda data, folder: b""))
case("header longer than the file", block(lambda data, folder: struct.pack("<Q", len(data)) + data[8:]))
case("header of 2^63", block(lambda data, folder: struct.pack("<Q", 1 << 63) + data[8:]))
case("header of nothing", block(lambda data, folder: struct.pack("<Q", 0) + data[8:]))
case("header not JSON", header(lambda h: b"\0" * 64))
case("header deep", header(lambda h: b"[" * 100000))
case("header a list", header(lambda h: b"[]"))
case("header with a key twice", header(lambda h: json.dumps(h).encode()[:-1] + b', "weights/a": ' + json.dumps(h[WEIGHT]).encode() + b"}"))
case("header without a tensor", header(lambda h: h.pop(WEIGHT) and None))
case("header with another name", header(lambda h: h.__setitem__("weights/z", h.pop(WEIGHT))))
for i, (key, value) in enumerate(
    [("dtype", "F64"), ("dtype", "I32"), ("dtype", "X"), ("dtype", []), ("shape", [8, 8]), ("shape", [2, 8]), ("shape", [-4, -4]), ("shape", [1 << 62, 4]),
     ("shape", "44"), ("shape", [True, 16]), ("data_offsets", [0, 1 << 62]), ("data_offsets", [-64, 0]), ("data_offsets", [0, 0]), ("data_offsets", [64, 0]),
     ("data_offsets", [0]), ("data_offsets", [0, 64, 128]), ("data_offsets", None), ("data_offsets", [1 << 62, (1 << 62) + 64])]
):  # fmt: skip
    case(f"header {key} {i}", header(lambda h, key=key, value=value: h[WEIGHT].__setitem__(key, value)))
case("overlapping tensors", header(lambda h: h[WEIGHT].__setitem__("data_offsets", h["optimizer.0.exp_avg/a"]["data_offsets"])))
for name in (FIRST, MANIFEST, SEAL):
    case(f"{name} a link out", instead(name, lambda path: path.symlink_to(path.parent.parent.parent / f"outside-{path.name}")))
    case(f"{name} a link to zeros", instead(name, lambda path: path.symlink_to("/dev/zero")))
    case(f"{name} a pipe", instead(name, lambda path: os.mkfifo(path)))
    case(f"{name} a folder", instead(name, lambda path: path.mkdir()))
    case(f"{name} a sparse giant", instead(name, lambda path: (path.touch(), os.truncate(path, 1 << 40))[0]))  # type: ignore[func-returns-value]


def noise(folder: Path, manifest: dict[str, Any], draw: random.Random) -> None:
    """A random value at a random place of the manifest."""
    at: Any = manifest
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = draw.choice(keys)
        if not isinstance(at[key], (dict, list)) or not at[key] or draw.random() < 0.1:
            break
        at = at[key]
    at[key] = draw.choice([None, -1, 1 << 65, "../x", [], {}, [[[]]], 0.5, True, "F16", {"!scalar": ["x", 1]}])


def run(folder: Path, count: int, seed: int = 0) -> str:
    """All cases, then random ones until there are `count`. Raises AssertionError where one isn't refused cleanly. A line of figures."""
    canary = folder / "canary"
    os.environ["AUTOSHARD_CANARY"] = str(canary)
    ours = trained()
    good = ours.save(folder / "good", step=1, scheduler=scheduler(ours))
    checkpoint.release(folder / "good")
    clean = json.loads((good / MANIFEST).read_bytes())
    assert json.loads((good / MANIFEST).read_bytes())["tensors"][WEIGHT]["pieces"] == [[0, [None, None]]]
    other = trained()
    schedule = scheduler(other)
    slowest, memory = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    random_ones = [(f"noise {i}", noise) for i in range(max(0, count - len(CASES)))]
    harmless = 0
    for name, change in [*list(CASES.items())[: count or None], *random_ones]:
        bad = folder / "bad" / good.name
        shutil.rmtree(bad.parent, ignore_errors=True)
        shutil.copytree(good, bad)
        manifest = json.loads(json.dumps(clean))
        change(bad, manifest, random.Random(f"{seed} {name}"))
        if manifest and (bad / MANIFEST).is_file() and not (bad / MANIFEST).is_symlink():
            raw(lambda _, manifest=manifest: json.dumps(manifest).encode())(bad, {}, random.Random())
        start = time.monotonic()
        refused = refuse(bad, other, schedule, name)
        slowest = max(slowest, time.monotonic() - start)
        assert refused or change is noise, f"{name}: was loaded"
        harmless += not refused
        assert not canary.exists(), f"{name}: code has run"
    shutil.rmtree(folder / "bad", ignore_errors=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    total = max(count, len(CASES)) if count > len(CASES) else min(count, len(CASES))
    return (
        f"{total} hostile checkpoints: {total - harmless} refused, {harmless} random changes that mean nothing wrong; "
        f"no code run, slowest {slowest:.2f} s, {grown:.0f} MiB more memory"
    )


def scheduler(run: InProcess) -> Any:
    return torch.optim.lr_scheduler.StepLR(run.optimizers[0], 3)


def refuse(bad: Path, run: InProcess, schedule: Any, name: str) -> bool:
    """Whether it was refused; anything but a CheckpointError is a fault."""
    try:
        checkpoint.inspect(bad)
        checkpoint.verify(bad)
        run.load(bad, scheduler=schedule)
    except CheckpointError as error:
        assert len(str(error)) < 5000, name
        return True
    except Exception as error:
        raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    return False
