"""An export in other processes, whose instruction sets differ: one makes it, each samples from it; and how far apart.

A program, for the variables that choose instruction sets are read once, when torch is loaded:

    across_settings.py make FOLDER [bundled]      calibrates FOLDER/export, and keeps a noise beside it
    across_settings.py sample FOLDER OUT          final latents from that noise, in both arithmetics and full precision
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiTPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from accuquant.pipeline.data import Samples
from accuquant.pipeline.loading import BUNDLED
from accuquant.pipeline.recorder import Recorder
from accuquant.pipeline.tape import Tape
from accuquant.programs.calibrate import calibrate
from accuquant.progress import Reporter
from accuquant.recipe import Sampling
from accuquant.recipe.file import parse_recipe
from accuquant.runtime.arithmetic import set_arithmetic

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

import conftest  # noqa: E402, F401  sets threads, forgets what this machine measured
from helpers import recipe_tree  # noqa: E402
from pipelines import make_pipeline  # noqa: E402

MKL = {"default": "SSE4_2", "avx2": "AVX2", "avx512": "AVX512"}  # its products follow torch's other operations
SAMPLING = Sampling(num_inference_steps=6, guidance_scale=1.5)
SAMPLES = Samples([{"class_labels": k} for k in (1, 2, 3)], [5, 6, 7])

# Relative L2 of final latents between any two settings. Full precision differs by the order of its sums. A value that
# such a difference carries over the edge of a rounding is a whole step off, with quantized activations in either
# arithmetic: seen up to 1.6 % on the bundled model at these 6 steps, 0.03 % on the tiny one; 1.5e-6 in full precision.
BOUNDS = {"full precision": 1e-5, "reference": 0.03, "integer": 0.03}


def environment(aten: str, onednn: str, threads: int) -> dict[str, str]:
    """Of a process that has these instructions at most."""
    chosen = {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": MKL[aten]}
    counts = dict.fromkeys(("ACCUQUANT_TEST_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | chosen | counts | {"PYTHONPATH": path}


def run(environment: dict[str, str], *arguments: str) -> None:
    """This program with these arguments.

    Raises:
        RuntimeError: it failed; what it printed.
    """
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-3000:]}")


def make(folder: Path, bundled: bool = False) -> None:
    model = BUNDLED / "digits-dit" if bundled else folder / "model"
    if not bundled:
        make_pipeline().save_pretrained(model)
    tree = recipe_tree(model, folder / "export", sampling=SAMPLING.model_dump(mode="json", exclude_unset=True))
    tree["evaluation"] |= {"reconstruct": False}
    if bundled:
        tree["quantization"]["rules"][0] |= {"weight": "int8", "granularity": "channel"}
        del tree["quantization"]["rules"][0]["group_size"]
    calibrate(parse_recipe(tree, "across settings"), Reporter(quiet=True))
    (noise,) = rehearsed(model).state(0).latents
    save_file({"noise": noise.contiguous()}, folder / "noise.safetensors")
    (folder / "model.txt").write_text(str(model))


def rehearsed(model: Path) -> Tape:
    """The steps of a pipeline from the samples' noise; of its states only the first means anything."""
    return Recorder(DiTPipeline.from_pretrained(model), SAMPLING).tape(SAMPLES, rehearsed=True)


@torch.no_grad()
def sample(folder: Path, out: Path) -> None:
    noise, found = load_file(folder / "noise.safetensors")["noise"], dict[str, Tensor]()
    for kind in BOUNDS:
        full = kind == "full precision"
        tape = rehearsed(Path((folder / "model.txt").read_text()) if full else folder / "export")
        if not full:
            set_arithmetic(tape.pipeline.transformer, kind)
        # the noise of a seed, too, has other last bits elsewhere
        state = replace(tape.state(0), latents=(noise,))
        for i in range(len(tape)):
            state = tape.step(i, state)
        found[kind] = tape.per_sample(state).contiguous()
    save_file(found, out)


def apart(one: Path, other: Path) -> dict[str, float]:
    """Relative L2 of each kind of final latents."""
    ours, theirs = load_file(one), load_file(other)
    return {kind: float((ours[kind] - theirs[kind]).norm() / theirs[kind].norm()) for kind in BOUNDS}


def main() -> None:
    torch.manual_seed(0)
    what, folder, *rest = sys.argv[1:]
    if what == "make":
        make(Path(folder), rest == ["bundled"])
    else:
        sample(Path(folder), Path(rest[0]))


if __name__ == "__main__":
    main()
