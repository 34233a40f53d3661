"""The loading of the pipeline that a recipe names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub import hf_hub_download

from accuquant.errors import RecipeError, first_line, nearest
from accuquant.recipe import Model

INDEX = "model_index.json"
BUNDLED = Path(__file__).parent.parent / "bundled"


def load_pipeline(model: Model) -> DiffusionPipeline:
    """Load what ``model.id`` names: ``bundled:NAME``, a local folder, or a hub id (only that uses the network).

    Only safetensors are read.

    Raises:
        RecipeError: no such model, it cannot be reached, or it holds no safetensors.
    """
    source, device = resolve(model.id), pick_device(model.device)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            source,
            revision=model.revision,
            dtype=getattr(torch, model.dtype),
            use_safetensors=True,
            **left_out(source, model.revision),
        ).to(device)
    # AttributeError: a class that this diffusers does not have; ImportError: a package that a pipeline needs
    except (OSError, ValueError, RuntimeError, AttributeError, ImportError) as error:
        if Path(source).is_dir():
            raise RecipeError(f"model.id: cannot load {model.id!r} ({first_line(error)})") from error
        raise RecipeError(
            f"model.id: no local folder is called {model.id!r}, and the model hub cannot be reached or has no such "
            f"model. Download it where there is a network and give its folder ({first_line(error)[:160]} ...)"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    _keep_labels(pipeline)
    return pipeline


def left_out(source: str, revision: str | None = None) -> dict[str, None]:
    """Components that a pipeline needs and that were saved as none, as arguments: diffusers wants to be told again.

    Stable Diffusion 3 without T5 is the usual case.
    """
    folder = Path(source)
    file = folder / INDEX if folder.is_dir() else Path(hf_hub_download(source, INDEX, revision=revision))
    index = json.loads(file.read_text(encoding="utf-8"))
    optional = getattr(getattr(diffusers, str(index.get("_class_name")), None), "_optional_components", [])
    return {name: None for name, value in index.items() if value == [None, None] and name not in optional}


def _keep_labels(pipeline: DiffusionPipeline) -> None:
    """DiTPipeline reads class names from model_index.json, but would not write them there again."""
    names: dict[int, list[str]] = {}
    for name, number in getattr(pipeline, "labels", {}).items():
        names.setdefault(number, []).append(name)
    if names:
        pipeline.register_to_config(id2label={str(number): ", ".join(found) for number, found in names.items()})


def resolve(model_id: str) -> str:
    """Folder or hub id behind ``model.id``.

    Raises:
        RecipeError: unknown bundled model, or a path that does not exist.
    """
    if model_id.startswith("bundled:"):
        name = model_id.removeprefix("bundled:")
        known = (
            sorted(p.name for p in BUNDLED.iterdir() if (p / "model_index.json").is_file()) if BUNDLED.is_dir() else []
        )
        if name not in known:
            raise RecipeError(
                f"model.id: no bundled model {name!r}{nearest(name, known)}; bundled models: {', '.join(known)}"
            )
        return str(BUNDLED / name)
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        folder = Path(os.path.expanduser(model_id))
        if not (folder / "model_index.json").is_file():
            raise RecipeError(f"model.id: {model_id!r} is not a diffusers pipeline folder (no model_index.json in it)")
        return str(folder)
    return model_id


def set_scheduler(pipeline: DiffusionPipeline, name: str | None) -> None:
    """Replace the pipeline's scheduler by another class with the same configuration.

    Raises:
        RecipeError: diffusers has no scheduler of that name.
    """
    if name is None:
        return
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
        raise RecipeError(f"sampling.scheduler: diffusers has no scheduler {name!r}{nearest(name, known)}")
    if getattr(pipeline, "scheduler", None) is None:
        kinds = ", ".join(name for name in pipeline.components if name.endswith("scheduler")) or "none"
        raise RecipeError(
            f"sampling.scheduler: {type(pipeline).__name__} has no component called scheduler (its own: {kinds}); "
            "leave it out"
        )
    scheduler: Any = found
    pipeline.register_modules(scheduler=scheduler.from_config(pipeline.scheduler.config))


def pick_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        RecipeError: the device does not exist here.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        picked = torch.device(name)
        torch.empty(1, device=picked).cpu()  # `meta` has no values to copy
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"model.device: {device!r} is not available here ({first_line(error)})") from error
    return picked
