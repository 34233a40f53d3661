"""Which modules read a concatenation of channels, found in a call: after a U-Net's skip connections, in fused blocks.

A concatenation is followed through what treats each channel by itself: norms, activation functions, dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from accuquant.runtime.observe import Call, observed
from accuquant.runtime.spec import Conv
from accuquant.runtime.split import channels_read

CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
CHANNELWISE = (F.group_norm, F.layer_norm, F.rms_norm, F.silu, F.gelu, F.relu, F.leaky_relu, F.dropout, F.elu, F.mish)
CHANNELWISE_METHODS = (Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.type, Tensor.contiguous)


class _Joined(TorchFunctionMode):
    """Remembers of each concatenation, and of what was made of it, along which dimension it is made of which sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in CONCATENATIONS:
            self._concatenated(made, *args, **(kwargs or {}))
        elif func in (*CHANNELWISE, *CHANNELWISE_METHODS) and args and isinstance(args[0], Tensor):
            known = self.parts.get(args[0])
            if known is not None and isinstance(made, Tensor) and made.shape == args[0].shape:
                self.parts[made] = known
        return made

    def _concatenated(self, made: Tensor, tensors: Any, dim: int = 0, **_: Any) -> None:
        dim = dim % made.dim()
        sizes = tuple(size for t in tensors if (size := t.shape[dim]) and t.dim() == made.dim())
        if len(sizes) > 1:
            self.parts[made] = dim, sizes

    def of(self, x: Tensor, module: nn.Linear | nn.Conv2d) -> tuple[int, ...] | None:
        """The sizes that the channels of a layer's input are made of; None if they are no concatenation."""
        dim, sizes = self.parts.get(x, (None, None))
        of_channels = x.dim() - (1 if isinstance(module, nn.Linear) else 3)
        return sizes if dim == of_channels and x.dim() > 2 else None  # one vector a sample: sine and cosine


def concatenated_inputs(network: nn.Module, run: Callable[[], object]) -> dict[str, tuple[int, ...]]:
    """Channels of each part of what a Linear or Conv2d reads, where at every call in ``run`` they are the same."""
    joined, found, others = _Joined(), dict[str, tuple[int, ...]](), set[str]()
    modules = dict(network.named_modules())

    def see(name: str, call: Call) -> None:
        module: Any = modules[name]
        sizes = joined.of(call.input, module)
        if sizes is None or sum(sizes) != channels_read(module) or found.setdefault(name, sizes) != sizes:
            others.add(name)

    layers = [n for n, m in modules.items() if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and Conv.holds(m))]
    with torch.no_grad(), observed(network, layers, see), joined:
        run()
    return {name: sizes for name, sizes in found.items() if name not in others}
