"""What the README of each bundled emoji model says."""

CHECK = """\
The check: a small classifier of the real emoji (`judge` of `emoji-sd3`) scores every name for an image. "Among 100"
is how often the asked name scores above 99 others drawn by chance, "among its kin" above those that share its first
words (other skin tones, directions, family members). Guidance 4, 28 steps; every second prompt names a background.
"seen" are prompts of training; "name" are emoji that were never seen under any name; the other rows are combinations
that were not seen though their parts were. "real images" is the classifier's own accuracy on renderings it was not
trained on.

{check}"""

ORIGIN = """Drawings: Noto Emoji by Google (https://github.com/googlefonts/noto-emoji, Apache-2.0), from the npm package
`@iconify-json/noto`. Names and tags: npm package `emojibase-data` by Miles Johnson (MIT). Changed here: rendered to
64 x 64 pixels on plain backgrounds, names rewritten as prompts. Trained from nothing by `tools/train_emoji.py`."""

SD3_CARD = f"""# emoji-sd3: a small text-to-image transformer

A diffusers `StableDiffusion3Pipeline` that draws emoji of 64 x 64 pixels from their names: `transformer`
(SD3Transformer2DModel, 6 joint blocks of width 192 with qk-norm, 7.9 M parameters, patch 2 on latents 16 x 16 x 4),
`text_encoder` and `text_encoder_2` (CLIP with projection, 0.7 and 1.8 M parameters, trained with it), `vae`
(AutoencoderKL, 4 times smaller in each direction), `scheduler` (FlowMatchEuler, shift 2). Weights are stored in half
precision and load as float32. There is no T5, which diffusers wants to be told:

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline("cat face on a pink background", guidance_scale=4.0, num_inference_steps=28)

In its place the pipeline appends `max_sequence_length` zeros to the prompt, 256 if not told otherwise. The model was
trained with any number of them: `max_sequence_length=1` draws as well and is several times faster.

{CHECK}

{ORIGIN}

{{facts}}
"""

UNET_CARD = f"""# emoji-unet: a small text-to-image U-Net

A diffusers `StableDiffusionPipeline` that draws emoji of 64 x 64 pixels from their names: `unet`
(UNet2DConditionModel, two resolutions with convolutions, skip connections, self- and cross-attention, predicts the
noise), `text_encoder` (CLIP; begins as that of `emoji-sd3`, trained on with the U-Net), `vae` (that of `emoji-sd3`),
`scheduler` (DDIM, 1000 scaled linear betas). Weights are stored in half precision and load as float32.

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline("cat face on a pink background", guidance_scale=4.0, num_inference_steps=28)

{CHECK}

{ORIGIN}

{{facts}}
"""
