"""Where a run writes: its lock, the folder it works in, and the exchange that makes the result appear at once.

    out/x            the export: there when it is whole, and not before
    out/x.partial    what the run has made so far, and in it `export`, which becomes out/x
    out/x.lock       held while a run writes to either; the pid of who holds it

A folder is ours to delete if it holds a recipe.yaml that we wrote; whatever else has its name is spared.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from accuquant.errors import RecipeError
from accuquant.files import TEMPORARY, KeptFiles, errors_named, flush
from accuquant.progress import Reporter
from accuquant.recipe import Recipe
from accuquant.recipe.file import dump_recipe

if TYPE_CHECKING:  # a lock is asked for sooner than diffusers is imported
    from diffusers import DiffusionPipeline

RECIPE, PUBLISHED = "recipe.yaml", "published.json"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux' renameat2


class RunFolder:
    """The files of one run that makes ``output``.

    Args:
        suffix: of the folder it works in, beside ``output``.
        what: the run, in messages about an interrupted one.
        of_cache: files that hang on the recipe's section `cache`; with any, it may be another when a run goes on.

    Attributes:
        work: the folder it works in.
        kept: its files.
    """

    def __init__(
        self,
        output: Path,
        reporter: Reporter,
        suffix: str = ".partial",
        what: str = "run",
        of_cache: tuple[str, ...] = (),
    ) -> None:
        self.output, self.what, self.of_cache = output, what, of_cache
        self.work, self.lock_path = (output.with_name(output.name + end) for end in (suffix, ".lock"))
        self.kept = KeptFiles(self.work, reporter)
        # one a path and process: a search holds it while it has its choice calibrated
        self._lock: BaseFileLock = FileLock(self.lock_path.absolute(), is_singleton=True)

    # ---- before anything is written

    @contextmanager
    def opened(self, recipe: Recipe, resume: bool, overwrite: bool) -> Iterator[None]:
        """Hold the lock for as long as the block runs, once nothing is in the way of this run.

        Args:
            resume: go on with an interrupted run of this recipe, which there must be.
            overwrite: an export may be replaced and an interrupted run dropped; nothing is, yet.

        Raises:
            RecipeError: the output or the folder to work in has to be changed by the user, or another process writes.
        """
        self.check_output(overwrite)
        with self.locked():
            self.check_output(overwrite)  # one may have come since
            self._check_work(recipe, resume, overwrite)
            yield

    def check_output(self, overwrite: bool) -> None:
        """See to it before a long run that its result can be put in place, and that nothing of the user's is lost.

        Raises:
            RecipeError: the folder exists and may not be replaced, or cannot be created.
        """
        output = self.output
        if output.is_symlink() or output.exists():
            if not overwrite:
                raise RecipeError(
                    f"export.output: {output} exists; --overwrite replaces it once the new export is whole"
                )
            if not (output / RECIPE).is_file() or not (output / "model_index.json").is_file():
                raise RecipeError(
                    f"export.output: {output} is no export of accuquant, so --overwrite spares it; name another"
                )
        parent = next(p for p in output.absolute().parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            what = "cannot be written to" if parent.is_dir() else "is a file"
            raise RecipeError(f"export.output: {output} cannot be created, {parent} {what}")

    def _check_work(self, recipe: Recipe, resume: bool, overwrite: bool) -> None:
        if resume:
            if not (self.work / RECIPE).is_file():
                raise RecipeError(f"--resume: there is no interrupted {self.what} in {self.work}")
            begun, wanted = self._begun(), _tree(recipe)
            passed_over = {"cache": None} if self.of_cache else {}
            if not isinstance(begun, dict) or begun | passed_over != wanted | passed_over:
                raise RecipeError(
                    f"--resume: the recipe has changed since {self.work} was begun; --overwrite starts over"
                )
            return
        self.check_ours()
        if self.is_begun and not overwrite:
            raise RecipeError(
                f"{self.work} holds an interrupted {self.what}; --resume continues it, --overwrite starts over"
            )

    def check_ours(self) -> None:
        """See to it that nothing of the user's has the name of the folder to work in.

        Raises:
            RecipeError: something has.
        """
        if not self.is_ours():
            raise RecipeError(
                f"export.output: {self.work} is in the way; it holds no recipe.yaml of accuquant, so it is spared; "
                "move it, or choose another output"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process writes to this output for as long as the block runs.

        The operating system gives the lock back when its holder dies, however it does; a lock file that is left then
        is taken over. Folders made for the file alone are removed with it.

        Raises:
            RecipeError: another process holds it; the message has its pid.
        """
        if self._lock.is_locked:  # by a search, which has its choice calibrated
            yield
            return
        made = [p for p in self.output.absolute().parents if not p.exists()]
        self.lock_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise RecipeError(
                f"export.output: another accuquant run{self._holder()} is writing to {self.output}; "
                "wait for it, end it, or choose another output"
            ) from None
        try:
            if not isinstance(self._lock, SoftFileLock):  # which a file system without locks gets, and writes it itself
                self._sign()
            yield
        finally:
            if self._signature() == str(os.getpid()):
                # while it is held: whoever has opened it by now finds that it has no name any more, and opens it anew
                self.lock_path.unlink()
            self._lock.release()
            with suppress(OSError):  # something was put there
                for folder in made:
                    folder.rmdir()

    def _sign(self) -> None:
        """Write the pid into the lock file; that of a holder who has died is written over.

        Raises:
            RecipeError: the file is the user's.
        """
        found = self._signature()
        if found and not found.isdecimal():
            raise RecipeError(f"export.output: {self.lock_path} is in the way; it is no lock of accuquant; move it")
        self.lock_path.write_text(str(os.getpid()), encoding="ascii")

    def _signature(self) -> str:
        with suppress(OSError):
            return self.lock_path.read_bytes()[:64].decode(errors="replace").strip()
        return ""

    def _holder(self) -> str:
        """Who has written itself into the lock file; it does so right after it has locked it."""
        for _ in range(20):
            if pid := self._signature().partition("\n")[0]:
                return f", pid {pid},"
            time.sleep(0.01)
        return ""

    # ---- begin, or go on

    def begin(self, recipe: Recipe, resume: bool) -> None:
        """Make the folder to work in, or go on with the one there is, less what hangs on a cache that has changed."""
        if not resume:
            self.drop()
        elif not self.says(recipe):
            for name in self.of_cache:
                (self.work / name).unlink(missing_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        self.kept.write_text(RECIPE, dump_recipe(recipe))

    def take_over(self, kept: KeptFiles, recipe: Recipe) -> None:
        """Go on from files that another run has kept: its folder becomes this run's, with the recipe in it, at once."""
        self.check_ours()
        kept.write_text(RECIPE, dump_recipe(recipe))
        self.drop()
        os.replace(kept.folder, self.work)

    @property
    def is_begun(self) -> bool:
        """Whether a recipe of ours is in the folder."""
        begun = self._begun()
        return isinstance(begun, dict) and bool(begun) and begun.keys() <= Recipe.model_fields.keys()

    def is_ours(self) -> bool:
        """Whether nothing of the user's is there: no such folder, or a run's, which may have no recipe yet."""
        if not self.work.is_dir() or self.work.is_symlink():
            return not (self.work.exists() or self.work.is_symlink())
        return bool(self.is_begun or {p.name for p in self.work.iterdir()} <= {RECIPE + TEMPORARY})

    def says(self, recipe: Recipe) -> bool:
        """Whether what was begun is this very recipe."""
        return bool(self._begun() == _tree(recipe))

    def drop(self) -> None:
        """Delete the folder, if it is ours; an export that was moved into it, by a kill in `publish`, goes back."""
        if not self.is_ours() or not self.work.exists():
            return
        if (replaced := self.work / "replaced").is_dir() and not self.output.exists():
            os.replace(replaced, self.output)
        for path in [p for p in self.work.iterdir() if p.name not in (RECIPE, PUBLISHED)]:  # they say what the rest is
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.rmtree(self.work)

    def _begun(self) -> Any:
        """The recipe in the folder, as a tree, or None where there is nothing readable."""
        try:
            return yaml.safe_load((self.work / RECIPE).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return None

    # ---- the result

    @property
    def staging(self) -> Path:
        return self.work / "export"

    def stage(self, pipeline: DiffusionPipeline, max_shard_size: str) -> KeptFiles:
        """Save the pipeline where the export grows; returns the folder for the files beside it.

        Raises:
            OSError: the disk is full, most often.
        """
        shutil.rmtree(self.staging, ignore_errors=True)
        with errors_named(self.staging):
            pipeline.save_pretrained(self.staging, max_shard_size=max_shard_size)
        return KeptFiles(self.staging, self.kept.reporter)

    def publish(self) -> Path:
        """Put the whole export in its place, at once where the system can exchange two folders; drop the rest."""
        for path in (*self.staging.rglob("*"), self.staging):
            flush(path)
        self.kept.write_json(PUBLISHED, self.staging.stat().st_ino)
        if not self.output.exists():
            os.replace(self.staging, self.output)
        elif not _exchange(self.staging, self.output):
            old = self.work / "replaced"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.output, old)
            os.replace(self.staging, self.output)
        flush(self.output.absolute().parent)
        self.drop()
        return self.output

    def finish(self) -> bool:
        """Whether an interrupted run has put its export in place already; what is left of it then goes."""
        published = self.kept.read_json(PUBLISHED)
        if published is None or not self.output.exists() or self.output.stat().st_ino != published:
            return False
        with self.locked():
            self.drop()
        return True


def _tree(recipe: Recipe) -> Any:
    return yaml.safe_load(dump_recipe(recipe))


def _exchange(one: Path, other: Path) -> bool:
    """Have two folders change names in one step; False where system or file system has no such step."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return bool(rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), ctypes.c_uint(RENAME_EXCHANGE)) == 0)
