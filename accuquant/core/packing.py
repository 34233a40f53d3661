"""Storage of narrow integers: one layout for every width below eight bits.

Rows are packed along their last dimension as a little-endian bit stream: each integer is shifted to be unsigned
(``u = q - qmin``), eight of them fill ``bits`` bytes, the first in the lowest bits. At four bits this is the usual "two
to a byte, low nibble first". A row is padded with zeros of the unsigned form to a multiple of eight integers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from accuquant.core.numerics import QType


def packed_columns(columns: int, qtype: QType) -> int:
    """Bytes that one row of ``columns`` integers takes."""
    return columns if qtype.bits == 8 else -(-columns // 8) * qtype.bits


def pack(q: Tensor, qtype: QType) -> Tensor:
    """(R, K) numbers in [qmin, qmax] -> (R, packed_columns) uint8; eight-bit types are (R, K) of their own type.

    Raises:
        ValueError: a value lies outside the type's range.
    """
    if not bool(((q >= qtype.qmin) & (q <= qtype.qmax)).all()):  # NaN fits nowhere
        found = f"{float(q.min()):g}..{float(q.max()):g}"
        raise ValueError(f"values {found} do not fit {qtype.name} ({qtype.qmin}..{qtype.qmax})")
    if qtype.bits == 8:
        return q.to(qtype.storage)
    rows, columns = q.shape
    u = torch.zeros(rows, -(-columns // 8) * 8, dtype=torch.int64, device=q.device)
    u[:, :columns] = q.to(torch.int64) - qtype.qmin
    u = u.view(rows, -1, 8)
    word = torch.zeros(u.shape[:2], dtype=torch.int64, device=q.device)
    for k in range(8):
        word |= u[..., k] << (k * qtype.bits)
    return torch.stack([(word >> (8 * byte)) & 0xFF for byte in range(qtype.bits)], -1).view(rows, -1).to(torch.uint8)


def unpack(packed: Tensor, columns: int, qtype: QType) -> Tensor:
    """Inverse of `pack`: (R, packed_columns) -> (R, columns) int8, or small floats.

    Raises:
        ValueError: the number of bytes per row does not belong to ``columns``.
    """
    if packed.shape[1] != packed_columns(columns, qtype):
        raise ValueError(f"{packed.shape[1]} bytes a row cannot hold {columns} {qtype.name} values")
    if qtype.bits == 8:
        return packed
    if qtype.bits == 4:  # each byte to two: both nibbles into a 16-bit word, the first in its low byte
        word = packed.to(torch.int16)
        u = (word << 4).bitwise_or_(word).bitwise_and_(0x0F0F).view(torch.int8).add_(qtype.qmin)
        return u[:, :columns].contiguous()
    size = 8 // math.gcd(8, qtype.bits)  # as few integers as fill whole bytes: a word of at most 24 bits
    bytes_ = packed.view(packed.shape[0], -1, size * qtype.bits // 8).to(torch.int32)
    word = bytes_[..., 0].clone()
    for byte in range(1, bytes_.shape[-1]):
        word |= bytes_[..., byte] << (8 * byte)
    mask = (1 << qtype.bits) - 1
    u = torch.stack([(word >> (k * qtype.bits)) & mask for k in range(size)], -1).view(packed.shape[0], -1)
    return (u[:, :columns] + qtype.qmin).to(torch.int8)
