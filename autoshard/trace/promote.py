"""`promote_float32`: a mode in which float32 work in model code is done in float64, for comparing a model with its graph exactly.

Model code casts to float32 on purpose (norms, softmax, rotary tables, losses); a model in float64 then still rounds there, and two correct
programs differ by 1e-7. Under this mode every float32 cast or creation asked for by a call into torch makes float64, in the plain model and
in a capture alike, so that the two agree to 1e-12.

>>> import torch
>>> with promote_float32():
...     print(torch.ones(2, dtype=torch.bfloat16).float().dtype, torch.zeros(2).dtype, torch.zeros(2, dtype=torch.float32).dtype)
torch.float64 torch.float64 torch.float64
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FLOAT = {torch.float32: torch.float64, "torch.FloatTensor": torch.float64, torch.FloatTensor: torch.float64}


class _Promote(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {k: _promoted(v) for k, v in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            return args[0].to(torch.float64)
        return func(*map(_promoted, args), **kwargs)


def _promoted(argument: Any) -> Any:
    # nothing else: to hash a symbolic number is to decide it
    return _FLOAT.get(argument, argument) if isinstance(argument, (torch.dtype, str, type)) else argument


@contextmanager
def promote_float32() -> Iterator[None]:
    """float32 casts and creations become float64 within; tensors that exist already are left as they are (use `model.double()`)."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Promote():
            yield
    finally:
        torch.set_default_dtype(default)
