"""Sources of gradients: they cost what they say, and a new one is a file and a line; so is a new method."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import recipe_tree
from safetensors.torch import load_file

from accuquant.calibration import methods, objectives
from accuquant.calibration.choice import candidates
from accuquant.calibration.objectives import OBJECTIVES
from accuquant.calibration.objectives.base import GradientSource
from accuquant.calibration.objectives.cached import CachedTrajectory
from accuquant.calibration.objectives.trajectory import Trajectory
from accuquant.calibration.session import Session, open_session
from accuquant.errors import RecipeError
from accuquant.programs.calibrate import calibrate
from accuquant.programs.describe import describe
from accuquant.progress import Reporter
from accuquant.recipe import Cache, Recipe
from accuquant.recipe.file import parse_recipe
from accuquant.runtime.cache.plan import CachePlan

QUIET = Reporter(quiet=True)


def make_recipe(model: Path, output: Path, **objective: Any) -> Recipe:
    given = {"iterations": 6, "batch_size": 2} | objective
    tree = recipe_tree(model, output, objective=given)
    tree["evaluation"]["reconstruct"] = False
    return parse_recipe(tree, "test")


def prepared(recipe: Recipe) -> Session:
    return open_session(recipe, QUIET)


@pytest.mark.parametrize(
    "objective",
    [
        {"steps_per_group": 1},
        {"steps_per_group": 3, "gradient": "exact"},
        {"steps_per_group": 4},  # the last group is shorter
        {"steps_per_group": 2, "warmup_fraction": 0.5},
        {"inputs": "quantized"},
        {"inputs": "quantized", "iterations": 2},
        {"target": "blocks"},
        {"iterations": 0},
    ],
)
def test_the_cost_is_what_the_updates_make(model_folder: Path, tmp_path: Path, objective: dict[str, Any]) -> None:
    """And so is the dry run's, which knows no model's weights."""
    recipe = make_recipe(model_folder, tmp_path / "out", **objective)
    session = prepared(recipe)
    m = recipe.objective.steps_per_group
    assert isinstance(m, int)
    loop = session.loop(recipe.objective, m)
    loop.run()
    assert (
        OBJECTIVES[recipe.objective.target].cost(session.job(recipe.objective)).evaluations == loop.network_evaluations
    )
    assert describe(recipe)[1]["network_evaluations"]["tuning"] == loop.network_evaluations


def test_drifted_inputs_are_the_quantized_models_own(model_folder: Path, tmp_path: Path) -> None:
    """Groups start from states that it was at when they were sampled, and end where full precision does."""
    recipe = make_recipe(model_folder, tmp_path / "out", inputs="quantized")
    session = prepared(recipe)
    source = session.loop(recipe.objective, 1).source
    assert isinstance(source, Trajectory)
    rolled = [tape.rolled() for tape in session.reference.tapes]
    source.gradient(0)
    assert len(rolled) == len(source.drifted) == 2
    for states, expected in zip(source.drifted, rolled, strict=True):
        for a, b in zip(states, expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
    starts = set[int]()
    for update in (0, 1):  # sampled again at update 2
        number, start = source.material.draws.tape(update), source.material.draws.one_of(update, 6)
        tape = session.reference.tapes[number]
        loss = source.gradient(update)[0]
        with torch.no_grad():
            found = tape.step(start, rolled[number][start]).latents[0]
        s, e = (tape.state(start + k).latents[0] for k in (0, 1))
        assert loss == pytest.approx(float((found - e).square().sum() / (e - s).square().sum()), rel=1e-5)
        assert start == 0 or not torch.equal(rolled[number][start].latents[0], s)
        starts.add(start)
    assert starts - {0}, "or nothing has drifted yet"


def test_drifted_inputs_are_kept_over_an_interruption(model_folder: Path, tmp_path: Path) -> None:
    """In between two samplings, of a solver that remembers earlier steps: updates go on from the same states."""
    recipe = make_recipe(model_folder, tmp_path / "out", inputs="quantized")
    sampling = recipe.sampling.model_copy(update={"scheduler": "DPMSolverMultistepScheduler"})
    recipe = recipe.model_copy(update={"sampling": sampling})
    whole, interrupted, resumed = (prepared(recipe) for _ in range(3))
    loop = whole.loop(recipe.objective, 1)
    loop.run()
    first = interrupted.loop(recipe.objective, 1)
    first.history += [first.update(number) for number in range(3)]  # sampled at updates 0, 2 and 4
    first.save(tmp_path / "state.safetensors")
    again = resumed.loop(recipe.objective, 1)
    again.load(tmp_path / "state.safetensors")
    again.run()
    assert again.network_evaluations == loop.network_evaluations
    found = resumed.snapshot()
    for name, tensors in whole.snapshot().items():
        for key, value in tensors.items():
            assert torch.equal(value, found[name][key]), f"{name}.{key}"


def test_the_cost_with_the_cache_on(model_folder: Path, tmp_path: Path) -> None:
    recipe = make_recipe(model_folder, tmp_path / "out", gradient="exact")
    session, cache = prepared(recipe), Cache(estimation="taylor", order=1, schedule=(0, 2, 4))
    loop = session.loop(recipe.objective, 6, CachePlan.of(cache))
    loop.run()
    assert isinstance(loop.source, CachedTrajectory)
    job = replace(session.job(recipe.objective), steps_per_group=6, cache=cache)
    assert CachedTrajectory.cost(job).evaluations == loop.network_evaluations


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("target", "block", r"objective\.target: must be .* \(found 'block'\) \(did you mean 'blocks'\?\)"),
        ("initialization", "msee", r"quantization\.initialization: must be 'mse' or .* \(did you mean 'mse'\?\)"),
    ],
)
def test_a_name_that_nothing_has_is_refused_before_anything_is_written(
    model_folder: Path, tmp_path: Path, key: str, value: str, message: str
) -> None:
    tree = recipe_tree(model_folder, tmp_path / "out")
    tree["objective" if key == "target" else "quantization"][key] = value
    with pytest.raises(RecipeError, match=message):
        calibrate(parse_recipe(tree, "test"), QUIET)
    assert list(tmp_path.iterdir()) == []


PREDICTION = '''
"""Full precision's latents, step by step."""

from typing import Any, final

from accuquant.calibration.objectives.base import Cost, GradientSource, Job


@final
class Prediction(GradientSource):
    """The error of what one step makes of full precision's latents."""

    trials = ((1, 0.5),)

    @classmethod
    def cost(cls, job: Job) -> Cost:
        return Cost(job.objective.iterations)

    def gradient(self, update: int) -> tuple[float, dict[str, Any]]:
        of = self.material
        step, tape = of.draws.one_of(update, of.num_steps), of.tape(update)
        before, after = (tape.state(step + k).latents[0] for k in (0, 1))
        found = tape.step(step, tape.state(step)).latents[0]
        loss = (found - after).square().sum() / (after - before).square().sum()
        loss.backward()
        self.network_evaluations += 1
        return float(loss.detach()), {"step": step}
'''


def added(patch: pytest.MonkeyPatch, package: Any, folder: Path, name: str, code: str) -> Any:
    """The module of a new file in a package's folder: the package looks for its modules in ``folder`` as well."""
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    patch.setattr(package, "__path__", [*package.__path__, str(folder)])
    return importlib.import_module(f"{package.__name__}.{name}")


def test_a_new_objective_is_a_file_and_a_line(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    module = added(monkeypatch, objectives, tmp_path / "new", "prediction", PREDICTION)
    monkeypatch.setitem(OBJECTIVES, "prediction", module.Prediction)  # the line

    recipe = make_recipe(model_folder, tmp_path / "out", target="prediction")
    assert describe(recipe)[1]["network_evaluations"]["tuning"] == 6
    folder = calibrate(recipe, QUIET)
    found = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))["calibration"]
    assert found["target"] == "prediction" and found["network_evaluations"] == 6
    assert sorted(entry["step"] for entry in found["history"]) == list(range(6))
    untuned = calibrate(make_recipe(model_folder, tmp_path / "untuned", iterations=0), QUIET)
    tensors = [load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in (folder, untuned)]
    assert any(not torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    tried = candidates(make_recipe(model_folder, tmp_path / "auto", target="auto").objective, 6)
    assert [c.rate for c in tried if c.target == "prediction"] == [0.5]


PERCENTILE = '''
"""The range that all but a thousandth of the values are in."""

from typing import final

import torch
from torch import Tensor

from accuquant.calibration.layers import TrainableLayer
from accuquant.calibration.methods.base import Method


@final
class Percentile(Method):
    @torch.no_grad()
    def weights(self, layer: TrainableLayer) -> None:
        rows = layer.float_weight.reshape(layer.log_weight_scale.numel(), -1)
        largest = rows.abs().quantile(0.95, dim=1)
        layer.log_weight_scale.copy_((largest / layer.spec.weight_type.qmax).log().view_as(layer.log_weight_scale))

    def activations(self, layer: TrainableLayer, samples: list[Tensor]) -> None:
        layer.set_activation_scale([x.clamp(x.quantile(0.001), x.quantile(0.999)) for x in samples], search=False)
'''


def test_a_new_method_is_a_file_and_a_line(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").mkdir()
    module = added(monkeypatch, methods, tmp_path / "new", "percentile", PERCENTILE)
    monkeypatch.setitem(methods.METHODS, "percentile", module.Percentile)  # the line

    tree = recipe_tree(model_folder, tmp_path / "out", objective={"iterations": 0})
    tree["evaluation"]["reconstruct"], tree["quantization"]["initialization"] = False, "percentile"
    folder = calibrate(parse_recipe(tree, "test"), QUIET)
    saved = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    original = load_file(model_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.0.attn1.to_q.weight"
    rows = original[name].reshape(-1, 16)
    expected = rows.abs().quantile(0.95, dim=1) / 7
    torch.testing.assert_close(saved[f"{name}_scale"].flatten(), expected)


def test_a_source_is_abstract_until_it_says_cost_and_gradient() -> None:
    class Nothing(GradientSource):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Nothing(None)  # type: ignore[abstract, arg-type]
