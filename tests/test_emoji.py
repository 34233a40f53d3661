"""The emoji models' tools: data, what is held out, the text side, the one padding token, the judge, the whole run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from transformers import CLIPTokenizer

from tools.emoji import sd3
from tools.emoji.autoencoder import make_autoencoder
from tools.emoji.check import kin, questions
from tools.emoji.data import BACKGROUNDS, SPLITS, Emoji, load_emoji, paint, prompt, render, split, varied_prompt
from tools.emoji.judge import found_among, moved
from tools.emoji.text import MAX_TOKENS, draw, tokens, train_tokenizer, weights
from tools.train_emoji import is_written

ROOT = Path(__file__).parent.parent
SHAPES = {
    "red square": '<path fill="#ff0000" d="M0 0h128v128H0z"/>',
    "green bar": '<path fill="#00ff00" d="M0 0h128v32H0z"/>',
    "blue dot": '<circle cx="64" cy="64" r="40" fill="#0000ff"/>',
    "thumb": '<path fill="#fc0" d="M32 32h64v64H32z"/>',
    "thumb: dark skin tone": '<path fill="#530" d="M32 32h64v64H32z"/>',
    "second dot": '<circle cx="64" cy="64" r="40" fill="#0000ff"/>',
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two packages laid out as npm lays them, of drawings made here."""
    folder = tmp_path_factory.mktemp("npm") / "node_modules"
    (folder / "@iconify-json" / "noto").mkdir(parents=True)
    (folder / "emojibase-data" / "en").mkdir(parents=True)
    slugs = [name.replace(": ", "-").replace(" ", "-") for name in SHAPES]
    icons = {slug: {"body": body} for slug, body in zip(slugs, SHAPES.values(), strict=True)}
    codes = ["1f600", "1f601", "2764-fe0f", "1f44d", "1f44d-1f3ff", "1f602"]
    noto = {"icons": icons, "width": 128, "height": 128}
    (folder / "@iconify-json" / "noto" / "icons.json").write_text(json.dumps(noto))
    (folder / "@iconify-json" / "noto" / "chars.json").write_text(json.dumps(dict(zip(codes, slugs, strict=True))))
    skins = [{"label": "thumb: dark skin tone", "hexcode": "1F44D-1F3FF"}]
    entries = [
        {"label": "Red Square", "hexcode": "1F600", "tags": ["shape", "box"]},
        {"label": "blue dot", "hexcode": "2764", "tags": ["round", "disc", "ball"]},
        {"label": "thumb", "hexcode": "1F44D", "tags": ["yes"], "skins": skins},
        {"label": "second dot", "hexcode": "1F602", "tags": []},
    ]
    (folder / "emojibase-data" / "en" / "data.json").write_text(json.dumps(entries))
    return folder


def test_names_tags_and_drawings_of_the_packages(packages: Path) -> None:
    emoji = {one.name: one for one in load_emoji(packages)}
    # "green bar" is in no list of names and has that of its file; "second dot" is the same drawing as "blue dot"
    assert list(emoji) == sorted(set(SHAPES) - {"second dot"})
    assert emoji["blue dot"].tags == ("round", "disc", "ball")  # though one list writes a variation selector
    assert emoji["thumb: dark skin tone"].tags == ("yes",) and emoji["green bar"].tags == ()


def test_missing_packages_are_named_with_the_way_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"npm install --prefix .* @iconify-json/noto@1 emojibase-data@17"):
        load_emoji(tmp_path / "node_modules")


def test_a_drawing_lies_on_its_background(packages: Path) -> None:
    drawing = render(one for one in load_emoji(packages) if one.name == "green bar")
    image = paint(drawing, torch.tensor([BACKGROUNDS["blue"]]))[0]
    above, below = image[:, 4, 32], image[:, 40, 32]
    assert drawing.shape == (1, 4, 64, 64) and above.tolist() == [-1, 1, -1]
    torch.testing.assert_close(below, torch.tensor(BACKGROUNDS["blue"]) / 127.5 - 1)


@pytest.mark.parametrize(
    ("held", "name", "seen"),
    [
        ("skin tone", "baby: medium-light skin tone", "baby: dark skin tone"),
        ("skin tone", "couple with heart: man, man, dark skin tone", "couple with heart: man, man, light skin tone"),
        ("direction", "woman with white cane: facing right", "woman with white cane: light skin tone"),
        ("direction", "person kneeling: dark skin tone, facing right", "person kneeling: dark skin tone"),
        ("family", "family: man, girl, boy", "family: man, girl, girl"),
        ("flag", "black flag", "rainbow flag"),
        ("name", "factory worker: dark skin tone", "artist: dark skin tone"),
        ("name", "giraffe", "closed mailbox with lowered flag"),
    ],
)
def test_what_is_held_out(held: str, name: str, seen: str) -> None:
    assert (split(name), split(seen)) == (held, "seen")


def test_a_name_is_held_out_with_all_its_skin_tones() -> None:
    tones = [f"{tone} skin tone" for tone in ("light", "medium-light", "medium", "medium-dark", "dark")]
    for base in ("factory worker", "foot", "man walking"):
        held = [base, f"{base}: facing right", *(f"{base}: {tone}" for tone in tones)]
        assert {split(name) for name in held} == {"name"}


def test_prompts() -> None:
    assert prompt("waving hand: dark skin tone") == "waving hand, dark skin tone"
    assert prompt("japanese “bargain” button", "pink") == "japanese bargain button on a pink background"
    emoji = Emoji("blue dot", ("round", "disc", "ball"), "", "seen")
    said = {varied_prompt(emoji, "black", Random(seed)) for seed in range(200)}
    assert all(text.endswith(" on a black background") for text in said)
    alone = {text.removesuffix(" on a black background") for text in said}
    assert "blue dot" in alone and any(text.startswith("blue dot, ") for text in alone)
    assert any("blue dot" not in text for text in alone)  # tags alone
    on_white = [varied_prompt(emoji, "white", Random(seed)) for seed in range(200)]
    assert 20 < sum(text.endswith(" on a white background") for text in on_white) < 70


@pytest.fixture(scope="module")
def tokenizer(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return train_tokenizer(load_emoji(packages), tmp_path_factory.mktemp("work") / "tokenizer")


def test_the_vocabulary_is_kept(packages: Path, tmp_path: Path) -> None:
    first = train_tokenizer(load_emoji(packages), tmp_path / "tokenizer")
    again = train_tokenizer([], tmp_path / "tokenizer")
    assert first.get_vocab() == again.get_vocab() and again("blue dot").input_ids == first("blue dot").input_ids


def test_tokens_are_those_of_the_pipeline_after_saving(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded, said = CLIPTokenizer.from_pretrained(tmp_path), ["Blue dot, zebra", ""]
    assert torch.equal(tokens(loaded, said), tokens(tokenizer, said)) and loaded.model_max_length == MAX_TOKENS
    assert tokens(loaded, said).shape == (2, MAX_TOKENS)
    empty = tokens(loaded, said)[1]
    assert empty[0] == loaded.bos_token_id and set(empty[1:].tolist()) == {loaded.eos_token_id}


@pytest.mark.parametrize("count", [1, 7, 256])
def test_one_padding_token_stands_for_many(tokenizer: CLIPTokenizer, count: int) -> None:
    """What training computes is what the pipeline computes, in float64."""
    torch.manual_seed(0)
    networks = sd3.Networks(tokenizer).double().requires_grad_(False)
    for parameter in networks.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # modulation and projection begin as zeros
    pipeline = sd3.make_pipeline(networks, make_autoencoder().double(), tokenizer)
    prompts, latents, sigma = ["blue dot", ""], torch.randn(2, 4, 16, 16).double(), torch.tensor([0.2, 0.9]).double()
    given = pipeline.encode_prompt(prompts, None, None, max_sequence_length=count, do_classifier_free_guidance=False)
    assert given[0].shape == (2, MAX_TOKENS + count, sum(sd3.WIDTHS))
    expected = networks.transformer(latents, given[0], given[2], sigma * 1000, return_dict=False)[0]
    attention = sd3.OnePaddingToken()
    sd3.set_attention(networks, attention)
    counts = torch.full((2,), float(count), dtype=torch.float64)
    found = sd3.velocity(networks, attention, latents, sigma, tokens(tokenizer, prompts), counts)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_batches_draw_kin_less_often(packages: Path, tokenizer: CLIPTokenizer) -> None:
    emoji = load_emoji(packages)
    chances = dict(zip([one.name for one in emoji], weights(emoji).tolist(), strict=True))
    assert chances["blue dot"] == 1 and chances["thumb"] == chances["thumb: dark skin tone"] == pytest.approx(0.5**0.5)
    latents = torch.arange(len(emoji)).half()[:, None, None, None, None].expand(-1, len(BACKGROUNDS), 4, 16, 16)
    drawn, ids = draw(emoji, latents, tokenizer, 4000, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn[:, 0, 0, 0].long(), minlength=len(emoji)) / 4000
    torch.testing.assert_close(shares, weights(emoji) / weights(emoji).sum(), atol=0.03, rtol=0)
    without = (ids == tokens(tokenizer, [""])).all(dim=1).double().mean()
    assert 0.08 < without < 0.12  # for guidance


def test_questions_are_of_every_kind() -> None:
    names = [f"thing {i}" for i in range(400)] + [f"family: man, {'girl, ' * i}boy" for i in range(40)]
    asked = list(questions(names, per_split=20))
    assert [kind for kind in SPLITS if kind in {kind for kind, _, _ in asked}] == ["seen", "name", "family"]
    for kind, i, text in asked:
        assert split(names[i]) == kind and text.startswith(prompt(names[i]))
    assert 0.4 < sum("background" in text for _, _, text in asked) / len(asked) < 0.6


def test_found_among_compares_with_others_only() -> None:
    scores = torch.eye(200).roll(1, dims=1) + 0.5 * torch.eye(200)  # everyone is taken for the next
    asked = torch.arange(200)
    assert found_among(torch.eye(200), asked, 100).all()
    share = found_among(scores, asked, 100).double().mean()
    assert 0.35 < share < 0.65  # the mistaken one is among 99 of 199 others every second time
    assert kin(["a: x", "b", "a: y", "a"]) == [[0, 2, 3], [1], [0, 2, 3], [0, 2, 3]]


def test_a_drawing_that_moves_keeps_its_colour(packages: Path) -> None:
    drawing = render(one for one in load_emoji(packages) if one.name == "blue dot")
    elsewhere = moved(drawing, torch.tensor([0.5]), torch.tensor([[1.0, -1.0]]))
    opaque = elsewhere[0, 3] > 20
    assert opaque.any() and not torch.equal(elsewhere.byte(), drawing)
    assert elsewhere[0, 2][opaque].min() > 250 and elsewhere[0, :2][:, opaque].max() < 5


@pytest.mark.slow
def test_the_whole_run_writes_two_models_that_load(packages: Path, tmp_path: Path) -> None:
    """Two updates of everything: folders, cards, records, figures; and the check of a folder alone."""
    steps = [f"--steps-{name}=2" for name in ("autoencoder", "judge", "sd3", "unet")]
    places = [f"--packages={packages}", *(f"--{name}={tmp_path / name}" for name in ("out", "work", "docs"))]
    options = [*steps, *places, "--num-check=2", "--num-inference-steps=2", "--no-compile"]
    command = [sys.executable, "-m", "tools.train_emoji", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "Apache-2.0" in done.stdout and "| real images | 5 |" in done.stdout

    transformer = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "out" / "emoji-sd3", text_encoder_3=None, tokenizer_3=None
    )
    unet = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "emoji-unet")
    for pipeline in (transformer, unet):
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline("blue dot", num_inference_steps=2).images[0].size == (64, 64)
        types = {part.dtype for part in pipeline.components.values() if isinstance(part, torch.nn.Module)}
        assert types == {torch.float32}
    for folder in (tmp_path / "out").iterdir():
        record = json.loads((folder / "training.json").read_text())
        assert record["check"][0]["split"] == "real images" and record["check"][1]["samples"] == 2
        assert "| seen | 2 |" in (folder / "README.md").read_text()
        assert (folder / "samples.png").stat().st_size > 1000
        assert all(file.stat().st_mode & 0o777 == 0o644 for file in folder.rglob("*") if file.is_file())
    assert {file.name for file in (tmp_path / "docs").iterdir()} == {"sd3-training.png", "unet-training.png"}

    # Once more there is nothing left to do but to look at it; another training is written in its place.
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*") if file.is_file()}
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert again.returncode == 0 and again.stdout.count("is there already") == 2, again.stderr
    assert written == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert not is_written(tmp_path / "out" / "emoji-sd3", {"seed": 1})
