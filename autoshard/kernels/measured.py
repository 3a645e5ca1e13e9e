"""What was measured of each kernel: `benchmarks.kernels` prints these lines; those of whole steps come from `benchmarks.step` with the pin
`kernels`. A kernel is used by default if it never lost (`registry.Kernel.chosen`): one that a compiler's own fusion equals is no gain, and
inside a step it breaks the fusion with what stands around it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """One gain: time of `against` over ours, on a shape, somewhere."""

    gain: float
    against: str
    shape: str
    device: str
    versions: str


H100 = "NVIDIA H100 80GB HBM3"
T211 = "torch 2.11.0, triton 3.6.0"
STEP = "a step of llama-8b-layers, norms, rotary and gated products placed together"


def _on_h100(gain: float, against: str, shape: str) -> Measurement:
    return Measurement(gain, against, shape, H100, T211)


MEASURED: dict[str, tuple[Measurement, ...]] = {
    "rms_norm": (
        _on_h100(1.07, "compile", "8192×4096, 4096"),
        _on_h100(0.75, "compile", "262144×128, 128"),
        _on_h100(0.99, "compile", STEP),
    ),
    "add_rms_norm": (_on_h100(1.01, "compile", "8192×4096, 8192×4096, 4096"), _on_h100(0.99, "compile", STEP)),
    "layer_norm": (_on_h100(1.15, "compile", "8192×4096, 4096, 4096"), _on_h100(0.99, "compile", STEP)),
    "add_layer_norm": (_on_h100(1.05, "compile", "8192×4096, 8192×4096, 4096, 4096"),),
    "rotary": (_on_h100(1.02, "compile", "2×32×4096×128, 2×8×4096×128, 1×4096×128, 1×4096×128"), _on_h100(0.99, "compile", STEP)),
    "rotary_one": (_on_h100(1.02, "compile", "2×32×4096×128, 1×4096×128, 1×4096×128"),),
    "rotary_packed": (_on_h100(1.04, "compile", "2×4096×6144, 1×4096×128, 1×4096×128"),),
    "gated_mlp": (_on_h100(0.96, "compile", "8192×14336, 8192×14336"),),
    "gated_mlp_packed": (_on_h100(1.07, "compile", "8192×28672"), _on_h100(0.96, "compile", "8192×28672, the other activation")),
    "linear_cross_entropy": (
        _on_h100(1.51, "liger", "8192×4096, 128256×4096, 8192"),
        _on_h100(0.96, "compile", "8192×4096, 128256×4096, 8192"),
    ),
    "head_partials": (_on_h100(0.73, "compile", "8192×4096, 128256×4096, 8192"),),
    "adamw": (_on_h100(1.69, "torch", "268435456 with float32 masters and moments"),),
    "moe_route": (_on_h100(2.05, "compile", "8192×8"),),
    "moe_permute": (_on_h100(2.08, "compile", "8192×4096, 8192×2"),),
    "moe_unpermute": (_on_h100(1.34, "compile", "16384×4096, 8192×2, 8192×2"),),
    "quantise": (_on_h100(7.63, "eager", "8192×4096"),),
    "fp8_linear": (_on_h100(1.40, "bf16", "8192×4096, 14336×4096"),),
}
