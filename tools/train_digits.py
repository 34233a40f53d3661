"""Trains the small digit model that accuquant carries, from nothing, and writes it as a diffusers DiTPipeline folder.

A quantizer must be tried on a real latent diffusion transformer, yet the tests have neither a network nor a GPU. So
this trains one of the same make as DiT-XL/2 (KL autoencoder, adaLN-zero transformer, 1000 linear betas, DDIM) but
small, on the 1797 handwriting scans shipped with scikit-learn, and a classifier to judge what it generates.

    python -m tools.train_digits                    # train (or go on where it stopped), evaluate, write --out
    python -m tools.train_digits --evaluate-only    # judge the folder already in --out
    python -m tools.train_digits --init-from FOLDER --steps-vae 0 --steps-classifier 0   # train a folder's DiT further
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from accuquant.evaluation.digit_classifier import WEIGHTS_NAME, DigitClassifier
from tools.training import Facts, LossFn, Net, Run, Stage, cosine, parse_options, train_stage

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SPLIT_SEED, HELD_OUT = 0, 0.2  # fixed: the held-out images stay held out whatever --seed is
NULL_CLASS, LABEL_DROP = 1000, 0.1  # DiTPipeline hard-codes the null class
ATTENTION = SDPBackend.FLASH_ATTENTION if CUDA else SDPBackend.MATH  # its fused backward is slow on a CPU
KL_WEIGHT, EMA_DECAY = 1e-5, 0.9995
GUIDANCE, DDIM_STEPS, MAX_BYTES = 1.5, 50, 16_000_000
GOALS = {"classifier_held_out_accuracy": 0.97, "generated_agreement": 0.95}


@dataclass
class Options:
    """The command line: each field is the option of its name."""

    out: Path = Path("accuquant/bundled/digits-dit")  # the folder to write
    work: Path = Path("build/train_digits")  # checkpoints, to resume from
    init_from: Path | None = None  # an earlier folder whose networks to train further; no initialisation then
    steps_vae: int = 6000
    steps_classifier: int = 3000
    steps_dit: int = 40000
    lr_dit: float = 1e-3  # at its peak
    batch: int = 256 if CUDA else 64
    bank: int = 64  # augmentations kept of each training image
    num_eval: int = 500  # images generated for the evaluation
    save_every: float = 30.0  # seconds between checkpoints
    seed: int = 0
    evaluate_only: bool = False


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images, train labels, held-out images, held-out labels; images (N, 1, 32, 32) in [-1, 1]."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=32, mode="bicubic", align_corners=False).clamp(0, 1) * 2 - 1
    images, labels, order = images.to(DEVICE), torch.tensor(digits.target, device=DEVICE), list(range(len(images)))
    train, held = train_test_split(order, test_size=HELD_OUT, stratify=digits.target, random_state=SPLIT_SEED)
    return images[train], labels[train], images[held], labels[held]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random shift (2 px), rotation (8 degrees) and scale (5 %) of each image."""
    u = torch.rand(len(images), 4, generator=generator, device=images.device) * 2 - 1
    angle, scale, shift = u[:, 0] * math.radians(8), 1 + 0.05 * u[:, 1], u[:, 2:] * (2 * 2 / 32)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # +1: outside the image grid_sample reads 0, which must be the background, -1.
    return (F.grid_sample(images + 1, grid, mode="bicubic", align_corners=False) - 1).clamp(-1, 1)


@torch.no_grad()
def encode_bank(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sampled latents, not yet scaled, and the images decoded from them, both in float16 to save memory."""
    latents, decoded = [], []
    for batch in images.split(1024):
        latents.append(vae.encode(batch.float()).latent_dist.sample(generator))
        decoded.append(vae.decode(latents[-1]).sample.clamp(-1, 1).half())
    return torch.cat(latents).half(), torch.cat(decoded)


def make_vae(given: Path | None) -> AutoencoderKL:
    if given:
        return AutoencoderKL.from_pretrained(given, subfolder="vae")
    shape = dict(in_channels=1, out_channels=1, latent_channels=4, sample_size=32)
    levels = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    return AutoencoderKL(**shape, **levels, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)


def make_transformer(given: Path | None) -> DiTTransformer2DModel:
    if given:
        return DiTTransformer2DModel.from_pretrained(given, subfolder="transformer")
    # patch size, 1000 classes, adaLN-zero and the rest are diffusers' defaults, those of DiT-XL/2.
    shape = dict(num_attention_heads=4, attention_head_dim=32, num_layers=6)
    model = DiTTransformer2DModel(**shape, in_channels=4, out_channels=4, sample_size=16)
    # The DiT paper's initialisation, which diffusers leaves out: each block starts as the identity.
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm1.linear" in name or "proj_out" in name:
            nn.init.zeros_(parameter)
        elif "embedder" in name:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.xavier_uniform_(parameter.data.flatten(1))
    return model


def train_network(
    name: str, make: Callable[[], Net], loss_fn: LossFn[Net], steps: int, lr: float, recipe: str, options: Options
) -> tuple[Net, Facts]:
    """Trains a network or takes up its checkpoint; returns it with its averaged weights, and the figures."""
    run, recipe = Run(options.work, DEVICE, options.seed), f"{recipe} steps={steps}"
    stage = Stage(run, name, steps, lr, cosine(steps), recipe, ema_decay=EMA_DECAY, save_every=options.save_every)
    model, facts = train_stage(stage, make, loss_fn)
    facts.pop("curve")
    return model, facts


def train(options: Options) -> tuple[DiTPipeline, DigitClassifier, Facts]:
    """Trains the three networks; returns them with the facts for training.json."""
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    train_images, train_labels, held_images, held_labels = load_data()
    before: Facts = {}
    if given := options.init_from:
        before = {"trained_before": json.loads((given / "training.json").read_text())}

    # The bank of augmented images lives on the device, so that no step waits for data.
    generator = torch.Generator(DEVICE).manual_seed(options.seed + 1)
    images = torch.cat([augment(train_images, generator).half() for _ in range(options.bank)])
    labels = train_labels.repeat(options.bank)

    def draw(generator: torch.Generator) -> Tensor:
        return torch.randint(len(images), (options.batch,), generator=generator, device=DEVICE)

    # 1. The autoencoder: squared error and a light pull of the latents towards a unit Gaussian.
    def vae_loss(model: AutoencoderKL, generator: torch.Generator) -> Tensor:
        batch = images[draw(generator)].float()
        posterior = model.encode(batch).latent_dist
        decoded = model.decode(posterior.sample(generator)).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return F.mse_loss(decoded, batch).add(kl, alpha=KL_WEIGHT)

    recipe = f"batch={options.batch} bank={options.bank} vae={options.steps_vae}"
    recipe += f" from={given.resolve()}" if given else ""
    vae, vae_facts = train_network("vae", lambda: make_vae(given), vae_loss, options.steps_vae, 1e-3, recipe, options)
    latents, decoded = encode_bank(vae, images, generator)
    scaling_factor = 1 / latents.float().std().item()
    latents *= scaling_factor
    vae.register_to_config(scaling_factor=scaling_factor, _name_or_path="")

    # 2. The classifier: half of each batch went through the autoencoder, as every generated image does.
    def classifier_loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        index = draw(generator)
        through = torch.arange(options.batch, device=DEVICE) % 2 == 0
        batch = torch.where(through[:, None, None, None], decoded[index], images[index]).float()
        return F.cross_entropy(model(batch), labels[index], label_smoothing=0.05)

    make_classifier = (lambda: DigitClassifier.from_folder(given / "classifier")) if given else DigitClassifier
    classifier, classifier_facts = train_network(
        "classifier", make_classifier, classifier_loss, options.steps_classifier, 2e-3, recipe, options
    )

    # 3. The transformer: predicts the noise; a tenth of the samples lose their label, for guidance.
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False)

    def dit_loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        index = draw(generator)
        dropped = torch.rand(options.batch, generator=generator, device=DEVICE) < LABEL_DROP
        classes = torch.where(dropped, NULL_CLASS, labels[index])
        timestep = torch.randint(1000, (options.batch,), generator=generator, device=DEVICE)
        clean = latents[index].float()
        noise = torch.randn(clean.shape, generator=generator, device=DEVICE)
        noisy = scheduler.add_noise(clean, noise, timestep)
        with torch.autocast(DEVICE.type, torch.bfloat16), sdpa_kernel(ATTENTION):
            predicted = model(noisy, timestep=timestep, class_labels=classes, return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise)

    transformer, transformer_facts = train_network(
        "transformer", lambda: make_transformer(given), dit_loss, options.steps_dit, options.lr_dit, recipe, options
    )

    transformer.register_to_config(_name_or_path="")  # no folder of this machine
    id2label = {digit: str(digit) for digit in range(10)}
    pipe = DiTPipeline(transformer, vae, scheduler, id2label=id2label)
    pipe.register_to_config(id2label=id2label)  # or it would not reach model_index.json
    held_decoded = encode_bank(vae, held_images, generator)[1]
    facts: Facts = before | {
        "data": "scikit-learn load_digits, 8x8 scans upsampled (bicubic) to 32x32x1 in [-1, 1]",
        "split": f"by class, split seed {SPLIT_SEED}: {len(train_labels)} train, {len(held_labels)} held out",
        "augmentation": f"{options.bank} per training image: shift 2 px, rotation 8 degrees, scale 0.95-1.05",
        "seed": options.seed,
        "batch": options.batch,
        "vae": vae_facts,
        "classifier": classifier_facts,
        "transformer": transformer_facts,
        "vae_scaling_factor": scaling_factor,
        "vae_held_out_psnr_db": 10 * math.log10(4 / F.mse_loss(held_decoded.float(), held_images).item()),
        "classifier_held_out_accuracy": accuracy(classifier, held_images, held_labels),
        "classifier_held_out_accuracy_decoded": accuracy(classifier, held_decoded.float(), held_labels),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if CUDA else "CPU",
        "seconds": sum(stage["seconds"] for stage in (vae_facts, classifier_facts, transformer_facts)),
    }
    return pipe, classifier, facts


@torch.no_grad()
def accuracy(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """The share of images given their label."""
    predicted = torch.cat([classifier(batch).argmax(1) for batch in images.split(500)])
    return (predicted == labels).double().mean().item()


def evaluate(folder: Path, options: Options) -> tuple[Tensor, float]:
    """Generated images (N, 1, 32, 32) in [-1, 1] of the folder as written, and how many the classifier agrees with."""
    torch.set_float32_matmul_precision("highest")  # judged in true float32
    torch.backends.cudnn.allow_tf32 = False
    pipe = DiTPipeline.from_pretrained(folder).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    classifier = DigitClassifier.from_folder(folder / "classifier").to(DEVICE)
    # At least the 80 of the sample sheet, though only num_eval count; the noise is the same on any device.
    classes = torch.arange(max(80, options.num_eval)) % 10
    how = {"guidance_scale": GUIDANCE, "num_inference_steps": DDIM_STEPS, "generator": torch.manual_seed(options.seed)}
    parts = [pipe(part.tolist(), output_type="pt", **how).images for part in tqdm(classes.split(50), "generate")]
    images = torch.cat(parts) * 2 - 1
    return images, accuracy(classifier, images[: options.num_eval], classes[: options.num_eval].to(DEVICE))


def readme(facts: Facts) -> str:
    shown = "\n".join(f"| {key} | {json.dumps(value)} |" for key, value in facts.items())
    return f"""# digits-dit: a small class-conditional latent diffusion transformer of handwritten digits

A diffusers `DiTPipeline`, trained from nothing by `tools/train_digits.py`: `vae` (AutoencoderKL, 32x32x1 to 16x16x4),
`transformer` (DiTTransformer2DModel, 6 adaLN-zero blocks of width 128, patch 2, predicts the noise) and `scheduler`
(DDIM, 1000 linear betas). As in every DiTPipeline the null class is 1000; classes 10 to 999 were never trained.
`classifier` is an `accuquant.evaluation.digit_classifier.DigitClassifier`, to judge generated images.
`samples.png` shows generated digits, one class a column, guidance {GUIDANCE}, {DDIM_STEPS} DDIM steps.

Data: the UCI "Optical Recognition of Handwritten Digits" test set (E. Alpaydin and C. Kaynak, 1998,
https://doi.org/10.24432/C50P49, licence CC BY 4.0), as shipped with scikit-learn: 1797 scans of 8x8 pixels,
changed here: upsampled to 32x32, and shifted, turned and scaled a little for training.

| training | value |
| --- | --- |
{shown}
"""


def write_folder(options: Options, pipe: DiTPipeline, classifier: DigitClassifier, facts: Facts) -> None:
    """Writes, reloads and judges the folder beside its place, adds to `facts`, then moves the folder there."""
    partial = options.out.with_name(options.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "classifier").mkdir(parents=True)
    pipe.save_pretrained(partial)
    save_file({key: t.cpu() for key, t in classifier.state_dict().items()}, partial / "classifier" / WEIGHTS_NAME)
    images, facts["generated_agreement"] = evaluate(partial, options)
    facts["generated"] = f"{options.num_eval} images, guidance {GUIDANCE}, {DDIM_STEPS} DDIM steps"

    # The sheet of samples: 8 rows, one class a column.
    pixels = ((images[:80] + 1) * 127.5).round().byte().cpu().reshape(8, 10, 32, 32)
    Image.fromarray(pixels.permute(0, 2, 1, 3).reshape(256, 320).numpy()).save(partial / "samples.png")
    (partial / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    (partial / "README.md").write_text(readme(facts))

    # safetensors writes files that only their owner can read; a bundled model is for everyone.
    size = 0
    for file in filter(Path.is_file, partial.rglob("*")):
        file.chmod(0o644)
        size += file.stat().st_size
    if size > MAX_BYTES:
        raise RuntimeError(f"{partial} holds {size} bytes, more than {MAX_BYTES}")
    shutil.rmtree(options.out, ignore_errors=True)
    partial.rename(options.out)
    print(f"wrote {options.out}: {size / 1e6:.1f} MB")


def main() -> bool:
    """Whether the goals are met."""
    options = parse_options(Options, __doc__ or "")
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    if options.evaluate_only:
        facts: Facts = {"generated_agreement": evaluate(options.out, options)[1]}
    else:
        if options.out.exists() and not (options.out / "model_index.json").is_file():
            raise SystemExit(f"{options.out} exists and is no pipeline folder; not replacing it")
        pipe, classifier, facts = train(options)
        write_folder(options, pipe, classifier, facts)
    print(json.dumps(facts, indent=2))
    missed = [f"{key} is below {goal}" for key, goal in GOALS.items() if facts.get(key, goal) < goal]
    print("; ".join(missed) or "the goals are met")
    return not missed


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
