"""One class per user mistake. Each message says what was found, what was expected, and what to do."""

from __future__ import annotations

from typing import Any


class AutoshardError(Exception):
    """Base of every error that autoshard raises on purpose. `where` is the user's own source line or file, if known.

    `exit_code` is what a command ends with: 3 for a mistake in what the user gave, 4 where no plan fits, 5 for a checkpoint that is
    refused, 6 for a rank that hangs or died. (0 is success, 1 a bug of ours, with a traceback; 2 a wrong command line.)
    """

    exit_code = 3
    elsewhere = False
    """Whether it happened on another rank, which tells the user: this rank has no need to."""

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        self.where, self.hint = where, hint
        parts = [message]
        if where:
            parts.append(f"  at {where}")
        if hint:
            parts.append(f"  hint: {hint}")
        super().__init__("\n".join(parts))


class CaptureError(AutoshardError, ValueError):
    """The model can't be captured as one graph."""


class GraphFileError(AutoshardError, ValueError):
    """A file is not a saved graph."""


class PlanFileError(AutoshardError, ValueError):
    """A file or text is not a plan."""


class ClusterFileError(AutoshardError, ValueError):
    """A file is not a cluster description."""


class MeshError(AutoshardError, ValueError):
    """A mesh is malformed, or doesn't match the ranks that are there."""


class NoPlanError(AutoshardError, ValueError):
    """No legal plan exists under the constraints given. `candidates`: what was looked at, as rows like those of `Plan.runners_up`."""

    exit_code = 4

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message, where=where, hint=hint)
        self.candidates: list[dict[str, Any]] = []


class PinError(AutoshardError, ValueError):
    """A pin holds what isn't there, or in a way that can't be: every fault at once, with what could have been meant."""


class StalePlanError(AutoshardError, ValueError):
    """A plan was made for another graph."""


class BatchError(AutoshardError, ValueError):
    """Inputs don't match what was captured, or the batch doesn't divide."""


class StateError(AutoshardError, ValueError):
    """Weights or a state dict don't match the model."""


class DeferredError(AutoshardError, ValueError):
    """A constructor can't be recorded for later, or its recording doesn't cover a tensor."""


class OptimizerError(AutoshardError, ValueError):
    """An optimizer can't work on shards."""


class DeadlockError(AutoshardError, RuntimeError):
    """An instruction list in which some rank would wait for ever."""


class ConfigError(AutoshardError, ValueError):
    """A config file or an override says what can't be: every fault at once, each with file, line and column."""


class DataError(AutoshardError, ValueError):
    """Training data is missing, malformed, or doesn't match the model."""


class CheckpointError(AutoshardError, ValueError):
    """A checkpoint is damaged, hostile, of another model, or can't be written."""

    exit_code = 5


class RankError(AutoshardError, RuntimeError):
    """A rank died, or stopped answering: which one, in what action, at what source line."""

    exit_code = 6
    quiet = False
    """Whether another rank says it, so that this one needn't."""
