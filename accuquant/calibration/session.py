"""A model opened and made ready to be tuned: references sampled, modules replaced, first scales found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from accuquant.calibration.layers import TrainableLayer, adopt_dynamic_scales, full_precision, quantize_model
from accuquant.calibration.loop import UpdateLoop
from accuquant.calibration.methods import METHODS
from accuquant.calibration.methods.base import Method
from accuquant.calibration.objectives import AUTO, OBJECTIVES
from accuquant.calibration.objectives.base import Job
from accuquant.calibration.plan import PlannedModule, count_macs, plan_modules
from accuquant.calibration.reference import Reference
from accuquant.core.metrics import relative_l2
from accuquant.errors import RecipeError
from accuquant.model.families import load_pipeline, set_scheduler
from accuquant.model.rollout import Rollout
from accuquant.pipeline.data import Samples, Split, calibration_samples, draw, load_split
from accuquant.progress import Reporter
from accuquant.recipe import Cache, Objective, Recipe
from accuquant.recipe.base import nearest
from accuquant.runtime.cache.features import cached_features
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

    def loop(self, objective: Objective, steps_per_group: int, cache: Cache | None = None) -> UpdateLoop:
        """Updates of the layers as they are now, none of them made yet."""
        tuned, seed = {p.name: self.layers[p.name] for p in self.planned if p.tune}, self.recipe.data.seed
        return UpdateLoop(self.rollout, self.clock, tuned, self.reference, objective, seed, steps_per_group, cache)

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """Everything calibration may change."""
        return {n: {k: v.clone() for k, v in layer.state_dict().items()} for n, layer in self.layers.items()}

    def restore(self, snapshot: dict[str, dict[str, Tensor]]) -> None:
        for name, layer in self.layers.items():
            if "rounding_logits" not in snapshot[name]:
                layer.rounding_logits = None
            layer.load_state_dict(snapshot[name])

    @cached_property
    def counted(self) -> list[PlannedModule]:
        """The planned modules with their multiply-adds."""
        one = self.reference.first(1)
        call = partial(self.rollout.predict, 0, one.latents[0], one.conditions)
        return count_macs(self.rollout.denoiser, self.planned, call, 1)

    def job(self) -> Job:
        """What the costs of updates depend on."""
        return job_of(self.recipe, self.rollout, self.counted)

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


@contextmanager
def watched(denoiser: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """First input and first output of each named module, of its last call in the block."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            seen[name] = (given, output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [denoiser.get_submodule(name).register_forward_hook(record(name), with_kwargs=True) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def validation_errors(session: Session) -> Tensor:
    """(B,) relative L2 of the final latent of each validation sample, as the model is now."""
    latents, _ = session.rollout.trajectory(session.validation.conditions)
    return relative_l2(latents[-1], session.validation.latents[-1])


def validation_error(session: Session) -> float:
    """Their mean."""
    return float(validation_errors(session).mean())


def _check_name(key: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise RecipeError(f"{key}: must be {' or '.join(map(repr, known))} (found {name!r}){nearest(name, known)}")


def open_model(recipe: Recipe) -> tuple[Rollout, list[PlannedModule], Split]:
    """Load pipeline and data names and apply the rules; whatever is wrong with a recipe shows here.

    Raises:
        RecipeError: see `load_pipeline`, `plan_modules`, `load_split` and `Rollout`; or nothing has the name of
            `objective.target` or `quantization.initialization`.
    """
    _check_name("objective.target", recipe.objective.target, [*OBJECTIVES, AUTO])
    _check_name("quantization.initialization", recipe.quantization.initialization, list(METHODS))
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


def job_of(recipe: Recipe, rollout: Rollout, planned: list[PlannedModule]) -> Job:
    """What the costs of a recipe's updates without a cache depend on; M is 1 where it is to be found."""
    clock = StepClock.from_timesteps(rollout.timesteps, recipe.quantization.timestep_groups)
    steps = recipe.objective.steps_per_group
    steps, groups = 1 if steps == "auto" else steps, clock.groups(rollout.timesteps)
    return Job(recipe.objective, steps, groups, planned, recipe.data.num_samples)


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
    method = METHODS[recipe.quantization.initialization]()
    reporter.detail(f"initial weight scales of {len(specs)} modules ({recipe.quantization.initialization})")
    layers = quantize_model(rollout.denoiser, specs, clock, search=False)
    for layer in layers.values():
        method.weights(layer)
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
    _activation_scales(session, method, reporter)
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
def _activation_scales(session: Session, method: Method, reporter: Reporter) -> None:
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
        method.activations(layer, [torch.cat(v) for v in values[name]])


def _share_activation_scales(session: Session, reporter: Reporter) -> None:
    """Before anything is learned, modules have the same scales in all timestep groups if they read the same tensor."""
    static = [layer for layer in session.layers.values() if layer.spec.static]
    shared = share_grids(static, "log_activation_scale", "activation_zero_point")
    if not shared:
        raise RecipeError("quantization.share_activation_scales: no two quantized modules read the same tensor")
    reporter.detail(f"{shared} of {len(static)} modules have the activation scales of another that reads their input")
