"""Forecasts are the papers': Taylor against its recursion, Newton against polynomials, RFE against Proposition 1."""

from __future__ import annotations

import pytest
import torch
from helpers import finite_differences
from torch import Tensor

from accuquant.core.forecasts import RFE, Forecast, Memory, Norm, Reuse, Taylor, norm_of

EVEN, UNEVEN = [0, 3, 6, 9, 12], [0, 1, 3, 8, 10]
SCOPES: list[Norm] = ["sample", "token", "channel", "batch"]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def remember(forecast: Forecast, steps: list[int], outputs: list[Tensor], inputs: list[Tensor] | None = None) -> Memory:
    memory = None
    for step, output, input in zip(steps, outputs, inputs or outputs, strict=True):
        memory = forecast.update(memory, step, output, input)
    assert memory is not None
    return memory


# ---- Taylor, Newton, Reuse


@pytest.mark.parametrize("steps", [EVEN, UNEVEN])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_taylor_is_the_published_recursion(order: int, steps: list[int]) -> None:
    outputs = [random(2, 3, 4, seed=s) for s in steps]
    for known in range(1, len(steps) + 1):
        memory = remember(Taylor(order), steps[:known], outputs[:known])
        factors = finite_differences(steps[:known], outputs[:known])[: order + 1]
        assert len(memory.factors) == len(factors) == min(known, order + 1)  # one order more with each full step
        for ours, theirs in zip(memory.factors, factors, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        for k in (1, 2, 5):
            expected = factors[0].clone()
            for j, faculty in enumerate([1, 2, 6][: len(factors) - 1], 1):
                expected += k**j / faculty * factors[j]
            found = Taylor(order).predict(memory, steps[known - 1] + k, outputs[0])
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_orders_build_up_one_per_full_step() -> None:
    """A parabola at even gaps: constant, then a line through two, then a curve."""
    outputs = [torch.full((1, 2, 2), float(t * t), dtype=torch.float64) for t in (0, 2, 4)]
    expected = [0.0, 4 + 1 * 2, 16 + 1 * 6 + 0.5 * 2]  # D_1 = 2, then 6; D_2 = (6 - 2) / 2
    for known, value in enumerate(expected, 1):
        memory = remember(Taylor(2), [0, 2, 4][:known], outputs[:known])
        assert Taylor(2).predict(memory, memory.steps[0] + 1, outputs[0])[0, 0, 0].item() == value


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_newton_is_exact_on_polynomials_at_uneven_gaps(order: int) -> None:
    coefficients = random(order + 1, 2, 3, 4)

    def curve(t: int) -> Tensor:
        return sum((c * float(t) ** j for j, c in enumerate(coefficients)), torch.zeros(2, 3, 4, dtype=torch.float64))

    newton = Taylor(order, "newton")
    memory = remember(newton, UNEVEN, [curve(t) for t in UNEVEN])
    for t in (11, 12, 17):
        torch.testing.assert_close(newton.predict(memory, t, curve(0)), curve(t), rtol=1e-9, atol=1e-9)


def test_taylor_is_not_exact_on_a_parabola_at_uneven_gaps() -> None:
    outputs = [torch.full((1, 1, 1), float(t * t), dtype=torch.float64) for t in UNEVEN]
    memory = remember(Taylor(2), UNEVEN, outputs)
    assert abs(Taylor(2).predict(memory, 17, outputs[0]).item() - 289) > 1
    # nor at even gaps, where k^2 / 2 stands for k (k + N) / 2
    outputs = [torch.full((1, 1, 1), float(t * t), dtype=torch.float64) for t in EVEN]
    assert abs(Taylor(2).predict(remember(Taylor(2), EVEN, outputs), 14, outputs[0]).item() - 196) > 1


@pytest.mark.parametrize("steps", [EVEN, UNEVEN])
def test_newton_of_order_one_is_taylor_of_order_one(steps: list[int]) -> None:
    outputs = [random(2, 3, 4, seed=s) for s in steps]
    found = [
        Taylor(1, kind).predict(remember(Taylor(1, kind), steps, outputs), 15, outputs[0])
        for kind in ("taylor", "newton")  # type: ignore[arg-type]
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], outputs[-1])


def test_reuse_is_the_last_output() -> None:
    outputs = [random(2, 3, 4, seed=s) for s in range(3)]
    memory = remember(Reuse(), [0, 1, 5], outputs)
    assert torch.equal(Reuse().predict(memory, 9, outputs[0]), outputs[2])
    assert memory.nbytes() == outputs[0].nbytes


# ---- RFE


def path(t: int, speeds: tuple[float, ...] = (1.0, 1.0)) -> Tensor:
    """Inputs (2, 5, 4) on a straight line, faster and faster."""
    moved = torch.tensor([t * s + 0.07 * s * t * t for s in speeds], dtype=torch.float64)
    return random(2, 5, 4, seed=1) + moved[:, None, None] * random(2, 5, 4, seed=2)


W = random(4, 4, seed=3)


@pytest.mark.parametrize("scope", SCOPES)
def test_rfe_is_exact_on_a_linear_map_and_a_straight_path(scope: Norm) -> None:
    """Proposition 1 of RFC: the output's change is as long as the input's, times a constant, at any speed."""
    steps = [0, 1, 4]
    inputs = [path(t) for t in steps]
    outputs = [x @ W for x in inputs]
    memory = remember(RFE(1, norm=scope), steps, outputs, inputs)
    taylor = remember(Taylor(1), steps, outputs)
    for t in (5, 6, 9):
        exact = path(t) @ W
        assert (RFE(1, norm=scope).predict(memory, t, path(t)) - exact).abs().max() < 1e-10
        assert (Taylor(1).predict(taylor, t, path(t)) - exact).abs().max() > 0.1


def test_one_norm_a_sample_serves_samples_of_different_speeds_and_one_for_all_does_not() -> None:
    """Speeds that change differently: sample 1 has stopped when sample 0 goes on."""
    steps = [0, 1, 4]
    inputs = [path(t, (1.0, 2.0)) for t in steps]
    outputs = [x @ W for x in inputs]
    now = torch.stack([path(7)[0], inputs[-1][1]])
    for scope, exact in (("sample", True), ("token", True), ("channel", True), ("batch", False)):
        rfe = RFE(1, norm=scope)  # type: ignore[arg-type]
        error = (rfe.predict(remember(rfe, steps, outputs, inputs), 7, now) - now @ W).abs().max()
        assert bool(error < 1e-10) == exact, scope


def test_rfe_is_taylor_until_there_were_two_full_computations() -> None:
    outputs, inputs = [random(2, 3, 4, seed=s) for s in range(3)], [random(2, 3, 4, seed=s) for s in range(5, 8)]
    one = remember(RFE(2), [0], outputs[:1], inputs[:1])
    assert one.ratio is None
    assert torch.equal(RFE(2).predict(one, 1, inputs[1]), outputs[0])
    two = remember(RFE(2), [0, 1], outputs[:2], inputs[:2])
    taylor = Taylor(2).predict(remember(Taylor(2), [0, 1], outputs[:2]), 2, inputs[2])
    assert not torch.allclose(RFE(2).predict(two, 2, inputs[2]), taylor)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("scope", SCOPES)
def test_rfe_is_the_published_formula_for_each_scope(scope: Norm, order: int) -> None:
    """Against a loop over samples, tokens or channels."""
    steps, shape = [0, 2, 5], (2, 3, 4)
    outputs, inputs = [random(*shape, seed=s) for s in range(3)], [random(*shape, seed=s) for s in range(5, 8)]
    now, k = random(*shape, seed=9), 2
    factors = finite_differences(steps, outputs)[: order + 1]
    change = k * factors[1] + (k * k / 2 * factors[2] if order == 2 else 0)

    cells: list[tuple[int | slice, ...]] = {
        "sample": [(b,) for b in range(2)],
        "token": [(b, n) for b in range(2) for n in range(3)],
        "channel": [(b, slice(None), c) for b in range(2) for c in range(4)],
        "batch": [()],
    }[scope]
    expected = outputs[-1].clone()
    for cell in cells:
        ratio = (outputs[-1] - outputs[-2])[cell].norm() / (inputs[-1] - inputs[-2])[cell].norm()
        expected[cell] += ratio * (now - inputs[-1])[cell].norm() * change[cell] / change[cell].norm()
        torch.testing.assert_close(norm_of(now, scope).expand(shape)[cell].flatten()[0], now[cell].norm())

    found = RFE(order, norm=scope).predict(remember(RFE(order, norm=scope), steps, outputs, inputs), 5 + k, now)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
def test_only_the_batch_norm_lets_a_sample_feel_the_others(scope: Norm) -> None:
    rfe, steps = RFE(1, norm=scope), [0, 2]

    def first(other: int) -> Tensor:
        """The forecast of sample 0 beside another."""
        outputs, inputs = ([random(1, 3, 4, seed=s) for s in seeds] for seeds in ((1, 2), (3, 4, 5)))
        beside = [random(1, 3, 4, seed=s + other) for s in range(5)]
        outputs = [torch.cat([x, y]) for x, y in zip(outputs, beside[:2], strict=True)]
        inputs = [torch.cat([x, y]) for x, y in zip(inputs, beside[2:], strict=True)]
        return rfe.predict(remember(rfe, steps, outputs, inputs[:2]), 4, inputs[2])[0]

    assert torch.equal(first(100), first(200)) == (scope != "batch")


# ---- numbers at the edge


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_moved_and_nothing_is_nan(scope: Norm, order: int, dtype: torch.dtype) -> None:
    """0 / 0 in the ratio, and 0 / 0 in the direction."""
    rfe, still = RFE(order, norm=scope), random(2, 3, 4, dtype=torch.float32).to(dtype)
    other = random(2, 3, 4, seed=1, dtype=torch.float32).to(dtype)
    unmoved = remember(rfe, [0, 1, 2], [still] * 3, [still] * 3)
    for now in (still, other):
        assert torch.equal(rfe.predict(unmoved, 3, now), still)
    stuck = remember(rfe, [0, 1, 2], [still] * 3, [still, other, still])  # the output alone stood still
    assert torch.equal(rfe.predict(stuck, 3, other), still)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_input_that_stood_still_says_nothing_and_taylor_holds(scope: Norm, dtype: torch.dtype) -> None:
    """The output moved without its input, as a padded token does: no ratio, and so no forecast without bounds."""
    rfe, still = RFE(1, norm=scope), random(2, 3, 4, dtype=torch.float32).to(dtype)
    outputs = [random(2, 3, 4, seed=s, dtype=torch.float32).to(dtype) for s in (1, 2)]
    memory = remember(rfe, [0, 1], outputs, [still, still])
    taylor = Taylor(1).predict(remember(Taylor(1), [0, 1], outputs), 2, still)
    for now in (still, random(2, 3, 4, seed=4, dtype=torch.float32).to(dtype)):
        found = rfe.predict(memory, 2, now)
        assert found.isfinite().all()
        assert (found - outputs[1]).norm() <= 1.01 * (taylor - outputs[1]).norm()


@pytest.mark.parametrize("forecast", [Reuse(), Taylor(2), Taylor(3, "newton"), RFE(2), RFE(1, norm="token")])
def test_bfloat16_stays_bfloat16(forecast: Forecast) -> None:
    tensors = [random(2, 3, 4, seed=s).to(torch.bfloat16) for s in range(4)]
    memory = remember(forecast, [0, 1, 2], tensors[:3])
    assert forecast.predict(memory, 4, tensors[3]).dtype == torch.bfloat16
    assert all(factor.dtype == torch.bfloat16 for factor in memory.factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_memory_is_order_plus_one_outputs_one_input_and_one_number_a_sample(order: int, dtype: torch.dtype) -> None:
    steps = list(range(6))
    outputs, inputs = [random(3, 5, 4).to(dtype) for _ in steps], [random(3, 5, 8).to(dtype) for _ in steps]
    found = remember(RFE(order), steps, outputs, inputs).nbytes()
    assert found == (order + 1) * outputs[0].nbytes + inputs[0].nbytes + 3 * 4
    assert remember(Taylor(order), steps, outputs, inputs).nbytes() == (order + 1) * outputs[0].nbytes


def test_restart_keeps_the_last_output_and_nothing_of_the_way_there() -> None:
    steps, outputs = [0, 1, 3], [random(2, 3, 4, seed=s) for s in range(3)]
    inputs, now = [random(2, 3, 4, seed=s) for s in range(5, 8)], random(2, 3, 4, seed=9)
    for forecast in (Taylor(2), Taylor(2, "newton"), RFE(2)):
        again = remember(forecast, steps, outputs, inputs).restart()
        assert torch.equal(forecast.predict(again, 4, now), outputs[-1])
        # the next full step finds what it would find after that one alone
        after = forecast.update(again, 5, outputs[0], inputs[0])
        fresh = remember(forecast, [3, 5], [outputs[2], outputs[0]], [inputs[2], inputs[0]])
        assert after.steps == fresh.steps
        assert torch.equal(forecast.predict(after, 7, now), forecast.predict(fresh, 7, now))
