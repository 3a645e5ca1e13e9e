"""Configs: every fault at once, with file, line and column; and thousands of mutated files, none of which ends in a traceback."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from autoshard.config import Config, bytes_of, load, parse, to_yaml
from autoshard.errors import AutoshardError, ConfigError
from autoshard.plan.cluster import CATALOGUE, Cluster
from autoshard.plan.plan import Plan
from autoshard.plan.search import search

LEAST = "model: {source: gpt.py:build}\ndata: {sources: [{path: a.txt}]}\n"
EXAMPLE = Path(__file__).parents[1] / "examples" / "train.yaml"
PLACE = re.compile(r"^.+:\d+:\d+$")


def faults(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "c.yaml", overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_what_is_printed_reads_back() -> None:
    read = load(EXAMPLE)
    assert parse(to_yaml(read)) == read
    printed = to_yaml()
    assert all("#" in line for line in printed.splitlines())
    assert parse(printed.replace("source: ...", "source: a.py:b").replace("path: ...", "path: x")).optimizer == Config().optimizer


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LEAST + "run: {steps: 0}", "c.yaml:3:14: expected at least 1, found 0"),
        (LEAST + "run: {steps: 1.5}", "c.yaml:3:14: expected a whole number, found the number 1.5"),
        (LEAST + "run: {steps: true}", "c.yaml:3:14: expected a whole number, found a truth value true"),
        (LEAST + "run: {stepz: 1}", "c.yaml:3:7: unknown key 'stepz'; expected steps, seed, log_every, max_nonfinite"),
        (LEAST + "run: {steps: 1, steps: 2}", "c.yaml:3:17: key 'steps' a second time"),
        (LEAST + "optimizer: {lr: 3e-4s}", "c.yaml:3:17: expected a number, found text '3e-4s'"),
        (LEAST + "optimizer: {lr: -1}", "c.yaml:3:17: expected at least 0, found -1"),
        (LEAST + "optimizer: {betas: [0.9]}", "c.yaml:3:20: expected 2 values, found 1"),
        (LEAST + "optimizer: {betas: [0.9, 1.5]}", "c.yaml:3:26: expected at most 0.999999, found 1.5"),
        (LEAST + "optimizer: {groups: [{lr: 1}]}", "c.yaml:3:22: 'match' is missing"),
        (LEAST + "schedule: {kind: wavy}", "c.yaml:3:18: expected one of cosine, linear, constant, found 'wavy'"),
        (LEAST + "schedule: {warmup: 200}", "c.yaml:3:20: a warm-up of 200 steps in a run of 100"),
        (LEAST + "parallel: {microbatches: 3}", "c.yaml:3:26: a batch of 8 doesn't divide into 3 microbatches"),
        (LEAST + "parallel: {mesh: dp=x}", "c.yaml:3:18: 'dp=x' is not a mesh"),
        (LEAST + "parallel: {mesh: zz=2}", "c.yaml:3:18: mesh axis 'zz' is not one"),
        (LEAST + "parallel: {mesh: dp=2, cluster: cpux2}", "c.yaml:3:33: both mesh and cluster are given"),
        (LEAST + "parallel: {pins: {zoro: 1}}", "c.yaml:3:19: unknown pin 'zoro'"),
        (LEAST + "parallel: {plan: p.yaml, microbatches: 2}", "c.yaml:3:26: microbatches has no effect: the plan decides it"),
        (LEAST + "parallel: {plan: p.yaml, pins: {zero: false}}", "c.yaml:3:26: pins has no effect"),
        (LEAST + "schedule: {kind: constant, floor: 0.5}", "c.yaml:3:28: floor has no effect: the schedule is constant"),
        (LEAST + "checkpoints: {every: 5}", "c.yaml:3:15: every has no effect: there is no folder"),
        (LEAST + "checkpoints: {keep: null}", "c.yaml:3:15: keep has no effect"),
        (LEAST + "optimizer: {groups: [{match: a*}]}", "c.yaml:3:23: a group with neither lr nor weight_decay has no effect"),
        (LEAST + "evaluation: {sources: [{path: b.txt, dtype: int32}]}", "c.yaml:3:38: dtype has no effect: the format is text"),
        ("model: {source: a}\ndata: {sources: [{path: x}], held_out: 0}\nevaluation: {every: 5}", "c.yaml:3:14: every has no effect"),
        ("model: {source: a}\ndata: {sources: [{path: x}], held_out: 0.2}\nevaluation: {sources: [{path: y}]}", "c.yaml:2:30: held_out"),
        ("model: {source: a}\ndata: {tokenizer: t, sources: [{path: x, format: megatron}]}", "c.yaml:2:8: tokenizer has no effect"),
        (LEAST + "checkpoints: {keep: -1}", "c.yaml:3:21: expected at least 1, found -1"),
        (LEAST + "run: 7", "c.yaml:3:6: expected keys and values, found the number 7"),
        ("model: {source: a}\n", "c.yaml:1:1: 'data' is missing"),
        ("model: {source: a}\ndata: {sources: []}", "c.yaml:2:17: expected at least one"),
        ("- 1", "c.yaml:1:1: expected keys and values, found a list"),
        ("a: [", "c.yaml:1:5: "),
    ],
)
def test_a_fault_has_its_place(text: str, says: str) -> None:
    assert any(line.startswith(says) for line in faults(text)), faults(text)


def test_all_faults_at_once() -> None:
    found = faults(LEAST + "run: {steps: -1, seed: x}\nnonsense: 1\noptimizer: {lr: no}\nmetrics: 3")
    assert len(found) == 5


def test_overrides() -> None:
    config = parse(LEAST, "c.yaml", ["run.steps=5", "data.sources.0.weight=2", "optimizer.betas=[0.8, 0.9]", "metrics.file=null"])
    assert (config.run.steps, config.data.sources[0].weight, config.optimizer.betas, config.metrics.file) == (5, 2.0, [0.8, 0.9], None)
    assert faults(LEAST, "run.steps=-5") == ["--set run.steps=-5: expected at least 1, found -5"]
    assert faults(LEAST, "run.stepz=5")[0].startswith("--set run.stepz=5: unknown key")
    for bad in ("run", "=5", "data.sources.7.weight=1", "run.steps.more=1", "run.steps=[", "data.sources.x=1"):
        assert faults(LEAST, bad)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    (tmp_path / "large.yaml").write_bytes(b" " * (2 << 20))
    for path in (tmp_path, tmp_path / "none.yaml", tmp_path / "latin.yaml", tmp_path / "large.yaml"):
        with pytest.raises(ConfigError, match=":1:1"):
            load(path)


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "1 XB", "0", "1e3", "nan", "1 2"])
def test_amounts_of_memory(text: str) -> None:
    with pytest.raises(ConfigError):
        bytes_of(text)


# ---- mutated files --------------------------------------------------------------------------------------------------

PIECES = (
    "-1", "1e999", "~", "null", "true", "[]", "{}", "[1, 2]", "{a: b}", "&x 1", "*x", "!!python/object:os.system x", "'", '"', "\t", "\0",
    "::", "- - -", "?", "|", ">", "%", "@", "\u2028", "\ud7ff", "9" * 50, ".inf", ".nan", "0x10", "a: &a [*a]", "---\n", "...\n", "80 GB",
    "1:30", "\\UFFFFFFFF", '"\\UFFFFFFFF"', "<<: {}", "#", "[" * 40, "{a: " * 40, "é", "x" * 500,
)  # fmt: skip


def mutate(text: str, random_: random.Random) -> str:
    """One to four changes to the bytes, words or lines of a file."""
    for _ in range(random_.randint(1, 4)):
        lines = text.split("\n")
        i = random_.randrange(len(lines))
        kind = random_.randrange(8)
        at = random_.randrange(len(text) + 1)
        if kind == 0:
            text = text[:at] + random_.choice(PIECES) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + random_.randint(1, 10) :]
        elif kind == 2:
            text = text[:at] + chr(random_.choice([*range(32, 127), 0, 9, 13, 0x85, 0x2028, 0xFEFF])) + text[at + 1 :]
        elif kind == 3:
            text = "\n".join(lines[:i] + lines[i + 1 :])
        elif kind == 4:
            text = "\n".join(lines[: i + 1] + lines[i:])
        elif kind == 5:
            head, colon, _ = lines[i].partition(":")
            text = "\n".join([*lines[:i], f"{head}{colon} {random_.choice(PIECES)}", *lines[i + 1 :]])
        elif kind == 6:
            j = random_.randrange(len(lines))
            lines[i], lines[j] = lines[j], lines[i]
            text = "\n".join(lines)
        else:
            lines[i] = " " * random_.randint(0, 5) + lines[i].lstrip()
            text = "\n".join(lines)
    return text


@pytest.fixture(scope="module")
def plan() -> str:
    from autoshard.trace.graph import Graph, Op, Ref, Tensor

    g = Graph()
    g.add_value("x", Tensor((8, 4), "float32"), role="input", path="kwargs.x", batch_dim=0)
    g.add_value("w", Tensor((4, 4), "float32"), role="param", path="w", grad=True)
    g.add_op(Op("y", "aten.linear.default", (Ref("x"), Ref("w")), {}, ("y",)), [Tensor((8, 4), "float32")], grad=True)
    g.add_op(Op("l", "aten.mean.dim", (Ref("y"), (0, 1), False), {}, ("l",)), [Tensor((), "float32")], grad=True)
    g.loss = "l"
    return search(g, Cluster.load("cpux2"), {"dp": 2}).to_yaml()


def check(read: Callable[[str], object], text: str) -> tuple[int, str]:
    """(1 if the file is refused, what is wrong with how it is refused)."""
    try:
        read(text)
    except AutoshardError as error:
        lines = str(error).splitlines()
        told = [line.strip() for line in lines[1:] if not line.startswith(("  hint", "  …"))]
        if not told or not all(re.match(r"(at )?f\.yaml:\d+:\d+", line) for line in told):
            return 1, f"a fault without its place: {error}"
        return 1, ""
    except Exception as error:  # what the test looks for
        return 1, f"{type(error).__name__}: {error}"
    return 0, ""


def fuzz(plan: str, count: int, seed: int) -> int:
    kinds: list[tuple[str, Callable[[str], object]]] = [
        (to_yaml(load(EXAMPLE)), lambda text: parse(text, "f.yaml")),
        ((CATALOGUE / "h100.yaml").read_text(), lambda text: Cluster.parse(text, "f.yaml", 8)),
        (plan, lambda text: Plan.from_yaml(text, "f.yaml")),
    ]
    refused = 0
    for i in range(count):
        whole, read = kinds[i % 3]
        text = mutate(whole, random.Random(seed + i))
        no, wrong = check(read, text)
        assert not wrong, f"seed {seed + i}, kind {i % 3}: {wrong}"
        refused += no
    return refused


def test_mutated_files(plan: str) -> None:
    assert fuzz(plan, 300, seed=0) > 150


@pytest.mark.slow
def test_two_thousand_mutated_files(plan: str) -> None:
    assert fuzz(plan, 2000, seed=10_000) > 1000
