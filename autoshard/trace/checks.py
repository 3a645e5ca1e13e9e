"""Checks on data, in python: which answer lets the code go on.

`assert ids.max() < n` and `if bad.any(): raise …` ask for a tensor's contents, which capture hasn't. Where one answer leads straight to a
raise, the other is taken: a captured model is one that doesn't fail. What else looks at data is refused.

>>> def f(x):
...     assert x, "no"
>>> def g(x):
...     if x:
...         raise ValueError(f"{x} is wrong")
>>> def h(x):
...     if x:
...         return 1
>>> for function in (f, g, h):
...     print(answer_at(function.__code__, next(s.offset for s in dis.get_instructions(function) if "JUMP_" in s.opname)))
True
False
None
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from .provenance import is_captures, source_here

_ON_THE_WAY = ("CACHE", "TO_BOOL", "NOP", "COPY", "PRECALL")


def answer_here() -> bool | None:
    """The truth value, of what the innermost frame outside capture and torch's modes asks for now, that leads on and not to a raise."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (is_captures(frame.f_code.co_filename) or frame.f_code.co_name == "__torch_function__"):
        frame = frame.f_back
    return answer_at(frame.f_code, frame.f_lasti) if frame is not None else None


@functools.cache
def answer_at(code: CodeType, offset: int) -> bool | None:
    """The same for code that stands at `offset`, on a conditional jump or on the call that makes its condition."""
    steps = list(dis.get_instructions(code))
    place = {step.offset: i for i, step in enumerate(steps)}
    at, turned = place[offset], False
    if "JUMP" not in steps[at].opname:
        at += 1
    while steps[at].opname in _ON_THE_WAY or steps[at].opname == "UNARY_NOT":
        turned ^= steps[at].opname == "UNARY_NOT"
        at += 1
    jump = steps[at]
    if "POP_JUMP" not in jump.opname or not jump.opname.endswith(("IF_TRUE", "IF_FALSE")):
        return None
    onward, away = _raises(steps, at + 1), _raises(steps, place[jump.argval])
    if onward == away:
        return None
    return (jump.opname.endswith("IF_TRUE") == onward) != turned


def _raises(steps: list[dis.Instruction], at: int) -> bool:
    """Whether the code from here on does nothing but make an error and raise it."""
    for step in steps[at:]:
        if step.opname == "RAISE_VARARGS":
            return True
        if "JUMP" in step.opname or step.opname.startswith(("RETURN", "FOR_ITER", "YIELD", "STORE")):
            return False
    return False


@contextmanager
def checks_pass(taken: Callable[[str], None]) -> Iterator[None]:
    """While active, a symbolic condition that decides between going on and raising is what goes on. `taken` is told where."""
    usual = torch.SymBool.__bool__

    def decide(self: torch.SymBool) -> bool:
        try:
            return usual(self)
        except GuardOnDataDependentSymNode:
            if (answer := answer_here()) is None:
                raise
            taken(source_here())
            return answer

    torch.SymBool.__bool__ = decide  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.SymBool.__bool__ = usual  # type: ignore[method-assign]
