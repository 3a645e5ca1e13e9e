"""Works: their data, what a step of them consists of, their floors; and the worked examples of the benchmarks' modules."""

from __future__ import annotations

import doctest
import importlib
from dataclasses import replace

import pytest
import torch

from benchmarks import ceilings
from benchmarks.models import build
from benchmarks.works import LABELS, WORKS, find, parameters

CPU = torch.device("cpu")


@pytest.mark.parametrize("module", ["works", "tables", "traces", "plans", "suite", "peers"])
def test_worked_examples(module):
    tried = doctest.testmod(importlib.import_module(f"benchmarks.{module}"))
    assert tried.attempted and not tried.failed


@pytest.mark.parametrize("name", WORKS)
def test_devices_share_a_step_evenly(name):
    work = WORKS[name]
    assert work.parts().flops * work.ranks == pytest.approx(work.flops)


@pytest.mark.parametrize("name", ["llama-8b-layers", "moe-8x2", "gpt2-350m", "bert-350m", "vit-350m"])
def test_parameters_are_counted(name):
    """All but biases, norms and what is learned once (a class token, token types)."""
    work = find(name, {"hidden": 256, "ffn": 512}, tiny=True)
    counted = sum(p.numel() for p in build(work.models[0], work.shape, torch.float32, torch.device("meta")).parameters())
    assert parameters(work.shape) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("name", ["llama-8b-layers", "gpt2-350m", "bert-350m"])
def test_batches_are_the_same_everywhere_and_few_labels_leave_few(name):
    work = find(name, {"seq": 64, "batch": 3, "vocab": 64}, tiny=True)
    a, b = (work.batch(1, CPU, torch.float32, few=True) for _ in range(2))
    assert all(a[key].equal(b[key]) for key in a)
    assert (a["labels"] != -100).sum(1).tolist() == [LABELS] * 3
    assert not (a["labels"][:, 0] != -100).any()
    assert not a["input_ids"].equal(work.batch(2, CPU, torch.float32)["input_ids"])


def test_flops_are_those_of_the_matmuls_and_of_half_the_attention():
    c = WORKS["llama-8b-layers"].shape
    weights = parameters(replace(c, vocab=0)) + c.vocab * c.hidden
    attention = 6 * c.layers * c.heads * c.head_dim * c.seq
    assert WORKS["llama-8b-layers"].flops == pytest.approx((6 * weights + attention) * c.tokens)


def test_a_floor_has_all_parts(tmp_path):
    found = ceilings.main(["--work", "moe-8x2", "--tiny", "--device", "cpu", "--results", str(tmp_path)])
    assert {row["name"] for row in found["rows"]} == {
        "qkv", "out", "router", "expert up", "expert down", "head", "attention", "pointwise", "optimizer",
    }  # fmt: skip
    assert found["ms"] == pytest.approx(sum(ms for row in found["rows"] for ms in row["ms"].values()))
    assert len(list(tmp_path.iterdir())) == 1
