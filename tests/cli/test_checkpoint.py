"""`autoshard checkpoint`: looking at what `autoshard train` wrote, telling a damaged file, writing other libraries' folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoshard.cli import run
from autoshard.cli.checkpoint import Kind
from autoshard.errors import ConfigError
from autoshard.runtime.convert import KINDS, convert

GPT = str(Path(__file__).parents[2] / "examples" / "gpt.py") + ":build"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    (root / "text.txt").write_text("hello world, " * 100)
    (root / "train.yaml").write_text(f"""
model: {{source: {GPT}, arguments: {{layers: 1, heads: 2, hidden: 16}}}}
data: {{sources: [{{path: {root}/text.txt}}], batch: 2, seq: 8, held_out: 0}}
run: {{steps: 1}}
parallel: {{device: cpu, microbatches: 1}}
checkpoints: {{folder: {root}/checkpoints}}
metrics: {{file: null}}
""")
    assert run(["train", str(root / "train.yaml")]) == 0
    return root / "checkpoints"


def test_inspect(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["checkpoint", "inspect", str(folder)]) == 0
    out = capfd.readouterr().out
    assert "token_embedding.weight" in out and "step" in out
    assert run(["checkpoint", "inspect", str(folder), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["step"] == 1


def test_convert(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    assert run(["checkpoint", "convert", str(folder), str(tmp_path / "hf")]) == 0
    assert "token_embedding.weight" in safetensors.load_file(tmp_path / "hf" / "model.safetensors")
    capfd.readouterr()
    assert run(["checkpoint", "convert", str(folder), str(tmp_path / "x"), "--to", "nonsense"]) == 2
    said = capfd.readouterr().err
    assert all(f"'{kind}'" in said for kind in KINDS), said
    for useless in (["--step", "3"], ["--to", "dcp", "--config", "config.json"], ["--prefix", "model."]):
        assert run(["checkpoint", "convert", str(folder), str(tmp_path / "x"), *useless]) == 2
        assert "has no effect" in capfd.readouterr().err
    assert not (tmp_path / "x").exists()
    with pytest.raises(ConfigError, match="expected one of hf, dcp, autoshard"):
        convert(folder, tmp_path / "x", "nonsense")


def test_the_command_line_knows_every_kind() -> None:
    assert tuple(Kind) == KINDS


def test_verify(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["checkpoint", "verify", str(folder)]) == 0
    (step,) = folder.glob("step-*")
    file = next(step.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(bytes(data))
    assert run(["checkpoint", "verify", str(folder)]) == 5
    assert file.name in capfd.readouterr().err
    assert run(["checkpoint", "inspect", str(folder.parent)]) == 5
