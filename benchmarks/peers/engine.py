"""Transformer Engine beside a torch that is in use already.

Both bring cuDNN, which loads its parts when they are first needed. Whoever comes second must find the parts of the first, or their symbols
don't fit: so all parts of the cuDNN that torch has are loaded before Transformer Engine looks for one.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch


def transformer_engine() -> ModuleType | None:
    """transformer_engine.pytorch, None where it isn't installed or doesn't load."""
    try:
        if importlib.util.find_spec("transformer_engine") is None:
            return None
        _load_cudnn()
        import transformer_engine.pytorch as te
    except (ImportError, OSError, RuntimeError, AssertionError):  # its own checks of versions are assertions
        return None
    return te  # type: ignore[no-any-return]


def _load_cudnn() -> None:
    if not torch.cuda.is_available() or not torch.backends.cudnn.is_available():
        return
    torch.backends.cudnn.version()  # has torch load its own
    maps = Path("/proc/self/maps")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "/libcudnn" in line} if maps.exists() else set()
    folders = {Path(path).parent for path in loaded}
    if len(folders) != 1:
        return
    (folder,) = folders
    os.environ.setdefault("CUDNN_PATH", str(folder.parent))
    # each needs others: in two rounds all find what they need
    for path in sorted(folder.glob("libcudnn*.so.*")) * 2:
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
