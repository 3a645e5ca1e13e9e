"""Weights from one kind of folder to another: autoshard checkpoints, Hugging Face folders, torch's DCP folders. Needs no process group."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from . import checkpoint, dcp, huggingface
from .checkpoint import folder as folders
from .checkpoint.blocks import NAMES, Source, write
from .checkpoint.manifest import Manifest, file_name
from .checkpoint.pieces import Logical, Piece
from .checkpoint.reader import Tensors, Weights

KINDS = ("hf", "dcp", "autoshard")


def is_dcp(folder: Path) -> bool:
    """Whether this is a folder of torch.distributed.checkpoint."""
    return (folder / dcp.METADATA).exists() and not huggingface.is_folder(folder)


def open_source(path: str | os.PathLike[str], prefix: str = "") -> Tensors:
    """Whatever kind of folder it is. `prefix`: of a DCP folder, take the tensors under this prefix. Raises CheckpointError."""
    folder = Path(path)
    if huggingface.is_folder(folder):
        return huggingface.Folder(folder)
    if is_dcp(folder):
        return dcp.Folder(folder, prefix)
    found = folder if folders.is_checkpoint(folder) else checkpoint.newest(folder)
    if found is None:
        raise CheckpointError("no checkpoint here: neither autoshard's nor Hugging Face's nor DCP's", where=str(path))
    return Weights(found)


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str], to: str, *, config: Any = None, prefix: str = "", step: int = 0
) -> Path:
    """Write a folder's weights as another kind: "hf" (`config`: the model's), "dcp" (names get the `prefix`) or "autoshard" (in
    target/step-…). Optimizers' state stays behind. Raises CheckpointError, and ConfigError for another `to`."""
    if to not in KINDS:
        raise ConfigError(f"to={to!r}; expected one of {', '.join(KINDS)}")
    opened = open_source(source, prefix if to != "dcp" else "")
    try:
        if to == "hf":
            beside = Path(source) / huggingface.CONFIG
            return huggingface.write_folder(opened, Path(target), config or (beside if beside.exists() else None))
        if to == "dcp":
            return dcp.write_folder(opened, Path(target), prefix)
        return _write_checkpoint(opened, Path(os.path.abspath(target)), step)
    finally:
        opened.close()


def _write_checkpoint(source: Tensors, folder: Path, step: int) -> Path:
    """A checkpoint of weights alone: who loads it starts the optimizers anew."""
    unknown = next((name for name, (dtype, _) in source.specs.items() if dtype not in NAMES), None)
    if unknown is not None:
        raise CheckpointError(f"{unknown} is {source.specs[unknown][0]}, which a safetensors file can't hold", where=str(source.path))

    def work() -> Path:
        temporary = folders.begin(folder, step)
        try:
            sources = [Source(f"weights/{n}", d, s, lambda n=n: source.part(n)) for n, (d, s) in source.specs.items() if 0 not in s]  # type: ignore[misc]
            name = file_name(0)
            state = {"seed": 0, "steps_taken": 0, "optimizers": [], "values": {}, "scheduler": None, "data": None, "extra": None}
            manifest = Manifest(step, {name: write(temporary / name, sources, {"format": "pt"})}, tied=dict(source.tied), state=state)
            for key, (dtype, shape) in source.specs.items():
                pieces = () if 0 in shape else (Piece(name, (None,) * len(shape)),)
                manifest.tensors[f"weights/{key}"] = Logical(dtype, shape, pieces)
            checkpoint.seal_folder(temporary, manifest)
            return folders.publish(temporary, folder, step)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    return checkpoint.clean(work, folder)()
