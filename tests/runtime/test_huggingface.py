from __future__ import annotations

import copy
import functools
import json
import os
import pickle
import shutil

import pytest
import torch

from autoshard.errors import CheckpointError
from autoshard.plan.search import random_plan
from autoshard.runtime import dcp
from autoshard.runtime.convert import convert, open_source
from autoshard.runtime.huggingface import INDEX, export, load_pretrained
from autoshard.runtime.in_process import InProcess
from autoshard.runtime.module import Sharded
from autoshard.trace.capture import capture
from tests import zoo

from .by_hand import Plain, program
from .checkpoints import pretend, without_graphs
from .ranks import ranks


@functools.cache
def family(name: str):
    case = zoo.case(name)
    model, kwargs = case.build()
    return model, kwargs, capture(model, kwargs=kwargs, loss=case.loss)


def sharded(name: str, mesh: dict[str, int], shift: float = 0.0) -> InProcess:
    model, _, captured = family(name)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p += shift
    return InProcess(without_graphs(captured, random_plan(captured.graph, mesh=mesh, microbatches=1, seed=3)), model)


def logits(model, kwargs):
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in kwargs.items() if k != "labels"}).logits


@pytest.mark.parametrize(("name", "mesh"), [("gpt2", {"dp": 2, "tp": 2}), ("llama", {"pp": 2, "tp": 2})])
def test_there_and_back(tmp_path, name, mesh):
    model, kwargs, _ = family(name)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs" / INDEX).exists()
    run = sharded(name, mesh, shift=1.0)
    optimizer = run.optimizer(torch.optim.AdamW, lr=0.01)
    assert load_pretrained(tmp_path / "theirs", run) is run
    for key, tensor in run.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    for folder, most in (("one", 10**9), ("several", 30_000)):
        export(run, tmp_path / folder, config=model.config, max_shard=most)
        again = type(model).from_pretrained(tmp_path / folder)
        assert torch.equal(logits(again, kwargs), logits(model, kwargs))
    assert (tmp_path / "several" / INDEX).exists() and not (tmp_path / "one" / INDEX).exists()
    pretend(run, optimizer, 1)
    run.save(tmp_path / "run", step=1)
    export(tmp_path / "run", tmp_path / "saved", config=tmp_path / "one" / "config.json")
    trained = type(model).from_pretrained(tmp_path / "saved")
    for key, tensor in run.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[key]), key
    assert not torch.equal(logits(trained, kwargs), logits(model, kwargs))


def test_a_base_models_weights_serve_a_model_with_a_head(tmp_path):
    model, _, _ = family("gpt2")
    model.transformer.save_pretrained(tmp_path / "base")
    run = sharded("gpt2", {"tp": 2}, shift=1.0)
    load_pretrained(tmp_path / "base", run)
    for key, tensor in run.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


def test_refusals(tmp_path):
    model, _, _ = family("gpt2")
    run = sharded("llama", {"tp": 2})
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_pretrained(tmp_path, run)
    model.save_pretrained(tmp_path / "gpt2", max_shard_size="40KB")
    with pytest.raises(CheckpointError, match=r"missing: model\.embed_tokens\.weight"):
        load_pretrained(tmp_path / "gpt2", run)
    with pytest.raises(CheckpointError, match="something here already"):
        export(run, tmp_path / "gpt2")
    index = json.loads((tmp_path / "gpt2" / INDEX).read_text())
    for bad in ("../x.safetensors", "/etc/passwd", 5, "a/b.safetensors", "..safetensors"):
        index["weight_map"]["transformer.wte.weight"] = bad
        (tmp_path / "gpt2" / INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="weight_map"):
            load_pretrained(tmp_path / "gpt2", run)


def on_ranks(folder):
    run = Sharded(program(), Plain(), device=torch.device("cpu"), compile=False)
    export(run, f"{folder}/live", config={"model_type": "by hand"})
    with pytest.raises(CheckpointError, match="No space"):
        if run.comm.rank == 0:
            no_space()
        export(run, f"{folder}/full", config={})
    return sorted(os.listdir(folder))


def no_space():
    import errno

    from autoshard.runtime.checkpoint import blocks

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    blocks.Hashed.write = write


def test_real_ranks_write_one_folder(tmp_path):
    assert ranks(4, on_ranks, str(tmp_path))[0] == ["live"]
    from safetensors.torch import load_file

    found = load_file(tmp_path / "live" / "model.safetensors")
    assert set(found) == {"a", "b", "seen"} and torch.equal(found["b"], Plain().b)


# ---- DCP, and conversions -------------------------------------------------------------------------------------------


def test_dcp_there_and_back(tmp_path):
    import torch.distributed.checkpoint as torch_dcp

    model, _, _ = family("gpt2")
    state = {"model": dict(model.state_dict()), "note": "text", "step": 3}
    torch_dcp.save(state, storage_writer=torch_dcp.FileSystemWriter(tmp_path / "theirs"), no_dist=True)
    run = sharded("gpt2", {"dp": 2, "tp": 2}, shift=1.0)
    path = convert(tmp_path / "theirs", tmp_path / "ours", to="autoshard", prefix="model.", step=7)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):  # both names were stored, and the model ties them
        run.load(path)
    convert(tmp_path / "theirs", tmp_path / "hf", to="hf", prefix="model.", config=model.config)
    load_pretrained(tmp_path / "hf", run)
    for key, tensor in run.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    saved = run.save(tmp_path / "run", step=1)
    convert(saved, tmp_path / "back", to="dcp", prefix="model.")
    empty = {"model": {k: torch.zeros_like(t) for k, t in model.state_dict().items()}}
    torch_dcp.load(empty, storage_reader=torch_dcp.FileSystemReader(tmp_path / "back"), no_dist=True)
    for key, tensor in model.state_dict().items():
        assert torch.equal(empty["model"][key], tensor), key


def test_weights_alone_start_a_run(tmp_path, caplog):
    model, _, _ = family("llama")
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "run", to="autoshard")
    run = sharded("llama", {"dp": 2}, shift=1.0)
    run.optimizer(torch.optim.AdamW, lr=0.1)
    assert run.load(tmp_path / "run").step == 0
    assert "they start anew" in caplog.text
    for key, tensor in run.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


def save_shards(folder):
    import torch.distributed.checkpoint as torch_dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(35.0).reshape(5, 7)
    mine = DTensor.from_local(whole.chunk(2, 1)[mesh.get_rank()].contiguous(), mesh, [Shard(1)], shape=whole.shape, stride=whole.stride())
    torch_dcp.save({"w": mine}, checkpoint_id=folder)


def test_dcp_shards_are_put_together(tmp_path):
    ranks(2, save_shards, str(tmp_path))
    source = open_source(tmp_path)
    assert torch.equal(source.part("w"), torch.arange(35.0).reshape(5, 7))
    assert torch.equal(source.part("w", (None, (2, 5))), torch.arange(35.0).reshape(5, 7)[:, 2:5])


class Boom:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['AUTOSHARD_CANARY']}",)


def test_hostile_dcp_is_refused(tmp_path, monkeypatch):
    import torch.distributed.checkpoint as torch_dcp
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    monkeypatch.setenv("AUTOSHARD_CANARY", str(tmp_path / "canary"))
    good = tmp_path / "good"
    torch_dcp.save({"w": torch.ones(3, 2)}, storage_writer=torch_dcp.FileSystemWriter(good), no_dist=True)
    clean: Metadata = pickle.loads((good / dcp.METADATA).read_bytes())
    data = next(good.glob("*.distcp"))

    def refused(change, file=None):
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        metadata = copy.deepcopy(clean)
        given = change(metadata)
        (bad / dcp.METADATA).write_bytes(given if isinstance(given, bytes) else pickle.dumps(metadata))
        if file is not None:
            (bad / data.name).write_bytes(file)
        with pytest.raises(CheckpointError):
            dcp.Folder(bad).part("w")
        assert not (tmp_path / "canary").exists()

    info = lambda m: next(iter(m.storage_data.values()))
    entry = lambda m: m.state_dict_metadata["w"]
    refused(lambda m: pickle.dumps(Boom()))
    refused(lambda m: setattr(m, "planner_data", Boom()))
    refused(lambda m: b"")
    refused(lambda m: b"\x80\x04" + b"(" * 1000)
    refused(lambda m: pickle.dumps({"a": 1}))
    for path in ("../x", "/etc/passwd", "", "a/b", 5):
        refused(lambda m, path=path: setattr(info(m), "relative_path", path))
    for offset in (-1, 1 << 62, "0", 10**6):
        refused(lambda m, offset=offset: setattr(info(m), "offset", offset))
    refused(lambda m: setattr(info(m), "length", 1 << 45))
    refused(lambda m: setattr(entry(m), "size", torch.Size([1 << 40, 1 << 20])))
    refused(lambda m: setattr(entry(m), "size", torch.Size([4, 2])))
    refused(lambda m: setattr(entry(m), "chunks", []))
    refused(lambda m: setattr(entry(m), "chunks", entry(m).chunks * 2))
    refused(lambda m: setattr(entry(m).chunks[0], "sizes", torch.Size([3, 3])))
    refused(lambda m: setattr(entry(m).properties, "dtype", torch.float64))
    refused(lambda m: setattr(m, "storage_data", {MetadataIndex("v"): info(m)}))
    refused(lambda m: None, file=pickle.dumps(Boom()))
    refused(lambda m: None, file=b"")
