"""What a metric is: a function of both sides, and how its figure is called, written and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from accuquant.evaluation.digit_classifier import DigitClassifier

Value = float | dict[str, float]
Unit = Literal["", "dB", "fraction"]


@dataclass(frozen=True)
class Sides:
    """What is compared, sample by sample on the same noise: (B, C, H, W) twice, final latents or images in [0, 1].

    Args:
        inputs: what each sample was asked for, a class or a prompt.
        classifier: the judge of the images, where the model has one.
    """

    quantized: Tensor
    full: Tensor
    inputs: list[Any] = field(default_factory=list)
    classifier: DigitClassifier | None = None


@dataclass(frozen=True)
class Metric:
    """One figure, or a few that belong together.

    Args:
        name: key in metrics.json.
        title: in report and card.
        of: what its sides are.
        measure: its function: a number, or several by name; None where it does not apply.
        unit: of the number; a fraction is shown in per cent.
        higher_is_better: whether more of it is nearer to full precision.
        text: a sentence for the report, by default which way is better; ``{name}`` stands for one of several numbers.
        main: which of several numbers is the figure.
        label: in the card, if not the title.
        figure: in the card, a format of ``{value}`` or of several numbers by name.
    """

    name: str
    title: str
    of: Literal["latents", "images"]
    measure: Callable[[Sides], Value | None]
    unit: Unit
    higher_is_better: bool
    text: str = ""
    main: str = "value"
    label: str = ""
    figure: str = ""

    def numbers(self, value: Value) -> dict[str, float]:
        """All of them by name; of a single one the name is ``value``."""
        return value if isinstance(value, dict) else {"value": value}

    @property
    def sentence(self) -> str:
        return self.text or f"{'Higher' if self.higher_is_better else 'Lower'} is nearer to full precision."

    def row(self, value: Value) -> tuple[str, str]:
        """Of the model card and the terminal."""
        usual = {"": ".4f}", "dB": ".2f} dB", "fraction": ".4f}"}[self.unit]
        return self.label or self.title, (self.figure or f"{{{self.main}:{usual}").format(**self.numbers(value))
