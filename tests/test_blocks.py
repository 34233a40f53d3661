"""Block reconstruction: what a block is, what it is given and compared with, and that it does what it is for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipeline, make_stable_diffusion, recipe_tree
from torch import nn

from accuquant.calibrate import calibrate, describe
from accuquant.console import Reporter
from accuquant.core.metrics import relative_l2
from accuquant.data import Samples
from accuquant.model import blocks
from accuquant.model.blocks import LEAST_STEPS, Reconstruction, block_of, evaluations_made, spread_steps
from accuquant.model.clock import StepClock
from accuquant.model.layers import LayerSpec, quantize_model
from accuquant.model.rollout import Rollout
from accuquant.optimise import Tuner
from accuquant.recipe import Recipe, RecipeError, Sampling
from accuquant.recipe.file import parse_recipe
from accuquant.session import Session, open_model, prepare, validation_error

QUIET = Reporter(quiet=True)
pytestmark = pytest.mark.usefixtures("one_thread")


def block_recipe(model: Path, output: Path, **objective: Any) -> Recipe:
    given = {"target": "blocks", "iterations": 10, "batch_size": 2} | objective
    return parse_recipe(recipe_tree(model, output, objective=given), "test")


def prepared(recipe: Recipe) -> Session:
    return prepare(recipe, *open_model(recipe), QUIET)


@pytest.mark.parametrize(
    "layer, block",
    [
        ("transformer_blocks.3.attn1.to_out.0", "transformer_blocks.3"),
        ("single_transformer_blocks.11.proj_mlp", "single_transformer_blocks.11"),
        ("blocks.0.mlp.fc1", "blocks.0"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.ff.net.2", "down_blocks.0.attentions.1.transformer_blocks.0"),
        ("mid_block.resnets.1.conv2", "mid_block.resnets.1"),
        ("down_blocks.0.attentions.1.proj_in", "down_blocks.0.attentions.1.proj_in"),
        ("up_blocks.1.upsamplers.0.conv", "up_blocks.1.upsamplers.0.conv"),
        ("proj_out_1", "proj_out_1"),
    ],
)
def test_block_of_a_layer(layer: str, block: str) -> None:
    assert block_of(layer) == block


@pytest.mark.parametrize(
    "num_steps, num_groups", [(s, g) for s in (2, 6, 10, 25, 50) for g in (1, 2, 3, 7, 10, 25) if g <= s]
)
def test_inputs_are_taken_in_every_timestep_group(num_steps: int, num_groups: int) -> None:
    clock = StepClock.from_timesteps(torch.arange(num_steps, 0, -1), num_groups)
    groups = clock.groups(torch.arange(num_steps, 0, -1))
    steps = spread_steps(groups)
    assert steps == sorted(set(steps)) and {groups[i] for i in steps} == set(range(num_groups))
    assert len(steps) >= min(LEAST_STEPS, num_steps) - (num_steps % num_groups)


def test_inputs_are_of_the_quantized_network_and_targets_of_the_original(model_folder: Path, tmp_path: Path) -> None:
    session = prepared(block_recipe(model_folder, tmp_path / "out"))
    tuner = session.tuner(session.recipe.objective, 1)
    assert tuner.blocks is not None
    for update in range(11):  # all of the first block, and one of the second
        tuner.history.append(tuner._update(update))
    original, seen = make_pipeline(), dict[str, Any]()
    rollout = Rollout(original, session.recipe.sampling)

    def keep(name: str) -> Any:
        return lambda module, args, kwargs, output: seen.update({name: (args, kwargs, output)})

    rollout.denoiser.transformer_blocks[1].register_forward_hook(keep("original"), with_kwargs=True)  # type: ignore[index]
    second: nn.Module = session.rollout.denoiser.transformer_blocks[1]  # type: ignore[index, assignment]
    second.register_forward_hook(keep("quantized"), with_kwargs=True)
    assert tuner.blocks.gathered == 1 and len(tuner.blocks.calls) == 6
    for k, call in enumerate(tuner.blocks.calls):
        samples = tuner._batch(6 + k, stream=3)
        given = (call.step, session.reference.latents[call.step, samples], session.reference.conditions.take(samples))
        with torch.no_grad():
            rollout.predict(*given)
            session.rollout.predict(*given)
        assert torch.equal(call.targets[0], seen["original"][2])
        assert torch.equal(call.args[0], seen["quantized"][0][0])
        assert not torch.equal(call.args[0], seen["original"][0][0])
        assert call.kwargs.keys() == seen["original"][1].keys()


def test_one_block_learns_at_a_time(model_folder: Path, tmp_path: Path) -> None:
    session = prepared(block_recipe(model_folder, tmp_path / "out"))
    tuner = session.tuner(session.recipe.objective, 1)
    assert tuner.updates == 20

    def changed(before: dict[str, Any]) -> set[str]:
        now = session.snapshot()
        return {block_of(n) for n in now if any(not torch.equal(v, before[n][k]) for k, v in now[n].items())}

    for first, block in ((0, "transformer_blocks.0"), (10, "transformer_blocks.1")):
        before = session.snapshot()
        for update in range(first, first + 10):
            entry = tuner._update(update)
            assert entry["block"] == block
        assert changed(before) == {block}


def test_network_evaluations_are_those_that_were_made(model_folder: Path, tmp_path: Path) -> None:
    recipe = block_recipe(model_folder, tmp_path / "out")
    session, calls = prepared(recipe), 0
    tuner = session.tuner(recipe.objective, 1)

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal calls
        calls += 1

    found: Any = session.rollout.denoiser.transformer_blocks
    for block in found:
        block.register_forward_pre_hook(count, with_kwargs=True)
    tuner.run()
    assert tuner.network_evaluations == calls / 2 == evaluations_made(20, 10, 2, 6)
    assert describe(recipe)[1]["network_evaluations"]["tuning"] == tuner.network_evaluations


@pytest.mark.parametrize("adaround", [False, True])
def test_blocks_and_whole_trajectories_come_nearer(model_folder: Path, tmp_path: Path, adaround: bool) -> None:
    """The claim: the blocks' own errors fall, and with them that of trajectories on noise that was never seen."""
    rounding = {"iterations": 400, "learn": ["rounding"], "learning_rates": {"rounding": 0.03}}
    how = rounding if adaround else {"iterations": 150}
    session = prepared(block_recipe(model_folder, tmp_path / "out", batch_size=4, **how))
    before, plain = validation_error(session), sum(block_errors(session))
    session.tuner(session.recipe.objective, 1).run()
    with session.hardened():
        assert sum(block_errors(session)) < 0.97 * plain
        # rounding gains least where inputs are as good as white, as those of a random model are
        assert validation_error(session) < (1.02 if adaround else 0.97) * before


def block_errors(session: Session) -> list[float]:
    """Of each block on its own full-precision input, validation samples, first step."""
    found, seen = [], list[Any]()
    rollout, conditions = Rollout(make_pipeline(), session.recipe.sampling), session.validation.conditions
    originals: Any = rollout.denoiser.transformer_blocks
    for block in originals:
        block.register_forward_hook(
            lambda module, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
        )
    quantized: Any = session.rollout.denoiser.transformer_blocks
    with torch.no_grad():
        rollout.predict(0, session.validation.latents[0], conditions)
        session.rollout.predict(0, session.validation.latents[0], conditions)  # sets the clock
        for block, (args, kwargs, out) in zip(quantized, seen, strict=True):
            found.append(float(relative_l2(block(*args, **kwargs) - args[0], out - args[0]).mean()))
    return found


def test_interrupted_reconstruction_goes_on_to_the_same_result(model_folder: Path, tmp_path: Path) -> None:
    recipe = block_recipe(model_folder, tmp_path / "out", learn=["rounding", "activation_scale"])
    whole = prepared(recipe)
    whole.tuner(recipe.objective, 1).run()
    interrupted, state = prepared(recipe), tmp_path / "state.safetensors"
    tuner = interrupted.tuner(recipe.objective, 1)
    for update in range(13):  # three into the second block
        tuner.history.append(tuner._update(update))
    tuner.save(state)
    resumed = prepared(recipe)
    again = resumed.tuner(recipe.objective, 1)
    again.load(state)
    again.run()
    assert len(again.history) == 20
    for name, tensors in whole.snapshot().items():
        for key, value in tensors.items():
            assert torch.equal(value, resumed.snapshot()[name][key]), f"{name}.{key}"
    assert again.history[-1]["network_evaluations"] == evaluations_made(20, 10, 2, 6)


def test_blocks_of_a_unet_come_as_they_run() -> None:
    """Its modules are listed down, up, middle; residual blocks and layers outside of blocks are units too."""
    pipeline = make_stable_diffusion()
    rollout = Rollout(pipeline, Sampling(num_inference_steps=4, guidance_scale=2.0))
    names = [n for n, m in pipeline.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    clock = StepClock.from_timesteps(rollout.timesteps, 2)
    layers = quantize_model(pipeline.unet, dict.fromkeys(names, LayerSpec("int4", "int8")), clock, search=False)
    for layer in layers.values():
        if layer.spec.static:
            layer.set_activation_scale([torch.randn(64) * 3 for _ in range(2)], search=False)
    for name, parameter in pipeline.unet.named_parameters():  # as a Tuner does
        parameter.requires_grad_(name.rpartition(".")[0] in layers)
    samples = Samples(["a cat", "a red dog"], [1, 2])
    conditions = rollout.conditions(samples.inputs, samples.seeds)
    latents = rollout.trajectory(conditions)[0]
    found = Reconstruction(rollout, clock, layers, latents, conditions, 2, lambda n: torch.arange(2))
    order = found.blocks
    assert len(order) == len(set(order)) == len({block_of(n) for n in layers})
    middle, up = order.index("mid_block.resnets.0"), order.index("up_blocks.0.resnets.0")
    assert order.index("conv_in") < order.index("down_blocks.0.resnets.0") < middle < up < order.index("conv_out")
    assert order.index("down_blocks.0.attentions.0.transformer_blocks.0") < middle
    for block in range(len(order)):
        assert 0 < found.gradient(2 * block, lambda n, count: n % count) < 10
        assert any(p.grad is not None for n in layers if block_of(n) == order[block] for p in layers[n].parameters())


@pytest.mark.parametrize(
    "objective, message",
    [
        ({"target": "block"}, "did you mean 'blocks'"),
        ({"target": "blocks", "steps_per_group": 2}, "leave steps_per_group out"),
        ({"target": "blocks", "gradient": "exact", "loss": "dense"}, "leave gradient and loss out"),
        ({"target": "blocks", "inputs": "quantized", "steps_per_group": 1}, "leave inputs out"),
        ({"target": "blocks", "steps_per_group": "auto"}, "leave steps_per_group out"),
    ],
)
def test_settings_of_the_other_target_are_refused(tmp_path: Path, objective: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe_tree("bundled:digits-dit", tmp_path / "out", objective=objective), "test")


def test_export_and_report_say_how(model_folder: Path, tmp_path: Path) -> None:
    folder = calibrate(block_recipe(model_folder, tmp_path / "out", iterations=2), QUIET)
    assert "by block reconstruction" in (folder / "README.md").read_text(encoding="utf-8")
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "Block reconstruction:" in report and "Steps per group (M)" not in report


def test_an_unlearned_objective_gathers_nothing(model_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(blocks.Reconstruction, "_gather", lambda *_: pytest.fail("gathered"))
    session = prepared(block_recipe(model_folder, tmp_path / "out", iterations=0, learn=["weight"]))
    tuner: Tuner = session.tuner(session.recipe.objective, 1)
    tuner.run()
    assert tuner.blocks is None and tuner.history == []
