"""Kill the main job, resume it elsewhere, and compare with the run that nobody disturbed.

    python examples/interrupted.py [--steps 120]

Runs train.py three times: on 4 processes to the end; on 4 processes, killed (SIGKILL to all) after a checkpoint; and from there on 2
processes, with the plan that the planner chooses for those. Prints the largest difference of the loss; exit code 1 above 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALLOWED = 1e-4


def run(processes: int, *options: str) -> subprocess.Popen[bytes]:
    script = str(Path(__file__).with_name("train.py"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), script]
    return subprocess.Popen([*launch, *options], start_new_session=True)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists():
        if process.poll() is not None:
            raise SystemExit(f"the run ended with {process.returncode} before {path.name}")
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    args = parser.parse_args()
    every = max(1, args.steps // 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = ("--steps", str(args.steps), "--every", str(every), "--compared", "0")
        whole = run(4, *common, "--checkpoints", str(folder / "whole"), "--losses", str(folder / "whole.json"))
        if whole.wait():
            raise SystemExit(f"the undisturbed run ended with {whole.returncode}")
        killed = run(4, *common, "--checkpoints", str(folder / "killed"))
        wait_for(folder / "killed" / f"step-{every:08d}", killed)
        time.sleep(1.0)  # some steps further, which are lost
        os.killpg(killed.pid, signal.SIGKILL)
        subprocess.run(["pkill", "-KILL", "-f", str(folder / "killed")], check=False)  # the launcher starts ranks in groups of their own
        killed.wait()
        print(f"killed after the checkpoint of step {every}; on 2 processes from there", flush=True)
        resumed = run(2, *common, "--checkpoints", str(folder / "killed"), "--resume", "--losses", str(folder / "resumed.json"))
        if resumed.wait():
            raise SystemExit(f"the resumed run ended with {resumed.returncode}")
        first, second = (json.loads((folder / f"{n}.json").read_text()) for n in ("whole", "resumed"))
    tail = first["losses"][-len(second["losses"]) :]
    worst = max(abs(a - b) for a, b in zip([*tail, first["held_out"]], [*second["losses"], second["held_out"]], strict=True))
    print(f"largest difference of the loss over the {len(tail)} steps after resuming, and held out: {worst:.2e} (allowed: {ALLOWED:.0e})")
    sys.exit(worst > ALLOWED)


if __name__ == "__main__":
    main()
