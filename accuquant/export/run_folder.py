"""The finished folder: model card, and the rename that makes it appear at once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from accuquant.errors import RecipeError


def check_output(output: Path, overwrite: bool) -> None:
    """See to it before a long run that its result can be put in place, and that nothing of the user's is lost by it.

    Raises:
        RecipeError: the folder exists and may not be replaced, or cannot be created.
    """
    if output.is_symlink() or output.exists():
        if not overwrite:
            raise RecipeError(f"export.output: {output} exists; --overwrite replaces it once the new export is whole")
        if not (output / "recipe.yaml").is_file() or not (output / "model_index.json").is_file():
            raise RecipeError(
                f"export.output: {output} is no export of accuquant, so --overwrite spares it; name another"
            )
    parent = next(p for p in output.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        what = "cannot be written to" if parent.is_dir() else "is a file"
        raise RecipeError(f"export.output: {output} cannot be created, {parent} {what}")


def publish(staging: Path, output: Path) -> None:
    """Rename the whole folder into place; an older one is moved beside ``staging`` first and deleted last."""
    old = staging.with_name("replaced")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.replace(output, old)
    os.replace(staging, output)
    shutil.rmtree(old, ignore_errors=True)
