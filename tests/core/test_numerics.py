"""Fake quantization, scales, AdaRound and integer products against arithmetic written down a second time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from accuquant.core import rounding
from accuquant.core.numerics import (
    QTYPES,
    QType,
    dequantize,
    dynamic_scale,
    fake_quantize,
    lsq_gradient_scale,
    quantize,
    range_to_scale,
    search_scale,
)
from accuquant.kernels import integers
from accuquant.kernels.integers import integer_linear

INTEGERS = [t for t in QTYPES.values() if t.floating is None]
every_type = pytest.mark.parametrize("qtype", INTEGERS, ids=lambda t: t.name)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def straightforward(x: Tensor, scale: Tensor, zero: Tensor, qtype: QType) -> Tensor:
    """Quantize and dequantize out of autograd's own pieces, with a straight-through round."""
    v = x / scale
    rounded = v.round().detach() + (v - v.detach())
    return (torch.clamp(rounded + zero, qtype.qmin, qtype.qmax) - zero) * scale


def squared_error(rows: Tensor, scale: Tensor, zero: Tensor, qtype: QType) -> Tensor:
    q = torch.clamp(torch.round(rows / scale) + zero, qtype.qmin, qtype.qmax)
    return ((q - zero) * scale - rows).square().sum(1)


def test_types_are_twos_complement() -> None:
    assert {t.name: (t.qmin, t.qmax) for t in INTEGERS} == {
        "int8": (-128, 127),
        "int6": (-32, 31),
        "int4": (-8, 7),
        "int3": (-4, 3),
    }


@every_type
def test_forward_is_what_python_computes(qtype: QType) -> None:
    """Value by value in plain Python, ties to even among them; the same as quantize followed by dequantize."""
    scale, zero = 0.25, qtype.qmin + 2
    x = torch.arange(-3 - 2, 2**qtype.bits + 3, 0.5, dtype=torch.float64) * scale
    x = torch.cat([x, x + randn(len(x)) * scale / 4])
    expected = [(min(max(round(v / scale) + zero, qtype.qmin), qtype.qmax) - zero) * scale for v in x.tolist()]
    s, z = torch.tensor(scale, dtype=torch.float64), torch.tensor(float(zero), dtype=torch.float64)
    found = fake_quantize(x, s, z, qtype)
    assert found.tolist() == expected
    assert torch.equal(found, dequantize(quantize(x, s, z, qtype), s, z))
    assert len(set(expected)) == 2**qtype.bits  # every integer of the type was needed, both ends included


@every_type
@pytest.mark.parametrize("shape", [(5, 1), (1,), (), (5, 40)], ids=["row", "one", "scalar", "element"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_gradients_equal_autograd(qtype: QType, shape: tuple[int, ...], asymmetric: bool) -> None:
    x = (randn(5, 40) * 2**qtype.bits / 4).requires_grad_()  # some beyond both ends
    scale = (randn(*shape, seed=1).abs() * 0.3 + 0.8).requires_grad_()
    zero = torch.full(shape, float(qtype.qmin + 1 if asymmetric else 0), dtype=torch.float64)
    weights = randn(5, 40, seed=2)
    value, expected = fake_quantize(x, scale, zero, qtype), straightforward(x, scale, zero, qtype)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad((value * weights).sum(), (x, scale))
    wanted = torch.autograd.grad((expected * weights).sum(), (x, scale))
    assert 0 < int((wanted[0] == 0).sum()) < x.numel()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@every_type
def test_scale_gradient_is_lsq_equation_3(qtype: QType) -> None:
    """qmin below the range, qmax above it, round(v) - v inside."""
    scale, zero = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    low, high = qtype.qmin, qtype.qmax
    v = torch.tensor([low - 3.2, low + 0.3, -0.4, 0.7, high - 0.2, high + 9.0], dtype=torch.float64)
    expected = [low, -0.3, 0.4, 0.3, 0.2, high]
    scales = scale.repeat(6).requires_grad_()
    fake_quantize(v * scale, scales, zero, qtype).sum().backward()
    assert scales.grad is not None and scales.grad.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", [(), (512, 1)], ids=["one", "row"])
def test_scale_gradient_keeps_its_digits_in_float32(shape: tuple[int, ...]) -> None:
    """A gradient that points along x: sums of grad * q and of grad * v are huge and nearly equal."""
    x = randn(512, 512).float()
    scale, zero = torch.full(shape, 0.05), torch.zeros(shape)  # clips nothing
    gradients = []
    for dtype in (torch.float32, torch.float64):
        s = scale.clone().to(dtype).requires_grad_()
        fake_quantize(x.to(dtype), s, zero.to(dtype), QTYPES["int8"]).backward(x.to(dtype))
        assert s.grad is not None
        gradients.append(s.grad.double())
    # rounding errors are spread evenly over one step, so the gradient's size is about 0.29 |x|: one percent of that
    assert float((gradients[0] - gradients[1]).norm()) < 0.003 * float(x.norm())


def test_clipped_values_pass_no_gradient_and_a_frozen_scale_gets_none() -> None:
    x = torch.tensor([-9.0, -8.4, 0.2, 7.4, 7.6], requires_grad=True)
    scale = torch.tensor(1.0)
    fake_quantize(x, scale, torch.tensor(0.0), QTYPES["int4"]).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0] and scale.grad is None


@every_type
def test_lsq_gradient_scale(qtype: QType) -> None:
    assert lsq_gradient_scale(50, qtype) == pytest.approx(1 / math.sqrt(50 * qtype.qmax))


def test_dynamic_scale_belongs_to_each_token_alone() -> None:
    x = randn(2, 3, 16)
    qtype = QTYPES["int8"]
    scale = dynamic_scale(x, qtype)
    assert scale.flatten().tolist() == pytest.approx([max(map(abs, token)) / 127 for token in x.view(6, 16).tolist()])
    louder = x.clone()
    louder[0, 1] *= 1000
    changed = dynamic_scale(louder, qtype) != scale
    assert changed.flatten().tolist() == [False, True, False, False, False, False]
    torch.testing.assert_close(dynamic_scale(x, qtype, 0.5), scale / 2)
    assert bool((quantize(x, scale, 0, qtype).abs().amax(-1) == 127).all())  # the greatest value takes the last integer


def test_dynamic_scale_trains_its_clip_ratio_only() -> None:
    x, ratio = randn(4, 8).requires_grad_(), torch.ones(1, dtype=torch.float64, requires_grad=True)
    dynamic_scale(x, QTYPES["int4"], ratio).sum().backward()
    assert x.grad is None
    assert ratio.grad is not None and float(ratio.grad) == pytest.approx(float(x.detach().abs().amax(1).sum()) / 7)


@every_type
@pytest.mark.parametrize("symmetric", [True, False])
def test_range_covers_its_ends_and_holds_zero_exactly(qtype: QType, symmetric: bool) -> None:
    """Ranges to both sides of zero, on one side of it, and empty."""
    special = torch.tensor([[0.0, 0.0], [2.0, 2.0], [-3.0, -3.0], [0.0, 5.0]], dtype=torch.float64)
    low, high = torch.cat([randn(200, 2).sort(1).values * 10, special]).split(1, 1)
    scale, zero = range_to_scale(low, high, qtype, symmetric)
    assert bool((scale > 0).all()) and torch.equal(zero, zero.round())
    assert bool(((zero >= qtype.qmin) & (zero <= qtype.qmax)).all()) and (not symmetric or not bool(zero.any()))
    assert not bool(fake_quantize(torch.zeros_like(low), scale, zero, qtype).any())
    # symmetric ranges end at -qmax on both sides, so half a step is all that can be lost
    for end in (low, high):
        assert bool(((fake_quantize(end, scale, zero, qtype) - end).abs() <= 0.5 * scale * (1 + 1e-9)).all())
    below, above = -low.clamp_max(0), high.clamp_min(0)
    width = 2 * torch.maximum(below, above) if symmetric else below + above
    used = width / scale
    steps = 2 * qtype.qmax if symmetric else 2**qtype.bits - 1
    assert bool((used[width > 0] > steps - 1e-6).all())  # no wider than needed


@every_type
@pytest.mark.parametrize("symmetric", [True, False])
def test_search_is_close_to_brute_force(qtype: QType, symmetric: bool) -> None:
    """Never worse than the full range, and as good as the best of 800 shrunken ranges: within 2 %.

    At eight bits the error hardly depends on the range and jumps from one to the next: within 10 %.
    """
    rows = torch.cat([randn(6, 512), randn(4, 512, seed=1).exp(), randn(4, 512, seed=2) ** 3])
    low, high = rows.amin(1, keepdim=True).clamp_max(0), rows.amax(1, keepdim=True).clamp_min(0)

    def full(shrink: float) -> Tensor:
        if symmetric:
            scale = torch.maximum(high, -low) * shrink / qtype.qmax
            return squared_error(rows, scale, torch.zeros_like(scale), qtype)
        scale = (high - low) * shrink / (2**qtype.bits - 1)
        return squared_error(rows, scale, qtype.qmin - torch.round(low * shrink / scale), qtype)

    best = torch.stack([full(k / 1000) for k in range(200, 1001)]).amin(0)
    found = squared_error(rows, *search_scale(rows, qtype, symmetric), qtype)
    unsearched = squared_error(rows, *search_scale(rows, qtype, symmetric, search=False), qtype)
    torch.testing.assert_close(unsearched, full(1.0))
    assert bool((found <= unsearched).all())
    assert float((found / best).max()) < (1.1 if qtype.bits == 8 else 1.02)
    if qtype.bits <= 4:
        assert float((found / unsearched).mean()) < 0.9  # searching is worth something


@pytest.mark.parametrize("symmetric", [True, False])
def test_search_treats_rows_apart(symmetric: bool) -> None:
    rows = randn(6, 40)
    together = search_scale(rows, QTYPES["int4"], symmetric)
    alone = [search_scale(rows[i : i + 1], QTYPES["int4"], symmetric) for i in range(6)]
    for k in range(2):
        assert torch.equal(together[k], torch.cat([pair[k] for pair in alone]))


@every_type
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
def test_zero_rows_stay_zero(qtype: QType, symmetric: bool, search: bool) -> None:
    rows = torch.stack([torch.zeros(16), torch.full((16,), 1e-30), torch.ones(16), -torch.ones(16)]).requires_grad_()
    scale, zero = search_scale(rows.detach(), qtype, symmetric, search)
    scale.requires_grad_()
    value = fake_quantize(rows, scale, zero, qtype)
    value.square().sum().backward()
    assert rows.grad is not None and scale.grad is not None
    assert all(bool(t.isfinite().all()) for t in (value, rows.grad, scale.grad, scale.detach().log()))
    torch.testing.assert_close(value.detach(), rows.detach(), rtol=1e-6, atol=1e-8)
    assert not bool(value[0].any())


def test_zero_tokens_have_a_scale_that_divides() -> None:
    tokens = torch.zeros(3, 8)
    scale = dynamic_scale(tokens, QTYPES["int4"])
    assert torch.equal(fake_quantize(tokens, scale, torch.zeros(1), QTYPES["int4"]), tokens)


def test_rectified_sigmoid_reaches_both_ends() -> None:
    """It leaves 0 where sigmoid passes 1/12 and reaches 1 at 11/12; half at zero."""
    edge = math.log(11)  # sigmoid(edge) = 11/12
    logits = torch.tensor([-30, -edge - 1e-6, -edge + 1e-3, 0, edge - 1e-3, edge + 1e-6, 30], dtype=torch.float64)
    h = rounding.rectified_sigmoid(logits).tolist()
    assert h[:2] == [0, 0] and h[5:] == [1, 1] and h[3] == pytest.approx(0.5)
    assert 0 < h[2] < 1e-3 and 1 - 1e-3 < h[4] < 1


@every_type
def test_adaround_starts_at_the_float_weight(qtype: QType) -> None:
    weight, scale = randn(6, 32), randn(6, 1, seed=1).abs() * 0.1 + 0.05
    weight[0, :3] = scale[0] * torch.tensor([2.0, -3.0, 0.0], dtype=torch.float64)  # already on the grid
    soft = torch.floor(weight / scale) + rounding.rectified_sigmoid(rounding.initial_logits(weight, scale))
    torch.testing.assert_close(soft * scale, weight, rtol=0, atol=1e-12)


def test_regulariser_is_zero_when_decided_and_one_when_torn() -> None:
    decided = torch.tensor([9.0, -9.0, 4.0, -2.5], dtype=torch.float64)
    assert all(float(rounding.regulariser(decided, beta)) == 0 for beta in (2.0, 7.0, 20.0))
    assert float(rounding.regulariser(torch.zeros(5), 2.0)) == pytest.approx(1)
    h = 0.75  # 1 - |2 h - 1|^3 = 1 - 1/8
    p = (h + 0.1) / 1.2
    assert float(rounding.regulariser(torch.tensor([math.log(p / (1 - p))]), 3.0)) == pytest.approx(0.875)
    # a mean over weights: deciding half of them halves it
    assert float(rounding.regulariser(torch.tensor([0.0, 9.0]), 2.0)) == pytest.approx(0.5)


def test_regulariser_alone_rounds_to_nearest() -> None:
    """Its gradient is right (finite differences) and moves every weight to the end that was nearer."""
    weight, scale = randn(4, 16), torch.tensor(0.3, dtype=torch.float64)
    logits = rounding.initial_logits(weight, scale).requires_grad_()
    clear = (weight / scale - torch.floor(weight / scale) - 0.5).abs() > 0.02
    torch.autograd.gradcheck(lambda v: rounding.regulariser(v, 3.0), logits, atol=1e-7)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        rounding.regulariser(logits, 2.0).backward()
        optimizer.step()
    q = torch.floor(weight / scale) + rounding.rectified_sigmoid(logits.detach())
    assert torch.equal(q[clear], torch.round(weight / scale)[clear])


def test_beta_falls_from_20_to_2_after_the_warmup() -> None:
    assert rounding.annealed_beta(0.0) is None and rounding.annealed_beta(0.199) is None
    assert [rounding.annealed_beta(p) for p in (0.2, 0.4, 0.6, 1.0)] == pytest.approx([20, 15.5, 11, 2])
    assert rounding.annealed_beta(0.5, start=8, end=4, warmup=0.0) == pytest.approx(6)


# ---- integer products


def random_integers(rows: int, columns: int, qtype: QType, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(qtype.qmin, qtype.qmax + 1, (rows, columns), generator=generator).to(torch.int8)


def product(qx: Tensor, sx: Tensor, zx: int, qw: Tensor, sw: Tensor, zw: Tensor | None) -> Tensor:
    """The dequantized matrices, multiplied in float64; scales laid out column by column."""
    size = math.ceil(qw.shape[1] / sw.shape[1])
    group = torch.arange(qw.shape[1]) // size
    zero = 0 if zw is None else zw.double()[:, group]
    weight = (qw.double() - zero) * sw.double()[:, group]
    return ((qx.double() - zx) * sx.double()) @ weight.T


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("x_zero", [0, -128, 127, 5])
@pytest.mark.parametrize(("columns", "groups"), [(96, 1), (96, 3), (96, 12), (10, 3), (7, 7), (33, 2)])
@pytest.mark.parametrize("per_token", [False, True], ids=["static", "dynamic"])
def test_integer_linear_is_the_product_of_the_dequantized(
    asymmetric: bool, x_zero: int, columns: int, groups: int, per_token: bool
) -> None:
    """Also with a last group that is shorter: (10, 3) is 4 + 4 + 2 columns, (33, 2) is 17 + 16."""
    int8 = QTYPES["int8"]
    qx, qw = random_integers(9, columns, int8, 0), random_integers(14, columns, int8, 1)
    sw = (randn(14, groups).abs() + 0.01).float()
    zw = random_integers(14, groups, int8, 2) if asymmetric else None
    sx = (randn(9, 1).abs() + 0.01).float() if per_token else torch.tensor(0.037)
    found = integer_linear(qx, sx, torch.tensor([x_zero]) if x_zero else None, qw, sw, zw)
    assert found.dtype == torch.float32
    assert relative(found, product(qx, sx, x_zero, qw, sw, zw)) < 1e-6


@pytest.mark.parametrize("columns", [1, 2, 8192])
@pytest.mark.parametrize(
    ("x", "x_zero", "w", "w_zero"), [(127, -128, 127, -128), (-128, 127, 127, -128), (-128, 0, -128, None)]
)
def test_integer_linear_at_the_ends_of_the_range(columns: int, x: int, x_zero: int, w: int, w_zero: int | None) -> None:
    """Every factor 255 (or 128), in long rows too: int32 holds the sum."""
    qx, qw = torch.full((3, columns), x, dtype=torch.int8), torch.full((5, columns), w, dtype=torch.int8)
    sw = torch.full((5, 1), 2.0**-7)
    zw = None if w_zero is None else torch.full((5, 1), w_zero, dtype=torch.int8)
    expected = columns * (x - x_zero) * (w - (w_zero or 0)) * 2.0**-7 * 0.5
    found = integer_linear(qx, torch.tensor(0.5), torch.tensor([x_zero]), qw, sw, zw)
    assert float((found / expected - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("floats", [False, True], ids=["integers", "floats"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 64), (9, 1024), (5, 2100), (40, 4097)])
def test_products_are_exact_on_every_cpu(
    floats: bool, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's integers, or by float32 where a CPU without VNNI saturates; greatest products among them."""
    if floats:
        monkeypatch.setattr(integers, "int_mm_is_exact", lambda: False)
    a, b = random_integers(rows, columns, QTYPES["int8"], 0), random_integers(14, columns, QTYPES["int8"], 1)
    a[0], b[0], b[1], b[2] = -128, -128, 127, (127 - 255 * (torch.arange(columns) % 2)).to(torch.int8)
    found = integers.integer_product(a, b)
    assert found.dtype == torch.int32 and torch.equal(found.long(), a.long() @ b.long().t())


def test_integer_linear_subtracts_exactly() -> None:
    """Large products that cancel leave what float32 accumulation would lose."""
    columns = 4096
    qx = torch.full((1, columns), 127, dtype=torch.int8)
    qw = torch.tensor([127, -127], dtype=torch.int8).repeat(1, columns // 2)
    qw[0, 0] = 126
    assert float(integer_linear(qx, torch.tensor(1.0), None, qw, torch.ones(1, 1), None)) == -127
