from __future__ import annotations

import pytest
import torch

from autoshard.errors import CaptureError, DeadlockError, StateError
from autoshard.lower.program import Call
from autoshard.plan.schedules import parse
from autoshard.runtime.in_process import InProcess

from .by_hand import Plain, _head, batch, program

DOUBLE = {"rtol": 1e-12, "atol": 1e-12}  # float64; the order of sums differs


def pair(**options) -> tuple[Plain, InProcess]:
    plain = Plain(torch.float64)
    return plain, InProcess(program(dtype="float64", **options), plain)


@pytest.mark.parametrize("options", [{}, {"schedule": "gpipe"}, {"split": True}], ids=str)
def test_a_step_equals_autograd(options):
    plain, ours = pair(**options)
    data = batch(torch.float64)
    for _ in range(2):  # gradients add up, as torch's do
        loss = plain(**data)
        loss.backward()
        torch.testing.assert_close(ours.train_step(**data), loss.detach(), **DOUBLE)
    found = ours.gradients()
    assert set(found) == {"a", "b"}
    for name in found:
        torch.testing.assert_close(found[name], plain.get_parameter(name).grad, **DOUBLE)


def test_a_step_leaves_nothing_behind():
    _, ours = pair()
    steps = []
    play = ours._play
    ours._play = lambda given: (steps.extend(given), play(given))[1]
    ours.train_step(**batch(torch.float64))
    for step in steps:
        assert not step.envs and not step.saved and not step.totals
        assert not any(step.grads.values())


def test_evaluation_runs_forward_only():
    plain, ours = pair()
    torch.testing.assert_close(ours.eval_step(**batch(torch.float64)), plain(**batch(torch.float64)).detach(), **DOUBLE)
    assert ours.gradients() == {}


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("norm", [2.0, 1.0, float("inf")])
def test_training_equals_torch(cls, norm):
    plain, ours = pair()
    reference, mine = cls(plain.parameters(), lr=0.05), ours.optimizer(cls, lr=0.05)
    data = batch(torch.float64)
    for _ in range(3):
        plain(**data).backward()
        ours.train_step(**data)
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5, norm)
        torch.testing.assert_close(ours.clip_grad_norm_(0.5, norm), expected, **DOUBLE)
        for optimizer in (reference, mine):
            optimizer.step()
            optimizer.zero_grad()
    state = ours.state_dict()
    assert list(state) == list(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(state[name], tensor, **DOUBLE)


def test_state_dict_round_trip_and_errors():
    plain, ours = pair()
    other = {name: torch.randn_like(t) for name, t in plain.state_dict().items()}
    other["tied"] = other["a"]
    ours.load_state_dict(other)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, other[name])
    with pytest.raises(StateError, match=r"missing \['b'\]"):
        ours.load_state_dict({k: v for k, v in other.items() if k != "b"})
    with pytest.raises(StateError, match="shape"):
        ours.load_state_dict({**other, "b": torch.zeros(3, 3)})


def test_buffer_updates():
    _, ours = pair(count=True)
    for _ in range(3):
        ours.train_step(**batch(torch.float64))
    assert ours.state_dict()["seen"] == 3


def test_evaluation_of_a_graph_that_says_more_is_refused():
    _, ours = pair(count=True)
    with pytest.raises(CaptureError, match="holds updates of seen, so it can't be evaluated"):
        ours.eval_step(**batch(torch.float64))
    _, other = pair()
    again = InProcess(ours.program, Plain(torch.float64), evaluation=other.program)
    again.eval_step(**batch(torch.float64))
    assert again.state_dict()["seen"] == 0


def test_low_precision_gradients_accumulate_in_float32():
    plain = Plain(torch.bfloat16)
    ours = InProcess(program(dtype="bfloat16"), plain)
    ours.train_step(**batch(torch.bfloat16))
    exact = Plain(torch.float64)
    exact.load_state_dict(plain.state_dict())
    exact(**{k: v.double() for k, v in batch(torch.bfloat16).items()}).backward()
    for name, grad in ours.gradients().items():
        assert grad.dtype == torch.bfloat16
        scale = exact.get_parameter(name).grad.abs().max()
        # bfloat16 has 8 bits: the forward's roundings, not the sums', are what is left
        assert (grad - exact.get_parameter(name).grad).abs().max() < 0.05 * scale


def test_ranks_that_disagree_are_named():
    odd = program(dtype="float64")
    head = odd.ranks[3].blocks[1]
    odd.ranks[3].blocks[1] = Call(_head("tp"), head.inputs, head.outputs, "head")
    # rank 3 reduces over tp, alone; rank 2 waits for it in dp, where rank 3 comes with something else
    there = r"(?s)rank 2 at F1\.0 waits in all_reduce\(float64\[\], sum\) on 'dp'.*rank 3 at B1\.1, reducing bucket 0 waits in"
    with pytest.raises(DeadlockError, match=there):
        InProcess(odd, Plain(torch.float64)).train_step(**batch(torch.float64))


def test_a_list_that_waits_for_ever_is_named():
    _, ours = pair()
    stuck = parse("0: P D F0.0 SF0>1.0 F0.1 RB1>0.0\n1: P D RF0>1.0 F1.0 RF0>1.1 F1.1")
    for rank in ours.program.ranks:
        rank.instructions = stuck[rank.stage]
    with pytest.raises(DeadlockError, match=r"(?s)no rank can go on.*rank 0 at RB1>0\.0 waits for rank 2.*rank 2 at RF0>1\.1"):
        ours.train_step(**batch(torch.float64))


def test_an_error_inside_a_module_says_where():
    _, ours = pair()
    with pytest.raises(RuntimeError) as caught:
        ours.train_step(x=torch.zeros(8, 5, dtype=torch.float64), y=torch.zeros(8, 2, dtype=torch.float64))
    assert caught.value.__notes__ == ["on rank 0, at F0.0"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", [2.0, float("inf"), None])
def test_a_step_without_finite_gradients_is_left_out_on_every_rank(bad, norm, caplog):
    trainer = InProcess(program(dtype="float64"), Plain(torch.float64))
    optimizer = trainer.optimizer(torch.optim.AdamW, lr=0.05)
    before = trainer.state_dict()
    poisoned = {name: (tensor * bad if tensor.is_floating_point() else tensor) for name, tensor in batch(torch.float64).items()}
    trainer.train_step(**poisoned)
    if norm is not None:
        assert not torch.isfinite(trainer.clip_grad_norm_(1.0, norm))
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.skipped == 1 and all(torch.equal(t, before[name]) for name, t in trainer.state_dict().items())
    assert caplog.text.count("the step is left out") == 1 and not optimizer.state
    trainer.train_step(**batch(torch.float64))
    if norm is not None:
        trainer.clip_grad_norm_(1.0, norm)
    optimizer.step()
    after = trainer.state_dict()
    assert optimizer.skipped == 1 and all(torch.isfinite(t).all() for t in after.values())
    assert any(not torch.equal(t, before[name]) for name, t in after.items())


def test_a_norm_of_older_gradients_says_nothing():
    trainer = InProcess(program(dtype="float64"), Plain(torch.float64))
    optimizer = trainer.optimizer(torch.optim.AdamW, lr=0.05)
    trainer.train_step(**batch(torch.float64))
    trainer.clip_grad_norm_(1.0)
    good = batch(torch.float64)
    trainer.train_step(x=good["x"], y=good["y"] * float("nan"))
    optimizer.step()
    assert optimizer.skipped == 1
