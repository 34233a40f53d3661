"""Calibration data: what is held out is never calibrated on, and a broken line is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMPipeline
from pipelines import make_ddpm, make_pipeline, make_stable_diffusion

from accuquant.errors import RecipeError
from accuquant.pipeline.data import (
    Samples,
    Split,
    calibration_samples,
    draw,
    held_out_samples,
    load_split,
    validation_samples,
)
from accuquant.pipeline.rows import Row
from accuquant.recipe import Data

DIT, DDIM = make_pipeline(layers=1), DDIMPipeline(**make_ddpm().components)
EXAMPLES = '{"class_labels": 3} or {"prompt": "a fox"}'
TAKES = "its call takes class_labels, guidance_scale, num_inference_steps, output_type, return_dict"
CLASS = "one of this model's classes, 0 to 999"
NO_CLASSES = ("null", '"3"', "3.0", "-1", "1000", "true", "[3]")


def write(path: Path, values: list[Any], key: str = "class_labels") -> Path:
    path.write_text("".join(json.dumps({key: v}, ensure_ascii=False) + "\n" for v in values), encoding="utf-8")
    return path


def split(path: Path, pipeline: Any = DIT, **settings: Any) -> Split:
    return load_split(Data(path=str(path), **settings), pipeline)


def rows(*labels: int) -> list[Row]:
    return [{"class_labels": label} for label in labels]


def classes(found: list[Row]) -> list[int]:
    return [row["class_labels"] for row in found]


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_split_is_disjoint_complete_and_as_large_as_asked(tmp_path: Path, fraction: float) -> None:
    path = write(tmp_path / "d.jsonl", list(range(100)) * 2)
    found = split(path, held_out_fraction=fraction)
    assert not set(classes(found.calibration)) & set(classes(found.held_out))
    assert sorted(classes(found.calibration + found.held_out)) == list(range(100))
    assert found.folder == tmp_path and len(found.held_out) == round(100 * fraction)


def test_seed_decides_the_split(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", list(range(20)))
    assert split(path, seed=3) == split(path, seed=3)
    assert len({tuple(classes(split(path, seed=s).held_out)) for s in range(10)}) > 5


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    assert 5 not in classes((first := split(write(path, [1, 2, 3]))).calibration + first.held_out)
    second = split(write(path, [1, 2, 5]))
    assert 5 in classes(second.calibration + second.held_out)


def test_samples_go_round_the_classes_and_never_share_noise() -> None:
    found = Split(rows(1, 4, 7), rows(2, 5), Path())
    data = Data(path="x", num_samples=7, seed=2)
    calibration, held_out = calibration_samples(found, data), held_out_samples(found, data, 50)
    assert classes(calibration.rows) == [1, 4, 7, 1, 4, 7, 1]
    assert set(classes(held_out.rows)) == {2, 5}
    assert len(set(calibration.seeds + held_out.seeds)) == 57
    assert draw(rows(1), 3, 10).seeds == [10, 11, 12]


def test_samples_are_taken_in_batches_of_rows_with_their_seeds() -> None:
    samples = Samples(rows(1, 2, 3), [7, 8, 9])
    assert samples.batches(2) == [Samples(rows(1, 2), [7, 8]), Samples(rows(3), [9])]
    assert samples.first(2) == samples.batches(2)[0] and samples.first(9) == samples


@pytest.mark.parametrize("line", ["{}", '{"label": "bedroom"}', '{"eta": 1.0}'])
def test_an_unconditional_pipeline_has_one_row_and_holds_out_noise(tmp_path: Path, line: str) -> None:
    (tmp_path / "d.jsonl").write_text(f"{line}\n\n{line}\n")
    data = Data(path=str(tmp_path / "d.jsonl"), num_samples=7)
    found = load_split(data, DDIM)
    assert found.calibration == found.held_out == [json.loads(line)]
    drawn = [calibration_samples(found, data), validation_samples(found, data, 9), held_out_samples(found, data, 50)]
    assert [len(samples) for samples in drawn] == [7, 9, 50]
    assert len({seed for samples in drawn for seed in samples.seeds}) == 7 + 9 + 50


def test_the_shipped_row_of_nothing_is_for_unconditional_pipelines() -> None:
    assert split(Path("unconditional.jsonl"), DDIM).calibration == [{}]
    with pytest.raises(RecipeError, match=r"line 1 of .*unconditional\.jsonl is no row such as {\"class_labels\": 3}"):
        split(Path("unconditional.jsonl"))


def test_two_rows_of_an_unconditional_pipeline_are_split_as_any(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"eta": 0.0}\n{"eta": 1.0}\n')
    found = split(tmp_path / "d.jsonl", DDIM, held_out_fraction=0.5)
    assert len(found.calibration) == len(found.held_out) == 1 and found.calibration != found.held_out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; it needs lines such as {} (the pipeline is unconditional: "),
        ("3", "line 1 of {path} is no row such as {} (the pipeline is unconditional: "),
        ('{"prompt": "a"}', "line 1 of {path}: DDIMPipeline takes no 'prompt'; its call takes eta, "),
        ('{"etta": 1}', "line 1 of {path}: DDIMPipeline takes no 'etta' (did you mean 'eta'?); its call takes eta, "),
        ('{"batch_size": 2}', "line 1 of {path}: DDIMPipeline takes no 'batch_size' of a row: "),
        ('{"generator": 2}', "line 1 of {path}: DDIMPipeline takes no 'generator' of a row: "),
        ('{}\n{"eta": 1}', "line 2 of {path} has other keys than the lines before it, none: "),
    ],
)
def test_mistakes_in_rows_of_an_unconditional_pipeline(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(RecipeError) as caught:
        split(path, DDIM)
    assert message.replace("{path}", str(path)) in str(caught.value)


def test_prompts_may_hold_anything(tmp_path: Path) -> None:
    prompts = ["日本の狐", "a\u2028b", "🦊", 'say "x"', "a", "b"]
    found = split(write(tmp_path / "p.jsonl", prompts, "prompt"), make_stable_diffusion())
    assert sorted(row["prompt"] for row in found.calibration + found.held_out) == sorted(prompts)


def test_rows_may_say_more_than_one_thing(tmp_path: Path) -> None:
    """Rows are distinct if anything of them is, in whatever order they say it; nothing of them is lost."""
    lines = [
        {"prompt": "a", "height": 16},
        {"prompt": "a", "height": 24},
        {"height": 16, "prompt": "a"},
        {"prompt": "b", "height": 16},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = split(tmp_path / "d.jsonl", make_stable_diffusion(), held_out_fraction=0.34)
    assert len(found.calibration) == 2 and len(found.held_out) == 1
    assert all(row in found.calibration + found.held_out for row in lines)


def test_classes_go_by_either_name_and_may_be_told_in_words(tmp_path: Path) -> None:
    former = split(write(tmp_path / "d.jsonl", [1, 2], "class_id"), held_out_fraction=0.5)
    assert sorted(row["class_id"] for row in former.calibration + former.held_out) == [1, 2]
    (tmp_path / "w.jsonl").write_text('{"class_labels": 1, "label": "one"}\n{"class_labels": 2, "label": "two"}\n')
    assert sorted(classes((found := split(tmp_path / "w.jsonl")).calibration + found.held_out)) == [1, 2]


def test_byte_order_mark_and_blank_lines_are_no_data(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"class_labels": 1}\r\n\r\n  \n{"class_labels": 2}\n\n')
    assert sorted(classes(split(path).calibration + split(path).held_out)) == [1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"class_labels": ', ' is not JSON (Expecting value): {"class_labels":'),
        ("class_labels,label", " is not JSON (Expecting value): class_labels,label"),
        ('{"label": "x"}', ': it says nothing that the pipeline could be called with: {"label": "x"}'),
        ("{}", f" is no row such as {EXAMPLES}: {{}}"),
        ("[3]", f" is no row such as {EXAMPLES}: [3]"),
        ('{"class_labels": 3, "prompt": "a"}', f": DiTPipeline takes no 'prompt'; {TAKES}: "),
        ('{"class_label": 3}', f": DiTPipeline takes no 'class_label' (did you mean 'class_labels'?); {TAKES}: "),
        ('{"class_labels": 3, "guidance_scale": 2}', " has other keys than the lines before it, class_labels: "),
        ('{"class_id": 3}', " has other keys than the lines before it, class_labels: "),
        *(
            (f'{{"class_labels": {value}}}', f": class_labels must be {CLASS} (found {json.loads(value)!r}): ")
            for value in NO_CLASSES
        ),
        ('{"class_id": -1}', f": class_id must be {CLASS} (found -1): "),
    ],
)
def test_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "d.jsonl", [1, 2])
    path.write_text(path.read_text() + "\n" + line + "\n" + '{"class_labels": 9}\n')
    with pytest.raises(RecipeError) as caught:
        split(path)
    whole = message + line if message.endswith(": ") else message
    assert str(caught.value) == f"data.path: line 4 of {path}{whole}"


def test_a_class_of_a_model_that_does_not_say_how_many_it_has(tmp_path: Path) -> None:
    pipeline = make_pipeline(layers=1)
    pipeline.transformer.register_to_config(num_embeds_ada_norm=None)
    with pytest.raises(RecipeError, match=r"line 2 of .*: class_labels must be a whole number from 0 on \(found -1\)"):
        split(write(tmp_path / "d.jsonl", [5000, -1]), pipeline)


def test_prompt_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"line 2 of .* prompt must be text: {\"prompt\": 3}"):
        split(write(tmp_path / "p.jsonl", ["a", 3], "prompt"), make_stable_diffusion())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; it needs lines such as"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (
            b'{"class_labels": 3}\n' * 5,
            "of the 1 distinct rows in .* leaves 1 to calibrate on and 0 to judge by",
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
