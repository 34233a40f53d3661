"""What loading a quantized model costs in memory, measured from outside on one of more than 100 MB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from pipelines import make_pipeline
from torch import nn

from accuquant.calibration.layers import quantize_model
from accuquant.export.native import harden_model
from accuquant.runtime.clock import StepClock
from accuquant.runtime.spec import LayerSpec

LOAD = """
import sys
import accuquant
from diffusers import DiTTransformer2DModel

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

DiTTransformer2DModel.from_pretrained(sys.argv[1])  # what is imported and allocated at first use is no model's
before = memory("VmRSS")
model = DiTTransformer2DModel.from_pretrained(sys.argv[2])
print(memory("VmHWM") - before)
"""


def save(model: DiTTransformer2DModel, folder: Path) -> Path:
    """Attention and MLP in int8, modulations in int4; scales are not looked at here."""
    clock = StepClock([500.0])
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("transformer_blocks")]
    specs = {n: LayerSpec("int4" if "norm1" in n else "int8", "int8") for n in names}
    quantize_model(model, specs, clock, search=False)
    harden_model(model, clock)
    model.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_peak_of_loading_stays_near_the_file(tmp_path: Path) -> None:
    """The file, and what two float32 copies of the largest layer take: layers are prepared one after the other.

    Which copies preparing makes, of the new layout of int8 weights or for a measurement, depends on the CPU.
    """
    small = save(make_pipeline(layers=1).transformer, tmp_path / "small")
    with torch.device("meta"):
        model = DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=4, num_layers=7, sample_size=16,
            num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False,
            activation_fn="gelu-approximate", attention_bias=True,
        )  # fmt: skip
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().uniform_(-1, 1)
    large = save(model, tmp_path / "large")
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    command = [sys.executable, "-c", LOAD, str(small), str(large)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=root)
    assert done.returncode == 0, done.stderr
    layer = 4 * max(p.numel() for n, p in model.named_parameters() if n.endswith("ff.net.2.weight"))
    assert size > 100e6 and int(done.stdout) <= size + 2 * layer, int(done.stdout) / size
