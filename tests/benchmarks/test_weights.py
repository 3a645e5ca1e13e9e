"""Weights laid out as Megatron-Core has them compute what the model computes: by a small model with its names, cut for two ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import build, rotate
from benchmarks.peers import weights
from benchmarks.works import Shape, find

CPU = torch.device("cpu")


def names(c: Shape, experts_apart: bool) -> dict[str, tuple[int, ...]]:
    """A GPTModel's parameters and whole shapes: Transformer Engine's, or (with `experts_apart`) its own experts'."""
    qkv, into = (c.heads + 2 * c.kv) * c.head_dim, 2 * c.ffn
    found: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (c.vocab, c.hidden), "output_layer.weight": (c.vocab, c.hidden),
        "decoder.final_layernorm.weight": (c.hidden,),
    }  # fmt: skip
    for i in range(c.layers):
        at = f"decoder.layers.{i}"
        found |= {
            f"{at}.self_attention.linear_qkv.layer_norm_weight": (c.hidden,),
            f"{at}.self_attention.linear_qkv.weight": (qkv, c.hidden),
        }
        found[f"{at}.self_attention.linear_proj.weight"] = (c.hidden, c.hidden)
        if not c.experts:
            found |= {f"{at}.mlp.linear_fc1.layer_norm_weight": (c.hidden,), f"{at}.mlp.linear_fc1.weight": (into, c.hidden)}
            found[f"{at}.mlp.linear_fc2.weight"] = (c.hidden, c.ffn)
            continue
        found |= {f"{at}.pre_mlp_layernorm.weight": (c.hidden,), f"{at}.mlp.router.weight": (c.experts, c.hidden)}
        for j in range(c.experts):
            each = f"{at}.mlp.experts.local_experts.{j}.{{}}.weight" if experts_apart else f"{at}.mlp.experts.{{}}.weight{j}"
            found |= {each.format("linear_fc1"): (into, c.hidden), each.format("linear_fc2"): (c.hidden, c.ffn)}
    return found


def model(c: Shape, size: int, experts_apart: bool) -> nn.Module:
    root = nn.Module()
    for name, shape in names(c, experts_apart).items():
        *path, last = name.split(".")
        at = root
        for step in path:
            if step not in dict(at.named_children()):
                at.add_module(step, nn.Module())
            at = at.get_submodule(step)
        cut = {"linear_proj": 1, "linear_fc2": 1, "linear_qkv": 0, "linear_fc1": 0, "word_embeddings": 0, "output_layer": 0}.get(path[-1])
        local = [n // size if d == cut and len(shape) == 2 else n for d, n in enumerate(shape)]
        at.register_parameter(last, nn.Parameter(torch.empty(local, dtype=torch.float64)))
    return root


def loss(ranks: list[dict[str, Tensor]], c: Shape, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As tensor parallelism computes it: parts of the vocabulary put together, of rows added up."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def attention(x: Tensor, p: dict[str, Tensor], at: str) -> Tensor:
        rows = F.linear(x, p[f"{at}linear_qkv.weight"]).unflatten(-1, (-1, c.heads // c.kv + 2, c.head_dim))
        q, k, v = (t.flatten(2, 3).transpose(1, 2) for t in rows.split([c.heads // c.kv, 1, 1], 3))
        out = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True)
        return F.linear(out.transpose(1, 2).flatten(2), p[f"{at}linear_proj.weight"])

    def mlp(x: Tensor, into: Tensor, out: Tensor) -> Tensor:
        gate, up = F.linear(x, into).chunk(2, -1)
        return F.linear(F.silu(gate) * up, out)

    def experts(x: Tensor, p: dict[str, Tensor], at: str) -> Tensor:
        best, chosen = F.linear(x, p[f"{at}mlp.router.weight"]).topk(c.topk)
        part = torch.zeros(*x.shape[:-1], c.experts, dtype=x.dtype).scatter(-1, chosen, best.softmax(-1))
        pairs = [[w for name, w in p.items() if name.startswith(f"{at}mlp.experts") and fc in name] for fc in ("fc1", "fc2")]
        return sum((part[..., j, None] * mlp(x, *w) for j, w in enumerate(zip(*pairs, strict=True))), torch.zeros_like(x))

    x = torch.cat([p["embedding.word_embeddings.weight"] for p in ranks])[ids]
    for i in range(c.layers):
        at = f"decoder.layers.{i}."
        y = norm(x, ranks[0][f"{at}self_attention.linear_qkv.layer_norm_weight"])
        x = x + sum(attention(y, p, f"{at}self_attention.") for p in ranks)
        y = norm(x, ranks[0][f"{at}pre_mlp_layernorm.weight" if c.experts else f"{at}mlp.linear_fc1.layer_norm_weight"])
        each = (experts(y, p, at) if c.experts else mlp(y, p[f"{at}mlp.linear_fc1.weight"], p[f"{at}mlp.linear_fc2.weight"]) for p in ranks)
        x = x + sum(each)
    logits = norm(x, ranks[0]["decoder.final_layernorm.weight"]) @ torch.cat([p["output_layer.weight"] for p in ranks]).t()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("kind", ["plain", "hf"])
@pytest.mark.parametrize(("work", "size", "experts_apart"), [("llama-8b-layers", 1, False), ("llama-8b-layers", 2, False),
                                                             ("moe-8x2", 2, False), ("moe-8x2", 1, True)])  # fmt: skip
def test_the_same_weights_give_the_same_loss(work, kind, size, experts_apart):
    c = find(work, tiny=True).shape
    ids = torch.randint(0, c.vocab, (c.batch, c.seq))
    reference = build(kind, c, torch.float64, CPU)
    if c.experts and kind == "hf":
        reference.config._experts_implementation = "eager"  # the grouped matmul has no double precision
    for p in reference.parameters():  # apart enough that a wrong order shows
        nn.init.normal_(p.data, std=0.3)
    taken = weights.take(reference.state_dict(), kind, c)
    ranks = [model(c, size, experts_apart) for _ in range(size)]
    for rank, each in enumerate(ranks):
        weights.load(each, taken, True, rank, size)
    table = build("plain", c, torch.float64, CPU)
    found = loss([dict(each.named_parameters()) for each in ranks], c, ids, table.cos, table.sin)
    out = reference(input_ids=ids, labels=ids)
    expected = out if isinstance(out, Tensor) else out.loss - (reference.config.router_aux_loss_coef * out.aux_loss if c.experts else 0)
    # the rotary table and, in the experts, the softmax are of single precision
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_fused_projection_is_regrouped_by_head():
    c = find("gpt2-350m", tiny=True).shape
    state = build("hf", c, torch.float32, CPU).state_dict()
    taken = weights.take(state, "hf", c)
    fused = state["transformer.h.1.attn.c_attn.weight"].t().unflatten(0, (3, c.heads, c.head_dim))
    assert taken["1.qkv.weight"].unflatten(0, (c.heads, 3, c.head_dim))[2, 1].equal(fused[1, 2])
    assert taken["1.qkv.bias"].shape == (3 * c.hidden,) and taken["1.fc2.weight"].shape == (c.hidden, c.ffn)


def test_what_has_no_place_is_named():
    c = find("llama-8b-layers", tiny=True).shape
    taken = weights.take(build("plain", c, torch.float64, CPU).state_dict(), "plain", c)
    with pytest.raises(KeyError, match="no place for extra"):
        weights.load(model(c, 1, False), {**taken, "extra": torch.zeros(1)}, True)
    taken.pop("head")
    with pytest.raises(KeyError, match="output_layer"):
        weights.load(model(c, 1, False), taken, True)
