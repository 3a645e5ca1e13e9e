"""What exists at once while a deferred model is filled: a rank's shards and the largest tensor that its constructor makes."""

from __future__ import annotations

import ctypes
import functools
import gc
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autoshard.api import parallelize
from autoshard.plan.cluster import Cluster
from autoshard.plan.search import search
from autoshard.runtime import truncated
from autoshard.runtime.deferred import deferred, materialise
from autoshard.runtime.in_process import InProcess
from autoshard.trace.capture import capture

from .checkpoints import without_graphs
from .deferring import Tall, same, whole
from .memory import Peak
from .ranks import ranks

N = 1024
SLACK = 3 * truncated._PIECE * 4
"""Bytes: numbers and masks of a piece, where work goes piece by piece."""


class Two(nn.Module):
    def __init__(self, make: Callable[[], Tensor]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(nn.Parameter(make(), requires_grad=False) for _ in range(2))


def empty(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(N, N, dtype=dtype)


def rows() -> Tensor:
    new = empty()
    for few in new.view(32, -1):
        few.normal_()
    return new


def normed() -> Tensor:
    new = torch.randn(N, N)
    return new / new.norm(dim=1, keepdim=True)


MAKES: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: nn.init.normal_(empty()),
    "drawn twice": lambda: nn.init.normal_(nn.init.kaiming_uniform_(empty())),
    "truncated": lambda: nn.init.trunc_normal_(empty(), std=0.02, a=-0.03, b=0.03),
    "zeroed row": lambda: nn.init.xavier_uniform_(empty()).index_fill_(0, torch.tensor([3]), 0.0),
    "by rows": rows,
    "arithmetic": lambda: torch.randn(N, N) * 0.02 + 1,
    "functions": lambda: torch.rand(N, N).log().neg().exp().clamp_(0, 5),
    "divided": lambda: 1.0 / (torch.rand(N, N) + 1),
    "by a row": normed,
    "copied": lambda: empty().copy_(torch.randn(N, N) * 0.1),
    "cloned": lambda: torch.randn_like(empty()).detach().clone(),
    "cast": lambda: torch.randn(N, N).to(torch.bfloat16),
    "cast into": lambda: empty(torch.bfloat16).copy_(torch.randn(N, N)),
    "eye": lambda: nn.init.eye_(empty()),
}
MORE: dict[str, tuple[float, Callable[[], Tensor]]] = {
    "transposed": (2, lambda: torch.randn(N, N).t().contiguous()),
    "of parts": (2, lambda: torch.cat([torch.randn(N // 2, N), torch.randn(N // 2, N)])),
    "of two draws": (2, lambda: torch.randn(N, N) + torch.randn(N, N)),
    "truncated far off": (5.25, lambda: nn.init.trunc_normal_(empty(), std=0.02, a=0.015, b=0.2)),
    "orthogonal": (3, lambda: nn.init.orthogonal_(empty())),
}
"""What needs more tensors' memory than one: an op other than by elements needs its arguments and its result."""


def peak_of(build: Callable[[], nn.Module]) -> int:
    torch.manual_seed(0)
    model = deferred(build)
    with Peak() as peak:
        for _, tensor in materialise(model):
            del tensor
    assert peak.left == 0
    torch.manual_seed(0)
    plain = build()
    same(dict(materialise(model)), plain)
    return peak.bytes


@pytest.mark.parametrize("how", MAKES)
def test_one_tensor_at_a_time(how):
    assert 4 * N * N <= peak_of(lambda: Two(MAKES[how])) <= 4 * N * N + SLACK


@pytest.mark.parametrize("how", [pytest.param(how, marks=pytest.mark.slow if how == "truncated far off" else ()) for how in MORE])
def test_what_needs_more(how):
    times, make = MORE[how]
    assert (times - 0.1) * 4 * N * N <= peak_of(lambda: Two(make)) <= (times + 0.1) * 4 * N * N + SLACK


class Later(nn.Module):
    """Draws of all tensors between a tensor's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(N, N, bias=False) for _ in range(4))
        for part in range(2):
            for layer in self.layers:
                layer.weight.data[part * N // 2 :][: N // 2].normal_()
        self.layers[3].weight.data.copy_(self.layers[0].weight.data * 2)


def test_what_is_drawn_in_turns_doesnt_wait_in_memory():
    assert peak_of(Later) <= 4 * N * N + SLACK
    assert peak_of(lambda: Later().to(torch.bfloat16)) <= 4 * N * N + SLACK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bounds", [(-0.03, 0.03), (-2.0, 2.0), (0.02, 0.2)], ids=str)
def test_truncated_normal_by_pieces_is_torchs(dtype, bounds):
    mine, other = (torch.Generator().manual_seed(1) for _ in range(2))
    for shape in ((90, 1001), (truncated._PIECE + 5,)):
        found = truncated.trunc_normal_(torch.empty(shape, dtype=dtype), 0.0, 0.02, *bounds, generator=mine)
        expected = nn.init.trunc_normal_(torch.empty(shape, dtype=dtype), 0.0, 0.02, *bounds, generator=other)
        assert torch.equal(found, expected) and torch.equal(mine.get_state(), other.get_state())
    assert truncated._alike(dtype, 0.0, 0.02, *bounds) == (bounds[0] < 0)


@pytest.mark.parametrize("mesh", [{"dp": 2}, {"tp": 2}, {"pp": 2}], ids=str)
def test_a_ranks_shards_and_the_largest_tensor(mesh):
    model = deferred(Tall, 8, 512)
    captured = capture(model, args=(torch.zeros(4, 2, dtype=torch.int64),))
    program = without_graphs(captured, search(captured.graph, Cluster.local(2), mesh, 1))
    run = InProcess(program, model)
    sizes = {name: t.numel() * t.element_size() for name, t in whole(model).items()}
    for rank in program.ranks:
        with Peak() as peak:
            (state,) = run._take([rank], model, whole(model))
        shards = sum(t.numel() * t.element_size() for t in (*state.params.values(), *state.buffers.values()))
        del state
        assert peak.left == shards <= 0.6 * sum(sizes.values())
        assert peak.bytes <= shards + max(sizes.values()) + SLACK, (mesh, rank.rank)


def peak_of_rank(layers: int) -> tuple[int, int, int]:
    """(peak growth of this process while it shards, its shards, the largest tensor), in bytes."""
    build = functools.partial(Tall, layers, 3072)  # tensors so large that the allocator takes and returns each by itself
    ids = torch.zeros(4, 2, dtype=torch.int64)
    parallelize(deferred(Tall, 2), "tp=2", args=(ids,), device="cpu")  # what is made once (imports, groups)
    model = deferred(build)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    stop, most = threading.Event(), 0

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.002):
            most = max(most, resident())

    gc.collect()
    # what is free already would be used first and not count, and what is freed would be kept
    ctypes.CDLL(None).malloc_trim(0)
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: larger blocks come from the system and go back at once
    before, watcher = resident(), threading.Thread(target=watch)
    watcher.start()
    sharded = parallelize(model, "tp=2", args=(ids,), device="cpu")
    stop.set()
    watcher.join()
    shards = sum(p.numel() * p.element_size() for p in sharded.parameters())
    return most - before, shards, max(t.numel() * t.element_size() for t in whole(model).values())


@pytest.mark.slow
def test_memory_of_a_rank():
    for peak, shards, largest in ranks(2, peak_of_rank, 12, start="spawn"):  # a heap that tests before left has holes of its own
        assert shards <= peak <= shards + largest + 4e6, (peak, shards, largest)
