"""`python -m tests.chaos damage 500`, `hostile 200`, `kills 100 [--ranks 4] [--background]`, `full 100`: the full counts,
with a line of figures each."""

from __future__ import annotations

import argparse
import functools
import logging
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("what", choices=("damage", "hostile", "kills", "full"))
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 4), help="kills: real ranks instead of one process that plays all")
    parser.add_argument("--background", action="store_true", help="kills: checkpoints are written beside training")
    options = parser.parse_args()
    logging.getLogger("autoshard").setLevel(logging.ERROR)
    from . import damage, full, hostile, kills

    kill = functools.partial(kills.run, ranks=options.ranks, wait=not options.background)
    run = {"damage": damage.run, "hostile": hostile.run, "kills": kill, "full": full.run}[options.what]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{run(Path(folder), options.count, options.seed)}  ({time.monotonic() - start:.1f} s)")


if __name__ == "__main__":
    main()
