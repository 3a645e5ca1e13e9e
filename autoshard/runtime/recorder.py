"""Modes under which a constructor runs on meta while every op that fills its tensors is recorded.

In: whatever the constructor calls. Out: a `Recording`, and for every storage that it made its number there (`Recorder.numbers`). Python
sees tensors that say they lie on the CPU; a number that it asks for is computed, if it depends on no draw, else DeferredError names
the line.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..errors import DeferredError
from ..trace.provenance import innermost
from . import truncated
from .recording import Op, Recording, Ref, Source
from .replay import value

OVERWRITES = frozenset(
    """normal_ uniform_ random_ exponential_ cauchy_ log_normal_ geometric_ fill_ zero_ copy_ bernoulli_""".split()
)  # fmt: skip
"""In-place ops whose result doesn't depend on what was there."""
_LIKE: dict[str, Callable[..., tuple[str, tuple[Any, ...]]]] = {
    "empty_like": lambda *_: ("", ()),
    "new_empty": lambda *_: ("", ()),
    "new_empty_strided": lambda *_: ("", ()),
    "zeros_like": lambda *_: ("zero_", ()),
    "new_zeros": lambda *_: ("zero_", ()),
    "ones_like": lambda *_: ("fill_", (1,)),
    "new_ones": lambda *_: ("fill_", (1,)),
    "full_like": lambda _, value: ("fill_", (value,)),
    "new_full": lambda _, size, value: ("fill_", (value,)),
    "rand_like": lambda *_: ("uniform_", ()),
    "randn_like": lambda *_: ("normal_", ()),
    "randint_like": lambda _, *bounds: ("random_", (0, *bounds)[-2:]),
}
"""Factories that take a tensor for its geometry alone: how they fill the new one."""
_REFUSED = frozenset("set_ resize_ resize_as_".split())
_HERE = str(Path(__file__).parent.parent)
_PLACE = {Tensor.is_meta.__get__: False, Tensor.device.__get__: torch.device("cpu"), Tensor.is_cpu.__get__: True}  # type: ignore[attr-defined]
_NUMBERS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.__array__: "__array__"}


class Recorder(TorchDispatchMode):
    """Runs factories and whatever touches their tensors on meta, and records it. Tensors from elsewhere stay real and are read only."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()
        self.numbers: dict[int, int] = {}
        self.generators: list[torch.Generator] = [torch.default_generator]
        self.seen: dict[int, Tensor] = {0: self.recording.start}
        self.after: dict[bytes, int] = {self.recording.start.numpy().tobytes(): -1}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        names = {a.name for a in func._schema.arguments}
        random = torch.Tag.nondeterministic_seeded in func.tags
        lifted = func is torch.ops.aten.lift_fresh.default
        if tensors and not lifted and not random and not any(map(self.mine, tensors)):
            return func(*args, **kwargs)  # of real tensors alone
        if any(not self.mine(t) for t in written(func, args, kwargs)):
            raise DeferredError(f"{func} writes into a tensor from outside of the constructor", where=where(), hint="make it inside")
        args, kwargs = pytree.tree_map_only(Tensor, self.meta, (args, kwargs))
        if lifted:
            return args[0]
        on_meta = {k: None if k == "generator" else v for k, v in kwargs.items() if k != "pin_memory"}
        if "device" in names and (not tensors or kwargs.get("device") is not None):
            on_meta["device"] = torch.device("meta")
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        name = func._schema.name.split("::")[1]
        if name in _REFUSED:
            raise DeferredError(f"{func} changes a tensor's memory in place, which can't be recorded", where=where())
        try:
            outs = func(*args, **on_meta)
        except Exception as error:
            return self.really(func, args, kwargs, error, random)
        if not all(isinstance(o, Tensor) or o is None for o in pytree.tree_leaves(outs)):
            return self.really(func, args, kwargs, None, random)
        if name in _LIKE and (made := [t for t in pytree.tree_leaves(outs) if not self.mine(t)]):
            fill, values = _LIKE[name](*args)
            anew = (tuple(made[0].shape), made[0].stride(), made[0].dtype, fill, values)
            self.record(_filled, anew, {k: v for k, v in kwargs.items() if k == "generator"}, outs, [], False, random)
        else:
            self.record(func, args, kwargs, outs, written(func, args, kwargs), name in OVERWRITES, random)
        return outs

    def mine(self, tensor: Tensor) -> bool:
        return address(tensor) in self.numbers

    def ref(self, tensor: Tensor) -> Ref:
        number = self.numbers[address(tensor)]
        return Ref(self.recording.part(number), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))

    def meta(self, tensor: Tensor) -> Tensor:
        """A real tensor as a constant; ours as it is."""
        if self.mine(tensor):
            return tensor
        if tensor.is_meta:
            raise DeferredError("a meta tensor from outside of the constructor is used", where=where(), hint="make it inside")
        if tensor.requires_grad:
            tensor = tensor.detach()
        twin = torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format)
        self.register(twin)
        self.recording.constant(self.numbers[address(twin)], self.ref(twin), tensor.cpu().clone(memory_format=torch.contiguous_format))
        return twin

    def register(self, tensor: Tensor) -> None:
        self.numbers[address(tensor)] = self.recording.new_storage(tensor.untyped_storage())

    def really(self, func: Any, args: Any, kwargs: Any, error: Exception | None, random: bool) -> Any:
        """The op on the tensors' contents, where they depend on no draw. (A python number of a tensor, a shape that depends on one.)"""
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        found = [value(self.recording, self.ref(t)) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if random or writes or not found or any(t is None for t in found):
            what = str(func).removeprefix("aten.")
            why = f"{what} fails without data: {error}" if error is not None else f"{what} makes a python value of numbers that are drawn"
            raise DeferredError(
                f"the constructor can't be deferred: {why}", where=where(), hint="construct the model whole, or take that line out of it"
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
        over = {address(t) for t in written if overwrites and _covers(t)}
        op = Op(func, None, dtype=torch.get_default_dtype(), random=random)
        order = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        targets = {id(t) for t in written}
        op.blind = random and (overwrites or not written) and all(id(t) in targets for t in order)
        old = {id(t): self.ref(t) for t in order}
        for place in over:
            self.recording.storages[self.numbers[place]].generation += 1
        refs = {id(t): self.ref(t) if id(t) in targets else old[id(t)] for t in order}
        op.fresh = {refs[id(t)].part: refs[id(t)] for t in written if address(t) in over}
        op.args = pytree.tree_map_only(Tensor, lambda t: refs[id(t)], (args, kwargs))
        if random:
            self.draw(op, kwargs.get("generator"))
        made: set[int] = set()
        for i in new:
            if address(flat[i]) not in made:
                made.add(address(flat[i]))
                self.register(flat[i])
                op.made[i] = self.ref(flat[i])
        op.touched = {ref.part for ref in (*refs.values(), *op.made.values())}
        number = {t: self.numbers[address(t)] for t in order}
        self.recording.add(
            op,
            [number[t] for t in order if id(t) not in targets],
            [number[t] for t in written if address(t) not in over],
            [self.numbers[place] for place in over],
        )

    def draw(self, op: Op, generator: torch.Generator | None) -> None:
        """Note which generator the op draws from, and whether the constructor has set it since the last draw."""
        generator = generator or torch.default_generator
        number = next((i for i, g in enumerate(self.generators) if g is generator), len(self.generators))
        if number == len(self.generators):
            if generator.device.type != "cpu":
                raise DeferredError(f"a generator on {generator.device} can't be replayed", where=where(), hint="make it on the CPU")
            self.generators.append(generator)
        state = generator.get_state()
        if number not in self.seen or not torch.equal(state, self.seen[number]):
            op.state = self.after.get(state.numpy().tobytes(), state)
            if isinstance(op.state, int):
                self.recording.remembered[op.state] = None
        op.source = number
        call_args, call_kwargs = op.args
        if "generator" in call_kwargs:
            op.args = (call_args, {**call_kwargs, "generator": Source(number) if number else None})
        # every draw leaves the generator in a state of its own, so that a constructor that comes back to one is understood
        with _disable_current_modes():
            torch.empty(1).uniform_(generator=generator)
        self.seen[number] = generator.get_state()
        self.after[self.seen[number].numpy().tobytes()] = len(self.recording.ops)


class OnCpu(TorchFunctionMode):
    """What python sees of recorded tensors: they say that they lie on the CPU, and give their contents where those depend on no draw."""

    def __init__(self, recorder: Recorder) -> None:
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
        self.recorder.record(truncated.trunc_normal_, (tensor, *args), kwargs, tensor, [tensor], overwrites=True, random=True)
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _PLACE and self.recorder.mine(args[0]):
            return _PLACE[func]
        if func in _NUMBERS and self.recorder.mine(args[0]):
            content = value(self.recorder.recording, self.recorder.ref(args[0]))
            if content is None:
                raise DeferredError(
                    f"the constructor can't be deferred: Tensor.{_NUMBERS[func]} reads numbers that are drawn",
                    where=where(),
                    hint="construct the model whole, or take that line out of it",
                )
            return func(content, *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an op writes into."""
    found: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
    return found


def address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _filled(
    size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, fill: str, values: tuple[Any, ...], **generator: Any
) -> Tensor:
    new = torch.empty_strided(size, stride, dtype=dtype)
    return getattr(new, fill)(*values, **generator) if fill else new


def _covers(tensor: Tensor) -> bool:
    """Whether a tensor is all of its memory, each element once."""
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != step:
            return False
        step *= size
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def where() -> str:
    """The innermost frame outside of torch and of this package."""
    return innermost([(f.filename, str(f.lineno)) for f in traceback.extract_stack() if not f.filename.startswith(_HERE)])
