"""The main job's parts that need no ranks: the model is plain, the text is there, the loss falls."""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train

    yield train
    for name in ("train", "gpt", "data", "export"):
        sys.modules.pop(name, None)


def test_the_model_knows_nothing_of_us() -> None:
    source = (EXAMPLES / "gpt.py").read_text()
    assert "autoshard" not in source and "distributed" not in source


def test_whole_files_are_held_out(train: Any) -> None:
    text, held_out = train.standard_library()
    assert len(text) > 5_000_000 and 0.02 < len(held_out) / len(text) < 0.1


def test_batches_are_the_same_for_the_same_seed(train: Any) -> None:
    text, _ = train.standard_library()
    first, again = (next(train.batches(text, batch=2, seq=8, seed=3)) for _ in range(2))
    assert all(bool((first[key] == again[key]).all()) for key in first)
    assert bool((first["tokens"][:, 1:] == first["targets"][:, :-1]).all())


def test_the_loss_falls(train: Any) -> None:
    args = argparse.Namespace(steps=12, batch=4, lr=3e-3, warmup=4, seed=0)
    text, held_out = train.standard_library()
    trainer = train.Plain(train.build(args))
    losses = list(itertools.islice(train.train(trainer, text, args, args.steps), args.steps))
    assert losses[-1] < losses[0] - 0.5
    assert train.held_out_loss(trainer, held_out, args, rounds=1) < losses[0]


def test_the_gpt_is_a_gpt2_to_transformers(train: Any, tmp_path: Path) -> None:
    import export
    import gpt

    config = gpt.Config(layers=2, hidden=32, seq=16)
    weights = {name: torch.randn_like(tensor) for name, tensor in gpt.GPT(config).state_dict().items()}
    export.to_hugging_face(weights, config, tmp_path)
    assert export.difference(weights, config, tmp_path, torch.randint(256, (2, 16))) < 1e-4


@pytest.mark.slow
def test_a_killed_run_goes_on_elsewhere() -> None:
    assert subprocess.run([sys.executable, str(EXAMPLES / "interrupted.py"), "--steps", "12"], timeout=290).returncode == 0
