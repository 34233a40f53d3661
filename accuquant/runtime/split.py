"""A layer whose input is a concatenation, as a layer for each part: each then has scales of its own.

What a U-Net's skip connection brings and what comes from the layer below differ in range by far; one activation scale
for both loses the smaller (Q-Diffusion, Li et al. 2023, arXiv 2302.04304, section 4.2). The product of the whole is the
sum of the parts' products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class SplitLayer(nn.Module):
    """The sum of layers that each read some of the input's channels; the first of them has the bias.

    The parts are its submodules ``0``, ``1``, ...

    Args:
        module: whose weights are taken apart; it is left as it is.
        sizes: channels of each part, as many as the module reads in all.
    """

    def __init__(self, module: nn.Linear | nn.Conv2d, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.in_features, self.out_features = sum(sizes), len(module.weight)
        self.dim = -1 if isinstance(module, nn.Linear) else -3
        for k, weight in enumerate(module.weight.detach().split(self.sizes, 1)):
            self.add_module(str(k), _part(module, weight, module.bias if k == 0 else None))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.sizes, self.dim)
        products: list[Tensor] = [layer(part) for layer, part in zip(self.children(), parts, strict=True)]
        total = products[0]
        for product in products[1:]:
            total = total + product
        return total


def _part(module: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Module:
    with torch.device("meta"):
        if isinstance(module, nn.Linear):
            part: nn.Linear | nn.Conv2d = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        else:
            how = (module.kernel_size, module.stride, module.padding, module.dilation)
            part = nn.Conv2d(weight.shape[1], weight.shape[0], *how, bias=bias is not None)  # type: ignore[arg-type]
    part.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        part.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return part.train(module.training)


def channels_read(module: nn.Linear | nn.Conv2d) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def split_layers(model: nn.Module) -> dict[str, SplitLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SplitLayer)}


def split_modules(model: nn.Module, sizes: Mapping[str, Sequence[int]]) -> None:
    """Take the named Linear and Conv2d modules apart, in place."""
    for name, channels in sizes.items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear | nn.Conv2d)
        model.set_submodule(name, SplitLayer(module, channels))
