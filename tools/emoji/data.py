"""Noto's colour emoji with their names: pictures of 64 x 64, prompts, and what of them is held out.

Drawings: Noto Emoji by Google (Apache-2.0), as the npm package `@iconify-json/noto` carries them, one SVG each. Names
and tags: the npm package `emojibase-data` (MIT). Both are read from a `node_modules` folder; nothing is downloaded.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import resvg_py
import torch
from PIL import Image
from torch import Tensor

SIZE = 64
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (24, 24, 27),
    "gray": (154, 160, 168),
    "blue": (147, 197, 253),
    "green": (134, 207, 160),
    "pink": (249, 178, 205),
    "yellow": (250, 226, 120),
    "purple": (167, 139, 218),
}
UNSPOKEN = "white"  # the background of a prompt that names none
SPLITS = ("seen", "name", "direction", "family", "flag", "skin tone")  # the first is trained on


@dataclass(frozen=True)
class Emoji:
    """One drawing. ``split`` says whether it is trained on ("seen") or by which rule it is held out."""

    name: str
    tags: tuple[str, ...]
    svg: str
    split: str


def load_emoji(packages: Path) -> list[Emoji]:
    """All drawings of the installed packages, by name; of several names for one drawing the first is kept.

    Args:
        packages: A `node_modules` folder with `@iconify-json/noto` and `emojibase-data`.

    Raises:
        FileNotFoundError: A package is not there; the message says how to install both.
    """
    noto, names = packages / "@iconify-json" / "noto", packages / "emojibase-data" / "en" / "data.json"
    if not noto.is_dir() or not names.is_file():
        raise FileNotFoundError(
            f"{packages} does not hold the emoji; install them with: "
            f"npm install --prefix {packages.parent} @iconify-json/noto@1 emojibase-data@17"
        )
    icons: dict[str, Any] = json.loads((noto / "icons.json").read_text())
    icon_of: dict[str, str] = json.loads((noto / "chars.json").read_text())
    known = {entry["hexcode"]: entry for entry in _with_skins(json.loads(names.read_text()))}

    found: dict[str, Emoji] = {}
    for code, icon in icon_of.items():
        entry = known.get(_plain(code), {})
        name = entry.get("label", icon.replace("-", " ")).lower()
        body = icons["icons"][icon]["body"]
        width, height = icons["width"], icons["height"]
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
        found.setdefault(name, Emoji(name, tuple(entry.get("tags", ())), svg, split(name)))
    drawings: dict[str, Emoji] = {}
    for name in sorted(found):
        drawings.setdefault(found[name].svg, found[name])
    return list(drawings.values())


def _with_skins(entries: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for entry in entries:
        for one in (entry, *entry.get("skins", ())):
            yield one | {"hexcode": _plain(one["hexcode"]), "tags": one.get("tags", entry.get("tags", ()))}


def _plain(code: str) -> str:
    """A code point sequence without the variation selector, which some lists write and others leave out."""
    return code.upper().replace("-FE0F", "")


def split(name: str) -> str:
    """By which rule an emoji is held out, or "seen". Hashes of the name decide, so a newer package moves nothing."""
    first, _, rest = name.partition(": ")
    parts = rest.split(", ") if rest else []
    if _held(first, 4):
        return "name"  # with all that is said of it
    if "facing right" in parts and _held(first, 20):
        return "direction"  # with all its skin tones; facing left is seen
    if first == "family" and _held(name, 20):
        return "family"
    if re.fullmatch(r"\S+ flag", first) and _held(name, 25):
        return "flag"
    if "skin tone" in rest and _held(name, 8):
        return "skin tone"
    return "seen"


def _held(text: str, percent: int) -> bool:
    return zlib.crc32(text.encode()) % 100 < percent


def render(emoji: Iterable[Emoji], size: int = SIZE) -> Tensor:
    """The drawings as (N, 4, size, size) uint8: red, green, blue and opacity, not multiplied."""
    pictures = []
    for one in emoji:
        png = resvg_py.svg_to_bytes(svg_string=one.svg, width=size, height=size)
        pictures.append(np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA")))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def paint(drawings: Tensor, colours: Tensor) -> Tensor:
    """Drawings (N, 4, H, W) on plain backgrounds (N, 3) of 0 to 255: images (N, 3, H, W) in [-1, 1]."""
    opacity = drawings[:, 3:].float() / 255
    mixed = drawings[:, :3].float() * opacity + colours.float()[:, :, None, None] * (1 - opacity)
    return mixed / 127.5 - 1


def base(name: str) -> str:
    """What comes before the colon: all that differ in skin tone, direction or members have the same."""
    return name.partition(":")[0]


def spoken(name: str) -> str:
    """A name as a person would write it in a prompt: "waving hand: dark skin tone" -> "waving hand, dark skin tone"."""
    return re.sub(r"\s+", " ", name.replace(": ", ", ").replace("“", "").replace("”", "")).strip()


def prompt(name: str, background: str | None = None) -> str:
    """The prompt of a name alone or on a background, as the retrieval check asks for it."""
    return spoken(name) if background is None else f"{spoken(name)} on a {background} background"


def varied_prompt(emoji: Emoji, background: str, random: Random) -> str:
    """A prompt as training sees it: mostly the name, sometimes with tags or tags alone, maybe the background."""
    how, tags = random.random(), list(emoji.tags)
    random.shuffle(tags)
    said = spoken(emoji.name)
    if tags and how < 0.15:
        said = ", ".join([said, *tags[:2]])
    elif len(tags) >= 3 and how < 0.22:
        said = ", ".join(tags[:3])
    if background == UNSPOKEN and random.random() < 0.8:
        return said
    return f"{said} on a {background} background"
