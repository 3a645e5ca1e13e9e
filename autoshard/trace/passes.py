"""The passes of capture, in the order in which they run. Each is Captured -> Captured; `autoshard.passes.run_passes` runs them."""

from __future__ import annotations

from ..passes import Pass
from .captured import Captured
from .normalise.attention import attention
from .normalise.dropout import dropout
from .normalise.experts import experts
from .normalise.flatten import flatten
from .normalise.fold import fold
from .normalise.indexing import indexing
from .normalise.losses import losses
from .normalise.masks import masks
from .normalise.matmuls import matmuls
from .normalise.norms import norms
from .normalise.pointwise import pointwise
from .normalise.reductions import reductions
from .normalise.shapes import shapes
from .normalise.sorted import grouped

PASSES: list[Pass[Captured]] = [
    # one spelling for every op, a family at a time
    dropout,
    shapes,
    pointwise,
    reductions,
    matmuls,
    norms,
    losses,
    attention,
    # what the ops say together
    flatten,
    fold,
    indexing,
    experts,
    grouped,
    masks,
]
