"""`autoshard plan`: from a file's function, a Hugging Face config, a saved graph; what it prints and writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from autoshard.cli import run
from autoshard.models import find, presets
from autoshard.plan.plan import Plan

GPT = str(Path(__file__).parents[2] / "examples" / "gpt.py") + ":build"
SIZE = ["--batch", "8", "--seq", "16"]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "gpt.json"
    find(GPT, {"layers": 2, "hidden": 32}).capture(8, 16).graph.save(path)
    return path


def test_a_saved_graph_is_planned_without_torch(graph: Path) -> None:
    code = f"""
import sys
from autoshard.cli import run
assert run(["plan", {str(graph)!r}, "-c", "h100x4", "--mesh", "dp=2 tp=2"]) == 0
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    for text in ("dp=2", "blocks.*.mlp", "blocks.*.attention.qkv.weight", "what else was looked at", "slower (+", "of a rank's"):
        assert text in found.stdout, text


def test_json(graph: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(graph), "-c", "cpux2", "--mesh", "tp=2", "--microbatches", "1", "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert data["mesh"]["tp"] == 2 and data["microbatches"] == 1 and data["fits"]
    assert sum(len(b["blocks"]) for b in data["blocks"]) >= 4
    qkv = next(p for p in data["parameters"] if p["path"] == "blocks.*.attention.qkv.weight")
    assert qkv["count"] == 2 and qkv["storage"]["tp"].startswith("S(")


def test_from_a_function_with_everything_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan, graph = tmp_path / "plan.yaml", tmp_path / "graph.json"
    arguments = ["plan", GPT, "-c", "cpux2", *SIZE, "--mesh", "dp=2", "--save", str(plan), "--save-graph", str(graph), "--lower-rank", "1"]
    assert run([*arguments, "--pin", "zero=false"]) == 0
    out = capfd.readouterr().out
    assert f"wrote {plan}" in out and f"wrote {graph}" in out
    assert "# rank 1 of" in out and "def m0_forward" in out
    saved = Plan.load(plan)
    assert saved.mesh.ranks == 2 and all(layout[0].kind == "I" for layout in saved.storage.values())
    assert run(["plan", str(graph), "-c", "cpux2", "--mesh", "dp=2", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["graph"] == saved.graph


def test_a_config_of_hugging_face(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 64, "torch_dtype": "bfloat16"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(["plan", str(tmp_path), "-c", "h100x2", *SIZE, "--mesh", "tp=2", "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert any(p["path"] == "model.layers.*.self_attn.q_proj.weight" and "bfloat16" in p["tensor"] for p in data["parameters"])
    qkv = [f"model.layers.*.self_attn.{name}_proj.weight" for name in "qkv"]
    assert {"weights": qkv, "count": 2} in data["merged"]
    assert run(["plan", str(tmp_path), "-c", "h100x2", *SIZE, "--mesh", "tp=2", "--pin", "merge=false", "--pin", "buckets=1000000"]) == 0
    shown = capfd.readouterr().out
    assert "merged linears" not in shown and "up to 977 KiB together" in shown


def test_presets_are_what_they_are_called() -> None:
    assert presets() == ["deepseek-v3", "llama3-405b", "llama3-70b", "llama3-8b", "mixtral-8x7b"]
    config = json.loads(find("llama3-8b").path.read_text())
    h, f, v, layers = config["hidden_size"], config["intermediate_size"], config["vocab_size"], config["num_hidden_layers"]
    count = 2 * v * h + h + layers * (2 * h * h + 2 * h * h // 4 + 3 * h * f + 2 * h)
    assert count == 8_030_261_248


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nonsense", "-c", "h100x8"], 3, "no model 'nonsense'"),
        (["GRAPH", "-c", "h900x8"], 3, "no cluster"),
        (["GRAPH", "-c", "h100x2", "--mesh", "dp=two"], 3, "is not a mesh"),
        (["GRAPH", "-c", "h100x2", "--memory", "much"], 3, "is not an amount of memory"),
        (["GRAPH", "-c", "h100x2", "--memory", "1kB"], 4, "no plan fits"),
        (["GRAPH", "-c", "h100x2", "--pin", "zoro=1"], 3, "unknown pin 'zoro'"),
        (["GRAPH", "-c", "h100x8", "--pin", "ops.linear_x=R -> R"], 3, "did you mean linear"),
        (["GRAPH", "-c", "h100x8", "--pin", "storage.blocks.0.mlp.up.weight=S(9)"], 3, "can't be held"),
        (["GRAPH", "-c", "h100x8", "--pin", "schedule=zigzag"], 3, "expected gpipe or 1f1b"),
        (["GRAPH", "-c", "h100-8"], 3, "did you mean h100x8?"),
        (["GRAPH", "-c", "h100x2", "--pin", "cuts=x"], 3, "expected a list of whole numbers"),
        (["GRAPH", "-c", "h100x2", "--lower-rank", "0"], 3, "can't be lowered"),
        (["GRAPH", "-c", "h100x1", "--save", "/nowhere/plan.yaml"], 3, "can't write /nowhere/plan.yaml"),
        ([GPT, "-c", "h100x2"], 2, "--batch"),
        ([GPT + "x", "-c", "h100x2", *SIZE], 3, "has no function 'buildx'"),
        ([GPT.removesuffix(":build"), "-c", "h100x2", *SIZE], 3, "names no function"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(
    graph: Path, arguments: list[str], code: int, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", *(str(graph) if a == "GRAPH" else a for a in arguments)]) == code
    assert says in capfd.readouterr().err


def test_why_others_lost() -> None:
    from autoshard.cli.show import why_lost

    class Won:
        predicted = {"step_seconds": 2.0, "memory_bytes": [2**30]}

    def why(**runner: object) -> str:
        return why_lost(Won(), runner)  # type: ignore[arg-type]

    assert why(step_seconds=2.5, memory_bytes=2**31) == "500 ms slower (+25.0 %), 1 GiB more memory"
    assert why(missing_bytes=3 * 2**30, reason="out of memory") == "doesn't fit: 3 GiB too much a rank"
    assert why(at_least_seconds=3.0, reason="at least 50.0 % slower, so not solved") == "at least 50.0 % slower, so not solved"
    assert why(step_seconds=2.0) == "as fast; the first found was taken"


def test_what_would_be_passed_over_is_refused(graph: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(graph), "-c", "cpux4", "--mesh", "dp=3 tp=2"]) == 3
    assert "has 6 ranks, but cpux4 has 4" in capfd.readouterr().err
    assert run(["plan", str(graph), "-c", "cpux4", "--batch", "4"]) == 2
    assert "a saved graph has its batch" in capfd.readouterr().err
