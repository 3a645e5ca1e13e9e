from __future__ import annotations

import pytest

from benchmarks import overlap


@pytest.mark.slow
def test_both_lanes_are_measured_on_two_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    argv = "--tiny --device cpu --steps 1 --dtype float32 --model plain --impl ours[compile=false,pins.zero=false]".split()
    with pytest.raises(SystemExit) as ended:
        overlap.main(argv)
    assert ended.value.code == 0
    shown = capfd.readouterr().out
    assert "beside" in shown and "in place" in shown and "0 of " in shown
