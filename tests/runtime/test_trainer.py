"""The training loop through the command line: one process and two, resuming, stopping, and what isn't finite."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

from autoshard.cli import run
from autoshard.config import Config, Metrics, load, parse
from autoshard.errors import ConfigError
from autoshard.runtime.checkpoint import blocks, inspect, verify
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


MODEL = """
import torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(256, 4))
    def forward(self, tokens, targets):
        logits = self.table[tokens] @ self.table.t()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss AFTER
def build():
    return Model()
"""


def with_model(config: Path, after: str = "") -> Path:
    """The config with a model that takes no time."""
    model = config.parent / "model.py"
    model.write_text(MODEL.replace("AFTER", after))
    config.write_text(config.read_text().replace(GPT, f"{model}:build").replace("{layers: 2, heads: 2, hidden: 32}", "{}"))
    return config


@pytest.fixture
def tiny(config: Path) -> Path:
    return with_model(config)


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


def test_a_folder_of_another_run_is_not_mixed_with(tiny: Path) -> None:
    (tiny.parent / "few.yaml").write_text(tiny.read_text().replace("steps: 8", "steps: 2"))
    assert run(["train", str(tiny.parent / "few.yaml")]) == 0
    assert run(["train", str(tiny)]) == 3
    assert run(["train", str(tiny), "--resume", "--set", "run.steps=3"]) == 0


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
    text = with_model(config, "/ (tokens.sum() - tokens.sum())").read_text()
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


# ---- what a resumed run takes from its config, and what it refuses -------------------------------------------------------


def test_a_resumed_run_follows_its_config_and_says_what_changed(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(tiny), "--set", "run.steps=4"]) == 0
    changes = ["optimizer.lr=6e-3", "optimizer.weight_decay=0", "data.batch=6", "run.steps=6"]
    capfd.readouterr()
    assert run(["train", str(tiny), "--resume", *(part for c in changes for part in ("--set", c))]) == 0
    said = capfd.readouterr().out
    for text in ("learning rate is 0.006 from here on, it was 0.003", "weight decay is 0.0 from here on, it was 0.1", "data.batch is 6"):
        assert said.count(text) == 1, said
    records = {r["step"]: r for r in map(json.loads, (tiny.parent / "metrics.jsonl").read_text().splitlines()) if "lr" in r}
    read = load(tiny, changes)
    assert records[5]["lr"] == pytest.approx(6e-3 * rate(4, read)) and records[6]["lr"] == pytest.approx(6e-3 * rate(5, read))
    assert [records[s]["n_tokens_seen"] for s in (4, 5, 6)] == [4 * 4 * 16, (4 * 4 + 6) * 16, (4 * 4 + 12) * 16]
    assert run(["train", str(tiny), "--resume", "--set", "run.steps=3"]) == 0
    assert "nothing is left to train: run.steps is 3" in capfd.readouterr().out
    assert run(["train", str(tiny), "--resume", "--set", "data.seq=8"]) == 3
    assert "set data.seq back" in capfd.readouterr().err


def test_folders_that_cannot_serve_are_told_before_anything_is_made(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(tiny), "--resume", "--set", "run.steps=2"]) == 0  # with --resume, also where there is nothing yet
    assert "starting at the beginning" in capfd.readouterr().out
    assert run(["train", str(tiny)]) == 3
    assert "has checkpoints already" in capfd.readouterr().err
    (saved,) = (tiny.parent / "checkpoints").glob("step-*")
    (saved / "manifest.json").write_text("{}")
    for resume in ([], ["--resume"]):
        assert run(["train", str(tiny), *resume]) == 5
        assert "none of its 1 checkpoints is whole" in capfd.readouterr().err
    (tiny.parent / "file").write_text("")
    assert run(["train", str(tiny), "--set", f"checkpoints.folder={tiny.parent}/file/x"]) == 5
    captured = capfd.readouterr()
    assert "can't be written: Not a directory" in captured.err and "mesh" not in captured.out
    assert run(["train", str(tiny), "--resume", "--set", "checkpoints={}"]) == 3
    assert "nothing to resume from" in capfd.readouterr().err


def test_checkpoints_in_the_background(tiny: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--set", "checkpoints.background=true", "--set", "checkpoints.every=2"]
    assert run(["train", str(tiny), *given, "--set", "run.steps=5"]) == 0
    said = capfd.readouterr().out
    assert [line.rpartition("-")[2] for line in said.splitlines() if line.startswith("writing ")] == ["00000002", "00000004", "00000005"]
    assert sum(line.startswith("saved ") for line in said.splitlines()) == 1
    checkpoints = tiny.parent / "checkpoints"
    assert sorted(p.name for p in checkpoints.glob("step-*")) == ["step-00000004", "step-00000005"]
    verify(checkpoints)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(blocks.Hashed, "write", full)
    assert run(["train", str(tiny), *given, "--resume"]) == 5  # steps 6 and 8: the second save tells what came of the first
    captured = capfd.readouterr()
    assert "No space left on device" in captured.err and "Traceback" not in captured.err and "step      8" in captured.out


def test_metrics_that_cannot_be_written_end_nothing(tiny: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: JsonLines, *_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(JsonLines, "write", full)
    assert run(["train", str(tiny), "--set", "run.steps=2"]) == 0
    assert "step 2: metrics can't be written: No space left on device" in capfd.readouterr().out


def test_arguments_that_text_does_not_fill(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for fields, says in (("{tokens: tokens, words: next}", "takes no 'words'"), ("{targets: next}", "also takes 'tokens'")):
        assert run(["train", str(tiny), "--set", f"data.fields={fields}"]) == 3
        assert says in capfd.readouterr().err
    assert run(["train", str(tiny), "--set", "parallel.device=cuda"]) == 3
    assert "no GPU" in capfd.readouterr().err


def test_every_kind_of_source(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Text, raw tokens and Megatron's files blended by weight, evaluated on a source of its own, fields by name, resumed."""
    tokens = np.random.default_rng(0).integers(0, 256, 500).astype(np.uint16)
    tokens.tofile(tiny.parent / "raw.bin")
    tokens.tofile(tiny.parent / "mega.bin")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 2)
    (tiny.parent / "mega.idx").write_bytes(head + struct.pack("<2i2q2q", 200, 300, 0, 400, 0, 2))
    folder = str(tiny.parent)
    sources = (
        f"[{{path: {folder}/text.txt, weight: 2}}, {{path: {folder}/raw.bin, format: tokens}}, {{path: {folder}/mega, format: megatron}}]"
    )
    given = [
        f"data.sources={sources}", f"evaluation.sources=[{{path: {folder}/raw.bin, format: tokens, dtype: uint8}}]",
        "data.fields={tokens: tokens, targets: next}", "data.order=shuffled", "optimizer.groups=[{match: tab*, lr: 0}]",
    ]  # fmt: skip
    options = [part for g in given for part in ("--set", g)]
    assert run(["train", str(tiny), *options, "--set", "run.steps=4"]) == 0
    assert "10,000 tokens to train on, 1,000 held out" in capfd.readouterr().out
    data = inspect(tiny.parent / "checkpoints")["data"]
    assert data["taken"] == [8, 4, 4] and data["order"] == "shuffled"
    assert run(["train", str(tiny), *options, "--resume"]) == 0
    lines = [json.loads(line) for line in (tiny.parent / "metrics.jsonl").read_text().splitlines()]
    held = [line["validation_metrics/loss"] for line in lines if "validation_metrics/loss" in line]
    assert len(held) == 2 and held[0] == held[1]  # the only parameter has no learning rate


# ---- sinks ------------------------------------------------------------------------------------------------------------


class FakeWriter:
    """As torch.utils.tensorboard.SummaryWriter."""

    made: ClassVar[list[FakeWriter]] = []

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        self.folder, self.purge_step, self.closed, self.scalars = folder, purge_step, False, list[tuple[str, float, int]]()
        FakeWriter.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class FakeWandb(ModuleType):
    """As the package: init returns a run with an id, a log and an end."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        self.id = "abc123"

    def init(self, **options: Any) -> FakeWandb:
        if options["project"] == "forbidden":
            raise self.Error("api_key not configured")
        self.begun.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    FakeWriter.made.clear()
    boards = ModuleType("torch.utils.tensorboard")
    monkeypatch.setattr(boards, "SummaryWriter", FakeWriter, raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", boards)
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def test_sinks_get_what_the_file_gets(tiny: Path, packages: FakeWandb, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["--set", f"metrics.tensorboard={tiny.parent}/board", "--set", "metrics.wandb=mine"]
    assert run(["train", str(tiny), *given, "--set", "run.steps=4"]) == 0
    assert run(["train", str(tiny), *given, "--set", "run.steps=6", "--resume"]) == 0
    lines = [json.loads(line) for line in (tiny.parent / "metrics.jsonl").read_text().splitlines()]
    expected = [(r["step"], {k: v for k, v in r.items() if k != "step"}) for r in lines]
    assert packages.logged == expected and {name for _, values in expected for name in values} == set(NAMES)
    assert [(b["project"], b.get("id"), b.get("resume")) for b in packages.begun] == [("mine", None, None), ("mine", "abc123", "allow")]
    assert packages.begun[0]["config"]["run"]["steps"] == 4 and packages.finished == 2
    assert [(w.folder, w.purge_step, w.closed) for w in FakeWriter.made] == [(f"{tiny.parent}/board", step, True) for step in (None, 5)]
    scalars = [s for w in FakeWriter.made for s in w.scalars]
    assert scalars == [(name, value, step) for step, values in expected for name, value in values.items()]


def test_a_sink_that_does_not_start_ends_the_run_before_it_begins(
    tiny: Path, packages: FakeWandb, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["--set", f"metrics.tensorboard={tiny.parent}/board", "--set", "metrics.wandb=forbidden"]
    assert run(["train", str(tiny), *given]) == 3
    said = capfd.readouterr().err
    assert "api_key not configured" in said and "WANDB_MODE=offline" in said and "Traceback" not in said
    assert [w.closed for w in FakeWriter.made] == [True]


def test_the_names_are_torchtitan_s() -> None:
    """As its components/metrics.py and train.py have them; ours alone is skipped_steps."""
    memory = [f"memory/max_{what}({unit})" for what in ("active", "reserved") for unit in ("GiB", "%")]
    theirs = {
        "loss_metrics/global_avg_loss", "loss_metrics/global_max_loss", "grad_norm", "lr", "n_tokens_seen", "throughput(tps)", "tflops",
        "mfu(%)", "time_metrics/end_to_end(s)", "time_metrics/data_loading(s)", "time_metrics/data_loading(%)", "memory/num_alloc_retries",
        "memory/num_ooms", "validation_metrics/loss", "validation_metrics/throughput(tps)", *memory,
        *(f"validation_metrics/{name}" for name in memory),
    }  # fmt: skip
    assert set(NAMES) - {"skipped_steps"} == theirs


@pytest.mark.slow
def test_the_real_packages(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="pip install tensorboard")
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tiny.parent))
    given = ["--set", f"metrics.tensorboard={tiny.parent}/board", "--set", "metrics.wandb=mine"]
    assert run(["train", str(tiny), *given, "--set", "run.steps=4"]) == 0
    assert run(["train", str(tiny), *given, "--set", "run.steps=6", "--resume"]) == 0
    board = accumulator.EventAccumulator(f"{tiny.parent}/board")
    board.Reload()
    assert set(board.Tags()["scalars"]) == set(NAMES)
    found = {e.step: e.value for e in board.Scalars("loss_metrics/global_avg_loss")}
    assert found == pytest.approx(losses(tiny), rel=1e-6) and list(found) == [1, 2, 3, 4, 5, 6]
    assert len(list((tiny.parent / "wandb").glob("offline-run-*/*.wandb"))) == 2


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
