"""Watching modules while a model runs: what is seen, that nothing stays, and that a run can be cut short."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accuquant.runtime.observe import Call, observed, run_until


class Joint(nn.Module):
    """Two tensors in, two out, by name."""

    def forward(self, encoder_hidden_states: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states + 1, encoder_hidden_states


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.joint, self.last = nn.Linear(3, 3), Joint(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        x, _ = self.joint(encoder_hidden_states=torch.zeros(2), hidden_states=x)
        return self.last(x)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_the_last_call_is_kept_and_nothing_stays() -> None:
    model, x = Model(), torch.randn(2, 3)
    with observed(model, ["first", "joint"]) as seen:
        assert hooks(model) == 2
        model(x)
        model(2 * x)
        assert torch.equal(seen["first"].input, 2 * x)
        assert torch.equal(seen["first"].output, model.first(2 * x))
        # by name, the hidden states are the input whichever comes first; of several outputs the first counts
        assert torch.equal(seen["joint"].input, model.first(2 * x))
        assert torch.equal(seen["joint"].output, seen["joint"].input + 1)
        assert len(seen["joint"].returned) == 2
    assert set(seen) == {"first", "joint"}
    assert hooks(model) == 0


def test_every_call_is_shown_as_it_ends() -> None:
    model, order = Model(), list[tuple[str, float]]()

    def see(name: str, call: Call) -> None:
        order.append((name, float(call.input.sum())))

    with torch.no_grad(), observed(model, ["last", "first"], see) as seen:
        model(torch.ones(1, 3))
        model(torch.zeros(1, 3))
    assert [name for name, _ in order] == ["first", "last", "first", "last"]
    assert (order[0][1], order[2][1]) == (3.0, 0.0)
    assert seen == {}


@pytest.mark.parametrize("names", [["first", "last"], ["first", "no such module"]])
def test_nothing_stays_of_what_fails(names: list[str]) -> None:
    """In the model, or where one of the modules is not there."""
    model = Model()
    with pytest.raises((RuntimeError, AttributeError)), observed(model, names):
        model(torch.randn(2, 4))
    assert hooks(model) == 0


def test_a_run_ends_with_the_call() -> None:
    model, calls = Model(), list[str]()
    model.last.register_forward_pre_hook(lambda *_: calls.append("last"))
    x = torch.randn(2, 3)
    call = run_until(model.joint, lambda: model(x))
    assert isinstance(call, Call)
    assert torch.equal(call.kwargs["hidden_states"], model.first(x))
    assert torch.equal(call.output, call.input + 1)
    assert calls == []
    assert len(model.joint._forward_hooks) == 0


def test_a_module_that_is_not_called_is_an_error() -> None:
    model = Model()
    with pytest.raises(LookupError, match="no Linear was called"):
        run_until(nn.Linear(1, 1), lambda: model(torch.randn(2, 3)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_until(model.last, lambda: model(torch.randn(2, 4)))
    assert hooks(model) == 0
