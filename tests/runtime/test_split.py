"""Layers that read a concatenation: found, taken apart with scales of their own, exported and loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import HunyuanDiT2DModel
from pipelines import flux_arguments, make_flux, make_unet
from torch import Tensor, nn
from zoo import others

from accuquant.calibration.concatenated import concatenated_inputs
from accuquant.calibration.layers import TrainableLayer, quantize_model
from accuquant.calibration.plan import count_macs, plan_modules
from accuquant.errors import CheckpointError
from accuquant.export.native import harden_model
from accuquant.recipe import Cache, Quantization, Rule
from accuquant.runtime.cache.features import cached_features
from accuquant.runtime.clock import StepClock
from accuquant.runtime.spec import LayerSpec
from accuquant.runtime.split import SplitLayer, split_layers, split_modules

INT8 = Rule(modules=".*", weight="int8", activation="int8")


def unet() -> tuple[nn.Module, Callable[[], Any]]:
    torch.manual_seed(0)
    model = make_unet(cross_attention_dim=16)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 16)
    return model, lambda: model(x, 5, text).sample


def test_a_unet_reads_its_skip_connections_by_norm_and_shortcut() -> None:
    model, run = unet()
    found = concatenated_inputs(model, run)
    joins = {f"up_blocks.{i}.resnets.{k}" for i in range(3) for k in range(2)}
    assert set(found) == {f"{join}.{part}" for join in joins for part in ("conv1", "conv_shortcut")}
    for name, sizes in found.items():
        assert sum(sizes) == model.get_submodule(name).in_channels and len(sizes) == 2
    assert found["up_blocks.2.resnets.1.conv1"] == (8, 8) and found["up_blocks.2.resnets.0.conv1"] == (16, 8)


def test_a_fused_block_reads_attention_and_mlp() -> None:
    model = make_flux()
    found = concatenated_inputs(
        model, lambda: model(torch.randn(2, 16, 4), timestep=torch.tensor([0.5, 0.5]), **flux_arguments())
    )
    width = model.config.num_attention_heads * model.config.attention_head_dim
    assert found == {f"single_transformer_blocks.{i}.proj_out": (width, 4 * width) for i in range(2)}


class Odd(nn.Module):
    """Layers that read no concatenation of channels, or not always the same, or one that something has mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mixed, self.moving, self.read = (nn.Linear(8, 8) for _ in range(4))
        self.kept = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, 8)"""
        self.tokens(torch.cat([x, x], dim=1))
        joined = torch.cat([x[..., :3], x[..., 3:]], -1)
        self.mixed(joined.flip(-1))
        self.moving(joined)
        self.moving(torch.cat([x[..., :5], x[..., 5:]], -1))
        self.kept(F.layer_norm(F.silu(joined), (8,)).contiguous())
        self.read(torch.cat([x[:, 0, :4], x[:, 0, 4:]], -1))  # one vector a sample
        return x


def test_only_what_reads_the_same_parts_at_every_call() -> None:
    model = Odd()
    assert concatenated_inputs(model, lambda: model(torch.randn(2, 6, 8))) == {"kept": (3, 5)}
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["linear", "conv", "strided"])
def test_the_parts_are_the_whole(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "linear":
        module: nn.Linear | nn.Conv2d = nn.Linear(9, 4)
        x = torch.randn(3, 5, 9)
    else:
        module = nn.Conv2d(9, 4, 3, padding=1, stride=2 if kind == "strided" else 1)
        x = torch.randn(3, 9, 6, 6)
    split = SplitLayer(module, (2, 3, 4))
    torch.testing.assert_close(split(x), module(x))
    assert [name for name, p in split.named_parameters() if "bias" in name] == ["0.bias"]
    model = nn.ModuleDict({"layer": module})
    split_modules(model, {"layer": (4, 5)})
    assert split_layers(model)["layer"].sizes == (4, 5)
    torch.testing.assert_close(model["layer"](x), module(x))


def test_two_scales_keep_what_one_loses() -> None:
    """A skip connection a hundred times wider: the narrow part comes through, as far as eight bits carry it."""
    torch.manual_seed(0)
    module, x = nn.Linear(16, 8), torch.randn(64, 16)
    x[:, 8:] *= 100
    module.weight.data[:, 8:] /= 100

    def error(sizes: tuple[int, ...]) -> float:
        model = nn.ModuleDict({"layer": nn.Linear(16, 8)})
        model["layer"].load_state_dict(module.state_dict())
        names = {"layer": 0}
        if sizes:
            split_modules(model, {"layer": sizes})
            names = {"layer.0": 0, "layer.1": 8}
        clock = StepClock([])
        for name, start in names.items():
            part = model.get_submodule(name)
            assert isinstance(part, nn.Linear)
            layer = TrainableLayer(part, LayerSpec("int8", "int8"), clock, name, search=False)
            layer.set_activation_scale([x[:, start : start + part.in_features].flatten()], search=False)
            model.set_submodule(name, layer)
        with torch.no_grad():
            return float((model["layer"](x) - module(x)).norm() / module(x).norm())

    assert error((8, 8)) < 0.1 * error(())


def test_planned_part_by_part() -> None:
    model, run = unet()
    parts = concatenated_inputs(model, run)
    whole = {p.name: p for p in count_macs(model, plan_modules(model, (INT8,)), run, 2)}
    planned = count_macs(model, plan_modules(model, (INT8,), parts=parts), run, 2)
    split = [p for p in planned if p.split]
    assert {p.module for p in split} == set(parts) and len(split) == 2 * len(parts)
    for name in parts:
        own = [p for p in split if p.module == name]
        assert [p.name for p in own] == [f"{name}.0", f"{name}.1"] and [p.bias for p in own] == [True, False]
        assert sum(p.macs for p in own) == whole[name].macs > 0
        assert sum(p.float_bytes for p in own) == whole[name].float_bytes
    floating = Rule(modules=".*", weight="int8")  # weights alone: there is nothing that two ranges could lose
    assert not any(p.split for p in plan_modules(model, (floating,), parts=parts))
    named = Rule(modules=r"up_blocks\.0\.resnets\.0\.conv1", weight="int8", activation="int8")  # by the whole's name
    assert [p.name for p in plan_modules(model, (named,), parts=parts) if p.spec] == [
        f"{named.modules}.{k}".replace("\\", "") for k in (0, 1)
    ]


def test_counted_alike_once_they_are_split() -> None:
    model, run = unet()
    parts = concatenated_inputs(model, run)
    planned = plan_modules(model, (INT8,), parts=parts)
    before = count_macs(model, planned, run, 2)
    split_modules(model, {p.module: p.split for p in planned if p.split})
    assert count_macs(model, planned, run, 2) == before
    quantize_model(model, {p.name: p.spec for p in planned if p.spec}, StepClock([]), search=False)
    assert count_macs(model, planned, run, 2) == before


def flux_2() -> tuple[nn.Module, Callable[[], Any]]:
    model: Any = others.flux_2()[0].transformer
    ids = {"img_ids": torch.zeros(2, 6, 4), "txt_ids": torch.zeros(2, 5, 4)}
    given = {"timestep": torch.tensor([0.5, 0.5]), "guidance": torch.ones(2), **ids}
    return model, lambda: model(torch.randn(2, 6, 4), torch.randn(2, 5, 16), **given)


def hunyuan_dit() -> tuple[nn.Module, Callable[[], Any]]:
    model = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        activation_fn="gelu-approximate",
        sample_size=8,
        hidden_size=32,
        num_layers=4,
        mlp_ratio=2.0,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=4,
        text_len=4,
        text_len_t5=4,
    )
    text = {"encoder_hidden_states": torch.randn(2, 4, 8), "encoder_hidden_states_t5": torch.randn(2, 4, 8)}
    masks = {"text_embedding_mask": torch.ones(2, 4), "text_embedding_mask_t5": torch.ones(2, 4)}
    sizes = {"image_meta_size": torch.ones(2, 6), "style": torch.zeros(2, dtype=torch.int64)}
    rope = (torch.ones(16, 16), torch.zeros(16, 16))
    given = {"timestep": torch.tensor([5.0, 5.0]), **text, **masks, **sizes, "image_rotary_emb": rope}
    return model, lambda: model(torch.randn(2, 4, 8, 8), **given)


def test_a_cache_takes_the_same_of_a_split_model() -> None:
    """Of FLUX.2, whose attention itself reads a concatenation, and HunyuanDiT, whose blocks do by a layer alone."""
    config = Cache(estimation="reuse", interval=2)
    for make in (flux_2, hunyuan_dit):
        model, run = make()
        parts = concatenated_inputs(model, run)
        before = cached_features(model, config)
        assert parts and any(name.endswith(("to_out", "skip_linear")) for name in parts)
        split_modules(model, parts)
        assert cached_features(model, config) == before


def test_presets_split_where_they_can() -> None:
    assert Quantization(preset="w4a8").split_inputs == "auto"  # type: ignore[call-arg]
    assert Quantization(preset="w4a8", split_inputs=False).split_inputs is False  # type: ignore[call-arg]
    assert Quantization(rules=(INT8,)).split_inputs is False


def exported(folder: Path) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    model, run = unet()
    parts = concatenated_inputs(model, run)
    planned = plan_modules(model, (INT8,), parts=parts)
    split_modules(model, {p.module: p.split for p in planned if p.split})
    clock = StepClock([])
    layers: dict[str, Any] = quantize_model(model, {p.name: p.spec for p in planned if p.spec}, clock, search=False)
    seen: dict[str, Tensor] = {}
    for layer in layers.values():
        layer.observer, layer.quantized = (lambda own, x: seen.__setitem__(own.name, x)), False
    run()
    for name, layer in layers.items():
        layer.observer, layer.quantized = None, True
        layer.set_activation_scale([seen[name].flatten()], search=False)
    harden_model(model, clock)
    model.save_pretrained(folder)  # type: ignore[operator]
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 16)
    return model, lambda network: network(x, 5, text).sample


def test_exported_and_loaded_to_the_last_bit(tmp_path: Path) -> None:
    model, call = exported(tmp_path)
    loaded = make_unet(16).from_pretrained(tmp_path)
    assert {n: s.sizes for n, s in split_layers(loaded).items()} == {n: s.sizes for n, s in split_layers(model).items()}
    with torch.no_grad():
        assert torch.equal(call(loaded), call(model))
    config = tmp_path / "config.json"
    tree = json.loads(config.read_text())
    name = "up_blocks.0.resnets.0.conv1"
    good = tree["quantization_config"]["split"]
    for change, message in (
        ({name: [8, 16]}, f"{name} must be parts of its 32 channels"),
        ({name: [32]}, f"{name} must be two counts"),
        ({name: [16, 0]}, f"{name} must be two counts"),
        ({name: [16, 16.0]}, f"{name} must be two counts"),
        ({"conv_in": [2, 2]}, r"conv_in has a part that quantization_config.layers lacks, conv_in\.0"),
        ([name], "must be an object"),
    ):
        tree["quantization_config"]["split"] = (good | change) if isinstance(change, dict) else change
        config.write_text(json.dumps(tree))
        with pytest.raises(CheckpointError, match=f"quantization_config.split.*{message}"):
            make_unet(16).from_pretrained(tmp_path)
    del tree["quantization_config"]["split"]
    config.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=r"names .*\.0, where UNet2DConditionModel has nothing"):
        make_unet(16).from_pretrained(tmp_path)
