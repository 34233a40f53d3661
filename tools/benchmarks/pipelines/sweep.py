"""Which pipeline classes of the installed diffusers can be recorded as a tape, and why not the others.

Builds each class from the dummy components of diffusers' own test-suite, which is no part of its package: give the
folder of a checkout. Nothing of the checkout enters this project, and nothing is fetched: what its tests take from a
hub has tiny random stand-ins here.

    python -m tools.benchmarks.pipelines.sweep CHECKOUT --out build/pipelines.jsonl      # goes on where it stopped
    python -m tools.benchmarks.pipelines.sweep CHECKOUT --out build/pipelines.jsonl --table
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from accuquant.pipeline.coordinates import coordinate_of
from accuquant.pipeline.lowering import TapeError
from accuquant.pipeline.record import record
from accuquant.pipeline.seams import takes
from accuquant.pipeline.tape import Tape
from tools.benchmarks.pipelines.stand_ins import without_hub
from tools.benchmarks.rows import read_lines

STEPS = 4
MORE_STEPS = 12  # where a small strength leaves fewer than two of them


@dataclass(frozen=True)
class Row:
    """What became of a class: ``recorded``, ``refused`` in our words, ``failed`` at something else, ``not built``."""

    pipeline: str
    result: str
    reason: str = ""
    steps: int = 0
    denoisers: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    coordinate: str = ""
    latents: tuple[tuple[int, ...], ...] = ()
    history: int = 0
    seconds: float = 0.0


def cases(checkout: Path) -> Iterator[tuple[Any, Any]]:
    """Every pipeline class with the test case that knows its dummy components, each class once."""
    sys.path.insert(0, str(checkout))
    seen = set()
    for file in sorted((checkout / "tests" / "pipelines").rglob("test_*.py")):
        name = ".".join(file.relative_to(checkout).with_suffix("").parts)
        try:
            module = importlib.import_module(name)
        except BaseException as error:  # pytest's own skips are no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            print(f"{name}: {short(error)}", file=sys.stderr)
            continue
        for case in vars(module).values():
            if not (inspect.isclass(case) and case.__module__ == name and hasattr(case, "get_dummy_components")):
                continue
            kind = inspect.getattr_static(case, "pipeline_class", None)
            if inspect.isclass(kind) and kind not in seen:
                seen.add(kind)
                yield kind, case


def build(kind: Any, case: Any) -> tuple[Any, Callable[..., dict[str, Any]]]:
    """A pipeline, and what makes the arguments of a call: fresh ones each time, as generators are used up."""
    one = case("run") if "methodName" in inspect.signature(case.__init__).parameters else case()
    pipeline = kind(**one.get_dummy_components())
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()

    def arguments(steps: int = STEPS) -> dict[str, Any]:
        takes_device = "device" in inspect.signature(one.get_dummy_inputs).parameters
        given: dict[str, Any] = one.get_dummy_inputs("cpu", 0) if takes_device else one.get_dummy_inputs()
        return given | ({"num_inference_steps": steps} if takes(pipeline, "num_inference_steps") else {})

    return pipeline, arguments


def tried(kind: Any, case: Any) -> Row:
    """The row of one class: built, run, recorded, and every step replayed by its networks."""
    row = tried_in(STEPS, kind, case)
    return tried_in(MORE_STEPS, kind, case) if row.result == "refused" else row


def tried_in(steps: int, kind: Any, case: Any) -> Row:
    name, begun = kind.__name__, time.perf_counter()
    try:
        pipeline, arguments = build(kind, case)
        call = arguments(steps)
        with torch.no_grad():
            pipeline(**arguments(steps))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Row(name, "not built", short(error))
    try:
        torch.manual_seed(0)
        tape = record(pipeline, **call)
        equal = replayed(tape)
        coordinates = {coordinate_of(tape, denoiser).argument for denoiser in tape.denoisers}
    except TapeError as error:
        return Row(name, "refused", short(error))
    except Exception as error:
        return Row(name, "failed", short(error))
    return Row(
        name,
        "recorded" if equal else "failed",
        "" if equal else "a step replayed is not equal",
        len(tape),
        tuple(sorted(tape.denoisers)),
        tuple(sorted(tape.looped - tape.denoisers)),
        ", ".join(sorted(coordinates)),
        tuple(tuple(t.shape) for t in tape.state(0).latents),
        max(len(step.history_in) for step in tape.steps),
        round(time.perf_counter() - begun, 2),
    )


@torch.no_grad()
def replayed(tape: Tape) -> bool:
    state = tape.state(0)
    for i in range(len(tape)):
        state = tape.step(i, state)
        if not all(torch.equal(a, b) for a, b in zip(state.tensors, tape.state(i + 1).tensors, strict=True)):
            return False
    return True


def table(rows: list[dict[str, Any]]) -> str:
    """Counts, and whatever was not recorded with the reason."""
    lines = [counts(rows), "", "| pipeline | result | reason |", "| --- | --- | --- |"]
    others = (row for row in rows if row["result"] != "recorded")
    return "\n".join([*lines, *(f"| {row['pipeline']} | {row['result']} | {row['reason']} |" for row in others)])


def counts(rows: list[dict[str, Any]]) -> str:
    """How many classes came to each result."""
    return ", ".join(f"{count} {result}" for result, count in Counter(row["result"] for row in rows).most_common())


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def sweep(doc: str | None, tried: Callable[[Any, Any], Any], table: Callable[[list[dict[str, Any]]], str]) -> None:
    """The command of a sweep over all classes, which goes on where it stopped.

    Args:
        tried: makes the row of one class, a dataclass with ``pipeline``, ``result`` and ``reason``.
        table: is printed of all rows.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="part of a class's name")
    parser.add_argument("--table", action="store_true", help="only print what is known")
    given = parser.parse_args()
    known = read_lines(given.out)
    if not given.table:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        done = {row["pipeline"] for row in known}
        with without_hub(), given.out.open("a") as file:
            for kind, case in cases(given.checkout.resolve()):
                if kind.__name__ in done or given.only not in kind.__name__:
                    continue
                row = asdict(tried(kind, case))
                print(json.dumps(row), file=file, flush=True)
                print(f"{row['pipeline']}: {row['result']} {row['reason']}", flush=True)
                known.append(row)
    print(table(known))


if __name__ == "__main__":
    sweep(__doc__, tried, table)
