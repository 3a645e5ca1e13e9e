"""`autoshard doctor`: what this machine has, what is missing, and what it would bring."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

EXAMPLES = """[bold]Examples[/bold]

autoshard doctor

autoshard doctor --json
"""

NEEDED = {"torch": "2.11", "numpy": "1.26", "networkx": "3.2", "PyYAML": "6.0", "rich": "13.7", "typer": "0.12"}
"""Packages that autoshard doesn't run without, and the oldest version that will do."""
OPTIONAL = {
    "transformers": "Hugging Face models and presets (llama3-8b, …) on the command line",
    "safetensors": "Hugging Face weights in and out",
    "tokenizers": "data.tokenizer: a Hugging Face tokenizer's folder",
    "triton": "compiled kernels on CUDA",
    "transformer_engine": "float8 on CUDA",
    "tensorboard": "metrics.tensorboard",
    "wandb": "metrics.wandb",
}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Check this machine: versions, devices, backends, and what is missing and would bring something.

    Exit code 3 where something that is needed is missing or too old.
    """
    found = look()
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        _print(found)
    if not found["ok"]:
        raise typer.Exit(3)


def look() -> dict[str, Any]:
    """Everything that is shown, as plain data."""
    import os
    import platform

    packages = [_package(name, oldest=oldest) for name, oldest in NEEDED.items()]
    packages += [_package(name, brings=what) for name, what in OPTIONAL.items()]
    devices = _devices() if packages[0]["version"] else {}
    machine = {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()}
    return {"machine": machine, "packages": packages, **devices, "ok": not any(p["problem"] and p["needed"] for p in packages)}


def _package(name: str, oldest: str = "", brings: str = "") -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        found: str | None = version(name)
    except PackageNotFoundError:
        found = None
    problem = ""
    if found is None:
        problem = "missing"
    elif oldest and _numbers(found) < _numbers(oldest):
        problem = f"too old: {oldest} or newer is needed"
    return {"name": name, "version": found, "needed": bool(oldest), "problem": problem, "brings": brings}


def _numbers(version: str) -> tuple[int, ...]:
    """
    >>> _numbers("2.13.0+cpu") >= _numbers("2.11")
    True
    """
    return tuple(int(part) for part in version.partition("+")[0].split(".")[:2] if part.isdigit())


def _devices() -> dict[str, Any]:
    """GPUs and ways to talk."""
    import torch
    import torch.distributed as dist

    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(i)
        gpus.append({"name": facts.name, "memory_bytes": facts.total_memory, "capability": f"{facts.major}.{facts.minor}"})
    there = dist.is_available()
    backends = {"gloo": there and dist.is_gloo_available(), "nccl": there and dist.is_nccl_available()}
    missing = [] if gpus else ["no GPU: training runs on the CPU, through gloo; planning for any cluster needs none"]
    if gpus and not backends["nccl"]:
        missing.append("GPUs but no NCCL: a torch built with CUDA brings it")
    if not backends["gloo"]:
        missing.append("no gloo: several CPU processes can't talk")
    return {"gpus": gpus, "cuda": torch.version.cuda, "backends": backends, "missing": missing}


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..report import bytes_text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    machine = found["machine"]
    console.print(f"Python {machine['python']} on {machine['system']}, {machine['cores']} cores")
    table = Table("package", "version", "state", title="packages", title_justify="left")
    for p in found["packages"]:
        state = p["problem"] or "ok"
        if p["problem"] and p["brings"]:
            state += f"; it would bring {p['brings']}"
        table.add_row(p["name"], p["version"] or "–", state + (" (needed)" if p["problem"] and p["needed"] else ""))
    console.print(table)
    for gpu in found.get("gpus", []):
        console.print(f"GPU {gpu['name']}, {bytes_text(gpu['memory_bytes'])}, capability {gpu['capability']}")
    if "backends" in found:
        console.print("backends: " + ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in found["backends"].items()))
    for line in found.get("missing", []):
        console.print(line)
    console.print("ready" if found["ok"] else "not ready: see above")
