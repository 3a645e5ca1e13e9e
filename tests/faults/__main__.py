"""Many faults: `python -m tests.faults --count 50`. Prints who was named, how soon, and how all ranks ended; exit code 1 if any wasn't."""

from __future__ import annotations

import argparse
import sys

from .trial import KINDS, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    bad = 0
    for seed in range(args.seed, args.seed + args.count):
        found = run(seed, args.kind)
        ended = -99 not in found.codes
        good = found.named and found.after <= 5.0 and ended
        bad += not good
        print(f"{seed:4d} {found.kind:8} rank {found.victim}: {'named' if found.named else 'NOT NAMED'} after {found.after:.1f} s, "
              f"codes {found.codes}, {found.messages} messages, {found.seconds:.1f} s", flush=True)  # fmt: skip
        if args.verbose or not good:
            print(found.said, flush=True)
    print(f"{args.count - bad} of {args.count} named within 5 s, and all ranks ended")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
