"""Plain models of our own, each with one thing that a partitioner can get wrong. `CASES[name].build()` → (model, kwargs)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import layers
from .case import BATCH, SEQ, VOCAB, Built, Case, tokens, uneven_labels
from .hf import vary


def seeded(make: Callable[[], Built]) -> Callable[[], Built]:
    """The recipe, with weights drawn from a fixed seed and moved off their special values."""

    @functools.wraps(make)
    def build() -> Built:
        torch.manual_seed(0)
        model, kwargs = make()
        vary(model)
        return model.train(), kwargs

    return build


def decoder(vocab: int = VOCAB, ignored: bool = False, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        ids = tokens(vocab)
        return layers.Decoder(vocab, **options), {"ids": ids, "labels": uneven_labels(ids) if ignored else ids.clone()}

    return seeded(build)


class ScaledSigmoid(torch.autograd.Function):
    """Forward: a sigmoid. Backward: its own, twice the true one, so that differentiating the forward again would show."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        y = torch.sigmoid(x)
        ctx.save_for_backward(y)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return ctx.scale * grad * y * (1 - y), None


class OwnBackwardMLP(layers.MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(ScaledSigmoid.apply(self.up(x), 2.0))


class ConvClassifier(nn.Module):
    """Images: a strided convolution as patch stem, or a whole stack with BatchNorm; cross entropy of the class."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        hidden = 32
        self.stem = nn.Conv2d(3, hidden, 4, stride=4)
        self.stem_norm = nn.BatchNorm2d(hidden) if batch_norm else nn.Identity()
        self.position = nn.Parameter(torch.randn(1, 16, hidden) * 0.02)
        self.first = nn.Parameter(torch.randn(1, 1, hidden) * 0.02)
        block = functools.partial(layers.Block, hidden, 4, Bidirectional, layers.MLP, nn.LayerNorm, False)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(hidden, 10)

    def forward(self, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
        x = self.stem_norm(self.stem(images)).flatten(2).transpose(1, 2) + self.position
        x = torch.cat((self.first.expand(len(x), -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x[:, 0])
        return {"loss": F.cross_entropy(logits, classes, label_smoothing=0.1), "logits": logits}


class Bidirectional(layers.Attention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class NormalisedMLP(nn.Module):
    """Linears with BatchNorm over tokens between them: statistics of the whole batch, and buffers that change."""

    def __init__(self, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(width if i == 0 else hidden, hidden) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(3))
        self.head = nn.Linear(hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.inner, self.norms, strict=True):
            x = F.relu(norm(linear(x)))
        return self.head(x)


class Mixer(nn.Module):
    """MLPs over positions and over channels by turns; a regression, its loss made outside."""

    def __init__(self, seq: int = SEQ, hidden: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(6, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(4))
        self.over_seq = nn.ModuleList(layers.MLP(seq, 1) for _ in range(2))
        self.over_hidden = nn.ModuleList(layers.MLP(hidden, 1) for _ in range(2))
        self.head = nn.Linear(hidden, 3)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x)
        for i in range(2):
            x = x + self.over_seq[i](self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + self.over_hidden[i](self.norms[2 * i + 1](x))
        return self.head(x.mean(1)), target


class CrossAttention(layers.Attention):
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        q = layers.split_heads(self.q(x), self.heads)
        k, v = (layers.split_heads(linear(memory), self.heads) for linear in (self.k, self.v))
        return self.out(layers.merge_heads(F.scaled_dot_product_attention(q, k, v)))


class EncoderDecoder(nn.Module):
    """Two towers, one shared embedding; each decoder layer reads the encoder's output, of another length."""

    def __init__(self, hidden: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, hidden)
        nn.init.normal_(self.embed.weight, std=0.2)
        self.encoder = nn.ModuleList(layers.Block(hidden, heads, Bidirectional, layers.MLP, nn.LayerNorm, False) for _ in range(2))
        self.decoder = nn.ModuleList(layers.Block(hidden, heads, layers.Attention, layers.MLP, nn.LayerNorm, False) for _ in range(2))
        self.cross = nn.ModuleList(CrossAttention(hidden, heads) for _ in range(2))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, source: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        memory = self.embed(source)
        for block in self.encoder:
            memory = block(memory)
        x = self.embed(target)
        for block, cross in zip(self.decoder, self.cross, strict=True):
            x = block(x)
            x = x + cross(x, memory)
        logits = self.norm(x) @ self.embed.weight.T
        return F.cross_entropy(logits.transpose(1, 2), labels)


class FrozenAdapter(nn.Module):
    """A frozen decoder with low-rank adapters beside its head: most parameters get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.base = layers.Decoder(VOCAB).requires_grad_(False)
        self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, VOCAB, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.base.embed(ids) + self.base.position[: ids.shape[1]]
        for block in self.base.blocks:
            x = block(x) + F.pad(self.down(x), (0, 28))
        return F.cross_entropy((self.base.head(x) + self.up(self.down(x))).flatten(0, 1), labels.flatten())


class LoRA(nn.Module):
    """A frozen linear and a trained product of rank 4 beside it, as adapter libraries wrap linears."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.b(self.a(x))


def adapted(model: nn.Module) -> nn.Module:
    """Everything frozen, every linear inside of a block wrapped."""
    model.requires_grad_(False)
    linears = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear) and path.startswith("blocks.")]
    for path, linear in linears:
        model.set_submodule(path, LoRA(linear))
    return model


@seeded
def low_rank() -> Built:
    ids = tokens()
    return adapted(layers.Decoder(VOCAB, **LLAMA)), {"ids": ids, "labels": uneven_labels(ids)}


def images(batch_norm: bool) -> Callable[[], Built]:
    def build() -> Built:
        draw = torch.Generator().manual_seed(2)
        batch = {"images": torch.randn(BATCH, 3, 16, 16, generator=draw), "classes": torch.randint(0, 10, (BATCH,), generator=draw)}
        return ConvClassifier(batch_norm), batch

    return seeded(build)


@seeded
def normalised() -> Built:
    return NormalisedMLP(), {"x": torch.randn(BATCH, 16, generator=torch.Generator().manual_seed(2))}


@seeded
def mixer() -> Built:
    draw = torch.Generator().manual_seed(2)
    return Mixer(), {"x": torch.randn(BATCH, SEQ, 6, generator=draw), "target": torch.randn(BATCH, 3, generator=draw)}


@seeded
def encoder_decoder() -> Built:
    source, target = tokens(seq=9, seed=4), tokens(seed=5)
    return EncoderDecoder(), {"source": source, "target": target, "labels": uneven_labels(target.roll(-1, 1))}


@seeded
def frozen() -> Built:
    ids = tokens()
    return FrozenAdapter(), {"ids": ids, "labels": uneven_labels(ids)}


def mean_square(output: tuple[Tensor, Tensor]) -> Tensor:
    prediction, target = output
    return F.mse_loss(prediction, target)


def log_cosh(output: Tensor) -> Tensor:
    return torch.log(torch.cosh(output - 1)).mean()


LLAMA: dict[str, Any] = {"mlp": layers.GatedMLP, "norm": layers.RMSNorm, "positions": 0}
DROPPED: dict[str, Any] = {
    "attention": functools.partial(layers.EagerAttention, dropout=0.2),
    "mlp": functools.partial(layers.MLP, dropout=0.1),
}

CASES: dict[str, Case] = {
    "plain_split": Case(decoder()),
    "plain_fused": Case(decoder(attention=layers.FusedAttention, mlp=layers.FusedGatedMLP)),
    "plain_interleaved": Case(decoder(attention=layers.InterleavedAttention)),
    "plain_grouped": Case(decoder(attention=layers.GroupedAttention)),
    "plain_tied": Case(decoder(tied=True)),
    "plain_eager": Case(decoder(attention=layers.EagerAttention)),
    "plain_parallel": Case(decoder(parallel=True)),
    "plain_ignored": Case(decoder(ignored=True)),
    "plain_odd": Case(decoder(vocab=61, hidden=30, heads=3, layers=3, ignored=True)),
    "plain_dropout": Case(decoder(dropout=0.1, **DROPPED), random=True),
    "plain_sdpa_dropout": Case(decoder(attention=layers.DroppedAttention), random=True),
    "plain_llama": Case(decoder(attention=layers.RotaryAttention, **LLAMA)),
    "plain_llama_complex": Case(decoder(attention=layers.ComplexRotaryAttention, **LLAMA)),
    "plain_alibi": Case(decoder(attention=layers.AlibiAttention, positions=0)),
    "plain_loop_moe": Case(decoder(mlp=layers.LoopMoE), dense=False),
    "plain_function": Case(decoder(mlp=OwnBackwardMLP), dense=False),
    "plain_batch_norm": Case(normalised, loss=log_cosh, whole_batch=True),
    "plain_conv_batch_norm": Case(images(batch_norm=True), dense=False, whole_batch=True),
    "plain_patches": Case(images(batch_norm=False)),
    "plain_mixer": Case(mixer, loss=mean_square),
    "plain_encoder_decoder": Case(encoder_decoder),
    "plain_frozen": Case(frozen, dense=False),
    "plain_lora": Case(low_rank, dense=False),
}
