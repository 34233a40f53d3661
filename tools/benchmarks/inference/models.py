"""What run.py runs: denoisers, their inputs, which modules become int8, a trajectory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, FluxTransformer2DModel
from torch import Tensor, nn

from accuquant.calibration.plan import plan_modules
from accuquant.pipeline.loading import resolve
from accuquant.recipe import Rule
from accuquant.recipe.file import load_recipe
from accuquant.runtime.spec import LayerSpec

BUNDLED, DIT_XL, FLUX = "bundled", "dit-xl", "flux"
MODELS = (BUNDLED, DIT_XL, FLUX)
RECIPES = {BUNDLED: "dit_w8a8", DIT_XL: "dit_xl_256_w8a8"}
FLUX_INT8 = (
    r"(single_)?transformer_blocks\.\d+\.(attn\..*|ff(_context)?\..*|proj_mlp|proj_out)"  # modulations stay float
)
FLUX_TOKENS, FLUX_TEXT_TOKENS = 4096, 512  # 1024 x 1024 pixels
GUIDANCE = 1.5
TIMESTEP = 500  # of the step that is timed
NULL_CLASS = 1000


@dataclass(frozen=True)
class Subject:
    """One model of the benchmark.

    Args:
        layers: of a random model, where it shall be smaller than the real one.
        float_modulation: leave adaLN float, where the recipe has int8 weights; as other packages have it here.
    """

    name: str
    layers: int | None = None
    float_modulation: bool = False

    @property
    def samples(self) -> int:
        """A DiT runs twice as many rows: with guidance."""
        return 8 if self.name == BUNDLED else 1

    @property
    def kind(self) -> Any:
        return FluxTransformer2DModel if self.name == FLUX else DiTTransformer2DModel

    @property
    def sampled(self) -> bool:
        """Whether trajectories are measured."""
        return self.name != FLUX

    def build(self) -> Any:
        """In float32."""
        if self.name == BUNDLED:
            return DiTTransformer2DModel.from_pretrained(Path(resolve("bundled:digits-dit")) / "transformer").eval()
        torch.manual_seed(0)
        model = _dit_xl(self.layers or 28) if self.name == DIT_XL else _flux(self.layers or 2)
        for parameter in model.parameters():
            if parameter.dim() == 2:  # keeps the size of what it multiplies, and no gate is zero: every module matters
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        return model.eval()

    def specs(self, model: nn.Module, static: bool) -> dict[str, LayerSpec]:
        """As the recipe says; with ``static`` or dynamic activation scales."""
        rules: tuple[Rule, ...] = (Rule(modules=FLUX_INT8, weight="int8", activation="int8"),)
        if self.name in RECIPES:
            rules = load_recipe(RECIPES[self.name]).quantization.rules
        specs = {p.name: p.spec for p in plan_modules(model, rules) if p.spec is not None}
        if self.float_modulation:
            specs = {name: spec for name, spec in specs.items() if spec.activation != "float"}
        if static:
            return specs
        dynamic = dict(activation_scale="dynamic", activation_symmetric=True)
        return {n: s if s.activation == "float" else replace(s, **dynamic) for n, s in specs.items()}  # type: ignore[arg-type]

    def integer_modules(self, model: nn.Module) -> list[str]:
        """Those with int8 weights and activations: what other packages quantize too."""
        return [name for name, spec in self.specs(model, static=True).items() if spec.activation != "float"]

    def noise(self, model: Any) -> Tensor:
        size, generator = model.config.sample_size, torch.Generator().manual_seed(0)
        return torch.randn(self.samples, model.config.in_channels, size, size, generator=generator)

    def step(self, model: Any, device: torch.device, dtype: torch.dtype) -> Callable[[Any], Tensor]:
        """One denoiser step as a function of the module to call, always on the same input."""
        if self.name == FLUX:
            return _flux_step(model, device, dtype)
        noise = self.noise(model).to(device, dtype)
        rows, time = torch.cat([noise, noise]), torch.tensor(TIMESTEP, device=device)

        def call(module: Any) -> Tensor:
            return self.predict(module, rows, time)

        return call

    def predict(self, module: Any, rows: Tensor, time: Tensor) -> Tensor:
        """Of a DiT; the second half of the rows is without class."""
        labels = torch.arange(len(rows), device=rows.device) % 10
        labels[len(rows) // 2 :] = NULL_CLASS
        prediction: Tensor = module(rows, timestep=time.expand(len(rows)), class_labels=labels).sample
        return prediction

    @torch.no_grad()
    def trajectory(
        self, module: Any, model: Any, steps: int, device: torch.device, dtype: torch.dtype, advance: Any = None
    ) -> Tensor:
        """Final latents of DDIM; ``model`` is what ``module`` runs, perhaps compiled."""
        scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
        if self.name == BUNDLED:
            scheduler = DDIMScheduler.from_pretrained(resolve("bundled:digits-dit"), subfolder="scheduler")
        scheduler.set_timesteps(steps)
        x = self.noise(model).to(device)
        for time in scheduler.timesteps:
            rows = torch.cat([x, x]).to(dtype)
            predicted = self.predict(module, rows, time.to(device))[:, : x.shape[1]].float()  # without the variance
            conditional, unconditional = predicted.chunk(2)
            guided = unconditional + GUIDANCE * (conditional - unconditional)
            x = scheduler.step(guided, time, x).prev_sample
            if advance is not None:
                advance()
        return x


def _dit_xl(layers: int) -> Any:
    """DiT-XL/2 at 256 pixels, with learned variance."""
    return DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
    )


def _flux(layers: int) -> Any:
    """A few of FLUX.1's blocks, twice as many single ones as double ones."""
    return FluxTransformer2DModel(num_layers=layers, num_single_layers=2 * layers, guidance_embeds=False)


def _flux_step(model: Any, device: torch.device, dtype: torch.dtype) -> Callable[[Any], Tensor]:
    config, generator = model.config, torch.Generator().manual_seed(0)
    side = int(FLUX_TOKENS**0.5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    arguments = {
        "hidden_states": random(1, FLUX_TOKENS, config.in_channels),
        "encoder_hidden_states": random(1, FLUX_TEXT_TOKENS, config.joint_attention_dim),
        "pooled_projections": random(1, config.pooled_projection_dim),
        "timestep": torch.full((1,), TIMESTEP / 1000, device=device, dtype=dtype),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(side * 1.0), torch.arange(side * 1.0)).to(device),
        "txt_ids": torch.zeros(FLUX_TEXT_TOKENS, 3, device=device),
    }

    def call(module: Any) -> Tensor:
        prediction: Tensor = module(**arguments).sample
        return prediction

    return call
