"""Damaged exports, attacked from outside: each is one `CheckpointError` that names the file and the key, at once.

Every key of `quantization_config` is replaced by values of every wrong type, and every kind of small tensor by what
cannot be. What stays legal (a cache of another order, say) is no damage and is left out.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from accuquant import CheckpointError
from accuquant.calibration.layers import quantize_model
from accuquant.export.native import harden_model
from accuquant.runtime.clock import StepClock
from accuquant.runtime.spec import LayerSpec

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
EXPORTS = ("w4a8-cached", "w8a8-dynamic")
DEEP: Any = [[[[[[1]]]]]]
JUNK = (None, True, 1.5, -1, 0, "x", "", [], {}, DEEP, math.nan, math.inf, 1e308, 10**400)
BLOCK = "transformer_blocks.0"
LAYERS = {"w4a8-cached": f"{BLOCK}.attn1.to_q", "w8a8-dynamic": f"{BLOCK}.ff.net.0.proj"}
NUMBER = (int, float)
# Keys at which other values of this kind are another export, not damage; tensors tell what they tell.
OTHER_EXPORTS = {
    ("cache", "order"): (None,),
    ("cache", "trials"): (0,),
    ("cache", "target_nfc"): (None,),
    ("cache", "measured_nfc"): (None,),
}
OWN_WORDS = {  # keys that the message names instead, since these are what no longer fits
    "timestep_edges": ("activation_scale",),
    "group_size": ("weight_scale",),
    "symmetric": ("weight_zero_point",),
    "activation_symmetric": ("activation_zero_point",),
    "cache": ("cache_correction",),
    "correction_timesteps": ("cache_correction",),
    "correction_full_timesteps": ("cache_correction",),
    "corrected": ("cache_correction",),
    "corrected_quantization": ("correction_channels",),
    "correction_channels": ("cache_correction",),
    "learned_timesteps": ("cache_correction",),
    "learned_modules": ("cache_correction", "learned_timesteps"),
    "full_timesteps": ("target_nfc",),
    "schedule": ("give exactly one of",),
    "estimation": ("order", "estimation"),
}


def config_of(export: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / export / "transformer" / CONFIG).read_text(encoding="utf-8"))
    return found


def places(export: str) -> Iterator[tuple[str | int, ...]]:
    """Of one layer of the export, and of everything else: the paths of all values, of lists the first entry."""

    def walk(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
        yield path
        if isinstance(value, dict):
            inner = list(value)
            if path == ("layers",):
                inner = [LAYERS[export]]
            for key in inner[:1] if path[-1:] in (("noise",), ("correction_channels",)) else inner:
                yield from walk(value[key], (*path, key))
        elif isinstance(value, list) and value:
            yield from walk(value[0], (*path, 0))

    config = config_of(export)["quantization_config"]
    for key, value in config.items():
        if key != "quant_method":  # by which diffusers finds us
            yield from walk(value, (key,))


def legal(export: str, path: tuple[str | int, ...], original: Any, value: Any) -> bool:
    """Whether another export could say this."""
    if type(value) is type(original) and value == original:
        return True
    if path[0] == "cache" and len(path) == 1 and export == "w8a8-dynamic" and value is None:
        return True  # without its cache
    if any(value is known or (type(value) is type(known) and value == known) for known in OTHER_EXPORTS.get(path, ())):
        return True
    if path[-1] == 0 and path[1] != "schedule" and isinstance(original, float):  # a time, an energy, a mean
        plain = type(value) in NUMBER and abs(value) < 1e38 if value == value else False
        if path[1] == "noise":
            return plain and value >= 0
        if path == ("timestep_edges", 0):
            return False if not plain else value > 650
        return plain
    return False


def cases() -> Iterator[Any]:
    for export in EXPORTS:
        for path in places(export):
            original = config_of(export)["quantization_config"]
            for key in path:
                original = original[key]
            for value in JUNK:
                if not legal(export, path, original, value):
                    found = "deep" if value is DEEP else "huge" if value == 10**400 else json.dumps(value)
                    yield pytest.param(export, path, value, id=f"{export}-{'/'.join(map(str, path))}={found}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("attacked")
    return {name: shutil.copytree(GOLDEN / name, made / name) for name in EXPORTS}


def refused(load: Callable[[], Any], *words: str) -> str:
    """The message, which names the file and one of the words; within a second of this process."""
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        load()
    assert time.process_time() - start < 1
    message = str(caught.value)
    assert CONFIG in message or WEIGHTS in message, message
    assert any(word in message for word in words), f"none of {words} in: {message}"
    assert len(message) < 1000
    return message


def attacked_config(folder: Path, change: Callable[[dict[str, Any]], None], *words: str) -> str:
    path = folder / "transformer" / CONFIG
    whole = path.read_text(encoding="utf-8")
    config = json.loads(whole)
    change(config["quantization_config"])
    path.write_text(json.dumps(config), encoding="utf-8")
    try:
        return refused(lambda: DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer"), *words)
    finally:
        path.write_text(whole, encoding="utf-8")


def attacked_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None], *words: str, **arguments: Any) -> str:
    path = folder / "transformer" / WEIGHTS
    tensors = load_file(path)
    damaged = {key: t.clone() for key, t in tensors.items()}
    change(damaged)
    save_file(damaged, path, metadata={"format": "pt"})
    try:
        load = DiTTransformer2DModel.from_pretrained
        return refused(lambda: load(folder, subfolder="transformer", **arguments), *words)
    finally:
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("export", "path", "value"), cases())
def test_wrong_value_in_the_config(
    folders: dict[str, Path], export: str, path: tuple[str | int, ...], value: Any
) -> None:
    def change(config: Any) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    names = [str(key) for key in path if isinstance(key, str)]
    words = [names[-1], *(word for name in names for word in OWN_WORDS.get(name, ()))]
    attacked_config(folders[export], change, *words)


@pytest.mark.parametrize(
    ("path", "wrong", "meant"),
    [
        ((), "layer", "layers"),
        ((), "timestep_edge", "timestep_edges"),
        ((), "self", "self"),
        (("layers", LAYERS["w4a8-cached"]), "wieght", "weight"),
        (("layers", LAYERS["w4a8-cached"]), "groupsize", "group_size"),
        (("cache",), "schedul", "schedule"),
        (("cache",), "self", "self"),
    ],
)
def test_unknown_key_is_told_the_nearest(
    folders: dict[str, Path], path: tuple[str, ...], wrong: str, meant: str
) -> None:
    def change(config: Any) -> None:
        for key in path:
            config = config[key]
        config[wrong] = 1

    message = attacked_config(folders["w4a8-cached"], change, wrong)
    assert wrong == meant or f"did you mean {meant!r}" in message


@pytest.mark.parametrize("edges", [[250.0, 650.0], [650.0, 650.0], [650.0, "250"], [650.0, False]], ids=str)
def test_edges(folders: dict[str, Path], edges: list[Any]) -> None:
    attacked_config(folders["w4a8-cached"], lambda config: config.update(timestep_edges=edges), "timestep_edges")


@pytest.mark.parametrize("key", ["noise", "correction_channels"])
def test_a_module_that_is_not_cached(folders: dict[str, Path], key: str) -> None:
    def change(config: Any) -> None:
        found = config["cache"][key]
        found["transformer_blocks.9.ff"] = found.pop("transformer_blocks.1.ff")

    attacked_config(folders["w4a8-cached"], change, key, "cache_correction", "noise_aware")


# ---- tensors

Q, FF = f"{BLOCK}.attn1.to_q", f"{BLOCK}.ff.net.0.proj"
CORRECTED, LEARNED = f"cache_correction.{BLOCK.replace('.', '/')}/ff", "cache_correction.learned.0"
FINITE = [f"{Q}.weight_scale", f"{Q}.activation_scale", f"{FF}.weight_scale", f"{Q}.bias", CORRECTED, LEARNED]


def put(key: str, value: float, last: bool) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(-1)[-1 if last else 0] = value

    return change


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in FINITE for value in (math.nan, math.inf, -math.inf)),
        *((key, value) for key in FINITE if key.endswith("scale") for value in (0.0, -1.0)),
    ],
)
def test_value_that_cannot_be(folders: dict[str, Path], key: str, value: float, last: bool) -> None:
    attacked_tensors(folders["w4a8-cached"], put(key, value, last), key)


@pytest.mark.parametrize("value", [-9, 8, 127])
def test_zero_point_out_of_range(folders: dict[str, Path], value: int) -> None:
    key = f"{Q}.weight_zero_point"
    assert "int4" in attacked_tensors(folders["w4a8-cached"], put(key, value, True), key)


@pytest.mark.parametrize("key", [*FINITE, f"{Q}.weight", f"{Q}.weight_zero_point", "proj_out_1.weight"])
@pytest.mark.parametrize("damage", ["type", "shape", "missing", "renamed"])
def test_other_tensors(folders: dict[str, Path], key: str, damage: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        found = tensors.pop(key)
        if damage == "type":
            tensors[key] = found.to(torch.int32 if found.is_floating_point() else torch.float32)
        elif damage == "shape":
            tensors[key] = torch.cat([found, found])
        elif damage == "renamed":
            tensors[f"{key}_"] = found

    attacked_tensors(folders["w4a8-cached"], change, key)


def test_dynamic_clip_ratio(folders: dict[str, Path]) -> None:
    key = f"{Q}.activation_scale"
    attacked_tensors(folders["w8a8-dynamic"], put(key, 0.0, False), key)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_wherever_it_is_loaded_to(folders: dict[str, Path], tmp_path: Path, how: str) -> None:
    places = {"": "cpu"} if how == "cpu" else {"transformer_blocks.0": "disk", "": "cpu"}
    arguments = {"device_map": places, "offload_folder": tmp_path, "dtype": torch.bfloat16}
    attacked_tensors(folders["w4a8-cached"], put(FINITE[0], math.nan, True), FINITE[0], **arguments)


@pytest.mark.parametrize("what", ["config", "tensor"])
def test_through_the_pipeline(folders: dict[str, Path], what: str) -> None:
    """diffusers passes it on as it is."""
    folder = folders["w4a8-cached"]
    place = folder / "transformer" / (CONFIG if what == "config" else WEIGHTS)
    whole = place.read_bytes()
    if what == "config":
        place.write_bytes(whole.replace(b'"int4"', b'"int5"', 1))
    else:
        tensors = load_file(place)
        tensors[FINITE[1]][0] = 0
        save_file(tensors, place, metadata={"format": "pt"})
    try:
        words = "did you mean 'int4'" if what == "config" else FINITE[1]
        assert place.name in refused(lambda: DiTPipeline.from_pretrained(folder), words)
    finally:
        place.write_bytes(whole)


def narrow() -> DiTTransformer2DModel:
    """Twelve columns of int3: a row ends within its second group of eight."""
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=6, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False,
        activation_fn="gelu-approximate", attention_bias=True,
    )  # fmt: skip
    clock = StepClock([])
    quantize_model(model, {Q: LayerSpec("int3")}, clock, search=True)
    harden_model(model, clock)
    return model


def test_padding_of_packed_rows(tmp_path: Path) -> None:
    narrow().save_pretrained(tmp_path / "transformer")
    DiTTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.weight"][3, -1] |= 0x80

    attacked_tensors(tmp_path, change, f"{Q}.weight has bits set behind the last column")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.int8], ids=str)
def test_weights_of_another_kind_are_not_cast(dtype: torch.dtype) -> None:
    """torch would copy floats into packed integers and say nothing."""
    model = narrow()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state[f"{Q}.weight"] = state[f"{Q}.weight"].to(dtype)
    with pytest.raises(CheckpointError, match=rf"{Q}\.weight is {dtype}, and this layer stores torch.uint8"):
        model.load_state_dict(state)
    model.load_state_dict({key: value.clone() for key, value in narrow().state_dict().items()})
