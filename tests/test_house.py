"""The rules of the house: small files, imports that go downward, no pickles, declared dependencies."""

import ast
import graphlib
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 400
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PACKAGE = {module_name(path): path for path in sources("accuquant")}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.Module, module: str = "", is_package: bool = False) -> Iterator[str]:
    """Dotted names of all imported modules, also of imports inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in PACKAGE else base


@cache
def imports_of(module: str) -> set[str]:
    path = PACKAGE[module]
    return set(imports(parse(path), module, path.name == "__init__.py"))


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def is_stdlib(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


# A folder is a stage. It imports itself and rows below it; folders that share a row do not know each other.
ROWS = (
    ("cli",),
    ("programs",),
    ("tuning",),
    ("evaluation",),
    ("export",),
    ("caching",),
    ("calibration",),
    ("runtime",),
    ("pipeline",),
    ("kernels",),
    ("core", "recipe"),
)
# All may import them; they import nothing of ours but one another.
BASE = ("accuquant.errors", "accuquant.files", "accuquant.progress", "accuquant.version")
ROW = {f"accuquant.{folder}": number for number, row in enumerate(ROWS) for folder in row}
ENTRANCES = ("accuquant", "accuquant.__main__", "accuquant.registration")  # what a user imports or starts


def folder_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def band_error(module: str, imported: str) -> str | None:
    """Why ``module`` may not import ``imported``, or None."""
    ours, triton_kernels = within(imported, "accuquant"), "accuquant.kernels.triton_kernels"
    if imported == triton_kernels and module != "accuquant.kernels.cuda":
        return "only kernels.cuda knows whether Triton is there"
    if not ours:
        triton = module == triton_kernels and within(imported, "triton")  # an extra: one file needs it
        mathematics = within(module, "accuquant.core", "accuquant.kernels")
        if mathematics and not (within(imported, "torch") or is_stdlib(imported) or triton):
            return "core and kernels import torch, the standard library and what lies below them"
        return None
    if imported not in PACKAGE:
        return "there is no such module"
    if module in ENTRANCES or imported in BASE:
        return None
    above, below = ROW.get(folder_of(module)), ROW.get(folder_of(imported))
    if above is None or below is None:
        return "files lie in the folder of their stage"
    if within(imported, folder_of(module)) or below > above:
        return None
    return f"{folder_of(imported)} is no row below {folder_of(module)}"


def forbidden(tree: ast.Module) -> Iterator[str]:
    """Everything that could read a pickle or let a wrong checkpoint pass."""
    for name in imports(tree):
        if name.split(".")[0] in PICKLES:
            yield f"import of {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in {"torch", "yaml"}:
            loaders = {"load", "unsafe_load", "full_load"} & {alias.name for alias in node.names}
            yield from (f"line {node.lineno}: {name} from {node.module}" for name in loaders)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}:
            yield f"line {node.lineno}: {called}"
        if called.split(".")[-1] in {"load_state_dict", "load_model"}:
            strict = [k.value for k in node.keywords if k.arg == "strict"] + node.args[1:]
            if any(isinstance(value, ast.Constant) and value.value is False for value in strict):
                yield f"line {node.lineno}: {called} with strict=False"


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def declared(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    lines = project["dependencies"] + [line for extra in extras for line in optional[extra]]
    return {normalised(re.match(r"[\w.-]+", line)[0]) for line in lines}


def test_sources_are_found():
    assert {"accuquant", "accuquant.recipe", "accuquant.core.numerics", "accuquant.calibration.layers"} <= set(PACKAGE)


@pytest.mark.parametrize("path", sources("accuquant", "tools"), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("module", PACKAGE)
def test_imports_go_downward(module):
    reasons = {imported: band_error(module, imported) for imported in imports_of(module)}
    assert {imported: reason for imported, reason in reasons.items() if reason} == {}


def test_no_import_cycles():
    graph = {module: {name for name in imports_of(module) if name in PACKAGE} for module in PACKAGE}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("path", sources("accuquant", "tools"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickles(path):
    assert list(forbidden(parse(path))) == []


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("accuquant", ["torchao", "cuda"]), ("tools", ["train", "text"]), ("tests", ["train", "text", "dev", "cuda"])],
)
def test_imports_are_declared(folder, extras):
    local = {"accuquant", "tools", "tests"} | {
        name for path in sources("tests") for name in (path.stem, path.parent.name)
    }
    local |= {path.stem for path in sources(folder)}
    names = {name.split(".")[0] for path in sources(folder) for name in imports(parse(path))} - {""}
    distributions = packages_distributions()
    missing = {
        name
        for name in names - local
        if not is_stdlib(name) and not declared(*extras) & {normalised(d) for d in distributions.get(name, [name])}
    }
    assert missing == set()


def private_names() -> set[str]:
    """Functions, classes, variables and attributes that our own files keep to themselves."""
    names = set()
    for path in sources("accuquant", "tools"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_self(node):
                names.add(node.attr)
    return {name for name in names if name.strip("_") and name.startswith("_") and not name.startswith("__")}


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def reached_into(tree: ast.Module, private: set[str]) -> Iterator[str]:
    """Private names that code of another file imports, reads or replaces."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and within(node.module or "", "accuquant", "tools"):
            yield from (alias.name for alias in node.names if alias.name in private)
        elif isinstance(node, ast.Attribute) and node.attr in private and not of_self(node):
            yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("setattr", "delattr"):
            named = (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
            yield from (name for name in named if name.rpartition(".")[2] in private)


def test_tests_use_public_names():
    private = private_names()
    found = {str(path.relative_to(ROOT)): {*reached_into(parse(path), private)} for path in sources("tests")}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "code",
    [
        "from accuquant.cli.main import _one",
        "import accuquant\naccuquant.cli.main._one()",
        "monkeypatch.setattr(module, '_one', 1)",
        "monkeypatch.setattr('accuquant.module._one', 1)",
    ],
)
def test_rule_notices_a_private_name(code):
    assert list(reached_into(ast.parse(code), {"_one"}))
    assert not list(reached_into(ast.parse(code.replace("_one", "one")), {"_one"}))


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("accuquant.recipe", "accuquant.core.numerics"),
        ("accuquant.core.numerics", "accuquant.recipe"),
        ("accuquant.core.numerics", "accuquant.calibration.layers"),
        ("accuquant.core.numerics", "diffusers"),
        ("accuquant.core.numerics", "accuquant.kernels.int_mm"),
        ("accuquant.kernels.int_mm", "accuquant.runtime.spec"),
        ("accuquant.kernels.cuda", "triton"),
        ("accuquant.runtime.layer", "accuquant.kernels.triton_kernels"),
        ("accuquant.runtime.checkpoint", "accuquant.calibration.layers"),
        ("accuquant.calibration.loop", "accuquant.caching.search"),
        ("accuquant.tuning.candidates", "accuquant.programs.calibrate"),
        ("accuquant.pipeline.tape", "accuquant"),
        ("accuquant.programs.evaluate", "accuquant.cli.main"),
        ("accuquant.programs.evaluate", "accuquant.no_such_module"),
    ],
)
def test_rule_notices_an_upward_import(module, imported):
    assert band_error(module, imported)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "torch.load('a.pt')",
        "from torch import load",
        "yaml.load(text, Loader=yaml.Loader)",
        "model.load_state_dict(state, strict=False)",
        "model.load_state_dict(state, False)",
    ],
)
def test_rule_notices_a_pickle(code):
    assert list(forbidden(ast.parse(code)))


def test_rule_lets_safe_code_pass():
    code = "yaml.safe_load(t); zip(a, b, strict=False); m.load_state_dict(s, strict=True)"
    assert list(forbidden(ast.parse(code))) == []
