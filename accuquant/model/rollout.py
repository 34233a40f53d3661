"""Sampling taken apart: conditioning, one denoising step, a whole trajectory, each bit-equal to the pipeline's own.

The pipeline itself prepares noise and conditioning: it is run up to the first call of its denoiser, and what it passed
there is kept. So text encoders, label embedding and noise scaling stay diffusers' business.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from accuquant.core.solver import LinearSolver, NotLinear, Step, probe
from accuquant.errors import RecipeError
from accuquant.model.families import denoiser_of, family_of
from accuquant.progress import Reporter
from accuquant.recipe import Sampling


@dataclass(frozen=True)
class Conditions:
    """First latents and conditioning of B samples.

    Attributes:
        noise: (B, C, H, W), the latent before the first step.
        kwargs: the denoiser's other arguments; tensors have B rows, or 2 B with guidance (two halves).
    """

    noise: Tensor
    kwargs: dict[str, Any]

    def __len__(self) -> int:
        return self.noise.shape[0]

    def take(self, index: Tensor) -> Conditions:
        """The samples at ``index`` (1-d), both guidance halves of each."""
        total = len(self)
        return Conditions(self.noise[index], _map(self.kwargs, lambda t: _take(t, index, total)))

    def batches(self, size: int) -> list[Conditions]:
        return [self.take(i) for i in torch.arange(len(self), device=self.noise.device).split(size)]

    @staticmethod
    def join(parts: list[Conditions]) -> Conditions:
        """Concatenate; guidance halves stay halves."""
        if len(parts) == 1:
            return parts[0]
        return Conditions(
            torch.cat([p.noise for p in parts]), _join([p.kwargs for p in parts], [len(p) for p in parts])
        )


class Rollout:
    """A pipeline at one sampling setting.

    Raises:
        RecipeError: the scheduler's update is not linear in latents and predictions (named, with the reason).
    """

    def __init__(self, pipeline: DiffusionPipeline, sampling: Sampling) -> None:
        self.pipeline, self.family, self.sampling = pipeline, family_of(pipeline), sampling
        self.denoiser = denoiser_of(pipeline)
        self.guided = sampling.guidance_scale > 1
        try:
            scheduler = self._fresh_scheduler()
        except ValueError as error:  # more steps than the model was trained with
            raise RecipeError(f"sampling.num_inference_steps: {error}") from error
        self.timesteps: Tensor = scheduler.timesteps
        self.num_steps = len(self.timesteps)
        try:
            self.solver: LinearSolver = probe(self._make_step, self.num_steps)
        except (NotLinear, AttributeError, NotImplementedError, TypeError, IndexError, AssertionError) as error:
            raise RecipeError(
                f"sampling.scheduler: {type(scheduler).__name__} cannot be calibrated with {self.family.pipeline}: "
                f"{str(error) or type(error).__name__}. "
                "DDIMScheduler (clip_sample false), DPMSolverMultistepScheduler and the Euler schedulers can"
            ) from error
        self.input_scales = self._input_scales()

    def conditions(self, inputs: list[Any], seeds: list[int], batch_size: int = 32) -> Conditions:
        """Noise and conditioning for B samples, as the pipeline prepares them.

        Args:
            inputs: class ids or prompts.
            seeds: one noise seed for each sample, so that a sample does not depend on its batch.
        """
        parts = []
        for k in range(0, len(inputs), batch_size):
            chunk = inputs[k : k + batch_size]
            generators = [torch.Generator().manual_seed(s) for s in seeds[k : k + batch_size]]
            parts.append(self._capture(chunk, generators))
        return Conditions.join(parts)

    @torch.no_grad()
    def trajectory(self, conditions: Conditions, progress: Callable[[], None] | None = None) -> tuple[Tensor, Tensor]:
        """Sample with the pipeline's own scheduler.

        Returns:
            latents (T + 1, B, C, H, W), the last of them what the pipeline decodes, and predictions (T, B, C, H, W).
        """
        scheduler = self._fresh_scheduler()
        x = conditions.noise
        latents, predictions = [x], []
        for i, t in enumerate(self.timesteps):
            scaled = scheduler.scale_model_input(x, t)
            prediction = self._predict(i, scaled, conditions.kwargs)
            x = scheduler.step(prediction, t, scaled if self.family.steps_scaled_input else x, return_dict=False)[0]
            latents.append(x)
            predictions.append(prediction)
            if progress is not None:
                progress()
        return torch.stack(latents), torch.stack(predictions)

    def trajectories(
        self, batches: Sequence[Conditions], reporter: Reporter, what: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`trajectory` of each batch, under one bar that says ``what`` is sampled."""
        with reporter.bar(what, self.num_steps * len(batches)) as advance:
            for batch in batches:
                yield self.trajectory(batch, lambda: advance(""))

    def predict(self, i: int, x: Tensor, conditions: Conditions) -> Tensor:
        """Guided prediction eps (B, C, H, W) at step i for latent x (B, C, H, W); differentiable."""
        scale = self.input_scales[i]
        return self._predict(i, x if scale == 1 else x * scale, conditions.kwargs)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Final latents (B, C, H, W) -> images (B, 1 or 3, H', W') in [0, 1], as the pipeline decodes them."""
        vae = self.pipeline.vae
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        samples = vae.decode(1 / vae.config.scaling_factor * latents.to(vae.dtype) + shift).sample
        images: Tensor = (samples / 2 + 0.5).clamp(0, 1).float()
        return images

    def _predict(self, i: int, scaled: Tensor, kwargs: dict[str, Any]) -> Tensor:
        model_input = torch.cat([scaled, scaled]) if self.guided else scaled
        timestep = self.timesteps[i][None].to(model_input.device).expand(model_input.shape[0])
        output = self.denoiser(model_input, timestep=timestep, **kwargs)
        prediction: Tensor = output[0] if isinstance(output, tuple) else output.sample
        prediction = prediction[:, : scaled.shape[1]]  # learned variance follows the noise, and is not part of it
        if not self.guided:
            return prediction
        first, second = prediction.chunk(2)
        conditional, unconditional = (first, second) if self.family.conditional_first else (second, first)
        guided: Tensor = unconditional + self.sampling.guidance_scale * (conditional - unconditional)
        return guided

    def _capture(self, inputs: list[Any], generators: list[torch.Generator]) -> Conditions:
        """Run the pipeline until it calls its denoiser."""
        argument = "class_labels" if self.family.condition == "class_id" else "prompt"
        original, scheduler = self.pipeline.scheduler, copy.deepcopy(self.pipeline.scheduler)
        scale, noise = scheduler.scale_model_input, list[Tensor]()

        def record(sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            noise.append(sample)
            scaled: Tensor = scale(sample, *args, **kwargs)
            return scaled

        def stop(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(kwargs)

        scheduler.scale_model_input = record
        self.pipeline.scheduler = scheduler
        handle = self.denoiser.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        try:
            self.pipeline(
                **{argument: inputs},
                guidance_scale=self.sampling.guidance_scale,
                num_inference_steps=self.sampling.num_inference_steps,
                generator=generators,
            )
        except _Reached as reached:
            kwargs = {k: v for k, v in reached.kwargs.items() if k not in ("timestep", "return_dict")}
        finally:
            handle.remove()
            self.pipeline.scheduler = original
        return Conditions(noise[0][: len(inputs)].clone(), kwargs)

    def _fresh_scheduler(self) -> Any:
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(self.sampling.num_inference_steps)
        return scheduler

    def _make_step(self) -> Step:
        scheduler = self._fresh_scheduler()

        def step(i: int, prediction: Tensor, x: Tensor) -> Tensor:
            t = scheduler.timesteps[i]
            scaled = scheduler.scale_model_input(x, t)
            out: Tensor = scheduler.step(
                prediction, t, scaled if self.family.steps_scaled_input else x, return_dict=False
            )[0]
            return out

        return step

    def _input_scales(self) -> list[float]:
        """What `scale_model_input` multiplies the latent with at each step."""
        scheduler, scales = self._fresh_scheduler(), []
        for t in self.timesteps:
            one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
            scales.append(float(scheduler.scale_model_input(one, t)))
            scheduler.step(torch.zeros_like(one), t, one)
        return scales


class _Reached(Exception):
    """The pipeline has called its denoiser."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        super().__init__("the denoiser was reached")
        self.kwargs = kwargs


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply to every tensor in nested dicts and lists."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: _map(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(v, change) for v in value)
    return value


def _take(t: Tensor, index: Tensor, total: int) -> Tensor:
    if t.dim() == 0 or t.shape[0] not in (total, 2 * total):
        return t
    return t[index] if t.shape[0] == total else torch.cat([t[index], t[index + total]])


def _join(values: list[Any], sizes: list[int]) -> Any:
    first = values[0]
    if isinstance(first, Tensor) and first.dim() > 0 and first.shape[0] == 2 * sizes[0]:
        halves = [v.split(size) for v, size in zip(values, sizes, strict=True)]
        return torch.cat([h[0] for h in halves] + [h[1] for h in halves])
    if isinstance(first, Tensor) and first.dim() > 0 and first.shape[0] == sizes[0]:
        return torch.cat(values)
    if isinstance(first, dict):
        return {k: _join([v[k] for v in values], sizes) for k in first}
    return first
