"""Editors: whole random pipelines, saved, loaded and run, against diffusers and themselves."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline
from safetensors.torch import load_file, save_file

from shields.errors import ConfigError, ImageError, WeightsError
from shields.models.diffusion import DiffusersAutoencoder
from shields.models.editors import (
    ImageToImageEditor,
    InpaintingEditor,
    InstructPix2PixEditor,
    PipelineEditor,
    centred_background,
)
from shields.models.manipulation import resized
from shields.models.prompts import edit_seed, facelock_prompts
from shields.models.reference_editors import Flux2Editor, IPAdapterEditor
from shields.weights import Card
from tests import editing, tiny
from tests.cards import write_card

#: diffusers' ancestral sampler makes numpy share memory in a way that numpy is going to forbid
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIZE = 32
KINDS = {
    "instruct": (InstructPix2PixEditor, editing.save_instruct),
    "img2img": (ImageToImageEditor, editing.save_plain),
    "inpainting": (InpaintingEditor, editing.save_inpainting),
    "ip-adapter": (IPAdapterEditor, editing.save_adapter),
    "klein": (Flux2Editor, editing.save_klein),
    "flux2": (Flux2Editor, editing.save_flux2),
}
BATCHED = ("instruct", "img2img", "inpainting")


def card(**config):
    return Card(
        name="small", role="editor", architecture="any", repository="nobody/nothing", config=config
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Every kind of pipeline folder, made when it is asked for."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = KINDS[name][1](tmp_path_factory.mktemp("pipelines") / name)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def build(folders):
    """Load an editor of a kind: two steps, smallest size."""

    def load(name, **config):
        settings = {"steps": 2, "precision": "float32"} | least(name, folders)
        settings |= {"strength": 1.0} if name == "img2img" else {}
        return KINDS[name][0].load(folders(name), card(**settings | config))

    return load


@pytest.fixture(scope="session")
def editors(build):
    """Every kind, loaded once."""
    loaded = {}

    def editor(name):
        if name not in loaded:
            loaded[name] = build(name)
        return loaded[name]

    return editor


def least(name, folders):
    """The settings without which the small pipelines do not load."""
    size = {"size": 64 if KINDS[name][0] is Flux2Editor else SIZE}
    return size | ({"base": str(folders("img2img"))} if name == "ip-adapter" else {})


def photos(number=1, seed=0):
    return tiny.faces_image(number, 48, seed)


def edit_one(editor, photo, prompt="make it snow", seed=1):
    return editor.edit(photo, [prompt], seeds=[seed])


# What every editor promises


@pytest.mark.parametrize("name", KINDS)
def test_an_edit_follows_photo_prompt_and_seed_and_nothing_else(editors, name):
    editor, photo = editors(name), photos()
    before = torch.get_rng_state()
    first = edit_one(editor, photo)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == (1, 3, editor.size, editor.size)
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1
    assert first.std() > 0.01
    assert torch.equal(edit_one(editor, photo.clone()), first)
    for other in (
        edit_one(editor, photo, seed=2),
        edit_one(editor, photo, prompt="turn bald"),
        edit_one(editor, photos(seed=7)),
    ):
        assert (other - first).abs().max() > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_gives_the_edits_of_its_photos_one_by_one(editors, name):
    editor, photo = editors(name), photos(2)
    prompts, seeds = ["make it snow", "turn bald"], [3, 4]
    both = editor.edit(photo, prompts, seeds=seeds)
    for index in range(2):
        alone = edit_one(editor, photo[index : index + 1], prompts[index], seeds[index])
        assert torch.equal(both[index : index + 1], alone)


@pytest.mark.parametrize("name", BATCHED)
def test_running_several_at_once_changes_rounding_alone(build, editors, name):
    photo, prompts, seeds = photos(3), facelock_prompts()[:3], [5, 6, 7]
    one_by_one = editors(name).edit(photo, prompts, seeds=seeds)
    at_once = build(name, batch=2).edit(photo, prompts, seeds=seeds)
    torch.testing.assert_close(at_once, one_by_one, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", KINDS)
def test_networks_are_frozen_parts_of_the_editor(editors, name):
    editor = editors(name)
    assert set(editor.parts) >= {"vae", "text_encoder"}
    assert not any(parameter.requires_grad for parameter in editor.parameters())
    assert not any(module.training for module in editor.parts.modules())


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_that_would_be_cut_off_is_an_error(editors, name):
    with pytest.raises(ConfigError, match="the text encoder reads"):
        edit_one(editors(name), photos(), prompt="a" * 600)


def test_the_longest_prompt_that_fits_is_taken(editors):
    editor = editors("instruct")  # 40 tokens with the two ends
    assert edit_one(editor, photos(), prompt="a" * 38).shape == (1, 3, SIZE, SIZE)
    with pytest.raises(ConfigError, match=r"has 41 tokens .* reads 40"):
        edit_one(editor, photos(), prompt="a" * 39)


@pytest.mark.parametrize(("prompts", "seeds"), [(["a"], [1, 2]), (["a", "b"], [1]), ("ab", [1, 2])])
def test_every_photo_needs_a_prompt_and_a_seed(editors, prompts, seeds):
    with pytest.raises(ConfigError, match="every photo needs a prompt and a seed"):
        editors("instruct").edit(photos(2), prompts, seeds=seeds)


def test_images_outside_the_unit_range_are_refused(editors):
    with pytest.raises(ImageError):
        edit_one(editors("instruct"), 2 * photos() - 1)


def test_clean_and_protected_edits_differ_by_as_little_as_their_photos(editors):
    photo = photos()
    protected = (photo + 1e-5).clamp(0, 1)
    seed = edit_seed("ann.png", "make it snow")
    clean, near, far = (
        edit_one(editors("instruct"), image, seed=number)
        for image, number in ((photo, seed), (protected, seed), (protected, seed + 1))
    )
    assert (near - clean).abs().mean() < 0.1 * (far - clean).abs().mean()


# What each kind does


def test_instruct_pix2pix_is_that_of_diffusers(folders, editors):
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
        folders("instruct"), safety_checker=None, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    photo = tiny.faces_image(1, SIZE)
    reference = pipeline(
        "make it snow", photo, 2, 7.5, 1.5, generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(edit_one(editors("instruct"), photo), reference, rtol=0, atol=2e-3)


def test_strength_is_how_far_img2img_goes(build):
    photo = photos()
    weak, strong = (
        edit_one(build("img2img", steps=10, strength=strength), photo) for strength in (0.1, 1.0)
    )
    kept = DiffusersAutoencoder(build("img2img").pipeline.vae).reconstruct(
        resized(photo, (SIZE, SIZE))
    )
    assert (weak - kept).abs().mean() < (strong - kept).abs().mean()


def test_inpainting_looks_at_what_it_keeps_alone(build):
    editor, photo = build("inpainting"), photos()
    mask = torch.zeros(1, 1, 48, 48)
    mask[..., :24] = 1
    changed = photo.clone()
    changed[..., :20] = 0.5  # resizing blurs what is nearer to the border
    first, second = (editor.edit(image, ["a"], seeds=[1], mask=mask) for image in (photo, changed))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    third = editor.edit(changed, ["a"], seeds=[1], mask=1 - mask)
    assert (third - second).abs().max() > 1e-3


def test_plain_stable_diffusion_inpaints_too(folders, build):
    editor = InpaintingEditor.load(folders("img2img"), card(steps=2, size=SIZE))
    assert edit_one(editor, photos()).shape == (1, 3, SIZE, SIZE)


def test_a_mask_must_fit_the_photo(build):
    with pytest.raises(ImageError, match="mask"):
        build("inpainting").edit(photos(), ["a"], seeds=[1], mask=torch.ones(1, 1, 8, 8))


def test_the_background_of_a_portrait_is_what_lies_outside_an_oval():
    mask = centred_background(100)[0, 0]
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask[50, 50] == 0
    assert mask[0, 0] == mask[50, 10] == mask[5, 50] == 1
    assert mask[15, 50] == mask[50, 25] == 0
    assert 1 - mask.mean() == pytest.approx(3.14159 * 0.3 * 0.4, abs=0.01)


def test_an_adapter_of_no_weight_leaves_the_photo_out(build):
    editor = build("ip-adapter", scale=0.0)
    first, second = (edit_one(editor, photos(seed=seed)) for seed in (0, 7))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_the_text_of_an_adapter_may_be_empty(editors):
    assert edit_one(editors("ip-adapter"), photos(), prompt="").std() > 0.01


def test_a_distilled_flux2_takes_four_steps_unless_told_otherwise(folders, build):
    sampling = Flux2Editor.load(folders("klein"), card(size=64)).sampling
    assert (sampling.steps, sampling.guidance, sampling.precision) == (4, 1.0, "bfloat16")
    told, other = build("klein", guidance=2.0).sampling, Flux2Editor.SAMPLING()
    assert (told.steps, told.guidance, other.steps, other.guidance) == (2, 2.0, 50, 4.0)


# Settings


def test_the_defaults_are_those_of_facelock():
    sampling = InstructPix2PixEditor.SAMPLING()
    assert (sampling.size, sampling.steps) == (512, 50)
    assert (sampling.guidance, sampling.image_guidance) == (7.5, 1.5)
    assert ImageToImageEditor.SAMPLING().strength == 0.5


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("instruct", {"steps": 0}, "`steps`"),
        ("instruct", {"image_guidance": 0.5}, "`image_guidance`"),
        ("instruct", {"guidance": 1.0}, "`guidance`"),
        ("instruct", {"precision": "float8"}, "`precision`"),
        ("instruct", {"size": 30}, "multiple of 4"),
        ("img2img", {"strength": 0.0}, "`strength`"),
        ("img2img", {"strength": 0.1}, "leave none to run"),
        ("ip-adapter", {"batch": 2}, "one by one"),
        ("ip-adapter", {"slicing": True}, "cannot slice"),
        ("klein", {"size": 32}, "64 to 1024"),
    ],
)
def test_settings_that_make_no_sense_are_named(build, name, config, said):
    with pytest.raises(ConfigError, match=said):
        build(name, **config)


def test_an_unknown_setting_is_an_error_of_the_card(build):
    with pytest.raises(WeightsError, match=r"card 'small'.*image_guidence"):
        build("instruct", image_guidence=2.0)


@pytest.mark.parametrize("name", BATCHED)
def test_sliced_attention_gives_the_same_edit(build, editors, name):
    sliced = edit_one(build(name, slicing=True), photos())
    torch.testing.assert_close(sliced, edit_one(editors(name), photos()), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["instruct", "ip-adapter", "klein"])
def test_half_precision_comes_back_as_float32(build, editors, name):
    edited = edit_one(build(name, precision="bfloat16"), photos())
    assert edited.dtype == torch.float32
    assert 0 < (edited - edit_one(editors(name), photos())).abs().mean() < 0.1


def test_offloading_does_nothing_on_a_cpu(build, editors):
    editor = build("instruct", offload=True).to("cpu")
    assert torch.equal(edit_one(editor, photos()), edit_one(editors("instruct"), photos()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", [False, True])
def test_an_edit_on_a_gpu_is_that_of_the_cpu(build, editors, offload):
    edited = edit_one(build("instruct", offload=offload).to("cuda"), photos())
    torch.testing.assert_close(edited, edit_one(editors("instruct"), photos()), rtol=0, atol=1e-2)


# Folders


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_says_itself_which_editor_it_is_for(folders, name):
    editor = PipelineEditor.load(folders(name), card(**least(name, folders)))
    assert type(editor) is KINDS[name][0]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("instruct", "vae"),
        ("instruct", "scheduler"),
        ("img2img", "tokenizer"),
        ("inpainting", "text_encoder"),
        ("klein", "transformer"),
        ("flux2", "tokenizer"),
        ("ip-adapter", "image_encoder"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused(folders, tmp_path, name, part):
    folder = shutil.copytree(folders(name), tmp_path / "lacking")
    shutil.rmtree(folder / part)
    with pytest.raises(WeightsError, match=part):
        KINDS[name][0].load(folder, card(**least(name, folders)))


@pytest.mark.parametrize(
    ("kind", "name"), [(InstructPix2PixEditor, "img2img"), (ImageToImageEditor, "instruct")]
)
def test_a_pipeline_of_another_kind_is_refused(folders, kind, name):
    with pytest.raises(WeightsError, match="belongs to another kind of pipeline"):
        kind.load(folders(name), card(size=SIZE))


def test_a_folder_of_no_known_pipeline_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"model_index\.json"):
        PipelineEditor.load(tmp_path, card())
    (tmp_path / "model_index.json").write_text('{"_class_name": "ShapEPipeline"}')
    with pytest.raises(WeightsError, match="ShapEPipeline; editing pipelines known here"):
        PipelineEditor.load(tmp_path, card())


@pytest.mark.parametrize("broken", ["lacking", "foreign", "misshapen", "absent", "several"])
def test_an_adapter_must_fit_to_the_last_key(folders, tmp_path, broken):
    folder = shutil.copytree(folders("ip-adapter"), tmp_path / "adapter")
    file = folder / "ip-adapter_sd15.safetensors"
    state = load_file(file)
    if broken == "lacking":
        del state["ip_adapter.3.to_k_ip.weight"]
    elif broken == "foreign":
        state["ip_adapter.9.to_k_ip.weight"] = torch.zeros(16, 8)
    elif broken == "misshapen":
        state["image_proj.proj.bias"] = torch.zeros(5)
    file.unlink()
    if broken != "absent":
        save_file(state, file)
    if broken == "several":
        save_file(state, folder / "ip-adapter-plus_sd15.safetensors")
    with pytest.raises(WeightsError, match="adapter"):
        IPAdapterEditor.load(folder, card(**least("ip-adapter", folders)))


def test_an_adapter_is_found_by_its_name_or_as_a_file(folders, tmp_path, editors):
    folder = shutil.copytree(folders("ip-adapter"), tmp_path / "adapter")
    shutil.copy(folder / "ip-adapter_sd15.safetensors", folder / "ip-adapter_other.safetensors")
    base = least("ip-adapter", folders) | {"steps": 2}
    write_card(folder, "my-base", "diffusion", "latent-diffusion")
    shutil.copytree(folders("img2img"), folder / "my-base")
    by_card = base | {"base": "my-base", "adapter": "ip-adapter_other.safetensors"}
    named = IPAdapterEditor.load(folder, card(**by_card))
    as_file = IPAdapterEditor.load(folder / "ip-adapter_sd15.safetensors", card(**base))
    expected = edit_one(editors("ip-adapter"), photos())
    assert torch.equal(edit_one(named, photos()), expected)
    assert torch.equal(edit_one(as_file, photos()), expected)
