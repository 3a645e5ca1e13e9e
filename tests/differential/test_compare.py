"""The judge judged: equal outcomes pass, the faults that it is there to find don't."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import zoo

from .compare import compare
from .reference import FLOAT32, FLOAT64, Outcome, Plain, Settings, build, follow

NAMES = ("gpt2", "plain_tied", "plain_dropout", "plain_batch_norm", "plain_frozen")


def plain_run(name: str, settings: Settings = FLOAT64, spoil: Callable[[torch.nn.Module], Any] = lambda model: None) -> Outcome:
    case = zoo.case(name)
    model, kwargs = build(case, settings)
    spoil(model)
    return follow(Plain(model, case.loss), kwargs, settings)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_run_twice_is_equal(name: str) -> None:
    worst = compare(plain_run(name), plain_run(name), FLOAT64)[0]
    assert worst.ratio == 0, str(worst)


def scaled(outcome: Outcome, name: str, factor: float) -> Outcome:
    return dataclasses.replace(outcome, gradients=outcome.gradients | {name: outcome.gradients[name] * factor})


def test_a_slightly_wrong_gradient_is_found() -> None:
    expected = plain_run("plain_split")
    name = "blocks.0.attention.v.bias"
    found = compare(expected, scaled(expected, name, 1 + 2e-9), FLOAT64)[0]
    assert found.what == f"gradient of {name}" and 1 < found.ratio < 3
    assert compare(expected, scaled(expected, name, 1 + 1e-10), FLOAT64)[0].ratio <= 1


def test_a_weight_that_differs_is_found_in_loss_gradients_and_state() -> None:
    def spoil(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model.get_parameter("embed.weight").mul_(1 + 1e-6)

    rows = [row for row in compare(plain_run("plain_split"), plain_run("plain_split", spoil=spoil), FLOAT64) if row.ratio > 1]
    assert {row.what.split()[0] for row in rows} >= {"loss", "gradient", "embed.weight"}


def test_missing_and_misshapen_values_are_infinitely_far() -> None:
    expected = plain_run("plain_split")
    name, gradient = next(iter(expected.gradients.items()))
    without = dataclasses.replace(expected, gradients={k: v for k, v in expected.gradients.items() if k != name})
    for wrong in (without, dataclasses.replace(expected, gradients=expected.gradients | {name: gradient[:1]})):
        assert compare(expected, wrong, FLOAT64)[0].ratio == math.inf
    assert compare(expected, scaled(expected, name, math.nan), FLOAT64)[0].ratio == math.inf


def test_a_gradient_where_there_is_none_must_be_zero() -> None:
    expected = plain_run("plain_frozen")
    frozen = "base.embed.weight"
    for value, ratio in ((0.0, 0.0), (1e-30, math.inf)):
        extra = torch.full_like(expected.state[frozen], value)
        found = dataclasses.replace(expected, gradients=expected.gradients | {frozen: extra})
        assert compare(expected, found, FLOAT64)[0].ratio == ratio


def test_tied_parameters_may_be_reported_under_each_name() -> None:
    expected = plain_run("plain_tied")
    both = dataclasses.replace(expected, gradients=expected.gradients | {"head.weight": expected.gradients["embed.weight"]})
    assert compare(expected, both, FLOAT64)[0].ratio == 0


def test_float32_settings_pass_rounding_and_fail_a_part_in_a_thousand() -> None:
    expected = plain_run("plain_llama", FLOAT32)
    wide = plain_run("plain_llama", dataclasses.replace(FLOAT64, eps=FLOAT32.eps))
    rounded = Outcome(
        [loss.float() for loss in wide.losses],
        {name: value.float() for name, value in wide.gradients.items()},
        {name: value.float() for name, value in wide.state.items()},
    )
    assert compare(rounded, expected, FLOAT32)[0].ratio < 0.5
    assert compare(expected, scaled(expected, "embed.weight", 1.001), FLOAT32)[0].ratio > 1
