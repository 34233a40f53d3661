"""Real speed: one denoiser step and a sampled trajectory, ours beside floats and other packages' int8, in one run.

    python -m tools.benchmarks.inference.run --model dit-xl --out tools/benchmarks/inference/results/dit-xl

Each model lives in a process of its own (worker.py). They take turns: in every round each variant is
timed once, after one call that is not timed, so that what disturbs the machine disturbs all alike. Where not all models
fit in memory together there are several waves, and bfloat16 takes part in each: speed is relative to it in the same
wave. Other packages (torchao, optimum-quanto, sdnq with OpenVINO on CPUs) are found on PYTHONPATH, or listed as not
installed. "frozen" means that torch.compile may lay out weights anew (torch._inductor.config.freezing).

Writes results.json, results.md, results.png and a log of each process; the last line printed is the summary.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from accuquant.pipeline.loading import pick_device
from accuquant.progress import Reporter
from tools.benchmarks.inference.gemm import INT_MM, OURS
from tools.benchmarks.inference.hosts import HOSTS
from tools.benchmarks.inference.models import BUNDLED, FLUX, MODELS
from tools.benchmarks.inference.report import machine, summary, write_report

ROOT = Path(__file__).parents[3]  # of the clone, from where modules of tools/ are started
INTERVALS = {14: 4, 8: 7}  # NFC of 50 steps -> interval, with two leading full steps
CACHED = ("bfloat16", "ours static", "ours dynamic")  # hosts whose trajectories are measured
OVERHEAD = 1.2e9  # bytes of a process, with what a step needs and a compiler leaves behind
BASE = "bfloat16"


class Process:
    """A worker, and the talk with it."""

    def __init__(self, host: str, setup: dict[str, Any], out: Path) -> None:
        self.host = host
        environment = os.environ | {
            "OMP_NUM_THREADS": str(setup["threads"]),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        command = [sys.executable, "-m", "tools.benchmarks.inference.worker", json.dumps(setup | {"host": host})]
        self.log = (out / "logs" / f"{host.replace(' ', '-')}.log").open("w", encoding="utf-8")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=self.log, text=True, env=environment, bufsize=1
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            why = " (killed: lower --memory, or free some)" if code == -signal.SIGKILL else ""
            return {"failed": f"its process ended with {code}{why}, see {self.log.name}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


class Bench:
    """One run; ``results`` is what results.json holds."""

    def __init__(self, setup: dict[str, Any], out: Path, variants: dict[str, tuple[str, ...]], repeats: int) -> None:
        self.setup, self.out, self.variants, self.repeats = setup, out, variants, repeats
        self.reporter, self.helper = Reporter(), Process("helper", setup, out)
        self.results: dict[str, Any] = {"steps": [], "trajectories": [], "gemm": []}

    def prepare(self, steps: int) -> None:
        self.reporter.say("preparing weights, references and exports")
        found = self.helper.ask("prepare", hosts=list(self.variants), steps=steps)
        if "failed" in found:
            raise SystemExit(f"preparing failed: {found['failed']}")
        self.results |= found

    def waves(self, limit: float) -> list[list[str]]:
        """Hosts that fit in memory together, by estimate; the first of each is bfloat16."""
        total, integers = self.results["parameters"], self.results["integers"]
        base = [BASE] if BASE in self.variants else []
        spare = 2 * total  # the bfloat16 weights that the last one quantizes

        def size(host: str) -> float:
            if host == "float32":
                return float(4 * total + OVERHEAD)
            held = 2 * total if host.startswith(BASE) else 2 * total - integers
            return float((2 if host.endswith("frozen") else 1) * held + OVERHEAD)

        waves, room = list[list[str]](), 0.0
        for host in (h for h in self.variants if h != BASE):
            if not waves or size(host) > room:
                waves.append([*base])
                room = limit - spare - sum(map(size, base))
            waves[-1].append(host)
            room -= size(host)
        return waves or [base]

    def measure_steps(self, waves: list[list[str]], steps: int, turns: int) -> None:
        for number, hosts in enumerate(waves):
            workers = {host: Process(host, self.setup, self.out) for host in hosts}
            try:
                ready = self._ready(workers, number)
                self._rounds(ready, workers, f"steps, wave {number + 1} of {len(waves)}")
                if number == 0 and steps:
                    self._trajectories({row["name"] for row in ready}, workers, steps, turns)
            finally:
                for worker in workers.values():
                    worker.close()

    def _ready(self, workers: dict[str, Process], wave: int) -> list[dict[str, Any]]:
        """Rows of the variants that run; the others' say why not."""
        ready = []
        with self.reporter.bar("loading and compiling", sum(len(self.variants[host]) for host in workers)) as advance:
            for host, worker in workers.items():
                built = worker.ask("build", compiles="compiled" in self.variants[host])
                for mode in self.variants[host]:
                    row: dict[str, Any] = {"name": f"{host} {mode}", "host": host, "mode": mode, "wave": wave} | built
                    if "missing" not in row and "failed" not in row:
                        row |= worker.ask("warm", mode=mode)
                    if "failed" in row:
                        self.reporter.say(f"{row['name']}: {row['failed']}")
                    elif "missing" not in row:
                        ready.append(row | {"seconds": []})
                        row = ready[-1]
                    self.results["steps"].append(row)
                    advance(row["name"])
        return ready

    def _rounds(self, ready: list[dict[str, Any]], workers: dict[str, Process], task: str) -> None:
        with self.reporter.bar(task, self.repeats * len(ready)) as advance:
            for _ in range(self.repeats):
                for row in ready:
                    if "failed" not in row:
                        self._take(row, workers[row["host"]].ask("step", mode=row["mode"]))
                    advance(row["name"])

    def _take(self, row: dict[str, Any], answer: dict[str, Any]) -> None:
        if "failed" in answer:
            row["failed"] = answer["failed"]
        else:
            row["seconds"].append(answer["seconds"])

    def _trajectories(self, ready: set[str], workers: dict[str, Process], steps: int, turns: int) -> None:
        rows = list[dict[str, Any]]()
        for host in (host for host in CACHED if host in workers):
            mode = next((mode for mode in ("compiled", "eager") if f"{host} {mode}" in ready), None)
            for interval in (None, *INTERVALS.values()) if mode else ():
                rows.append({"host": host, "mode": mode, "interval": interval, "steps": steps, "seconds": []})
        with self.reporter.bar("trajectories", (turns + 1) * len(rows)) as advance:
            for turn in range(turns + 1):  # the first is not counted: it compiles
                for row in rows:
                    asked = {key: row[key] for key in ("mode", "interval", "steps")}
                    answer = row if "failed" in row else workers[str(row["host"])].ask("trajectory", **asked)
                    if "failed" not in answer:
                        row |= {"nfc": answer["nfc"], "error": answer["error"]}
                    if turn or "failed" in answer:
                        self._take(row, answer)
                    advance(f"{row['host']} {row['mode']}, interval {row['interval']}")
        self.results["trajectories"] = rows

    def measure_gemms(self, compiled: bool) -> None:
        names = self.helper.ask("gemm").get("names", [INT_MM, *OURS])
        names = [name for name in names if compiled or not name.endswith("compiled")]
        shapes = self.results["shapes"]
        with self.reporter.bar("bare products", len(shapes) * self.repeats * len(names)) as advance:
            for *shape, count in shapes:
                rows = [{"shape": shape, "count": count, "name": name, "seconds": []} for name in names]
                for _ in range(self.repeats):
                    for row in rows:
                        if "failed" not in row:
                            answer = self.helper.ask("gemm", shape=shape, name=row["name"])
                            row["path"] = answer.get("path", "")
                            self._take(row, answer)
                        advance(f"{shape} {row['name']}")
                self.results["gemm"] += rows


def chosen(only: str, compiles: bool, device: str = "cpu") -> dict[str, tuple[str, ...]]:
    """Hosts and their modes; ``only`` names hosts or variants. fp8 is for GPUs, on a CPU it has to be named."""
    hosts = {host: found for host, found in HOSTS.items() if only or device != "cpu" or host != "ours fp8"}
    modes = {host: tuple(m for m in found if compiles or m == "eager") for host, found in hosts.items()}
    if only:
        wanted = [name.strip() for name in only.split(",")]
        known = {*HOSTS, *(f"{host} {mode}" for host, found in HOSTS.items() for mode in found)}
        if unknown := [name for name in wanted if name not in known]:
            raise typer.BadParameter(f"--only: no variant {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        modes = {h: tuple(m for m in f if h in wanted or f"{h} {m}" in wanted) for h, f in modes.items()}
    return {host: found for host, found in modes.items() if found}


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}; {FLUX} needs CUDA.")] = BUNDLED,
    out: Annotated[Path, typer.Option(help="Folder for tables, plot and logs.")] = Path("build/inference"),
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians are of as many.")] = 10,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads.")] = 2,
    layers: Annotated[int | None, typer.Option(min=1, help="Blocks of a random model, to try the tool.")] = None,
    only: Annotated[str, typer.Option(help="Comma-separated hosts or variants, such as 'ours static compiled'.")] = "",
    steps: Annotated[int, typer.Option(min=0, help="Of a trajectory; 0 measures none.")] = 50,
    turns: Annotated[int | None, typer.Option(min=1, help="Rounds of trajectories, if not as many.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    memory: Annotated[float, typer.Option(help="GB that all models may take together.")] = 16.0,
    float_modulation: Annotated[bool, typer.Option(help="Our adaLN float, not int8 weights as in the recipe.")] = False,
    compiles: Annotated[bool, typer.Option("--compile/--no-compile", help="Compiled variants too.")] = True,
) -> None:
    """Measure, and write results.json, results.md and results.png."""
    if model not in MODELS:
        raise typer.BadParameter(f"--model: there are {', '.join(MODELS)}")
    if layers and model == BUNDLED:
        raise typer.BadParameter("--layers: only random models can be made smaller")
    picked = pick_device(device)
    if model == FLUX and picked.type != "cuda":
        raise typer.BadParameter(f"--model {FLUX}: not measured, a block stack of this size needs a CUDA device")
    if picked.type != "cuda":
        print(f"{FLUX}-sized block stack: not measured, there is no CUDA device")
    (out / "logs").mkdir(parents=True, exist_ok=True)
    work = out.absolute() / "work"
    about = {"model": model, "layers": layers, "float_modulation": float_modulation}
    setup = about | {"device": str(picked), "threads": threads, "folder": str(work)}
    bench = Bench(setup, out, chosen(only, compiles, picked.type), repeats)
    bench.results |= machine(picked, threads) | about | {"repeats": repeats, "turns": turns or repeats}
    try:
        steps = 0 if model == FLUX else steps
        bench.prepare(steps)
        waves = bench.waves(memory * 1e9)
        bench.results["waves"] = waves
        bench.measure_steps(waves, steps, turns or repeats)
        bench.measure_gemms(compiles)
    finally:
        bench.helper.close()
        shutil.rmtree(work, ignore_errors=True)
    print(write_report(bench.results, out))
    print(summary(bench.results))


if __name__ == "__main__":
    torch.set_num_threads(1)  # this process only asks
    typer.run(main)
