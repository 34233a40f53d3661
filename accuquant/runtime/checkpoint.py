"""Saving and loading: how a quantized denoiser becomes safetensors that diffusers' own `from_pretrained` understands.

config.json carries `quantization_config`: the method's name, the file version, the timestep groups' edges and the spec
of every quantized module. Importing accuquant adds our config and quantizer to diffusers' two tables; there is no other
way in. On loading, each named module is replaced by an empty `QuantizedLayer` whose tensors the file must fill exactly.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from safetensors import safe_open
from torch import Tensor, nn

from accuquant.errors import CacheError, CheckpointError
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.hooks import FITTED, attach_cache
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.clock import StepClock
from accuquant.runtime.layer import GRID, QuantizedLayer, quantized_layers
from accuquant.runtime.spec import Conv, LayerSpec, keep_float32, share_grids

FORMAT_VERSION = 1


class Method(StrEnum):
    """diffusers reads ``.value`` of the method, so it has to be an Enum member."""

    ACCUQUANT = "accuquant"


class AccuQuantConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json.

    Args:
        layers: module name -> fields of `LayerSpec`.
        timestep_edges: descending timestep values between groups of activation scales.
        cache: of the feature cache that loading puts on the model, its `CachePlan` and what was `Fitted` to it; None
            loads it without.
        version: of the file format.

    Raises:
        CheckpointError: the version is newer than this package, or a field of a layer is unknown.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        timestep_edges: list[float] | None = None,
        cache: dict[str, Any] | None = None,
        version: int = FORMAT_VERSION,
        quant_method: str = Method.ACCUQUANT.value,
        **unknown: Any,
    ) -> None:
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"this checkpoint has format version {version}; this accuquant reads version {FORMAT_VERSION}. "
                "Install the accuquant that wrote it, or export the model again"
            )
        if unknown:
            raise CheckpointError(f"quantization_config has unknown keys: {', '.join(sorted(unknown))}")
        if layers is None or timestep_edges is None:
            raise CheckpointError("quantization_config needs layers and timestep_edges")
        self.quant_method = Method.ACCUQUANT
        self.version = version
        self.timestep_edges = timestep_edges
        self.layers = layers
        try:
            self.cache = None if cache is None else CachePlan.from_dict(cache)
            with torch.device("meta"):
                self.fitted = Fitted.from_dict(cache or {})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"quantization_config.cache: {error}") from error
        self.specs()

    def specs(self) -> dict[str, LayerSpec]:
        try:
            return {name: LayerSpec(**fields) for name, fields in self.layers.items()}
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"quantization_config.layers: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method.value,
            "version": self.version,
            "timestep_edges": self.timestep_edges,
            "layers": self.layers,
        } | ({} if self.cache is None else {"cache": self.cache.to_dict() | self.fitted.to_dict(self.cache)})

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class AccuQuantQuantizer(DiffusersQuantizer):
    """Replaces modules by empty quantized layers before the weights are read, and starts the clock after."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config: AccuQuantConfig = self.quantization_config
        clock = StepClock(list(config.timestep_edges))
        modules = dict(model.named_modules())
        for name, spec in config.specs().items():
            module = modules.get(name)
            if not isinstance(module, nn.Linear | nn.Conv2d):
                found = "nothing" if module is None else type(module).__name__
                raise CheckpointError(f"quantization_config names {name}, where {type(model).__name__} has {found}")
            weight = module.weight.flatten(1)
            with torch.device("meta"):
                layer = QuantizedLayer(
                    spec, weight.shape[1], weight.shape[0], Conv.of(module, name), clock, name, module.bias is not None
                )
            model.set_submodule(name, layer)
        self.clock = clock
        if config.cache is not None and config.cache.uses_fitted:
            with torch.device("meta"):  # one of the model's own
                setattr(model, FITTED, Fitted.from_dict(config.fitted.to_dict(config.cache)))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name, layer in quantized_layers(model).items():
            key = f"{name}.weight"
            if layer.repacks and key in self.files:
                # read by a mapping of its own, which goes afterwards: pages that diffusers has mapped stay in memory
                with safe_open(self.files[key], framework="pt") as file:
                    layer.weight = nn.Parameter(file.get_tensor(key), requires_grad=False)
            layer.prepare()
        share_grids(quantized_layers(model).values(), *GRID)
        self.clock.attach(model)
        keep_float32(model, [*self.quantization_config.layers, FITTED])
        if self.quantization_config.cache is not None:
            try:
                attach_cache(model, self.quantization_config.cache)
            except CacheError as error:
                raise CheckpointError(f"quantization_config.cache: {error}") from error

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self.files: dict[str, str] = {}  # what they hold; for shards, loaded_keys is what their index says
        for path in checkpoint_files:
            with safe_open(path, framework="pt") as file:
                self.files.update(dict.fromkeys(file.keys(), path))
        return sorted(self.files)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """diffusers would load a missing tensor as zeros and only warn."""
        if missing_keys:
            shown = ", ".join(sorted(missing_keys)[:5]) + (" ..." if len(missing_keys) > 5 else "")
            raise CheckpointError(f"{len(missing_keys)} tensors are missing from the checkpoint: {shown}")
        extra = sorted(set(self.files) - set(model.state_dict()))
        if extra:
            raise CheckpointError(f"the checkpoint holds tensors its config does not promise: {', '.join(extra[:5])}")
        return missing_keys

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        owner = param_name.rpartition(".")[0]
        return owner.partition(".")[0] == FITTED or isinstance(model.get_submodule(owner), QuantizedLayer)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str | int,
        state_dict: dict[str, Tensor],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the file's types: diffusers casts scales in ``param_value`` to the load dtype, ``state_dict`` not."""
        name, _, leaf = param_name.rpartition(".")
        layer, value = model.get_submodule(name), state_dict[param_name]
        promised = getattr(layer, leaf).dtype
        if value.dtype != promised:
            raise CheckpointError(f"{param_name} is {value.dtype}, its config promises {promised}")
        setattr(layer, leaf, nn.Parameter(value.to(target_device), requires_grad=False))

    def check_quantized_param_shape(self, param_name: str, expected: Tensor, found: Tensor) -> bool:
        if expected.shape != found.shape:
            raise CheckpointError(
                f"{param_name} has shape {tuple(found.shape)}, its config promises {tuple(expected.shape)}"
            )
        return True

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Make diffusers know ``quant_method: accuquant``."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.ACCUQUANT.value] = AccuQuantConfig
    auto.AUTO_QUANTIZER_MAPPING[Method.ACCUQUANT.value] = AccuQuantQuantizer
