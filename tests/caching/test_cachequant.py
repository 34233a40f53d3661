"""CacheQuant's variants: one forecast feature over a run of blocks, and the correction of quantized outputs."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, UNet2DConditionModel
from helpers import dit_tapes, finals, output_at, recipe_tree, recorded_finals, runs_of, trajectory
from pipelines import make_pipeline, make_unet
from torch import Tensor, nn

from accuquant.caching.correct import fit_correction
from accuquant.caching.runs import Runs
from accuquant.caching.search import record_features, samples_of, search_cache, searched
from accuquant.calibration.opened import planned_model
from accuquant.calibration.session import Session, open_session
from accuquant.core.correction import fit_affine
from accuquant.core.metrics import relative_l2
from accuquant.core.schedule import dps_steps
from accuquant.errors import CacheError, RecipeError
from accuquant.pipeline.tape import Tape
from accuquant.programs.calibrate import calibrate
from accuquant.progress import Reporter
from accuquant.recipe import Cache
from accuquant.recipe.file import parse_recipe
from accuquant.runtime.cache.attach import attach_cache, cached, detach_cache
from accuquant.runtime.cache.features import in_cache
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.observe import observed

QUIET = Reporter(quiet=True)
BLOCKS = {"feature": "blocks", "estimation": "reuse"}


def make_session(model: Path, output: Path, **changes: Any) -> Session:
    recipe = parse_recipe(recipe_tree(model, output, **changes), "test")
    return open_session(recipe, QUIET)


@pytest.fixture(scope="module")
def session(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return make_session(model_folder, tmp_path_factory.mktemp("cachequant") / "out")


def dit() -> tuple[nn.Module, Tape]:
    """A denoiser of four blocks, and six steps that it makes."""
    pipeline = make_pipeline(layers=4)
    (tape,) = dit_tapes(pipeline, 6)
    return pipeline.transformer, tape


class Count:
    """Calls of every named module."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.calls = dict.fromkeys(names, 0)
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda *_, name=name: self.calls.update({name: self.calls[name] + 1})
            )


# ---- the DiT variant


def test_the_deviation_is_what_the_blocks_add() -> None:
    denoiser, tape = dit()
    with cached(denoiser, Cache(**BLOCKS, interval=3, blocks=[1, 2])) as controller:
        assert controller.modules == ("transformer_blocks.2",)
        assert controller.bypassed == ("transformer_blocks.1",)
        controller.paused = True
        with observed(denoiser, ["transformer_blocks.1", "transformer_blocks.2"]) as seen:
            tape.step(0, tape.state(0))
        controller.paused = False
        tape.step(0, tape.state(0))
        ((memory,),) = controller.state.memories.values()
        expected = seen["transformer_blocks.2"].output - seen["transformer_blocks.1"].input
        assert memory is not None
        assert torch.equal(memory.factors[0], expected)
        assert torch.equal(controller.features(seen)["transformer_blocks.2"][1], expected)


def test_skipped_steps_add_the_last_deviation_and_run_nothing_inside() -> None:
    denoiser, tape = dit()
    inside, outside = [f"transformer_blocks.{i}.ff" for i in (1, 2)], [f"transformer_blocks.{i}.ff" for i in (0, 3)]
    count = Count(denoiser, inside + outside)
    with cached(denoiser, Cache(**BLOCKS, schedule=[0, 3])) as controller:
        found = tape.rolled()
        assert controller.stats().full_steps == (0, 3)
    assert [count.calls[n] for n in inside] == [2, 2]
    assert [count.calls[n] for n in outside] == [6, 6]

    # the same by hand
    kept: dict[str, Tensor] = {}

    def begin(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept["in"] = args[0]

    def end(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if step in (0, 3):
            kept["deviation"] = output - kept["in"]
            return output
        return kept["in"] + kept["deviation"]

    denoiser.get_submodule("transformer_blocks.1").register_forward_pre_hook(begin)
    denoiser.get_submodule("transformer_blocks.2").register_forward_hook(end)
    state = tape.state(0)
    for step in range(6):
        with torch.no_grad():
            state = tape.step(step, state)
    torch.testing.assert_close(found[-1].latents, state.latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [None, [0, 3], [2, 2]])
def test_all_steps_full_is_no_cache(blocks: list[int] | None) -> None:
    denoiser, tape = dit()
    plain = trajectory(tape)
    with cached(denoiser, Cache(**BLOCKS, schedule=list(range(6)), blocks=blocks)):
        found = trajectory(tape)
    assert torch.equal(found, plain)
    assert torch.equal(trajectory(tape), plain)


@pytest.mark.parametrize("estimation", ["reuse", "taylor", "rfe"])
def test_every_forecast_takes_the_deviation(estimation: Any) -> None:
    denoiser, tape = dit()
    plain = finals([tape])
    order = 0 if estimation == "reuse" else 1
    with cached(denoiser, Cache(feature="blocks", estimation=estimation, interval=2, order=order)):
        found = finals([tape])
    assert 0 < float(relative_l2(found, plain).max()) < 1


def test_a_block_that_gives_two_outputs_is_refused(tmp_path: Path) -> None:
    denoiser, tape = dit()
    block = denoiser.get_submodule("transformer_blocks.2")
    forward = block.forward
    block.forward = lambda *args, **kwargs: (forward(*args, **kwargs), None)  # type: ignore[method-assign, assignment]
    with (
        cached(denoiser, Cache(**BLOCKS, interval=2)),
        pytest.raises(CacheError, match=r"transformer_blocks\.2 gives tuple; use feature: modules"),
    ):
        tape.rolled()


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ({"blocks": [1, 2]}, "blocks: needs feature: blocks"),
        ({"feature": "blocks", "modules": ".*"}, r"cache\.modules: .*which blocks"),
        ({"feature": "blocks", "blocks": [2, 1]}, r"cache\.blocks: must be first and last"),
        ({"feature": "blocks", "noise_aware": True}, r"cache\.noise_aware: is measured of modules"),
        ({"dps_feature": "x"}, r"cache\.dps_feature: only schedule: dps"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, cache: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe_tree("m", tmp_path / "o", cache={"interval": 2, "order": 1} | cache), "test")


def test_blocks_that_do_not_exist_are_refused_before_any_work(model_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_tree(model_folder, tmp_path / "o", cache=BLOCKS | {"interval": 2, "blocks": [0, 2]})
    with pytest.raises(RecipeError, match="has blocks 0 to 1"):
        planned_model(parse_recipe(recipe, "test"))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(CacheError, match="neither transformer_blocks nor up_blocks"):
        attach_cache(nn.Sequential(nn.Linear(2, 2)), Cache(**BLOCKS, interval=2))


# ---- the U-Net variant


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return make_unet(cross_attention_dim=8)


@torch.no_grad()
def unet_loop(model: UNet2DConditionModel, steps: int = 5) -> list[Tensor]:
    x, text = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.ones(2, 3, 8)
    found = []
    for i in range(steps):
        prediction = model(x, torch.tensor(900 - 100 * i), encoder_hidden_states=text).sample
        x = x - 0.1 * prediction
        found.append(x)
    return found


def test_the_up_block_feature_replaces_all_before_the_last_up_block() -> None:
    model = unet()
    plain = unet_loop(model)
    inside = ["down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1"]
    count = Count(model, [f"{name}.resnets.0" for name in [*inside, "down_blocks.0", "up_blocks.2"]])
    with cached(model, Cache(**BLOCKS, schedule=[0, 2])) as controller:
        assert controller.modules == ("up_blocks.1",)
        assert all(in_cache(f"{n}.resnets.0", (*controller.modules, *controller.bypassed)) for n in inside)
        found = unet_loop(model)
    assert list(count.calls.values()) == [2] * 5 + [5, 5]
    assert torch.equal(found[0], plain[0])
    assert not torch.equal(found[1], plain[1])

    # by hand: the last up-block is given the feature of step 0 again, with this step's own skip connections
    feature: list[Tensor] = []
    model = unet()
    model.up_blocks[1].register_forward_hook(lambda m, a, out: feature.append(out) if len(feature) == 0 else feature[0])  # type: ignore[func-returns-value]
    torch.testing.assert_close(unet_loop(model, 2)[1], found[1], rtol=1e-5, atol=1e-6)


def test_a_unet_with_all_steps_full_is_as_without() -> None:
    model = unet()
    plain = unet_loop(model)
    with cached(model, Cache(feature="blocks", estimation="taylor", order=1, schedule=[0, 1, 2, 3, 4])):
        assert all(torch.equal(a, b) for a, b in zip(unet_loop(model), plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(unet_loop(model), plain, strict=True))


def test_what_a_unet_cannot_do_is_refused() -> None:
    with pytest.raises(CacheError, match="rfe needs an input"):
        attach_cache(unet(), Cache(feature="blocks", interval=2))
    with pytest.raises(CacheError, match="leave blocks out"):
        attach_cache(unet(), Cache(**BLOCKS, interval=2, blocks=[0, 1]))


# ---- the schedule


@pytest.mark.parametrize("measured_on", ["quantized", "full_precision"])
def test_dps_is_the_best_of_all_lists_for_the_feature_it_looks_at(session: Session, measured_on: Any) -> None:
    config = Cache(estimation="reuse", schedule="dps", interval=2, measured_on=measured_on, dps_feature=r".*\.1\.ff")
    found, _ = searched(config, session, QUIET)
    runs = Runs(session.network, session.levels, 2, session.few, list)
    with session.full_precision() if measured_on == "full_precision" else nullcontext():
        features = record_features(runs, session.few(2, 2)[0], config)
    (pairs,) = (found for key, found in features.items() if key.module == "transformer_blocks.1.ff")
    outputs = [out.flatten().double() for _, out in pairs]

    def cost(steps: tuple[int, ...]) -> float:
        runs = [(a, t) for a, b in itertools.pairwise((*steps, 6)) for t in range(a, b)]
        return sum(float((outputs[t] - outputs[a]).abs().sum()) for a, t in runs)

    lists = [(0, *rest) for rest in itertools.combinations(range(1, 6), 2)]
    lists = [s for s in lists if all(1 <= b - a <= 4 for a, b in itertools.pairwise((*s, 6)))]
    best = min(lists, key=cost)
    assert found.full_timesteps == tuple(session.levels[i] for i in best)


def test_dps_looks_at_as_many_samples_as_asked() -> None:
    """By the sum of the distances of five samples; on random features those of two give another list."""
    runs = runs_of(make_pipeline(layers=4), 12, labels=[1, 2, 3, 4, 5, 6])
    name, outputs = "transformer_blocks.3.ff", list[Tensor]()
    (tape,) = runs.usual()
    handle = runs.denoiser.get_submodule(name).register_forward_hook(lambda _, args, output: outputs.append(output))
    tape.rolled()
    handle.remove()
    halves = torch.stack([o.unflatten(0, (2, 6)) for o in outputs])  # (T, guidance, samples, tokens, channels)

    def expected(count: int) -> tuple[float, ...]:
        distances = torch.cdist(halves[:, :, :count].flatten(1), halves[:, :, :count].flatten(1), p=1)
        return tuple(runs.levels[i] for i in dps_steps(distances, 12 / 5))

    found = {}
    for count in (None, 5, 99):
        config = Cache(estimation="reuse", schedule="dps", target_nfc=5, dps_samples=count, dps_feature=name)
        found[count] = search_cache(runs, config, QUIET).full_timesteps
        assert len(found[count] or ()) == 5
    assert found == {None: expected(2), 5: expected(5), 99: expected(6)}
    assert found[None] != found[5]


def test_a_search_draws_the_samples_that_dps_asks_for(session: Session) -> None:
    seen = []
    for count, expected in ((None, 3), (4, 4)):
        config = Cache(estimation="reuse", schedule="dps", target_nfc=3, dps_samples=count)
        seen.append(samples_of(config, 3))
        assert seen[-1] == expected
    assert samples_of(Cache(target_nfc=3), 3) == 3


def test_a_feature_that_dps_cannot_find_is_named(session: Session) -> None:
    config = Cache(estimation="reuse", schedule="dps", interval=2, dps_feature="nothing")
    with pytest.raises(CacheError, match="dps_feature: 'nothing' matches none of transformer_blocks"):
        searched(config, session, QUIET)


def test_dps_by_hand() -> None:
    distances = torch.tensor([[0, 1, 9, 9], [9, 0, 9, 9], [9, 9, 0, 1], [9, 9, 9, 0.0]])
    assert dps_steps(distances, 2) == (0, 2)


# ---- the correction of what full steps compute


def test_published_correction_is_fitted_to_full_precision_features(session: Session) -> None:
    config = Cache(
        estimation="reuse", interval=3, corrected=True, corrected_quantization=True, measured_on="full_precision"
    )
    correction = fit_correction(session, CachePlan.of(config), QUIET)
    name = "transformer_blocks.1.ff"
    assert correction.full_timesteps == [session.levels[i] for i in (0, 1, 4)]
    outputs: dict[tuple[int, bool], Tensor] = {}
    for i in range(6):
        outputs[i, False] = output_at(session, name, i)
        with session.full_precision():
            outputs[i, True] = output_at(session, name, i)
    rows = {(False, i): k for k, i in enumerate((2, 3, 5))} | {(True, i): 3 + k for k, i in enumerate((0, 1, 4))}
    for (full, i), row in rows.items():
        last = max(s for s in (0, 1, 4) if s <= i)
        given = outputs[i, False] if full else outputs[last, True]
        torch.testing.assert_close(correction(name)[row], fit_affine(given, outputs[i, True]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("measured_on", ["quantized", "full_precision"])
def test_the_ridge_is_the_configs(session: Session, measured_on: Any) -> None:
    """At the first step both are fitted to the same output: slopes of ridge 1 are half way from those of none to 1."""
    fits = {}
    for ridge in (0.0, 1.0, None):
        config = Cache(
            estimation="reuse",
            interval=3,
            corrected=True,
            corrected_quantization=True,
            measured_on=measured_on,
            correction_ridge=ridge,
        )
        plan = CachePlan.of(config)
        assert plan.correction_ridge == ridge and plan.uncorrected.correction_ridge is None
        fits[ridge] = fit_correction(session, plan, QUIET)("transformer_blocks.0.attn1")[
            3, 0
        ]  # the first full step's slopes
    assert torch.equal(fits[1.0], fits[None])
    torch.testing.assert_close(fits[1.0], (1 + fits[0.0]) / 2, rtol=1e-5, atol=1e-6)
    assert not torch.equal(fits[0.0], fits[1.0])


def test_correcting_both_parts_brings_the_calibration_samples_nearer(session: Session) -> None:
    errors = {}
    for parts in ((), ("corrected",), ("corrected_quantization",), ("corrected", "corrected_quantization")):
        config = Cache(estimation="reuse", interval=3, **dict.fromkeys(parts, True))  # type: ignore[arg-type]
        correction = None
        if config.fits:
            correction = fit_correction(session, CachePlan.of(config), QUIET)
        with cached(session.network, config, correction):
            final = finals(session.reference.tapes)
        errors[parts] = float(relative_l2(final, recorded_finals(session.reference.tapes)).mean())
    assert errors["corrected_quantization",] < errors[()]
    assert errors["corrected", "corrected_quantization"] < errors["corrected",] < errors[()]


def test_only_the_parts_that_are_asked_for_are_fitted(session: Session) -> None:
    plan = CachePlan.of(Cache(estimation="reuse", interval=3, corrected_quantization=True))
    correction = fit_correction(session, plan, QUIET)
    assert correction.timesteps == []
    assert len(correction.full_timesteps) == 3
    assert correction("transformer_blocks.0.ff").shape == (3, 2, 32)


@pytest.mark.parametrize("feature", ["modules", "blocks"])
def test_the_export_has_both_parts_and_the_variant(model_folder: Path, tmp_path: Path, feature: str) -> None:
    cache = {
        "estimation": "reuse",
        "interval": 2,
        "schedule": "dps",
        "measured_on": "full_precision",
        "corrected": True,
        "corrected_quantization": True,
        "feature": feature,
    }
    recipe = parse_recipe(recipe_tree(model_folder, tmp_path / "out", cache=cache), "test")
    folder = calibrate(recipe, QUIET)
    pipeline = DiTPipeline.from_pretrained(folder)
    names = [n for n, _ in pipeline.transformer.named_parameters() if n.startswith("cache_correction.")]
    assert len(names) == (4 if feature == "modules" else 1)
    assert all(pipeline.transformer.get_parameter(n).shape == (6, 2, 32) for n in names)
    pipeline.set_progress_bar_config(disable=True)

    def run() -> Tensor:
        generator = torch.manual_seed(0)
        return torch.as_tensor(
            pipeline([1], guidance_scale=1.5, num_inference_steps=6, generator=generator, output_type="np").images
        )

    corrected = run()
    assert torch.isfinite(corrected).all()
    detach_cache(pipeline.transformer)
    assert not torch.equal(run(), corrected)
