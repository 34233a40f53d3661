"""A pipeline opened: sampled once in rehearsal, its denoisers found, and what the rules make of their modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeVar

from diffusers import DiffusionPipeline
from torch import nn

from accuquant.calibration.concatenated import concatenated_inputs
from accuquant.calibration.kinds import kinds_of
from accuquant.calibration.methods import METHODS
from accuquant.calibration.objectives import AUTO, OBJECTIVES
from accuquant.calibration.plan import PlannedModule, counted, plan_attention, plan_modules
from accuquant.calibration.products import Products, count_products
from accuquant.errors import RecipeError, nearest
from accuquant.pipeline.data import Samples, Split, load_split
from accuquant.pipeline.denoisers import Denoiser, denoisers_of, joined, several, step_levels
from accuquant.pipeline.loading import load_pipeline, set_scheduler
from accuquant.pipeline.recorder import Recorder
from accuquant.pipeline.tape import Tape
from accuquant.recipe import Recipe, Sampling
from accuquant.runtime.cache.features import cached_features
from accuquant.runtime.clock import StepClock

T = TypeVar("T")


@dataclass(frozen=True)
class OpenedModel:
    """A pipeline opened: how it is sampled, and what it denoises with.

    Attributes:
        rehearsal: a tape of one sample whose values mean nothing: its steps, calls and shapes are those of any.
    """

    recorder: Recorder
    split: Split
    rehearsal: Tape

    @cached_property
    def denoisers(self) -> list[Denoiser]:
        return denoisers_of(self.rehearsal)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The denoisers by the names of their components."""
        return {one.name: one.network for one in self.denoisers}

    @cached_property
    def network(self) -> nn.Module:
        """The denoiser; of several, one module that holds them."""
        return joined(self.networks)

    @cached_property
    def levels(self) -> list[float]:
        """The noise level of each step."""
        return step_levels(self.denoisers)

    @property
    def num_steps(self) -> int:
        return len(self.rehearsal)

    @property
    def only(self) -> Denoiser:
        """The denoiser of a pipeline that has one.

        Raises:
            RecipeError: it has several.
        """
        return self.only_for("cache")

    def only_for(self, section: str) -> Denoiser:
        """The denoiser of a pipeline that has one, which this section of the recipe needs.

        Raises:
            RecipeError: it has several.
        """
        if len(self.denoisers) > 1:
            said = several(type(self.recorder.pipeline).__name__, self.networks)
            raise RecipeError(f"{section}: {said}; leave the section out")
        return self.denoisers[0]

    def plan(self, recipe: Recipe) -> list[PlannedModule]:
        """What a recipe makes of the denoisers' modules, see `plan_modules` and `plan_attention`.

        Raises:
            RecipeError: also if no module reads a concatenation that is to be split.
        """
        section, prefixes = recipe.quantization, [one.prefix for one in self.denoisers if one.prefix]
        splits = section.split_inputs and recipe.export.format != "torchao"  # which holds no parts
        parts = self.concatenated if splits else {}
        planned = plan_modules(self.network, section.rules, prefixes, lambda: self.kinds, parts)
        if section.split_inputs is True and not any(p.split for p in planned):
            raise RecipeError("quantization.split_inputs: no module with a quantized input reads a concatenation")
        if section.attention is not None:
            attending = [n for n in self.products.attention if n and has_parameters(self.network.get_submodule(n))]
            planned += plan_attention(section.attention, attending, prefixes)
        return planned

    @cached_property
    def kinds(self) -> dict[str, frozenset[str]]:
        """What the modules of the denoisers are for, see `kinds_of`."""
        return self._of_each(kinds_of)

    @cached_property
    def concatenated(self) -> dict[str, tuple[int, ...]]:
        """The parts of the inputs of those modules that read a concatenation, see `concatenated_inputs`."""
        return self._of_each(concatenated_inputs)

    def _of_each(self, look: Callable[[nn.Module, Callable[[], object]], dict[str, T]]) -> dict[str, T]:
        """What is found in the first step of each denoiser, by names of modules."""
        found = dict[str, T]()
        for one in self.denoisers:
            own = look(one.network, partial(self._step, min(one.levels)))
            found |= {one.prefix + name: value for name, value in own.items()}
        return found

    def counted(self, planned: list[PlannedModule]) -> list[PlannedModule]:
        """The planned modules with their multiply-adds, per sample and step of their denoiser, and what is beside."""
        return counted(planned, self.products)

    @cached_property
    def products(self) -> Products:
        """What a step of each denoiser multiplies, see `count_products`."""
        return count_products(self.network, self.step_once, self.rehearsal.num_samples)

    def step_once(self) -> None:
        """Have every denoiser make its first step, of one sample."""
        for i in sorted({min(one.levels) for one in self.denoisers}):
            self._step(i)

    def _step(self, i: int) -> None:
        self.rehearsal.step(i, self.rehearsal.state(i))

    def clocks(self, timestep_groups: int) -> list[StepClock]:
        """Of each denoiser; a group of the run's steps is one of the denoiser's that works in it."""
        found = list[StepClock]()
        for one in self.denoisers:
            own = max(1, round(timestep_groups * len(one.levels) / self.num_steps))
            found.append(StepClock.from_timesteps(one.levels.values(), own, one.coordinate))
        return found

    def groups(self, clocks: list[StepClock]) -> list[int]:
        """The timestep group of each step, counted on from denoiser to denoiser."""
        found, before = dict[int, int](), 0
        for one, clock in zip(self.denoisers, clocks, strict=True):
            found = {i: before + clock.group_of(level) for i, level in one.levels.items()} | found
            before += clock.num_groups
        return [found[i] for i in sorted(found)]


def has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _check_name(key: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise RecipeError(f"{key}: must be {' or '.join(map(repr, known))} (found {name!r}){nearest(name, known)}")


def open_model(recipe: Recipe) -> OpenedModel:
    """The pipeline that a recipe names, with its scheduler and its data, rehearsed with a sample.

    Raises:
        RecipeError: see `load_pipeline`, `set_scheduler` and `load_split`.
        AccuQuantError: see `Recorder.tape`.
    """
    pipeline = load_pipeline(recipe.model)
    set_scheduler(pipeline, recipe.sampling.scheduler)
    return opened(pipeline, recipe)


def opened(pipeline: DiffusionPipeline, recipe: Recipe) -> OpenedModel:
    """`open_model` of a pipeline that is loaded already."""
    split = load_split(recipe.data, pipeline)
    recorder = Recorder(pipeline, recipe.sampling, split.folder)
    return OpenedModel(recorder, split, recorder.tape(Samples(split.calibration[:1], [0]), rehearsed=True))


def planned_model(recipe: Recipe) -> tuple[OpenedModel, list[PlannedModule]]:
    """The model with what the rules make of it; whatever is wrong with a recipe shows here.

    Raises:
        RecipeError: see `open_model`, `plan_modules` and `cached_features`; or nothing has the name of
            `objective.target` or `quantization.initialization`.
    """
    _check_name("objective.target", recipe.objective.target, [*OBJECTIVES, AUTO])
    _check_name("quantization.initialization", recipe.quantization.initialization, list(METHODS))
    model = open_model(recipe)
    planned = model.plan(recipe)
    if recipe.tune is not None:
        model.only_for("tune")
    if recipe.cache is not None:
        cached_features(model.only.network, recipe.cache)
    steps, asked = model.num_steps, recipe.sampling.num_inference_steps
    try:
        recipe.check_steps(
            steps,
            f"the pipeline makes only {steps} steps of sampling.num_inference_steps {asked}",
            "and the steps that the pipeline makes are",
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error
    for i, setting in enumerate(recipe.sampling.also):
        _rehearse(model, recipe, i, setting.of(recipe.sampling))
    return model, planned


def _rehearse(model: OpenedModel, recipe: Recipe, number: int, setting: Sampling) -> None:
    """See to it that a further setting can be sampled, and is of the same denoisers.

    Raises:
        RecipeError: it cannot, has too few steps, or other denoisers work in it.
    """
    where, first = f"sampling.also.{number}", Samples(model.split.calibration[:1], [0])
    try:
        tape = replace(model.recorder, sampling=setting).tape(first, rehearsed=True)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    names = [[one.name for one in of] for of in (model.denoisers, denoisers_of(tape))]
    if names[0] != names[1]:
        own, others = (" and ".join(each) for each in names)
        raise RecipeError(f"{where}: {others} would work there, and {own} in `sampling`; calibrate them apart")
    asked, steps = recipe.objective.steps_per_group, len(tape)
    if isinstance(asked, int) and asked > steps:
        raise RecipeError(f"{where}: objective.steps_per_group is {asked}, and the pipeline makes {steps} steps there")
