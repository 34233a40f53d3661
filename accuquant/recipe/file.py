"""Reading and writing recipes: YAML, overrides from the command line, and errors in words for the person."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from accuquant.errors import RecipeError, closest, nearest
from accuquant.recipe.base import found
from accuquant.recipe.schema import Recipe

Shipped = Literal["recipes", "calib_data"]
PACKAGE = Path(__file__).parent.parent


def load_recipe(name: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from a file, or by name from the shipped ones, and apply ``section.key=value`` overrides.

    A data path found beside the recipe or from here becomes absolute, so that the export's copy of the recipe finds it.

    Raises:
        RecipeError: the file is missing or not YAML, or its content does not fit the schema.
    """
    path = find_shipped("recipes", str(name), suffix=".yaml")
    try:
        tree = _yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as text: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (model: ..., data: ...), found {found(tree)}")
    for override in overrides or []:
        _apply(tree, override)
    recipe = parse_recipe(tree, " ".join([str(path), *(f"--set {o}" for o in overrides or [])]))
    for place in (path.parent / recipe.data.path, Path(os.path.expanduser(recipe.data.path))):
        if os.path.isfile(place):
            return recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": str(place.resolve())})})
    return recipe


def parse_recipe(tree: dict[str, Any], source: str) -> Recipe:
    """Validate a tree that was read from ``source``.

    Raises:
        RecipeError: see `load_recipe`.
    """
    try:
        # in JSON, pydantic's strict mode takes lists for tuples but no text for a number
        return Recipe.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        lines = _explain(error)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{source}: {error}") from error
    raise RecipeError(f"{source}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{source}:", *lines]))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def find_shipped(kind: Shipped, name: str, suffix: str = "") -> Path:
    """A file the user names: as given, or one that travels with the package.

    Raises:
        RecipeError: no such file; the message lists what is shipped and the nearest name.
    """
    given = Path(os.path.expanduser(name))
    shipped = [shipped_folder(kind) / n for n in (name, name + suffix)]
    for place in [given, *shipped]:
        if os.path.isfile(place):
            return place
    what = f"{name!r} is a folder" if os.path.isdir(given) and name else f"no file {name!r}"
    key, known = "data.path: " if kind == "calib_data" else "", list_shipped(kind)
    raise RecipeError(f"{key}{what}{nearest(given.name, known)}; shipped {kind}: {', '.join(known) or 'none'}")


def shipped_folder(kind: Shipped) -> Path:
    """Inside the wheel, or the folder of a clone."""
    inside = PACKAGE / "shipped" / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


def list_shipped(kind: Shipped) -> list[str]:
    files = shipped_folder(kind).glob("*.yaml" if kind == "recipes" else "*.jsonl")
    return sorted(p.stem if kind == "recipes" else p.name for p in files)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value]
        for position, key in enumerate(keys):
            if key.value in [k.value for k in keys[:position]]:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def _yaml(text: str, source: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number that cannot be
        parts = [getattr(error, "context", None), getattr(error, "problem", None)]
        problem = ", ".join(filter(None, parts)) or str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{source}{where}: not readable as YAML: {problem}") from error


def _apply(tree: Any, override: str) -> None:
    """Set ``a.b.0.c=value`` in place; the value is read as YAML."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise RecipeError(f"--set {override}: write it as section.key=value, for example objective.steps_per_group=5")
    value, node = _yaml(text, f"--set {override}"), tree
    for depth, part in enumerate(parts):
        if not isinstance(node, dict | list):
            raise RecipeError(f"--set {override}: {'.'.join(parts[:depth])} holds a value, not a section")
        place: Any = _index(node, part, override) if isinstance(node, list) else part
        if depth == len(parts) - 1:
            node[place] = value
        elif isinstance(node, list):
            node = node[place]
        else:
            node[place] = {} if node.get(place) is None else node[place]
            node = node[place]


def _index(node: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        entries = f"entries 0 to {len(node) - 1}" if node else "no entries"
        raise RecipeError(f"--set {override}: the list has {entries}, found {part!r}")
    return int(part)


WORDS = {  # pydantic's kinds of error -> our words
    "model_type": "must be a section with the keys ",
    "tuple_type": "must be a list",
    "too_short": "must have at least one entry",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must be a size such as 500MB or 5GB",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
}


def _explain(error: ValidationError) -> list[str]:
    """One line for each thing that is wrong: path, what was found, what would do. Unknown keys come first."""
    lines = []
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    meant = [_meant(e["loc"]) for e in problems if e["type"] == "extra_forbidden"]
    for e in problems:
        path, value, kind = ".".join(map(str, e["loc"])), e["input"], e["type"]
        if kind == "extra_forbidden":
            hint = f" (did you mean {_meant(e['loc'])!r}?)" if _meant(e["loc"]) else ""
            lines.append(f"unknown key {path}{hint}; valid keys there: {', '.join(_keys_at(e['loc'][:-1]))}")
        elif kind == "missing":  # unless it is there, misspelt
            lines += [f"{path} is missing"] if e["loc"][-1] not in meant else []
        elif kind == "value_error":  # our own words; those about a section begin with its key
            text = str(e["ctx"]["error"])
            about_key = isinstance(value, dict) and re.split(r"[ :]", text)[0] in _keys_at(e["loc"])
            lines.append(path + ("" if not path else "." if about_key else ": ") + text)
        elif kind != "too_short" or not value:  # pydantic counts the valid entries
            message = WORDS.get(kind) or e["msg"].replace("Input should be", "must be")
            if kind == "model_type":
                message += ", ".join(_keys_at(e["loc"]))
            if kind == "string_type" and isinstance(value, bool | int | float):
                message += "; put it in quotes"
            hint = nearest(value, re.findall(r"'([^']+)'", message)) if kind == "literal_error" else ""
            lines.append(f"{path or 'recipe'}: {message} (found {found(value)}){hint}")
    return list(dict.fromkeys(lines))


def _keys_at(where: tuple[int | str, ...]) -> list[str]:
    """Valid keys of the section at this path."""
    section: type[BaseModel] = Recipe
    for part in where:
        annotation = section.model_fields[part].annotation if isinstance(part, str) else section
        inner = getattr(annotation, "__args__", (annotation,))[0]
        section = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else section
    return list(section.model_fields)


def _meant(where: tuple[int | str, ...]) -> str:
    """What a wrong key stands for: the same key of another section, or the nearest one here."""
    key = str(where[-1])
    elsewhere = [f"{name}.{key}" for name in Recipe.model_fields if key in _keys_at((name,))]
    return elsewhere[0] if elsewhere else closest(key, _keys_at(where[:-1]))
