"""The training loop of the bundled models: what is interrupted goes on to the same end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tools.training import Run, Stage, adamw, constant_then_linear, cosine, train_stage


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def fit(model: nn.Module, generator: torch.Generator) -> Tensor:
    points = torch.randn(16, 3, generator=generator)
    loss: Tensor = (model(points) - points.sum(1, keepdim=True).sin()).square().mean()
    return loss


def stage(work: Path, steps: int = 60, recipe: str = "a") -> Stage:
    run = Run(work, torch.device("cpu"))
    return Stage(run, "net", steps, 1e-2, constant_then_linear(steps, 20), recipe, log_every=10)


def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path: Path) -> None:
    whole, facts = train_stage(stage(tmp_path / "whole"), make, fit)
    calls = 0

    def interrupted(model: nn.Module, generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 37:
            os.kill(os.getpid(), signal.SIGINT)
        return fit(model, generator)

    with pytest.raises(SystemExit) as told:
        train_stage(stage(tmp_path / "parts"), make, interrupted)
    assert told.value.code == 128 + signal.SIGINT and calls == 37
    resumed, resumed_facts = train_stage(stage(tmp_path / "parts"), make, interrupted)
    assert calls == 60
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    # the window that was cut apart is averaged over what came after
    assert [step for step, _ in resumed_facts["curve"]] == [step for step, _ in facts["curve"]] == [*range(10, 61, 10)]
    assert resumed_facts["final_loss"] == pytest.approx(facts["final_loss"])


def test_a_finished_run_taken_up_again_says_the_same(tmp_path: Path) -> None:
    _, facts = train_stage(stage(tmp_path), make, fit)
    _, again = train_stage(stage(tmp_path), make, fit)
    assert facts["seconds"] > 0
    assert all(facts[key] == again[key] for key in ("steps", "seconds", "final_loss"))


def test_a_run_that_has_not_begun_to_fall_can_be_prolonged(tmp_path: Path) -> None:
    calls = 0

    def counted(model: nn.Module, generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        return fit(model, generator)

    train_stage(stage(tmp_path, steps=30), make, counted)
    train_stage(stage(tmp_path, steps=50), make, counted)
    assert calls == 50


def test_the_checkpoint_of_another_recipe_is_not_taken_up(tmp_path: Path) -> None:
    train_stage(stage(tmp_path, recipe="a"), make, fit)
    _, facts = train_stage(stage(tmp_path, steps=10, recipe="b"), make, fit)
    assert len(facts["curve"]) == 1


def test_whoever_looks_sees_the_averages_and_training_does_not_notice(tmp_path: Path) -> None:
    plain, _ = train_stage(stage(tmp_path / "plain"), make, fit)
    looked: dict[int, Tensor] = {}

    def watch(model: nn.Module, step: int) -> None:
        looked[step] = next(model.parameters()).clone()

    watched_stage = Stage(**{**vars(stage(tmp_path / "watched")), "watch_every": 25})
    watched, _ = train_stage(watched_stage, make, fit, watch)
    assert list(looked) == [25, 50, 60]
    assert torch.equal(looked[60], next(watched.parameters()))  # the averages are what comes back
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


def test_averages_follow_the_weights(tmp_path: Path) -> None:
    """Against the recursion written out, with the same updates."""
    averaged, _ = train_stage(stage(tmp_path), make, fit)
    torch.manual_seed(0)
    model, generator = make(), torch.Generator().manual_seed(0)
    schedule, (optimizer,) = constant_then_linear(60, 20), adamw(model, 1e-2)
    average = [p.detach().double() for p in model.parameters()]
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 1e-2 * schedule(step)
        optimizer.zero_grad()
        fit(model, generator).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.9995, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, model.parameters(), strict=True)]
    for a, b in zip(average, averaged.parameters(), strict=True):
        torch.testing.assert_close(a.float(), b.detach(), rtol=1e-4, atol=1e-6)


def test_schedules() -> None:
    rise = [constant_then_linear(1000, 250)(step) for step in (0, 99, 199, 500, 750, 875, 999)]
    assert rise == pytest.approx([1 / 200, 0.5, 1, 1, 1, 0.5, 1 / 250])
    fall = [cosine(100)(step) for step in (0, 10, 50)]
    assert fall == pytest.approx([1 / 11, 0.975528, 0.5], rel=1e-4)
