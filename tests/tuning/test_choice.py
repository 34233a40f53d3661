"""The measure of two errors against numpy, near ties, what is taken of equals, and who gets more samples."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import recorded_finals, tune_recipe

from accuquant.calibration.session import further_validation, open_session
from accuquant.core.choice import cheapest_equal, difference, leaders, log_error
from accuquant.errors import RecipeError
from accuquant.files import KeptFiles
from accuquant.progress import Reporter
from accuquant.runtime.cache.plan import CachePlan
from accuquant.tuning.budget import LEADERS, type_combinations
from accuquant.tuning.candidates import Place
from accuquant.tuning.choice import choose, leading, ratio, settle
from accuquant.tuning.tried import ALONE, NAIVE, Candidate, Tried

QUIET = Reporter(quiet=True)
generator = np.random.default_rng(0)


def candidate(key: str, latents: Any, images: Any, **changes: Any) -> Candidate:
    given: dict[str, Any] = {
        "types": "int8/int8",
        "cache": "taylor 1, best steps",
        "forecast": ("taylor", 1, False),
        "schedule": "best",
        "parts": "none",
        "asked_nfc": 4,
        "nfc": 4.0,
        "bit_operations": 0.02,
        "seconds": 1.0,
        "calibrated": ALONE,
        "elapsed": 0.1,
        "plan": CachePlan("taylor", 1, interval=2),
    }
    return Candidate(key, latent_errors=tuple(latents), image_errors=tuple(images), **(given | changes))


def noisy(error: float, spread: float, samples: int) -> list[float]:
    return [float(e) for e in error * np.exp(spread * generator.standard_normal(samples))]


# ---- the measure


@pytest.mark.parametrize("samples", [2, 3, 16, 97])
def test_the_measure_and_its_standard_error_are_those_of_numpy(samples: int) -> None:
    a, b, c, d = (generator.uniform(0.01, 0.3, samples) for _ in range(4))
    ours, theirs = log_error(torch.tensor(a), torch.tensor(b)), log_error(torch.tensor(c), torch.tensor(d))
    expected = np.array([(math.log(x) + math.log(y)) / 2 for x, y in zip(a, b, strict=True)])
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)
    gaps = expected - np.log(np.sqrt(c * d))
    mean, error = difference(ours, theirs)
    assert mean == pytest.approx(sum(gaps) / samples, rel=1e-9)
    assert error == pytest.approx(math.sqrt(sum((g - mean) ** 2 for g in gaps) / (samples - 1) / samples), rel=1e-9)
    assert math.exp(mean) == pytest.approx(np.prod(a * b / (c * d)) ** (1 / (2 * samples)), rel=1e-9)


def test_the_leaders_are_those_within_two_standard_errors_of_the_best() -> None:
    measures = [generator.normal(mean, 0.3, 24) for mean in (0.0, 0.05, 0.1, 0.2, 0.4, 2.0)]
    best = min(range(6), key=lambda k: measures[k].mean())
    expected = set()
    for k, measure in enumerate(measures):
        gaps = measure - measures[best]
        if gaps.mean() <= 2 * gaps.std(ddof=1) / math.sqrt(24):
            expected.add(k)
    found = leaders([torch.tensor(measure) for measure in measures])
    assert set(found) == expected and 1 < len(expected) < 6
    assert [measures[k].mean() for k in found] == sorted(measures[k].mean() for k in found)


def test_the_near_tie_goes_to_the_one_that_is_better_in_both_together() -> None:
    """By the worse of both errors, in that of naive stacking, 0.0275 / 0.0145 won by less than one per cent."""
    naive, lost, won = (0.0342, 0.01995), (0.0216, 0.0162), (0.0275, 0.0145)
    worse = [max(a / b for a, b in zip(pair, naive, strict=True)) for pair in (lost, won)]
    assert worse[1] < worse[0] < 1.01 * worse[1]
    found = [candidate(str(k), [latent] * 4, [image] * 4) for k, (latent, image) in enumerate((lost, won))]
    assert choose(found).best.key == choose(found[::-1]).best.key == "0"
    assert ratio(found[0], candidate("n", [naive[0]] * 4, [naive[1]] * 4)) == {
        "mean": pytest.approx(math.log(math.sqrt(0.0216 * 0.0162 / (naive[0] * naive[1])))),
        "standard_error": pytest.approx(0, abs=1e-12),
        "samples": 4,
    }


def test_a_candidate_that_diverged_is_the_worst_and_one_without_error_the_best() -> None:
    good = candidate("good", [0.1, 0.2], [0.1, 0.2])
    for bad in (math.nan, math.inf):
        assert choose([candidate("bad", [bad, 0.1], [bad, 0.1], bit_operations=0.01), good]).best.key == "good"
        assert leaders([log_error(torch.tensor([bad, 0.1])), good.measure()]) == [1]
        assert leaders([log_error(torch.tensor([bad, 0.1]))] * 2)[0] == 0
    assert choose([good, candidate("exact", [0.0, 0.0], [0.0, 0.0])]).best.key == "exact"


# ---- equals


def test_of_equals_the_cheapest_is_taken_and_no_other() -> None:
    latents, images = noisy(0.02, 0.4, 16), noisy(0.03, 0.4, 16)
    best = candidate("best", latents, images)
    wobble = [1 + 0.1 * (-1) ** k for k in range(16)]  # of the same mean, nearly: equal within the standard error
    others = [e * w * 1.005 for e, w in zip(latents, wobble, strict=True)]
    worse = candidate("worse", [2 * e for e in latents], [2 * e for e in images], bit_operations=0.001)
    for cheaper in (
        {"bit_operations": 0.019},
        {"seconds": 0.9},
    ):
        equal = candidate("equal", others, images, **cheaper)
        found = choose([best, equal, worse])
        assert found.best.key == "equal" and {c.key for c in found.equal} == {"best", "equal"}
    simple = candidate("equal", others, images)
    assert choose([replace(best, parts="both"), simple, worse]).best.key == "equal"
    assert choose([replace(best, calibrated="weights, with the cache on"), simple, worse]).best.key == "equal"
    assert choose([best, replace(simple, parts="cache"), worse]).best.key == "best"
    assert choose([best, replace(simple, bit_operations=0.021), worse]).best.key == "best"
    assert choose([best, replace(simple, rival=NAIVE)]).best.key == "best"


def test_costs_decide_among_equals_only() -> None:
    measures = [torch.tensor([0.0, 0.1]), torch.tensor([0.05, 0.06]), torch.tensor([1.0, 1.1])]
    assert cheapest_equal(measures, [(3.0,), (2.0,), (1.0,)]) == 1
    assert cheapest_equal(measures, [(2.0,), (2.0,), (1.0,)]) == 0


# ---- more samples


@pytest.fixture
def place(model_folder: Path, tmp_path: Path) -> Place:
    recipe = tune_recipe(model_folder, tmp_path / "o", types=[], bit_operations=None, nfc=4, noise_aware=[False])
    recipe = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"num_samples": 4, "validation_samples": 4})}
    )
    combination, section = type_combinations(recipe)[0], recipe.tune
    assert section is not None
    kept = KeptFiles(tmp_path, QUIET)
    session = open_session(combination.recipe, QUIET, kept)
    found = Place(combination, section, session, (1.0, 0.5), Tried(tmp_path / "tried.jsonl"), QUIET, kept)
    found.naive(4)
    found.cachequant(4)
    found.try_forecasts(4)
    return found


def test_only_leaders_get_more_samples_and_not_more_than_granted(place: Place) -> None:
    modes = list[str]()
    before = place.own(4)
    expected = {c.key for c in leading(before, 4)}
    assert 1 < len(expected) <= LEADERS < len(before)
    left = settle(place, before, False, modes.append)
    assert modes and set(modes) == {ALONE}
    after = {c.key: c for c in place.tried.candidates}
    assert {key for key, c in after.items() if c.samples > 4} == expected
    assert all(c.samples <= 4 * place.section.more_samples for c in after.values())
    assert {c.samples for c in left} == {max(c.samples for c in after.values())}
    for old in before:  # what was known stays known
        assert after[old.key].latent_errors[:4] == old.latent_errors
    assert [after[c.key] for c in left] == left


def test_further_samples_go_on_from_those_there_are_and_are_kept(place: Place, tmp_path: Path) -> None:
    recipe = place.combination.recipe
    whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"validation_samples": 8})})
    kept = KeptFiles(tmp_path, QUIET)
    combination = replace(place.combination, recipe=whole)
    session = open_session(whole, QUIET, kept.inside("eight"))
    given = (place.session, recipe.data, (4, 8), recipe.evaluation.batch_size, QUIET, kept)
    tapes, whole_set = further_validation(*given), session.validation.tapes
    noise = [torch.cat([tape.per_sample(tape.state(0)) for tape in of]) for of in (tapes, whole_set)]
    assert torch.equal(noise[0], noise[1][4:])
    final = recorded_finals(tapes)
    torch.testing.assert_close(final, recorded_finals(whole_set)[4:], rtol=1e-3, atol=1e-3)  # of other batches
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "validation-4-8").iterdir()}
    assert written and torch.equal(recorded_finals(further_validation(*given)), final)
    assert written == {file: file.stat().st_mtime_ns for file in (tmp_path / "validation-4-8").iterdir()}

    eight = Place(combination, place.section, session, (1.0, 0.5), Tried(tmp_path / "eight" / "tried.jsonl"), QUIET)
    extended = place.extended(place.own(4)[0], 8)
    latents, images, *_ = eight.rolled_out(extended.plan, extended.fitted, eight.checked)
    np.testing.assert_allclose(extended.latent_errors, latents, rtol=0.2)  # roundings flip
    np.testing.assert_allclose(extended.image_errors, images, rtol=0.2)


def test_whole_gives_the_best_all_samples_told_apart_or_not(place: Place) -> None:
    naive = place.own(4)[0]
    (found,) = settle(place, [naive], True, lambda calibrated: None)
    assert found.samples == 4 * place.section.more_samples
    assert settle(place, [naive], False, lambda calibrated: None) == [naive]


def test_what_was_given_is_not_given_again_after_an_interruption(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = place.own(4)
    found = settle(place, candidates, False, lambda calibrated: None)
    tried, kept = Tried(tmp_path / "tried.jsonl"), KeptFiles(tmp_path, QUIET)
    again = Place(place.combination, place.section, place.session, place.seconds, tried, QUIET, kept)
    assert again.tried.candidates == place.tried.candidates

    def refuse(*_: Any) -> None:
        raise AssertionError("rolled out again")

    monkeypatch.setattr(Place, "rolled_out", refuse)
    modes = list[str]()
    assert settle(again, again.own(4), False, modes.append) == found and not modes


# ---- what is kept


def test_a_candidate_survives_its_line() -> None:
    plan = CachePlan("taylor", 1, full_timesteps=(999.0, 3.5))
    one = candidate("k", [0.1, math.inf, 1 / 3], [1e-7, 0.2, 0.3], plan=plan, noise={"attn": (0.1, 1 / 3)}, rival=NAIVE)
    assert Candidate.from_line(one.line()) == one
    assert "\n" not in one.line()
    assert math.isnan(Candidate.from_line(candidate("k", [math.nan], [0.1]).line()).latent_errors[0])
    with pytest.raises(ValueError, match="of one sample at least"):
        candidate("k", [], [])


def test_a_later_line_has_more_samples_and_a_cut_one_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "tried.jsonl"
    one, two = candidate("one", [0.1], [0.1]), candidate("two", [0.2], [0.2])
    more = replace(one, latent_errors=(0.1, 0.3), image_errors=(0.1, 0.4))
    tried = Tried(path)
    for each in (one, two, more):
        tried.add(each)
    with path.open("a") as file:
        file.write(two.line()[: len(two.line()) // 2])
    assert Tried(path).candidates == tried.candidates == [more, two]
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("line", ['{"key": "k", "types": "int8", "E_qc": 0.1, "image_error": 0.1}', "[1]", "{} x"])
def test_lines_of_another_version_are_refused_by_words(tmp_path: Path, line: str) -> None:
    (tmp_path / "tried.jsonl").write_text(line + "\n" + candidate("k", [0.1], [0.1]).line() + "\n")
    with pytest.raises(RecipeError, match=r"tried\.jsonl: line 1 is not a candidate.*--overwrite starts"):
        Tried(tmp_path / "tried.jsonl")
