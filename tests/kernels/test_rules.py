"""Every cut that a kernel's rule allows, by execution: on shards against the whole, outputs and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from autoshard.kernels.registry import KERNELS
from autoshard.trace.ops.rule import Factor, Place, parse
from benchmarks import kernels

from .against import relative, tensors

TINY = (
    "--tokens 8 --seq 4 --hidden 16 --ffn 24 --heads 4 --kv 2 --head-dim 8 --vocab 33 --experts 4 --expert-ffn 8 --params 100 "
    "--device cpu --dtype float32"
).split()
OP = {k.name: getattr(torch.ops.autoshard, k.name) for k in KERNELS}


def cases() -> Iterator[kernels.Case]:
    make = kernels.Maker(kernels.arguments(TINY), torch.device("cpu"))
    for group in kernels.CASES.values():
        yield from group(make)


def returned(out: Any) -> list[Tensor]:
    return [] if out is None else tensors(out)


def whole(case: kernels.Case) -> tuple[list[Any], list[Tensor]]:
    inputs = [x.clone() if isinstance(x, Tensor) else x for x in case.inputs]
    for i in case.wanted:
        inputs[i].requires_grad_()
    return inputs, returned(OP[case.kernel.name](*inputs))


def factors(case: kernels.Case, outs: list[Tensor]) -> tuple[Factor, ...]:
    schema = OP[case.kernel.name].default._schema
    slots = [i for i, a in enumerate(schema.arguments) if "Tensor" in str(a.type)]
    present = [i < len(case.inputs) and isinstance(case.inputs[i], Tensor) for i in slots]
    shapes = [tuple(case.inputs[i].shape) for i, here in zip(slots, present, strict=True) if here]
    if not outs:  # what it changes stands for what it returns
        rule = case.kernel.rule_for(present)
        return parse(rule + rule.partition(",")[0], shapes, [shapes[0]])
    return parse(case.kernel.rule_for(present), shapes, [tuple(o.shape) for o in outs])


def part(x: Tensor, place: Place | None, half: int) -> Tensor:
    return x if place is None else x.chunk(2, place.dim)[half]


def joined(parts: list[Tensor], place: Place | str | None) -> Tensor:
    return torch.cat(parts, place.dim) if isinstance(place, Place) else parts[0] + parts[1]


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.kernel.name)
def test_a_cut_computes_its_part(case):
    inputs, outs = whole(case)
    op, at = OP[case.kernel.name], [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    generator = torch.Generator().manual_seed(4)
    seeds = {i: torch.randn(o.shape, generator=generator) for i, o in enumerate(outs) if o.requires_grad}
    expected = torch.autograd.grad([outs[i] for i in seeds], [inputs[i] for i in case.wanted], list(seeds.values())) if case.wanted else ()
    for factor in factors(case, outs):
        results: list[list[Tensor]] = []
        grads: list[tuple[Tensor, ...]] = []
        for half in (0, 1):
            mine = [x.clone() if isinstance(x, Tensor) else x for x in case.inputs]
            for i, place in zip(at, factor.ins, strict=True):
                mine[i] = part(mine[i].detach(), place, half).contiguous().clone().requires_grad_(i in case.wanted)
            found = returned(op(*mine))
            results.append(found or [mine[0]])
            if case.wanted:
                mine_seeds = [part(s, p if isinstance(p := factor.outs[i], Place) else None, half) for i, s in seeds.items()]
                grads.append(torch.autograd.grad([found[i] for i in seeds], [mine[i] for i in case.wanted], mine_seeds))
        for i, place in enumerate(factor.outs):
            assert relative(joined([r[i] for r in results], place), outs[i] if outs else inputs[0]) < 1e-5, (factor, i)
        for j, i in enumerate(case.wanted):
            assert relative(joined([g[j] for g in grads], factor.ins[at.index(i)]), expected[j]) < 1e-5, (factor, "gradient", i)


def test_what_may_be_cut_is_what_one_would_expect():
    found = {case.kernel.name: {f.name for f in factors(case, whole(case)[1])} for case in cases()}
    assert found["rotary_one"] == {"b", "s", "h"} and found["rotary"] == {"b", "s"} and "f" in found["gated_mlp"]
    assert found["grouped_matmul"] == {"k", "m"} and found["linear_cross_entropy"] == {"r"} and found["adamw"] == {"n"}
    assert found["matmul_into"] == {"m", "n"}
    assert found["fp8_linear"] == found["quantise"] == set() and found["fp8_cast"] == {"r", "c"} and found["moe_route"] == {"t"}
