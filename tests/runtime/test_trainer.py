"""The training loop through the command line: one process and two, resuming, stopping, and what isn't finite."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from autoshard.cli import run
from autoshard.config import Config, Metrics, parse
from autoshard.errors import ConfigError
from autoshard.runtime.metrics import NAMES, JsonLines, open_sinks
from autoshard.runtime.trainer import rate

GPT = str(Path(__file__).parents[2] / "examples" / "gpt.py") + ":build"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    (tmp_path / "train.yaml").write_text(f"""
model:
  source: {GPT}
  arguments: {{layers: 2, heads: 2, hidden: 32}}
data:
  sources: [{{path: {tmp_path}/text.txt}}]
  batch: 4
  seq: 16
optimizer: {{lr: 3e-3}}
schedule: {{warmup: 2}}
run: {{steps: 8, log_every: 1}}
parallel: {{microbatches: 1, device: cpu}}
evaluation: {{every: 4, batches: 2}}
checkpoints: {{folder: {tmp_path}/checkpoints, every: 4, keep: 2}}
metrics: {{file: {tmp_path}/metrics.jsonl}}
""")
    return tmp_path / "train.yaml"


def command(config: Path, *more: str, nproc: int = 1) -> list[str]:
    return [sys.executable, "-m", "autoshard", "train", str(config), "--nproc", str(nproc), *more]


def start(config: Path, *more: str, nproc: int = 1) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    mesh = ("--set", f"parallel.mesh=dp={nproc}")  # nothing to search for
    return subprocess.run(command(config, *mesh, *more, nproc=nproc), capture_output=True, text=True, timeout=200, env=env)


def losses(config: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (config.parent / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss_metrics/global_avg_loss"] for r in lines if "grad_norm" in r}


@pytest.mark.parametrize("nproc", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_resumed_run_is_the_same_run(config: Path, nproc: int) -> None:
    whole = start(config, nproc=nproc)
    assert whole.returncode == 0, whole.stderr
    assert "done: 8 steps, held-out loss" in whole.stdout
    expected = losses(config)
    assert list(expected) == list(range(1, 9)) and expected[8] < expected[1] - 0.3
    folder = config.parent / "checkpoints"
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000004", "step-00000008"]
    (folder / "step-00000008").rename(config.parent / "set-aside")
    resumed = start(config, "--resume", nproc=nproc)
    assert resumed.returncode == 0 and "step 4" in resumed.stdout, resumed.stderr
    assert losses(config) == expected  # bit for bit
    records = [json.loads(line) for line in (config.parent / "metrics.jsonl").read_text().splitlines()]
    assert set().union(*records) - {"step"} == set(NAMES)
    assert sum("validation_metrics/loss" in r for r in records) == 2


def test_a_folder_of_another_run_is_not_mixed_with(config: Path) -> None:
    (config.parent / "few.yaml").write_text(config.read_text().replace("steps: 8", "steps: 2"))
    assert run(["train", str(config.parent / "few.yaml")]) == 0
    assert run(["train", str(config)]) == 3
    assert run(["train", str(config), "--resume", "--set", "run.steps=3"]) == 0


def test_sigterm_finishes_the_step_and_saves(config: Path) -> None:
    process = subprocess.Popen(
        command(config, "--set", "run.steps=100000", "--set", "checkpoints.every=0", nproc=2),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = config.parent / "metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped after step" in out and "Traceback" not in err
    (saved,) = (config.parent / "checkpoints").glob("step-*")
    assert max(losses(config)) == int(saved.name.removeprefix("step-"))


def test_what_is_not_finite_is_skipped_and_then_ends_the_run(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = config.parent / "model.py"
    model.write_text("""
import torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(256, 4))
    def forward(self, tokens, targets):
        logits = self.table[tokens] @ self.table.t()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss / (tokens.sum() - tokens.sum())
def build():
    return Model()
""")
    text = config.read_text().replace(GPT, f"{model}:build").replace("{layers: 2, heads: 2, hidden: 32}", "{}")
    config.write_text(text.replace("log_every: 1", "log_every: 1, max_nonfinite: 3"))
    assert run(["train", str(config)]) == 3
    captured = capfd.readouterr()
    assert captured.out.count("is skipped") == 3 and "3 steps in a row up to step 3" in captured.err
    last = json.loads((config.parent / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped_steps"] >= 2


def test_the_first_rank_alone_says_what_is_wrong(config: Path) -> None:
    config.write_text(config.read_text().replace("text.txt", "none.txt"))
    found = start(config, nproc=2)
    assert found.returncode == 3
    assert found.stderr.count("no file matches") == 1 and "Traceback" not in found.stderr, found.stderr


def test_the_rate() -> None:
    config = parse("model: {source: x}\ndata: {sources: [{path: x}]}\nschedule: {warmup: 10, floor: 0.1}\nrun: {steps: 110}")
    assert [round(rate(s, config), 6) for s in (0, 4, 9, 10, 60, 110, 200)] == [0.1, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1]
    config.schedule.kind = "linear"
    assert round(rate(60, config), 6) == 0.55 and round(rate(110, config), 6) == 0.1
    config.schedule.kind = "constant"
    assert rate(60, config) == 1.0


@pytest.mark.parametrize("sink", ["tensorboard", "wandb"])
def test_a_sink_whose_package_is_missing(sink: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    wanted: dict[str, Any] = {"file": None, sink: "x"}
    with pytest.raises(ConfigError, match=f"needs the package {sink}"):
        open_sinks(Metrics(**wanted), {}, None)


def test_lines_of_steps_to_come_again_go(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    sink = JsonLines(path, None)
    for step in (1, 2, 3):
        sink.write(step, {"a": float("nan") if step == 1 else 1.0})
    sink.close()
    path.write_text(path.read_text() + '{"step": 4, "a"')  # cut short
    JsonLines(path, 2).close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1, "a": "nan"}, {"step": 2, "a": 1.0}]


def test_defaults_make_sense() -> None:
    assert Config().run.steps == 100
