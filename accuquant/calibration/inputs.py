"""The inputs of attention's two products while they are calibrated: what `TrainableLayer` is for layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accuquant.core.numerics import fake_quantize, lsq_gradient_scale, scale_gradient, search_scale
from accuquant.runtime.attention import AttentionProducts, AttentionSpec, InputSpec, QuantizedInput, quantize_attention
from accuquant.runtime.clock import StepClock


class LearnedScales:
    """Learns static scales of its input: ``log_activation_scale``, (timestep groups,), beside fixed zero points."""

    spec: Any
    clock: StepClock
    log_activation_scale: nn.Parameter
    activation_zero_point: Tensor

    def statically(self, x: Tensor) -> Tensor:
        """Fake-quantized by the scale of the current group."""
        qtype, group = self.spec.activation_type, self.clock.group
        log_scale = scale_gradient(self.log_activation_scale, lsq_gradient_scale(x.numel(), qtype))[group]
        return fake_quantize(x, log_scale.exp(), self.activation_zero_point[group], qtype)

    @torch.no_grad()
    def set_activation_scale(self, samples: list[Tensor], search: bool) -> None:
        """Static scales from observed values, one 1-d tensor per timestep group."""
        for group, values in enumerate(samples):
            symmetric = self.spec.activation_symmetric
            scale, zero = search_scale(values.view(1, -1), self.spec.activation_type, symmetric, search)
            self.log_activation_scale[group] = scale[0, 0].log()
            self.activation_zero_point[group] = zero[0, 0]

    def activation_step_unit(self) -> float:
        """How far the logarithm of a scale moves when the end of its range moves by one step."""
        qtype = self.spec.activation_type
        return float(qtype.step / qtype.qmax)


class TrainableInput(nn.Module, LearnedScales):
    """Fake-quantized, with learnable scales.

    ``observer``, when set, receives each call's values. What it shares with `TrainableLayer` serves the same loops; it
    has no weights.
    """

    out_features = 0  # of its own it multiplies nothing
    rounding_logits = None

    def __init__(self, spec: InputSpec, clock: StepClock) -> None:
        super().__init__()
        self.spec, self.clock = spec, clock
        self.log_activation_scale = nn.Parameter(torch.zeros(clock.num_groups))
        self.register_buffer("activation_zero_point", torch.zeros(clock.num_groups))
        self.observer: Any = None
        self.quantized = True

    def learnable(self, kind: str) -> nn.Parameter | None:
        return self.log_activation_scale if kind == "activation_scale" else None

    def step_unit(self, kind: str) -> float:
        return self.activation_step_unit()

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer(self, x)
        return self.statically(x) if self.quantized else x

    @torch.no_grad()
    def harden(self) -> QuantizedInput:
        """The exported form: scales out of their logarithms."""
        made = QuantizedInput(self.spec, self.clock).to(self.log_activation_scale.device)
        made.activation_scale.copy_(self.log_activation_scale.exp())
        made.activation_zero_point.copy_(self.activation_zero_point.to(torch.int8))
        return made


def train_attention(model: nn.Module, specs: dict[str, AttentionSpec], clock: StepClock) -> None:
    """Have the named modules attend with trainable inputs, in place."""
    for name, spec in specs.items():
        module = model.get_submodule(name)
        products = AttentionProducts(spec, lambda own: TrainableInput(own, clock))
        quantize_attention(module, products.to(next(module.parameters()).device))
