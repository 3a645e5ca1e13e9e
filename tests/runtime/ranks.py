"""Run a function on several processes that talk through gloo: `ranks(4, function, *args)` → what each returned."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def ranks(count: int, function: Callable[..., Any], *args: Any, start: str = "fork") -> list[Any]:
    """`function(*args)` on ranks 0 to count - 1, forked from here so that nothing is imported again; with "spawn", processes that hold
    nothing of this one's. Raises what a rank raised."""
    context: Any = mp.get_context(start)
    answers: Any = context.SimpleQueue()
    port = _free_port()
    processes = [context.Process(target=_rank, args=(rank, count, port, answers, function, args)) for rank in range(count)]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    while len(found) < count and (any(p.is_alive() for p in processes) or not answers.empty()):
        if answers.empty():
            time.sleep(0.01)
        else:
            found.update([answers.get()])
    for process in processes:
        process.join(30)
        if process.is_alive():
            process.kill()
    gone = [f"rank {rank} ended with {p.exitcode}, without a word" for rank, p in enumerate(processes) if rank not in found]
    failed = gone + [f"rank {rank}:\n{answer}" for rank, (ok, answer) in sorted(found.items()) if not ok]
    assert not failed, "\n".join(failed)
    return [found[rank][1] for rank in range(count)]


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(rank: int, count: int, port: int, answers: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        answers.put((rank, (True, function(*args))))
    except BaseException:
        answers.put((rank, (False, traceback.format_exc())))
    if dist.is_initialized():
        dist.destroy_process_group()
