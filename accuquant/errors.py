"""What accuquant raises, in words for the person who can change something about it.

Every one is an `AccuQuantError`. They are `ValueError`s too, as they always were.
"""

import difflib
from collections.abc import Iterable
from typing import Any


class AccuQuantError(ValueError):
    """Something that the user can change: a recipe, an argument, a folder, a file."""


class RecipeError(AccuQuantError):
    """What is wrong with a recipe, or with what it names."""


class CacheError(RecipeError):
    """A cache that cannot be put on this model, is already there, or is not what its config says."""


class CheckpointError(AccuQuantError):
    """A checkpoint that is not what its config promises; names the file and the key."""


def closest(word: str, valid: Iterable[str], cutoff: float = 0.5) -> str:
    """The valid spelling that is most similar to ``word``, or "" where none comes near.

    Of equals the one with the nearest letters, so for int5 it is int4 and not int8.

    Args:
        cutoff: the least similarity that counts, from 0 (any) to 1 (the same letters).
    """

    def likeness(name: str) -> tuple[float, int]:
        apart = sum(abs(ord(a) - ord(b)) for a, b in zip(word, name, strict=False))
        return difflib.SequenceMatcher(None, word.lower(), name.lower()).ratio(), -apart

    best = max(sorted(valid), key=likeness, default="")
    return best if likeness(best)[0] >= cutoff else ""


def nearest(word: Any, valid: Iterable[str]) -> str:
    """`closest` as the end of a message: " (did you mean 'int4'?)", or nothing."""
    close = closest(word, valid) if isinstance(word, str) else ""
    return f" (did you mean {close!r}?)" if close else ""


def first_line(error: BaseException) -> str:
    """What another library says of a mistake, in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
