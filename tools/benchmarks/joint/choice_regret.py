"""By which rule, and on how many validation samples, the tuner's choice is near the best on held-out samples.

`roll` calibrates the bundled model with some types, makes the tuner's candidates at some numbers of full steps, and
rolls each out on many validation and many held-out samples (other classes, other noise), once. `table` draws from the
validation samples, with replacement, has each rule choose by what is drawn, and looks up how much worse the choice is
on the held-out samples than the best candidate there: its regret. Every candidate is one line of results.jsonl and is
not repeated:

    python -m tools.benchmarks.joint.choice_regret roll --types int8,int4 --nfc 7,5
    python -m tools.benchmarks.joint.choice_regret table
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from accuquant.calibration.session import open_session
from accuquant.calibration.updates import calibrate_alone
from accuquant.core.choice import cheapest_equal, leaders, log_error, undecided
from accuquant.evaluation.measure import held_out_reference
from accuquant.files import KeptFiles
from accuquant.programs.tune import explore, model_as
from accuquant.progress import Reporter
from accuquant.recipe.file import load_recipe
from accuquant.tuning.budget import LEADERS, type_combinations
from accuquant.tuning.candidates import Checked, Place
from accuquant.tuning.tried import NAIVE, Candidate, Tried
from tools.benchmarks.rows import add_row, read_rows

app = typer.Typer(add_completion=False, help=__doc__)
QUIET = Reporter(quiet=True)
Out = Annotated[Path, typer.Option(help="Folder of the results.")]
DEFAULT_OUT = Path("tools/benchmarks/joint/results/choice")
LOGGED_OUT = DEFAULT_OUT.with_name("choice-logged")
PICKS = {"int8": (0, 0), "int4": (1, 0)}  # of attention and of the MLP, in dit_tune
MOST = 4  # times the samples, for leaders

Errors = tuple[Tensor, Tensor]  # of latents and images, each (candidates, samples)
Choice = tuple[int, float]  # which, and samples spent over the number of candidates
Rule = Callable[[Errors, int, Tensor, list[tuple[float, ...]], int], Choice]


@app.command()
def roll(
    out: Out = DEFAULT_OUT,
    work: Annotated[Path, typer.Option(help="Folder of what is calibrated.")] = Path("build/choice_regret"),
    types: Annotated[str, typer.Option(help="Comma-separated: int8, int4 (in attention).")] = "int8,int4",
    nfc: Annotated[str, typer.Option(help="Comma-separated.")] = "7,5",
    steps: Annotated[int, typer.Option(help="Of sampling.")] = 25,
    samples: Annotated[int, typer.Option(help="For validation, and as many held-out ones.")] = 64,
    iterations: Annotated[int, typer.Option(help="Updates of the calibration; a tenth with the cache on.")] = 60,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
) -> None:
    """Make the candidates that are missing."""
    torch.set_num_threads(threads)
    changes = [f"objective.iterations={iterations}", f"objective.cached_iterations={iterations // 10}"]
    changes += [f"sampling.num_inference_steps={steps}", f"evaluation.num_samples={samples}", "tune.finalists=2"]
    recipe = load_recipe("dit_tune", changes)
    section = recipe.tune
    assert section is not None
    combinations = {c.picks: c for c in type_combinations(recipe)}
    for name in types.split(","):
        combination = combinations[PICKS[name]]
        work.mkdir(parents=True, exist_ok=True)
        kept = KeptFiles(work, QUIET).inside(f"{name}-{steps}")
        session = open_session(combination.recipe, QUIET, kept)
        tuner, _ = calibrate_alone(session, combination.recipe.objective, kept, QUIET)
        with session.full_precision():
            held_out = Checked.of(held_out_reference(session.model, recipe, QUIET).tapes)
        for full_steps in map(int, nfc.split(",")):
            place = Place(combination, section, session, (1.0, 0.0), Tried(kept.path("tried.jsonl")), QUIET, kept)
            explore(place, tuner, full_steps, kept)
            point = f"{name}, NFC {full_steps} of {steps}"
            print(f"{point}: {len(place.own(full_steps))} candidates", flush=True)
            done = {row["key"] for row in read_rows(out) if row["point"] == point}
            missing = [candidate for candidate in place.own(full_steps) if candidate.key not in done]
            for line in judged(place, missing, held_out, partial(model_as, place, tuner, full_steps, kept)):
                _write(out, {"point": point, **line})
            place.restore()


def judged(
    place: Place, found: list[Candidate], held_out: Checked, model_as_tried: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Each candidate on as many validation samples as held-out ones."""
    samples = sum(tape.num_samples for tape in held_out.tapes)
    for calibrated in dict.fromkeys(candidate.calibrated for candidate in found):
        model_as_tried(calibrated)
        for candidate in found:
            if candidate.calibrated != calibrated:
                continue
            started = time.monotonic()
            more = place.extended(candidate, samples)
            latents, images, *_ = place.rolled_out(more.plan, place.fitted[more.key], held_out)
            about = {name: getattr(more, name) for name in ("key", "cache", "calibrated", "rival", "cost")}
            yield about | {
                "validation": {"latents": _rounded(more.latent_errors), "images": _rounded(more.image_errors)},
                "held_out": {"latents": _rounded(latents), "images": _rounded(images)},
                "seconds": round(time.monotonic() - started, 1),
            }


@app.command()
def logged(
    searches: Annotated[list[Path], typer.Argument(help="Files tried.jsonl of searches, in folders named by point.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = LOGGED_OUT,
) -> None:
    """Make rows of what searches have logged: one half of each candidate's validation samples stands for the held-out.

    Both halves have the same classes, so this says how a rule reads samples, not what their classes hide.
    """
    for path in searches:
        found = Tried(path).candidates
        half = min(len(candidate.latent_errors) for candidate in found) // 2
        for c in found:
            halves = {
                side: {"latents": _rounded(c.latent_errors[part]), "images": _rounded(c.image_errors[part])}
                for side, part in (("validation", slice(half)), ("held_out", slice(half, 2 * half)))
            }
            about = {name: getattr(c, name) for name in ("key", "cache", "calibrated", "rival", "cost")}
            _write(out, {"point": f"{path.parts[-3]}, NFC {path.parts[-2]}", **about, **halves, "seconds": 0.0})


def worse_of_both(errors: Errors, samples: int, order: Tensor, costs: list[tuple[float, ...]], naive: int) -> Choice:
    """The least maximum of both mean errors, each in that of naive stacking."""
    means = torch.stack([error[:, order[:samples]].mean(1) for error in errors])  # (2, candidates)
    return int((means / means[:, [naive]]).amax(0).argmin()), samples


def mean_log_ratio(errors: Errors, samples: int, order: Tensor, costs: list[tuple[float, ...]], naive: int) -> Choice:
    """The least mean log ratio."""
    return int(log_error(*errors)[:, order[:samples]].mean(1).argmin()), samples


def cheaper_of_equals(
    errors: Errors, samples: int, order: Tensor, costs: list[tuple[float, ...]], naive: int
) -> Choice:
    """The cheapest of those within a standard error of the least mean log ratio."""
    return cheapest_equal(list(log_error(*errors)[:, order[:samples]]), costs), samples


def more_for_leaders(
    errors: Errors, samples: int, order: Tensor, costs: list[tuple[float, ...]], naive: int, cheaper: bool = True
) -> Choice:
    """As `accuquant.tuning.choice.settle` and `choose` do; samples are those of all rollouts over the candidates."""
    measures, count, most = log_error(*errors), samples, MOST * samples
    found, used = list(range(len(measures))), samples * len(measures)

    def lead() -> list[int]:
        return [found[k] for k in leaders([measures[f, order[:count]] for f in found])][:LEADERS]

    found = lead()
    while count < most and undecided([measures[f, order[:count]] for f in found]):
        used += len(found) * (min(2 * count, most) - count)
        count = min(2 * count, most)
        found = lead()
    taken = cheapest_equal([measures[f, order[:count]] for f in found], [costs[f] for f in found]) if cheaper else 0
    return found[taken], used / len(measures)


RULES: dict[str, Rule] = {
    "worse of both": worse_of_both,
    "mean log ratio": mean_log_ratio,
    "mean log ratio, cheaper of equals": cheaper_of_equals,
    "mean log ratio, more samples for leaders": partial(more_for_leaders, cheaper=False),
    "the same, cheaper of equals": more_for_leaders,
}


@app.command()
def table(
    out: Out = DEFAULT_OUT,
    draws: Annotated[int, typer.Option(help="Of the validation samples, with replacement, of each number.")] = 500,
    counts: Annotated[str, typer.Option(help="Validation samples of every candidate, comma-separated.")] = "8,16,32",
) -> None:
    """Markdown: regret in per cent of the geometric mean of both errors, its mean and 95th percentile over draws; and
    the held-out errors of what was chosen, in per cent, their mean over draws and points.
    """
    points: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(out):
        points.setdefault(row["point"], []).append(row)
    sizes = ", ".join(f"{point}: {len(rows)} candidates" for point, rows in points.items())
    print(
        f"{sizes}\n\n| rule | samples of all | samples spent | {' | '.join(points)} | all points | latents / images |"
    )
    print(f"|---|---|---|{'---|' * (len(points) + 2)}")
    for count in map(int, counts.split(",")):
        for name, rule in RULES.items():
            cells, spent, everything, errors = list[str](), list[float](), list[list[float]](), list[Tensor]()
            for rows in points.values():
                regrets, used, both = resampled(rows, rule, count, draws)
                errors.append(both)
                cells.append(_spread(regrets))
                spent += used
                everything.append(regrets)
            together = [statistics.mean(each) for each in zip(*everything, strict=True)]
            cells.append(f"**{statistics.mean(together):.1f}**")
            latents, images = 100 * torch.stack(errors).mean(0)
            cells.append(f"{latents:.2f} / {images:.2f}")
            print(f"| {name} | {count} | {statistics.mean(spent):.1f} | {' | '.join(cells)} |")


def resampled(
    rows: list[dict[str, Any]], rule: Rule, count: int, draws: int
) -> tuple[list[float], list[float], Tensor]:
    """Regret of each draw in per cent; samples spent, a candidate; (2,) mean errors of the choices, held-out."""
    sides = {side: _errors(rows, side) for side in ("validation", "held_out")}
    truth = log_error(*sides["held_out"]).mean(1)
    costs = [tuple(row["cost"]) for row in rows]
    rival = next(k for k, row in enumerate(rows) if row["rival"] == NAIVE)
    regrets, used, errors = list[float](), list[float](), torch.zeros(2)
    for seed in range(draws):
        pool, generator = sides["validation"][0].shape[1], torch.Generator().manual_seed(seed)
        order = torch.randint(pool, (MOST * count,), generator=generator)
        chosen, samples = rule(sides["validation"], count, order, costs, rival)
        regrets.append(100 * math.expm1(float(truth[chosen] - truth.min())))
        used.append(samples)
        errors += torch.stack([error[chosen].mean() for error in sides["held_out"]]) / draws
    return regrets, used, errors


def _errors(rows: list[dict[str, Any]], side: str) -> Errors:
    return torch.tensor([row[side]["latents"] for row in rows]), torch.tensor([row[side]["images"] for row in rows])


def _rounded(errors: tuple[float, ...]) -> list[float]:
    return [float(f"{error:.5g}") for error in errors]


def _spread(regrets: list[float]) -> str:
    return f"{statistics.mean(regrets):.1f} (95 %: {sorted(regrets)[round(0.95 * (len(regrets) - 1))]:.1f})"


def _write(out: Path, line: dict[str, Any]) -> None:
    add_row(out, line)
    print(line["point"], line["cache"], line["calibrated"], f"{line['seconds']} s", flush=True)


if __name__ == "__main__":
    app()
