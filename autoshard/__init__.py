"""autoshard: a plain PyTorch transformer goes in, a partitioned training program for many devices comes out.

>>> sorted(__all__)[:4]
['AutoshardError', 'BatchError', 'CaptureError', 'CheckpointError']
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    AutoshardError,
    BatchError,
    CaptureError,
    CheckpointError,
    ClusterFileError,
    ConfigError,
    DataError,
    DeadlockError,
    DeferredError,
    GraphFileError,
    MeshError,
    NoPlanError,
    OptimizerError,
    PinError,
    PlanFileError,
    RankError,
    StalePlanError,
    StateError,
)

if TYPE_CHECKING:
    from .api import parallelize
    from .plan.cluster import Cluster
    from .plan.plan import Plan
    from .runtime.deferred import deferred

__all__ = [
    "AutoshardError",
    "BatchError",
    "CaptureError",
    "CheckpointError",
    "Cluster",
    "ClusterFileError",
    "ConfigError",
    "DataError",
    "DeadlockError",
    "DeferredError",
    "GraphFileError",
    "MeshError",
    "NoPlanError",
    "OptimizerError",
    "PinError",
    "Plan",
    "PlanFileError",
    "RankError",
    "StalePlanError",
    "StateError",
    "deferred",
    "parallelize",
]

_LATER = {"parallelize": ".api", "Cluster": ".plan.cluster", "Plan": ".plan.plan", "deferred": ".runtime.deferred"}
"""Names that are imported when first asked for: `import autoshard` alone imports no torch."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'autoshard' has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
