"""diffusers' quantizers, imported without a word.

diffusers imports torchao where it is installed, and torchao warns of every CUDA library that this machine cannot load.
That would stand before the output of each command. The package imports this module first.
"""

from __future__ import annotations

import logging
from importlib import import_module


def import_quantizers() -> None:
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        import_module("diffusers.quantizers")
    finally:
        logging.disable(before)


import_quantizers()
