"""A pipeline at one sampling setting: samples go in, tapes come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from pydantic import ValidationError
from safetensors.torch import load_file

from accuquant.errors import AccuQuantError, RecipeError, first_line
from accuquant.files import KeptFiles
from accuquant.pipeline.data import Samples
from accuquant.pipeline.record import drawing_from, recorded
from accuquant.pipeline.recording import OtherOutputs, Outputs
from accuquant.pipeline.rows import Row, call_of, check_arguments, needs_single_calls
from accuquant.pipeline.seams import default_of, takes
from accuquant.pipeline.tape import Tape
from accuquant.progress import Reporter
from accuquant.recipe import Sampling


def usual_sampling(
    pipeline: DiffusionPipeline, num_inference_steps: int | None = None, guidance_scale: float | None = None
) -> Sampling:
    """The sampling that a pipeline's call has by default, but for what is given.

    Raises:
        RecipeError: the pipeline has no number of steps of its own, or what is given cannot be.
    """
    steps = default_of(pipeline, "num_inference_steps") if num_inference_steps is None else num_inference_steps
    if steps is None:
        name = type(pipeline).__name__
        raise RecipeError(f"num_inference_steps: {name} has no number of steps by default; say how many")
    try:
        return Sampling(num_inference_steps=steps, guidance_scale=guidance_scale)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"{first['loc'][0]}: {first['msg'].replace('Input should be', 'must be')}") from error


def check_alike(tapes: Sequence[Tape], rows: Sequence[Row]) -> None:
    """Whether runs can be calibrated on together: they have as many steps, and samples of one size.

    Args:
        rows: the first of each tape.

    Raises:
        RecipeError: they have not.
    """
    found = [(len(tape), tape.per_sample(tape.state(0)).shape[1]) for tape in tapes]
    for one, row in zip(found, rows, strict=True):
        if one != found[0]:
            raise RecipeError(
                f"data: all rows have to make as many steps, and samples of one size: {rows[0]} makes {found[0][0]} "
                f"steps of {found[0][1]} numbers, and {row} {one[0]} of {one[1]}; calibrate on one size and strength"
            )


@dataclass(frozen=True)
class Recorder:
    """Makes tapes of samples: one call of the pipeline each.

    Attributes:
        folder: that pictures of the data are relative to.
    """

    pipeline: DiffusionPipeline
    sampling: Sampling
    folder: Path = Path()

    def tapes(
        self,
        samples: Samples,
        batch_size: int,
        reporter: Reporter,
        what: str,
        images: bool = False,
        kept: KeptFiles | None = None,
        between: bool = True,
    ) -> list[Tape]:
        """One for each batch of samples.

        Args:
            what: is said to be sampled.
            images: decode too, so that a tape knows how images are made of its last latents.
            kept: a folder that keeps what the networks gave: a resumed run does not evaluate them again.
            between: keep the states between the first and the last of each run.

        Raises:
            AccuQuantError: see `tape`.
        """
        batches, found = self.batches(samples, batch_size), list[Tape]()
        with reporter.bar(f"sampling {what}", self.sampling.num_inference_steps * len(batches)) as advance:
            for k, batch in enumerate(batches):
                found.append(self._kept(kept, k, batch, images, between, lambda: advance("")))
        check_alike(found, [batch.rows[0] for batch in batches])
        return found

    def _kept(
        self,
        kept: KeptFiles | None,
        number: int,
        samples: Samples,
        images: bool,
        between: bool,
        progress: Callable[[], None],
    ) -> Tape:
        """A batch's tape: one that this run has made of the file before, or the file's, or a new one."""
        if kept is None:
            made = self._recorded(samples, images, progress)[0]
            return made if between else made.ends()
        name, key = f"{number}.safetensors", (kept.folder, number, images, between)
        if (known := kept.memory.get(key)) is not None and known[0] == samples:
            tape: Tape = known[1].bound(self.pipeline)
            return tape
        again = kept.read(name, lambda file: self._again(file, samples, images, progress))
        if again is None:
            again, outputs = self._recorded(samples, images, progress)
            kept.write_tensors(name, {f"{c}.{i}": t for c, ts in outputs.items() for i, t in enumerate(ts)})
        again = again if between else again.ends()
        kept.memory[key] = samples, again
        return again

    def batches(self, samples: Samples, batch_size: int) -> list[Samples]:
        """As large as asked, where the pipeline takes lists of what differs between samples; else single ones."""
        return samples.batches(1 if needs_single_calls(self.pipeline, samples.rows) else batch_size)

    def tape(self, samples: Samples, rehearsed: bool = False) -> Tape:
        """One call of the pipeline for all of these samples.

        Args:
            rehearsed: evaluate each network once only: all of the tape but its values.

        Raises:
            AccuQuantError: the pipeline does not take such rows, fails, or cannot be recorded; it says why.
        """
        return self._recorded(samples, False, known={} if rehearsed else None)[0]

    def _again(self, file: Path, samples: Samples, images: bool, progress: Callable[[], None]) -> Tape:
        """The tape of which ``file`` keeps what the networks gave.

        Raises:
            ValueError: the file is of something else.
        """
        known: dict[int, list[tuple[int, str]]] = {}
        tensors = load_file(file, device=str(self.pipeline.device))
        for key in tensors:
            call, _, position = key.partition(".")
            known.setdefault(int(call), []).append((int(position), key))
        try:
            return self._recorded(
                samples, images, progress, {c: [tensors[key] for _, key in sorted(keys)] for c, keys in known.items()}
            )[0]
        except OtherOutputs as error:
            raise ValueError(str(error)) from error

    def _recorded(
        self,
        samples: Samples,
        images: bool,
        progress: Callable[[], None] = lambda: None,
        known: Outputs | None = None,
    ) -> tuple[Tape, Outputs]:
        pipeline = self.pipeline
        setting = self.sampling.settings
        check_arguments(pipeline, self.sampling.arguments)
        call = call_of(pipeline, samples.rows, samples.seeds, setting, self.folder)
        if images and takes(pipeline, "output_type"):
            call["output_type"] = "pt"
        try:
            with drawing_from(samples.seeds[0], pipeline):
                tape, outputs = recorded(pipeline, call, known, progress)
        except (AccuQuantError, OtherOutputs, torch.OutOfMemoryError):
            raise
        except (ValueError, TypeError, LookupError, RuntimeError, AttributeError, NotImplementedError) as error:
            raise RecipeError(
                f"{type(pipeline).__name__} cannot be run with {samples.rows[0]} at {setting}: {first_line(error)}"
            ) from error
        tape.num_samples = len(samples)
        return tape, outputs
