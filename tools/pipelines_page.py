"""Write docs/pipelines.md of what `make test-pipelines` has found: which pipelines are proven end to end.

    python -m tools.pipelines_page [FOLDER] [--sweep build/pipelines.jsonl --caches build/caches.jsonl]

The sweeps are those over all classes of diffusers (`tools.benchmarks.pipelines`). A part of the page of which nothing
is given stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers

from tools.benchmarks.rows import read_lines

PAGE = Path("docs/pipelines.md")
SWEPT = "## All classes of diffusers"
HEAD = """# Pipelines

*Written by `make test-pipelines` with diffusers {version}: tiny random weights of the real classes, in folders.*

Any diffusers pipeline is recorded in one call and replayed step by step; no class is listed in the package.
Those below are proven end to end in the tests. Every recorded step is equal to the pipeline's own, bit for bit.
Calibration at 4-bit weights and 8-bit activations (`preset: w4a8`, which splits what reads a concatenation, and
`attention: {{activation: int8}}` for attention's own products; {updates} updates, M = 1) brings the final
latents of its own samples nearer to full precision than round-to-nearest, in every denoiser. The export, loaded
by `from_pretrained`, gives the same latents to the last bit. A feature cache that is full at every step changes
nothing; one that reuses every second step does, the second time as the first, and leaves nothing behind; and
weights learn with the cache on.

| pipeline | example | denoiser | told by | scheduler | quantized / float | error | cached | saved | full steps |
|---|---|---|---|---|---|---|---|---|---|
"""


def rows(found: Iterable[dict[str, Any]]) -> list[str]:
    lines = []
    for f in sorted(found, key=lambda f: (f["pipeline"], f["name"])):
        nfc = ", ".join(f"{full} of {steps}" for full, steps in f["nfc"])
        cells = [
            f["pipeline"],
            f"`{f['name']}`",
            ", ".join(f["denoisers"]),
            ", ".join(f["coordinates"]),
            f["scheduler"].removesuffix("Scheduler"),
            f"{f['quantized']} / {f['float']}",
            f"{f['before']:.3f} -> {f['after']:.3f}",
            str(f["cached"]),
            " / ".join(f"{share:.0%}" for share in f["saved"]),
            nfc,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def swept(sweep: list[dict[str, Any]], caches: list[dict[str, Any]]) -> str:
    """What all classes that diffusers' own dummy components build do, below the heading."""
    built = [row for row in sweep if row["result"] != "not built"]
    counts = Counter(row["result"] for row in built)
    lines = [
        "",
        "",
        f"Of {len(sweep)} pipeline classes for which diffusers' own tests have dummy components {len(built)} could be",
        f"built and run here; {counts['recorded']} are recorded. The others, and why:",
        "",
        "| pipeline | reason |",
        "|---|---|",
        *(f"| {row['pipeline']} | {why(row)} |" for row in built if row["result"] != "recorded"),
    ]
    if caches:
        built_here = sum(row["result"] != "not built" for row in caches)
        right = [row for row in caches if row["result"] == "right"]
        lines += [
            "",
            f"A cache is right on {len(right)} of {built_here}, whose denoisers have random weights without zeros. "
            "Full steps are equal,",
            "and so is a second call; every second step is forecast, and one with the arguments of the step before is",
            "what was computed there; taken off nothing is left. What a skipped step saves of the denoiser's products,",
            "and what is wrong or refused:",
            "",
            "| pipeline | cached modules | saved | otherwise |",
            "|---|---|---|---|",
        ]
        for row in caches:
            if row["result"] != "not built":
                counted = " / ".join(f"{share:.0%}" for share in row["saved"])
                saved = counted or ("not counted" if row["result"] == "right" else "")
                lines.append(f"| {row['pipeline']} | {row['modules'] or ''} | {saved} | {why(row)} |")
    return "\n".join(lines) + "\n"


def why(row: dict[str, Any]) -> str:
    """The reason, without the names that are said already, the error's among them."""
    reason = re.sub(r"^\w+Error: ", "", row["reason"])
    return reason.replace(f"{row['pipeline']} ", "it ").removeprefix(f"{row['pipeline']}: ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="what the tests have kept")
    parser.add_argument("--sweep", type=Path)
    parser.add_argument("--caches", type=Path)
    given = parser.parse_args()
    proven, _, classes = PAGE.read_text(encoding="utf-8").partition(SWEPT)
    if given.folder:
        found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(given.folder.glob("*.json"))]
        proven = HEAD.format(version=diffusers.__version__, updates=24) + "\n".join(rows(found)) + "\n\n"
    if given.sweep:
        classes = swept(read_lines(given.sweep), read_lines(given.caches) if given.caches else [])
    PAGE.write_text(proven + SWEPT + classes, encoding="utf-8")
    print(f"{PAGE}: {len(proven.splitlines())} lines of what is proven, {len(classes.splitlines())} of all classes")


if __name__ == "__main__":
    main()
