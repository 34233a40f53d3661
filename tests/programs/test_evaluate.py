"""The comparison with full precision: its figures against ones computed here by hand."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from helpers import recipe_tree
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from accuquant.calibration.opened import open_model
from accuquant.calibration.session import sample_references
from accuquant.core.metrics import relative_l2
from accuquant.errors import RecipeError
from accuquant.evaluation.digit_classifier import DigitClassifier
from accuquant.evaluation.images import image_metrics
from accuquant.evaluation.measure import Sampled, held_out_reference, latent_metrics, sample
from accuquant.export.load import load_export, recipe_of
from accuquant.pipeline.data import Split, load_split
from accuquant.programs.calibrate import calibrate
from accuquant.programs.evaluate import evaluate
from accuquant.progress import Reporter
from accuquant.recipe import Recipe
from accuquant.recipe.file import parse_recipe
from accuquant.runtime.layer import quantized_layers

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def export(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of attention and MLP in int8, but one module in int3."""
    tree = recipe_tree(model_folder, tmp_path_factory.mktemp("exports") / "mixed", objective={"iterations": 1})
    rule = {"modules": r"transformer_blocks\.\d+\.(attn1|ff)\..*", "weight": "int8", "activation": "int8"}
    tree["quantization"]["rules"] = [{**rule, "modules": r".*0\.ff\.net\.2", "weight": "int3"}, rule]
    return calibrate(parse_recipe(tree, "test"), QUIET)


def metrics_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return found


def plain(folder: Path) -> DiTPipeline:
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def classes(recipe: Recipe, pipeline: DiTPipeline) -> tuple[list[int], list[int]]:
    """That are calibrated on, and that are held out."""
    split: Split = load_split(recipe.data, pipeline)
    calibration, held_out = ([row["class_id"] for row in rows] for rows in (split.calibration, split.held_out))
    return calibration, held_out


def test_evaluating_again_gives_the_same_figures(export: Path) -> None:
    before = metrics_of(export)
    evaluate(export, recipe_of(export), QUIET)
    assert metrics_of(export) == before


def test_figures_are_those_of_images_sampled_with_plain_diffusers(export: Path, model_folder: Path) -> None:
    """Nothing of ours but the format: both pipelines, same classes and noise, and the formulas of PSNR and L2."""
    metrics, recipe = evaluate(export, recipe_of(export), QUIET), recipe_of(export)
    calibration, held_out = classes(recipe, plain(model_folder))
    assert set(metrics["held_out"]) <= set(held_out) and not set(metrics["held_out"]) & set(calibration)
    images = []
    for folder in (model_folder, export):
        pipeline = plain(folder)
        generators = [torch.Generator().manual_seed(1_000_000 + i) for i in range(3)]
        inputs = [held_out[i % len(held_out)] for i in range(3)]
        out = pipeline(inputs, guidance_scale=1.5, num_inference_steps=6, generator=generators, output_type="np").images
        images.append(torch.tensor(out, dtype=torch.float64))
    error = (images[0] - images[1]).square().mean()
    assert metrics["psnr"] == pytest.approx(float(-10 * torch.log10(error)), abs=0.01)


def test_latent_figures_by_hand() -> None:
    reference = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [3.0, 4.0]]])  # two time steps of two samples
    latents = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.5], [3.0, 3.0]]])
    errors = torch.stack([relative_l2(a, b) for a, b in zip(latents, reference, strict=True)])
    found = latent_metrics(Sampled(errors, latents[-1], []), reference[-1])
    assert found["relative_l2_per_step"] == pytest.approx([0, 0.15])
    assert found["relative_l2_per_step_std"] == pytest.approx([0, 0.1 / math.sqrt(2)])
    spread = {"mean": 0.15, "std": 0.1 / math.sqrt(2), "min": 0.1, "max": 0.2}
    assert found["final_relative_l2"] == pytest.approx(spread)
    assert found["latent_psnr"] == pytest.approx(10 * math.log10(1 / (1.25 / 4)))


def digits(seed: int) -> Tensor:
    return torch.rand(12, 1, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_image_figures_of_equal_and_of_other_images() -> None:
    torch.manual_seed(0)
    classifier = DigitClassifier().eval()
    with torch.no_grad():
        predicted = classifier(digits(0) * 2 - 1).argmax(1).tolist()
        first, second = digits(0)[:, None], digits(1)[:, None]  # an image is a film of one frame
        same = image_metrics(first, first, predicted, classifier)
        other = image_metrics(second, first, [d + 1 for d in predicted], classifier)
    assert same["agreement"] == {"full_precision": 1, "quantized": 1, "same_prediction": 1}
    assert same["ssim"] == pytest.approx(1) and math.isinf(same["psnr"])
    assert abs(same["frechet_distance"]) < 1e-6 < other["frechet_distance"]
    assert other["agreement"]["full_precision"] == 0
    error = (digits(0) - digits(1)).double().square().mean()
    assert other["psnr"] == pytest.approx(float(-10 * torch.log10(error)), abs=1e-3)
    assert other["ssim"] < 0.2


def test_the_module_with_three_bits_is_found_to_be_the_worst(export: Path) -> None:
    errors = {m["name"]: m["relative_error"] for m in metrics_of(export)["modules"] if m["weight"] != "float"}  # type: ignore[attr-defined]
    assert max(errors, key=lambda name: errors[name]) == "transformer_blocks.0.ff.net.2"
    assert sorted(errors.values())[-1] > 5 * sorted(errors.values())[-2] > 0


def test_module_error_is_that_of_its_own_output(export: Path, model_folder: Path) -> None:
    """By hand for one module: both twins get the inputs of the full-precision model."""
    name, recipe = "transformer_blocks.1.attn1.to_q", recipe_of(export)
    pipeline = plain(model_folder)
    quantized, held_out = quantized_layers(load_export(export, recipe).transformer)[name], classes(recipe, pipeline)[1]
    seen: list[tuple[Tensor, Tensor]] = []
    module = pipeline.transformer.get_submodule(name)
    handle = module.register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
    generators = [torch.Generator().manual_seed(1_000_000 + i) for i in range(3)]
    sampling = {"num_inference_steps": 6, "guidance_scale": 1.5, "output_type": "latent"}
    pipeline([held_out[i] for i in range(3)], generator=generators, **sampling)
    handle.remove()
    error, energy = 0.0, 0.0
    for t, (x, out) in zip(pipeline.scheduler.timesteps, seen, strict=True):
        quantized.clock.set(float(t))
        error += float((quantized(x) - out).square().sum())
        energy += float(out.square().sum())
    rows = {m["name"]: m["relative_error"] for m in metrics_of(export)["modules"]}  # type: ignore[attr-defined]
    assert rows[name] == pytest.approx(math.sqrt(error / energy), rel=1e-3)


def test_size_is_that_of_the_tensors(export: Path, model_folder: Path) -> None:
    def stored(folder: Path) -> int:
        tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        return sum(t.numel() * t.element_size() for t in tensors.values())

    size = metrics_of(export)["size"]
    assert (size["float_bytes"], size["quantized_bytes"]) == (stored(model_folder), stored(export))  # type: ignore[index]
    assert size["ratio"] == stored(export) / stored(model_folder)  # type: ignore[index]


def test_without_images_only_latents_are_compared(export: Path) -> None:
    metrics = evaluate(export, recipe_of(export, ["evaluation.reconstruct=false"]), QUIET)
    assert "psnr" not in metrics and metrics["final_relative_l2"]["mean"] > 0
    evaluate(export, recipe_of(export), QUIET)
    assert "psnr" in metrics_of(export)


def test_a_folder_that_is_no_export(model_folder: Path, tmp_path: Path, export: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe\.yaml"):
        recipe_of(model_folder)
    with pytest.raises(RecipeError, match="holds no quantized layer: it was not written by accuquant"):
        load_export(model_folder, recipe_of(export))
    with pytest.raises(RecipeError, match=r"no model_index\.json"):
        load_export(tmp_path, recipe_of(export))


def test_what_was_sampled_is_kept_once_and_no_more_than_is_read(model_folder: Path, tmp_path: Path) -> None:
    """Held-out states stay with their tapes, a model's own are dropped on the way, and choices are made by ends."""
    tree = recipe_tree(model_folder, tmp_path / "out")
    tree["sampling"]["num_inference_steps"] = 20
    recipe = parse_recipe(tree, "test")
    model = open_model(recipe)
    held_out = held_out_reference(model, recipe, QUIET)
    (tape,) = held_out.tapes
    one = sum(t.nbytes for t in tape.state(0).tensors)
    with torch.no_grad():
        latents = [weakref.ref(state.latents[0]) for state in tape.rolling()]
    assert len(latents) == 21 and sum(each() is not None for each in latents) <= 1  # the first is the tape's
    made = sample(held_out.tapes, QUIET, "")
    assert made.errors.shape == (21, 3) and float(made.errors.max()) < 1e-6
    found = [*tree_leaves([state.tensors for state in made.finals]), made.latents, made.errors]
    assert sum(t.nbytes for t in found) <= 2 * one < tape.nbytes / 8
    reference, validation = sample_references(model, recipe, QUIET)
    states = len(reference.tapes[0]) + 1
    kept, thin = (sum(each.nbytes for each in of.tapes) / of.num_samples for of in (reference, validation))
    assert kept - thin == pytest.approx((states - 2) * one / 3, rel=0.01)
    assert torch.equal(validation.tapes[0].end().latents[0], validation.tapes[0].state(20).latents[0])
