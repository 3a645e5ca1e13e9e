"""A config → a `Trainer`: ranks, data, model and plan, made in that order on every rank; what fails on one is raised on all."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping

import torch
from torch import nn

from .. import models
from ..api import choose_device, parallelize, this_machine
from ..config import Config
from ..errors import ConfigError
from ..mesh import Mesh
from ..plan.cluster import Cluster
from ..report import plan_table
from ..runtime.comm import Comm
from ..runtime.data import Batches, Stream, open_sources, split
from ..runtime.deferred import deferred
from ..runtime.huggingface import load_pretrained
from ..runtime.trainer import Trainer, claim
from .progress import Progress

FIELDS = (
    "autoshard train fills arguments with token ids alone: data.fields says which (words: tokens, labels: next); "
    "what takes anything else is trained by a script of yours (parallelize)"
)


def assemble(config: Config, resume: bool, progress: Progress) -> Trainer:
    """Raises whatever is wrong with the checkpoints, the data, the model or the machine."""
    parallel, data = config.parallel, config.data
    device = choose_device("", parallel.device)
    comm = Comm(device)
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // comm.size))
    found = claim(config.checkpoints.folder, comm, resume)
    where = comm.together(lambda: _where(config, comm))
    machine = where if isinstance(where, Cluster) else comm.together(lambda: this_machine(comm))
    train, held = comm.together(lambda: _streams(config))
    source = comm.together(lambda: models.find(config.model.source, config.model.arguments))
    torch.manual_seed(config.run.seed)
    model = comm.together(lambda: _model(config, source))
    fields = comm.together(lambda: _fields(config, model))
    vocabulary = models.vocabulary(model)

    def batches(streams: list[Stream], order: str, seed: int) -> Batches:
        return Batches(streams, seq=data.seq, batch=data.batch, order=order, seed=seed, fields=fields, vocabulary=vocabulary)

    training = comm.together(lambda: batches(train, data.order, config.run.seed))
    held_out = comm.together(lambda: batches(held, "random", config.run.seed + 1) if held else None)
    example = {name: torch.zeros(data.batch, data.seq, dtype=torch.int64) for name in fields}
    sharded = parallelize(
        model, where, kwargs=example, plan=parallel.plan, pins=parallel.pins, microbatches=parallel.microbatches, compile=parallel.compile,
        device=device,
    )  # fmt: skip
    if config.model.pretrained is not None and not config.model.deferred:
        load_pretrained(config.model.pretrained, sharded)
    progress.console.print(plan_table(sharded.plan))  # type: ignore[arg-type]
    progress.say(f"{sum(len(s.tokens) for s in train):,} tokens to train on, {sum(len(s.tokens) for s in held):,} held out")
    if config.evaluation.every and not held:
        progress.say("nothing is evaluated: every source is too short to hold a sequence back (data.held_out)")
    trainer = Trainer(sharded, config, training, held_out, machine.device, progress)
    if resume and not found:
        progress.say(f"no checkpoint in {config.checkpoints.folder}: starting at the beginning")
    trainer.begin(found)
    return trainer


def _where(config: Config, comm: Comm) -> Cluster | Mapping[str, int]:
    parallel = config.parallel
    if parallel.mesh is not None:
        mesh = Mesh.parse(parallel.mesh)
        return dict(zip(mesh.names, mesh.sizes, strict=True))
    return Cluster.load(parallel.cluster) if parallel.cluster is not None else this_machine(comm)


def _streams(config: Config) -> tuple[list[Stream], list[Stream]]:
    """(training, held out)."""
    data = config.data
    whole = open_sources(data.sources, data.tokenizer)
    if config.evaluation.sources:
        return whole, open_sources(config.evaluation.sources, data.tokenizer)
    return split(whole, data.held_out, data.seq + 1)


def _model(config: Config, source: models.Source) -> nn.Module:
    settings, data = config.model, config.data
    make = source.maker(batch=data.batch, seq=data.seq, dtype=settings.dtype)
    if not settings.deferred:
        return make()
    model = deferred(make)
    return model if settings.pretrained is None else load_pretrained(settings.pretrained, model)


def _fields(config: Config, model: nn.Module) -> dict[str, str]:
    """The model's arguments and what fills each. Raises ConfigError."""
    given, forward = dict(config.data.fields), inspect.signature(model.forward).parameters.values()
    if not given:
        try:
            return models.fields_of(model)
        except ConfigError as error:
            raise ConfigError(str(error).splitlines()[0], hint=FIELDS) from error
    known = [p.name for p in forward if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    unknown = [name for name in given if name not in known and len(known) == len(forward)]
    missing = [p.name for p in forward if p.default is p.empty and p.name in known and p.name not in given]
    if unknown or missing:
        what = f"takes no {unknown[0]!r}" if unknown else f"also takes {missing[0]!r}"
        raise ConfigError(f"data.fields: {type(model).__name__}.forward {what}", hint=f"its arguments are {', '.join(known)}. {FIELDS}")
    return given
