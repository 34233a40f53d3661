"""A recorder's tapes are the pipeline's own runs, and what it keeps of them makes them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from helpers import decoder_input, dit_tapes, finals, recorded_finals
from PIL import Image
from pipelines import make_ldm, make_pipeline, make_pixart, make_stable_diffusion
from torch import nn

from accuquant.errors import RecipeError
from accuquant.files import KeptFiles
from accuquant.pipeline.data import Samples
from accuquant.pipeline.loading import set_scheduler
from accuquant.pipeline.recorder import Recorder
from accuquant.pipeline.tape import Tape
from accuquant.progress import Reporter
from accuquant.recipe import Sampling

QUIET = Reporter(quiet=True)
SCHEDULERS = ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]


# ---- what a tape holds


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("learned_variance", [False, True])
def test_final_latents_are_what_the_pipeline_hands_to_its_decoder(
    scheduler: str, guidance: float, learned_variance: bool
) -> None:
    pipeline = make_pipeline(learned_variance=learned_variance)
    set_scheduler(pipeline, scheduler)
    tapes = dit_tapes(pipeline, 7, guidance, (1, 2, 3))
    sampling = Sampling(num_inference_steps=7, guidance_scale=guidance)
    expected = decoder_input(pipeline, [1, 2, 3], [0, 1, 2], sampling).flatten(1)
    assert len(tapes) == 1 and len(tapes[0]) == 7 and tapes[0].num_samples == 3
    assert torch.equal(recorded_finals(tapes), expected)
    assert torch.equal(finals(tapes), expected)


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_those_of_a_text_pipeline_too(scheduler: str, guidance: float) -> None:
    """PixArt: prompts, the unconditional half first, learned variance, noise scaled by the scheduler."""
    pipeline = make_pixart()
    set_scheduler(pipeline, scheduler)
    prompts, seeds = ["a red cat", "photo of the dog"], [1, 2]
    samples = Samples([{"prompt": prompt} for prompt in prompts], seeds)
    tape = Recorder(pipeline, Sampling(num_inference_steps=5, guidance_scale=guidance)).tape(samples)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    expected = pipeline(
        prompts, num_inference_steps=5, guidance_scale=guidance, generator=generators, output_type="latent"
    ).images
    assert torch.equal(recorded_finals([tape]), expected.flatten(1))
    assert torch.equal(finals([tape]), expected.flatten(1))


def test_unknown_scheduler_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="DDIMScheduler"):
        set_scheduler(make_pipeline(), "DDIMSheduler")


def test_what_the_pipeline_refuses_is_said_with_the_sample_and_the_setting() -> None:
    """More steps than the model was trained with, say."""
    pipeline = make_pipeline()
    pipeline.scheduler = DDIMScheduler(num_train_timesteps=8, clip_sample=False)
    with pytest.raises(RecipeError, match=r"DiTPipeline cannot be run with \{'class_labels': 1\} at .*10.*: .* 8 "):
        dit_tapes(pipeline, 10)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """Its noise and its class are the same, to the last bit; sums in its networks need not be."""
    pipeline, labels = make_pipeline(), (1, 2, 3, 4, 5)
    whole, pieces = (dit_tapes(pipeline, 4, labels=labels, batch_size=size) for size in (5, 2))
    assert [tape.num_samples for tape in pieces] == [2, 2, 1]
    starts = [torch.cat([tape.per_sample(tape.state(0)) for tape in tapes]) for tapes in (whole, pieces)]
    assert torch.equal(*starts)
    torch.testing.assert_close(recorded_finals(pieces), recorded_finals(whole), rtol=1e-3, atol=1e-4)


def test_rehearsed_it_has_all_but_values_for_one_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make_pipeline()
    recorder = Recorder(pipeline, Sampling(num_inference_steps=6, guidance_scale=1.5))
    samples = Samples([{"class_labels": 1}], [0])
    tape, calls = recorder.tape(samples), counted(pipeline.transformer, monkeypatch)
    rehearsed = recorder.tape(samples, rehearsed=True)
    assert calls == [1] and len(rehearsed) == len(tape) and rehearsed.nbytes == tape.nbytes


# ---- batches


def image_to_image() -> Any:
    parts = make_stable_diffusion().components | {"image_encoder": None}
    pipeline = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_rows_that_differ_in_what_is_one_for_a_whole_call_are_called_one_by_one() -> None:
    pipeline = make_stable_diffusion()
    recorder = Recorder(pipeline, Sampling(num_inference_steps=3, guidance_scale=2.0))
    same = Samples([{"prompt": p, "height": 16, "width": 16} for p in "abc"], [1, 2, 3])
    assert [len(batch) for batch in recorder.batches(same, 2)] == [2, 1]
    other = Samples([row | {"height": 16 + 8 * k} for k, row in enumerate(same.rows)], same.seeds)
    tapes = [recorder.tape(batch) for batch in recorder.batches(other, 2)]
    assert [tape.num_samples for tape in tapes] == [1, 1, 1]
    assert [tape.state(0).latents[0].shape[2:] for tape in tapes] == [(8, 8), (12, 8), (16, 8)]
    with torch.no_grad():
        expected = pipeline(
            **other.rows[1],
            num_inference_steps=3,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(2),
            output_type="latent",
        ).images
    assert torch.equal(recorded_finals(tapes[1:2]), expected.flatten(1))
    with pytest.raises(RecipeError, match="'height' is one for a whole call of StableDiffusionPipeline"):
        recorder.tape(other)
    with pytest.raises(RecipeError, match=r"samples of one size: .* makes 3 steps of 256 numbers, and .* 3 of 384"):
        recorder.tapes(other, 2, QUIET, "")
    steps = Samples([row | {"num_inference_steps": 3 + k} for k, row in enumerate(same.rows)], same.seeds)
    with pytest.raises(RecipeError, match="have to make as many steps"):
        recorder.tapes(steps, 2, QUIET, "")


# ---- what is kept


def counted(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often it is evaluated from now on, as the only entry."""
    calls, forward = [0], network.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(network, "forward", counting)
    return calls


def assert_same(one: Tape, other: Tape) -> None:
    """The same states, recorded and replayed, and images, to the last bit."""
    assert len(one) == len(other) and one.num_samples == other.num_samples
    assert (one.denoisers, one.looped) == (other.denoisers, other.looped)
    for i in range(len(one) + 1):
        for a, b in zip(one.state(i).tensors, other.state(i).tensors, strict=True):
            assert torch.equal(a, b)
    for a, b in zip(one.rolled()[-1].tensors, other.rolled()[-1].tensors, strict=True):
        assert torch.equal(a, b)
    images, others = (tape.images(tape.state(len(tape))) for tape in (one, other))
    assert (images is None) == (others is None)
    assert images is None or others is None or torch.equal(images, others)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_kept_outputs_make_the_same_tapes_without_evaluating_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    """But for one call, which shows what the network's outputs are like."""
    pipeline, kept = make_pipeline(), KeptFiles(tmp_path, QUIET)
    set_scheduler(pipeline, scheduler)
    given: dict[str, Any] = {"labels": (1, 2, 3), "batch_size": 2, "images": True}
    made = dit_tapes(pipeline, 6, **given, kept=kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]
    written = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    calls = counted(pipeline.transformer, monkeypatch)
    again = dit_tapes(pipeline, 6, **given, kept=KeptFiles(tmp_path, QUIET))
    assert calls == [len(again)] == [2]
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())] == written
    for a, b in zip(made, again, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("steps", [4, 8])
def test_kept_outputs_of_more_or_fewer_steps_are_made_again(tmp_path: Path, steps: int) -> None:
    pipeline = make_pipeline()
    dit_tapes(pipeline, 6, kept=KeptFiles(tmp_path, QUIET))
    for found, expected in zip(
        dit_tapes(pipeline, steps, kept=KeptFiles(tmp_path, QUIET)), dit_tapes(pipeline, steps), strict=True
    ):
        assert_same(found, expected)


def test_a_run_makes_a_tape_of_a_file_once_for_all_copies_of_the_model(tmp_path: Path) -> None:
    """As the tuner does for each choice of types; other samples are other tapes."""
    kept, first, second = KeptFiles(tmp_path, QUIET), make_pipeline(), make_pipeline()
    made = dit_tapes(first, 5, kept=kept)
    again = dit_tapes(second, 5, kept=kept)
    assert again[0].pipeline is second and made[0].pipeline is first and again[0].steps is made[0].steps
    assert_same(made[0], again[0])
    second.transformer.proj_out_2.weight.data.zero_()
    assert not torch.equal(finals(again), finals(made))
    other = dit_tapes(second, 5, labels=(7, 8, 9), kept=kept)
    assert other[0].steps is not made[0].steps


def test_what_is_not_kept_is_made_anew_for_each_call(tmp_path: Path) -> None:
    """Text and pictures are encoded again: each prompt and the empty one, each picture, though alike in shape."""
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
    rows = [{"prompt": "a", "image": "red.png"}, {"prompt": "b", "image": "blue.png"}]
    recorder = Recorder(image_to_image(), Sampling(num_inference_steps=6, guidance_scale=3.0), tmp_path)
    made, again = (
        recorder.tapes(Samples(rows, [1, 2]), 2, QUIET, "", images=True, kept=KeptFiles(tmp_path, QUIET).inside("kept"))
        for _ in range(2)
    )
    assert len(made) == len(again) == 2 and len(made[0]) == 4  # 0.8 of 6 steps; one picture a call
    for one, other in zip(made, again, strict=True):
        assert_same(one, other)


def test_kept_outputs_of_other_samples_are_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of another number of them, or in files that are not whole; what was kept is then what was made."""
    pipeline, kept = make_pipeline(), KeptFiles(tmp_path, Reporter())
    dit_tapes(pipeline, 5, labels=(1, 2, 3), kept=kept)
    written = (tmp_path / "0.safetensors").read_bytes()
    expected = dit_tapes(pipeline, 5, labels=(4, 5))
    assert_same(dit_tapes(pipeline, 5, labels=(4, 5), kept=kept)[0], expected[0])
    said = "".join(capsys.readouterr().err.split())  # the terminal breaks lines anywhere
    wanted = "0.safetensors cannot be read and is made again (the outputs of call 0 are not what transformer gives)"
    assert wanted.replace(" ", "") in said
    now = (tmp_path / "0.safetensors").read_bytes()
    assert now != written
    (tmp_path / "0.safetensors").write_bytes(now[: len(now) // 2])
    assert_same(dit_tapes(pipeline, 5, labels=(4, 5), kept=KeptFiles(tmp_path, QUIET))[0], expected[0])
    assert (tmp_path / "0.safetensors").read_bytes() == now


def test_noise_that_a_pipeline_draws_without_its_generator_follows_from_the_seeds() -> None:
    """LDM's pipeline gives its scheduler none, and DDIM with eta 1 draws at every step."""
    pipeline, seeds = make_ldm(), [3, 4]
    recorder = Recorder(pipeline, Sampling(num_inference_steps=3, guidance_scale=None, arguments={"eta": 1.0}))
    found = []
    for other in (0, 1):
        torch.manual_seed(other)
        expected = torch.randn(2, generator=torch.Generator().manual_seed(other))
        found.append(recorder.tape(Samples([{}, {}], seeds)).state(3).latents[0])
        assert torch.equal(torch.randn(2), expected)  # torch's own noise is where it was
    assert torch.equal(*found)
    assert not torch.equal(found[0], recorder.tape(Samples([{}, {}], [5, 6])).state(3).latents[0])
