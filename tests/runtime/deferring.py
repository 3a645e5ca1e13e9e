"""What the tests of deferred construction build, and how they compare: bit for bit with what ordinary construction makes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from autoshard.runtime.deferred import deferred, materialise


class Everything(nn.Module):
    """Ways in which constructors fill tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(20, 30), nn.Embedding(50, 20, padding_idx=0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(20, 4, 40), 2, enable_nested_tensor=False)  # deep copies
        self.head = nn.Linear(20, 50, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("frequencies", 1.0 / 10000 ** (torch.arange(0, 20, 2).float() / 20))
        self.register_buffer("mask", torch.ones(6, 6).tril().bool(), persistent=False)
        self.rates = torch.linspace(0, 0.1, 4)
        assert [round(r.item(), 4) for r in self.rates] == [0.0, 0.0333, 0.0667, 0.1] and self.rates.tolist()[0] == 0
        assert bool((self.mask.sum() == 21).all()) and self.mask.nonzero().shape == (21, 2) and self.rates.numpy().shape == (4,)
        assert self.linear.weight.device == torch.device("cpu") and not self.linear.weight.is_meta
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.orthogonal_(self.encoder.layers[0].linear1.weight)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.forked = nn.Parameter(torch.randn(3, 3))
        self.own = nn.Parameter(torch.randn(33, generator=torch.Generator().manual_seed(5)))
        self.cast = nn.Parameter(torch.randn(3, 3).to(torch.bfloat16))
        self.rows = nn.Parameter(torch.empty(4, 5))
        self.rows.data[1:3].normal_()
        self.rows.data[0] = self.rows.data[1] * 2
        self.rows.data[3].fill_(math.pi)
        with torch.no_grad():
            for p in self.encoder.parameters():
                p.mul_(0.5)
        self.own.data = torch.cat([self.own.data, self.forked.data.flatten()])


class Interleaved(nn.Module):
    """Tensors that are made of several draws with those of others between them, of other tensors' draws, and of other generators'."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.layers = nn.ModuleList(nn.Linear(24, 40) for _ in range(3))
        for layer in self.layers:
            layer.weight.data[:20].normal_()
        for layer in self.layers:
            layer.weight.data += torch.randn_like(layer.weight) * 0.1 + torch.rand(40, 24, generator=generator)
            layer.bias.data.copy_(torch.normal(layer.bias.data, 0.5))  # a draw that reads a tensor
        self.sums = nn.Parameter(self.layers[0].weight.detach() + self.layers[2].weight.detach())
        self.likes = nn.ParameterList(
            [
                torch.rand_like(self.sums),
                torch.zeros_like(self.sums) + 1,
                self.sums.new_full((3,), 2.5),
                torch.full_like(self.sums.data.t(), 3.0),
            ]
        )
        self.register_buffer("ones", torch.ones_like(input=self.sums, dtype=torch.bool))
        self.register_buffer("full", torch.full_like(input=self.sums, fill_value=2.5, dtype=torch.int64))
        self.register_buffer("new", self.sums.new_full(size=(2, 3), fill_value=7) * self.sums.new_ones(2, 1))
        self.register_buffer("numbers", torch.randint_like(self.sums.detach(), 3, 9))
        self.register_buffer("few", torch.randint_like(self.sums.detach(), 5))
        torch.poisson(self.layers[1].weight.detach().abs() * 30)  # how far this moves the generator depends on what it reads
        self.grown = nn.Parameter(torch.randn(70000).half().double())
        self.register_buffer("kept", torch.bernoulli(torch.full((30,), 0.3)) * torch.randperm(30))
        state = torch.get_rng_state()
        self.first = nn.Parameter(torch.randn(7))
        torch.set_rng_state(state)
        self.second = nn.Parameter(torch.randn(7))
        torch.manual_seed(11)
        self.seeded = nn.Parameter(torch.randn(40, 9).t() * 0.5)
        self.small = nn.Parameter(self.seeded.detach().half())
        self.wide = nn.Parameter(self.small.detach().double().exp())
        self.moved = nn.Parameter(torch.empty(9, 40, dtype=torch.bfloat16))
        self.moved.data.copy_(nn.init.trunc_normal_(torch.empty(9, 40), std=0.3, a=-0.4, b=0.4))
        self.signs = nn.Parameter(torch.where(torch.rand(9, 40) > 0.5, self.seeded.detach(), -1.0))
        self.views = nn.Parameter(self.seeded.detach()[2:5])


class Tall(nn.Module):
    """Drawn twice, as models are that initialise after construction, then scaled."""

    def __init__(self, layers: int = 12, width: int = 256) -> None:
        super().__init__()
        self.table = nn.Embedding(1024, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 1024, bias=False)
        self.head.weight = self.table.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.data.normal_(0, 0.02)
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.div_(math.sqrt(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x).square().mean()


class Orthogonal(nn.Module):
    """Every layer's initialisation is another of torch's."""

    HOW = ("orthogonal_", "trunc_normal_", "xavier_uniform_", "kaiming_normal_", "eye_", "dirac_", "sparse_")

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.table = nn.Embedding(32, width, padding_idx=3)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in self.HOW)
        for how, layer in zip(self.HOW, self.layers, strict=True):
            weight = layer.weight[:, :, None] if how == "dirac_" else layer.weight
            getattr(nn.init, how)(weight, **({"sparsity": 0.2} if how == "sparse_" else {}))
        self.register_buffer("scale", 1 / torch.arange(1, width + 1).float().sqrt())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * self.scale
        return x.square().mean()


def whole(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def same(found: dict[str, Tensor], plain: nn.Module) -> None:
    assert set(found) == set(whole(plain))
    for name, tensor in whole(plain).items():
        assert found[name].dtype == tensor.dtype and found[name].stride() == tensor.stride(), name
        assert torch.equal(found[name], tensor), name


def check_same(build: Callable[[], nn.Module]) -> nn.Module:
    """Deferred and ordinary construction hold the same bits and leave the generator in the same state; the deferred model."""
    torch.manual_seed(3)
    plain = build()
    after = torch.randn(3)
    torch.manual_seed(3)
    later = deferred(build)
    assert all(t.is_meta for t in whole(later).values())
    assert list(later.state_dict()) == list(plain.state_dict())
    found = dict(materialise(later))
    assert torch.equal(torch.randn(3), after)
    same(found, plain)
    return later
