"""What capture can't keep, it refuses by name, with the user's line where there is one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoshard.errors import BatchError, CaptureError
from autoshard.trace.capture import capture


def model(forward: Callable[[Any, Tensor], Any]) -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.register_buffer("state", torch.zeros(4))
            self.plain = torch.ones(4)

    Model.forward = forward  # type: ignore[method-assign]
    return Model()


def branch(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    if h.sum() > 0:  # here
        h = h * 2
    return h.sum()


def number(self: Any, x: Tensor) -> Tensor:
    return self.a(x).sum() * float(x.max())  # here


def tensor_hook(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    h.register_hook(lambda grad: grad * 2)  # here
    return h.sum()


def autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        h = self.a(x)
    return h.float().sum()


def inner_gradient(self: Any, x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(self.a(x).square().sum(), self.a.weight, create_graph=True)  # here
    return g.square().sum()


def write_without_gradient(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    with torch.no_grad():
        h.mul_(2)
    return h.sum()


def write_parameter(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.a.weight.mul_(2)
    return self.a(x).sum()


def write_plain(self: Any, x: Tensor) -> Tensor:
    self.plain.add_(1)
    return (self.a(x) * self.plain).sum()


def resize_buffer(self: Any, x: Tensor) -> Tensor:
    self.state = torch.ones(5)
    return self.a(x).sum()


def cast_part(self: Any, x: Tensor) -> Tensor:
    return self.a.to(torch.float64)(x.double()).sum()  # here


def no_loss(self: Any, x: Tensor) -> Tensor:
    return self.a(x)


def no_gradient(self: Any, x: Tensor) -> Tensor:
    return self.a(x).detach().sum()


def by_frequency(self: Any, x: Tensor) -> Tensor:
    return F.embedding(x.long(), self.a.weight, scale_grad_by_freq=True).sum()


def other_dtype(self: Any, x: Tensor) -> Tensor:
    return self.a(x.double()).sum()  # here


def users_own(self: Any, x: Tensor) -> Tensor:
    raise TypeError("no such thing")  # here


class TakesList(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, more: list[Tensor]) -> Tensor:
        return x + more[0]


class WritesInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)


def takes_list(self: Any, x: Tensor) -> Tensor:
    return TakesList.apply(x, [self.a(x)]).sum()  # here


def writes_input(self: Any, x: Tensor) -> Tensor:
    return WritesInput.apply(self.a(x)).sum()  # here


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + torch.poisson(x)).sum()  # here


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (branch, "data-dependent"),
        (number, "data-dependent"),
        (tensor_hook, "register_hook"),
        (autocast, "torch.autocast"),
        (inner_gradient, "grad"),
        (write_without_gradient, "inside no_grad"),
        (write_parameter, "inside no_grad"),
        (write_plain, "plain"),
        (resize_buffer, "'state'"),
        (cast_part, "casts module 'a': weight from torch.float32 on cpu to torch.float64"),
        (no_loss, r"pass loss="),
        (no_gradient, "no trainable parameter"),
        (by_frequency, "scale_grad_by_freq"),
        (takes_list, "takes tensors inside of a list"),
        (writes_input, "writes into its inputs"),
        (users_own, "no such thing"),
        (other_dtype, "linear multiplies float64 by float32"),
    ],
)
def test_refused_by_name(forward: Callable[[Any, Tensor], Any], says: str) -> None:
    with pytest.raises(CaptureError, match=says) as error:
        capture(model(forward), (torch.ones(2, 4),))
    assert_line(error.value, forward)


def test_random_ops_are_refused_with_their_line() -> None:
    with pytest.raises(CaptureError, match="poisson") as error:
        capture(Noise(), (torch.ones(2, 4),))
    assert_line(error.value, Noise)


def assert_line(error: CaptureError, code: Any) -> None:
    """The error names the line of `code` that is marked "here", if one is."""
    lines, first = inspect.getsourcelines(code)
    for n, line in enumerate(lines):
        if "# here" in line:
            assert error.where == f"tests/trace/test_refusals.py:{first + n}"


@pytest.mark.parametrize(
    ("attach", "says"),
    [
        (lambda m: m.a.register_full_backward_hook(lambda *_: None), "module 'a' has the backward hook"),
        (lambda m: m.a.weight.register_hook(lambda g: g), "'a.weight' has the gradient hook"),
        (lambda m: m.a.weight.register_post_accumulate_grad_hook(lambda p: None), "'a.weight' has the gradient hook"),
    ],
)
def test_hooks_on_gradients_are_refused(attach: Callable[[nn.Module], Any], says: str) -> None:
    m = model(lambda self, x: self.a(x).sum())
    attach(m)
    with pytest.raises(CaptureError, match=says):
        capture(m, (torch.ones(2, 4),))


def test_an_enclosing_autocast_is_refused_and_a_disabled_one_is_not() -> None:
    def off(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.a(x).sum()

    capture(model(off), (torch.ones(2, 4),))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CaptureError, match="called under"):
        capture(model(off), (torch.ones(2, 4),))


def test_the_model_is_whole_again_after_a_failure() -> None:
    m = model(branch)
    weight = m.a.weight
    with pytest.raises(CaptureError):
        capture(m, (torch.ones(2, 4),))
    assert m.a.weight is weight
    assert m.a(torch.ones(2, 4)).shape == (2, 4)


# ---- the call


def call_model() -> nn.Module:
    return model(lambda self, x: self.a(x).sum())


def test_batch_dims() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, z: Tensor, a: Tensor, table: Tensor) -> Tensor:
            return self.a(z).sum() + a.sum() + table.sum()

    kwargs = {"z": torch.ones(2, 4), "a": torch.ones(2), "table": torch.ones(3, 2)}

    def dims(**options: Any) -> dict[str, int | None]:
        return {v.name: v.batch_dim for v in capture(Three(), (), kwargs, **options).graph.sources("input")}

    assert dims() == {"z": 0, "a": 0, "table": None}
    assert dims(batch_dims={"table": -1, "kwargs.a": None}) == {"z": 0, "a": None, "table": 1}
    with pytest.raises(BatchError, match="not arguments"):
        dims(batch_dims={"other": 0})
    with pytest.raises(BatchError, match="out of range"):
        dims(batch_dims={"a": 1})


def test_another_batch_is_checked_against_the_captured_one() -> None:
    m = model(lambda self, x, scale=1.0: self.a(x).sum() * scale)
    captured = capture(m, (torch.ones(2, 4),), {"scale": 2.0})
    assert list(captured.flatten((torch.zeros(2, 4),), {"scale": 2.0})) == ["args_0"]
    for args, kwargs, says in (
        ((torch.ones(3, 4),), {"scale": 2.0}, r"args.0 is float32\[3, 4\], but float32\[2, 4\] was captured"),
        ((torch.ones(2, 4).double(),), {"scale": 2.0}, "float64"),
        ((torch.ones(2, 4),), {"scale": 3.0}, "kwargs.scale is 3.0, but 2.0"),
        ((torch.ones(2, 4),), {}, "were captured"),
        ((7,), {"scale": 2.0}, "args.0 is int"),
    ):
        with pytest.raises(BatchError, match=says):
            captured.flatten(args, kwargs)


def test_no_tensor_argument() -> None:
    with pytest.raises(BatchError, match="no argument is a tensor"):
        capture(call_model(), ())
