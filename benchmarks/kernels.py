"""Each fused kernel, forward and backward, beside its reference in eager mode and under torch.compile, torch's own where there is one,
and peers.

    python -m benchmarks.kernels                                   # all of them, at the shapes of an 8B Llama's layers
    python -m benchmarks.kernels --only rms_norm,rotary --tokens 16384
    python -m benchmarks.kernels --only norms --tune norm.TILE=2048,4096,8192 --tune norm.WAVES=1,2,4       # constants of the modules

Before anything is timed, outputs and gradients are compared with the reference's. On CUDA a step is captured as a graph and replayed, so
that the device is timed and not the host (what can't be captured runs as it is, and the record says so). The copy bandwidth and the
matmul rate are measured in the same run: `of ceiling` is the time that the kernel's bytes and FLOPs (the registry's `cost`) would take
at those rates, over its time. Peers (Transformer Engine, Liger-Kernel) run where they can be imported. One JSON record, as of every
benchmark; and for each gain a line for the registry.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoshard.kernels.registry import KERNELS, Kernel

from . import harness
from .peers.engine import transformer_engine

Op = torch.ops.autoshard
Run = Callable[..., Any]


@dataclass
class Case:
    """One kernel on one shape. `wanted`: the positions in `inputs` that are differentiated; `outs`: how many outputs count; `against`: what
    its gain is said of."""

    kernel: Kernel
    inputs: list[Any]
    wanted: list[int]
    ours: Run
    eager: Run
    peers: dict[str, Run] = field(default_factory=dict)
    outs: int = 1
    against: str = "compile"
    tolerance: float = 0.0
    moved: float = 0.0
    """Bytes, where the dtypes aren't those that the registry's cost takes for granted."""

    @property
    def allowed(self) -> float:
        """Distance from the reference: in bf16 a few roundings to 8 bits, of the largest element; in float32 sums of thousands."""
        return self.tolerance or (3e-2 if self.inputs[0].dtype == torch.bfloat16 else 1e-4)

    @property
    def shape(self) -> str:
        return ", ".join("×".join(map(str, x.shape)) for x in self.inputs if isinstance(x, Tensor) and x.dim())

    def cost(self) -> tuple[float, float]:
        tensors = [x for x in self.inputs if isinstance(x, Tensor)]
        flops, moved = self.kernel.cost(*(tuple(x.shape) for x in tensors), itemsize=tensors[0].element_size())
        return flops, self.moved or moved


class Maker:
    """Makes inputs of one dtype on one device, from one seed."""

    def __init__(self, a: argparse.Namespace, device: torch.device) -> None:
        self.a, self.device, self.dtype = a, device, getattr(torch, a.dtype)
        self.generator = torch.Generator(device).manual_seed(1)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(shape, device=self.device, generator=self.generator) * scale).to(dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, device=self.device, generator=self.generator)


# ---- what is run


def norms(make: Maker) -> Iterator[Case]:
    a = make.a
    x, r, w, b = make(a.tokens, a.hidden), make(a.tokens, a.hidden), make(a.hidden), make(a.hidden)
    rms, layer = (w, 1e-6, 0.0, True), (w, b, 1e-6)
    peers = {
        "torch": lambda x, w, *_: F.rms_norm(x, w.shape, w, 1e-6),
        **liger("rms_norm", "LigerRMSNormFunction", lambda x, w, *_: (x, w, 1e-6)),
    }
    yield Case(KERNELS["rms_norm"], [x, *rms], [0, 1], Op.rms_norm, KERNELS["rms_norm"].reference, {**peers, **engine("RMSNorm", a.hidden)})
    heads = make(a.tokens * a.heads, a.head_dim)
    yield Case(KERNELS["rms_norm"], [heads, make(a.head_dim), 1e-6, 0.0, True], [0, 1], Op.rms_norm, KERNELS["rms_norm"].reference)
    yield Case(KERNELS["add_rms_norm"], [x, r, *rms], [0, 1, 2], Op.add_rms_norm, KERNELS["add_rms_norm"].reference, outs=2)
    peers = {
        "torch": lambda x, w, b, *_: F.layer_norm(x, w.shape, w, b, 1e-6),
        **liger("layer_norm", "LigerLayerNormFunction", lambda x, w, b, *_: (x, w, b, 1e-6)),
        **engine("LayerNorm", a.hidden),
    }
    yield Case(KERNELS["layer_norm"], [x, *layer], [0, 1, 2], Op.layer_norm, KERNELS["layer_norm"].reference, peers)
    yield Case(KERNELS["add_layer_norm"], [x, r, *layer], [0, 1, 2, 3], Op.add_layer_norm, KERNELS["add_layer_norm"].reference, outs=2)


def rotary(make: Maker) -> Iterator[Case]:
    a = make.a
    b, s, e = a.tokens // a.seq, a.seq, a.head_dim
    q, k = make(b, s, a.heads, e).transpose(1, 2), make(b, s, a.kv, e).transpose(1, 2)
    angles = make(1, s, e // 2, dtype=torch.float32).repeat(1, 1, 2)
    tables = angles.cos().to(make.dtype), angles.sin().to(make.dtype)
    peers = liger("rope", "LigerRopeFunction", lambda *inputs: inputs)
    yield Case(KERNELS["rotary"], [q, k, *tables], [0, 1], Op.rotary, KERNELS["rotary"].reference, peers, outs=2)
    yield Case(KERNELS["rotary_one"], [q, *tables], [0], Op.rotary_one, KERNELS["rotary_one"].reference)
    packed = make(b, s, (a.heads + 2 * a.kv) * e)
    entry = KERNELS["rotary_packed"]
    yield Case(entry, [packed, *tables, a.heads, a.kv], [0], Op.rotary_packed, entry.reference, outs=3)


def gated(make: Maker) -> Iterator[Case]:
    a = make.a
    g, u = make(a.tokens, a.ffn), make(a.tokens, a.ffn)
    peers = liger("swiglu", "LigerSiLUMulFunction", lambda g, u, *_: (g, u))
    yield Case(KERNELS["gated_mlp"], [g, u, "silu"], [0, 1], Op.gated_mlp, KERNELS["gated_mlp"].reference, peers)
    entry = KERNELS["gated_mlp_packed"]
    for activation in ("silu", "gelu_tanh"):
        yield Case(entry, [make(a.tokens, 2 * a.ffn), activation], [0], Op.gated_mlp_packed, entry.reference)


def cross_entropy(make: Maker) -> Iterator[Case]:
    from autoshard.kernels import cross_entropy as ce

    a = make.a
    x, w, labels = make(a.tokens, a.hidden), make(a.vocab, a.hidden, scale=a.hidden**-0.5), make.integers(a.vocab, a.tokens)
    count = torch.tensor(float(a.tokens), device=make.device)
    start = labels.new_zeros(())
    peers = liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction", lambda x, w, labels, *_: (x, w, labels))
    entry = KERNELS["linear_cross_entropy"]
    yield Case(entry, [x, w, labels, count], [0, 1], Op.linear_cross_entropy, entry.reference, peers)

    def again(x: Tensor, w: Tensor, labels: Tensor, start: Tensor) -> Tensor:
        return ce.row_losses(*Op.head_partials(x, w, labels, start), labels, a.vocab).sum() / count

    def plain(x: Tensor, w: Tensor, labels: Tensor, start: Tensor) -> Tensor:
        return F.cross_entropy((x @ w.t()).float(), labels)

    yield Case(KERNELS["head_partials"], [x, w, labels, start], [0, 1], again, plain)


def adamw(make: Maker) -> Iterator[Case]:
    """With float32 moments and a master; and all in one dtype, as a step without masters. (Of many tensors: `benchmarks.optimizer`.)"""
    n, entry = make.a.params, KERNELS["adamw"]
    one, how = torch.tensor(1e-3, device=make.device), (0.9, 0.95, 1e-8, 0.1)
    for master in (True, False):
        p, g = make(n), make(n)
        kind = torch.float32 if master else p.dtype
        m, v = torch.zeros(n, dtype=kind, device=make.device), torch.zeros(n, dtype=kind, device=make.device)
        step, whole = torch.ones((), device=make.device), p.float() if master else None
        parameter = torch.nn.Parameter(p.to(kind, copy=True))
        optimizer = torch.optim.AdamW([parameter], lr=one.clone(), betas=how[:2], eps=how[2], weight_decay=how[3], fused=True)

        def theirs(p: Tensor, g: Tensor, *_: Any, parameter: Any = parameter, optimizer: Any = optimizer) -> None:
            parameter.grad = g.to(parameter.dtype)
            optimizer.step()
            p.copy_(parameter.detach())  # its rounding

        inputs = [p, g, m, v, whole, one, step, None, None, None, *how]
        moved = 0.0 if master else 7.0 * n * p.element_size()
        yield Case(entry, inputs, [], Op.adamw, entry.reference, {"torch": theirs}, outs=0, against="torch", moved=moved)
        del parameter, optimizer, theirs


def accumulate(make: Maker) -> Iterator[Case]:
    a, entry = make.a, KERNELS["matmul_into"]
    into = torch.zeros(a.ffn, a.hidden, device=make.device)
    dy, x = make(a.tokens, a.ffn, scale=a.tokens**-0.5), make(a.tokens, a.hidden)
    plain = {"added": lambda into, a, b: into.add_(a @ b)}  # the product in memory, rounded
    yield Case(entry, [into, dy.t(), x], [], Op.matmul_into, entry.reference, plain, outs=0, against="added", tolerance=1e-2)


def dropout(make: Maker) -> Iterator[Case]:
    a, p = make.a, 0.1
    b, s, e = a.tokens // a.seq, a.seq, a.head_dim
    seed, rows = torch.tensor(5, device=make.device), torch.arange(a.tokens, device=make.device)
    for name, detail, size in (("keep_bits", p, 1 / 8), ("random_bits", 0, 4.0)):
        entry = KERNELS[name]
        moved = a.tokens * (8 + a.hidden * size)
        yield Case(entry, [seed, rows, a.hidden, detail], [], getattr(Op, name), entry.reference, moved=moved)
    heads, kv = min(a.heads, 8), min(a.kv, 8)  # the reference holds all probabilities, several times
    q, k, v = (make(b, s, n, e).transpose(1, 2) for n in (heads, kv, kv))
    places = [torch.arange(n, device=make.device) for n in (b, heads, s)]
    entry = KERNELS["dropout_attention"]

    def theirs(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:  # drops others
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True, enable_gqa=kv != heads)

    inputs = [q, k, v, None, seed, *places, [b, heads, s, s], p, True, e**-0.5]
    yield Case(entry, inputs, [0, 1, 2], Op.dropout_attention, entry.reference, {"torch": theirs}, against="torch")


def experts(make: Maker) -> Iterator[Case]:
    a = make.a
    x = make(a.tokens, a.hidden)
    logits = make(a.tokens, a.experts).argsort(-1).to(make.dtype) / 2  # no two alike: which of them is chosen would be chance
    route = KERNELS["moe_route"]
    yield Case(route, [logits, None, a.top_k, "softmax", True], [0], Op.moe_route, route.reference)
    weights, chosen = Op.moe_route(logits, None, a.top_k, "softmax", True)
    moved, position, ends = Op.moe_permute(x, chosen, a.experts)
    permute, unpermute, grouped = KERNELS["moe_permute"], KERNELS["moe_unpermute"], KERNELS["grouped_matmul"]
    yield Case(permute, [x, chosen, a.experts], [0], Op.moe_permute, permute.reference)
    yield Case(unpermute, [moved, position, weights.to(x.dtype)], [0, 2], Op.moe_unpermute, unpermute.reference)
    w = make(a.experts, a.hidden, 2 * a.expert_ffn, scale=a.hidden**-0.5)
    yield Case(grouped, [moved, w, ends], [0, 1], Op.grouped_matmul, grouped.reference)


def fp8(make: Maker) -> Iterator[Case]:
    a = make.a
    entry = KERNELS["quantise"]
    yield Case(entry, [make(a.tokens, a.hidden), None, "e4m3", True], [], Op.quantise, entry.reference)
    entry = KERNELS["fp8_cast"]
    for rows, cols in ((a.tokens, a.hidden), (a.tokens, 2 * a.ffn)):
        yield Case(entry, [make(rows, cols), torch.ones((), device=make.device), "e4m3", True], [], Op.fp8_cast, entry.reference)
    entry = KERNELS["fp8_linear"]
    x, w = make(a.tokens, a.hidden), make(a.ffn, a.hidden, scale=a.hidden**-0.5)
    yield Case(entry, [x, w], [0, 1], Op.fp8_linear, entry.reference, {"bf16": F.linear}, against="bf16", tolerance=3e-2)


CASES: dict[str, Callable[[Maker], Iterator[Case]]] = {
    "norms": norms,
    "rotary": rotary,
    "gated": gated,
    "cross_entropy": cross_entropy,
    "adamw": adamw,
    "accumulate": accumulate,
    "dropout": dropout,
    "experts": experts,
    "fp8": fp8,
}


def liger(module: str, name: str, arguments: Run) -> dict[str, Run]:
    transformer_engine()  # Liger's packages import it where it is, and fail where it doesn't load
    try:
        function = getattr(__import__(f"liger_kernel.ops.{module}", fromlist=[name]), name)
    except (ImportError, AttributeError, OSError):
        return {}
    return {"liger": lambda *inputs: function.apply(*arguments(*inputs))}


def engine(name: str, hidden: int) -> dict[str, Run]:
    te = transformer_engine()
    if te is None:
        return {}
    layer = getattr(te, name)(hidden, eps=1e-6, params_dtype=torch.bfloat16)
    return {"transformer_engine": lambda x, *_: layer(x)}


# ---- how it is run


def tensors(outs: Any, count: int) -> list[Tensor]:
    found = [outs] if isinstance(outs, Tensor) else list(outs or ())
    return found[:count]


class Step:
    """Forward and backward of one implementation, on leaves of its own; its results stay, so that a graph can be replayed."""

    def __init__(self, case: Case, run: Run) -> None:
        self.case, self.run = case, run
        mutated = not case.outs
        self.inputs = [self._own(x, i in case.wanted, mutated) for i, x in enumerate(case.inputs)]
        self.seeds: list[Tensor] | None = None

    @staticmethod
    def _own(x: Any, grad: bool, mutated: bool) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().requires_grad_() if grad else x.clone() if mutated else x

    def __call__(self) -> list[Tensor]:
        case = self.case
        outs = tensors(self.run(*self.inputs), case.outs)
        if not case.wanted:
            return outs or [x for x in self.inputs if isinstance(x, Tensor)][:1]
        outs = [o for o in outs if o.requires_grad]
        if self.seeds is None:
            generator = torch.Generator(outs[0].device).manual_seed(2)
            self.seeds = [torch.randn(o.shape, device=o.device, generator=generator).to(o.dtype) for o in outs]
        return [*outs, *torch.autograd.grad(outs, [self.inputs[i] for i in case.wanted], self.seeds)]


def graphed(step: Run, device: torch.device, repeat: int) -> tuple[Run, bool]:
    """`repeat` steps as one call, replayed from a CUDA graph if that can be captured."""

    def many() -> None:
        for _ in range(repeat):
            step()

    if device.type != "cuda":
        return many, False
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            many()
        return graph.replay, True
    except RuntimeError:
        torch.cuda.synchronize()
        return many, False


def ceilings(device: torch.device, dtype: torch.dtype, rounds: int, small: bool) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), and FLOPs a second of a matmul."""
    x = torch.zeros((1 << 16) if small else (1 << 28), dtype=torch.int8, device=device)
    y, n = torch.empty_like(x), 64 if small else 8192
    a, b = torch.zeros((n, n), dtype=dtype, device=device), torch.zeros((n, n), dtype=dtype, device=device)
    a.normal_(), b.normal_()  # zeros multiply quicker: they take less power
    steps = {"copy": graphed(lambda: y.copy_(x), device, 4)[0], "matmul": graphed(lambda: a @ b, device, 4)[0]}
    took = harness.in_turns(steps, rounds, device)
    return 8 * x.numel() / harness.median(took["copy"]), 8 * n**3 / harness.median(took["matmul"])


def compare(case: Case, steps: dict[str, Step]) -> float:
    """The largest distance of ours from the reference, relative to the largest element of each result."""
    worst = 0.0
    for mine, theirs in zip(steps["ours"](), steps["eager"](), strict=True):
        mine, theirs = mine.detach().double(), theirs.detach().double()
        worst = max(worst, float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)))
    assert worst <= case.allowed, f"{case.kernel.name} on {case.shape}: {worst:.1e} from its reference; expected at most {case.allowed}"
    return worst


def peak(step: Run, device: torch.device) -> int:
    """Bytes that a step needs beyond its inputs; 0 on the CPU, where nobody counts."""
    if device.type != "cuda":
        return 0
    memory = harness.Memory(device)
    step()
    return memory.peak()


def measure(case: Case, a: argparse.Namespace, device: torch.device, rates: tuple[float, float]) -> dict[str, Any]:
    runs: dict[str, Run] = {"ours": case.ours, "eager": case.eager}
    if a.compile:
        runs["compile"] = torch.compile(case.eager, dynamic=False)
    steps = {name: Step(case, run) for name, run in {**runs, **case.peers}.items()}
    found: dict[str, Any] = {"kernel": case.kernel.name, "shape": case.shape, "error": compare(case, steps), "runs": {}, "failed": {}}
    calls: dict[str, Run] = {}
    captured: dict[str, bool] = {}
    peaks: dict[str, int] = {}
    for name, step in steps.items():
        try:
            step()
            peaks[name] = peak(step, device)
            calls[name], captured[name] = graphed(step, device, a.repeat)
        except Exception as error:  # a peer of another version: said, and no reason to stop
            if name in ("ours", "eager"):
                raise
            found["failed"][name] = f"{type(error).__name__}: {error}"[:300]
    took = harness.in_turns(calls, a.rounds, device)
    flops, moved = case.cost()
    bound = max(moved / rates[0], flops / rates[1])
    for name, seconds in took.items():
        median = harness.median(seconds) / a.repeat
        found["runs"][name] = {"ms": median * 1e3, "of_ceiling": bound / median, "peak_mib": peaks[name] / 2**20, "graph": captured[name]}
    mine = found["runs"]["ours"]["ms"]
    found["gains"] = {name: r["ms"] / mine for name, r in found["runs"].items() if name != "ours"}
    return found


Constants = Sequence[tuple[str, str, list[Any]]]
"""What `--tune` names: module, constant, values."""


def settings(tune: Constants) -> Iterator[str]:
    """Sets each combination in turn, and puts back what was there."""
    places = [(importlib.import_module(f"autoshard.kernels.{module}"), name) for module, name, _ in tune]
    before = [getattr(module, name) for module, name in places]
    try:
        for values in itertools.product(*(choices for _, _, choices in tune)):
            for (module, name), value in zip(places, values, strict=True):
                setattr(module, name, value)
            yield ", ".join(f"{module}.{name}={value}" for (module, name, _), value in zip(tune, values, strict=True))
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def tuned(case: Case, a: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Milliseconds of ours under each combination of the constants that `--tune` names."""
    found: dict[str, float] = {}
    for label in settings(a.tune):
        try:
            step = Step(case, case.ours)
            step()
            call, _ = graphed(step, device, a.repeat)
            found[label] = harness.median(harness.in_turns({"ours": call}, a.rounds, device)["ours"]) / a.repeat * 1e3
        except Exception as error:  # more than a device has: an answer too
            print(f"{'':34}{label}: {type(error).__name__}: {str(error)[:100]}")
    for label, ms in sorted(found.items(), key=lambda item: item[1]):
        print(f"{'':56}{ms:10.3f}  {label}")
    return found


def constant(text: str) -> tuple[str, str, list[Any]]:
    """norm.TILE=2048,4096: a module of the kernels, its constant, values of the constant's kind."""
    place, _, values = text.partition("=")
    module, _, name = place.rpartition(".")
    try:
        kind = type(getattr(importlib.import_module(f"autoshard.kernels.{module}"), name))
        return module, name, [value == "True" if kind is bool else kind(value) for value in values.split(",")]
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a constant of a module and values, as norm.TILE=2048,4096 ({error})"
        ) from error


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    a = arguments(argv)
    device = torch.device(a.device)
    dtype = getattr(torch, a.dtype)
    machine = harness.machine(device)
    print(f"{dtype} on {machine}", flush=True)
    rates = ceilings(device, dtype, a.rounds, device.type == "cpu")
    print(f"copy {rates[0] / 1e9:.0f} GB/s, matmul {rates[1] / 1e12:.1f} TFLOP/s", flush=True)
    print(f"{'':22}{'':34}{'ms':>10}{'gain':>7}{'of ceiling':>11}{'peak MiB':>10}")
    results = []
    for group, cases in CASES.items():
        for case in cases(Maker(a, device)):
            if a.only and not {group, case.kernel.name} & set(a.only.split(",")):
                continue
            found = measure(case, a, device, rates)
            results.append(found)
            report(found, machine, case.against)
            if a.tune:
                found["tuned"] = tuned(case, a, device)
            if device.type == "cuda":
                harness.collect()
    content = {"dtype": a.dtype, "arguments": vars(a), "copy_bytes_per_s": rates[0], "matmul_flops_per_s": rates[1], "kernels": results}
    if a.results:
        print(f"written to {harness.record('kernels', content, device, Path(a.results))}")
    return content


def report(found: dict[str, Any], machine: dict[str, Any], against: str) -> None:
    for name, r in found["runs"].items():
        title = f"{found['kernel']:22}{found['shape'][:33]:34}" if name == "ours" else f"{'':34}{name:22}"
        gain = f"{found['gains'][name]:7.2f}" if name in found["gains"] else " " * 7
        print(f"{title}{r['ms']:10.3f}{gain}{r['of_ceiling']:11.2f}{r['peak_mib']:10.0f}{'' if r['graph'] else '  no graph'}", flush=True)
    for name, why in found["failed"].items():
        print(f"{'':34}{name:22} failed: {why}")
    if against in found["gains"]:
        versions = f"torch {machine['torch']}, triton {machine.get('triton', '-')}"
        print(f'    Measurement({found["gains"][against]:.2f}, "{against}", "{found["shape"]}", "{machine["device"]}", "{versions}")')


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = {"tokens": 8192, "seq": 4096, "hidden": 4096, "ffn": 14336, "heads": 32, "kv": 8, "head_dim": 128, "vocab": 128256}
    for name, size in {**shapes, "experts": 8, "top_k": 2, "expert_ffn": 4096, "params": 1 << 28}.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    p.add_argument("--only", default="", help=f"kernels by name, or groups: {', '.join(CASES)}")
    p.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rounds", type=int, default=20, help="timed rounds, each of `repeat` steps of every implementation")
    p.add_argument("--repeat", type=int, default=5)
    p.add_argument("--tune", type=constant, action="append", default=[], metavar="MODULE.NAME=VALUES", help="try all combinations")
    p.add_argument("--no-compile", dest="compile", action="store_false")
    p.add_argument("--results", default=str(harness.RESULTS), help="folder of the record; empty: none")
    a = p.parse_args(argv)
    known = {*CASES, *(k.name for k in KERNELS)}
    if a.only and not set(a.only.split(",")) <= known:
        p.error(f"--only {a.only}: expected some of {', '.join(sorted(known))}")
    if a.tokens % a.seq:
        p.error(f"--tokens {a.tokens} isn't a multiple of --seq {a.seq}")
    return a


if __name__ == "__main__":
    main()
