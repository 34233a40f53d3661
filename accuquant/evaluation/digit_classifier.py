"""A small digit classifier whose features serve as an offline Frechet metric for the bundled digit model."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from accuquant.errors import CheckpointError

IMAGE_SHAPE = (1, 32, 32)
NUM_FEATURES = 64
WEIGHTS_NAME = "classifier.safetensors"


def _block(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    # GroupNorm, not BatchNorm: the answer for one image must not depend on running statistics or on its batch.
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1),
        nn.GroupNorm(8, channels_out),
        nn.SiLU(),
    )


class DigitClassifier(nn.Module):
    """Convolutional classifier of single-channel 32x32 images of handwritten digits (about 71k parameters).

    Images are float tensors of shape (B, 1, 32, 32) in [-1, 1], where -1 is the empty background.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _block(1, 16, 1),
            _block(16, 32, 2),
            _block(32, 32, 1),
            _block(32, 64, 2),
            _block(64, 64, 2),
        )
        self.head = nn.Linear(NUM_FEATURES, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Mean activations of the last convolution, shape (B, 64), unitless.

        Raises:
            ValueError: if `images` is not of shape (B, 1, 32, 32).
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != IMAGE_SHAPE:
            raise ValueError(f"expected images of shape (B, 1, 32, 32), got {tuple(images.shape)}")
        features: torch.Tensor = self.body(images).mean(dim=(2, 3))
        return features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits, shape (B, 10), for images of shape (B, 1, 32, 32) in [-1, 1].

        Raises:
            ValueError: if `images` is not of shape (B, 1, 32, 32).
        """
        logits: torch.Tensor = self.head(self.features(images))
        return logits

    @classmethod
    def from_folder(cls, path: str | Path) -> "DigitClassifier":
        """Loads `classifier.safetensors` from the folder `path`, on the CPU, in float32 and eval mode.

        Raises:
            FileNotFoundError: if the folder holds no `classifier.safetensors`.
            CheckpointError: if the file's tensors are not exactly those of this network.
        """
        file = Path(path) / WEIGHTS_NAME
        if not file.is_file():
            raise FileNotFoundError(f"no digit classifier at {file}")
        model = cls()
        try:
            model.load_state_dict(load_file(file), strict=True)
        except RuntimeError as error:
            raise CheckpointError(f"{file} does not hold a DigitClassifier: {error}") from error
        return model.eval()
