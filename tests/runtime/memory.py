"""How much memory torch gave out at most: `with Peak() as peak: …`, then `peak.bytes`, above what was held at the start.

Every allocation and release of CPU memory counts, those inside of ops too, as torch's own profiler is told of them.
"""

from __future__ import annotations

import gc
from typing import Any

import torch


class Peak:
    def __enter__(self) -> Peak:
        gc.collect()
        self.bytes = self.left = 0
        self.profile = torch.autograd.profiler.profile(profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        events = [e for e in self.profile.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            self.left += event.nbytes()
            self.bytes = max(self.bytes, self.left)
