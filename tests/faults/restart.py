"""Restarts under torchrun: `python -m tests.faults.restart --count 28`. One of two ranks is killed; does the first restart recover?

As a worker (started by itself): meets the other through `join`, as rank 1 kills itself in the first generation, and tells of the second.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys

WORKER = "as-a-worker"


def worker() -> None:
    import torch
    import torch.distributed as dist

    from autoshard.runtime.comm import join

    join("gloo")
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    for i in range(60):
        dist.all_reduce(torch.ones(10))
        if restarts == 0 and i == 30 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    if dist.get_rank() == 0:
        print(f"recovered at restart {restarts}", flush=True)
    dist.destroy_process_group()


def recovers(limit: float = 60.0) -> bool:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
        "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1", "-m", "tests.faults.restart", WORKER,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    return process.returncode == 0 and "recovered at restart 1" in out


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.restart", description=__doc__)
    parser.add_argument("--count", type=int, default=28)
    parser.add_argument(WORKER, nargs="?")
    args = parser.parse_args()
    if getattr(args, WORKER):
        worker()
        return 0
    good = sum(recovers() for _ in range(args.count))
    print(f"{good} of {args.count} recovered at the first restart")
    return 0 if good == args.count else 1


if __name__ == "__main__":
    sys.exit(main())
