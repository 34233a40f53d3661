"""Calibration data: what is held out is never calibrated on, and a broken line is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from accuquant.errors import RecipeError
from accuquant.pipeline.data import Split, calibration_samples, draw, held_out_samples, load_split
from accuquant.recipe import Data


def write(path: Path, values: list[Any], key: str = "class_id") -> Path:
    path.write_text("".join(json.dumps({key: v}, ensure_ascii=False) + "\n" for v in values), encoding="utf-8")
    return path


def split(path: Path, key: str = "class_id", **settings: Any) -> Split:
    return load_split(Data(path=str(path), **settings), key)


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_split_is_disjoint_complete_and_as_large_as_asked(tmp_path: Path, fraction: float) -> None:
    path = write(tmp_path / "d.jsonl", list(range(100)) * 2)
    found = split(path, held_out_fraction=fraction)
    assert not set(found.calibration) & set(found.held_out)
    assert sorted(found.calibration + found.held_out) == list(range(100))
    assert len(found.held_out) == round(100 * fraction)


def test_seed_decides_the_split(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", list(range(20)))
    assert split(path, seed=3) == split(path, seed=3)
    assert len({tuple(split(path, seed=s).held_out) for s in range(10)}) > 5


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    assert 5 not in (first := split(write(path, [1, 2, 3]))).calibration + first.held_out
    second = split(write(path, [1, 2, 5]))
    assert 5 in second.calibration + second.held_out


def test_samples_go_round_the_classes_and_never_share_noise() -> None:
    found = Split([1, 4, 7], [2, 5])
    data = Data(path="x", num_samples=7, seed=2)
    calibration, held_out = calibration_samples(found, data), held_out_samples(found, data, 50)
    assert calibration.inputs == [1, 4, 7, 1, 4, 7, 1]
    assert set(held_out.inputs) == {2, 5}
    assert len(set(calibration.seeds + held_out.seeds)) == 57
    assert draw([1], 3, 10).seeds == [10, 11, 12]


def test_prompts_may_hold_anything(tmp_path: Path) -> None:
    prompts = ["日本の狐", "a\u2028b", "🦊", 'say "x"', "a", "b"]
    found = split(write(tmp_path / "p.jsonl", prompts, "prompt"), "prompt")
    assert sorted(found.calibration + found.held_out) == sorted(prompts)


def test_byte_order_mark_and_blank_lines_are_no_data(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"class_id": 1}\r\n\r\n  \n{"class_id": 2}\n\n')
    assert sorted(split(path).calibration + split(path).held_out) == [1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"class_id": ', ' is not JSON (Expecting value): {"class_id":'),
        ("class_id,label", " is not JSON (Expecting value): class_id,label"),
        ('{"label": "x"}', ' has no \'class_id\', which this model is conditioned on: {"label": "x"}'),
        ("[3]", " has no 'class_id', which this model is conditioned on: [3]"),
        ('{"class_id": null}', ': class_id must be a whole number from 0 on: {"class_id": null}'),
        ('{"class_id": "3"}', ': class_id must be a whole number from 0 on: {"class_id": "3"}'),
        ('{"class_id": 3.0}', ': class_id must be a whole number from 0 on: {"class_id": 3.0}'),
        ('{"class_id": -1}', ': class_id must be a whole number from 0 on: {"class_id": -1}'),
        ('{"class_id": true}', ': class_id must be a whole number from 0 on: {"class_id": true}'),
        ('{"class_id": [3]}', ': class_id must be a whole number from 0 on: {"class_id": [3]}'),
    ],
)
def test_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "d.jsonl", [1, 2])
    path.write_text(path.read_text() + "\n" + line + "\n" + '{"class_id": 9}\n')
    with pytest.raises(RecipeError) as caught:
        split(path)
    assert str(caught.value) == f"data.path: line 4 of {path}{message}"


def test_prompt_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"line 2 of .* prompt must be text: {\"prompt\": 3}"):
        split(write(tmp_path / "p.jsonl", ["a", 3], "prompt"), "prompt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; it needs lines such as"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (
            b'{"class_id": 3}\n' * 5,
            "of the 1 distinct class_id values in .* leaves 1 to calibrate on and 0 to judge by",
        ),
    ],
)
def test_file_that_cannot_be_split(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        split(path)


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_both_parts_need_a_class(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(RecipeError, match=r"data\.held_out_fraction: .* both need at least one"):
        split(write(tmp_path / "d.jsonl", [1, 2, 3]), held_out_fraction=fraction)


def test_missing_file_names_its_key_and_the_nearest_shipped_one() -> None:
    with pytest.raises(RecipeError, match=r"data\.path: no file 'digit\.jsonl' \(did you mean 'digits\.jsonl'\?\)"):
        split(Path("digit.jsonl"))
