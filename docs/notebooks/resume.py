# %% [markdown]
# # Train, stop, resume elsewhere
# All ranks of a program can be played in one process, exactly as they run on real ones. Here a run on `dp=2 tp=2` is saved, and
# goes on under `pp=2`.

# %%
import tempfile

import torch
from torch import nn

from autoshard import lower
from autoshard.plan.search import search
from autoshard.runtime.in_process import InProcess
from autoshard.trace.capture import capture


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(16) for _ in range(4)))

    def forward(self, x, y):
        return (self.blocks(x) - y).square().mean()


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(8, 16, generator=generator, dtype=torch.float64) for name in "xy"}


def player(mesh: dict[str, int]):
    torch.manual_seed(0)
    model = Model().double()
    captured = capture(model, kwargs=batch(0))
    ranks = InProcess(lower.compile(captured, search(captured.graph, None, mesh)), model)
    return ranks, ranks.optimizer(torch.optim.AdamW, lr=1e-2)


def train(ranks, optimizer, steps):
    losses = []
    for step in steps:
        losses.append(float(ranks.train_step(**batch(step))))
        ranks.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


# %% [markdown]
# ## The run that nobody disturbs

# %%
whole = train(*player({"dp": 2, "tp": 2}), range(10))
print(whole)

# %% [markdown]
# ## Half of it, saved; the rest on another mesh

# %%
with tempfile.TemporaryDirectory() as folder:
    ranks, optimizer = player({"dp": 2, "tp": 2})
    first = train(ranks, optimizer, range(5))
    ranks.save(folder, step=5)

    ranks, optimizer = player({"pp": 2})
    restored = ranks.load(folder)
    second = train(ranks, optimizer, range(restored.step, 10))

# %% [markdown]
# The losses are those of the undisturbed run.

# %%
worst = max(abs(a - b) for a, b in zip(whole, first + second, strict=True))
print(f"largest difference: {worst:.1e}")
assert worst < 1e-12
