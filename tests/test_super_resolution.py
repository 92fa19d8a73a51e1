"""Networks that restore photos: recognised, tiled, aligned; each against another way there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from spandrel import ImageModelDescriptor, ModelLoader
from spandrel.architectures.Compact import Compact, CompactArch
from spandrel.architectures.GFPGAN import GFPGAN, GFPGANArch
from spandrel.architectures.RestoreFormer import RestoreFormer
from torch import nn

from robustness.attacks import parse
from robustness.purifiers.super_resolution import (
    SuperResolution,
    SuperResolutionConfig,
    compressed,
    enlarged,
    load_restorer,
)
from shields.errors import ConfigError, UnknownName, WeightsError
from shields.models.restoration import CompactRestorer
from shields.models.super_resolution import FaceRestorer, SpandrelRestorer
from shields.types import Face, Photo
from shields.weights import WeightStore
from tests import tiny
from tests.cards import write_card

CPU = torch.device("cpu")
#: of facexlib's aligned faces
FFHQ = [[192.98138, 239.94708], [318.90277, 240.1936], [256.63416, 314.01935],
        [201.26117, 371.41043], [313.08905, 371.15118]]  # fmt: skip


def compact(scale=2, seed=0):
    """A small network in the layout of the one that ships."""
    with tiny.seeded(seed):
        return Compact(num_feat=8, num_conv=2, upscale=scale)


def restorer(scale=2, seed=0):
    return SpandrelRestorer(ModelLoader().load_from_state_dict(compact(scale, seed).state_dict()))


def identity():
    """A network that gives back what it gets: the photo, and nothing added to it."""
    network = compact(1)
    nn.init.zeros_(network.body[-1].weight)
    nn.init.zeros_(network.body[-1].bias)
    return SpandrelRestorer(ModelLoader().load_from_state_dict(network.state_dict()))


class Flip(nn.Module):
    """1 - x by a convolution; keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        nn.init.zeros_(self.layer.weight)
        self.layer.weight.data[range(3), range(3)] = -1
        nn.init.ones_(self.layer.bias)

    def forward(self, image):
        self.seen = image.detach()
        return self.layer(image)


def face_restorer(model=None):
    model = Flip() if model is None else model
    return FaceRestorer(
        ImageModelDescriptor(
            model, model.state_dict(), CompactArch(), "FaceSR", [], False, False, 1, 3, 3
        )
    )


class Finder:
    """A detector of faces that stand where they stand, in every photo or in the first ones."""

    def __init__(self, *faces):
        self.faces = faces

    def detect_batch(self, images):
        return [list(found) for _, found in zip(images, self.faces, strict=False)]


def face(size=64, seed=0, stretch=1.0, shift=(0.0, 0.0)):
    """A face with landmarks in the middle of a square photo."""
    points = (tiny.landmarks(1, size, seed)[0].numpy() - size / 2) * stretch + size / 2
    points = points + np.array(shift)
    (left, top), (right, bottom) = points.min(0), points.max(0)
    wide = right - left
    box = (left - wide / 2, top - wide / 2, right + wide / 2, bottom + wide / 2)
    return Face(box=box, landmarks=points.astype(np.float32), score=1.0)


@pytest.fixture
def weights(tmp_path):
    """Cards and files as publishers have them."""
    state = compact().state_dict()
    save_file(state, tmp_path / "bare.safetensors")
    torch.save({"params_ema": state, "params": compact(seed=1).state_dict()}, tmp_path / "ema.pth")
    write_card(tmp_path, "small-sr", "purifier", "spandrel", file="bare.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", ["small-sr", "bare.safetensors", "ema.pth"])
def test_a_network_is_recognised_by_its_weights_however_it_was_published(weights, name) -> None:
    asked = name if name == "small-sr" else str(weights / name)
    network = load_restorer(asked, store=WeightStore(weights), device=CPU)
    image = tiny.faces_image(1, 24)
    torch.testing.assert_close(network.restore(image), compact()(image).clamp(0, 1))
    assert (network.scale, network.name) == (2, Path(name).stem)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_layout_that_ships_is_spandrels_too(tmp_path) -> None:
    """One file, loaded as our own and as anybody's."""
    save_file(compact().state_dict(), tmp_path / "own.safetensors")
    write_card(
        tmp_path, "own", "purifier", "compact", file="own.safetensors",
        extra="[config]\nscale = 2\nfeatures = 8\nconvolutions = 2\n",
    )  # fmt: skip
    save_file(compact().state_dict(), tmp_path / "bare.safetensors")
    store, image = WeightStore(tmp_path), tiny.faces_image(1, 24)
    own = load_restorer("own", store=store, device=CPU)
    assert isinstance(own, CompactRestorer)
    foreign = load_restorer(str(tmp_path / "bare.safetensors"), store=store, device=CPU)
    assert isinstance(foreign, SpandrelRestorer)
    torch.testing.assert_close(
        enlarged(own, image, (24, 24)), enlarged(foreign, image, (24, 24)), rtol=0, atol=1e-6
    )


def test_a_restorer_of_faces_is_told_from_one_of_photos(tmp_path) -> None:
    with tiny.seeded(0):
        network = RestoreFormer(
            n_embed=4, embed_dim=32, ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(),
            resolution=32, z_channels=32, enable_mid=False, head_size=1, dropout=0.0, in_channels=3,
            out_ch=3, double_z=False,
        )  # fmt: skip
    save_file(network.state_dict(), tmp_path / "faces.safetensors")
    path = str(tmp_path / "faces.safetensors")
    loaded = load_restorer(path, store=WeightStore(tmp_path), device=CPU)
    assert isinstance(loaded, FaceRestorer)
    with pytest.raises(ConfigError, match="needs a detector"):
        SuperResolution(network=loaded)
    with pytest.raises(ConfigError, match="aligned faces"):
        enlarged(loaded, tiny.faces_image(1, 16), (16, 16))


def damaged(folder, kind):
    state = compact().state_dict()
    if kind == "foreign":
        save_file({"some.weight": torch.zeros(2)}, folder / "x.safetensors")
    elif kind == "short":
        save_file({k: v for k, v in state.items() if k != "body.2.bias"}, folder / "x.safetensors")
    elif kind == "grey":
        save_file(Compact(num_in_ch=1, num_out_ch=1, num_feat=8, num_conv=1).state_dict(),
                  folder / "x.safetensors")  # fmt: skip
    elif kind == "cut off":
        save_file(state, folder / "x.safetensors")
        path = folder / "x.safetensors"
        path.write_bytes(path.read_bytes()[:-40])
    return str(folder / "x.safetensors")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("foreign", "no network that spandrel knows.*some.weight"),
        ("short", "do not fit.*body.2.bias"),
        ("grey", "1 channels"),
        ("cut off", "damaged"),
        ("absent", "there is no weights file"),
    ],
)
def test_a_wrong_checkpoint_is_refused_in_one_line(tmp_path, kind, words) -> None:
    with pytest.raises(WeightsError, match=words) as raised:
        load_restorer(damaged(tmp_path, kind), store=WeightStore(tmp_path), device=CPU)
    assert "\n" not in str(raised.value)


def test_a_wrong_name_is_refused_with_a_hint(weights) -> None:
    store = WeightStore(weights)
    with pytest.raises(UnknownName, match="did you mean small-sr"):
        load_restorer("smal-sr", store=store, device=CPU)
    with pytest.raises(ConfigError, match="role 'autoencoder'"):
        load_restorer("portrait-ae", store=store, device=CPU)


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("size", [(150, 290), (200, 131)])
def test_tiles_give_what_the_whole_photo_gives(scale, size) -> None:
    network = restorer(scale)
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    for wanted in (size, (2 * size[0], 2 * size[1])):
        with torch.no_grad():
            whole = enlarged(network, image, wanted, tile=4096)
            tiled = enlarged(network, image, wanted, tile=128, batch=3)
        torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


def test_at_its_own_scale_the_network_alone_decides() -> None:
    image = tiny.faces_image(2, 21, width=30)
    with torch.no_grad():
        made = enlarged(restorer(), image, (42, 60))
    torch.testing.assert_close(made, compact()(image).clamp(0, 1))


def test_gradients_pass_tiles_as_they_pass_the_whole() -> None:
    image = tiny.faces_image(1, 140, width=150).requires_grad_(True)
    gradients = []
    for tile in (128, 4096):
        made = enlarged(restorer(), image, (140, 150), tile=tile)
        gradients += torch.autograd.grad(made.square().sum(), image)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert float(gradients[0].abs().max()) > 0


@pytest.mark.parametrize(("height", "width"), [(40, 66), (33, 47)])
def test_shrinking_and_compressing_is_the_real_thing(height, width) -> None:
    pixels = (tiny.faces_image(1, height, width=width) * 255).byte()[0].permute(1, 2, 0).numpy()
    small = (height // 2, width // 2)
    ours = compressed(Photo(pixels=pixels).image(), 75, small)[0] * 255
    expected = parse("cr:75").apply(pixels)
    assert expected.shape[:2] == small
    assert np.abs(ours.permute(1, 2, 0).numpy().round() - expected).max() <= 1


CASES = {
    "as it is": SuperResolution(network=restorer()),
    "small first": SuperResolution(
        SuperResolutionConfig(quality=60, scale=0.5), network=restorer()
    ),
    "in tiles": SuperResolution(SuperResolutionConfig(tile=128, batch=2), network=restorer(4)),
    "faces": SuperResolution(network=face_restorer(), finder=Finder([face()], [face()])),
}


@pytest.mark.parametrize("name", CASES)
def test_contract(name) -> None:
    image = tiny.faces_image(2, 135 if name == "in tiles" else 61, width=160)
    kept, state = image.clone(), torch.get_rng_state()
    with torch.no_grad():
        result = CASES[name].purify(image)
        assert torch.equal(result, CASES[name].purify(image, seed=3))
        singles = torch.cat([CASES[name].purify(one[None]) for one in image])
    assert result.shape == image.shape
    assert 0 <= float(result.min()) <= float(result.max()) <= 1
    assert not torch.allclose(result, image, atol=1e-3)
    torch.testing.assert_close(result, singles, rtol=0, atol=1e-5)
    assert torch.equal(image, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_faces_are_aligned_as_opencv_aligns_them_to_ffhqs_points() -> None:
    cv2 = pytest.importorskip("cv2")
    network, found = face_restorer(), face(200, stretch=0.9)
    image = tiny.faces_image(1, 200)
    network.paste(image, [[found]])
    matrix, _ = cv2.estimateAffinePartial2D(found.landmarks, np.array(FFHQ), method=cv2.LMEDS)
    beyond = (135 / 255, 133 / 255, 132 / 255)
    pixels = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    expected = cv2.warpAffine(pixels, matrix, (512, 512), borderValue=beyond)
    seen = network.network.seen[0].permute(1, 2, 0).numpy()
    # OpenCV fits robustly and looks pixels up in steps of a 32nd.
    assert np.abs(seen - expected).mean() < 0.01
    assert np.abs(seen[200:380, 180:330] - expected[200:380, 180:330]).max() < 0.02


@pytest.mark.parametrize("stretch", [0.4, 1.0, 1.4])
def test_a_restored_face_is_put_back_where_it_was_with_a_soft_edge(stretch) -> None:
    image = tiny.faces_image(2, 128)
    found = face(128, stretch=stretch)
    pasted = face_restorer().paste(image, [[], [found]])
    assert torch.equal(pasted[0], image[0])
    x, y = found.landmarks[2].round().astype(int)
    torch.testing.assert_close(pasted[1, :, y, x], 1 - image[1, :, y, x], rtol=0, atol=0.02)
    change = (pasted[1] - image[1]).abs().amax(0)
    if stretch == 0.4:
        assert float(change[:, 0].max()) == 0
        steps = (change[:, 1:] - change[:, :-1]).abs().max()
        assert float(steps) < 0.5 * float(change.max()), "a hard edge"


def test_a_face_beyond_the_photo_changes_nothing() -> None:
    image = tiny.faces_image(1, 64)
    assert torch.equal(face_restorer().paste(image, [[face(shift=(900.0, 0.0))]]), image)


def test_gradients_pass_through_a_restored_face() -> None:
    image = tiny.faces_image(1, 64).requires_grad_(True)
    pasted = face_restorer().paste(image, [[face(stretch=0.5)]])
    (gradient,) = torch.autograd.grad(pasted.sum(), image)
    middle = tuple(face(stretch=0.5).landmarks[2].round().astype(int)[::-1])
    assert float(gradient[0, 0, middle[0], middle[1]]) == pytest.approx(-1, abs=0.05)
    assert float(gradient[0, 0, 0, 0]) == pytest.approx(1, abs=0.05)


def test_gfpgan_gets_its_range_and_repeats_itself() -> None:
    with tiny.seeded(0):
        network = GFPGAN(out_size=32, num_style_feat=16, channel_multiplier=1, narrow=1 / 16)
        for name, parameter in network.named_parameters():
            if name.startswith("stylegan_decoder.style_conv") and parameter.numel() == 1:
                parameter.data.fill_(0.5)  # of the noise, which a fresh network leaves out
    state = network.state_dict()
    descriptor = ImageModelDescriptor(
        network, state, GFPGANArch(), "FaceSR", [], False, True, 1, 3, 3
    )
    image = tiny.faces_image(2, 32)
    with torch.no_grad():
        made = FaceRestorer(descriptor).restore(image)
        again = FaceRestorer(descriptor).restore(image)
        expected = (network(2 * image - 1, randomize_noise=False)[0] + 1) / 2
        drawn = (network(2 * image - 1)[0] + 1) / 2
    assert torch.equal(made, again)
    torch.testing.assert_close(made, expected.clamp(0, 1))
    assert not torch.allclose(expected, drawn, atol=1e-3)


def test_a_photo_without_a_face_comes_back_from_a_face_restorer() -> None:
    image = tiny.faces_image(1, 48)
    result = SuperResolution(network=face_restorer(), finder=Finder([])).purify(image)
    torch.testing.assert_close(result, image, rtol=0, atol=0.51 / 255)
