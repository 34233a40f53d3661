"""The cache serves eight families: the right modules, no difference when all steps are full, no work when skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    HunyuanVideoTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from pipelines import flux_arguments, make_flux, make_pipeline, randomize
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from accuquant.recipe import Cache
from accuquant.runtime.cache.attach import attach_cache, controller_of, detach_cache
from accuquant.runtime.cache.stats import CacheStats

TIMESTEPS = (900.0, 700.0, 400.0, 100.0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@dataclass(frozen=True)
class Row:
    """A family.

    Attributes:
        make: a tiny model.
        latent: shape of its input.
        arguments: the others.
        modules: what follows the block's name in a cached module's -> how many of them.
        per_timestep: the timestep is passed divided by this.
    """

    make: Callable[[], nn.Module]
    latent: tuple[int, ...]
    arguments: Callable[[], dict[str, Any]]
    modules: dict[str, int]
    per_timestep: float = 1.0


def dit() -> nn.Module:
    return make_pipeline().transformer


def pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        caption_channels=12,
        cross_attention_dim=32,
        use_additional_conditions=False,
    )


def sd35() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def hunyuan_video() -> nn.Module:
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=12,
        pooled_projection_dim=10,
        rope_axes_dim=(4, 6, 6),
        guidance_embeds=True,
    )


def wan() -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def qwen_image() -> nn.Module:
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    )


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def text() -> dict[str, Any]:
    return {"encoder_hidden_states": random(2, 5, 12)}


ROWS = {
    "DiT": Row(dit, (2, 4, 8, 8), lambda: {"class_labels": torch.tensor([3, 4])}, {"attn1": 2, "ff": 2}),
    "PixArt": Row(
        pixart,
        (2, 4, 8, 8),
        lambda: {**text(), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        {"attn1": 2, "attn2": 2, "ff": 2},
    ),
    # the last block makes nothing of the text
    "SD3.5": Row(
        sd35,
        (2, 4, 8, 8),
        lambda: {**text(), "pooled_projections": random(2, 10)},
        {"attn": 3, "attn2": 2, "ff": 3, "ff_context": 2},
    ),
    "FLUX": Row(make_flux, (2, 16, 4), flux_arguments, {"attn": 1, "ff": 1, "ff_context": 1, "proj_out": 2}, 1000.0),
    "HunyuanVideo": Row(
        hunyuan_video,
        (2, 4, 2, 4, 4),
        lambda: {
            **text(),
            "encoder_attention_mask": torch.ones(2, 5),
            "pooled_projections": random(2, 10),
            "guidance": torch.tensor([6000.0, 6000.0]),
        },
        {"attn": 1, "ff": 1, "ff_context": 1, "proj_out": 2},
    ),
    "Wan": Row(wan, (2, 4, 2, 4, 4), text, {"attn1": 2, "attn2": 2, "ffn": 2}),
    "Qwen-Image": Row(
        qwen_image,
        (2, 16, 16),
        lambda: {**text(), "encoder_hidden_states_mask": torch.ones(2, 5).bool(), "img_shapes": [[(1, 4, 4)]] * 2},
        {"attn": 2, "img_mlp": 2, "txt_mlp": 2},
        1000.0,
    ),
    # one below, one in the middle, two above
    "SD": Row(unet, (2, 4, 8, 8), text, {"attn1": 4, "attn2": 4, "ff": 4}),
}


@pytest.fixture(params=ROWS, scope="module")
def family(request: pytest.FixtureRequest) -> tuple[Row, nn.Module]:
    row = ROWS[request.param]
    torch.manual_seed(0)
    return row, randomize(row.make())


@torch.no_grad()
def call(row: Row, model: nn.Module, i: int) -> Tensor:
    """Step i of a made-up trajectory: the latent moves a little."""
    latent = random(*row.latent) + 0.1 * i * random(*row.latent, 1)[..., 0]
    timestep = torch.full((row.latent[0],), TIMESTEPS[i] / row.per_timestep)
    prediction: Tensor = model(latent, timestep=timestep, **row.arguments()).sample
    return prediction


def loop(row: Row, model: nn.Module, config: Cache | None = None) -> tuple[Tensor, CacheStats | None]:
    if config is None:
        return torch.stack([call(row, model, i) for i in range(len(TIMESTEPS))]), None
    controller = attach_cache(model, config)
    try:
        return torch.stack([call(row, model, i) for i in range(len(TIMESTEPS))]), controller.stats()
    finally:
        detach_cache(model)


ALL = Cache(interval=1, estimation="rfe", order=2)
HALF = Cache(interval=2, warmup=1, estimation="rfe", order=1)  # full at 0 and 2


def test_the_expected_modules_are_hooked_and_no_other(family: tuple[Row, nn.Module]) -> None:
    row, model = family
    modules = attach_cache(model, HALF).modules
    hooked = {name for name, module in model.named_modules() if name and "_diffusers_hook" in vars(module)}
    detach_cache(model)
    found = {part: sum(name.rpartition(".")[2] == part for name in modules) for part in row.modules}
    assert found == row.modules
    assert len(modules) == len(set(modules)) == sum(row.modules.values())
    blocks = [name.removesuffix(".proj_out") for name in modules if name.endswith(".proj_out")]
    fused = {f"{block}.{part}" for block in blocks for part in ("norm", "attn", "proj_mlp")}
    assert hooked == set(modules) | fused
    assert not any("refiner" in name for name in hooked)


def test_all_steps_full_is_no_cache(family: tuple[Row, nn.Module]) -> None:
    row, model = family
    full, _ = loop(row, model)
    found, stats = loop(row, model, ALL)
    assert stats is not None and stats.full_steps == (0, 1, 2, 3)
    assert torch.equal(found, full)
    assert torch.equal(loop(row, model)[0], full)  # and off again, it leaves nothing behind
    assert (full[1:] - full[:-1]).norm() > 1e-2 * full.norm()  # the steps are not all the same


@pytest.mark.parametrize("estimation", ["rfe", "taylor", "reuse"])
def test_half_of_the_steps_are_forecast(family: tuple[Row, nn.Module], estimation: str) -> None:
    row, model = family
    order = 0 if estimation == "reuse" else 1
    full, _ = loop(row, model)
    found, stats = loop(row, model, HALF.changed(estimation=estimation, order=order))
    assert stats is not None and (stats.nfc, stats.full_steps, stats.num_steps) == (2, (0, 2), 4)
    assert torch.equal(found[0], full[0])
    assert all(not torch.equal(a, b) for a, b in zip(found[1::2], full[1::2], strict=True))
    # a forecast, and not something else: nearer than the change of a step or two
    assert (found - full).norm() < 0.5 * full.norm()
    # what is computed outside the cached modules is new at each step
    assert not torch.equal(found[1], found[0])


def structure(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(structure(o) for o in output)
    return (tuple(output.shape), output.dtype) if isinstance(output, Tensor) else output


def test_skipped_modules_give_tuples_and_shapes_as_computed_ones(family: tuple[Row, nn.Module]) -> None:
    row, model = family
    modules = attach_cache(model, HALF).modules
    seen: dict[str, list[Any]] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: seen.setdefault(name, []).append(structure(output))

    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if name and "_diffusers_hook" in vars(module)
    ]
    for i in range(2):
        call(row, model, i)
    for handle in handles:
        handle.remove()
    detach_cache(model)
    assert set(modules) <= set(seen)
    assert {name: two[0] for name, two in seen.items()} == {name: two[1] for name, two in seen.items()}
    joint = [name for name, two in seen.items() if len(two[0]) == 2 and isinstance(two[0][0][0], tuple)]
    assert bool(joint) == any(part in row.modules for part in ("ff_context", "txt_mlp"))


def test_each_module_remembers_its_own_input_and_output(family: tuple[Row, nn.Module]) -> None:
    """The two streams of joint attention each have their own; a fused block's input is what its norm gives."""
    row, model = family
    controller = attach_cache(model, HALF)
    seen: dict[str, tuple[list[Tensor], Any]] = {}

    def note(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            known = [*args, *(kwargs[k] for k in ("hidden_states", "encoder_hidden_states") if k in kwargs)]
            seen[name] = [t for t in known if isinstance(t, Tensor)], output

        return keep

    blocks = {name.removesuffix(".proj_out") for name in controller.modules if name.endswith(".proj_out")}
    watched = [*controller.modules, *(f"{block}.norm" for block in blocks)]
    handles = [model.get_submodule(n).register_forward_hook(note(n), with_kwargs=True) for n in watched]
    call(row, model, 0)
    for handle in handles:
        handle.remove()
    detach_cache(model)
    for name in controller.modules:
        inputs, output = seen[name]
        if name.endswith(".proj_out"):
            inputs = [seen[name.removesuffix("proj_out") + "norm"][1][0]]
        outputs = output if isinstance(output, tuple) else (output,)
        (memories,) = (found for key, found in controller.state.memories.items() if key.module == name)
        assert len(memories) == len(outputs)
        for memory, given, made in zip(memories, inputs[: len(outputs)], outputs, strict=True):
            assert memory is not None and memory.input is not None
            assert torch.equal(memory.input, given) and torch.equal(memory.factors[0], made)


def count(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return int(counter.get_total_flops())


def test_a_skipped_step_costs_all_but_the_cached_modules(family: tuple[Row, nn.Module]) -> None:
    """Floating point operations, the modules' own counted by calling them apart."""
    row, model = family
    named = set(attach_cache(model, HALF).modules)
    detach_cache(model)
    blocks = {name.removesuffix(".proj_out") for name in named if name.endswith(".proj_out")}
    named |= {f"{block}.{part}" for block in blocks for part in ("attn", "proj_mlp")}
    inputs: dict[str, Any] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, kwargs: inputs.__setitem__(name, (args, kwargs))

    handles = [model.get_submodule(n).register_forward_pre_hook(keep(n), with_kwargs=True) for n in sorted(named)]
    plain = count(lambda: call(row, model, 0))
    for handle in handles:
        handle.remove()
    apart = {}
    for name, (args, kwargs) in inputs.items():
        apart[name] = count(lambda: model.get_submodule(name)(*args, **kwargs))  # noqa: B023
    assert set(apart) == named and min(apart.values()) > 0

    controller = attach_cache(model, HALF)
    full = count(lambda: call(row, model, 0))
    skipped = count(lambda: call(row, model, 1))
    assert controller.stats().full_steps == (0,)
    detach_cache(model)
    assert full == plain
    assert skipped == plain - sum(apart.values())
    assert 0 < skipped < plain


def test_nothing_of_the_cache_stays(family: tuple[Row, nn.Module]) -> None:
    row, model = family
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    loop(row, model, HALF)
    assert controller_of(model) is None
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert {name: set(found) for name, found in after.items()} == {name: set(found) for name, found in before.items()}
    assert all(after[name][key] is before[name][key] for name in before for key in before[name])
