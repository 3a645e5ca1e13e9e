"""The kernels, in one table. `lower` draws on it, and nothing else does.

An entry says what a kernel means (`reference`), how it may be cut (`rule`), when it can run (`applies`), what it costs, and what was
gained by it where it was measured. Its operator is opaque: with a fake and a backward that is an opaque operator too, so that a joint
trace shows two nodes. Where Triton can't run (no CUDA device, no Triton), or `applies` says no, the operator runs its reference: slower,
and the same.

>>> KERNELS["rms_norm"].op
'autoshard.rms_norm.default'
>>> KERNELS["rms_norm"].rule_for((True, False))
'… h! -> … h!'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import (
    accumulate,
    adamw,
    cross_entropy,
    draws,
    dropout_attention,
    gated_mlp,
    grouped_matmul,
    layer_norm,
    moe,
    quantise,
    rms_norm,
    rotary,
)
from .measured import MEASURED, Measurement


@dataclass(frozen=True)
class Kernel:
    """One fused kernel.

    - `op`: the torch.library operator that takes the pattern's place
    - `reference`: plain torch of the same signature, differentiable: the meaning
    - `rule`: factors in einsum notation, all operands present (`rule_for` leaves out those that a call leaves out); `h!` isn't cut
    - `applies(*the op's arguments, capability=(9, 0) or None)`: whether the kernel can run, by dtypes and shapes alone: fakes will do
    - `cost(*the operands' shapes, itemsize=2)`: FLOPs and bytes moved, forward and backward together
    - `measured`: gains (a table adds those of `measured.py`); a kernel without one isn't chosen by default
    """

    name: str
    op: str
    reference: Callable[..., Any]
    rule: str
    applies: Callable[..., bool]
    cost: Callable[..., tuple[float, float]]
    measured: tuple[Measurement, ...] = ()

    @property
    def chosen(self) -> bool:
        """Whether it is used where nothing else is asked for: it was measured, and never lost."""
        return bool(self.measured) and all(m.gain > 1 for m in self.measured)

    def rule_for(self, present: Sequence[bool]) -> str:
        """The rule of a call that has only these of the op's tensor operands."""
        left, right = self.rule.split("->")
        operands = [side.strip() for side in left.split(",")]
        assert len(present) == len(operands), (self.name, present, operands)
        return ", ".join(o for o, here in zip(operands, present, strict=True) if here) + " -> " + right.strip()


class Table(tuple[Kernel, ...]):
    """Kernels in order; by name too. A name or an operator that is there already is refused."""

    def __new__(cls, kernels: Sequence[Kernel]) -> Table:
        names: set[str] = set()
        for kernel in kernels:
            for key in (kernel.name, kernel.op):
                if key in names:
                    raise ValueError(f"two kernels are called {key}: give each its own name and its own operator")
                names.add(key)
        return super().__new__(cls, (replace(k, measured=(*k.measured, *MEASURED.get(k.name, ()))) for k in kernels))

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return super().__getitem__(key)
        for kernel in self:
            if key in (kernel.name, kernel.op):
                return kernel
        raise KeyError(f"no kernel is called {key}; there are {', '.join(k.name for k in self)}")

    def __str__(self) -> str:
        """A line a kernel: name, rule, and its least gain where it was measured."""
        gains = [f"{min(m.gain for m in k.measured):.2f} ×" if k.measured else "not measured" for k in self]
        return "\n".join(f"{k.name:22}{k.rule:70}{gain}" for k, gain in zip(self, gains, strict=True))


KERNELS = Table(
    (
        Kernel(
            name="rms_norm",
            op="autoshard.rms_norm.default",
            reference=rms_norm.reference,
            rule="… h!, h! -> … h!",
            applies=rms_norm.applies,
            cost=rms_norm.cost,
        ),
        Kernel(
            name="add_rms_norm",
            op="autoshard.add_rms_norm.default",
            reference=rms_norm.add_reference,
            rule="… h!, … h!, h! -> … h!, … h!",
            applies=rms_norm.add_applies,
            cost=rms_norm.add_cost,
        ),
        Kernel(
            name="layer_norm",
            op="autoshard.layer_norm.default",
            reference=layer_norm.reference,
            rule="… h!, h!, h! -> … h!",
            applies=layer_norm.applies,
            cost=layer_norm.cost,
        ),
        Kernel(
            name="add_layer_norm",
            op="autoshard.add_layer_norm.default",
            reference=layer_norm.add_reference,
            rule="… h!, … h!, h!, h! -> … h!, … h!",
            applies=layer_norm.add_applies,
            cost=layer_norm.add_cost,
        ),
        Kernel(  # heads of q and k may differ in number, so that the notation can't cut both: `rotary_one` can be cut by head
            name="rotary",
            op="autoshard.rotary.default",
            reference=rotary.reference,
            rule="b h! s e!, b k! s e!, b s r!, b s r! -> b h! s e!, b k! s e!",
            applies=rotary.applies,
            cost=rotary.cost,
        ),
        Kernel(
            name="rotary_one",
            op="autoshard.rotary_one.default",
            reference=rotary.one_reference,
            rule="b h s e!, b s r!, b s r! -> b h s e!",
            applies=rotary.one_applies,
            cost=rotary.one_cost,
        ),
        Kernel(  # heads are counted by its arguments: a packed projection is cut before it is packed
            name="rotary_packed",
            op="autoshard.rotary_packed.default",
            reference=rotary.packed_reference,
            rule="b s p!, b s r!, b s r! -> b h! s e!, b k! s e!, b k! s e!",
            applies=rotary.packed_applies,
            cost=rotary.packed_cost,
        ),
        Kernel(
            name="gated_mlp",
            op="autoshard.gated_mlp.default",
            reference=gated_mlp.reference,
            rule="… f, … f -> … f",
            applies=gated_mlp.applies,
            cost=gated_mlp.cost,
        ),
        Kernel(
            name="gated_mlp_packed",
            op="autoshard.gated_mlp_packed.default",
            reference=gated_mlp.packed_reference,
            rule="… p! -> … f!",
            applies=gated_mlp.packed_applies,
            cost=gated_mlp.packed_cost,
        ),
        Kernel(  # cut along the vocabulary through `start` and `combine`, not by the rule: its maximum and sums aren't plain sums
            name="head_partials",
            op="autoshard.head_partials.default",
            reference=cross_entropy.reference,
            rule="r h!, v! h!, r, -> r, r, r, r",
            applies=cross_entropy.applies,
            cost=cross_entropy.cost,
        ),
        Kernel(
            name="linear_cross_entropy",
            op="autoshard.linear_cross_entropy.default",
            reference=cross_entropy.full_reference,
            rule="r h!, v! h!, r, -> , r h!, v! h!",
            applies=cross_entropy.applies,
            cost=cross_entropy.full_cost,
        ),
        Kernel(  # in place: `into` has no result
            name="matmul_into",
            op="autoshard.matmul_into.default",
            reference=accumulate.reference,
            rule="m n, m k!, k! n -> ",
            applies=accumulate.applies,
            cost=accumulate.cost,
        ),
        Kernel(  # causal rows aren't cut, and the draws' places are told apart by `lower`, which knows what it cuts
            name="dropout_attention",
            op="autoshard.dropout_attention.default",
            reference=dropout_attention.reference,
            rule="b h! s! e!, b k! t! e!, b k! t! e!, b h! s! t!, , b, h!, s! -> b h! s! e!, b h! s!",
            applies=dropout_attention.applies,
            cost=dropout_attention.cost,
        ),
        Kernel(
            name="keep_bits",
            op="autoshard.keep_bits.default",
            reference=draws.keep_reference,
            rule=", r -> r w!",
            applies=draws.applies,
            cost=draws.keep_cost,
        ),
        Kernel(
            name="random_bits",
            op="autoshard.random_bits.default",
            reference=draws.random_reference,
            rule=", r -> r c!",
            applies=draws.applies,
            cost=draws.random_cost,
        ),
        Kernel(
            name="adamw",
            op="autoshard.adamw.default",
            reference=adamw.reference,
            rule="n, n, n, n, n, , , , , -> ",
            applies=adamw.applies,
            cost=adamw.cost,
        ),
        Kernel(
            name="moe_route",
            op="autoshard.moe_route.default",
            reference=moe.route_reference,
            rule="t e!, e! -> t k!, t k!",
            applies=moe.route_applies,
            cost=moe.route_cost,
        ),
        Kernel(  # cut along h, positions would be the same on all shards, for which the notation has no word
            name="moe_permute",
            op="autoshard.moe_permute.default",
            reference=moe.permute_reference,
            rule="t! h!, t! k! -> n! h!, t! k!, e!",
            applies=moe.permute_applies,
            cost=moe.permute_cost,
        ),
        Kernel(
            name="grouped_matmul",
            op="autoshard.grouped_matmul.default",
            reference=grouped_matmul.reference,
            rule="n! k, e! k m, e! -> n! m",
            applies=grouped_matmul.applies,
            cost=grouped_matmul.cost,
        ),
        Kernel(
            name="moe_unpermute",
            op="autoshard.moe_unpermute.default",
            reference=moe.unpermute_reference,
            rule="n! h, t! k!, t! k! -> t! h",
            applies=moe.unpermute_applies,
            cost=moe.unpermute_cost,
        ),
        Kernel(
            name="quantise",
            op="autoshard.quantise.default",
            reference=quantise.reference,
            rule="r! c!, -> r! c!, c! r!, , ",
            applies=quantise.applies,
            cost=quantise.cost,
        ),
        Kernel(
            name="fp8_cast",
            op="autoshard.fp8_cast.default",
            reference=quantise.cast_reference,
            rule="r c, -> r c, c r",
            applies=quantise.applies,
            cost=quantise.cast_cost,
        ),
        Kernel(  # scales are those of whole tensors: cut, a shard would have its own
            name="fp8_linear",
            op="autoshard.fp8_linear.default",
            reference=quantise.linear_reference,
            rule="r! k!, n! k! -> r! n!, k! r!, k! n!, , ",
            applies=quantise.linear_applies,
            cost=quantise.linear_cost,
        ),
    )
)
"""All kernels."""
