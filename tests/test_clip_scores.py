"""CLIP's scores against transformers' own processor and towers."""

import pytest
import torch
from PIL import Image as PillowImage

from robustness.metrics import Scene, load
from shields.errors import ConfigError, WeightsError
from shields.weights import WeightStore
from tests import tiny

CPU = torch.device("cpu")


def built(text, store=None):
    measure, _ = load(text, store=store or WeightStore(), device=CPU)
    return measure


def save_clip(folder):
    """A random CLIP as transformers saves it."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = tiny.diffusion_parts()["tokenizer"]
    encoder = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
               "num_attention_heads": 2}  # fmt: skip
    config = CLIPConfig(
        projection_dim=8,
        text_config=encoder
        | {"vocab_size": len(tokenizer), "max_position_embeddings": 40, "bos_token_id": 0,
           "eos_token_id": 1, "pad_token_id": 1},
        vision_config=encoder | {"image_size": 32, "patch_size": 8},
    )  # fmt: skip
    with tiny.seeded(0):
        network = CLIPModel(config).eval()
        for parameter in network.parameters():  # far enough from zero for features to differ
            parameter.data += 0.3 * torch.randn(parameter.shape)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return network, tokenizer


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, *save_clip(folder)


def clip_features(network, tokenizer, images, text):
    """By transformers' own processor and the towers one by one."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    levels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    photos = [PillowImage.fromarray(photo) for photo in levels]
    pixels = processor(photos, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        seen = network.visual_projection(network.vision_model(pixels).pooler_output)
        tokens = tokenizer([text], return_tensors="pt")
        read = network.text_projection(network.text_model(**tokens).pooler_output)
    return seen, read


def cosine(first, second):
    return (first * second).sum(-1) / first.norm(dim=-1) / second.norm(dim=-1)


def test_scores_of_clip_are_their_formulas_on_the_towers(clip):
    folder, network, tokenizer = clip
    levels = [(tiny.faces_image(2, 48, seed, width=60) * 255).round() / 255 for seed in (1, 2)]
    edit, source = levels
    text = "turn the hair pink"
    ours, words = clip_features(network, tokenizer, edit, text)
    theirs, _ = clip_features(network, tokenizer, source, text)
    expected = {
        "clip-s": cosine(ours - theirs, words),
        "clip-sd": cosine(ours, words),
        "clip-i": cosine(ours, theirs),
    }
    where = Scene(clean=source, prompt=text, description=text, keys=("a", "b"))
    for name, values in expected.items():
        measure = built(f"{name}:{folder}@source")
        found = measure.measure(edit, source, where)
        assert torch.allclose(found, values, atol=0.01), name
        singles = [
            measure.measure(edit[row : row + 1], source[row : row + 1],
                            Scene(clean=source[row : row + 1], prompt=text, description=text))
            for row in range(2)
        ]  # fmt: skip
        assert torch.allclose(found, torch.cat(singles), atol=1e-4)
        assert measure.facts("source").higher is False


def test_an_edit_that_changed_nothing_has_no_direction_and_needs_its_text(clip):
    folder = clip[0]
    source = tiny.faces_image(1, 48)
    measure = built(f"clip-s:{folder}@source")
    same = measure.measure(source, source, Scene(clean=source, prompt="a hat"))
    assert same.isnan().all()
    assert "equals its source" in measure.undefined
    with pytest.raises(ConfigError, match="needs the instruction"):
        measure.measure(source, source, Scene(clean=source))


def test_clip_looks_at_edits_beside_their_source_only(clip):
    with pytest.raises(ConfigError, match="measured on source, not on edits"):
        built(f"clip-i:{clip[0]}@edits")


def test_clip_is_absent_where_its_folder_is(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    empty = WeightStore(tmp_path)
    with pytest.raises(WeightsError, match="hf download openai/clip-vit-base-patch32"):
        built("clip-s@source", empty)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="broken"):
        built("clip-i:broken@source", empty)
