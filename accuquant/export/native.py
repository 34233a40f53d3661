"""A calibrated model turned into what `save_pretrained` writes and `runtime.checkpoint` loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from accuquant.calibration.layers import trainable_layers
from accuquant.runtime.attention import quantized_attention
from accuquant.runtime.cache.fitted import Fitted
from accuquant.runtime.cache.hooks import FITTED
from accuquant.runtime.cache.plan import CachePlan
from accuquant.runtime.checkpoint import AccuQuantConfig, AccuQuantQuantizer, Method
from accuquant.runtime.clock import StepClock
from accuquant.runtime.envelope import Calibrated
from accuquant.runtime.layer import prepare_layers, quantized_layers
from accuquant.runtime.split import split_layers


def harden_model(model: Any, clock: StepClock, calibrated_for: Sequence[Calibrated] = ()) -> None:
    """Turn trainable layers into exported ones in place; ``model.save_pretrained`` then writes them packed.

    Args:
        calibrated_for: what is stored of the settings; calls of the loaded model outside of them are warned of.
    """
    for name, layer in trainable_layers(model).items():
        model.set_submodule(name, layer.harden())
    prepare_layers(model)
    specs, coordinate = {n: q.spec.to_dict() for n, q in quantized_layers(model).items()}, clock.coordinate
    split = {name: list(layer.sizes) for name, layer in split_layers(model).items()}
    attention = {name: asdict(products.spec) for name, products in quantized_attention(model).items()}
    settings = [asdict(one) for one in calibrated_for]
    config = AccuQuantConfig(specs, clock.edges, coordinate.argument, coordinate.falls, split, attention, settings)
    model.hf_quantizer = AccuQuantQuantizer(config)
    model.is_quantized = True
    model.quantization_method = Method.ACCUQUANT
    model.register_to_config(quantization_config=config)


def store_cache(model: Any, plan: CachePlan, fitted: Fitted) -> None:
    """Have a hardened model's config.json name this cache, so that loading puts it on; and save what was fitted."""
    if plan.uses_fitted:
        setattr(model, FITTED, fitted)
    config: AccuQuantConfig = model.hf_quantizer.quantization_config
    config.cache, config.fitted = plan, fitted
    model.register_to_config(quantization_config=config)
