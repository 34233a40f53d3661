"""What one instruction set exports, another loads, and samples the same from, up to a bound."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_an_export_of_this_cpu_is_good_on_an_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made and sampled with all that this one has, sampled with what nearly every x86 has: AVX2, and no VNNI."""
    monkeypatch.syspath_prepend(str(ROOT))
    settings = importlib.import_module("tools.across_settings")
    settings.make(tmp_path)
    settings.sample(tmp_path, tmp_path / "here")
    settings.run(settings.environment("default", "AVX2", 1), "sample", str(tmp_path), str(tmp_path / "old"))
    found = settings.apart(tmp_path / "old", tmp_path / "here")
    assert all(found[kind] <= bound for kind, bound in settings.BOUNDS.items()), found
