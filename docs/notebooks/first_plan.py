# %% [markdown]
# # A first plan
# A plan needs no devices: the model is built without memory, captured once, and planned for a cluster that is only described.

# %%
import torch
from torch import nn

import autoshard
from autoshard import lower
from autoshard.plan.search import search
from autoshard.trace.capture import capture


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, width: int = 4096, layers: int = 8) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))

    def forward(self, x):
        return self.blocks(x).square().mean()


# %%
with torch.device("meta"):
    model, batch = Model(), {"x": torch.empty(64, 512, 4096)}
captured = capture(model, kwargs=batch)
print(len(captured.graph.ops), "operators")

# %% [markdown]
# The planner looks at every mesh of 8 H100s, and says what it expects.

# %%
plan = search(captured.graph, autoshard.Cluster.load("h100x8"))
print(plan.mesh, plan.microbatches, plan.schedule)
for other in plan.runners_up[:5]:
    print(other)

# %% [markdown]
# Pin a decision, and compare.

# %%
pinned = search(captured.graph, autoshard.Cluster.load("h100x8"), {"tp": 8})
print(plan.predicted["step_seconds"], "against", pinned.predicted["step_seconds"], "with tp=8")

# %% [markdown]
# What a rank would run is readable Python.

# %%
program = lower.compile(captured, pinned, ranks=[0])
print("\n".join(program.source(0).splitlines()[:40]))
