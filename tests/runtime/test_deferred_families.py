"""Models as people write them: what each rank holds is a part of what ordinary construction makes, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoshard.plan.cluster import Cluster
from autoshard.plan.search import search
from autoshard.runtime.deferred import deferred
from autoshard.runtime.in_process import InProcess
from autoshard.trace.capture import capture
from tests import zoo

from .checkpoints import without_graphs
from .deferring import Orthogonal, check_same, whole

MESHES = [
    {"dp": 2}, {"dp": 4}, {"tp": 2}, {"tp": 4}, {"pp": 2}, {"dp": 2, "tp": 2}, {"dp": 2, "pp": 2}, {"tp": 2, "pp": 2},
    {"dp": 4, "tp": 2}, {"dp": 2, "tp": 2, "pp": 2},
]  # fmt: skip
FAMILIES = (
    "gpt2", "bert", "opt", "bloom", "gpt_neox", "llama", "gemma2", "mixtral", "modernbert", "vit", "t5", "whisper", "plain_tied",
    "plain_frozen", "plain_batch_norm",
)  # fmt: skip
"""Tied weights, padding rows, buffers computed in constructors, truncated normals, weights scaled by depth, experts, towers."""


def compare(
    build: Callable[[], nn.Module], args: dict[str, Any], loss: Callable[[Any], Tensor] | None, meshes: list[dict[str, int]]
) -> None:
    """Captured once; on every mesh, every rank's shards against the ordinary model's."""
    torch.manual_seed(3)
    plain = build()
    tensors, trainable = whole(plain), {name for name, p in plain.named_parameters() if p.requires_grad}
    torch.manual_seed(3)
    later = deferred(build)
    captured = capture(later, loss=loss, **args)
    for mesh in meshes:
        plan = search(captured.graph, Cluster.local(math.prod(mesh.values())), mesh, 1)
        run = InProcess(without_graphs(captured, plan), later)
        divided = 0
        for state in run.states:
            slots = run.program.ranks[state.rank]
            for mine, kept in ((slots.params, state.params), (slots.buffers, state.buffers)):
                assert set(mine) == set(kept)
                for path, slot in mine.items():
                    assert torch.equal(kept[path], slot.take(tensors[path])), (mesh, path)
                    divided += kept[path].numel() < tensors[path].numel()
            assert {path for path, p in state.params.items() if p.requires_grad} <= trainable
        assert divided or set(mesh) == {"pp"}
        for name, tensor in run.unused.items():
            assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize(
    ("family", "meshes"),
    [("gpt2", MESHES[7:]), ("vit", MESHES[5:6]), ("plain_batch_norm", MESHES[:4])]
    + [pytest.param(family, MESHES, marks=pytest.mark.slow) for family in FAMILIES],
    ids=lambda x: x if isinstance(x, str) else str(len(x)),
)
def test_families_on_meshes(family, meshes):
    if not family.startswith("plain"):
        pytest.importorskip("transformers")
    case = zoo.case(family)
    compare(lambda: case.build()[0], {"kwargs": case.build()[1]}, case.loss, meshes)


def test_every_initialisation_of_torchs_on_meshes():
    compare(Orthogonal, {"args": (torch.arange(16).reshape(8, 2),)}, None, MESHES)


QUICK = ("gemma2", "mixtral", "bert", "mamba", "bart", "plain_loop_moe", "plain_lora")


@pytest.mark.parametrize("name", [*QUICK, pytest.param("all", marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_construction(name):
    """Built, seeded, and moved off its initial values by another generator, as the zoo does."""
    pytest.importorskip("transformers")
    for each in [name] if name != "all" else [n for n in (*zoo.LISTED, *zoo.FURTHER) if "+" not in n]:
        check_same(lambda each=each: zoo.case(each).build()[0])


@pytest.mark.parametrize("name", ["llama", "modernbert"])
def test_construction_in_bfloat16(name):
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoModelForMaskedLM if name in zoo.hf.MASKED else transformers.AutoModelForCausalLM
    check_same(lambda: auto.from_config(zoo.hf.configure(name), dtype=torch.bfloat16))
