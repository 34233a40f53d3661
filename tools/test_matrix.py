"""Run the tests of numerics as other machines would: `make test-matrix`, or with --quick the part that `.ci/run` runs.

A setting is what ATen's own kernels may use (and MKL's products, which follow it), what oneDNN may use, and the number
of threads; each is the environment of a fresh process. Of all 24 these pairs are run, since they stand for machines:

    default AVX2 1                no vector unit that ATen knows; no VNNI, so torch's integer product saturates
    avx2    AVX2 2                Zen 2 and 3, Core before Alder Lake
    avx512  AVX512_CORE 1         Skylake: wide vectors, and still no VNNI
    avx512  AVX512_CORE_VNNI 2    Ice Lake, Zen 4
    avx512  AVX512_CORE_AMX 1     Sapphire Rapids
    avx512  AVX512_CORE_AMX 2     the same, with sums that two threads share

--quick runs the first, the fourth and fewer files. What this CPU has not is left out, and said so. Then the last
setting that is left makes an export, each samples from it, and what they give may differ by the bounds of
tools/across_settings.py; the table has what was found. Exits 1 if anything failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tools.across_settings import BOUNDS, ROOT, apart, environment, run

QUICK = ["numerics", "layers", "paths", "checkpoint"]
FILES = [*QUICK, "packing", "fp8", "shared_input", "calibrate", "blocks", "trajectory", "tape"]
FILES += ["cached_steps", "cachequant", "correction", "learned", "joint", "noise", "predictors", "caching"]
LEFT_OUT = "interrupted or resume or refused or named"  # programs and messages, which no instruction changes
WIDE = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
NEEDS = {
    "default": set[str](),
    "avx2": {"avx2", "fma"},
    "avx512": WIDE,
    "AVX2": {"avx2", "fma"},
    "AVX512_CORE": WIDE,
    "AVX512_CORE_VNNI": WIDE | {"avx512_vnni"},
    "AVX512_CORE_AMX": WIDE | {"avx512_vnni", "amx_tile", "amx_int8"},
}


class Setting(NamedTuple):
    aten: str
    onednn: str
    threads: int

    def __str__(self) -> str:
        return f"{self.aten} {self.onednn} {self.threads}"


SETTINGS = [
    Setting("default", "AVX2", 1),
    Setting("avx2", "AVX2", 2),
    Setting("avx512", "AVX512_CORE", 1),
    Setting("avx512", "AVX512_CORE_VNNI", 2),
    Setting("avx512", "AVX512_CORE_AMX", 1),
    Setting("avx512", "AVX512_CORE_AMX", 2),
]


def cpu_flags() -> set[str]:
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return set(found[1].split()) if found else set()


def missing(setting: Setting) -> set[str]:
    """Flags that the setting needs and this CPU has not."""
    return (NEEDS[setting.aten] | NEEDS[setting.onednn]) - cpu_flags()


def tests(setting: Setting, files: list[str]) -> tuple[str, bool]:
    """A cell of the table, and whether all passed; failures are printed."""
    found = {path.stem.removeprefix("test_"): str(path) for path in ROOT.glob("tests/*/test_*.py")}
    paths = [found[name] for name in files]
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(2 // setting.threads), "--dist", "loadfile"]
    start = time.monotonic()
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-k", f"not ({LEFT_OUT})", *paths],
        env=environment(*setting),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode:
        print(f"--- {setting}\n{done.stdout[-20000:]}{done.stderr[-2000:]}", flush=True)
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout[-300:])}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    cells = f"{counts.get('passed', 0):6d} {failed:6d} {counts.get('skipped', 0):7d} {time.monotonic() - start:7.0f}"
    return cells, done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two settings and fewer files, for every change")
    quick = parser.parse_args().quick
    settings, files, models = SETTINGS, FILES, ["tiny", "bundled"]
    if quick:
        settings, files, models = [SETTINGS[0], SETTINGS[3]], QUICK, ["tiny"]
    for setting in settings:
        if lacks := missing(setting):
            print(f"left out: {setting}, this CPU has no {', '.join(sorted(lacks))}")
    settings = [setting for setting in settings if not missing(setting)]
    print(f"{'ATen oneDNN threads':28} passed failed skipped seconds", flush=True)
    good = True
    for setting in settings:
        cells, passed = tests(setting, files)
        good &= passed
        print(f"{setting!s:28} {cells}", flush=True)
    for model in models:
        good &= exports(settings, model)
    return 0 if good else 1


def exports(settings: list[Setting], model: str) -> bool:
    """One setting makes an export of the model, each loads it; whether all keep to the bounds."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run(environment(*settings[-1]), "make", place, *(["bundled"] if model == "bundled" else []))
        print(f"{f'{model}, made by {settings[-1]}':48} {'  '.join(f'{kind} <= {b:g}' for kind, b in BOUNDS.items())}")
        for setting in settings:
            run(environment(*setting), "sample", place, str(folder / str(setting)))
        good = True
        for k, one in enumerate(settings):
            for other in settings[:k]:
                found = apart(folder / str(one), folder / str(other))
                kept = all(found[kind] <= bound for kind, bound in BOUNDS.items())
                good &= kept
                values = "  ".join(f"{v:.1e}" for v in found.values())
                print(f"{f'{one} and {other}':60} {values}{'' if kept else '  TOO FAR APART'}", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
