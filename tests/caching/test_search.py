"""The search for full steps and for tau, and the public functions, on small random pipelines."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from helpers import finals, recorded_finals, runs_of, trajectory
from pipelines import make_pipeline, make_pixart
from torch import Tensor

from accuquant import CacheError, FORAConfig, RFCConfig, TaylorSeerConfig, cache_stats, disable_cache, enable_cache
from accuquant.caching.enable import known_rows
from accuquant.caching.runs import Runs
from accuquant.caching.search import record_grams, search_cache
from accuquant.core.forecasts import RFE, Forecast, Memory, Reuse, Taylor
from accuquant.core.schedule import ForecastErrors, dps_steps, filled_interval_steps, interval_steps
from accuquant.pipeline.data import draw
from accuquant.pipeline.recorder import Recorder
from accuquant.progress import Reporter
from accuquant.recipe import Cache, Sampling
from accuquant.runtime.cache.attach import cached, controller_of
from accuquant.runtime.cache.features import cached_modules
from accuquant.runtime.cache.plan import CachePlan

QUIET = Reporter(quiet=True)
STEPS = 10


@pytest.fixture(scope="module")
def runs() -> Runs:
    return runs_of(make_pipeline(), STEPS, labels=[1, 2, 3])


def final_error(runs: Runs, config: Cache | CachePlan) -> float:
    """Geometric mean of the relative errors of latents and images, over both and over samples."""
    tapes = runs.usual()
    with cached(runs.denoiser, config):
        final = finals(tapes)
    product, true, pipeline = 1.0, recorded_finals(tapes), tapes[0].pipeline
    for found, wanted in ((final, true), (decoded(pipeline, final), decoded(pipeline, true))):
        for one, other in zip(found, wanted, strict=True):
            product *= float((one.double() - other.double()).norm() / other.double().norm())
    return product ** (1 / (2 * len(final)))


@torch.no_grad()
def decoded(pipeline: Any, latents: Tensor) -> Tensor:
    """Images in [0, 1] of final latents (B, N)."""
    samples: Tensor = pipeline.vae.decode(latents.unflatten(1, (4, 8, 8)) / pipeline.vae.config.scaling_factor).sample
    return (samples / 2 + 0.5).clamp(0, 1)


def images(pipeline: DiTPipeline, steps: int = STEPS) -> Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    found = pipeline([1, 2], num_inference_steps=steps, guidance_scale=1.5, generator=generators, output_type="pt")
    return torch.as_tensor(found.images)


def gram(features: Tensor) -> Tensor:
    """(modules, T, B, D) -> (modules, B, T, T)."""
    return torch.einsum("mibd,mjbd->mbij", features, features)


@pytest.mark.parametrize(
    ("order", "relational", "forecast"), [(0, False, Reuse()), (1, False, Taylor(1)), (1, True, RFE(1))]
)
def test_forecast_errors_are_those_of_the_forecasts(order: int, relational: bool, forecast: Forecast) -> None:
    """For any two full steps: what update and predict give on the stored features, module by module."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 8, 2, 5, generator=generator, dtype=torch.float64).cumsum(2)
    inputs, outputs = features
    table = ForecastErrors(gram(inputs), gram(outputs), order, relational, 0.0)
    for before, full in itertools.product(range(8), repeat=2):
        if before > full:
            continue
        errors = torch.zeros(8, dtype=torch.float64)
        for i, o in zip(inputs, outputs, strict=True):
            memory: Memory | None = None
            for step in sorted({before, full}):
                memory = forecast.update(memory, step, o[step], i[step])
            for step in range(full + 1, 8):
                apart = forecast.predict(memory, step, i[step]) - o[step]
                errors[step] += (apart.square().sum(1) / o[step].square().sum(1)).mean() / len(inputs)
        assert torch.allclose(table.at(before, full)[full + 1 :], errors[full + 1 :], rtol=1e-5)


@pytest.mark.parametrize("emphasis", [0.0, 2.0])
def test_cost_is_the_weighted_sum_over_the_skipped_steps(emphasis: float) -> None:
    inputs, outputs = torch.randn(2, 3, 8, 2, 5, generator=torch.Generator().manual_seed(1)).double()
    table = ForecastErrors(gram(inputs), gram(outputs), 1, True, emphasis)
    weights = torch.exp(emphasis * torch.arange(8, dtype=torch.float64) / 8)
    for before, full, after in itertools.combinations(range(9), 3):
        expected = (table.at(before, full) * weights)[full + 1 : after].sum()
        assert table.cost(before, full, after) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)
    assert table.cost(0, 0, 4) == pytest.approx(float((table.at(0, 0) * weights)[1:4].sum()))
    assert table.cost(2, 5, 6) == 0


def test_late_steps_weigh_more_with_emphasis() -> None:
    table = ForecastErrors(torch.eye(6).expand(1, 1, 6, 6), torch.eye(6).expand(1, 1, 6, 6), 0, False, 2.0)
    assert table.cost(0, 4, 6) == pytest.approx(table.cost(0, 0, 2) * torch.exp(torch.tensor(8 / 6)).item())


def test_higher_orders_are_judged_by_the_first() -> None:
    inputs, outputs = torch.randn(2, 1, 6, 2, 4, generator=torch.Generator().manual_seed(2)).double()
    one, two = (ForecastErrors(gram(inputs), gram(outputs), order, False, 0.0) for order in (1, 2))
    assert torch.equal(one.at(0, 2), two.at(0, 2))


def test_module_that_is_silent_does_not_spoil_the_others() -> None:
    """A projection of zeros, as many models begin with, is forecast without error."""
    inputs, outputs = torch.randn(2, 2, 6, 2, 4, generator=torch.Generator().manual_seed(3)).double()
    outputs[1] = 0
    both = ForecastErrors(gram(inputs), gram(outputs), 1, True, 0.0)
    loud = ForecastErrors(gram(inputs)[:1], gram(outputs)[:1], 1, True, 0.0)
    assert both.cost(0, 1, 6) == pytest.approx(loud.cost(0, 1, 6) / 2)


def test_recorded_grams_are_those_of_the_modules(runs: Runs) -> None:
    """Against inputs and outputs that plain forward hooks see along the same trajectory."""
    (tape,), denoiser = runs.few(2, 2), runs.denoiser
    modules = [denoiser.get_submodule(f"transformer_blocks.{i}.{part}") for i in range(2) for part in ("attn1", "ff")]
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in range(len(modules))}

    def hook(i: int) -> Any:
        def keep(module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            seen[i].append((given.flatten(1).double(), output.flatten(1).double()))

        return keep

    handles = [m.register_forward_hook(hook(i), with_kwargs=True) for i, m in enumerate(modules)]
    tape.rolled()
    for handle in handles:
        handle.remove()
    found = record_grams(runs, RFCConfig(target_nfc=4))
    for side in (0, 1):
        expected = gram(torch.stack([torch.stack([pair[side] for pair in pairs]) for pairs in seen.values()]))
        assert found[side].shape == (4, 4, STEPS, STEPS)  # two samples, each with guidance
        assert torch.allclose(found[side].sum(0), expected.sum(0), rtol=1e-6)
    assert controller_of(runs.denoiser) is None


@pytest.mark.parametrize(
    ("config", "interval"),
    [
        (RFCConfig(target_nfc=4, trials=15), 3),
        (RFCConfig(target_nfc=3, order=1, trials=0), 5),
        (TaylorSeerConfig(target_nfc=6, order=1, trials=15, differences="newton"), 2),
        (FORAConfig(target_nfc=3, trials=15), 8),
        (RFCConfig(target_nfc=5, warmup=3, trials=10), 3),
    ],
)
def test_search_finds_as_many_full_steps_as_asked_and_no_worse_than_an_interval(
    runs: Runs, config: Cache, interval: int
) -> None:
    found = search_cache(runs, config, QUIET)
    fixed = type(config)(interval=interval, **config.model_dump(include={"order", "warmup", "differences"}))
    assert len(interval_steps(STEPS, interval, config.warmup)) == config.target_nfc, "the rival has as many"
    error = final_error(runs, found)
    assert 0 < error <= final_error(runs, fixed)

    (tape,) = runs.usual()
    with cached(runs.denoiser, found) as controller:
        tape.rolled()
        stats = controller.stats()
    assert stats.nfc == config.target_nfc and found.measured_nfc == (config.target_nfc, 0)
    assert stats.full_steps[: config.warmup] == tuple(range(config.warmup))
    assert found.full_timesteps == tuple(runs.levels[i] for i in stats.full_steps)
    again = CachePlan.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found and not again.as_recipe().searches


def test_lists_are_judged_by_the_geometric_mean_of_both_errors_over_samples(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the search says of its list, against the definition; and the fixed interval is not better by it."""
    said = list[str]()
    reporter = Reporter(quiet=True)
    monkeypatch.setattr(reporter, "say", said.append)
    found = search_cache(runs, TaylorSeerConfig(target_nfc=4, order=1, trials=6), reporter)

    error = final_error(runs, found)
    assert said[-1] == f"cache: 4 full steps of {STEPS}, error {error:.4f} on calibration samples"
    fixed = TaylorSeerConfig(schedule=filled_interval_steps(STEPS, 4, 2), order=1)
    assert error <= final_error(runs, fixed) * (1 + 1e-6)


def test_trials_make_the_schedule_better(runs: Runs) -> None:
    errors = [
        final_error(runs, search_cache(runs, config, QUIET))
        for config in (FORAConfig(target_nfc=5, trials=0), FORAConfig(target_nfc=5, trials=40))
    ]
    assert errors[1] < errors[0]


def test_all_steps_full_is_full_precision(runs: Runs) -> None:
    found = search_cache(runs, RFCConfig(target_nfc=STEPS, trials=5), QUIET)
    assert final_error(runs, found) == 0


def test_search_is_deterministic_and_leaves_nothing(runs: Runs) -> None:
    (tape,) = runs.usual()
    before = trajectory(tape)
    config = FORAConfig(target_nfc=6, trials=3)  # too few to come to the same end by another way
    first, *others = (search_cache(runs, config, QUIET) for _ in range(5))
    assert others == [first] * 4
    assert controller_of(runs.denoiser) is None
    assert torch.equal(trajectory(tape), before)


@pytest.mark.parametrize(
    ("steps", "config"),
    [
        (20, RFCConfig(target_nfc=10, warmup=10, trials=0)),  # no room beside a long warmup
        (20, RFCConfig(target_nfc=11, warmup=11, trials=0)),
        (2, FORAConfig(target_seconds=60.0, warmup=3, trials=0)),  # all steps are warmup
    ],
)
def test_long_warmup_can_be_searched(steps: int, config: Cache) -> None:
    pipeline = make_pipeline(layers=1)
    enable_cache(pipeline, config, num_inference_steps=steps, inputs=[1])
    images(pipeline, steps)
    assert cache_stats(pipeline).nfc == min(steps, config.target_nfc or steps)


def test_target_beyond_the_steps_is_refused(runs: Runs) -> None:
    with pytest.raises(CacheError, match="target_nfc: 11 is more than the 10 steps there are"):
        search_cache(runs, RFCConfig(target_nfc=11), QUIET)


@pytest.mark.parametrize("target", [5.0, 6.5])
def test_tau_meets_the_mean_nfc(target: float) -> None:
    """Or says which mean is the nearest that can be met; each sample is a trajectory of its own."""
    runs = runs_of(make_pipeline(), STEPS, labels=[1, 2, 3, 4])
    found = search_cache(runs, RFCConfig(schedule="rcs", target_nfc=target, order=1), QUIET)
    counts, singles = [], runs.few(4, 1)
    with cached(runs.denoiser, found) as controller:
        for single in singles:
            single.rolled()
            counts.append(float(controller.stats().nfc))
    assert abs(torch.tensor(counts).mean().item() - target) <= 0.1
    assert found.measured_nfc == pytest.approx(
        (torch.tensor(counts).mean().item(), torch.tensor(counts).std(correction=0).item())
    )
    assert CachePlan.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert not found.as_recipe().searches


def test_tau_that_cannot_meet_the_mean_names_the_nearest() -> None:
    runs = runs_of(make_pipeline(), STEPS, labels=[1])
    config = RFCConfig(schedule="rcs", target_nfc=4.5, order=1)
    with pytest.raises(CacheError, match=r"no tau gives 4\.5 on these 1 samples, the nearest gives [45]\.00; ask for"):
        search_cache(runs, config, QUIET)
    assert controller_of(runs.denoiser) is None


def slowed(pipeline: DiTPipeline, seconds: float) -> list[None]:
    """A part of the first block that is not run where it is forecast takes this long; the list grows at each call."""
    calls: list[None] = []

    def wait(*_: Any) -> None:
        calls.append(None)
        time.sleep(seconds)

    pipeline.transformer.transformer_blocks[0].ff.net[0].register_forward_pre_hook(wait)
    return calls


def test_target_seconds_is_kept() -> None:
    pipeline = make_pipeline(layers=1)
    calls, each, target = slowed(pipeline, 0.04), 0.04, 0.3
    found = enable_cache(
        pipeline, RFCConfig(target_seconds=target, order=1, trials=0), num_inference_steps=STEPS, inputs=[1]
    )
    calls.clear()
    images(pipeline)
    assert 2 < cache_stats(pipeline).nfc < STEPS, "between the fewest and all"
    assert len(calls) * each < target and len(calls) == cache_stats(pipeline).nfc
    assert len(found.full_timesteps or ()) == len(calls)


def test_generous_seconds_compute_every_step_and_impossible_ones_are_refused() -> None:
    pipeline = make_pipeline()
    enable_cache(pipeline, FORAConfig(target_seconds=60.0, trials=0), num_inference_steps=STEPS, inputs=[1])
    images(pipeline)
    assert cache_stats(pipeline).nfc == STEPS
    disable_cache(pipeline)
    with pytest.raises(CacheError, match=r"target_seconds: 1e-05 s cannot be met; 8 samples take .* with 2 full steps"):
        enable_cache(pipeline, RFCConfig(target_seconds=1e-5, order=1), num_inference_steps=STEPS, inputs=[1])
    assert controller_of(pipeline.transformer) is None


def test_cache_comes_and_goes() -> None:
    pipeline = make_pipeline()
    before = images(pipeline)
    plan = enable_cache(pipeline, TaylorSeerConfig(interval=4, order=1))
    assert plan == CachePlan.of(TaylorSeerConfig(interval=4, order=1))
    other = images(pipeline)
    stats = cache_stats(pipeline)
    assert (stats.full_steps, stats.nfc, stats.num_steps) == ((0, 1, 5, 9), 4, STEPS)
    assert stats == cache_stats(pipeline.transformer)
    assert not torch.equal(other, before)
    disable_cache(pipeline)
    assert torch.equal(images(pipeline), before)
    for forget in (disable_cache, cache_stats):
        with pytest.raises(CacheError, match="DiTTransformer2DModel has no cache of accuquant"):
            forget(pipeline)


@pytest.mark.parametrize("config", [FORAConfig(interval=2), RFCConfig(target_nfc=4)])
def test_second_cache_is_refused(config: Cache) -> None:
    pipeline = make_pipeline()
    enable_cache(pipeline.transformer, TaylorSeerConfig(interval=4, order=1))
    with pytest.raises(CacheError, match="has a cache already; call disable_cache first"):
        enable_cache(pipeline, config, num_inference_steps=STEPS)
    images(pipeline)
    assert cache_stats(pipeline).full_steps == (0, 1, 5, 9), "the first one works on"


@pytest.mark.parametrize("target", [{"target_nfc": 4}, {"target_seconds": 1.0}])
def test_target_on_a_bare_denoiser_says_what_to_do(target: dict[str, float]) -> None:
    denoiser = make_pipeline().transformer
    with pytest.raises(CacheError, match="give enable_cache the whole pipeline, or set tau"):
        enable_cache(denoiser, RFCConfig(**target))
    assert controller_of(denoiser) is None


def test_what_was_found_serves_a_bare_denoiser() -> None:
    pipeline = make_pipeline()
    found = enable_cache(pipeline, RFCConfig(target_nfc=4, trials=0), num_inference_steps=STEPS, inputs=[1])
    with_search = images(pipeline)
    other = make_pipeline()
    assert enable_cache(other.transformer, found) == found
    assert torch.equal(images(other), with_search)


def test_pattern_that_matches_nothing_is_refused() -> None:
    pipeline = make_pipeline()
    for config in (FORAConfig(interval=2, modules="nothing"), FORAConfig(target_nfc=4, modules="nothing")):
        with pytest.raises(CacheError, match="no module of DiTTransformer2DModel matches 'nothing'"):
            enable_cache(pipeline, config, num_inference_steps=STEPS, inputs=[1])
        assert controller_of(pipeline.transformer) is None


def searched_with(**keywords: Any) -> tuple[set[int], Tensor]:
    """Classes that a search samples, and the noise of its first whole batch, after the rehearsal with one sample."""
    pipeline, calls = make_pipeline(), list[tuple[Tensor, Tensor]]()
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((kwargs["class_labels"], args[0])), with_kwargs=True
    )
    enable_cache(pipeline, RFCConfig(target_nfc=4, trials=0), num_inference_steps=6, **keywords)
    return {int(c) for labels, _ in calls for c in labels} - {1000}, max((noise for _, noise in calls), key=len)


def test_search_samples_the_inputs_given_or_classes_the_model_knows() -> None:
    classes, noise = searched_with()
    assert len(classes) == 8 and classes < set(range(10)), "of its 1000 embeddings ten have a label"
    given, same_noise = searched_with(inputs=[3, 12])
    assert given == {3, 12} and torch.equal(same_noise, noise)
    assert not torch.equal(searched_with(seed=100)[1], noise)


def test_search_samples_with_the_guidance_asked_for() -> None:
    """Without guidance a batch is eight samples, with it sixteen; full_timesteps follow the number of steps."""
    assert [len(searched_with(guidance_scale=scale)[1]) for scale in (1.0, 4.0)] == [8, 16]


@pytest.mark.parametrize("inputs", [None, ["a red cat", "the photo of a dog"]])
def test_prompts_can_be_searched_with(inputs: list[str] | None) -> None:
    """PixArt; by default with the shipped prompts."""
    pipeline = make_pixart()
    config = enable_cache(pipeline, RFCConfig(target_nfc=4, order=1, trials=4), num_inference_steps=8, inputs=inputs)
    pipeline("a cat", num_inference_steps=8, generator=torch.manual_seed(0), output_type="latent")
    stats = cache_stats(pipeline)
    assert (stats.nfc, stats.num_steps) == (4, 8)
    steps = pipeline.scheduler.timesteps
    assert config.full_timesteps == tuple(float(steps[i]) for i in stats.full_steps)


def test_dps_is_taken_from_the_recorded_outputs() -> None:
    """CacheQuant's list through the public function, against the distances of the modules' outputs themselves."""
    pipeline = make_pipeline()
    config = enable_cache(pipeline, FORAConfig(schedule="dps", interval=3), num_inference_steps=12, guidance_scale=1.5)
    disable_cache(pipeline)
    recorder = Recorder(pipeline, Sampling(num_inference_steps=12, guidance_scale=1.5))
    tape = recorder.tape(draw(known_rows(pipeline), 2, 0))
    distances, outputs = torch.zeros(12, 12), dict[str, list[Tensor]]()
    for name in cached_modules(pipeline.transformer)[0]:
        found = outputs.setdefault(name, [])
        module = pipeline.transformer.get_submodule(name)
        handle = module.register_forward_hook(lambda _, args, output, found=found: found.append(output.flatten()))
        tape.rolled()
        handle.remove()
        distances += (torch.stack(found)[:, None] - torch.stack(found)[None]).abs().sum(-1)
    timesteps = pipeline.scheduler.timesteps
    assert config.full_timesteps == tuple(float(timesteps[i]) for i in dps_steps(distances, 3))
