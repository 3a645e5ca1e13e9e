"""Help is quick, imports no torch, and tells enough to begin with; exit codes are what the documentation says."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import autoshard.cli as cli
from autoshard.errors import CheckpointError, NoPlanError

PAGES = (
    [],
    ["plan"],
    ["train"],
    ["checkpoint"],
    ["checkpoint", "inspect"],
    ["checkpoint", "verify"],
    ["checkpoint", "convert"],
    ["doctor"],
)


def autoshard(*arguments: str, code: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    program = ["-c", code, *arguments] if code else ["-m", "autoshard", *arguments]
    return subprocess.run([sys.executable, *program], capture_output=True, text=True, timeout=120, cwd=cwd)


def test_no_page_of_help_imports_torch() -> None:
    code = f"""
import sys
from autoshard.cli import run
for page in {PAGES!r}:
    assert run([*page, "--help"]) == 0, page
assert not {{"torch", "numpy", "yaml", "transformers"}} & set(sys.modules), "heavy imports"
"""
    found = autoshard(code=code)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("Usage: autoshard") == len(PAGES)


def test_help_is_quick() -> None:
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert autoshard("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < 0.4, took  # seconds of the processor, which other work on the machine doesn't lengthen much


@pytest.mark.parametrize("page", ["plan", "train", "doctor"])
def test_every_command_shows_examples(page: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run([page, "--help"]) == 0
    out = capfd.readouterr().out
    assert "Examples" in out and out.count(f"autoshard {page}") >= 2


def test_wrong_usage_is_2(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan"]) == 2
    assert cli.run(["nonsense"]) == 2
    assert cli.run(["train"]) == 2
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(NoPlanError("none fits"), 4), (CheckpointError("damaged"), 5), (KeyboardInterrupt(), 130)])
def test_exit_codes(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(**options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert cli.run([]) == code
    err = capfd.readouterr().err
    assert "Traceback" not in err and (not str(error) or err == f"error: {error}\n")


def test_what_another_rank_tells_is_not_told_again(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    error = NoPlanError("none fits")
    error.elsewhere = True

    def fail(**options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert cli.run([]) == 4 and capfd.readouterr().err == ""


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ZeroDivisionError):
        cli.run([])


def test_a_broken_pipe_is_quiet() -> None:
    found = subprocess.run(
        f"{sys.executable} -m autoshard train --print-config | head -1", shell=True, capture_output=True, text=True, timeout=60
    )
    assert found.stdout.startswith("model:") and found.stderr == ""


def test_doctor(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor"]) == 0
    out = capfd.readouterr().out
    assert "torch" in out and "ready" in out
    assert cli.run(["doctor", "--json"]) == 0
