"""deferred(build, …) → the model that build(…) makes, without its memory: tensors on meta, and a recording of how to fill them.

In: a constructor and its arguments. Out: a module for `parallelize`, which replays the recording whole tensor by whole tensor and
keeps its shards of each, so that a model that fits no single device still starts from the bits that one device would draw (from
torch's default CPU generator, and generators made on the CPU).

>>> model = deferred(torch.nn.Linear, 3, 2)
>>> model.weight.device.type
'meta'
>>> [name for name, whole in materialise(model)]
['weight', 'bias']

What the constructor makes a number of (`.item()`, `bool(tensor)`, `.numpy()`) is computed there and then, if it depends on no draw;
otherwise DeferredError names the line. After construction the model may be cut up, wrapped, tied, frozen and cast (`model.to(dtype)`,
which is recorded too), but what happens to a tensor's content must happen inside `build`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import DeferredError
from .recorder import OnCpu, Recorder, address
from .replay import replay, value

if TYPE_CHECKING:
    from .comm import Comm

M = TypeVar("M", bound=nn.Module)


def deferred(build: Callable[..., M], *args: Any, **kwargs: Any) -> M:
    """`build(*args, **kwargs)` with its tensors on meta, to be filled rank by rank by `parallelize`. Raises DeferredError.

    torch's default generator is left somewhere else, the same on every rank; filling the model leaves it where construction on one
    device would have, unless it has been seeded or used in between. (A generator of one's own stays where it is left.)
    """
    if isinstance(build, nn.Module):
        name = type(build).__name__
        raise DeferredError(f"deferred takes what builds a model, but was given a {name} that is built", hint=f"deferred({name}, …)")
    recorder = Recorder()
    with recorder, OnCpu(recorder):
        model = build(*args, **kwargs)
    if not isinstance(model, nn.Module):
        raise DeferredError(f"the constructor returned {type(model).__name__}; an nn.Module is expected")
    for module in model.modules():
        for name, tensor in list(vars(module).items()):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                _fill_plain(recorder, module, name, tensor)
    _Deferral(recorder).adopt(model)
    return model


def is_deferred(model: Any) -> bool:
    """Whether some of a module's tensors wait to be filled."""
    return isinstance(model, nn.Module) and any(_known(t) is not None for t in _tensors(model).values())


def materialise(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by every name, whole, one storage at a time; a tensor may be dropped when the next is asked for. Those
    that a folder was promised for (`promise`) are left out.

    Raises DeferredError for a tensor on meta that no constructor was recorded for, or that was changed since.
    """
    groups: dict[int, tuple[_Deferral, dict[int, list[str]]]] = {}
    tensors = _tensors(model)
    for name, tensor in tensors.items():
        if not tensor.is_meta:
            yield name, tensor.detach()
            continue
        deferral, number = _recorded(name, tensor)
        if number not in deferral.promised:
            groups.setdefault(id(deferral), (deferral, {}))[1].setdefault(number, []).append(name)
    for deferral, by_storage in groups.values():
        for number, storage in deferral.fill(list(by_storage)):
            for name in by_storage[number]:
                yield name, deferral.recorder.ref(tensors[name]).on(storage)
            del storage  # before the next is made


def promise(model: nn.Module, names: Iterable[str], persistent: Iterable[str], folder: Path) -> None:
    """These tensors will be read from a folder once the model is sharded: they need not be made (unless one that isn't `persistent`, so
    that no folder has it, lies in the same memory)."""
    tensors, saved = _tensors(model), set(persistent)
    places = {name: _recorded(name, t) for name, t in tensors.items() if t.is_meta}
    needed = {number for name, (_, number) in places.items() if name not in saved}
    for name in names:
        if name in places and places[name][1] not in needed:
            deferral, number = places[name]
            deferral.promised[number] = folder


def promised(model: Any) -> list[Path]:
    """The folders to read once the model is sharded."""
    found = [_known(t) for t in _tensors(model).values()] if isinstance(model, nn.Module) else []
    return list(dict.fromkeys(folder for deferral in found if deferral for folder in deferral.promised.values()))


def agree(model: nn.Module, comm: Comm) -> None:
    """Every rank replays rank 0's recording: its seeds, and the real tensors that its constructor was given. (Ranks may be seeded each in
    their own way.) Raises DeferredError on all ranks where constructors did different things."""
    found = {id(d): d for d in map(_known, _tensors(model).values()) if d is not None}
    for deferral in found.values():
        recording = deferral.recorder.recording
        mine, start = recording.fingerprint(), recording.start
        first = comm.share(mine)
        comm.together(functools.partial(_same, mine, first))
        recording.replace(lambda tensor: comm.broadcast(tensor.to(comm.device, copy=True), 0).cpu())
        if not torch.equal(recording.start, start):
            deferral.left = None  # where rank 0's generator ends is no place for this rank's


def _same(mine: str, first: str) -> None:
    if mine != first:
        raise DeferredError(
            "the constructor of the deferred model did something else on this rank than on rank 0",
            hint="look for what differs by rank: its number, the time, numbers drawn by python or numpy, the order of a set",
        )


class _Deferral:
    """A finished recording, found again by the addresses of its (meta) storages, which it keeps alive."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.versions: dict[int, int] = {}
        self.promised: dict[int, Path] = {}
        self.left: Tensor | None = torch.default_generator.get_state()
        self.casting = False

    def __deepcopy__(self, memo: Any) -> _Deferral:
        return self

    def adopt(self, model: nn.Module) -> None:
        """Take note of a model's tensors as they are now."""
        for module in model.modules():
            # any part of the model that lives on keeps the recording, and knows what `to`, `half`, `cuda` do to it
            module.__dict__["_autoshard_deferral"] = self
            module.__dict__["_apply"] = functools.partial(self.apply, module)
        for known in self.recorder.numbers:
            _DEFERRALS[known] = self
        for tensor in _tensors(model).values():
            if tensor.is_meta:
                self.versions[address(tensor)] = tensor._version

    def apply(self, module: nn.Module, change: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        """`module._apply`, through which every cast and move of a module goes, as if it were part of the constructor."""
        plain = functools.partial(type(module)._apply, module, change, *args, **kwargs)
        if self.casting:
            return plain()
        before = {name: _recorded(name, t)[1] for name, t in _tensors(module).items() if t.is_meta}
        self.casting = True
        try:
            with self.recorder, OnCpu(self.recorder):
                plain()
        finally:
            self.casting = False
        self.adopt(module)
        for name, number in before.items():
            if number in self.promised:
                self.promised[self.recorder.numbers[address(_tensors(module)[name])]] = self.promised[number]
        return module

    def fill(self, numbers: list[int]) -> Iterator[tuple[int, torch.UntypedStorage]]:
        before = torch.default_generator.get_state()
        after = yield from replay(self.recorder.recording, numbers, to_the_end=not self.promised)
        if self.promised or self.left is None:
            return
        # a user who seeded or drew since then goes on from there; whose weights are read has drawn nothing
        if torch.equal(before, self.left) and torch.equal(torch.default_generator.get_state(), before):
            torch.default_generator.set_state(after)


_DEFERRALS: weakref.WeakValueDictionary[int, _Deferral] = weakref.WeakValueDictionary()


def _known(tensor: Tensor) -> _Deferral | None:
    return _DEFERRALS.get(address(tensor)) if tensor.is_meta else None


def _recorded(name: str, tensor: Tensor) -> tuple[_Deferral, int]:
    """Whose tensor it is, and the number of its storage there. Raises DeferredError."""
    deferral = _known(tensor)
    if deferral is None:
        raise DeferredError(
            f"{name} is on meta and nobody recorded what it holds",
            hint="make it inside of the function that is given to autoshard.deferred",
        )
    if deferral.versions.get(address(tensor), tensor._version) != tensor._version:
        raise DeferredError(f"{name} was written to after autoshard.deferred returned", hint="write to it inside of the function")
    return deferral, deferral.recorder.numbers[address(tensor)]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _fill_plain(recorder: Recorder, module: nn.Module, name: str, tensor: Tensor) -> None:
    """A plain tensor on a module is a constant of the graph: it needs its content, if that depends on no draw."""
    content = value(recorder.recording, recorder.ref(tensor)) if recorder.mine(tensor) else None
    if content is not None:
        module.__dict__[name] = content.requires_grad_(tensor.requires_grad)
