"""Packed integers: exact bytes, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accuquant.core.numerics import QTYPES, QType
from accuquant.core.packing import pack, packed_columns, unpack

INTEGERS = [t for t in QTYPES.values() if t.floating is None]
every_type = pytest.mark.parametrize("qtype", INTEGERS, ids=lambda t: t.name)
narrow_type = pytest.mark.parametrize("qtype", [t for t in QTYPES.values() if t.bits < 8], ids=lambda t: t.name)


def random_integers(rows: int, columns: int, qtype: QType) -> Tensor:
    return torch.randint(qtype.qmin, qtype.qmax + 1, (rows, columns), generator=torch.Generator().manual_seed(columns))


@every_type
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 9, 15, 16, 31, 72, 129])
def test_roundtrip(qtype: QType, columns: int) -> None:
    q = random_integers(5, columns, qtype)
    packed = pack(q, qtype)
    assert packed.shape == (5, packed_columns(columns, qtype))
    found = unpack(packed, columns, qtype)
    assert found.dtype == torch.int8 and torch.equal(found.long(), q)
    assert torch.equal(pack(q.float(), qtype), packed)  # calibration's integers are floats


@every_type
def test_every_integer_survives_in_every_position(qtype: QType) -> None:
    values = torch.arange(qtype.qmin, qtype.qmax + 1)
    q = torch.stack([values.roll(k) for k in range(8)])
    assert torch.equal(unpack(pack(q, qtype), q.shape[1], qtype).long(), q)


def test_int4_layout_by_hand() -> None:
    """Shifted by 8, the first integer in the low four bits: -8, 7 -> 0x0, 0xF -> 0xF0; padding is 0 after the shift."""
    packed = pack(torch.tensor([[-8, 7, 0, -1, 1, -7, 3]]), QTYPES["int4"])
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[0xF0, 0x78, 0x19, 0x0B]]


def test_int3_layout_by_hand() -> None:
    """Shifted by 4: 0 1 2 3 4 5 6 7, three bits each from the lowest: 11|111|110 101|100|011|010|001|000 backwards."""
    packed = pack(torch.arange(-4, 4).view(1, 8), QTYPES["int3"])
    assert packed.tolist() == [[0b10001000, 0b11000110, 0b11111010]]


@narrow_type
@pytest.mark.parametrize("columns", [1, 8, 13, 64])
def test_a_row_is_one_little_endian_number(qtype: QType, columns: int) -> None:
    q = random_integers(3, columns, qtype)
    for row, packed in zip(q.tolist(), pack(q, qtype).tolist(), strict=True):
        number = sum((value - qtype.qmin) << (k * qtype.bits) for k, value in enumerate(row))
        assert bytes(packed) == number.to_bytes(len(packed), "little")


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [("int8", 13, 13), ("int6", 16, 12), ("int6", 17, 18), ("int4", 128, 64), ("int4", 129, 68), ("int3", 64, 24)],
)
def test_packed_columns(name: str, columns: int, expected: int) -> None:
    assert packed_columns(columns, QTYPES[name]) == expected


@every_type
@pytest.mark.parametrize("side", ["low", "high"])
def test_out_of_range_is_refused(qtype: QType, side: str) -> None:
    q = random_integers(3, 9, qtype)
    q[1, 4] = qtype.qmin - 1 if side == "low" else qtype.qmax + 1
    with pytest.raises(ValueError, match=rf"do not fit {qtype.name} \({qtype.qmin}\.\.{qtype.qmax}\)"):
        pack(q, qtype)


@every_type
def test_nan_is_refused(qtype: QType) -> None:
    """A scale that became NaN must not be exported as some integer."""
    with pytest.raises(ValueError, match=qtype.name):
        pack(torch.tensor([[1.0, float("nan")]]), qtype)


@every_type
@pytest.mark.parametrize("wrong", [-1, 1])
def test_wrong_number_of_bytes_is_refused(qtype: QType, wrong: int) -> None:
    packed = torch.zeros(2, packed_columns(24, qtype) + wrong, dtype=torch.int8 if qtype.bits == 8 else torch.uint8)
    with pytest.raises(ValueError, match=f"cannot hold 24 {qtype.name}"):
        unpack(packed, 24, qtype)
