"""Adam and AdamW in the kernels' interpreter against torch's own, in float64; on a GPU beside torch's fused kernel."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

from autoshard.runtime.in_process import InProcess
from autoshard.runtime.optimizer import ShardedOptimizer
from autoshard.runtime.skipped import Skipped

from ..kernels.conftest import triton  # noqa: F401  (a fixture)
from .by_hand import Plain, batch, program
from .checkpoints import pretend, same, whole

SHAPES = {"a.weight": (5, 3), "a.bias": (3,), "b.weight": (64, 48), "long": (20001,), "empty": (0, 4), "idle": (7,)}
GROUPS = [("*.bias", {"weight_decay": 0.0, "eps": 1e-6}), ("b.*", {"lr": 3e-2, "betas": (0.8, 0.99)})]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with numpy.errstate(all="ignore"):  # lanes that are masked
        yield


def params(dtype: torch.dtype, device: str = "cpu") -> list[tuple[str, nn.Parameter]]:
    g = torch.Generator().manual_seed(0)
    return [(name, nn.Parameter(torch.randn(s, generator=g).to(device, dtype))) for name, s in SHAPES.items()]


def give(named: list[tuple[str, nn.Parameter]], step: int, bad: bool = False) -> None:
    """Gradients, the same for any dtype that they are rounded to bf16 in."""
    for i, (name, p) in enumerate(named):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).bfloat16()
        p.grad = None if name == "idle" else (g * float("inf") if bad and name == "long" else g).to(p.device, p.dtype)


def make(cls: type[optim.Optimizer], named: list[tuple[str, nn.Parameter]], masters: bool = True, **options: Any) -> ShardedOptimizer:
    return ShardedOptimizer(cls, named, GROUPS, list(SHAPES), masters, **{"lr": 1e-2, **options})


def exact(cls: type[optim.Optimizer], named: list[tuple[str, nn.Parameter]], **options: Any) -> ShardedOptimizer:
    """torch's own, in float64, whatever there is to run on."""
    wide = [(name, nn.Parameter(p.detach().double())) for name, p in named]
    made = make(cls, wide, **options)
    assert made.kernel is None
    return made


def distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return 0.0 if not found.numel() else float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("cls", "options"),
    [(optim.AdamW, {"weight_decay": 0.1}), (optim.Adam, {}), (optim.Adam, {"weight_decay": 0.1}), (optim.AdamW, {"betas": (0.0, 0.9999)})],
    ids=str,
)
@pytest.mark.parametrize("skips", [(), (0, 2)], ids=str)
def test_it_is_torchs(triton, cls, options, skips):  # noqa: F811
    named = params(torch.float32)
    ours, reference = make(cls, named, **options), exact(cls, named, **options)
    for step in range(4):
        give(named, step, bad=step in skips), give(reference.named, step, bad=step in skips)
        ours.step(), reference.step()
    assert ours.kernel is not None and ours.kernel.table.launches
    assert ours.skipped == reference.skipped == len(skips)
    for (name, p), (_, q) in zip(named, reference.named, strict=True):
        assert distance(p, q) <= 2e-6, name  # a few of float32's ulp
        mine, theirs = ours.state.get(p, {}), reference.state.get(q, {})
        assert mine.keys() == theirs.keys() and bool(mine) == (name != "idle")
        for key in mine:
            assert distance(mine[key], theirs[key]) <= 2e-6 and mine[key].dtype == torch.float32, (name, key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters(triton, dtype):  # noqa: F811
    named = params(dtype)
    ours, reference = make(optim.AdamW, named), exact(optim.AdamW, named)
    for step in range(4):
        give(named, step, bad=step == 1), give(reference.named, step, bad=step == 1)
        ours.step(), reference.step()
    for (name, p), (_, q) in zip(named, reference.named, strict=True):
        master = ours.masters[name]
        assert distance(master, q) <= 2e-6, name
        assert distance(p, master) <= torch.finfo(dtype).eps, name  # the interpreter cuts off
        assert all(ours.state[master][key].dtype == torch.float32 for key in ("exp_avg", "exp_avg_sq", "step") if name != "idle")


def test_bfloat16_without_masters(triton):  # noqa: F811
    named = params(torch.bfloat16)
    ours, reference = make(optim.AdamW, named, masters=False), exact(optim.AdamW, named)
    for step in range(3):
        give(named, step), give(reference.named, step)
        ours.step(), reference.step()
    for (name, p), (_, q) in zip(named, reference.named, strict=True):
        # three roundings of p to 8 bits, and of each update, of 3e-2 at most, to 8 bits of its moments
        assert ((p.double() - q).abs() <= 3 * 2**-7 * q.abs() + 3 * 3e-2 * 2**-4).all(), name
        assert name == "idle" or {key: t.dtype for key, t in ours.state[p].items()} == {
            "step": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16,
        }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("old", [{}, {"fused": False}, {"foreach": True}], ids=str)
def test_a_state_of_any_implementation_is_gone_on_from(triton, dtype, old):  # noqa: F811
    named, again = params(dtype), params(dtype)
    first = make(optim.AdamW, named, **old)
    assert (first.kernel is None) == bool(old)
    for step in range(2):
        give(named, step)
        first.step()
    second = make(optim.AdamW, again, lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.kernel is not None and [g["lr"] for g in second.param_groups] == [1e-2, 3e-2, 1e-2]
    for (_, p), (_, q) in zip(named, again, strict=True):
        q.data.copy_(p)
    for step in range(2, 4):
        give(named, step), give(again, step)
        first.step(), second.step()
    assert second.kernel.table.launches  # and not torch's, after all
    for (name, p), (_, q) in zip(named, again, strict=True):
        one, two = (first.masters[name], second.masters[name]) if dtype == torch.bfloat16 else (p, q)
        assert distance(two, one) <= 2e-6
        if name != "idle":
            assert second.state[two]["step"] == 4


def test_schedulers_and_rates_on_the_device(triton):  # noqa: F811
    named = params(torch.float32)
    ours, reference = make(optim.AdamW, named), exact(optim.AdamW, named)
    schedules = [optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (ours, reference)]
    for step in range(3):
        if step == 2:
            ours.param_groups[2]["lr"] = torch.tensor(ours.param_groups[2]["lr"])
        give(named, step), give(reference.named, step)
        ours.step(), reference.step()
        for schedule in schedules:
            schedule.step()
    assert all(distance(p, q) <= 2e-6 for (_, p), (_, q) in zip(named, reference.named, strict=True))


def test_closures_and_accumulated_gradients(triton):  # noqa: F811
    named = params(torch.float32)
    ours, reference = make(optim.AdamW, named), exact(optim.AdamW, named)
    for step in range(2):
        for optimizer in (ours, reference):

            def closure(optimizer: ShardedOptimizer = optimizer, step: int = step) -> float:
                give(optimizer.named, step)
                for _, p in optimizer.named:
                    if p.grad is not None:
                        p.grad.add_(p.detach(), alpha=0.5)
                return 3.0

            assert optimizer.step(closure) == 3.0
            optimizer.zero_grad(set_to_none=step == 0)
    assert all(distance(p, q) <= 2e-6 for (_, p), (_, q) in zip(named, reference.named, strict=True))


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"maximize": True}, {"foreach": True}, {"fused": False}], ids=str)
def test_what_it_does_not_compute_is_torchs(triton, options):  # noqa: F811
    named, plain = params(torch.float32), params(torch.float32)
    ours = make(optim.AdamW, named, **options)
    theirs = optim.AdamW([{"params": [p for n, p in plain if n == name], **GROUPS[k][1]} for name, k in (("a.bias", 0), ("b.weight", 1))]
                         + [{"params": [p for n, p in plain if n not in ("a.bias", "b.weight")]}], lr=1e-2, **options)  # fmt: skip
    for step in range(3):
        give(named, step, bad=step == 1), give(plain, step)
        ours.step()
        if step != 1:
            theirs.step()
    assert ours.skipped == 1
    assert all(distance(p, q) <= 2e-6 for (_, p), (_, q) in zip(named, plain, strict=True))


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {}, {"momentum": 0.9, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("skips", [(0,), (1,)], ids=str)
def test_torchs_fused_optimizers_leave_steps_out_themselves(options, skips):
    named, plain = params(torch.float32), params(torch.float32)
    ours = ShardedOptimizer(optim.SGD, named, lr=0.1, fused=True, **options)
    theirs = optim.SGD([p for _, p in plain], lr=0.1, **options)
    for step in range(4):
        give(named, step, bad=step in skips), give(plain, step)
        ours.step()
        if step not in skips:
            theirs.step()
    assert ours.skipped == 1 and ours._leaves_out()
    assert all(distance(p, q) <= 1e-6 for (_, p), (_, q) in zip(named, plain, strict=True))
    assert len(ours.state) == (len(named) - 1 if "momentum" in options else 0)  # asking makes none


class Reads(TorchDispatchMode):
    """Counts what brings a number to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cls", [optim.AdamW, optim.Adam])
def test_no_number_is_read(triton, cls, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Skipped, "add", lambda self, skip: None)  # on a CPU the count is read at once: it costs nothing there
    named = params(torch.bfloat16)
    ours = make(cls, named)
    for step in range(2):
        give(named, step)
        with Reads() as reads:
            ours.step()
        assert not reads.count
    waits = ShardedOptimizer(optim.RMSprop, named)
    with Reads() as reads:
        waits.step()
    assert reads.count  # so that this test can fail


# ---- in a program


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_program_clips_skips_and_steps_as_without(triton, dtype, caplog, monkeypatch):  # noqa: F811
    kind = getattr(torch, dtype)
    runs = [InProcess(program(dtype=dtype), Plain(kind)) for _ in range(2)]
    optimizers = []
    for run, kernels in zip(runs, ("1", "0"), strict=True):
        monkeypatch.setenv("TRITON_INTERPRET", kernels)
        optimizers.append(run.optimizer(optim.AdamW, lr=0.05))
    assert [o.kernel is not None for o in optimizers] == [True, False]
    for step in range(4):
        norms = []
        for run, optimizer, kernels in zip(runs, optimizers, ("1", "0"), strict=True):
            monkeypatch.setenv("TRITON_INTERPRET", kernels)
            values = batch(kind)
            run.train_step(**{k: v * float("nan") if step == 1 and v.is_floating_point() else v for k, v in values.items()})
            if step != 3:
                norms.append(run.clip_grad_norm_(0.1 if step else 1e6))
            optimizer.step()
            optimizer.zero_grad()
        if norms:
            torch.testing.assert_close(*norms, rtol=1e-5 if dtype == "float32" else 2e-2, atol=0, equal_nan=True)
    assert [o.skipped for o in optimizers] == [1, 1]
    assert caplog.text.count("the step is left out") == 2
    one, two = (run.state_dict() for run in runs)
    allowed = {"rtol": 1e-4, "atol": 1e-6} if dtype == "float32" else {"rtol": 3e-2, "atol": 3e-2}
    for name in one:
        torch.testing.assert_close(one[name], two[name], **allowed)


@pytest.mark.parametrize(("before", "after"), [("1", "1"), ("0", "1"), ("1", "0")])
def test_checkpoints_know_no_difference(triton, before, after, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TRITON_INTERPRET", before)
    run = InProcess(program(dtype="bfloat16"), Plain(torch.bfloat16))
    optimizer = run.optimizer(optim.AdamW, lr=0.05)
    pretend(run, optimizer, 2)
    run.save(tmp_path, step=2)
    monkeypatch.setenv("TRITON_INTERPRET", after)
    again = InProcess(program(dtype="bfloat16"), Plain(torch.bfloat16))
    other = again.optimizer(optim.AdamW, lr=0.5)
    again.load(tmp_path)
    one, two = whole(run), whole(again)
    for found in (one, two):  # how it is computed is each run's own
        for group in found["0.groups"]:
            group.pop("fused")
    same(one, two)
    pretend(again, other, 2)
    assert bool(other.kernel and other.kernel.table.launches) == (after == "1")
    monkeypatch.setenv("TRITON_INTERPRET", before)
    pretend(run, optimizer, 2)
    for (_, p), (_, q) in zip(optimizer.masters.items(), other.masters.items(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "masters"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("cls", [optim.AdamW, optim.Adam])
def test_on_a_gpu_nothing_waits(dtype, masters, cls, caplog):
    named, plain = params(dtype, "cuda"), params(dtype, "cuda")
    ours = make(cls, named, masters)
    theirs = make(cls, plain, masters, weight_decay=0.01 if cls is optim.AdamW else 0.0)
    theirs.kernel = None  # torch's fused kernel
    assert ours.kernel is not None and ours.inner.param_groups[0]["fused"]
    with caplog.at_level(logging.WARNING, logger="autoshard"):
        for step in range(5):
            give(named, step, bad=step == 2), give(plain, step, bad=step == 2)
            torch.cuda.synchronize()
            if step:  # the first compiles
                torch.cuda.set_sync_debug_mode("error")
            try:
                ours.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            theirs.step()
        assert ours.skipped == theirs.skipped == 1
    assert "the step is left out on every rank (1 so far)" in caplog.text
    ulp = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}[dtype]
    for (name, p), (_, q) in zip(named, plain, strict=True):
        assert distance(p, q) <= ulp, name
        if masters and dtype == torch.bfloat16:
            assert distance(ours.masters[name], theirs.masters[name]) <= 2e-6, name


@pytest.mark.gpu
def test_on_a_gpu_torchs_fused_optimizers_do_not_wait_either():
    named = params(torch.float32, "cuda")
    ours = ShardedOptimizer(optim.SGD, named, lr=0.1, momentum=0.9)
    for step in range(4):
        give(named, step, bad=step == 2)
        before = [p.detach().clone() for _, p in named]
        torch.cuda.synchronize()
        if step:  # the first makes momentum, and does wait
            torch.cuda.set_sync_debug_mode("error")
        try:
            ours.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert any(not torch.equal(p, b) for (_, p), b in zip(named, before, strict=True)) == (step != 2)
    assert ours.skipped == 1


@pytest.mark.gpu
def test_on_a_gpu_clipping_does_not_wait():
    from autoshard.runtime.fused import Gradients

    named, grads = params(torch.bfloat16, "cuda"), Gradients()
    give(named, 0)
    given = [(name != "a.bias", p.grad) for name, p in named if p.grad is not None]
    expected = sum(g.double().square().sum() for counts, g in given if counts)
    scaled = [(g.float() * 0.25).bfloat16() for _, g in given]
    for turn in range(2):  # the first compiles
        torch.cuda.set_sync_debug_mode("error" if turn else "default")
        try:
            launches = grads.launches(given)
            assert launches is not None
            total = grads.squares(launches)
            grads.scale_(launches, torch.full((), 1.0, device="cuda") if not turn else total * 0 + 0.25)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert abs(float(total) - float(expected)) <= 1e-6 * float(expected)
    assert all(torch.equal(g, s) for (_, g), s in zip(given, scaled, strict=True))
