from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

from autoshard import config, models
from autoshard.api import parallelize
from autoshard.cli import setup
from autoshard.errors import CheckpointError, DeferredError
from autoshard.lower import compile
from autoshard.plan.cluster import Cluster
from autoshard.plan.search import search
from autoshard.runtime import replay
from autoshard.runtime.deferred import deferred, is_deferred, materialise, promised
from autoshard.runtime.huggingface import export, load_pretrained
from autoshard.runtime.in_process import InProcess
from autoshard.trace.capture import capture
from tests.zoo import hf

from .checkpoints import without_graphs
from .deferring import Everything, Interleaved, Orthogonal, Tall, check_same, same, whole
from .ranks import ranks

IDS = torch.arange(8).reshape(4, 2)


def test_every_way_to_fill_a_tensor():
    model = check_same(Everything)
    assert model.head.weight is model.table.weight and not model.rates.is_meta


@pytest.mark.parametrize("build", [Interleaved, Orthogonal])
def test_any_order_of_draws(build):
    model = check_same(build)
    again = dict(materialise(model))  # as often as one likes
    assert all(torch.equal(tensor, again[name]) for name, tensor in materialise(model))


def test_who_draws_in_between_keeps_the_generator():
    torch.manual_seed(0)
    model = deferred(nn.Linear, 3, 3)
    torch.manual_seed(5)
    list(materialise(model))
    drawn = torch.randn(2)
    torch.manual_seed(5)
    assert torch.equal(torch.randn(2), drawn)
    for _ in materialise(model):  # whoever is given the tensors may draw too
        torch.randn(2)
    torch.manual_seed(0)
    same(dict(materialise(model)), nn.Linear(3, 3))


def drawn_while_filling(build) -> tuple[int, int]:
    """(draws that the constructor made, draws that filling made)."""
    model, count, execute = deferred(build), 0, replay._execute

    def counting(op, *args):
        nonlocal count
        count += op.random
        return execute(op, *args)

    with mock.patch.object(replay, "_execute", counting):
        list(materialise(model))
    return sum(op.random for op in model.__dict__["_autoshard_deferral"].recorder.recording.ops), count


def rows() -> nn.Module:
    model = nn.Linear(5, 40)
    for row in model.weight.data:
        row.normal_()
    return model


def test_nothing_is_drawn_twice_that_is_drawn_in_one_go():
    made, filled = drawn_while_filling(lambda: Tall(3, 16))
    assert made == filled == 3 * 2 + 2 + 5
    made, filled = drawn_while_filling(rows)
    assert made == 42 and filled <= made + 1  # the first draw of the rows, before the bias's
    made, filled = drawn_while_filling(Interleaved)
    assert made < filled < 3 * made


# ---- casts, frozen parameters, weights from elsewhere ---------------------------------------------------------------


def in_bfloat16() -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Tall(2, 32)
    finally:
        torch.set_default_dtype(before)


def wrapped(model: nn.Module) -> nn.Module:
    return nn.ModuleDict({"wrapped": model})


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "wider": lambda model: model.to(torch.bfloat16).double(),
    "a part": lambda model: [model.layers.half(), model][1],
    "wrapped": lambda model: wrapped(model).to("cpu", torch.bfloat16),
    "a copy of no bytes": lambda model: model.float().cpu(),
}


@pytest.mark.parametrize("how", CASTS)
def test_casts_after_construction(how):
    torch.manual_seed(3)
    expected = CASTS[how](Tall(2, 32))
    torch.manual_seed(3)
    later = CASTS[how](deferred(Tall, 2, 32))
    assert is_deferred(later) and all(t.is_meta for t in whole(later).values())
    assert [t.dtype for t in whole(later).values()] == [t.dtype for t in whole(expected).values()]
    same(dict(materialise(later)), expected)
    if how != "wrapped":
        assert later.head.weight is later.table.weight


@pytest.mark.parametrize("build", [in_bfloat16, lambda: Everything().to(torch.bfloat16), lambda: Interleaved().half()])
def test_low_precision_inside_of_the_constructor(build):
    check_same(build)


def test_a_model_in_bfloat16_trains_as_the_ordinary_one():
    torch.manual_seed(3)
    ordinary = Tall(2, 16).to(torch.bfloat16)
    torch.manual_seed(3)
    later = deferred(Tall, 2, 16).to(torch.bfloat16)
    captured = capture(later, args=(IDS,))
    program = compile(captured, search(captured.graph, Cluster.local(2), {"tp": 2}, 1))
    mine, theirs = InProcess(program, later), InProcess(program, ordinary)
    assert torch.equal(mine.train_step(IDS), theirs.train_step(IDS))
    for name, gradient in theirs.gradients().items():
        assert gradient.dtype == torch.bfloat16 and torch.equal(mine.gradients()[name], gradient), name


class Adapted(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.down, self.up = nn.Linear(inner.in_features, 2, bias=False), nn.Linear(2, inner.out_features, bias=False)

    def forward(self, x):
        return self.inner(x) + self.up(self.down(x))


def adapted(model: Tall) -> Tall:
    """Frozen after construction, with adapters of one's own on top."""
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        for i, layer in enumerate(model.layers):
            model.layers[i] = Adapted(layer)
    return model


def test_frozen_weights_and_adapters_made_later():
    torch.manual_seed(3)
    ordinary = adapted(Tall(2, 16))
    torch.manual_seed(3)
    later = adapted(deferred(Tall, 2, 16))
    assert is_deferred(later) and not later.layers[0].up.weight.is_meta and later.layers[0].inner.weight.is_meta
    captured = capture(later, args=(IDS,))
    run = InProcess(without_graphs(captured, search(captured.graph, Cluster.local(2), {"tp": 2}, 1)), later)
    for name, tensor in ordinary.state_dict().items():
        assert torch.equal(run.state_dict()[name], tensor), name
    trained = {name.partition(":")[2] for name, p in run.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in ordinary.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def no_draws():
    execute = replay._execute

    def checked(op, *args):
        assert not op.random, op
        return execute(op, *args)

    with mock.patch.object(replay, "_execute", checked):
        yield


def test_weights_from_a_folder_need_no_draws(tmp_path):
    pytest.importorskip("transformers")
    model, kwargs = hf.build("llama")
    model.save_pretrained(tmp_path)
    model.to(torch.bfloat16)
    later = load_pretrained(tmp_path, deferred(lambda: hf.build("llama")[0])).to(torch.bfloat16)
    captured = capture(later, kwargs=kwargs)
    program = without_graphs(captured, search(captured.graph, Cluster.local(2), {"tp": 2}, 1))
    state = torch.get_rng_state()
    with no_draws():
        run = InProcess(program, later)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(run.state_dict()[name], tensor), name
    for name, slot in program.ranks[1].buffers.items():  # those that no folder holds are computed
        assert torch.equal(run.states[1].buffers[name], slot.take(whole(model)[name])), name
    # or afterwards, over weights that were drawn
    first = InProcess(program, deferred(lambda: hf.build("llama")[0]).to(torch.bfloat16))
    for name, tensor in load_pretrained(tmp_path, first).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_command_line_promises_a_folder(tmp_path):
    pytest.importorskip("transformers")
    hf.build("gpt2")[0].save_pretrained(tmp_path)
    settings = config.Model(source=str(tmp_path), pretrained=str(tmp_path), deferred=True)
    model = setup._model(
        SimpleNamespace(model=settings, data=SimpleNamespace(batch=2, seq=4)),
        models.find(settings.source, {}),
    )
    assert is_deferred(model) and promised(model) == [tmp_path]
    with no_draws():
        list(materialise(model))


def test_what_a_folder_lacks_or_cant_be_promised(tmp_path):
    pytest.importorskip("transformers")
    model, kwargs = hf.build("llama")
    model.save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="weights of its own"):
        load_pretrained(tmp_path / "llama", model)
    later = load_pretrained(tmp_path / "llama", deferred(lambda: hf.build("qwen3")[0]))
    captured = capture(later, kwargs=kwargs)
    program = without_graphs(captured, search(captured.graph, Cluster.local(2), {"tp": 2}, 1))
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.0\.self_attn\.q_norm\.weight"):
        InProcess(program, later)


# ---- sharding -------------------------------------------------------------------------------------------------------


def given(table: torch.Tensor) -> Tall:
    model = Tall(2, 16)
    state = torch.get_rng_state()
    model.layers[0].weight.data.copy_(table * torch.randn(16, 16))
    torch.set_rng_state(state)
    model.layers[1].weight.data.copy_(torch.randn(16, 16))
    return model


def by_rank(rank: int) -> Tall:
    model = Tall(2, 16)
    model.layers[1].bias.data.fill_(rank)
    return model


def one_rank(mesh):
    rank = int(os.environ["RANK"])
    torch.manual_seed(3)
    ordinary = given(torch.ones(16, 16))
    torch.manual_seed(3 + rank)
    later = deferred(given, torch.ones(16, 16) + rank)  # rank 0's are the model's, as they are without deferral
    state = torch.get_rng_state()
    assert is_deferred(later) and not is_deferred(ordinary)
    sharded = parallelize(later, mesh, args=(IDS,), device="cpu")
    assert torch.equal(torch.get_rng_state(), state) == (rank == 1)
    for name, tensor in ordinary.state_dict().items():
        assert torch.equal(sharded.state_dict()[name], tensor)
    torch.testing.assert_close(sharded.train_step(IDS), ordinary(IDS).detach())
    del later
    torch.testing.assert_close(sharded.eval_step(IDS), ordinary(IDS).detach())
    with pytest.raises(DeferredError, match="did something else on this rank than on rank 0"):
        parallelize(deferred(by_rank, rank), mesh, args=(IDS,), device="cpu")


def test_real_ranks():
    ranks(2, one_rank, "tp=2")


def one_rank_from_a_folder(folder):
    torch.manual_seed(4)
    with no_draws():
        sharded = parallelize(load_pretrained(folder, deferred(Tall, 2, 16)).half(), "tp=2", args=(IDS,), device="cpu")
    torch.manual_seed(3)
    for name, tensor in Tall(2, 16).half().state_dict().items():
        assert torch.equal(sharded.state_dict()[name], tensor)


def test_real_ranks_read_a_folder(tmp_path):
    torch.manual_seed(3)
    model = deferred(Tall, 2, 16)
    captured = capture(model, args=(IDS,))
    export(InProcess(without_graphs(captured, search(captured.graph, Cluster.local(1), {"dp": 1}, 1)), model), tmp_path / "hf", config={})
    ranks(2, one_rank_from_a_folder, tmp_path / "hf")


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
    with pytest.raises(DeferredError, match="weight was written to after"):
        model.to(torch.bfloat16)
    model = deferred(nn.Linear, 3, 3)
    model.bias = nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(DeferredError, match="bias is on meta and nobody recorded"):
        list(materialise(model))
    with pytest.raises(DeferredError, match="bias is on meta and nobody recorded"):
        model.half()
    mine, theirs = torch.zeros(3), torch.zeros(3, device="meta")
    for use in (lambda: mine.normal_(), lambda: mine.copy_(torch.ones(3)), lambda: mine.add_(torch.randn(3))):
        with pytest.raises(DeferredError, match="from outside of the constructor"):
            deferred(lambda use=use: [use(), nn.Linear(3, 3)][1])
    with pytest.raises(DeferredError, match="a meta tensor from outside"):
        deferred(lambda: [theirs + torch.ones(3), nn.Linear(3, 3)][1])
    assert mine.sum() == 0
    with pytest.raises(DeferredError, match="given a Linear that is built"):
        deferred(nn.Linear(2, 2))
    with pytest.raises(DeferredError, match=r"an nn\.Module is expected"):
        deferred(torch.zeros, 3)
