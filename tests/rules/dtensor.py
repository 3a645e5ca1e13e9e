"""What torch's DTensor claims of an op call on an axis of two ranks, in our terms. Its registries are private: where they have
moved, `rules` finds nothing and the comparison is empty."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from autoshard.layout import PMAX, P, R, S, Type
from autoshard.trace.graph import Ref, map_refs
from autoshard.trace.interpret import _dtypes, resolve
from autoshard.trace.ops.rule import Strategy

from .sample import Sample


@contextlib.contextmanager
def fake_mesh() -> Iterator[Any]:
    """A mesh of two ranks that can't communicate; for asking, not for running."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def rules(s: Sample, mesh: Any) -> set[Strategy]:
    """DTensor's shardings of this call that our types can say (averages, minima and masked terms are left out)."""
    from torch.distributed.tensor import DTensor

    if not s.op.target.startswith("aten."):
        return set()
    op, propagator = resolve(s.op.target), DTensor._op_dispatcher.sharding_propagator
    try:
        if op in getattr(propagator, "op_single_dim_strategy_funcs", {}):
            rows = _single_dim(op, propagator.op_single_dim_strategy_funcs[op], s)
        elif op in propagator.op_strategy_funcs:
            rows = _by_strategy(op, propagator.op_strategy_funcs[op], s, mesh)
        else:
            return set()
    except Exception:  # it refuses by exceptions of many kinds
        return set()
    found = set()
    for outs, ins in rows:
        types = [_type(p) for p in (*outs, *ins)]
        if len(ins) == len(s.op.inputs) and len(outs) == len(s.op.outs) and None not in types:
            found.add(Strategy(tuple(types[len(outs) :]), tuple(types[: len(outs)])))  # type: ignore[arg-type]
    return found


def _arguments(s: Sample, of: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = map_refs((s.op.args, s.op.kwargs), lambda ref: of(ref))
    return tuple(list(a) if isinstance(a, tuple) else a for a in _dtypes(args)), _dtypes(kwargs)


def _meta(t: torch.Tensor) -> Any:
    from torch.distributed.tensor._dtensor_spec import TensorMeta

    return TensorMeta(shape=t.shape, stride=t.stride(), dtype=t.dtype)


def _single_dim(op: Any, function: Any, s: Sample) -> Iterator[tuple[Any, Any]]:
    def of(ref: Ref) -> Any:
        return _meta(s.tensors[ref.name])

    def one(a: Any) -> Any:  # a TensorMeta is itself a tuple, so arguments are rebuilt by hand
        return of(a) if isinstance(a, Ref) else [one(b) for b in a] if isinstance(a, tuple) else _dtypes(a)

    for row in function(op, tuple(map(one, s.op.args)), _dtypes(dict(s.op.kwargs))):
        yield row[: len(s.op.outs)], row[len(s.op.outs) :]


def _by_strategy(op: Any, function: Any, s: Sample, mesh: Any) -> Iterator[tuple[Any, Any]]:
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, TupleStrategy

    def of(ref: Ref) -> Any:
        t = s.tensors[ref.name]
        kinds = [Replicate(), Partial(), *(Shard(d) for d, n in enumerate(t.shape) if n > 1)]
        return OpStrategy([OpSpec(output_specs=DTensorSpec(mesh, (k,), tensor_meta=_meta(t)), input_specs=()) for k in kinds])

    args, kwargs = _arguments(s, of)
    args = tuple(TupleStrategy(a) if isinstance(a, list) and any(isinstance(x, OpStrategy) for x in a) else a for a in args)
    for spec in function(OpSchema(op, args, kwargs)).strategies:
        if spec.input_specs is not None:
            made = spec.output_specs if isinstance(spec.output_specs, tuple) else (spec.output_specs,) * len(s.op.outs)
            yield [o and o.placements[0] for o in made], [i.placements[0] for i in spec.input_specs]


def _type(placement: Any) -> Type | None:
    """Our word for a placement (or a placeholder of one), None if we have none."""
    kind = type(placement).__name__
    if kind == "Replicate":
        return R
    if kind == "Partial":
        return {"sum": P, "max": PMAX}.get(placement.reduce_op)
    return S(placement.dim) if kind in ("Shard", "_ShardingPlaceholder") else None
