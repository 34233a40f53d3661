"""The export format that needs nothing of ours to load: int8 Linear weights as torchao's `Int8Tensor`.

The integers and scales are those that calibration has found; nothing is quantized anew. diffusers flattens the tensors
into safetensors, `NAME._weight_qdata` and so on, with the rest of each as JSON in the file's metadata.

torchao is optional, so it is imported where it is used.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from diffusers import TorchAoConfig
from diffusers.quantizers.torchao import TorchAoHfQuantizer
from torch import Tensor, nn

from accuquant.calibration.layers import DYNAMIC_CLIP, TrainableLayer, trainable_layers
from accuquant.errors import AccuQuantError
from accuquant.runtime.layer import QuantizedLayer
from accuquant.runtime.observe import observed

TORCHAO_VERSIONS = "0.18"  # that this format is tested with; its place in torchao is torchao.prototype
INSTALL_TORCHAO = "pip install 'accuquant[torchao]'"


def torchao_installed() -> bool:
    return find_spec("torchao") is not None


def input_dimensions(model: nn.Module, names: Iterable[str], run: Callable[[], object]) -> dict[str, int]:
    """How many dimensions each named module's input has in ``run``: torchao's static scale must have as many.

    Raises:
        AccuQuantError: a module is not called, or its inputs differ.
    """
    seen: dict[str, set[int]] = {name: set() for name in names}

    with torch.no_grad(), observed(model, seen, lambda name, call: seen[name].add(call.input.dim())):
        run()
    for name, found in seen.items():
        if len(found) != 1:
            what = f"has inputs of {' and '.join(map(str, sorted(found)))} dimensions" if found else "is not called"
            raise AccuQuantError(f"{name} {what}, and torchao's static activation scale must fit all of its inputs")
    return {name: found.pop() for name, found in seen.items()}


def convert_model(model: Any, dimensions: dict[str, int], dtype: torch.dtype) -> None:
    """Turn trainable layers into Linear modules with `Int8Tensor` weights; ``model.save_pretrained`` then writes them.

    Args:
        dimensions: of the inputs of modules with static activation scales.
        dtype: of the model, and so of biases and of what a weight is dequantized to.

    Raises:
        AccuQuantError: a layer has something that torchao cannot hold.
    """
    from torchao.quantization import FqnToConfig

    kinds: list[tuple[Any, list[str]]] = []  # a config, and the modules that it is true of
    for name, layer in trainable_layers(model).items():
        assert isinstance(layer, TrainableLayer)  # the recipe has no other
        linear, config = _convert(layer.harden(), dimensions.get(name, 0), dtype)
        model.set_submodule(name, linear)
        names = next((names for known, names in kinds if known == config), None)
        if names is None:
            kinds.append((config, names := []))
        names.append(name)
    configs = OrderedDict(("re:" + "|".join(map(re.escape, names)), config) for config, names in kinds)
    # what is written is already quantized: on loading, diffusers reads the config but applies none of it
    quantizer = TorchAoHfQuantizer(TorchAoConfig(FqnToConfig(fqn_to_config=configs)))
    quantizer.validate_environment()
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    model.register_to_config(quantization_config=quantizer.quantization_config)


def _convert(layer: QuantizedLayer, dimensions: int, dtype: torch.dtype) -> tuple[nn.Linear, Any]:
    """The Linear module, and the torchao config that says what it is."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8StaticActivationInt8WeightConfig,
        Int8Tensor,
        Int8WeightOnlyConfig,
        MappingType,
        PerRow,
        PerTensor,
    )
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    spec, scale, zero = layer.spec, layer.activation_scale, layer.activation_zero_point
    plain = spec.weight == "int8" and spec.symmetric and layer.groups == 1 and layer.conv is None
    if not plain or spec.activation not in ("int8", "float"):
        raise AccuQuantError(f"{layer.name}: torchao's Int8Tensor cannot hold {spec}")
    given: dict[str, Any] = {}
    config: Any = Int8WeightOnlyConfig()
    if scale is not None and spec.static:
        if len(scale) != 1:
            raise AccuQuantError(f"{layer.name}: torchao has one static activation scale a module, not {len(scale)}")
        mapping = MappingType.SYMMETRIC if zero is None else MappingType.ASYMMETRIC
        shape = (1,) * dimensions
        given = {
            "act_quant_kwargs": QuantizeTensorToInt8Kwargs(granularity=PerTensor(), mapping_type=mapping),
            "act_quant_scale": scale.detach().view(shape),
            "act_quant_zero_point": None if zero is None else zero.detach().view(shape),
        }
        config = Int8StaticActivationInt8WeightConfig(granularity=[PerTensor(), PerRow()], act_mapping_type=mapping)
    elif scale is not None:
        if abs(float(scale) / DYNAMIC_CLIP - 1) > 1e-6:
            found = f"this one is {float(scale):.4f}"
            raise AccuQuantError(f"{layer.name}: torchao's dynamic scale has no clip ratio, {found}")
        given = {"act_quant_kwargs": QuantizeTensorToInt8Kwargs(granularity=PerRow())}
        config = Int8DynamicActivationInt8WeightConfig()
    weight = Int8Tensor(
        layer.integer_weight().detach().contiguous(),
        layer.weight_scale.detach(),
        [1, layer.in_features],
        dtype,
        **given,
    )
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return linear, config


def torchao_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The modules whose weights are `Int8Tensor`."""
    if not torchao_installed():
        return {}
    from torchao.quantization import Int8Tensor

    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and isinstance(m.weight, Int8Tensor)}


def stored_tensors(module: nn.Module) -> list[Tensor]:
    """What the file holds of a module: an `Int8Tensor` taken apart."""
    found: list[Tensor] = []
    for parameter in module.parameters():
        names = [*getattr(parameter, "tensor_data_names", []), *getattr(parameter, "optional_tensor_data_names", [])]
        parts = [getattr(parameter, name) for name in names] or [parameter]
        found += [part for part in parts if part is not None]
    return found
