"""A model opened and made ready to be tuned: references sampled, modules replaced, first scales found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from accuquant.calibration.inputs import train_attention
from accuquant.calibration.layers import (
    Trainable,
    TrainableLayer,
    adopt_dynamic_scales,
    full_precision,
    quantize_model,
)
from accuquant.calibration.loop import UpdateLoop
from accuquant.calibration.methods import METHODS
from accuquant.calibration.methods.base import Method
from accuquant.calibration.objectives.base import Job
from accuquant.calibration.opened import OpenedModel, planned_model
from accuquant.calibration.plan import PlannedModule
from accuquant.calibration.reference import Reference
from accuquant.calibration.sampled import sample_references
from accuquant.core.metrics import relative_l2
from accuquant.errors import RecipeError
from accuquant.files import KeptFiles
from accuquant.pipeline.data import Samples, calibration_samples, validation_samples
from accuquant.pipeline.denoisers import denoisers_of
from accuquant.pipeline.tape import Tape
from accuquant.progress import Reporter
from accuquant.recipe import Data, Objective, Quantization, Recipe
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.clock import StepClock
from accuquant.runtime.spec import share_grids
from accuquant.runtime.split import split_modules

OBSERVED_VALUES = 16384  # activations kept per module and timestep group for the scale search


@dataclass
class Session:
    """A model ready to be tuned: quantized in place, with initial scales and its full-precision reference.

    Attributes:
        clocks: of each denoiser.
        samples: that are calibrated on.
        seed: what batches and groups are drawn by.
    """

    model: OpenedModel
    clocks: list[StepClock]
    planned: list[PlannedModule]
    layers: dict[str, Trainable]
    samples: Samples
    reference: Reference
    validation: Reference
    seed: int
    recorded: dict[tuple[int, int], list[Tape]] = field(default_factory=dict)

    @property
    def network(self) -> nn.Module:
        return self.model.network

    @property
    def levels(self) -> list[float]:
        return self.model.levels

    @property
    def num_steps(self) -> int:
        return self.model.num_steps

    @property
    def groups(self) -> list[int]:
        """The timestep group of each step."""
        return self.model.groups(self.clocks)

    def loop(
        self, objective: Objective, steps_per_group: int, cache: CachePlan | None = None, fitted: Fitted | None = None
    ) -> UpdateLoop:
        """Updates of the layers as they are now, none of them made yet."""
        tuned = {name: self.layers[name] for p in self.planned if p.tune for name in p.layers}
        reference = self.reference if cache is None else self.reference.main
        given = (reference, objective, self.seed, steps_per_group, cache, fitted)
        return UpdateLoop(self.model.denoisers, self.groups, tuned, *given)

    def few(self, count: int, batch_size: int) -> list[Tape]:
        """Full-precision tapes of the first calibration samples, with their images, for a search."""
        samples = self.samples.first(count)
        key = (len(samples), min(batch_size, len(samples)))
        if key not in self.recorded:
            with self.full_precision():
                given = (samples, batch_size, Reporter(quiet=True), "")
                self.recorded[key] = self.model.recorder.tapes(*given, images=True)
        return self.recorded[key]

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
        return self.model.counted(self.planned)

    def job(self, objective: Objective) -> Job:
        """What the costs of updates depend on."""
        return job_of(objective, self.groups, self.counted, self.reference.num_samples)

    @contextmanager
    def hardened(self) -> Iterator[None]:
        """The layers are those of the export for as long as the block runs."""
        for name, layer in self.layers.items():
            self.network.set_submodule(name, layer.harden())
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                self.network.set_submodule(name, layer)

    def full_precision(self) -> AbstractContextManager[None]:
        """The layers compute in full precision for as long as the block runs."""
        return full_precision(self.layers.values())


def final_errors(tapes: list[Tape]) -> Tensor:
    """(B,) relative L2 of the final latents of each sample of the tapes, as the model is now."""
    parts = [(tape.per_sample(tape.end()), tape.per_sample(tape.state(len(tape)))) for tape in tapes]
    return torch.cat([relative_l2(*pair) for pair in parts])


def validation_errors(session: Session) -> Tensor:
    """(B,) relative L2 of the final latents of each validation sample, as the model is now."""
    return final_errors(list(session.validation.tapes))


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


def open_session(recipe: Recipe, reporter: Reporter, kept: KeptFiles | None = None) -> Session:
    """All of a recipe up to the first update: its model opened, referred to, quantized and given its first scales.

    Args:
        kept: keeps the reference trajectories, so that they need not be sampled again.
    """
    model, planned = planned_model(recipe)
    references = sample_references(model, recipe, reporter, kept)
    session = quantize(model, planned, references, recipe, reporter)
    if recipe.export.format == "torchao":
        adopt_dynamic_scales(session.layers.values())
    find_activation_scales(session, recipe.quantization, recipe.objective.batch_size, reporter)
    return session


def further_validation(
    session: Session,
    data: Data,
    span: tuple[int, int],
    batch_size: int,
    reporter: Reporter,
    kept: KeptFiles | None = None,
) -> list[Tape]:
    """Full-precision tapes of the validation samples from the first of ``span`` up to the second.

    Args:
        kept: keeps what full precision makes of them, which then is sampled once.
    """
    (first, last), samples = span, validation_samples(session.model.split, data, span[1])
    with session.full_precision():
        return session.model.recorder.tapes(
            Samples(samples.rows[first:], samples.seeds[first:]),
            batch_size,
            reporter,
            "further validation samples, full precision",
            images=True,
            kept=None if kept is None else kept.inside(f"validation-{first}-{last}"),
            between=False,
        )


def quantize(
    model: OpenedModel,
    planned: list[PlannedModule],
    references: tuple[Reference, Reference],
    recipe: Recipe,
    reporter: Reporter,
) -> Session:
    """Replace the planned modules in place by trainable ones, with initial scales of their weights.

    Args:
        references: of calibration and of validation, sampled before.
    """
    quantization = recipe.quantization
    specs = {p.name: p.spec for p in planned if p.spec is not None}
    reporter.detail(f"initial weight scales of {len(specs)} modules ({quantization.initialization})")
    layers, method = dict[str, Trainable](), METHODS[quantization.initialization]()
    clocks = model.clocks(quantization.timestep_groups)
    for one, clock in zip(model.denoisers, clocks, strict=True):
        cut = len(one.prefix)
        own = {name[cut:]: spec for name, spec in specs.items() if name.startswith(one.prefix)}
        split = {p.module[cut:]: p.split for p in planned if p.split and p.name.startswith(one.prefix)}
        split_modules(one.network, split)
        attention = {p.module[cut:]: p.attention for p in planned if p.attention and p.name.startswith(one.prefix)}
        train_attention(one.network, attention, clock)
        made = quantize_model(one.network, own, clock, search=False)
        layers |= {one.prefix + name: layer for name, layer in made.items()}
    for layer in layers.values():
        if isinstance(layer, TrainableLayer):
            method.weights(layer)
    samples = calibration_samples(model.split, recipe.data)
    return Session(model, clocks, planned, layers, samples, *references, recipe.data.seed)


def find_activation_scales(session: Session, quantization: Quantization, batch_size: int, reporter: Reporter) -> None:
    """Static scales per timestep group, of the inputs that modules see in full precision; shared, if that is asked.

    Raises:
        RecipeError: a module never runs; or they are to be shared, and no two modules read the same tensor.
    """
    method = METHODS[quantization.initialization]()
    _activation_scales(session, session.reference.first(batch_size), method, reporter)
    if quantization.share_activation_scales:
        _share_activation_scales(session, reporter)


@torch.no_grad()
def _activation_scales(session: Session, tapes: list[Tape], method: Method, reporter: Reporter) -> None:
    """Static scales per timestep group, from the inputs modules see along these full-precision trajectories."""
    observed = {n: layer for n, layer in session.layers.items() if layer.spec.static}
    if not observed:
        return
    values: dict[str, list[list[Tensor]]] = {n: [[] for _ in range(x.clock.num_groups)] for n, x in observed.items()}
    names = {layer: name for name, layer in observed.items()}
    shares = dict[StepClock, list[int]]()
    of_each = (
        [denoisers_of(tape) for tape in tapes] if session.reference.settings else [session.model.denoisers] * len(tapes)
    )
    for k, clock in enumerate(session.clocks):
        of = [group for denoisers in of_each for group in clock.groups(denoisers[k].levels.values())]
        shares[clock] = [max(1, OBSERVED_VALUES // max(1, of.count(g))) for g in range(clock.num_groups)]

    def observe(layer: Trainable, tokens: Tensor) -> None:
        flat, group = tokens.flatten(), layer.clock.group
        share = shares[layer.clock][group]
        picked = torch.randint(len(flat), (share,), generator=torch.Generator().manual_seed(0)).to(flat.device)
        # the ends always belong to the sample: round-to-nearest covers the whole range
        values[names[layer]][group].append(torch.cat([flat[picked], flat.min()[None], flat.max()[None]]))

    for layer in observed.values():
        layer.observer = observe
    with session.full_precision(), reporter.bar("activation scales", sum(map(len, tapes))) as advance:
        for tape in tapes:
            for i in range(len(tape)):
                tape.step(i, tape.state(i))
                advance("")
    if idle := [name for name, groups in values.items() if not all(groups)]:
        raise RecipeError(
            f"quantization.rules: {idle[0]} does not run at every noise level, so nothing is known of its inputs; give "
            "it weight: float in a rule before"
        )
    for name, layer in observed.items():
        layer.observer = None
        method.activations(layer, [torch.cat(v) for v in values[name]])


def _share_activation_scales(session: Session, reporter: Reporter) -> None:
    """Before anything is learned, modules have the same scales in all timestep groups if they read the same tensor."""
    static = [layer for layer in session.layers.values() if isinstance(layer, TrainableLayer) and layer.spec.static]
    shared = share_grids(static, "log_activation_scale", "activation_zero_point")
    if not shared:
        raise RecipeError("quantization.share_activation_scales: no two quantized modules read the same tensor")
    reporter.detail(f"{shared} of {len(static)} modules have the activation scales of another that reads their input")
