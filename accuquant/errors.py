"""What accuquant raises, in words for the person who can change something about it.

Every one is an `AccuQuantError`. They are `ValueError`s too, as they always were.
"""


class AccuQuantError(ValueError):
    """Something that the user can change: a recipe, an argument, a folder, a file."""


class RecipeError(AccuQuantError):
    """What is wrong with a recipe, or with what it names."""


class CacheError(RecipeError):
    """A cache that cannot be put on this model, is already there, or is not what its config says."""


class CheckpointError(AccuQuantError):
    """A checkpoint that is not what its config promises; names the file and the key."""
