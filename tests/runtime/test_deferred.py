from __future__ import annotations

import functools
import gc
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoshard.api import parallelize
from autoshard.errors import DeferredError
from autoshard.lower import compile
from autoshard.plan.cluster import Cluster
from autoshard.plan.search import search
from autoshard.runtime.deferred import deferred, is_deferred, materialise
from autoshard.runtime.in_process import InProcess
from autoshard.trace.capture import capture
from tests import zoo
from tests.zoo import hf

from .ranks import ranks

MESHES = [
    {"dp": 2}, {"dp": 4}, {"tp": 2}, {"tp": 4}, {"pp": 2}, {"dp": 2, "tp": 2}, {"dp": 2, "pp": 2}, {"tp": 2, "pp": 2},
    {"dp": 4, "tp": 2}, {"dp": 2, "tp": 2, "pp": 2},
]  # fmt: skip
FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen2", "gemma2", "phi3", "mixtral", "bert", "opt", "bloom")


class Everything(nn.Module):
    """Ways in which constructors fill tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(20, 30), nn.Embedding(50, 20, padding_idx=0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(20, 4, 40), 2, enable_nested_tensor=False)  # deep copies
        self.head = nn.Linear(20, 50, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("frequencies", 1.0 / 10000 ** (torch.arange(0, 20, 2).float() / 20))
        self.register_buffer("mask", torch.ones(6, 6).tril().bool(), persistent=False)
        self.rates = torch.linspace(0, 0.1, 4)
        assert [round(r.item(), 4) for r in self.rates] == [0.0, 0.0333, 0.0667, 0.1] and self.rates.tolist()[0] == 0
        assert bool((self.mask.sum() == 21).all()) and self.mask.nonzero().shape == (21, 2) and self.rates.numpy().shape == (4,)
        assert self.linear.weight.device == torch.device("cpu") and not self.linear.weight.is_meta
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.orthogonal_(self.encoder.layers[0].linear1.weight)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.forked = nn.Parameter(torch.randn(3, 3))
        self.own = nn.Parameter(torch.randn(33, generator=torch.Generator().manual_seed(5)))
        self.cast = nn.Parameter(torch.randn(3, 3).to(torch.bfloat16))
        self.rows = nn.Parameter(torch.empty(4, 5))
        self.rows.data[1:3].normal_()
        self.rows.data[0] = self.rows.data[1] * 2
        self.rows.data[3].fill_(math.pi)
        with torch.no_grad():
            for p in self.encoder.parameters():
                p.mul_(0.5)
        self.own.data = torch.cat([self.own.data, self.forked.data.flatten()])


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def check_same(build) -> nn.Module:
    torch.manual_seed(3)
    plain, after = build(), torch.randn(3)
    torch.manual_seed(3)
    later = deferred(build)
    assert all(t.is_meta for t in whole(later).values())
    assert list(later.state_dict()) == list(plain.state_dict())
    found = dict(materialise(later))
    assert torch.equal(torch.randn(3), after)  # the generator is where construction leaves it
    assert set(found) == set(whole(plain))
    for name, tensor in whole(plain).items():
        assert found[name].dtype == tensor.dtype and found[name].stride() == tensor.stride(), name
        assert torch.equal(found[name], tensor), name
    return later


def test_every_way_to_fill_a_tensor():
    model = check_same(Everything)
    assert model.head.weight is model.table.weight and not model.rates.is_meta


def test_who_draws_in_between_keeps_the_generator():
    torch.manual_seed(0)
    model = deferred(nn.Linear, 3, 3)
    torch.manual_seed(5)
    list(materialise(model))
    drawn = torch.randn(2)
    torch.manual_seed(5)
    assert torch.equal(torch.randn(2), drawn)


class Tall(nn.Module):
    """Drawn twice, as models are that initialise after construction, then scaled."""

    def __init__(self, layers: int = 12, width: int = 256) -> None:
        super().__init__()
        self.table = nn.Embedding(1024, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 1024, bias=False)
        self.head.weight = self.table.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.data.normal_(0, 0.02)
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.div_(math.sqrt(layers))

    def forward(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x).square().mean()


def test_no_more_than_the_largest_tensor_exists_at_once():
    model = deferred(Tall)
    largest = max(t.numel() * t.element_size() for t in whole(model).values())
    total = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    peak = 0

    class Live(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in ("normal_", "uniform_", "div_"):
                held = {s.data_ptr(): s.nbytes() for s in gc.get_objects() if type(s) is torch.UntypedStorage and s.device.type == "cpu"}
                peak = max(peak, sum(held.values()))
            return out

    gc.collect()
    before = {s.data_ptr(): s.nbytes() for s in gc.get_objects() if type(s) is torch.UntypedStorage and s.device.type == "cpu"}
    with Live():
        for _, tensor in materialise(model):
            del tensor
    assert peak - sum(before.values()) <= largest * 1.1 < total / 2


def peak_of_rank(layers: int) -> tuple[int, int, int]:
    """(peak growth of this process while it shards, its shards, the largest tensor), in bytes."""
    import threading
    from pathlib import Path

    build = functools.partial(Tall, layers, 1024)
    ids = torch.zeros(4, 2, dtype=torch.int64)
    parallelize(deferred(Tall, 2), "tp=2", args=(ids,), device="cpu")  # what is made once (imports, groups)
    model = deferred(build)
    page = 4096

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    stop, most = threading.Event(), 0

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.002):
            most = max(most, resident())

    before, watcher = resident(), threading.Thread(target=watch)
    watcher.start()
    sharded = parallelize(model, "tp=2", args=(ids,), device="cpu")
    stop.set()
    watcher.join()
    shards = sum(p.numel() * p.element_size() for p in sharded.parameters())
    return most - before, shards, max(t.numel() * t.element_size() for t in whole(model).values())


@pytest.mark.slow
def test_memory_of_a_rank():
    for peak, shards, largest in ranks(2, peak_of_rank, 48):
        assert peak <= shards + 2 * largest + 30e6, (peak, shards, largest)


def shards_of(model: nn.Module, captured, mesh: dict[str, int]) -> InProcess:
    plan = search(captured.graph, Cluster.local(math.prod(mesh.values())), mesh, 1)
    return InProcess(compile(captured, plan), model)


def compare(build, kwargs, loss, meshes) -> None:
    torch.manual_seed(3)
    plain = build()
    tensors = whole(plain)
    torch.manual_seed(3)
    later = deferred(build)
    captured = capture(later, kwargs=kwargs, loss=loss)
    for mesh in meshes:
        trainer = shards_of(later, captured, mesh)
        for state in trainer.states:
            slots = trainer.program.ranks[state.rank]
            for mine, kept in ((slots.params, state.params), (slots.buffers, state.buffers)):
                assert set(mine) == set(kept)
                for path, slot in mine.items():
                    assert torch.equal(kept[path], slot.take(tensors[path])), (mesh, path)
        for name, tensor in trainer.unused.items():
            assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize(
    ("family", "meshes"),
    [("gpt2", MESHES[7:8]), ("llama", MESHES[5:6]), *(pytest.param(family, MESHES, marks=pytest.mark.slow) for family in FAMILIES)],
    ids=str,
)
def test_families_on_meshes(family, meshes):
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoModelForMaskedLM if family in hf.MASKED else transformers.AutoModelForCausalLM
    _, kwargs = hf.build(family)
    compare(lambda: auto.from_config(hf.configure(family), dtype=torch.float32), kwargs, None, meshes)


@pytest.mark.parametrize("name", ["plain_tied", "plain_llama", "plain_batch_norm"])
def test_plain_models_on_meshes(name):
    case = zoo.case(name)
    _, kwargs = case.build()
    compare(lambda: case.build()[0], kwargs, case.loss, MESHES[5:7])


def one_rank(mesh):
    torch.manual_seed(3)
    plain = Tall(2, 16)
    torch.manual_seed(3)
    later = deferred(Tall, 2, 16)
    assert is_deferred(later) and not is_deferred(plain)
    ids = torch.arange(8).reshape(4, 2)
    sharded = parallelize(later, mesh, args=(ids,), device="cpu")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(sharded.state_dict()[name], tensor)
    torch.testing.assert_close(sharded.train_step(ids), plain(ids).detach())


def test_real_ranks():
    ranks(2, one_rank, "tp=2")


# ---- what can't be deferred -----------------------------------------------------------------------------------------


class ReadsDraws(nn.Module):
    def __init__(self, how) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        how(self.weight)


@pytest.mark.parametrize(
    "how",
    [lambda w: w[0].item(), lambda w: w.detach().numpy(), lambda w: w.tolist(), lambda w: bool(w.sum() > 0), lambda w: w.nonzero()],
    ids=["item", "numpy", "tolist", "bool", "nonzero"],
)
def test_reading_what_is_drawn_is_refused_with_its_line(how):
    with pytest.raises(DeferredError, match=r"(?s)can't be deferred.*test_deferred\.py:\d+"):
        deferred(ReadsDraws, how)


def test_what_happens_outside_of_the_constructor_is_refused():
    model = deferred(nn.Linear, 3, 3)
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(DeferredError, match="weight was written to after"):
        list(materialise(model))
    with pytest.raises(DeferredError, match="nobody recorded"):
        list(materialise(deferred(nn.Linear, 3, 3).to(torch.bfloat16)))
    with pytest.raises(DeferredError, match=r"an nn\.Module is expected"):
        deferred(torch.zeros, 3)
