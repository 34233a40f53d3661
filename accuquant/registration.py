"""Teaches diffusers the format without importing diffusers: at once where it is loaded already, else when it is.

diffusers knows its quantizers by two tables, and there is no other way in. What stands in them is resolved when a
checkpoint asks for it: filling them while diffusers is still being imported would import it in a circle.

diffusers imports torchao where it is installed, and torchao warns of every CUDA library that this machine cannot load.
That would stand before the output of each command, so it is said to nobody.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

METHOD = "accuquant"
QUANTIZERS = "diffusers.quantizers"


class Later:
    """Stands for a class of `accuquant.runtime.checkpoint` until something is asked of it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _resolved(self) -> Any:
        return getattr(importlib.import_module("accuquant.runtime.checkpoint"), self._name)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._resolved(), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._resolved()(*args, **kwargs)


class WhenImported(importlib.abc.MetaPathFinder):
    """Is asked for every module that is imported; has its say on diffusers' quantizers, and goes."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_quietly(module: ModuleType) -> None:
                before = logging.root.manager.disable
                logging.disable(max(before, logging.WARNING))
                try:
                    execute(module)
                finally:
                    logging.disable(before)
                fill_tables()

            spec.loader.exec_module = execute_quietly  # type: ignore[method-assign]
        return spec


def fill_tables() -> None:
    auto = importlib.import_module(f"{QUANTIZERS}.auto")
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Later("AccuQuantConfig")
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = Later("AccuQuantQuantizer")


def register() -> None:
    """Make diffusers know ``quant_method: accuquant``, now or when its quantizers are imported."""
    if QUANTIZERS in sys.modules:
        fill_tables()
    elif not any(isinstance(finder, WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, WhenImported())
