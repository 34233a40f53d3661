"""Activation memory of one update against the number of steps simulated together, ours and plain back-propagation.

Counts the bytes that autograd keeps for the backward pass, at their peak; on CUDA also what the allocator had to
reserve beyond the model. Writes memory.json, memory.md and memory.png.

    python -m tools.benchmarks.memory.run --out build/memory
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor

from accuquant.calibration.reference import states_of
from accuquant.calibration.session import Session, open_session
from accuquant.core.trajectory import full_gradient, group_gradient
from accuquant.progress import Reporter
from accuquant.recipe.file import load_recipe

STEPS = (1, 2, 5, 10, 25, 50)
MODES = ("identity", "variance", "exact", "full back-propagation")


class SavedBytes:
    """Live bytes of tensors saved for backward, each storage counted once, and their highest value."""

    def __init__(self, ignored: set[int]) -> None:
        self.live, self.peak, self.ignored = 0, 0, ignored
        self.users: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> tuple[Tensor, object]:
        storage, tracker = tensor.untyped_storage(), self
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.ignored:
            return tensor, None
        self.users[key] = self.users.get(key, 0) + 1
        if self.users[key] == 1:
            self.live += size
            self.peak = max(self.peak, self.live)

        class Token:
            def __del__(self) -> None:
                tracker.users[key] -= 1
                if not tracker.users[key]:
                    tracker.live -= size

        return tensor, Token()


def peak_bytes(session: Session, steps: int, mode: str) -> tuple[int, int | None]:
    """Peak of saved bytes, and of CUDA memory where there is one, for the group of steps 0 ... steps - 1."""
    tape = session.reference.tapes[0]
    for layer in session.layers.values():
        layer.requires_grad_(True)
        layer.zero_grad()

    weights = {p.untyped_storage().data_ptr() for p in session.network.parameters()}
    saved, cuda = SavedBytes(weights), tape.state(0).latents[0].is_cuda
    before = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept[0]):
        if mode == "full back-propagation":
            full_gradient(tape.step, states_of(tape), 0, steps)
        else:
            variances = session.reference.variances[len(tape)]
            group_gradient(tape.step, states_of(tape), 0, steps, mode, variances=variances)  # type: ignore[arg-type]
    return saved.peak, torch.cuda.max_memory_allocated() - before if cuda else None


def main(
    out: Annotated[Path, typer.Option(help="Folder for table and plot.")] = Path("build/memory"),
    recipe: Annotated[str, typer.Option(help="Recipe that names the model.")] = "dit_w8a8",
    batch: Annotated[int, typer.Option(help="Samples in the update.")] = 2,
) -> None:
    """Measure every M and mode in one process."""
    loaded = load_recipe(recipe, [f"data.num_samples={batch}", f"objective.batch_size={batch}"])
    session = open_session(loaded, Reporter())
    steps = [m for m in STEPS if m <= session.num_steps]
    rows: list[dict[str, Any]] = []
    for mode in MODES:
        for m in steps:
            saved, cuda = peak_bytes(session, m, mode)
            rows.append({"mode": mode, "steps_per_group": m, "saved_bytes": saved, "cuda_bytes": cuda})
            print(f"{mode:24} M = {m:2}: {saved / 1e6:8.1f} MB", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "memory.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    text = "| mode | " + " | ".join(f"M = {m}" for m in steps) + " |\n|---|" + "---|" * len(steps) + "\n"
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for mode in MODES:
        values = [r["saved_bytes"] / 1e6 for r in rows if r["mode"] == mode]
        text += f"| {mode} | " + " | ".join(f"{v:.1f} MB" for v in values) + " |\n"
        axes.plot(steps, values, marker="o", label=mode)
    axes.set(xscale="log", yscale="log", xlabel="steps per group M", ylabel="activation memory (MB)")
    axes.set_xticks(steps, [str(m) for m in steps])
    axes.legend()
    (out / "memory.md").write_text(text, encoding="utf-8")
    figure.savefig(out / "memory.png", dpi=150)
    print(text)


if __name__ == "__main__":
    typer.run(main)
