"""Train the plain GPT of gpt.py on several processes, with a plan that autoshard chose, and compare it with one process.

    torchrun --standalone --nproc-per-node 4 examples/train.py     (or ./scripts/train, which sets up first)
    python examples/train.py --plain                               the same run on one process, without autoshard

Prints the plan, the falling loss, the held-out loss in nats a byte, and the largest difference of the loss from the same
run on one process over its first steps. Saves checkpoints; `--resume` goes on from the newest, on any number of processes. Ends by
writing the model as a Hugging Face GPT-2, if transformers is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from data import batches, standard_library
from export import difference, to_hugging_face
from gpt import GPT, Config
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

COMPARED = 50
"""Steps that are run on one process too."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--batch", type=int, default=16, help="sequences in the global batch")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=60, help="steps over which the learning rate rises")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="one process, without autoshard")
    parser.add_argument("--checkpoints", type=Path, default=Path("out/train"), help="folder of the checkpoints")
    parser.add_argument("--every", type=int, default=160, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--compared", type=int, default=COMPARED, help="first steps that are run on one process too")
    parser.add_argument("--losses", type=Path, help="write the losses here, as JSON")
    return parser.parse_args()


class Plain:
    """The verbs of a sharded model, on one process: what `autoshard.parallelize` must equal."""

    def __init__(self, model: GPT) -> None:
        self.model = model

    def train_step(self, **batch: Tensor) -> Tensor:
        loss = self.model(**batch)
        loss.backward()
        return loss.detach()

    def eval_step(self, **batch: Tensor) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            loss = self.model(**batch)
        self.model.train()
        return loss

    def optimizer(self, cls: type[torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
        return cls(self.model.parameters(), **options)

    def clip_grad_norm_(self, limit: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)


def build(args: argparse.Namespace) -> GPT:
    torch.manual_seed(args.seed)
    return GPT(Config())


def train(trainer: Any, text: Tensor, args: argparse.Namespace, steps: int) -> Iterator[float]:
    """Yield each step's loss: AdamW, warm-up then a cosine to a tenth, gradients clipped to norm 1. A plain run has no checkpoints."""
    optimizer = trainer.optimizer(torch.optim.AdamW, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / args.steps)))
        return min((step + 1) / args.warmup, 0.1 + 0.9 * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    drawn = batches(text, batch=args.batch, seq=Config.seq, seed=args.seed + 1)
    saves = not isinstance(trainer, Plain)
    start = trainer.load(args.checkpoints, scheduler=schedule).step if saves and args.resume else 0
    for step, batch in itertools.islice(enumerate(drawn, 1), start, steps):
        loss = trainer.train_step(**batch)
        trainer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if saves and (step % args.every == 0 or step == steps):
            trainer.save(args.checkpoints, step=step, scheduler=schedule, keep=2)
        yield float(loss)


def held_out_loss(trainer: Any, text: Tensor, args: argparse.Namespace, rounds: int = 16) -> float:
    """Mean over random windows of files that were never trained on, in nats a byte."""
    drawn = batches(text, batch=args.batch, seq=Config.seq, seed=args.seed + 2)
    return sum(float(trainer.eval_step(**next(drawn))) for _ in range(rounds)) / rounds


def watch(losses: Iterator[float], steps: int, console: Console, title: str, every: int = 25) -> list[float]:
    """Drain the losses behind a progress bar, printing one in `every`."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    seen: list[float] = []
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        task = progress.add_task(title, total=steps, loss=float("nan"))
        for loss in losses:
            seen.append(loss)
            progress.update(task, advance=1, loss=loss)
            if len(seen) % every == 0 or len(seen) == 1:
                progress.console.print(f"{title}  step {len(seen):4d}  loss {loss:.4f}")
    return seen


def reference(text: Tensor, args: argparse.Namespace, console: Console) -> list[float]:
    """The first losses of the same run on one process, by rank 0 while the others wait."""
    losses: list[float] = []
    if dist.get_rank() == 0 and not args.resume:
        torch.set_num_threads(os.cpu_count() or 1)
        steps = min(args.compared, args.steps)
        losses = watch(train(Plain(build(args)), text, args, steps), steps, console, "one process")
    dist.barrier()
    return losses


def main() -> None:
    args = arguments()
    alone = args.plain or "RANK" not in os.environ
    if alone and not args.plain:
        raise SystemExit("start it with torchrun (see ./scripts/train), or say --plain for one process without autoshard")
    text, held_out = standard_library()
    if alone:
        console = Console(highlight=False)
        trainer: Any = Plain(build(args))
        expected: list[float] = []
    else:
        import autoshard
        from autoshard.report import plan_table
        from autoshard.runtime.comm import join

        join("gloo")
        console = Console(highlight=False, quiet=dist.get_rank() != 0)
        expected = reference(text, args, console)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
        example = next(batches(text, batch=args.batch, seq=Config.seq, seed=args.seed))
        trainer = autoshard.parallelize(build(args), autoshard.Cluster.local(dist.get_world_size()), kwargs=example)
        console.print(plan_table(trainer.plan))
    console.print(f"{len(text):,} bytes to train on, {len(held_out):,} held out")
    losses = watch(train(trainer, text, args, args.steps), args.steps, console, "training")
    evaluated = held_out_loss(trainer, held_out, args)
    console.print(f"held-out loss: {evaluated:.4f} nats a byte")
    if expected:
        worst = max(abs(a - b) for a, b in zip(losses, expected, strict=False))
        console.print(f"largest difference of the loss from one process, first {len(expected)} steps: {worst:.2e}")
    if args.losses and not console.quiet:
        args.losses.write_text(json.dumps({"losses": losses, "held_out": evaluated}))
    if not alone:
        export(trainer, held_out, args, console)
        dist.destroy_process_group()


def export(trainer: Any, text: Tensor, args: argparse.Namespace, console: Console) -> None:
    """Write the trained model for `transformers`, and say how far its logits are from the plain model's."""
    weights = trainer.state_dict()  # by all ranks together
    if dist.get_rank() == 0 and importlib.util.find_spec("transformers"):
        folder = args.checkpoints / "hugging-face"
        to_hugging_face(weights, Config(), folder)
        tokens = next(batches(text, batch=2, seq=Config.seq, seed=args.seed))["tokens"]
        worst = difference(weights, Config(), folder, tokens)
        console.print(f"written to {folder}; largest difference of a logit after transformers has loaded it: {worst:.2e}")


if __name__ == "__main__":
    main()
