"""Where in the user's code an op comes from: the source line and the module path, out of what export records on a node."""

from __future__ import annotations

import re
import site
import sysconfig
import traceback
from functools import cache
from pathlib import Path

import torch
import torch.fx as fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_NAME = re.compile(r", in in ([\d: ]*)")
_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)


def source_of(node: fx.Node) -> str:
    """`path/file.py:line` of the innermost frame outside torch, relative to the current folder or to site-packages; "" if unknown."""
    return innermost(_FRAME.findall(node.meta.get("stack_trace") or ""))


def last_name(node: fx.Node) -> str | None:
    """What `intercept.exact_sources` wrote in the place of the innermost frame's name; None where nothing was recorded."""
    found = _NAME.findall(node.meta.get("stack_trace") or "")
    return found[-1] if found else None


def source_of_error(error: BaseException) -> str:
    """The innermost frame outside torch in which `error` was raised."""
    frames = [(f.filename, str(f.lineno)) for f in traceback.extract_tb(error.__traceback__)]
    return innermost(frames)


def source_here() -> str:
    """The innermost frame outside torch that is executing now."""
    return innermost([(f.filename, str(f.lineno)) for f in traceback.extract_stack()])


def innermost(frames: list[tuple[str, str]]) -> str:
    for path, line in reversed(frames):
        if is_users(path):
            return f"{_shorten(path)}:{line}"
    return ""


def is_users(path: str) -> bool:
    """Whether a frame's file is neither torch's nor capture's."""
    return not path.startswith((_TORCH, _HERE, "<"))


def is_captures(path: str) -> bool:
    """Whether a frame's file is capture's own."""
    return path.startswith(_HERE)


def module_of(node: fx.Node, prefix: str) -> str:
    """The path of the innermost module in the model, such as `model.layers.0.mlp`; `prefix` is the wrapper's name of the model."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return "" if path == prefix else path.removeprefix(prefix + ".")


@cache
def _shorten(path: str) -> str:
    for root in (Path.cwd(), *map(Path, (*site.getsitepackages(), sysconfig.get_path("purelib")))):
        try:
            return str(Path(path).relative_to(root))
        except ValueError:
            continue
    return path
