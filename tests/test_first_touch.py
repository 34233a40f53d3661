"""The first touch is light, and diffusers knows the format in whichever order both are imported."""

import subprocess
import sys
from pathlib import Path

import pytest

import accuquant

HEAVY = "('torch', 'diffusers', 'transformers', 'matplotlib', 'datasets', 'numpy', 'accuquant.runtime')"
KNOWN = """
from diffusers.quantizers import auto
from diffusers.quantizers.auto import DiffusersAutoQuantizer
config = {"quant_method": "accuquant", "layers": {"a": {"weight": "int8"}}, "timestep_edges": [], "version": 1}
read = DiffusersAutoQuantizer.from_config(config)
from accuquant.runtime.checkpoint import AccuQuantConfig, AccuQuantQuantizer
assert type(read) is AccuQuantQuantizer and type(read.quantization_config) is AccuQuantConfig
"""


def run(code: str, *options: str) -> str:
    root = Path(accuquant.__file__).parent.parent
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "first",
    [
        "import accuquant; from diffusers import DiTPipeline",
        "import accuquant, diffusers.quantizers.auto",
        "from accuquant import enable_cache, AccuQuantConfig",
        "import diffusers; import accuquant",
        "from diffusers import DiTPipeline; import accuquant",
    ],
)
def test_the_format_is_known_in_any_order(first: str) -> None:
    said = run(first + KNOWN)
    if "accuquant" in first.split(";")[0]:  # then it has diffusers say nothing of the libraries that others miss
        assert said == ""


@pytest.mark.parametrize(
    "code",
    [
        "import accuquant",
        "import accuquant; dir(accuquant); accuquant.__version__",
        "from accuquant.cli.main import app; app(['--version'], standalone_mode=False)",
        "from accuquant.cli.main import app; app(['--help'], standalone_mode=False)",
    ],
)
def test_the_first_touch_loads_nothing_heavy(code: str) -> None:
    found = run(f"{code}\nimport sys\nprint('loaded', [name for name in {HEAVY} if name in sys.modules])")
    assert found.rstrip().endswith("loaded []")


@pytest.mark.parametrize(("arguments", "code"), [(["recipes"], 0), (["calibrate", "no_such_recipe"], 2)])
def test_recipes_and_mistakes_load_no_torch(arguments: list[str], code: int) -> None:
    found = run(
        f"import sys\nsys.argv = ['accuquant', *{arguments}]\nfrom accuquant.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    print(done.code, 'torch' in sys.modules)"
    )
    assert f"{code} False" in found


def test_everything_public_is_there() -> None:
    assert set(accuquant.__all__) <= set(dir(accuquant))
    assert all(getattr(accuquant, name) is not None for name in accuquant.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = accuquant.no_such_name
