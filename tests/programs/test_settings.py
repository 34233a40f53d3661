"""Several sampling settings at once: calibrated for, stored, warned of outside, and what neighbouring ones cost."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import recipe_tree
from torch import Tensor

from accuquant.calibration.opened import planned_model
from accuquant.calibration.plan import PlannedModule
from accuquant.calibration.reference import Reference
from accuquant.calibration.session import Session, find_activation_scales, open_session
from accuquant.core.metrics import relative_l2
from accuquant.core.trajectory import State
from accuquant.errors import CheckpointError, RecipeError
from accuquant.pipeline.denoisers import denoisers_of, step_levels
from accuquant.pipeline.loading import load_pipeline
from accuquant.pipeline.rows import call_of
from accuquant.programs.calibrate import calibrate
from accuquant.programs.describe import describe
from accuquant.progress import Reporter
from accuquant.recipe import Model, Recipe
from accuquant.recipe.file import parse_recipe
from accuquant.runtime.envelope import Calibrated, outside

QUIET = Reporter(quiet=True)
ALSO = [{"num_inference_steps": 4}, {"guidance_scale": 4.0}]
SAMPLING = {"num_inference_steps": 6, "guidance_scale": 1.5, "also": ALSO}


def make_recipe(folder: Path, output: Path, also: bool = True, **objective: Any) -> Recipe:
    tree = recipe_tree(folder, output, objective={"iterations": 6, "batch_size": 1} | objective)
    tree["sampling"] = SAMPLING if also else {k: v for k, v in SAMPLING.items() if k != "also"}
    tree["data"] = {"path": "digits.jsonl", "num_samples": 6, "validation_samples": 3}
    tree["evaluation"] |= {"neighbours": 2}
    return parse_recipe(tree, "test")


@pytest.fixture(scope="module")
def session(model_folder: Path) -> Session:
    return open_session(make_recipe(model_folder, Path("unused")), QUIET)


def pictures(folder: Path, rows: Any, seeds: Any, **setting: Any) -> Tensor:
    """(B, C, H, W) latents of a pipeline's own call."""
    pipeline = load_pipeline(Model(id=str(folder), device="cpu"))
    found: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    pipeline.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    pipeline(**call_of(pipeline, rows, seeds, setting, Path()))
    assert len(found) == setting["num_inference_steps"]
    return found[-1][: len(rows)]


def test_samples_are_of_each_setting_in_turn(session: Session, model_folder: Path) -> None:
    """Each tape is its setting's own call of the pipeline: steps and latents."""
    reference = session.reference
    assert list(reference.settings) == [0, 1, 2, 0, 1, 2] and [len(tape) for tape in reference.tapes] == [6, 4, 6] * 2
    assert [len(tape) for tape in session.validation.tapes] == [6, 4, 6]
    seeds = session.samples.seeds
    for k, setting in enumerate(session.model.recorder.sampling.each):
        own, tape = setting.settings, reference.tapes[k + 3]
        latents = pictures(model_folder, session.samples.rows[k + 3 : k + 4], seeds[k + 3 : k + 4], **own)
        before: State = tape.state(len(tape) - 1)
        assert torch.equal(before.latents[0][:1], latents)
    assert [len(t) for t in reference.main.tapes] == [6, 6] and reference.main.settings == ()
    assert [len(t) for t in reference.first(1)] == [6, 4, 6] and reference.of(1) is reference.tapes[1]


def test_scales_are_measured_at_all_of_them(session: Session, model_folder: Path) -> None:
    """A guidance of 4 drives the latents farther: what reads them needs a wider range than at 1.5."""
    alone = open_session(make_recipe(model_folder, Path("unused"), also=False), QUIET)
    alone.reference = Reference(
        [session.reference.tapes[k].bound(alone.model.recorder.pipeline) for k in (0, 3, 0)]
    )  # as many tapes, of one setting
    find_activation_scales(alone, make_recipe(model_folder, Path("unused")).quantization, 3, QUIET)
    wider = [
        bool((layer.log_activation_scale > alone.layers[name].log_activation_scale).any())
        for name, layer in session.layers.items()
        if layer.spec.static
    ]
    assert any(wider)
    assert len({layer.clock.num_groups for layer in session.layers.values()} | {3}) == 1


@pytest.mark.parametrize(
    "objective",
    [{"steps_per_group": 2, "gradient": "variance"}, {"inputs": "quantized"}, {"target": "blocks", "iterations": 3}],
    ids=["M=2", "inputs", "blocks"],
)
def test_updates_are_of_all_of_them(model_folder: Path, objective: dict[str, Any]) -> None:
    recipe = make_recipe(model_folder, Path("unused"), **objective)
    session = open_session(recipe, QUIET)
    steps = recipe.objective.steps_per_group
    assert isinstance(steps, int)
    loop = session.loop(recipe.objective, steps)
    seen = set[int]()
    step = type(session.reference.tapes[0]).step
    for tape in session.reference.tapes:
        tape.step = lambda i, *given, tape=tape: (seen.add(len(tape)), step(tape, i, *given))[1]  # type: ignore[method-assign]
    loop.run()
    assert seen == {4, 6} and all(entry["loss"] > 0 for entry in loop.history)
    if recipe.objective.target == "blocks":  # each call at the noise level of the tape that it was made in
        source: Any = loop.source
        source.gather(0)
        own = {round(level, 3) for level in session.levels}
        others = {round(level, 3) for level in step_levels(denoisers_of(session.reference.of(1)))}
        levels = {round(call.level, 3) for call in source.calls}
        assert levels <= own | others and levels - own and levels - others


@pytest.fixture(scope="module")
def export(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(make_recipe(model_folder, tmp_path_factory.mktemp("settings") / "out", iterations=2), QUIET)


def test_the_export_says_what_it_was_calibrated_for(export: Path) -> None:
    config = json.loads((export / "transformer" / "config.json").read_text())["quantization_config"]
    expected = [(6, 1.5), (4, 1.5), (6, 4.0)]
    assert config["calibrated_for"] == [
        {"num_inference_steps": steps, "guidance_scale": scale, "size": [4, 8, 8]} for steps, scale in expected
    ]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"num_inference_steps": 5, "guidance_scale": 3.0}, None),
        ({"num_inference_steps": 3, "guidance_scale": 1.5}, r"3 steps \(calibrated for 4 to 6\)"),
        ({"num_inference_steps": 6, "guidance_scale": 8.0}, r"guidance 8 \(calibrated for 1\.5 to 4\)"),
    ],
    ids=["inside", "steps", "guidance"],
)
def test_a_call_outside_is_warned_of_once(export: Path, call: dict[str, Any], said: str | None) -> None:
    pipeline = load_pipeline(Model(id=str(export), device="cpu"))
    run = lambda: pipeline(class_labels=[1, 2], output_type="latent", **call)  # noqa: E731
    if said is not None:
        with pytest.warns(UserWarning, match=f"DiTTransformer2DModel is called with {said}: its error there") as found:
            run()
        assert sum("is called with" in str(one.message) for one in found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()


def test_a_copy_looks_for_itself(export: Path) -> None:
    model = load_pipeline(Model(id=str(export), device="cpu")).transformer
    call = {"timestep": torch.tensor([10]), "class_labels": torch.tensor([1])}
    with pytest.warns(UserWarning, match="latents of 4 x 4 x 4"):
        model(torch.zeros(1, 4, 4, 4), **call)
    # another process finds by name what a copy there calls
    assert all("<locals>" not in hook.__qualname__ for hook in model._forward_pre_hooks.values())
    with pytest.warns(UserWarning, match="latents of 4 x 4 x 4"):
        copy.deepcopy(model)(torch.zeros(1, 4, 4, 4), **call)


def test_another_size_is_warned_of_outside_of_a_pipeline_too(export: Path) -> None:
    model = load_pipeline(Model(id=str(export), device="cpu")).transformer
    call = {"timestep": torch.tensor([10]), "class_labels": torch.tensor([1])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.zeros(1, 4, 8, 8), **call)
    with pytest.warns(UserWarning, match=r"latents of 4 x 4 x 4 \(calibrated for 4 x 8 x 8\)"):
        model(torch.zeros(1, 4, 4, 4), **call)


def test_what_is_outside() -> None:
    settings = [Calibrated(20, 4.0, (4, 8, 8)), Calibrated(50, None, (4, 16, 8))]
    assert outside(settings, 30, 4.0, (4, 16, 8)) == "" == outside(settings, None, None, (4, 8, 8))
    assert outside(settings, 51, 5.0, (4, 8, 16)) == (
        "51 steps (calibrated for 20 to 50), guidance 5 (calibrated for 4), "
        "latents of 4 x 8 x 16 (calibrated for 4 x 8 x 8 and 4 x 16 x 8)"
    )
    assert outside([Calibrated(20, None, ())], 20, 9.0, ()) == ""  # a pipeline without guidance of its own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 0}, r"calibrated_for\.0\.num_inference_steps must be a whole number from 1 on"),
        ({"guidance_scale": "4"}, r"calibrated_for\.0\.guidance_scale must be a number or null"),
        ({"size": [4, -8]}, r"calibrated_for\.0\.size must be a list of whole numbers"),
        ({"steps": 4}, r"calibrated_for\.0 must be an object with num_inference_steps, guidance_scale, size"),
        (None, r"calibrated_for must be a list"),
    ],
)
def test_a_broken_record_is_named(export: Path, tmp_path: Path, change: dict[str, Any] | None, message: str) -> None:
    folder = shutil.copytree(export / "transformer", tmp_path / "transformer")
    tree = json.loads((folder / "config.json").read_text())
    found = tree["quantization_config"]["calibrated_for"]
    tree["quantization_config"]["calibrated_for"] = "six" if change is None else [found[0] | change, *found[1:]]
    (folder / "config.json").write_text(json.dumps(tree))
    pipeline: Any = load_pipeline(Model(id=str(export), device="cpu")).transformer
    with pytest.raises(CheckpointError, match=message):
        type(pipeline).from_pretrained(folder)


def test_the_report_says_what_neighbouring_settings_cost(export: Path, model_folder: Path) -> None:
    """As two pipelines' own calls say it, at half and twice the steps and 0.5 and 1.5 times the guidance."""
    metrics = json.loads((export / "metrics.json").read_text())
    rows = {row["name"]: row for row in metrics["neighbours"]}
    settings = {name: (row["num_inference_steps"], row["guidance_scale"]) for name, row in rows.items()}
    assert settings == {
        "as it is sampled": (6, 1.5),
        "half the steps": (3, 1.5),
        "twice the steps": (12, 1.5),
        "guidance × 0.5": (6, 0.75),
        "guidance × 1.5": (6, 2.25),
    }
    assert all(row["num_samples"] == 2 and row["relative_l2"] > 0 for row in rows.values())
    held_out = metrics["held_out"]
    first = [{"class_labels": c} for c in (held_out * 2)[:2]]
    seeds = [1_000_000, 1_000_001]
    pairs = [(load_pipeline(Model(id=str(folder), device="cpu")), folder) for folder in (export, model_folder)]
    made = []
    for pipeline, _ in pairs:
        call = call_of(pipeline, first, seeds, {"num_inference_steps": 12, "guidance_scale": 1.5}, Path())
        last: list[Tensor] = []
        step = pipeline.scheduler.step
        pipeline.scheduler.step = lambda *a, step=step, last=last, **k: (
            made_step := step(*a, **k),
            last.append(made_step[0]),
        )[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # twelve steps are outside
            pipeline(**call)
        made.append(last[-1][:2])
    assert rows["twice the steps"]["relative_l2"] == pytest.approx(float(relative_l2(*made).mean()), rel=1e-3)
    page = (export / "report.html").read_text(encoding="utf-8")
    assert "At other settings" in page and "twice the steps" in page


def test_mistakes_are_named(model_folder: Path, tmp_path: Path) -> None:
    def parsed(also: list[dict[str, Any]], **more: Any) -> Recipe:
        tree = recipe_tree(model_folder, tmp_path / "o") | more
        tree["sampling"] = SAMPLING | {"also": also}
        return parse_recipe(tree, "test")

    with pytest.raises(RecipeError, match=r"sampling: also\.1: is a setting that is there already"):
        parsed([{"guidance_scale": 3.0}, {"guidance_scale": 3.0}])
    with pytest.raises(RecipeError, match=r"sampling: also\.0: is a setting that is there already"):
        parsed([{}])
    with pytest.raises(RecipeError, match=r"sampling\.also\.0\.steps"):
        parsed([{"steps": 4}])
    with pytest.raises(RecipeError, match=r"data\.num_samples is 4, and sampling\.also makes 5 settings"):
        parsed([{"num_inference_steps": n} for n in (2, 3, 4, 5)])
    with pytest.raises(RecipeError, match=r"sampling\.also\.0: .*takes no 'heigth'"):
        planned_model(parsed([{"arguments": {"heigth": 64}}]))
    long = {"steps_per_group": 5, "iterations": 4, "batch_size": 2}
    with pytest.raises(RecipeError, match=r"sampling\.also\.0: objective\.steps_per_group is 5, .* 4 steps there"):
        planned_model(parsed([{"num_inference_steps": 4}], objective=long))
    tuned = {"tune": {"nfc": 4, "types": []}}
    with pytest.raises(RecipeError, match=r"sampling\.also: the search of a tune section is at one setting"):
        parsed(ALSO, **tuned)
    planned, costs = describe(make_recipe(model_folder, tmp_path / "o"))
    alone = describe(make_recipe(model_folder, tmp_path / "o", also=False))[1]
    assert isinstance(planned[0], PlannedModule)
    assert costs["network_evaluations"]["sampling"] < alone["network_evaluations"]["sampling"]  # four steps of some
    assert [one.num_inference_steps for one in make_recipe(model_folder, tmp_path).sampling.each] == [6, 4, 6]
