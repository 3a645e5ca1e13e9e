"""Plain Python values ↔ JSON values, exactly: tuples, counters, dicts of other keys and non-finite floats come back as they were.

In: what schedulers, optimizers and data loaders keep (None, bool, int, float, str, list, tuple, dict, Counter, tensors of one element).
Out: JSON values, in which a dict with a single key that begins with "!" says what it stands for. Anything else is refused by the path
at which it stands; nothing is pickled, nothing is executed when it is read.

>>> decode(encode({"betas": (0.9, 0.95), "at": {30: 1}, "best": float("inf")}))
{'betas': (0.9, 0.95), 'at': {30: 1}, 'best': inf}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...errors import CheckpointError

MAX_DEPTH = 32
_FLOATS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
_DTYPES = {str(d): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)}


def encode(value: Any, where: str = "value", depth: int = 0) -> Any:
    """The JSON value. Raises CheckpointError, saying where something stands that can't be written."""
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{where} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        value = float(value)
        return value if value - value == 0 else {"!float": str(value)}
    if isinstance(value, torch.Tensor) and value.dim() == 0 and str(value.dtype) in _DTYPES:
        return {"!scalar": [str(value.dtype), encode(value.item(), where)]}
    if isinstance(value, (list, tuple)):
        items = [encode(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"!tuple": items}
    if isinstance(value, Mapping):
        plain = type(value) is not Counter and all(isinstance(k, str) and not k.startswith("!") for k in value)
        if plain:
            return {k: encode(v, f"{where}.{k}", depth + 1) for k, v in value.items()}
        pairs = [[encode(k, where, depth + 1), encode(v, f"{where}.{k}", depth + 1)] for k, v in value.items()]
        return {"!counter" if isinstance(value, Counter) else "!dict": pairs}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which a checkpoint can't hold",
        hint="give None, bools, numbers, strings, lists, tuples and dicts of these",
    )


def decode(value: Any, depth: int = 0) -> Any:
    """What `encode` was given. Raises CheckpointError for what it never writes."""
    if depth > 2 * MAX_DEPTH:
        raise CheckpointError(f"a value is nested more than {2 * MAX_DEPTH} deep")
    if isinstance(value, list):
        return [decode(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if len(value) != 1 or not tag.startswith("!"):
        return {k: decode(v, depth + 1) for k, v in value.items()}
    try:
        return _tagged(tag, value[tag], depth)
    except (TypeError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"not a value of a checkpoint: {str(value)[:80]}") from error


def _tagged(tag: str, inner: Any, depth: int) -> Any:
    if tag == "!float":
        return _FLOATS[inner]
    if tag == "!scalar":
        dtype, number = inner
        return torch.tensor(decode(number), dtype=_DTYPES[dtype])
    if tag not in ("!tuple", "!dict", "!counter") or not isinstance(inner, list):
        raise TypeError(tag)
    if tag == "!tuple":
        return tuple(decode(item, depth + 1) for item in inner)
    pairs = [(decode(k, depth + 1), decode(v, depth + 1)) for k, v in inner]
    return dict(pairs) if tag == "!dict" else Counter(dict(pairs))
