"""One calibrated model and a held-out set to judge caches by: what the joint benchmarks share."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from accuquant.caching.correct import fit_correction
from accuquant.calibration.loop import UpdateLoop
from accuquant.calibration.objectives.cached import CachedTrajectory
from accuquant.calibration.session import Session, open_session
from accuquant.calibration.updates import calibrate_alone
from accuquant.core.metrics import latent_psnr, relative_l2
from accuquant.evaluation.digit_classifier import DigitClassifier
from accuquant.evaluation.images import image_metrics
from accuquant.evaluation.measure import HeldOut, held_out_reference, sample
from accuquant.files import KeptFiles
from accuquant.pipeline.loading import resolve
from accuquant.progress import Reporter
from accuquant.recipe import Recipe
from accuquant.recipe.file import load_recipe, parse_recipe
from accuquant.runtime.cache.attach import cached
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.plan import CachePlan
from tools.benchmarks.accuracy.run import ADALN, ATTENTION_AND_MLP, CONFIGS

QUIET = Reporter(quiet=True)
HELD_OUT = 30
TUNED: dict[str, Any] = {"finalists": 1, "trials": 8, "noise_aware": [False], "levels": [1.0]}
MORE_TYPES: dict[str, dict[str, Any]] = {
    "W8A6": {"weight": "int8", "activation": "int6"},
    "W4A16": CONFIGS["W4A8"] | {"activation": "float"},
}


def bench_recipe(types: str, seed: int, nfc: int = 14, iterations: int = 150) -> Recipe:
    """M = 1, batches of 4 of 32 samples: what the accuracy log found to be best for its cost."""
    tree = load_recipe("dit_w8a8").model_dump(mode="json")
    tree["data"] |= {"num_samples": 32, "validation_samples": 24, "seed": seed}
    rule = (CONFIGS | MORE_TYPES)[types] | {"modules": ATTENTION_AND_MLP}
    tree["quantization"]["rules"] = [rule, ADALN]
    learn = ["weight", "weight_scale"] + ["activation_scale"] * (rule["activation"] != "float")
    tree["objective"] = {"iterations": iterations, "cached_iterations": 40, "batch_size": 4, "learn": learn}
    tree["evaluation"] |= {"num_samples": HELD_OUT, "batch_size": HELD_OUT}
    tree["tune"] = {"nfc": nfc, **TUNED}
    return parse_recipe(tree, "benchmark")


class Bench:
    """One (types, seed): the calibrated model, and a held-out set to judge by."""

    def __init__(self, types: str, seed: int, work: Path, iterations: int = 150) -> None:
        recipe = bench_recipe(types, seed, iterations=iterations).model_copy(update={"tune": None})
        self.objective = recipe.objective
        self.session: Session = open_session(recipe, QUIET)
        with self.session.full_precision():
            self.held_out: HeldOut = held_out_reference(self.session.model, recipe, QUIET)
        self.folder = work / f"{types}-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.kept = KeptFiles(self.folder, QUIET)
        self.alone: UpdateLoop = calibrate_alone(self.session, self.objective, self.kept, QUIET)[0]
        self.start = self.session.snapshot()
        self.classifier = DigitClassifier.from_folder(Path(resolve(recipe.model.id)) / "classifier").eval()
        self.images = self.held_out.frames(self.held_out.finals)

    def judge(self, plan: CachePlan | None, fitted: Fitted | None = None) -> dict[str, Any]:
        """Held-out figures of the model as it is under this cache; corrections are fitted first."""
        return self.figures(*self.fitted(plan, fitted))

    def fitted(self, plan: CachePlan | None, fitted: Fitted | None = None) -> tuple[CachePlan | None, Fitted | None]:
        if plan is not None and plan.fits:
            fitted = fit_correction(self.session, plan, QUIET, fitted)
        return plan, fitted

    def figures(self, plan: CachePlan | None, fitted: Fitted | None) -> dict[str, Any]:
        with nullcontext() if plan is None else cached(self.session.network, plan, fitted) as controller:
            made = sample(self.held_out.tapes, QUIET, "")
            nfc = self.session.num_steps if controller is None else controller.stats().nfc
        images, final, reference = self.held_out.frames(made.finals), made.latents, self.held_out.latents
        assert images is not None and self.images is not None
        with torch.no_grad():
            found = image_metrics(images, self.images, self.held_out.inputs, self.classifier)
        errors = relative_l2(final, reference)
        return {
            "full_steps": nfc,
            "relative_l2": float(errors.mean()),
            "each": [round(e, 6) for e in errors.tolist()],
            "latent_psnr": latent_psnr(final, reference),
            "psnr": found["psnr"],
            "frechet_distance": found["frechet_distance"],
        }

    def learned_shares(
        self, plan: CachePlan, length: int, updates: int = 40, fitted: Fitted | None = None
    ) -> CachedTrajectory:
        """Forecasts' shares alone, by groups of this length; the weights stay as they are."""
        how = {"iterations": updates, "learn": ("forecast",), "gradient": "exact"}
        objective = self.objective.model_copy(update=how)
        loop = self.session.loop(objective, length, plan, fitted)
        loop.run()
        assert isinstance(loop.source, CachedTrajectory)
        return loop.source

    def full_precision(self, plan: CachePlan) -> dict[str, Any]:
        with self.session.full_precision():
            return self.judge(plan)
