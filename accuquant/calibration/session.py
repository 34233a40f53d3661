"""A model opened and made ready to be tuned: references sampled, modules replaced, first scales found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accuquant.calibration.layers import TrainableLayer, adopt_dynamic_scales, full_precision, quantize_model
from accuquant.calibration.loop import Reference, Tuner
from accuquant.calibration.objectives.blocks import evaluations_made, parts_of, spread_calls
from accuquant.calibration.plan import PlannedModule, plan_modules
from accuquant.core.metrics import relative_l2
from accuquant.errors import RecipeError
from accuquant.model.families import load_pipeline, set_scheduler
from accuquant.model.rollout import Rollout
from accuquant.pipeline.data import Samples, Split, calibration_samples, draw, load_split
from accuquant.progress import Reporter
from accuquant.recipe import Objective, Recipe
from accuquant.runtime.cache.features import cached_features
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.clock import StepClock
from accuquant.runtime.spec import share_grids

VALIDATION_SEED_OFFSET = 500_000  # noise that neither calibration nor evaluation uses
OBSERVED_VALUES = 16384  # activations kept per module and timestep group for the scale search


@dataclass
class Session:
    """A model ready to be tuned: quantized in place, with initial scales and its full-precision reference."""

    recipe: Recipe
    rollout: Rollout
    clock: StepClock
    planned: list[PlannedModule]
    layers: dict[str, TrainableLayer]
    reference: Reference
    validation: Reference

    def tuner(
        self, objective: Objective, steps_per_group: int, cache: CachePlan | None = None, fitted: Fitted | None = None
    ) -> Tuner:
        tuned, seed = {p.name: self.layers[p.name] for p in self.planned if p.tune}, self.recipe.data.seed
        return Tuner(self.rollout, self.clock, tuned, self.reference, objective, seed, steps_per_group, cache, fitted)

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """Everything calibration may change."""
        return {n: {k: v.clone() for k, v in layer.state_dict().items()} for n, layer in self.layers.items()}

    def restore(self, snapshot: dict[str, dict[str, Tensor]]) -> None:
        for name, layer in self.layers.items():
            if "rounding_logits" not in snapshot[name]:
                layer.rounding_logits = None
            layer.load_state_dict(snapshot[name])

    @contextmanager
    def hardened(self) -> Iterator[None]:
        """The layers are those of the export for as long as the block runs."""
        for name, layer in self.layers.items():
            self.rollout.denoiser.set_submodule(name, layer.harden())
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                self.rollout.denoiser.set_submodule(name, layer)

    def full_precision(self) -> AbstractContextManager[None]:
        """The layers compute in full precision for as long as the block runs."""
        return full_precision(self.layers.values())


def validation_error(session: Session) -> float:
    """Relative L2 of the final latent on the session's validation noise, as the model is now."""
    latents, _ = session.rollout.trajectory(session.validation.conditions)
    return float(relative_l2(latents[-1], session.validation.latents[-1]).mean())


def open_model(recipe: Recipe) -> tuple[Rollout, list[PlannedModule], Split]:
    """Load pipeline and data names and apply the rules; whatever is wrong with a recipe shows here.

    Raises:
        RecipeError: see `load_pipeline`, `plan_modules`, `load_split` and `Rollout`.
    """
    pipeline = load_pipeline(recipe.model)
    set_scheduler(pipeline, recipe.sampling.scheduler)
    rollout = Rollout(pipeline, recipe.sampling)
    planned = plan_modules(rollout.denoiser, recipe.quantization.rules)
    if recipe.cache is not None:
        cached_features(rollout.denoiser, recipe.cache)
    split = load_split(recipe.data, rollout.family.condition)
    if rollout.family.condition == "class_id":
        highest, count = max(split.calibration + split.held_out), int(rollout.denoiser.config.num_embeds_ada_norm)  # type: ignore[union-attr, arg-type]
        if highest >= count:
            raise RecipeError(f"data.path: {recipe.data.path} has class_id {highest}; this model has 0 to {count - 1}")
    return rollout, planned, split


def block_costs(rollout: Rollout, planned: list[PlannedModule], recipe: Recipe) -> tuple[int, int]:
    """About how many calls of the denoiser block reconstruction makes, and how many calls of a block it keeps."""
    clock = StepClock.from_timesteps(rollout.timesteps, recipe.quantization.timestep_groups)
    sizes = {p.name: p.macs or p.shape[0] * p.shape[1] for p in planned if p.spec}
    parts, iterations = parts_of(sizes, {p.name for p in planned if p.tune}).values(), recipe.objective.iterations
    calls = len(spread_calls(clock.groups(rollout.timesteps), iterations))
    return evaluations_made(iterations * len(parts), iterations, calls, parts), calls


def prepare(
    recipe: Recipe,
    rollout: Rollout,
    planned: list[PlannedModule],
    split: Split,
    reporter: Reporter,
    kept: Path | None = None,
) -> Session:
    """Sample the references in full precision, replace the modules, and find the initial scales.

    Args:
        kept: file that keeps the reference trajectories, so that a resumed run need not sample them again.
    """
    samples = calibration_samples(split, recipe.data)
    seed = recipe.data.seed * 100_000 + VALIDATION_SEED_OFFSET
    seen = split.calibration[: recipe.data.num_samples]  # classes or prompts; others come first, where there are more
    checked = draw(split.calibration[len(seen) :] + seen, recipe.data.validation_samples, seed)
    reference = _reference(rollout, samples, checked, recipe, reporter, kept)
    index = torch.arange(len(samples) + len(checked), device=reference.latents.device)

    specs = {p.name: p.spec for p in planned if p.spec is not None}
    clock = StepClock.from_timesteps(rollout.timesteps, recipe.quantization.timestep_groups)
    search = recipe.quantization.initialization == "mse"
    reporter.detail(f"initial weight scales of {len(specs)} modules ({recipe.quantization.initialization})")
    layers = quantize_model(rollout.denoiser, specs, clock, search)
    if recipe.export.format == "torchao":
        adopt_dynamic_scales(layers.values())
    session = Session(
        recipe,
        rollout,
        clock,
        planned,
        layers,
        reference.take(index[: len(samples)]),
        reference.take(index[len(samples) :]),
    )
    _activation_scales(session, search, reporter)
    if recipe.quantization.share_activation_scales:
        _share_activation_scales(session, reporter)
    return session


def _reference(
    rollout: Rollout, samples: Samples, checked: Samples, recipe: Recipe, reporter: Reporter, kept: Path | None
) -> Reference:
    """Full-precision trajectories of calibration and validation samples, in this order."""
    conditions = rollout.conditions(samples.inputs + checked.inputs, samples.seeds + checked.seeds)
    if kept is not None and kept.is_file():
        found = load_file(kept, device=str(conditions.noise.device))
        return Reference(found["latents"], found["predictions"], conditions)
    batches = conditions.batches(recipe.objective.batch_size)
    parts = []
    with reporter.bar("sampling calibration set, full precision", rollout.num_steps * len(batches)) as advance:
        for batch in batches:
            parts.append(rollout.trajectory(batch, lambda: advance("")))
    latents, predictions = (torch.cat([p[k] for p in parts], 1) for k in (0, 1))
    if kept is not None:
        temporary = kept.with_suffix(".tmp")
        save_file({"latents": latents.contiguous(), "predictions": predictions.contiguous()}, temporary)
        temporary.rename(kept)
    return Reference(latents, predictions, conditions)


@torch.no_grad()
def _activation_scales(session: Session, search: bool, reporter: Reporter) -> None:
    """Static scales per timestep group, from the inputs modules see along the full-precision trajectories."""
    observed = {n: layer for n, layer in session.layers.items() if layer.spec.static}
    if not observed:
        return
    rollout, clock = session.rollout, session.clock
    reference = session.reference.first(session.recipe.objective.batch_size)
    groups = torch.tensor(clock.groups(rollout.timesteps))
    values: dict[str, list[list[Tensor]]] = {n: [[] for _ in range(clock.num_groups)] for n in observed}

    def observe(layer: TrainableLayer, tokens: Tensor) -> None:
        share = OBSERVED_VALUES // int((groups == clock.group).sum())
        flat = tokens.flatten()
        picked = torch.randint(len(flat), (share,), generator=torch.Generator().manual_seed(0)).to(flat.device)
        # the ends always belong to the sample: round-to-nearest covers the whole range
        values[layer.name][clock.group].append(torch.cat([flat[picked], flat.min()[None], flat.max()[None]]))

    for layer in observed.values():
        layer.observer = observe
    with session.full_precision(), reporter.bar("activation scales", rollout.num_steps) as advance:
        for i in range(rollout.num_steps):
            rollout.predict(i, reference.latents[i], reference.conditions)
            advance("")
    for name, layer in observed.items():
        layer.observer = None
        layer.set_activation_scale([torch.cat(v) for v in values[name]], search)


def _share_activation_scales(session: Session, reporter: Reporter) -> None:
    """Before anything is learned, modules have the same scales in all timestep groups if they read the same tensor."""
    static = [layer for layer in session.layers.values() if layer.spec.static]
    shared = share_grids(static, "log_activation_scale", "activation_zero_point")
    if not shared:
        raise RecipeError("quantization.share_activation_scales: no two quantized modules read the same tensor")
    reporter.detail(f"{shared} of {len(static)} modules have the activation scales of another that reads their input")
