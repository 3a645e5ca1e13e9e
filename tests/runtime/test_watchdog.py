"""Ranks that stop, die, hang or fail: each is named within seconds, told once, and all ranks end. `python -m tests.faults` runs many."""

from __future__ import annotations

import dataclasses

import pytest

from autoshard.errors import RankError
from autoshard.runtime.watchdog import Report, judge, stands
from tests.faults.restart import recovers
from tests.faults.trial import KINDS, run


def report(rank: int, waiting: float = 0.0, step: int = 3, action: str = "0F1", pid: int = 1) -> Report:
    return Report(rank, 5, step, action, f"train.py:{rank} in step", waiting, pid, "elsewhere")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_named_and_every_rank_ends(kind: str) -> None:
    found = run(KINDS.index(kind) + 3, kind, stop_after=4.5)
    assert found.named and found.after <= 5.0, found
    assert -99 not in found.codes, found
    others = [code for i, code in enumerate(found.codes) if i != found.victim]
    assert set(others) == {RankError.exit_code}, found
    assert found.said.count("Traceback") == (kind == "raises"), found.said  # no noise of broken connections


def test_who_is_named() -> None:
    waits = [report(0, 4.0), report(2, 4.0)]
    busy = judge([*waits, report(1)], frozenset()).text
    assert busy.startswith("rank 1 keeps ranks 0, 2 waiting: it is in action 0F1 of step 3, at train.py:1")
    assert "rank 1 no longer reports, and keeps ranks 0, 2 waiting" in judge([*waits, report(1, 9.0)], frozenset({1})).text
    behind = judge([*waits, report(1, 4.0, step=2)], frozenset()).text
    assert behind.startswith("every rank waits for another: rank 1 is in action 0F1 of step 2")
    many = judge([report(0, 4.0), *(report(r) for r in range(1, 40))], frozenset()).text
    assert "and 31 more" in many and "rank 9 is" not in many


def test_where_a_thread_stands() -> None:
    import sys

    place, waiting = stands(sys._getframe())
    assert place.endswith("in test_where_a_thread_stands") and not waiting


class FakeStream:
    """As a CUDA stream answers: whether all that it was given is done, or that it can't be asked."""

    def __init__(self) -> None:
        self.done: bool | None = True

    def query(self) -> bool:
        if self.done is None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return self.done


class FakeStore(dict):  # type: ignore[type-arg]
    set = dict.__setitem__

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self[key].encode() for key in keys]


def test_a_host_that_stands_still_waits_for_its_device(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """What happens on CUDA when a collective hangs: no host is in communication, all wait for a number from the device."""
    from functools import partial

    from autoshard.runtime import watchdog as module

    monkeypatch.setattr(module, "TICK", 1000.0)  # its threads sleep: this test looks itself
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    stream = FakeStream()
    watchdog = module.Watchdog(FakeStore(), 0, 2, pending=partial(module.unfinished, stream))
    monkeypatch.setattr(module.Watchdog, "end", lambda *_: pytest.fail("a busy device ends nothing"))
    try:
        monkeypatch.setattr(module, "stands", lambda frame: ("train.py:9 in main", False))

        def look(seconds: float, done: bool | None) -> Report:
            now[0] += seconds
            stream.done = done
            return watchdog.look()

        look(1, True)
        assert look(9, True).waiting == 0 and look(9, None).waiting == 0  # the host is at work
        assert look(2, False).waiting == 2 and look(2, False).device
        late = look(5, False)
        assert late.waiting == 9
        busy = report(1)
        assert judge([late, busy], frozenset()).text.startswith("rank 1 keeps rank 0 waiting")
        both = [late, Report(1, 5, 3, "", "train.py:9 in main", 9.0, 1, "elsewhere", True)]
        verdict = judge(both, frozenset())
        assert verdict.computing and "for its device" in verdict.text
        watchdog.reports, watchdog.answered = both, now[0]
        watchdog.consider(late)
        assert capfd.readouterr().err == ""  # a step may take nine seconds
        late = look(2000, False)
        watchdog.reports, watchdog.answered = [late, dataclasses.replace(both[1], tick=6)], now[0]
        watchdog.consider(late)
        assert capfd.readouterr().err.count("every rank waits for another or for its device") == 1
        assert look(1, True).waiting == 0
    finally:
        watchdog.ending.set()


END = """
import sys, time
from datetime import timedelta
from torch.distributed import TCPStore
from autoshard.runtime.watchdog import Watchdog

class Slow:
    slow = False
    def __init__(self, store):
        self.store = store
    def __getattr__(self, name):
        return getattr(self.store, name)
    def check(self, keys):
        if self.slow:  # as on a busy machine: the thread is in C++, without the interpreter's lock
            try:
                self.store.wait(["never"], timedelta(seconds=1.5))
            except Exception:
                pass
        return self.store.check(keys)

class Late:
    def __del__(self):
        time.sleep(1.5)  # the interpreter's end takes a while, too

store = Slow(TCPStore("127.0.0.1", 0, 1, True))
watchdog = Watchdog(store, 0, 1)
store.slow = True
time.sleep(0.8)
sys.modules["late"] = late = Late()
late.itself = late
raise SystemExit(7)
"""


def test_a_thread_in_the_store_does_not_abort_the_end_of_the_process() -> None:
    import subprocess
    import sys

    found = subprocess.run([sys.executable, "-c", END], capture_output=True, text=True, timeout=120)
    assert found.returncode == 7 and "terminate called" not in found.stderr, found.stderr


def test_a_killed_rank_comes_back_at_the_first_restart() -> None:
    assert recovers()


def test_a_source_line_that_cannot_be_read_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import linecache
    import sys

    def broken(name: str, line: int) -> str:
        raise TypeError("'<=' not supported between instances of 'int' and 'NoneType'")

    monkeypatch.setattr(linecache, "getline", broken)
    assert stands(sys._getframe())[0].endswith("in test_a_source_line_that_cannot_be_read_is_left_out")
