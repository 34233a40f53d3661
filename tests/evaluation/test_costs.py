"""How long a call takes, on a machine that other work has."""

from __future__ import annotations

import pytest
import torch
from helpers import busy_cores, dit_tapes
from pipelines import make_pipeline

from accuquant.cli import plan_view
from accuquant.evaluation.costs import CallSeconds, call_seconds


def test_a_busy_machine_changes_what_is_now_and_not_what_was_free() -> None:
    """Threads that wait for each other's cores: seen 20 to 50 times slower, which once made 63 minutes of 84 s."""
    (tape,) = dit_tapes(make_pipeline(), 4, labels=[1] * 8)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        quiet = call_seconds(tape)
        with busy_cores():
            busy = call_seconds(tape)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert 0 < quiet.free <= quiet.now and 0 < busy.free <= busy.now
    assert busy.free < 5 * quiet.free


@pytest.mark.parametrize(("now", "words"), [(1.0, ""), (1.9, ""), (35.0, "a call takes 35 times as long")])
def test_a_plan_says_that_the_machine_is_busy(now: float, words: str) -> None:
    said = plan_view.time_words({"seconds": 90.0, "slowdown": CallSeconds(1.0, now).slowdown})
    assert said.startswith("about ") and said.endswith(words) and ("free machine" in said) == bool(words)
