"""A model opened and made ready to be tuned: references sampled, modules replaced, first scales found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from accuquant.calibration.layers import TrainableLayer, adopt_dynamic_scales, full_precision, quantize_model
from accuquant.calibration.loop import UpdateLoop
from accuquant.calibration.methods import METHODS
from accuquant.calibration.methods.base import Method
from accuquant.calibration.objectives import AUTO, OBJECTIVES
from accuquant.calibration.objectives.base import Job
from accuquant.calibration.plan import PlannedModule, count_macs, plan_modules
from accuquant.calibration.reference import Reference
from accuquant.core.metrics import relative_l2
from accuquant.errors import RecipeError, nearest
from accuquant.files import KeptFiles
from accuquant.model.families import load_pipeline, set_scheduler
from accuquant.model.rollout import Conditions, Rollout
from accuquant.pipeline.data import Split, calibration_samples, load_split, validation_samples
from accuquant.progress import Reporter
from accuquant.recipe import Data, Model, Objective, Quantization, Recipe, Sampling
from accuquant.runtime.cache.features import cached_features
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.clock import StepClock
from accuquant.runtime.spec import share_grids

REFERENCE = "reference.safetensors"
OBSERVED_VALUES = 16384  # activations kept per module and timestep group for the scale search


@dataclass
class Session:
    """A model ready to be tuned: quantized in place, with initial scales and its full-precision reference.

    Attributes:
        seed: what batches and groups are drawn by.
    """

    rollout: Rollout
    clock: StepClock
    planned: list[PlannedModule]
    layers: dict[str, TrainableLayer]
    reference: Reference
    validation: Reference
    seed: int

    def loop(
        self, objective: Objective, steps_per_group: int, cache: CachePlan | None = None, fitted: Fitted | None = None
    ) -> UpdateLoop:
        """Updates of the layers as they are now, none of them made yet."""
        tuned, given = {p.name: self.layers[p.name] for p in self.planned if p.tune}, (steps_per_group, cache, fitted)
        return UpdateLoop(self.rollout, self.clock, tuned, self.reference, objective, self.seed, *given)

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

    def job(self, objective: Objective) -> Job:
        """What the costs of updates depend on."""
        return job_of(
            objective, self.clock.groups(self.rollout.timesteps), self.counted, len(self.reference.conditions)
        )

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


def validation_errors(session: Session) -> Tensor:
    """(B,) relative L2 of the final latent of each validation sample, as the model is now."""
    latents, _ = session.rollout.trajectory(session.validation.conditions)
    return relative_l2(latents[-1], session.validation.latents[-1])


def validation_error(session: Session) -> float:
    """Their mean."""
    return float(validation_errors(session).mean())


def job_of(objective: Objective, timestep_groups: list[int], planned: list[PlannedModule], num_samples: int) -> Job:
    """What the costs of updates without a cache depend on; M is 1 where it is to be found.

    Args:
        timestep_groups: of each denoising step.
    """
    steps = 1 if objective.steps_per_group == "auto" else objective.steps_per_group
    return Job(objective, steps, timestep_groups, planned, num_samples)


def _check_name(key: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise RecipeError(f"{key}: must be {' or '.join(map(repr, known))} (found {name!r}){nearest(name, known)}")


def open_rollout(model: Model, sampling: Sampling) -> Rollout:
    """The pipeline that a recipe names, with its scheduler, taken apart.

    Raises:
        RecipeError: see `load_pipeline`, `set_scheduler` and `Rollout`.
    """
    pipeline = load_pipeline(model)
    set_scheduler(pipeline, sampling.scheduler)
    return Rollout(pipeline, sampling)


def load_inputs(rollout: Rollout, data: Data) -> Split:
    """What the pipeline is conditioned on, to calibrate with and to judge by.

    Raises:
        RecipeError: see `load_split`; or there is a class that the model does not know.
    """
    split = load_split(data, rollout.family.condition)
    if rollout.family.condition == "class_id":
        highest, count = max(split.calibration + split.held_out), int(rollout.denoiser.config.num_embeds_ada_norm)  # type: ignore[union-attr, arg-type]
        if highest >= count:
            raise RecipeError(f"data.path: {data.path} has class_id {highest}; this model has 0 to {count - 1}")
    return split


def open_model(recipe: Recipe) -> tuple[Rollout, list[PlannedModule], Split]:
    """Load pipeline and data names and apply the rules; whatever is wrong with a recipe shows here.

    Raises:
        RecipeError: see `open_rollout`, `plan_modules`, `cached_features` and `load_inputs`; or nothing has the name of
            `objective.target` or `quantization.initialization`.
    """
    _check_name("objective.target", recipe.objective.target, [*OBJECTIVES, AUTO])
    _check_name("quantization.initialization", recipe.quantization.initialization, list(METHODS))
    rollout = open_rollout(recipe.model, recipe.sampling)
    planned = plan_modules(rollout.denoiser, recipe.quantization.rules)
    if recipe.cache is not None:
        cached_features(rollout.denoiser, recipe.cache)
    return rollout, planned, load_inputs(rollout, recipe.data)


def open_session(recipe: Recipe, reporter: Reporter, kept: KeptFiles | None = None) -> Session:
    """All of a recipe up to the first update: its model opened, referred to, quantized and given its first scales.

    Args:
        kept: keeps the reference trajectories, so that they need not be sampled again.
    """
    rollout, planned, split = open_model(recipe)
    references = sample_references(rollout, split, recipe.data, recipe.objective.batch_size, reporter, kept)
    session = quantize(rollout, planned, references, recipe.quantization, recipe.data.seed, reporter)
    if recipe.export.format == "torchao":
        adopt_dynamic_scales(session.layers.values())
    find_activation_scales(session, recipe.quantization, recipe.objective.batch_size, reporter)
    return session


def further_validation(
    session: Session,
    split: Split,
    data: Data,
    span: tuple[int, int],
    batch_size: int,
    reporter: Reporter,
    kept: KeptFiles | None = None,
) -> tuple[Conditions, Tensor]:
    """Validation samples from the first of ``span`` up to the second, which go on from those that the session has.

    Args:
        kept: keeps what full precision makes of them, which then is sampled once.

    Returns:
        their noise and conditioning, and full precision's final latents (B, C, H, W).
    """
    rollout, (first, last) = session.rollout, span
    samples, name = validation_samples(split, data, last), f"validation-{first}-{last}.safetensors"
    conditions = rollout.conditions(samples.inputs[first:], samples.seeds[first:])
    found = None if kept is None else kept.read_tensors(name, str(conditions.noise.device))
    if found is not None:
        return conditions, found["latents"]
    what = "further validation samples, full precision"
    with session.full_precision():
        parts = [latents[-1] for latents, _ in rollout.trajectories(conditions.batches(batch_size), reporter, what)]
    final = torch.cat(parts)
    if kept is not None:
        kept.write_tensors(name, {"latents": final})
    return conditions, final


def sample_references(
    rollout: Rollout, split: Split, data: Data, batch_size: int, reporter: Reporter, kept: KeptFiles | None = None
) -> tuple[Reference, Reference]:
    """Full-precision trajectories of the calibration samples, and of those that choices are made by.

    Args:
        kept: keeps them in a file, so that a resumed run need not sample them again.
    """
    samples, checked = calibration_samples(split, data), validation_samples(split, data, data.validation_samples)
    conditions = rollout.conditions(samples.inputs + checked.inputs, samples.seeds + checked.seeds)
    reference = None if kept is None else kept.read(REFERENCE, partial(_read_reference, conditions))
    if reference is None:
        reference = _sample_reference(rollout, conditions, batch_size, reporter)
        if kept is not None:
            kept.write_tensors(REFERENCE, {"latents": reference.latents, "predictions": reference.predictions})
    index = torch.arange(len(conditions), device=reference.latents.device)
    return reference.take(index[: len(samples)]), reference.take(index[len(samples) :])


def _read_reference(conditions: Conditions, path: Path) -> Reference:
    found = load_file(path, device=str(conditions.noise.device))
    reference = Reference(found["latents"], found["predictions"], conditions)
    if reference.latents.shape[1:] != conditions.noise.shape:
        raise ValueError(f"latents of shape {tuple(reference.latents.shape)} for noise {tuple(conditions.noise.shape)}")
    return reference


def _sample_reference(rollout: Rollout, conditions: Conditions, batch_size: int, reporter: Reporter) -> Reference:
    what = "sampling calibration set, full precision"
    parts = list(rollout.trajectories(conditions.batches(batch_size), reporter, what))
    latents, predictions = (torch.cat([p[k] for p in parts], 1) for k in (0, 1))
    return Reference(latents, predictions, conditions)


def quantize(
    rollout: Rollout,
    planned: list[PlannedModule],
    references: tuple[Reference, Reference],
    quantization: Quantization,
    seed: int,
    reporter: Reporter,
) -> Session:
    """Replace the planned modules in place by trainable ones, with initial scales of their weights.

    Args:
        references: of calibration and of validation, sampled before.
        seed: what batches and groups will be drawn by.
    """
    specs = {p.name: p.spec for p in planned if p.spec is not None}
    clock = StepClock.from_timesteps(rollout.timesteps, quantization.timestep_groups)
    reporter.detail(f"initial weight scales of {len(specs)} modules ({quantization.initialization})")
    layers, method = (
        quantize_model(rollout.denoiser, specs, clock, search=False),
        METHODS[quantization.initialization](),
    )
    for layer in layers.values():
        method.weights(layer)
    return Session(rollout, clock, planned, layers, *references, seed)


def find_activation_scales(session: Session, quantization: Quantization, batch_size: int, reporter: Reporter) -> None:
    """Static scales per timestep group, of the inputs that modules see in full precision; shared, if that is asked.

    Raises:
        RecipeError: they are to be shared, and no two modules read the same tensor.
    """
    method = METHODS[quantization.initialization]()
    _activation_scales(session, session.reference.first(batch_size), method, reporter)
    if quantization.share_activation_scales:
        _share_activation_scales(session, reporter)


@torch.no_grad()
def _activation_scales(session: Session, reference: Reference, method: Method, reporter: Reporter) -> None:
    """Static scales per timestep group, from the inputs modules see along these full-precision trajectories."""
    observed = {n: layer for n, layer in session.layers.items() if layer.spec.static}
    if not observed:
        return
    rollout, clock = session.rollout, session.clock
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
