"""Which backend computes a layer: the table of all, and the one choice from it.

The choice is a rule on the layer's facts and the CPU's instructions (`Backend.pays`, by the table in `thresholds`), so
that two loads of one model on one machine compute the same, whatever else the machine does. Two things come before it:
a path that ``ACCUQUANT_PATH`` names, for the layers that it can compute, and what a person had measured on this
machine (`measured`).
"""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

from accuquant.errors import AccuQuantError, nearest
from accuquant.kernels import measured
from accuquant.kernels.backend import Backend, Facts
from accuquant.kernels.cublas import Cublas
from accuquant.kernels.floating import Float
from accuquant.kernels.int_mm import IntMM
from accuquant.kernels.onednn import OneDNN
from accuquant.kernels.scaled_mm import ScaledMM
from accuquant.kernels.triton import Triton

Why = Literal["rule", "measured", "fixed"]
VARIABLE = "ACCUQUANT_PATH"

FLOAT = Float()  # computes everything, also inputs that another has no product for
# A new backend is a line here. The rule is: the first that takes a layer and pays for it.
BACKENDS: tuple[Backend, ...] = (OneDNN(), ScaledMM(), Triton(), Cublas(), IntMM(), FLOAT)


class Choice(NamedTuple):
    backend: Backend
    why: Why


def paths(facts: Facts) -> list[Backend]:
    """Those that can compute such a layer, in the order of the table."""
    return [backend for backend in BACKENDS if backend.takes(facts)]


def named(name: str, key: str = "path") -> Backend:
    """The backend of that name.

    Raises:
        AccuQuantError: there is none; the message begins with ``key`` and says which there are.
    """
    names = [backend.name for backend in BACKENDS]
    if name in names:
        return BACKENDS[names.index(name)]
    raise AccuQuantError(f"{key}: no path is named {name!r}{nearest(name, names)}; there are: {', '.join(names)}")


def fixed() -> Backend | None:
    """The backend that the environment variable ACCUQUANT_PATH names; None where it is not set.

    Raises:
        AccuQuantError: it names no path.
    """
    name = os.environ.get(VARIABLE)
    return named(name, VARIABLE) if name else None


def choose(facts: Facts) -> Choice:
    """The backend of such a layer on this machine, and why it is this one.

    Raises:
        AccuQuantError: the environment variable ACCUQUANT_PATH names no path.
    """
    wanted = fixed()
    if wanted is not None and wanted.takes(facts):
        return Choice(wanted, "fixed")
    found = paths(facts)
    name = measured.kept(facts) if len(found) > 1 else None
    for backend in found:
        if backend.name == name:
            return Choice(backend, "measured")
    return Choice(next((backend for backend in found if backend.pays(facts)), FLOAT), "rule")


def unprepared(facts: Facts) -> Backend:
    """What computes a layer that nobody has prepared: weights stay as files have them."""
    return next(b for b in BACKENDS if b.name == ("int_mm" if facts.integers else "float"))
