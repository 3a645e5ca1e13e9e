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
otherwise DeferredError names the line. After construction the model may be cut up, wrapped, tied and frozen, but what happens to a
tensor's content or dtype must happen inside `build`.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..errors import DeferredError
from ..trace.provenance import innermost
from .recording import Op, Recording, Ref, Source

M = TypeVar("M", bound=nn.Module)

OVERWRITES = frozenset(
    """normal_ uniform_ random_ exponential_ cauchy_ log_normal_ geometric_ fill_ zero_ copy_ bernoulli_""".split()
)  # fmt: skip
"""In-place ops whose result doesn't depend on what was there."""
_REFUSED = frozenset("set_ resize_ resize_as_".split())
_HERE = str(Path(__file__).parent.parent)
_PLACE = {Tensor.is_meta.__get__: False, Tensor.device.__get__: torch.device("cpu"), Tensor.is_cpu.__get__: True}  # type: ignore[attr-defined]
_NUMBERS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.__array__: "__array__"}


def deferred(build: Callable[..., M], *args: Any, **kwargs: Any) -> M:
    """`build(*args, **kwargs)` with its tensors on meta, to be filled rank by rank by `parallelize`. Raises DeferredError.

    torch's default generator is left somewhere else, the same on every rank; filling the model leaves it where construction on one
    device would have, unless it has been seeded or used in between.
    """
    recorder = _Recorder()
    with recorder, _OnCpu(recorder):
        model = build(*args, **kwargs)
    if not isinstance(model, nn.Module):
        raise DeferredError(f"the constructor returned {type(model).__name__}; an nn.Module is expected")
    deferral = _Deferral(recorder)
    for module in model.modules():
        module.__dict__["_autoshard_deferral"] = deferral  # any part of it that lives on keeps the recording
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.is_meta:
                _fill_plain(recorder, module, name, value)
    for tensor in _tensors(model).values():
        if tensor.is_meta:
            deferral.versions[_address(tensor)] = tensor._version
    return model


def is_deferred(model: Any) -> bool:
    """Whether some of a module's tensors wait to be filled."""
    return isinstance(model, nn.Module) and any(_known(t) is not None for t in _tensors(model).values())


def materialise(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by every name, whole, one storage at a time; a tensor may be dropped when the next is asked for.

    Raises DeferredError for a tensor on meta that no constructor was recorded for, or that was changed since.
    """
    groups: dict[int, tuple[_Deferral, dict[int, list[str]]]] = {}
    tensors = _tensors(model)
    for name, tensor in tensors.items():
        if not tensor.is_meta:
            yield name, tensor.detach()
            continue
        deferral = _known(tensor)
        if deferral is None:
            raise DeferredError(
                f"{name} is on meta and nobody recorded what it holds",
                hint="make it inside of the function that is given to autoshard.deferred (moves and casts of the model too)",
            )
        if deferral.versions.get(_address(tensor), tensor._version) != tensor._version:
            raise DeferredError(f"{name} was written to after autoshard.deferred returned", hint="write to it inside of the function")
        number = deferral.recorder.numbers[_address(tensor)]
        groups.setdefault(id(deferral), (deferral, {}))[1].setdefault(number, []).append(name)
    for deferral, by_storage in groups.values():
        for number, storage in deferral.fill(list(by_storage)):
            for name in by_storage[number]:
                yield name, deferral.recorder.ref(tensors[name]).on(storage)
            del storage  # before the next is made


class _Deferral:
    """A finished recording, found again by the addresses of its (meta) storages, which it keeps alive."""

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder
        self.versions: dict[int, int] = {}
        self.left = torch.default_generator.get_state()
        for address in recorder.numbers:
            _DEFERRALS[address] = self

    def __deepcopy__(self, memo: Any) -> _Deferral:
        return self

    def fill(self, numbers: list[int]) -> Iterator[tuple[int, torch.UntypedStorage]]:
        before = torch.default_generator.get_state()
        untouched = torch.equal(before, self.left)
        torch.default_generator.set_state(self.recorder.start)
        try:
            yield from self.recorder.recording.replay(numbers)
        finally:
            # a user who seeded or drew since then goes on from there
            if not untouched:
                torch.default_generator.set_state(before)


_DEFERRALS: weakref.WeakValueDictionary[int, _Deferral] = weakref.WeakValueDictionary()


def _known(tensor: Tensor) -> _Deferral | None:
    return _DEFERRALS.get(_address(tensor)) if tensor.is_meta else None


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _fill_plain(recorder: _Recorder, module: nn.Module, name: str, value: Tensor) -> None:
    """A plain tensor on a module is a constant of the graph: it needs its content, if that depends on no draw."""
    content = recorder.recording.value(recorder.ref(value)) if _address(value) in recorder.numbers else None
    if content is not None:
        module.__dict__[name] = content.requires_grad_(value.requires_grad)


# ---- recording ------------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Runs factories and whatever touches their tensors on meta, and records it. Tensors from elsewhere stay real and are read only."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()
        self.numbers: dict[int, int] = {}
        self.start = torch.default_generator.get_state()
        self.generators: list[torch.Generator] = [torch.default_generator]
        self.seen: dict[int, Tensor] = {0: self.start}
        self.after: dict[bytes, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        names = {a.name for a in func._schema.arguments}
        random = torch.Tag.nondeterministic_seeded in func.tags
        lifted = func is torch.ops.aten.lift_fresh.default
        if tensors and not lifted and not random and not any(map(self.mine, tensors)):
            return func(*args, **kwargs)  # of real tensors alone
        args, kwargs = pytree.tree_map_only(Tensor, self.meta, (args, kwargs))
        if lifted:
            return args[0]
        on_meta = {k: None if k == "generator" else v for k, v in kwargs.items() if k != "pin_memory"}
        if "device" in names and (not tensors or kwargs.get("device") is not None):
            on_meta["device"] = torch.device("meta")
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        if func._schema.name.split("::")[1] in _REFUSED:
            raise DeferredError(f"{func} changes a tensor's memory in place, which can't be recorded", where=_where())
        try:
            outs = func(*args, **on_meta)
        except Exception as error:
            return self.really(func, args, kwargs, error, random)
        if not all(isinstance(o, Tensor) or o is None for o in pytree.tree_leaves(outs)):
            return self.really(func, args, kwargs, None, random)
        over = func._schema.name.split("::")[1] in OVERWRITES
        self.record(func, args, kwargs, outs, _written(func, args, kwargs), over, random)
        return outs

    def mine(self, tensor: Tensor) -> bool:
        return _address(tensor) in self.numbers

    def ref(self, tensor: Tensor) -> Ref:
        number = self.numbers[_address(tensor)]
        part = (number, self.recording.storages[number].generation)
        return Ref(part, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))

    def meta(self, tensor: Tensor) -> Tensor:
        """A real tensor as a constant; ours as it is."""
        if self.mine(tensor):
            return tensor
        if tensor.is_meta:
            raise DeferredError("a meta tensor from outside of the constructor is used", where=_where(), hint="make it inside")
        if tensor.requires_grad:
            tensor = tensor.detach()
        twin = torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format)
        self.register(twin)
        self.recording.constant(self.numbers[_address(twin)], self.ref(twin), tensor.cpu().clone(memory_format=torch.contiguous_format))
        return twin

    def register(self, tensor: Tensor) -> None:
        self.numbers[_address(tensor)] = self.recording.new_storage(tensor.untyped_storage())

    def really(self, func: Any, args: Any, kwargs: Any, error: Exception | None, random: bool) -> Any:
        """The op on the tensors' contents, where they depend on no draw. (A python number of a tensor, a shape that depends on one.)"""
        written = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        found = [self.recording.value(self.ref(t)) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if random or written or not found or any(t is None for t in found):
            what = str(func).removeprefix("aten.")
            why = f"{what} fails without data: {error}" if error is not None else f"{what} makes a python value of numbers that are drawn"
            raise DeferredError(
                f"the constructor can't be deferred: {why}", where=_where(), hint="construct the model whole, or take that line out of it"
            ) from error
        feed = iter(found)
        args, kwargs = pytree.tree_map_only(Tensor, lambda _: next(feed), (args, kwargs))
        return pytree.tree_map_only(Tensor, self.meta, func(*args, **kwargs))

    def record(self, func: Any, args: Any, kwargs: Any, outs: Any, written: list[Tensor], overwrites: bool, random: bool) -> None:
        """Add the op, unless it makes views alone. `written`: tensors that it writes into, `overwrites`: without reading them."""
        flat = pytree.tree_leaves(outs)
        new = [i for i, out in enumerate(flat) if isinstance(out, Tensor) and not self.mine(out)]
        if not written and not new:
            return
        over = {_address(t) for t in written if overwrites and _covers(t)}
        op = Op(func, None, dtype=torch.get_default_dtype(), random=random)
        order = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        targets = {id(t) for t in written}
        old = {id(t): self.ref(t) for t in order}
        for address in over:
            self.recording.storages[self.numbers[address]].generation += 1
        refs = {id(t): self.ref(t) if id(t) in targets else old[id(t)] for t in order}
        op.fresh = {refs[id(t)].part: refs[id(t)] for t in written if _address(t) in over}
        op.args = pytree.tree_map_only(Tensor, lambda t: refs[id(t)], (args, kwargs))
        if random:
            self.draw(op, kwargs.get("generator"))
        made: set[int] = set()
        for i in new:
            if _address(flat[i]) not in made:
                made.add(_address(flat[i]))
                self.register(flat[i])
                op.made[i] = self.ref(flat[i])
        op.touched = {ref.part for ref in (*refs.values(), *op.made.values())}
        number = {t: self.numbers[_address(t)] for t in order}
        self.recording.add(
            op,
            [number[t] for t in order if id(t) not in targets],
            [number[t] for t in written if _address(t) not in over],
            [self.numbers[address] for address in over],
        )

    def draw(self, op: Op, generator: torch.Generator | None) -> None:
        """Note which generator the op draws from, and whether the constructor has set it since the last draw."""
        generator = generator or torch.default_generator
        number = next((i for i, g in enumerate(self.generators) if g is generator), len(self.generators))
        if number == len(self.generators):
            if generator.device.type != "cpu":
                raise DeferredError(f"a generator on {generator.device} can't be replayed", where=_where(), hint="make it on the CPU")
            self.generators.append(generator)
        state = generator.get_state()
        if number not in self.seen or not torch.equal(state, self.seen[number]):
            op.state = self.after.get(state.numpy().tobytes(), state)
            if isinstance(op.state, int):
                self.recording.remembered[op.state] = None
        op.source = number
        if number:
            call_args, call_kwargs = op.args
            op.args = (call_args, {**call_kwargs, "generator": Source(number)})
        # every draw leaves the generator in a state of its own, so that a constructor that comes back to one is understood
        with _disable_current_modes():
            torch.empty(1).uniform_(generator=generator)
        self.seen[number] = generator.get_state()
        self.after[self.seen[number].numpy().tobytes()] = len(self.recording.ops)


class _OnCpu(TorchFunctionMode):
    """What python sees of recorded tensors: they say that they lie on the CPU, and give their contents where those depend on no draw."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __enter__(self) -> Any:
        # it draws again while a draw is out of bounds: one op, not many
        self.whole: Any = nn.init._no_grad_trunc_normal_
        nn.init._no_grad_trunc_normal_ = self.trunc_normal
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        nn.init._no_grad_trunc_normal_ = self.whole
        super().__exit__(*error)

    def trunc_normal(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.recorder.mine(tensor):
            return self.whole(tensor, *args, **kwargs)
        self.recorder.record(self.whole, (tensor, *args), kwargs, tensor, [tensor], overwrites=True, random=True)
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _PLACE and self.recorder.mine(args[0]):
            return _PLACE[func]
        if func in _NUMBERS and self.recorder.mine(args[0]):
            content = self.recorder.recording.value(self.recorder.ref(args[0]))
            if content is None:
                raise DeferredError(
                    f"the constructor can't be deferred: Tensor.{_NUMBERS[func]} reads numbers that are drawn",
                    where=_where(),
                    hint="construct the model whole, or take that line out of it",
                )
            return func(content, *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an op writes into."""
    found: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
    return found


def _covers(tensor: Tensor) -> bool:
    """Whether a tensor is all of its memory, each element once."""
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != step:
            return False
        step *= size
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _where() -> str:
    """The innermost frame outside of torch and of this package."""
    return innermost([(f.filename, str(f.lineno)) for f in traceback.extract_stack() if not f.filename.startswith(_HERE)])
