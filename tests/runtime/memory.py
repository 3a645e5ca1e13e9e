"""How much memory torch's allocator had given out at most: `with Peak() as peak: …`, then `peak.bytes`, above what there was at the start.

Every allocation and release of CPU memory counts, those inside of ops too, as torch's profiler reports them.
"""

from __future__ import annotations

import gc
from typing import Any

import torch


class Peak:
    bytes: int = 0
    left: int = 0
    """What is still held at the end."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.profile = torch.autograd.profiler.profile(profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        events = [e for e in self.profile.kineto_results.events() if e.name() == "[memory]" and e.device_type() == torch.device("cpu").type or e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            self.left += event.nbytes()
            self.bytes = max(self.bytes, self.left)
