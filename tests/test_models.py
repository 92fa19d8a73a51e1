"""The contracts of autoencoders, recognizers and perceptual distances, and `models.load`.

Every architecture is built small and random, saved as its publisher does, and loaded by name.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from shields import models
from shields.errors import ConfigError, UnknownName, WeightsError
from shields.models.autoencoders import stages
from shields.models.base import Detector
from shields.models.networks import FaceEmbedder, MobileFaceNet, PortraitAutoencoder, Taef2
from shields.models.perceptual import DeepFeatures, LpipsModel
from shields.types import Face
from shields.weights import WeightStore
from tests import tiny

SHARED = Path(__file__).parents[1].parent / "shared"
CPU = torch.device("cpu")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")

AUTOENCODERS = ("tiny", "small-portrait-ae", "small-taef2", "small-kl", "small-tiny", "small-flux2")
RECOGNIZERS = ("tiny", "small-face-embedder", "random-mobilefacenet", "random-facenet")
PERCEPTUAL = ("tiny", "random-lpips-squeeze", "features:small-portrait-ae", "features:small-kl",
              "features:small-tiny", "features:random-mobilefacenet")  # fmt: skip


def write_card(folder, name, role, architecture, *, file="", extra=""):
    text = f'name = "{name}"\nrole = "{role}"\narchitecture = "{architecture}"\n'
    text += f'file = "{file}"\n' if file else 'repository = "nobody/nothing"\n'
    (folder / f"{name}.toml").write_text(text + extra)


def randomised(network: nn.Module, seed: int) -> nn.Module:
    """Give normalisations statistics of their own, so that ignoring them would show."""
    rng = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(std=0.1, generator=rng)
            module.running_var.uniform_(0.5, 1.5, generator=rng)
    return network


def save_file_model(folder, name, role, architecture, network, extra=""):
    save_file(network.state_dict(), folder / f"{name}.safetensors")
    write_card(folder, name, role, architecture, file=f"{name}.safetensors", extra=extra)


def save_diffusers(folder):
    from diffusers import AutoencoderKLFlux2, AutoencoderTiny

    small = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    flux2 = AutoencoderKLFlux2(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    parts = {"kl": tiny.diffusion_parts()["vae"], "tiny": small, "flux2": flux2}
    for name, network in parts.items():
        network.save_pretrained(folder / f"small-{name}")
        write_card(folder, f"small-{name}", "autoencoder", "diffusers")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder of cards and weights of every architecture."""
    from facenet_pytorch import InceptionResnetV1
    from torchvision.models import squeezenet1_1

    folder = tmp_path_factory.mktemp("weights")
    with tiny.seeded(0):
        save_file_model(
            folder, "small-portrait-ae", "autoencoder", "portrait-ae",
            PortraitAutoencoder(fine=8, coarse=8, blocks=1, latent_channels=4),
            "[config]\nfine = 8\ncoarse = 8\nblocks = 1\nlatent_channels = 4\n",
        )  # fmt: skip
        save_file_model(
            folder, "small-taef2", "autoencoder", "taef2", Taef2(width=8, latent_channels=4),
            "[config]\nwidth = 8\nlatent_channels = 4\n",
        )  # fmt: skip
        save_file_model(
            folder, "small-face-embedder", "recognizer", "face-embedder",
            randomised(FaceEmbedder(widths=(8, 8, 8, 8), blocks=(1, 1, 1, 1), dimensions=16), 1),
            "[config]\nwidths = [8, 8, 8, 8]\nblocks = [1, 1, 1, 1]\ndimensions = 16\n"
            "[results]\nval_threshold = 0.3\n",
        )  # fmt: skip
        save_file_model(
            folder, "random-mobilefacenet", "recognizer", "mobilefacenet",
            randomised(MobileFaceNet(), 2), "[results]\nthreshold = 0.2\n",
        )  # fmt: skip
        facenet = randomised(InceptionResnetV1(), 3).state_dict()
        # As published: with the classifier of the training set behind it.
        facenet |= {"logits.weight": torch.zeros(10, 512), "logits.bias": torch.zeros(10)}
        torch.save(facenet, folder / "random-facenet.pt")
        write_card(
            folder, "random-facenet", "recognizer", "inception-resnet-v1", file="random-facenet.pt"
        )
        torch.save(squeezenet1_1(weights=None).state_dict(), folder / "squeeze.pth")
        write_card(
            folder, "random-lpips-squeeze", "perceptual", "lpips-squeeze", file="squeeze.pth"
        )
        save_diffusers(folder)
    return WeightStore(folder)


def fetch(role, name, store):
    if name == "tiny":
        return getattr(tiny, role)()
    return models.load(role, name, store=store, device=CPU)


CASES = [
    *(("autoencoder", name) for name in AUTOENCODERS),
    *(("recognizer", name) for name in RECOGNIZERS),
    *(("perceptual", name) for name in PERCEPTUAL),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request, store):
    """Role, network, and an image that it takes."""
    role, name = request.param
    network = fetch(role, name, store)
    if role == "recognizer":
        height, width = network.crop_size
        return role, network, tiny.faces_image(2, height, width=width)
    return role, network, tiny.faces_image(2, 64)


def run(role, network, image):
    """One number a sample that depends on all that the network does."""
    if role == "autoencoder":
        return network.decode(network.encode(image)).flatten(1).square().mean(1)
    if role == "recognizer":
        return network.embed(image)[:, :3].sum(1)
    return network(image, image.flip(3))


def test_every_architecture_is_under_test(store):
    architectures = {}
    for name in store.names():
        card = store.card(name)
        # Of the LPIPS backbones one is small enough; the others differ in data alone.
        if (store.folder / f"{name}.toml").is_file():
            architectures.setdefault(card.role, set()).add(card.architecture)
    assert architectures["autoencoder"] == set(models.AUTOENCODERS)
    assert architectures["recognizer"] == set(models.RECOGNIZERS)
    assert architectures["perceptual"] <= set(models.PERCEPTUAL)


def test_gradient_reaches_the_image_and_no_parameter(case):
    role, network, image = case
    image.requires_grad_(True)
    run(role, network, image).sum().backward()
    assert torch.isfinite(image.grad).all()
    per_sample = image.grad.flatten(1).abs().sum(1)
    assert (per_sample > 0).all()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_forward_changes_neither_input_nor_buffers_nor_random_state(case):
    role, network, image = case
    given, random = image.clone(), torch.get_rng_state()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run(role, network, image)
    assert torch.equal(image, given)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_train_changes_no_bit(case):
    role, network, image = case
    expected = run(role, network, image)
    network.train()
    nn.Sequential(network).train()
    assert not any(module.training for module in network.modules())
    assert torch.equal(run(role, network, image), expected)


def test_batch_equals_its_singles(case):
    role, network, image = case
    singles = torch.cat([run(role, network, sample[None]) for sample in image])
    torch.testing.assert_close(run(role, network, image), singles, rtol=1e-4, atol=1e-5)


def test_name_is_the_cards(case, request):
    _, network, _ = case
    name = request.node.callspec.params["case"][1]
    assert network.name == (f"tiny-{case[0]}-0" if name == "tiny" else name)


@pytest.mark.parametrize("name", AUTOENCODERS)
@pytest.mark.parametrize("size", [(64, 64), (45, 51), (1, 9)])
def test_any_size_is_reconstructed_to_its_own_size(name, size, store):
    network = fetch("autoencoder", name, store)
    image = tiny.faces_image(1, size[0], width=size[1])
    rebuilt = network.reconstruct(image)
    assert rebuilt.shape == image.shape
    assert rebuilt.min() >= 0
    assert rebuilt.max() <= 1
    latent = network.encode(image)
    assert latent.shape[2:] == tuple(-(-side // network.multiple) for side in size)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_padding_does_not_touch_what_fits(name, store):
    network = fetch("autoencoder", name, store)
    image = tiny.faces_image(1, 4 * network.multiple)
    assert torch.equal(network.encode(image), network._encode(image))


@pytest.mark.parametrize("name", RECOGNIZERS)
def test_embeddings_have_unit_length_and_landmarks_lie_in_the_crop(name, store):
    network = fetch("recognizer", name, store)
    height, width = network.crop_size
    embedding = network.embed(tiny.faces_image(3, height, width=width))
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))
    assert network.template.shape == (5, 2)
    assert (network.template > 0).all()
    assert (network.template < torch.tensor([width, height])).all()
    # Eyes above nose above mouth, image-left before image-right.
    x, y = network.template.T
    assert max(y[0], y[1]) < y[2] < min(y[3], y[4])
    assert x[0] < x[2] < x[1]
    assert x[3] < x[4]


@pytest.mark.parametrize("name", RECOGNIZERS)
def test_feature_maps_go_from_fine_to_coarse(name, store):
    network = fetch("recognizer", name, store)
    height, width = network.crop_size
    maps = network.features(tiny.faces_image(1, height, width=width))
    sides = [features.shape[2] for features in maps]
    assert len(sides) >= 2
    assert sides == sorted(set(sides), reverse=True)


@pytest.mark.parametrize("name", PERCEPTUAL)
def test_distance_is_zero_for_equal_images_symmetric_and_grows(name, store):
    network = fetch("perceptual", name, store)
    image = tiny.faces_image(2, 75)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    near, far = ((image + scale * noise).clamp(0, 1) for scale in (0.02, 0.1))
    assert torch.equal(network(image, image), torch.zeros(2))
    torch.testing.assert_close(network(image, near), network(near, image))
    assert (network(image, far) > network(image, near)).all()
    assert (network(image, near) > 0).all()


# Ranges, against the foreign networks themselves


def test_kl_sees_signed_images_and_gives_the_posterior_mean(store):
    network = fetch("autoencoder", "small-kl", store)
    image = tiny.faces_image(1, 32)
    posterior = network.network.encode(2 * image - 1).latent_dist
    assert torch.equal(network.encode(image), posterior.mean)
    decoded = network.network.decode(posterior.mean).sample
    assert torch.equal(network.decode(posterior.mean), (decoded + 1) / 2)
    assert network.multiple == 4
    assert network.scaling == pytest.approx(0.18215)


def test_tiny_autoencoder_of_diffusers_sees_unsigned_images(store):
    network = fetch("autoencoder", "small-tiny", store)
    image = tiny.faces_image(1, 32)
    latent = network.network.encoder.layers(image)
    torch.testing.assert_close(network.encode(image), latent)
    decoded = network.network.decoder.layers(3 * torch.tanh(latent / 3))
    torch.testing.assert_close(network.decode(latent), decoded)


@pytest.mark.parametrize("name", ["random-mobilefacenet", "random-facenet"])
def test_recognizers_see_levels_around_the_middle(name, store):
    network = fetch("recognizer", name, store)
    height, width = network.crop_size
    face = tiny.faces_image(1, height, width=width)
    expected = network.network((face * 255 - 127.5) / 128)
    torch.testing.assert_close(network.embed(face), functional.normalize(expected))


def test_threshold_comes_from_the_card(store):
    assert fetch("recognizer", "random-mobilefacenet", store).threshold == 0.2
    assert fetch("recognizer", "small-face-embedder", store).threshold == 0.3
    assert fetch("recognizer", "random-facenet", store).threshold is None


def test_lpips_equals_the_package(store):
    network = fetch("perceptual", "random-lpips-squeeze", store)
    image, other = tiny.faces_image(2, 64), tiny.faces_image(2, 64, seed=1)
    expected = network.network(image, other, normalize=True).flatten()
    torch.testing.assert_close(network(image, other), expected)


def test_lpips_loads_every_weight_of_the_backbone(store):
    network = fetch("perceptual", "random-lpips-squeeze", store)
    state = torch.load(store.folder / "squeeze.pth", weights_only=True)
    ours = {
        f"features.{key.split('.', 1)[1]}": value
        for key, value in network.network.net.state_dict().items()
    }
    assert len(ours) == sum(key.startswith("features.") for key in state)
    for key, value in ours.items():
        assert torch.equal(value, state[key]), key


def test_lpips_gradient_is_finite_where_features_vanish():
    network = LpipsModel.untrained("squeeze")
    with torch.no_grad():  # a bias so low that every feature is cut off by the relu
        network.network.net.slice1[0].bias.fill_(-100)
    image = tiny.faces_image(1, 64).requires_grad_()
    network(image, tiny.faces_image(1, 64, seed=1)).sum().backward()
    assert torch.isfinite(image.grad).all()


def test_deep_features_are_the_mean_squared_gap_of_unit_features(store):
    network = fetch("perceptual", "features:random-mobilefacenet", store)
    image, other = tiny.faces_image(1, 64), tiny.faces_image(1, 64, seed=1)
    gaps = []
    for ours, theirs in zip(
        network.network.features(image), network.network.features(other), strict=True
    ):
        # |u - v|^2 = 2 - 2 cos for unit vectors
        gaps.append((2 - 2 * functional.cosine_similarity(ours, theirs, dim=1)).mean())
    torch.testing.assert_close(network(image, other), torch.stack(gaps).mean()[None])


def test_deep_features_need_a_network_that_has_some():
    with pytest.raises(WeightsError, match=r"tiny-autoencoder-0.*no feature maps"):
        DeepFeatures(tiny.autoencoder())


def test_stages_are_what_enters_each_halving_and_the_end():
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 1)
    )
    image = tiny.faces_image(1, 8)
    first, second = stages(layers, image)
    assert torch.equal(first, layers[0](image))
    assert torch.equal(second, layers[:3](image))


# Published sizes and layouts


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameter_counts_are_the_published_ones():
    network = Taef2()
    assert round(count(network.encoder) / 1e6, 2) == 1.34
    assert round(count(network.decoder) / 1e6, 2) == 1.34
    assert round(count(MobileFaceNet()) / 1e6, 1) == 1.0


@pytest.fixture(scope="module")
def whole_taef2():
    with tiny.seeded(4):
        return Taef2().eval()


def save_pair(network, folder):
    for half in ("encoder", "decoder"):
        torch.save(getattr(network, half).state_dict(), folder / f"taef2_{half}.pth")


@pytest.mark.parametrize("which", ["", "taef2_encoder.pth", "taef2_decoder.pth"])
def test_taef2_loads_the_published_pair(which, whole_taef2, tmp_path):
    save_pair(whole_taef2, tmp_path)
    path = tmp_path / which
    network = models.load("autoencoder", str(path), store=WeightStore(), device=CPU)
    image = tiny.faces_image(1, 32)
    assert torch.equal(network.encode(image), whole_taef2.encoder(image))
    assert torch.equal(network.decode(network.encode(image)), whole_taef2(image))
    assert network.name == path.name


def test_taef2_says_which_half_is_missing(whole_taef2, tmp_path):
    save_pair(whole_taef2, tmp_path)
    (tmp_path / "taef2_decoder.pth").unlink()
    for path in (tmp_path, tmp_path / "taef2_encoder.pth"):
        with pytest.raises(WeightsError, match="decoder"):
            models.load("autoencoder", str(path), store=WeightStore(), device=CPU)


def test_taef2_loads_the_layout_of_hugging_face(whole_taef2, tmp_path):
    renamed = {}
    for key, value in whole_taef2.state_dict().items():
        half, index, rest = key.split(".", 2)
        # There the clamp in front of the decoder is no layer, so its count starts one later.
        place = int(index) - (half == "decoder")
        renamed[f"{half}.layers.{place}.{rest}"] = value.contiguous()
    save_file(renamed, tmp_path / "hub.safetensors")
    write_card(tmp_path, "hub", "autoencoder", "taef2", file="hub.safetensors")
    network = models.load(
        "autoencoder", str(tmp_path / "hub.safetensors"), store=WeightStore(), device=CPU
    )
    image = tiny.faces_image(1, 32)
    assert torch.equal(network.encode(image), whole_taef2.encoder(image))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_half_precision_folder_is_loaded_in_float32(variant, tmp_path):
    vae = tiny.diffusion_parts()["vae"].half()
    vae.save_pretrained(tmp_path / "half", variant=variant)
    network = models.load("autoencoder", str(tmp_path / "half"), store=WeightStore(), device=CPU)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert torch.equal(network.network.decoder.conv_in.bias, vae.decoder.conv_in.bias.float())


def test_damaged_folder_is_a_clear_error(tmp_path):
    folder = tmp_path / "vae"
    tiny.diffusion_parts()["vae"].save_pretrained(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="vae cannot be loaded as AutoencoderKL"):
        models.load("autoencoder", str(folder), store=WeightStore(), device=CPU)


def test_folder_that_lacks_weights_of_the_network_is_refused(tmp_path):
    folder = tmp_path / "vae"
    vae = tiny.diffusion_parts()["vae"]
    vae.save_pretrained(folder)
    state = vae.state_dict()
    state.pop("decoder.conv_in.bias")
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"decoder\.conv_in\.bias"):
        models.load("autoencoder", str(folder), store=WeightStore(), device=CPU)


def test_folder_of_another_kind_of_network_names_those_known(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(WeightsError, match=r"UNet2DModel.*AutoencoderKL"):
        models.load("autoencoder", str(tmp_path), store=WeightStore(), device=CPU)


# load


def test_weights_that_do_not_fit_their_card_name_the_keys(store, tmp_path):
    save_file(MobileFaceNet().state_dict(), tmp_path / "wrong.safetensors")
    write_card(tmp_path, "wrong", "autoencoder", "taef2", file="wrong.safetensors")
    with pytest.raises(WeightsError, match=r"'wrong' do not fit Taef2: .*encoder\.0\.weight"):
        models.load("autoencoder", "wrong", store=WeightStore(tmp_path), device=CPU)


@pytest.mark.parametrize(
    ("role", "name", "kind", "said"),
    [
        ("autoencoder", "smal-taef2", UnknownName, "did you mean small-taef2"),
        ("autoencoder", "random-facenet", ConfigError, "has role 'recognizer'"),
        ("perceptual", "features:random-lpips-squeeze", ConfigError, "not a perceptual"),
        ("perceptual", "features:nothing", UnknownName, "no autoencoder is called 'nothing'"),
        ("autoencoder", "./nothing.safetensors", WeightsError, "no file or folder"),
        ("recognizer", "nobody/nothing", WeightsError, "no file or folder"),
        ("autoencoder", "nobody/nothing", WeightsError, "hf download nobody/nothing"),
        ("diffusion", "nobody/nothing", WeightsError, "cache of Hugging Face"),
        ("recognizer", "", UnknownName, "there are"),
        ("recogniser", "random-facenet", UnknownName, "did you mean recognizer"),
    ],
)
def test_what_cannot_be_found_says_what_to_do(role, name, kind, said, store):
    with pytest.raises(kind, match=said):
        models.load(role, name, store=store, device=CPU)


def test_detector_is_found_by_name(store):
    detector = models.load("detector", "mtcnn", store=store, device=CPU)
    assert isinstance(detector, Detector)
    with pytest.raises(UnknownName, match="did you mean mtcnn"):
        models.load("detector", "mtcn", store=store, device=CPU)


def test_file_is_loaded_by_path_with_its_card_beside_it(store):
    path = store.folder / "small-taef2.safetensors"
    for given in (path, path.with_suffix(".toml")):
        network = models.load("autoencoder", str(given), store=WeightStore(), device=CPU)
        assert network.name == "small-taef2"
    with pytest.raises(ConfigError, match="describes role 'autoencoder', needed"):
        models.load("recognizer", str(path), store=WeightStore(), device=CPU)


def test_file_without_a_card_says_how_to_write_one(store, tmp_path):
    path = tmp_path / "mystery.safetensors"
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match=r"mystery\.toml.*portrait-ae"):
        models.load("autoencoder", str(path), store=store, device=CPU)


# Real networks


def portraits(number: int, size: int) -> torch.Tensor:
    images = []
    for path in sorted((SHARED / "data" / "portraits").glob("*.jpg"))[:: 436 // number][:number]:
        photo = PILImage.open(path).convert("RGB")
        side = photo.width
        square = photo.crop((0, 0, side, side)).resize((size, size), PILImage.Resampling.LANCZOS)
        images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255)
    return torch.stack(images)


@needs_shared
def test_taef2_rebuilds_portraits_as_measured():
    store = WeightStore(SHARED / "weights")
    network = models.load("autoencoder", "taef2", store=store, device=CPU)
    image = portraits(4, 256)
    with torch.no_grad():
        error = (network.reconstruct(image) - image).square().mean((1, 2, 3))
    psnr = -10 * error.log10()
    assert psnr.mean() >= 33


def lfw(names: list[str]) -> list[torch.Tensor]:
    with tarfile.open(SHARED / "data" / "lfw-deepfunneled.tar") as archive:
        contents = {}
        for member in archive:  # one pass, not one for each name
            short = Path(member.name).stem
            if short in names:
                contents[short] = archive.extractfile(member).read()
            if len(contents) == len(names):
                break
    photos = [PILImage.open(io.BytesIO(contents[name])).convert("RGB") for name in names]
    return [torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255 for photo in photos]


def middle_landmarks(image: torch.Tensor) -> torch.Tensor:
    """Landmarks of the face nearest to the middle, straight from facenet-pytorch."""
    from facenet_pytorch import MTCNN

    pixels = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    boxes, scores, points = MTCNN(min_face_size=60).detect(pixels, landmarks=True)
    faces = [
        Face(box=tuple(box), landmarks=marks, score=float(score))
        for box, score, marks in zip(boxes.astype(float), scores, points.astype(float), strict=True)
    ]
    middle = np.array([125.0, 125.0])
    nearest = min(faces, key=lambda face: np.linalg.norm(face.landmarks.mean(0) - middle))
    return torch.from_numpy(nearest.landmarks).float()[None]


@needs_shared
def test_mobilefacenet_tells_people_apart():
    store = WeightStore(SHARED / "weights")
    network = models.load("recognizer", "mobilefacenet", store=store, device=CPU)
    people = ["Aaron_Peirsol", "Abdullah_Gul", "Adrien_Brody"]
    names = [f"{person}_000{index}" for person in people for index in (1, 2)]
    embeddings = []
    with torch.no_grad():
        for image in lfw(names):
            matrix = network.matrix(middle_landmarks(image), image)
            embeddings.append(network(image, matrix))
    similarity = torch.cat(embeddings) @ torch.cat(embeddings).T
    assert network.threshold == 0.205
    for row in range(len(names)):
        for column in range(row):
            same = row // 2 == column // 2
            assert (similarity[row, column] > network.threshold) == same, (row, column)


# The tracer looks at `.grad` of tensors that have none; nothing of ours does.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_accelerate_changes_speed_and_not_the_result() -> None:
    plain, compiled = tiny.autoencoder(), tiny.autoencoder()
    compiled.accelerate(backend="eager")
    image = tiny.faces_image(1, 32).requires_grad_(True)
    assert torch.allclose(compiled.reconstruct(image), plain.reconstruct(image), atol=1e-6)
    assert compiled._encode is not plain._encode
    (gradient,) = torch.autograd.grad(compiled.reconstruct(image).sum(), image)
    assert gradient.any()
