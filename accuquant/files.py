"""Files that are whole or not there: each is written beside its place, flushed, and renamed.

Whatever a run writes goes through `whole`. A kill, at any moment, leaves the old file or the new one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from accuquant.errors import AccuQuantError, first_line
from accuquant.progress import Reporter

TEMPORARY = ".tmp"  # of a file that is not whole yet; a kill may leave one, and the next writing replaces it
Found = TypeVar("Found")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write to; it becomes ``path`` when the block is done.

    Raises:
        OSError: it cannot be written; the message names ``path``, also where safetensors is what failed.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with errors_named(path):
        try:
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush(path.parent)  # the rename too outlives a loss of power


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """What goes wrong while ``path`` is written is an `OSError` in words, with its name: a full disk, most often."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


def flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder; file systems that cannot do the latter are left alone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    write_text(path, json.dumps(value, indent=indent))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """As safetensors; what is not contiguous is copied."""
    with whole(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


class KeptFiles:
    """A folder of what a run has made so far, for it to go on from after an interruption.

    What is there but cannot be read counts as not there, is said by name, and so is made again.

    Attributes:
        memory: what was made of files of this folder, or of one inside, for as long as the run goes on.
    """

    def __init__(self, folder: Path, reporter: Reporter, memory: dict[Any, Any] | None = None) -> None:
        self.folder, self.reporter = folder, reporter
        self.memory: dict[Any, Any] = {} if memory is None else memory

    def path(self, name: str) -> Path:
        return self.folder / name

    def inside(self, name: str) -> KeptFiles:
        """A folder in this one, made if absent."""
        self.path(name).mkdir(exist_ok=True)
        return KeptFiles(self.path(name), self.reporter, self.memory)

    def read(self, name: str, parse: Callable[[Path], Found]) -> Found | None:
        """What ``parse`` makes of the file, or None where there is none or it is not what was written.

        Raises:
            AccuQuantError: the file was read, and is of another run; ``parse`` says so.
        """
        if not self.path(name).is_file():
            return None
        try:
            return parse(self.path(name))
        except AccuQuantError:
            raise
        except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
            self.reporter.say(f"{self.path(name)} cannot be read and is made again ({first_line(error)})")
            return None

    def read_json(self, name: str) -> Any | None:
        return self.read(name, lambda path: json.loads(path.read_text(encoding="utf-8")))

    def read_tensors(self, name: str) -> dict[str, Tensor] | None:
        return self.read(name, load_file)

    def write_text(self, name: str, text: str) -> None:
        write_text(self.path(name), text)

    def write_json(self, name: str, value: Any, indent: int | None = None) -> None:
        write_json(self.path(name), value, indent)

    def write_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        write_tensors(self.path(name), tensors)

    def copy(self, path: Path) -> None:
        """A file of another folder, or a folder with all that is in it, under the same name."""
        if path.is_dir():
            inside = self.inside(path.name)
            for each in path.iterdir():
                inside.copy(each)
            return
        with whole(self.path(path.name)) as temporary:
            shutil.copyfile(path, temporary)

    def json(self, name: str, make: Callable[[], Any]) -> Any:
        """What the file holds; made and kept, if it is not there."""
        found = self.read_json(name)
        if found is None:
            found = make()
            self.write_json(name, found)
        return found
