from __future__ import annotations

import copy
import gc
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoshard.api import parallelize
from autoshard.errors import BatchError, OptimizerError
from autoshard.lower import compile
from autoshard.plan.cluster import Cluster
from autoshard.plan.search import search
from autoshard.runtime.in_process import InProcess
from autoshard.trace.capture import capture

from .ranks import ranks

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
MESHES = [{"dp": 2}, {"tp": 2}, {"tp": 2, "pp": 2}]


class Adapted(nn.Module):
    """A frozen linear with a low-rank correction."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(0.3 * torch.randn(rank, base.in_features, dtype=base.weight.dtype))
        self.up = nn.Parameter(0.3 * torch.randn(base.out_features, rank, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


class Causal(nn.Module):
    """Each position sees the mean of those before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(32, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))
        self.head = nn.Linear(8, 32, bias=False)
        self.double()

    def forward(self, ids, labels):
        x = self.table(ids)
        x = x.cumsum(1) / torch.arange(1, ids.shape[1] + 1).unsqueeze(-1)
        for layer in self.layers:
            x = x + layer(x)
        logits = self.head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        right = (logits.argmax(-1) == labels).double().mean()
        return {"loss": loss, "logits": logits, "right": right, "size": logits.square().mean(), "perplexity": loss.exp()}


def batch(rows: int = 8, seed: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 32, (rows, 6), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids, "labels": ids.roll(-1, 1)}


def adapted() -> nn.Module:
    model = Causal()
    for layer in model.layers:
        layer[1], layer[3] = Adapted(layer[1]), Adapted(layer[3])
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith((".up", ".down")))
    return model


def played(model: nn.Module, mesh: dict[str, int], names=(), microbatches: int = 2) -> InProcess:
    captured = capture(model, kwargs=batch())
    captured = captured.keeping(captured.outputs(names))
    size = 1
    for n in mesh.values():
        size *= n
    plan = search(captured.graph, Cluster.local(size), mesh, microbatches)
    return InProcess(compile(captured, plan), model)


# ---- outputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_outputs_of_a_step_are_those_of_the_global_batch(mesh):
    model = Causal()
    expected = model(**batch())
    names = ("right", "size", "logits")
    trainer = played(model, mesh, names)
    assert trainer.plan.microbatches == 2
    for step in (trainer.train_step, trainer.eval_step):
        loss, found = step(**batch(), outputs=names)
        torch.testing.assert_close(loss, expected["loss"].detach(), **TIGHT)
        assert list(found) == list(names)
        for name in names:
            torch.testing.assert_close(found[name], expected[name].detach(), **TIGHT)
    expected["loss"].backward()
    for name, grad in trainer.gradients().items():  # what is handed out adds nothing to them
        torch.testing.assert_close(grad, model.get_parameter(name).grad, **TIGHT)


def test_an_output_that_needs_the_whole_batch_takes_one_microbatch_and_says_so():
    trainer = played(Causal(), {"dp": 2}, ("perplexity",))
    assert trainer.plan.microbatches == 1
    assert any("exp" in note for note in trainer.plan.notes)
    _, found = trainer.eval_step(**batch(), outputs=True)
    torch.testing.assert_close(found["perplexity"], Causal()(**batch())["perplexity"].detach(), **TIGHT)


def test_unknown_names_are_told_what_is_near():
    sharded = parallelize(Causal(), "dp=1", kwargs=batch(), device="cpu")
    with pytest.raises(BatchError, match="near to it: logits"):
        sharded.eval_step(**batch(), outputs=("logit",))
    with pytest.raises(BatchError, match=r"layers\.1"):
        sharded.activations("layers.7", **batch())
    with pytest.raises(BatchError, match=r"table\.weight"):
        sharded.gradients("tabel.weight")


# ---- on real ranks --------------------------------------------------------------------------------------------------


def everything(mesh):
    """Outputs, activations, generation and several shapes while an optimizer goes on."""
    plain = Causal()
    sharded = parallelize(Causal(), mesh, kwargs=batch(), device="cpu")
    optimizer, reference = sharded.optimizer(torch.optim.AdamW, lr=0.01), torch.optim.AdamW(plain.parameters(), lr=0.01)
    for rows in (8, 4, 8):
        wanted = plain(**batch(rows))
        wanted["loss"].backward()
        loss, found = sharded.train_step(**batch(rows), outputs=("right", "size"))
        torch.testing.assert_close(loss, wanted["loss"].detach(), **TIGHT)
        torch.testing.assert_close(found["size"], wanted["size"].detach(), **TIGHT)
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    assert len(sharded.known) == 2, sorted(sharded.known)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(sharded.state_dict()[name], tensor, **TIGHT)

    seen = {}
    for name in ("layers.0", "layers.1.1", "head"):
        plain.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    plain(**batch())
    inside = sharded.activations(["layers.0", "layers.1.1", "head"], **batch())
    assert set(inside) == set(seen)
    for name, value in seen.items():
        torch.testing.assert_close(inside[name].reshape(value.shape), value.detach(), **TIGHT)

    ids = batch(3)["ids"][:, :4]
    expected = ids
    for _ in range(3):
        expected = torch.cat([expected, plain(expected, expected)["logits"][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(sharded.generate(ids, 3), expected)
    stop = int(expected[0, 4])
    assert bool((sharded.generate(ids[:1], 3, eos_token_id=stop) == expected[:1, :5]).all())


@pytest.mark.parametrize("mesh", [{"tp": 2}, *(pytest.param(m, marks=pytest.mark.slow) for m in (MESHES[0], MESHES[2]))], ids=str)
def test_real_ranks(mesh):
    ranks(4 if len(mesh) == 2 else 2, everything, mesh)


# ---- frozen and low-rank parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_adapters_train_and_frozen_parameters_stay(mesh):
    plain = adapted()
    trainer = played(copy.deepcopy(plain), mesh)
    groups = [("*.up", {"lr": 0.1})]
    optimizer = trainer.optimizer(torch.optim.AdamW, groups, lr=0.01)
    by_name = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    reference = torch.optim.AdamW(
        [{"params": [p for n, p in by_name.items() if n.endswith(up)], "lr": lr} for up, lr in ((".up", 0.1), (".down", 0.01))]
    )
    for _ in range(3):
        plain(**batch())["loss"].backward()
        trainer.train_step(**batch())
        assert set(trainer.gradients()) == set(by_name)
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(trainer.state_dict()[name], tensor, rtol=1e-9, atol=1e-11)
    stepped = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert stepped < sum(p.numel() for p in plain.parameters()) * len(trainer.states)
    with pytest.raises(OptimizerError, match="no parameter's name matches"):
        trainer.optimizer(torch.optim.AdamW, [("*.sideways", {})])


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_the_source_model_may_go_or_stay():
    model = Causal()
    weight = weakref.ref(model.table.weight)
    sharded = parallelize(model, "dp=1", kwargs=batch(), device="cpu")
    assert not model.table.weight.is_meta
    expected = model(**batch())["loss"].detach()
    torch.testing.assert_close(sharded.eval_step(**batch()), expected, **TIGHT)
    del model
    gc.collect()
    assert weight() is None
    torch.testing.assert_close(sharded.eval_step(**batch(4)), Causal()(**batch(4))["loss"].detach(), **TIGHT)


def test_each_set_of_outputs_is_captured_once(caplog):
    sharded = parallelize(Causal(), "dp=1", kwargs=batch(), device="cpu")
    with caplog.at_level(logging.INFO, logger="autoshard"):
        for _ in range(2):
            sharded.train_step(**batch(), outputs=("right",))
    assert sum("other outputs" in r.message for r in caplog.records) == 1
