"""Ranks that stop, die, hang or fail: each is named within seconds, told once, and all ranks end. `python -m tests.faults` runs many."""

from __future__ import annotations

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
