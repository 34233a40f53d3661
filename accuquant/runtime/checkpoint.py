"""Saving and loading: how a quantized denoiser becomes safetensors that diffusers' own `from_pretrained` understands.

config.json carries `quantization_config`: the method's name, the file version, the timestep groups' edges and the spec
of every quantized module. Importing accuquant adds our config and quantizer to diffusers' two tables; there is no other
way in. On loading, each named module is replaced by an empty `QuantizedLayer` whose tensors the file must fill exactly.
"""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from accuquant.core.coordinate import Coordinate
from accuquant.errors import AccuQuantError, CacheError, CheckpointError, nearest
from accuquant.runtime.attention import PRODUCTS, AttentionProducts, QuantizedInput, quantize_attention
from accuquant.runtime.cache.attach import attach_cache
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.hooks import FITTED
from accuquant.runtime.checks import (
    FORMAT_VERSION,
    Files,
    check_fits,
    check_plain,
    check_tensors,
    checked_attention,
    checked_cache,
    checked_coordinate,
    checked_edges,
    checked_layers,
    checked_settings,
    checked_split,
    refuse,
    shown,
)
from accuquant.runtime.clock import StepClock
from accuquant.runtime.envelope import watch
from accuquant.runtime.layer import GRID, QuantizedLayer, quantized_layers
from accuquant.runtime.spec import Conv, LayerSpec, keep_float32, share_grids
from accuquant.runtime.split import channels_read, split_modules

KEYS = (
    *("quant_method", "version", "timestep_edges", "timestep_argument", "timestep_falls"),
    *("split", "attention", "calibrated_for", "layers", "cache"),
)


class Method(StrEnum):
    """diffusers reads ``.value`` of the method, so it has to be an Enum member."""

    ACCUQUANT = "accuquant"


class AccuQuantConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json.

    Args:
        layers: module name -> fields of `LayerSpec`.
        timestep_edges: descending noise levels between groups of activation scales.
        timestep_argument: of the denoiser, says the level; timestep_falls: whether it falls from step to step, as a
            timestep does; one that rises is negated.
        split: name of each module that is taken apart -> channels of its parts, see `SplitLayer`; they are among the
            layers by their own names.
        attention: name of each module that attends with quantized products -> fields of `AttentionSpec`.
        calibrated_for: fields of `Calibrated` for each setting; calls outside are warned of.
        cache: of the feature cache that loading puts on the model, its `CachePlan` and what was `Fitted` to it; None
            loads it without.
        version: of the file format.

    Raises:
        CheckpointError: the version is not this package's, or a key is missing, unknown, or holds what cannot be.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        timestep_edges: list[float] | None = None,
        timestep_argument: str = "timestep",
        timestep_falls: bool = True,
        split: dict[str, list[int]] | None = None,
        attention: dict[str, dict[str, str]] | None = None,
        calibrated_for: list[dict[str, Any]] | None = None,
        cache: dict[str, Any] | None = None,
        version: int = FORMAT_VERSION,
        quant_method: str = Method.ACCUQUANT.value,
        **unknown: Any,
    ) -> None:
        if type(version) is not int or version != FORMAT_VERSION:
            found = shown(version).strip("'")
            raise CheckpointError(
                f"config.json: quantization_config.version: this checkpoint has format version {found}; this accuquant "
                f"reads version {FORMAT_VERSION}. Install the accuquant that wrote it, or export the model again"
            )
        if unknown:
            words = ", ".join(f"{key}{nearest(key, KEYS)}" for key in sorted(unknown))
            raise CheckpointError(f"config.json: quantization_config has unknown keys: {words}")
        if layers is None or timestep_edges is None:
            missing = "layers" if layers is None else "timestep_edges"
            raise CheckpointError(f"config.json: quantization_config.{missing} is missing")
        check_plain(layers, "quantization_config.layers", 1)
        self.quant_method = Method.ACCUQUANT
        self.version = version
        self.timestep_edges = checked_edges(timestep_edges)
        self.coordinate = checked_coordinate(timestep_argument, timestep_falls)
        self._specs = checked_layers(layers)
        self.layers, self.split = layers, checked_split(split, layers)
        self.attention = checked_attention(attention)
        self.calibrated_for = checked_settings(calibrated_for)
        self.cache, self.fitted = checked_cache(cache)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers calls it; a key of the file that is named like an argument of Python is unknown too."""
        if "self" in config_dict:
            raise CheckpointError("config.json: quantization_config has unknown keys: self")
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def specs(self) -> dict[str, LayerSpec]:
        return self._specs

    def to_dict(self) -> dict[str, Any]:
        stored: dict[str, Any] = {"quant_method": self.quant_method.value, "version": self.version}
        stored["timestep_edges"] = self.timestep_edges
        if self.coordinate != Coordinate():  # of most models
            stored["timestep_argument"], stored["timestep_falls"] = self.coordinate.argument, self.coordinate.falls
        if self.split:
            stored["split"] = self.split
        if self.attention:
            stored["attention"] = {name: asdict(spec) for name, spec in self.attention.items()}
        if self.calibrated_for:
            stored["calibrated_for"] = [asdict(one) | {"size": list(one.size)} for one in self.calibrated_for]
        stored["layers"] = self.layers
        if self.cache is not None:
            stored["cache"] = self.cache.to_dict() | self.fitted.to_dict(self.cache)
        return stored

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class AccuQuantQuantizer(DiffusersQuantizer):
    """Replaces modules by empty quantized layers before the weights are read, and starts the clock after."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config: AccuQuantConfig = self.quantization_config
        clock = StepClock(list(config.timestep_edges), config.coordinate)
        self._split(model, config.split)
        modules = dict(model.named_modules())
        for name, spec in config.specs().items():
            module = modules.get(name)
            if not isinstance(module, nn.Linear | nn.Conv2d):
                found = "nothing" if module is None else type(module).__name__
                where = f"where {type(model).__name__} has {found}"
                raise CheckpointError(f"config.json: quantization_config.layers names {name}, {where}")
            rows, columns = module.weight.flatten(1).shape
            try:
                with torch.device("meta"):
                    bias = module.bias is not None
                    layer = QuantizedLayer(spec, columns, rows, Conv.of(module, name), clock, name, bias)
            except AccuQuantError as error:
                raise CheckpointError(f"config.json: quantization_config.layers.{name}.{error}") from error
            model.set_submodule(name, layer)
        for name, attention in config.attention.items():
            if (attends := modules.get(name)) is None or next(attends.children(), None) is None:
                found = "nothing" if attends is None else type(attends).__name__
                raise refuse(f"quantization_config.attention.{name}", f"is no module that attends (found {found})")
            with torch.device("meta"):
                quantize_attention(attends, AttentionProducts(attention, lambda own: QuantizedInput(own, clock)))
        self.clock = clock
        if config.cache is not None and config.cache.uses_fitted:
            with torch.device("meta"):  # one of the model's own
                setattr(model, FITTED, Fitted.from_dict(config.fitted.to_dict(config.cache)))

    def _split(self, model: nn.Module, split: dict[str, list[int]]) -> None:
        """Take modules apart, as they were when they were calibrated."""
        modules = dict(model.named_modules())
        for name, sizes in split.items():
            module, key = modules.get(name), f"quantization_config.split.{name}"
            if not isinstance(module, nn.Linear | nn.Conv2d):
                found = "nothing" if module is None else type(module).__name__
                raise refuse(key, f"is no module of {type(model).__name__} that can be split (found {found})")
            if sum(sizes) != (channels := channels_read(module)):
                raise refuse(key, f"must be parts of its {channels} channels (found {shown(sizes)} with {sum(sizes)})")
            with torch.device("meta"):
                split_modules(model, {name: sizes})

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name, layer in quantized_layers(model).items():
            key = f"{name}.weight"
            if layer.repacks and key in self.files.path:
                layer.weight = nn.Parameter(self.files.tensor(key), requires_grad=False)
            layer.prepare()
        share_grids(quantized_layers(model).values(), *GRID)
        try:
            self.clock.attach(model)
        except AccuQuantError as error:
            raise CheckpointError(f"config.json: quantization_config.timestep_argument: {error}") from error
        if self.quantization_config.calibrated_for:
            watch(model, self.quantization_config.calibrated_for)
        products = [f"{name}.{PRODUCTS}" for name in self.quantization_config.attention]
        keep_float32(model, [*self.quantization_config.layers, *products, FITTED])
        if self.quantization_config.cache is not None:
            try:
                controller = attach_cache(model, self.quantization_config.cache, measures=True)
            except CacheError as error:
                raise CheckpointError(f"config.json: quantization_config.cache: {error}") from error
            check_fits(self.quantization_config.cache, self.quantization_config.fitted, controller.modules)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self.files = Files(checkpoint_files)  # what they hold; for shards, loaded_keys is what their index says
        return sorted(self.files.path)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """diffusers would load a missing tensor as zeros and only warn. What is there is checked here, once."""
        if missing_keys:
            names = ", ".join(sorted(missing_keys)[:5]) + (" ..." if len(missing_keys) > 5 else "")
            count = len(missing_keys)
            raise CheckpointError(f"{self.files.where}: {count} tensors are missing from the checkpoint: {names}")
        extra = sorted(set(self.files.path) - set(model.state_dict()))
        if extra:
            where = self.files.path[extra[0]]
            raise CheckpointError(
                f"{where}: the checkpoint holds tensors its config does not promise: {', '.join(extra[:5])}"
            )
        check_tensors(model, self.files, FITTED)
        return missing_keys

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        owner = param_name.rpartition(".")[0]
        return owner.partition(".")[0] == FITTED or isinstance(
            model.get_submodule(owner), QuantizedLayer | QuantizedInput
        )

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
        setattr(layer, leaf, nn.Parameter(value.to(target_device), requires_grad=False))

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
