"""Every kernel compiles for a GPU, without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from autoshard.kernels import backend


@pytest.mark.slow
def test_everything_compiles_for_hopper():
    if not backend.installed():
        pytest.skip("Triton isn't installed: pip install triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    found = subprocess.run([sys.executable, "-m", "tests.kernels.compiled"], env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.endswith("all compiled\n"), found.stdout[-4000:] + found.stderr[-2000:]
