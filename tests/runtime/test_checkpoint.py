from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import optim

from autoshard.errors import CheckpointError
from autoshard.runtime import checkpoint
from autoshard.runtime.checkpoint import blocks
from autoshard.runtime.checkpoint import folder as folders
from autoshard.runtime.in_process import InProcess
from autoshard.runtime.module import Sharded
from autoshard.runtime.optimizer import ELEMENTWISE

from .by_hand import Plain, batch, program
from .checkpoints import MESHES, name, pretend, same, train, trainer, whole
from .ranks import ranks

SOME = ({"dp": 2}, {"pp": 2, "tp": 2}, {"tp": 3})


def adam(run, lr=0.05):
    return run.optimizer(optim.AdamW, [("*.bias", {"weight_decay": 0.0})], lr=lr)


def all_pairs(tmp_path: Path, meshes, dtype: torch.dtype, graphs: bool, cls=optim.AdamW, **options) -> int:
    """Save on each mesh, load on each: everything bit-equal. How many pairs there were."""
    step = train if graphs else pretend
    saved, generators = {}, {}
    for i, mesh in enumerate(meshes):
        run = trainer(mesh, dtype, graphs=graphs)
        run.manual_seed(7 + i)
        step(run, run.optimizer(cls, [("*.bias", {"lr": 0.01})], lr=0.05, **options), 3)
        torch.manual_seed(i)
        torch.rand(i)
        generators[i] = torch.get_rng_state()
        run.save(tmp_path / name(mesh), step=3, data={"epoch": i, "at": (3, i)}, extra={"mesh": dict(mesh)})
        saved[i] = whole(run)
    pairs = 0
    for mesh in meshes:
        run = trainer(mesh, dtype, shift=1.0, seed=1, graphs=graphs)
        step(run, run.optimizer(cls, [("*.bias", {"lr": 0.5})], lr=0.1, **options), 1)
        for i, other in enumerate(meshes):
            found = run.load(tmp_path / name(other))
            assert (found.step, found.data, found.extra) == (3, {"epoch": i, "at": (3, i)}, {"mesh": dict(other)})
            same(whole(run), saved[i])
            assert torch.equal(torch.get_rng_state(), generators[i])
            pairs += 1
    return pairs


def test_every_mesh_loads_what_any_mesh_saved(tmp_path):
    assert all_pairs(tmp_path, MESHES, torch.float32, graphs=False) == 400


def test_masters_travel_too(tmp_path):
    assert all_pairs(tmp_path, MESHES[:8:2] + SOME, torch.bfloat16, graphs=False) == 49


@pytest.mark.parametrize("cls", ELEMENTWISE, ids=lambda cls: cls.__name__)
def test_every_optimizer(tmp_path, cls):
    options = {"momentum": 0.9} if cls in (optim.SGD, optim.RMSprop) else {}
    assert all_pairs(tmp_path, SOME, torch.float32, graphs=False, cls=cls, **options) == 9


@pytest.mark.slow
def test_every_mesh_loads_what_any_mesh_has_trained(tmp_path):
    assert all_pairs(tmp_path, MESHES, torch.float32, graphs=True) == 400


def test_training_goes_on_as_if_unbroken(tmp_path):
    def schedule(optimizer):
        warm = optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        return optim.lr_scheduler.SequentialLR(optimizer, [warm, optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], 0.5)], [3])

    unbroken = trainer({"dp": 2})
    optimizer = adam(unbroken)
    expected = train(unbroken, optimizer, 6, schedule(optimizer))
    first = trainer({"dp": 2})
    optimizer = adam(first)
    scheduler = schedule(optimizer)
    assert train(first, optimizer, 4, scheduler) == expected[:4]
    first.save(tmp_path, step=4, scheduler=scheduler)
    for mesh in ({"dp": 2}, {"pp": 2, "tp": 2}):
        again = trainer(mesh, shift=0.5)
        optimizer = adam(again, lr=9.0)
        scheduler = schedule(optimizer)
        assert again.load(tmp_path, scheduler=scheduler).step == 4
        losses = train(again, optimizer, 2, scheduler)
        if mesh == {"dp": 2}:
            assert losses == expected[4:]
            same(whole(again), whole(unbroken))
        assert losses == pytest.approx(expected[4:], rel=1e-5)  # another plan sums in another order, in float32


def test_the_newest_stays_and_older_ones_go(tmp_path):
    run = trainer({})
    for step in (1, 5, 10, 10, 100000000):
        path = run.save(tmp_path, step=step, keep=2)
        assert path == checkpoint.newest(tmp_path) and path.name == f"step-{step:08d}"
    assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000010", "step-100000000"]
    assert run.load(tmp_path).step == 100000000
    assert run.load(tmp_path, step=10).path == tmp_path / "step-00000010"
    assert run.load(tmp_path / "step-00000010").step == 10
    with pytest.raises(CheckpointError, match="no checkpoint of step 5 here; there are step-100000000, step-00000010"):
        run.load(tmp_path, step=5)
    with pytest.raises(CheckpointError, match="no such folder"):
        run.load(tmp_path / "nowhere")
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_a_damaged_newest_falls_back_and_says_so(tmp_path, caplog):
    run = trainer({"tp": 2})
    optimizer = adam(run)
    train(run, optimizer, 1)
    run.save(tmp_path, step=1)
    then = whole(run)
    train(run, optimizer, 1)
    newest = run.save(tmp_path, step=2)
    file = newest / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING, "autoshard"):
        assert run.load(tmp_path).step == 1
    assert "rank-00001.safetensors" in caplog.text and "older checkpoint" in caplog.text
    same(whole(run), then)
    for ask in (lambda: run.load(tmp_path, step=2), lambda: run.load(newest), lambda: checkpoint.verify(newest)):
        with pytest.raises(CheckpointError, match="rank-00001"):
            ask()
    run.save(tmp_path, step=2)  # takes the damaged one's place
    assert run.load(tmp_path).step == 2
    same(whole(run), then)


def test_leftovers_of_dead_runs_go(tmp_path):
    run = trainer({})
    run.save(tmp_path, step=1)
    for left in (".tmp-step-00000002-0123abcd", ".old-step-00000001-0123abcd", ".tmp-mine", "step-00000001+"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "rank-00000.safetensors").write_bytes(b"half")
    assert run.load(tmp_path).step == 1  # the + is no whole checkpoint
    run.save(tmp_path, step=3)
    assert sorted(os.listdir(tmp_path)) == [".lock", ".tmp-mine", "step-00000001", "step-00000001+", "step-00000003"]


@pytest.mark.parametrize("dies_after", range(5))
def test_a_step_is_replaced_without_a_moment_in_which_it_is_gone(tmp_path, monkeypatch, dies_after):
    run = trainer({})
    run.save(tmp_path, step=1, extra={"which": 0})
    calls = iter(range(100))

    class Dead(BaseException):
        pass

    def dying(rename=os.rename):
        def work(a, b):
            if next(calls) == dies_after:
                raise Dead
            rename(a, b)

        return work

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying())
        try:
            run.save(tmp_path, step=1, extra={"which": 1})
        except Dead:
            pass
    assert run.load(tmp_path).extra["which"] == min(dies_after, 1)
    run.save(tmp_path, step=1, extra={"which": 2})
    assert run.load(tmp_path).extra["which"] == 2
    assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000001"]


def test_another_model_is_refused_by_name(tmp_path):
    run = trainer({"dp": 2})
    run.save(tmp_path / "small", step=1)
    plain = InProcess(program(), Plain())
    before = {k: t.clone() for k, t in plain.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"another model.*missing: a, b, seen; unexpected: blocks.0.down.weight"):
        plain.load(tmp_path / "small")
    plain.save(tmp_path / "plain", step=1)
    with pytest.raises(CheckpointError, match=r"seen is F64 \[\], expected F32 \[\]|a is F32 \[4, 4\], expected F64 \[4, 4\]"):
        InProcess(program(dtype="float64"), Plain(torch.float64)).load(tmp_path / "plain")
    for key, tensor in plain.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_other_optimizers_are_refused(tmp_path, caplog):
    run = trainer({})
    train(run, adam(run), 1)
    run.save(tmp_path, step=1)
    for make, why in (
        (lambda r: r.optimizer(optim.SGD, lr=1.0), "optimizer 0 is AdamW there, SGD here"),
        (lambda r: r.optimizer(optim.AdamW, lr=1.0), "2 groups there, 1 here"),
        (lambda r: (adam(r), adam(r)), "holds 1 optimizers, the run has 2"),
    ):
        other = trainer({})
        make(other)
        with pytest.raises(CheckpointError, match=why):
            other.load(tmp_path)
    with caplog.at_level(logging.WARNING, "autoshard"):
        trainer({}).load(tmp_path)
    assert "the run has none" in caplog.text


def test_what_cannot_be_written_is_refused_by_name(tmp_path):
    run = trainer({})
    with pytest.raises(CheckpointError, match=r"extra\.a\[1\] is a object"):
        run.save(tmp_path, step=1, extra={"a": [1, object()]})
    with pytest.raises(CheckpointError, match="step=-1"):
        run.save(tmp_path, step=-1)
    assert os.listdir(tmp_path) == [".lock"]


def test_values_come_back_as_they_were():
    from autoshard.runtime.checkpoint.plain import decode, encode

    value = {"a": (1, 2.5, None), "b": {3: "x", (4, 5): [True]}, "c": Counter({7: 2}), "d": float("-inf"), "!e": "!", "f": 10**40, "g": 0.1}
    found = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
    assert found == value and type(found["c"]) is Counter
    scalar = decode(json.loads(json.dumps(encode(torch.tensor(0.1, dtype=torch.float64)))))
    assert scalar.dtype == torch.float64 and scalar == torch.tensor(0.1, dtype=torch.float64)
    assert decode(encode({"n": float("nan")}))["n"] != 0
    for bad in ({"!what": 1}, {"!scalar": ["torch.load", 1]}, {"!dict": [1]}, {"!float": "1e9"}, {"!dict": [[[1], 2]]}):
        with pytest.raises(CheckpointError):
            decode(bad)


def test_inspect(tmp_path):
    run = trainer({"dp": 2, "tp": 2})
    train(run, adam(run), 1)
    path = run.save(tmp_path, step=4, data={"epoch": 1})
    found = checkpoint.inspect(tmp_path)
    assert found["path"] == str(path) and found["step"] == 4 and found["optimizers"] == ["AdamW"] and found["data"] == {"epoch": 1}
    assert found["tensors"]["weights/embed.weight"]["shape"] == [11, 6] and found["tied"] == {"head.weight": "embed.weight"}
    assert "weights/head.weight" not in found["tensors"]  # tied: once
    assert found["steps_taken"] == 1
    json.dumps(found)


def test_any_safetensors_library_reads_the_files(tmp_path):
    from safetensors.torch import load_file

    run = trainer({})
    path = run.save(tmp_path, step=1)
    found = load_file(path / "rank-00000.safetensors")
    for key, tensor in run.state_dict().items():
        if key != "head.weight":
            assert torch.equal(found[f"weights/{key}"], tensor)


# ---- real ranks -----------------------------------------------------------------------------------------------------


def on_ranks(folder, expected):
    torch.manual_seed(5)
    run = Sharded(program(dtype="float64"), Plain(torch.float64), device=torch.device("cpu"), compile=False)
    optimizer = run.optimizer(optim.AdamW, lr=0.05)
    assert run.load(folder).step == 2
    found = {k: t.tolist() for k, t in run.state_dict().items()}
    assert found == expected[0]
    run.train_step(**batch(torch.float64))
    optimizer.step()
    path = run.save(folder, step=3)
    assert path == Path(folder) / "step-00000003"
    return {k: t.tolist() for k, t in run.state_dict().items()}, sorted(os.listdir(path))


def test_real_ranks_go_on_and_back(tmp_path):
    run = InProcess(program(dtype="float64"), Plain(torch.float64))
    optimizer = run.optimizer(optim.AdamW, lr=0.05)
    for _ in range(2):
        run.train_step(**batch(torch.float64))
        optimizer.step()
        optimizer.zero_grad()
    run.save(tmp_path, step=2)
    checkpoint.release(tmp_path)
    before = {k: t.tolist() for k, t in run.state_dict().items()}
    run.train_step(**batch(torch.float64))
    optimizer.step()
    after = {k: t.tolist() for k, t in run.state_dict().items()}
    for state, files in ranks(4, on_ranks, str(tmp_path), [before]):
        assert state == after
        assert files == ["manifest.json", "manifest.sha256", *(f"rank-0000{r}.safetensors" for r in (0, 2, 3))]  # rank 1 holds copies
    other = InProcess(program(dtype="float64"), Plain(torch.float64))
    other.optimizer(optim.AdamW, lr=0.05)
    assert other.load(tmp_path).step == 3
    assert {k: t.tolist() for k, t in other.state_dict().items()} == after


def failing(folder, how, bad):
    run = Sharded(program(), Plain(), device=torch.device("cpu"), compile=False)
    run.save(folder, step=1)
    if run.comm.rank == bad:
        how()
    with pytest.raises(CheckpointError) as caught:
        run.save(folder, step=2)
    return str(caught.value), sorted(n for n in os.listdir(folder) if n != ".lock") if run.comm.rank == 0 else None


def disk_full():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # the error comes where "No space left on device" would


def no_space():
    blocks.Hashed.write = no_space_write


def terminated():
    import signal

    real = blocks.tensor_bytes
    blocks.tensor_bytes = lambda *args: (os.kill(os.getpid(), signal.SIGTERM), real(*args))[1]


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize(("how", "why"), [(disk_full, "File too large"), (no_space, "No space left"), (terminated, "SIGTERM")])
def test_what_fails_on_one_rank_is_one_clean_error_on_all(tmp_path, how, why, bad):
    found = ranks(4, failing, str(tmp_path), how, bad)
    assert all(why in message for message, _ in found)
    assert found[0][1] == ["step-00000001"]
    checkpoint.verify(tmp_path)


# ---- beside training ------------------------------------------------------------------------------------------------


def test_what_is_saved_beside_training_is_what_was_there(tmp_path, monkeypatch):
    run = InProcess(program(dtype="float64"), Plain(torch.float64))
    optimizer = run.optimizer(optim.AdamW, lr=0.05)
    go, real = threading.Event(), blocks.write
    monkeypatch.setattr(checkpoint, "write", lambda *args: (go.wait(30), real(*args))[1])
    scheduler, data = optim.lr_scheduler.StepLR(optimizer, 1, 0.5), {"at": [1]}
    states = []
    for step in (1, 2, 3):
        run.train_step(**batch(torch.float64))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        states.append({k: t.clone() for k, t in run.state_dict().items()})
        if step == 1:
            promised = run.save(tmp_path, step=1, scheduler=scheduler, data=data, wait=False)
            data["at"].append(2)
    assert folders.steps(tmp_path) == [] and promised == tmp_path / "step-00000001"
    go.set()
    assert run.saved() == promised and run.saved() is None
    checkpoint.verify(promised)
    other = InProcess(program(dtype="float64"), Plain(torch.float64))
    again = other.optimizer(optim.AdamW, lr=0.05)
    found = other.load(tmp_path, scheduler=optim.lr_scheduler.StepLR(again, 1, 0.5))
    assert found.data == {"at": [1]} and again.param_groups[0]["lr"] == 0.025
    assert all(torch.equal(t, states[0][k]) for k, t in other.state_dict().items())
    other.train_step(**batch(torch.float64))
    again.step()
    assert all(torch.equal(t, states[1][k]) for k, t in other.state_dict().items())


def beside(folder, bad):
    """Saves while training goes on; what one rank can't write is one error on all, at the next save; after that all is well."""
    run = Sharded(program(), Plain(), device=torch.device("cpu"), compile=False)
    optimizer = run.optimizer(optim.AdamW, lr=0.05)
    real, said = blocks.Hashed.write, []
    for step in range(1, 6):
        run.train_step(**batch())
        optimizer.step()
        if run.comm.rank == bad:
            blocks.Hashed.write = no_space_write if step == 2 else real
        try:
            run.save(folder, step=step, wait=False, keep=3)
        except CheckpointError as error:
            said.append((step, str(error).splitlines()[0]))
        if step == 2:
            time.sleep(0.3)  # for the writer to come to it
    run.saved()
    return said


def no_space_write(self, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failure_beside_training_is_one_error_at_the_next_save(tmp_path):
    found = ranks(4, beside, str(tmp_path), 2)
    assert found == [[(3, "the checkpoint can't be written: No space left on device")]] * 4
    assert [step for step, _ in folders.steps(tmp_path)] == [5, 4, 1]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tmp")]
    checkpoint.verify(tmp_path)


def test_a_failure_that_nobody_asks_for_is_logged(caplog):
    from autoshard.runtime.checkpoint.background import Background

    def work():
        raise CheckpointError("no room")

    failed = Background(work)
    failed._unasked()
    assert "what was saved last isn't there: no room" in caplog.text
    with pytest.raises(CheckpointError, match="no room"):
        failed.result()


def second_job(folder):
    run = Sharded(program(), Plain(), device=torch.device("cpu"), compile=False)
    run.load(folder)  # reading is free
    with pytest.raises(CheckpointError, match=rf"another job writes checkpoints here \(process {os.getppid()} on "):
        run.save(folder, step=2)


def test_two_jobs_in_one_folder(tmp_path):
    run = InProcess(program(), Plain())
    run.save(tmp_path, step=1)
    ranks(4, second_job, str(tmp_path))
    assert [step for step, _ in folders.steps(tmp_path)] == [1]
    run.save(tmp_path, step=2)


def read_only(folder):
    if os.getuid() == 0:
        os.setuid(65534)  # root may write everywhere
    run = Sharded(program(), Plain(), device=torch.device("cpu"), compile=False)
    with pytest.raises(CheckpointError, match="can't be written: Permission denied"):
        run.save(Path(folder) / "run", step=1)


def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o555)
    try:
        ranks(4, read_only, str(tmp_path))
    finally:
        tmp_path.chmod(0o755)
