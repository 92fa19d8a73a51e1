"""pSp, StyleCLIP and SimSwap behind the contract, built from small checkouts laid out as theirs."""

from __future__ import annotations

import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch import Tensor, nn
from torch.nn import functional

from shields.errors import ConfigError, MissingPackage, UnknownName, WeightsError
from shields.models import load
from shields.models.checkouts import _first_on_path, import_from
from shields.models.inspection import inspect
from shields.models.manipulation import Manipulator
from shields.models.recipes import ARCFACE_CONVERSION, psp, simswap, styleclip
from shields.weights import WeightStore
from tests import checkouts

PSP_OPTIONS: dict[str, object] = {
    "encoder_type": "GradualStyleEncoder", "output_size": 512, "n_styles": 16, "input_nc": 3,
    "start_from_latent_avg": True, "learn_in_w": False, "device": "cuda:0", "exp_dir": "runs",
}  # fmt: skip
TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655),
            (70.7299, 92.2041))  # fmt: skip


def photo(path: Path, side: int, seed: int) -> Tensor:
    """Write a smooth photo and return it as an image."""
    rng = torch.Generator().manual_seed(seed)
    blotches = torch.rand(1, 3, 7, 7, generator=rng)
    pixels = (
        functional.interpolate(blotches, (side, side), mode="bicubic").clamp(0, 1) * 255
    ).byte()
    Pillow.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(path)
    return pixels.float() / 255


def faces(side: int = 256) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(9))


def assert_keeps_promises(manipulator: Manipulator) -> None:
    inspection = inspect(manipulator, size=96, rng=torch.Generator().manual_seed(0))
    # random networks leave [0, 1] more often than trained ones
    failed = [
        check for check in inspection.checks if not check.passed and "[0, 1]" not in check.name
    ]
    assert failed == []


@pytest.fixture
def psp_files(tmp_path: Path) -> tuple[str, str]:
    repository = checkouts.psp_checkout(tmp_path / "pixel2style2pixel")
    weights = checkouts.save_psp(tmp_path / "psp_ffhq_encode.pt", repository, PSP_OPTIONS)
    return str(repository), str(weights)


def decoded(network: nn.Module, codes: Tensor) -> Tensor:
    """By hand: no noise drawn, 512 pixels averaged to 256, [-1, 1] to [0, 1]."""
    picture = network.decoder([codes], input_is_latent=True, randomize_noise=False)[0]
    return (functional.avg_pool2d(picture, 2) + 1) / 2


def test_psp_encodes_from_the_mean_face_and_decodes_without_drawn_noise(
    psp_files: tuple[str, str],
) -> None:
    manipulator = psp(*psp_files)
    content = torch.load(psp_files[1], weights_only=True)
    network, image = manipulator.network, faces()
    codes = network.encoder(image * 2 - 1) + content["latent_avg"]
    torch.testing.assert_close(manipulator(image), decoded(network, codes))
    for part in ("encoder", "decoder"):
        for key, value in getattr(network, part).state_dict().items():
            assert torch.equal(value, content["state_dict"][f"{part}.{key}"])
    assert manipulator.name == "psp-recon"
    assert_keeps_promises(manipulator)


def test_psp_without_a_mean_face_in_its_options_adds_none(tmp_path: Path) -> None:
    repository = checkouts.psp_checkout(tmp_path / "psp")
    options = PSP_OPTIONS | {"start_from_latent_avg": False}
    weights = checkouts.save_psp(tmp_path / "a.pt", repository, options)
    manipulator, image = psp(str(repository), str(weights)), faces()
    codes = manipulator.network.encoder(image * 2 - 1)
    torch.testing.assert_close(manipulator(image), decoded(manipulator.network, codes))


def test_psp_mixes_the_fine_rows_of_a_second_photo(
    psp_files: tuple[str, str], tmp_path: Path
) -> None:
    other = photo(tmp_path / "other.png", 256, 4)
    manipulator = psp(*psp_files, mode="mix", other=str(tmp_path / "other.png"))
    network, image = manipulator.network, faces()
    own, given = network.codes(image * 2 - 1), network.codes(other * 2 - 1)
    mixed = own.clone()
    for row in range(8, 16):
        mixed[:, row] = 0.8 * given[:, row] + 0.2 * own[:, row]
    torch.testing.assert_close(manipulator(image), decoded(network, mixed))
    assert (decoded(network, mixed) - decoded(network, own)).abs().max() > 0.01
    # mixed with itself, a photo is only reconstructed
    torch.testing.assert_close(manipulator(other), psp(*psp_files)(other))
    assert_keeps_promises(manipulator)


def test_a_card_names_a_recipe_and_its_arguments(
    psp_files: tuple[str, str], tmp_path: Path
) -> None:
    cards = tmp_path / "cards"
    cards.mkdir()
    (cards / "my-psp.toml").write_text(
        'name = "my-psp"\nrole = "manipulator"\narchitecture = "shields.models.recipes:psp"\n'
        f'[config]\nrepository = "{psp_files[0]}"\nweights = "{psp_files[1]}"\n'
    )
    store = WeightStore(cards)
    image = faces()
    # twice: an import of the recipes must not stand in the way of the next look-up
    for _ in range(2):
        manipulator = load("manipulator", "my-psp", store=store, device=torch.device("cpu"))
        assert manipulator.name == "my-psp"
        assert torch.equal(manipulator(image), psp(*psp_files)(image))


@pytest.mark.parametrize(("mode", "other"), [("mix", ""), ("recon", "a.png"), ("blend", "")])
def test_psp_refuses_modes_that_make_no_sense(
    psp_files: tuple[str, str], mode: str, other: str
) -> None:
    with pytest.raises(ConfigError, match="with a second photo"):
        psp(*psp_files, mode=mode, other=other)  # type: ignore[arg-type]


def test_options_saved_as_a_namespace_are_read(tmp_path: Path) -> None:
    repository = checkouts.psp_checkout(tmp_path / "psp")
    weights = checkouts.save_psp(tmp_path / "a.pt", repository, Namespace(**PSP_OPTIONS))
    assert psp(str(repository), str(weights))(faces()).shape == (2, 3, 256, 256)
    assert Namespace not in torch.serialization.get_safe_globals()


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_weights_file_that_would_run_code_is_not_opened(tmp_path: Path) -> None:
    repository = checkouts.psp_checkout(tmp_path / "psp")
    options = PSP_OPTIONS | {"trap": Trap(tmp_path / "sprung")}
    weights = checkouts.save_psp(tmp_path / "a.pt", repository, options)
    with pytest.raises(WeightsError, match="is not opened"):
        psp(str(repository), str(weights))
    assert not (tmp_path / "sprung").exists()


def test_a_checkout_that_is_none_is_named_with_its_home(
    psp_files: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"holds no models/encoders/psp_encoders\.py.*git clone"):
        psp(str(tmp_path), psp_files[1])


def test_weights_that_are_absent_damaged_or_of_another_layout_are_refused(
    psp_files: tuple[str, str], tmp_path: Path
) -> None:
    repository, weights = psp_files
    with pytest.raises(WeightsError, match=r"no file .*README of https://github\.com/eladrich"):
        psp(repository, str(tmp_path / "absent.pt"))
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(Path(weights).read_bytes()[:5000])
    with pytest.raises(WeightsError, match="damaged"):
        psp(repository, str(damaged))
    content = torch.load(weights, weights_only=True)
    cases: list[tuple[dict[str, object], type[Exception], str]] = [
        (content["state_dict"], WeightsError, "must hold `state_dict` and `opts`"),
        ({**content, "latent_avg": None}, WeightsError, "lacks `latent_avg`"),
        ({**content, "latent_avg": "mean"}, WeightsError, "must hold"),
        ({**content, "opts": PSP_OPTIONS | {"encoder_type": "torch"}}, ConfigError, "no network"),
        ({**content, "opts": PSP_OPTIONS | {"n_styles": "x"}}, ConfigError, "cannot be built"),
    ]
    state = {key: value for key, value in content["state_dict"].items() if "to_rgb" not in key}
    cases.append(({**content, "state_dict": state}, WeightsError, "part decoder.*2 missing"))
    for wrong, error, said in cases:
        torch.save(wrong, tmp_path / "wrong.pt")
        with pytest.raises(error, match=said):
            psp(repository, str(tmp_path / "wrong.pt"))


def test_imports_leave_the_interpreter_as_it_was(
    psp_files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = ModuleType("models")
    monkeypatch.setitem(sys.modules, "models", mine)
    broken = "import sys\nsys.path.append('x')\n1 / 0\n"
    failing = checkouts.write(
        tmp_path / "failing", {"models/one.py": "import models.two\n", "models/two.py": broken}
    )
    before, places = set(sys.modules), list(sys.path)
    psp(*psp_files)
    with pytest.raises(ConfigError, match="division by zero"):
        import_from(str(failing), "home", "models.one")
    assert sys.modules["models"] is mine
    assert set(sys.modules) == before
    assert sys.path == places


def test_a_package_that_a_checkout_needs_is_named(tmp_path: Path) -> None:
    repository = checkouts.write(tmp_path, {"models/one.py": "import nonexistent_package_xyz\n"})
    with pytest.raises(MissingPackage, match="nonexistent_package_xyz"):
        import_from(str(repository), "home", "models.one")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which it would run")
def test_operators_that_want_a_gpu_say_so(tmp_path: Path) -> None:
    repository = checkouts.psp_checkout(tmp_path / "psp")
    weights = checkouts.save_psp(tmp_path / "a.pt", repository, PSP_OPTIONS)
    source = repository / "models/stylegan2/model.py"
    source.write_text(source.read_text().replace("self.to_rgb(out", "self.to_rgb(out.cuda()"))
    with pytest.raises(ConfigError, match=r"fails on the cpu .* ask for the device cuda"):
        psp(str(repository), str(weights))(faces())


@pytest.fixture
def styleclip_files(tmp_path: Path) -> tuple[str, dict[str, str], str, str]:
    e4e = checkouts.e4e_checkout(tmp_path / "encoder4editing")
    clip = checkouts.styleclip_checkout(tmp_path / "StyleCLIP")
    encoder = checkouts.build(
        e4e, "models.encoders.psp_encoders", "Encoder4Editing", 1, 50, "ir_se",
        Namespace(stylegan_size=512),
    )  # fmt: skip
    decoder = checkouts.build(clip, "models.stylegan2.model", "Generator", 2, 512, 512, 8)
    torch.save(
        {"state_dict": checkouts.parts(encoder=encoder, decoder=decoder),
         "latent_avg": torch.full((16, 512), 0.3),
         "opts": {"encoder_type": "Encoder4Editing", "stylegan_size": 512,
                  "start_from_latent_avg": True}},
        tmp_path / "e4e_ffhq_encode.pt",
    )  # fmt: skip
    edits = {}
    for seed, (name, no_fine) in enumerate([("afro", True), ("mohawk", False)], start=3):
        options = {"mapper_type": "LevelsMapper", "no_fine_mapper": no_fine,
                   "stylegan_size": 512, "work_in_stylespace": False}  # fmt: skip
        mapper = checkouts.build(
            clip, "mapper.latent_mappers", "LevelsMapper", seed, Namespace(**options)
        )
        edits[name] = str(tmp_path / f"{name}.pt")
        state = checkouts.parts(mapper=mapper, decoder=decoder)
        torch.save({"state_dict": state, "opts": options}, edits[name])
    return str(clip), edits, str(e4e), str(tmp_path / "e4e_ffhq_encode.pt")


def test_styleclip_moves_the_codes_a_tenth_of_what_the_mapper_says(
    styleclip_files: tuple[str, dict[str, str], str, str],
) -> None:
    manipulator = styleclip(*styleclip_files)
    assert manipulator.conditions == ("afro", "mohawk")
    network, image = manipulator.network, faces()
    codes = network.encoder(image * 2 - 1) + 0.3
    for index, name in enumerate(manipulator.conditions):
        edited = codes + 0.1 * network.mappers[index](codes)
        torch.testing.assert_close(manipulator(image, name), decoded(network, edited))
    assert not torch.equal(manipulator(image, "afro"), manipulator(image, "mohawk"))
    assert torch.equal(manipulator(image), manipulator(image, "afro"))
    with pytest.raises(UnknownName, match="did you mean mohawk"):
        manipulator(image, "mohawks")
    assert_keeps_promises(manipulator)


def test_styleclip_refuses_no_edits_and_edits_of_style_space(
    styleclip_files: tuple[str, dict[str, str], str, str],
) -> None:
    clip, edits, e4e, weights = styleclip_files
    with pytest.raises(ConfigError, match="at least one edit"):
        styleclip(clip, {}, e4e, weights)
    content = torch.load(edits["afro"], weights_only=True)
    content["opts"]["work_in_stylespace"] = True
    torch.save(content, edits["afro"])
    with pytest.raises(ConfigError, match="edits StyleSpace"):
        styleclip(clip, edits, e4e, weights)


def arcface_weights(repository: Path, path: Path) -> nn.Module:
    """The identity network and its state dict, as the conversion leaves it."""
    (module,) = import_from(str(repository), "home", "models.arcface_models")
    module.conv3x3 = lambda i, o, stride=1: nn.Conv2d(i, o, 3, stride, 1, bias=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network: nn.Module = module.ResNet(module.IRBlock, [3, 4, 23, 3])
    torch.save(network.state_dict(), path)
    return network.eval()


@pytest.fixture
def simswap_files(tmp_path: Path) -> tuple[str, str, str]:
    repository = checkouts.simswap_checkout(tmp_path / "SimSwap")
    generator = checkouts.build(
        repository, "models.fs_networks", "Generator_Adain_Upsample", 6, 3, 3, 512, 9
    )
    torch.save(generator.state_dict(), tmp_path / "latest_net_G.pth")
    arcface_weights(repository, tmp_path / "arcface.pth")
    return str(repository), str(tmp_path / "latest_net_G.pth"), str(tmp_path / "arcface.pth")


def unit_identity(arcface: nn.Module, crop: Tensor) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    vector = arcface((crop - mean) / deviation).detach()
    return vector / vector.norm()


def test_simswap_gives_the_photo_the_identity_of_the_source(
    simswap_files: tuple[str, str, str], tmp_path: Path
) -> None:
    crop = photo(tmp_path / "source.png", 112, 7)
    manipulator = simswap(*simswap_files, str(tmp_path / "source.png"))
    arcface = arcface_weights(Path(simswap_files[0]), tmp_path / "arcface.pth")
    network, image = manipulator.network, faces(224)
    torch.testing.assert_close(network.identity, unit_identity(arcface, crop), atol=1e-5, rtol=0)
    expected = network.generator(image, network.identity.expand(2, -1))
    torch.testing.assert_close(manipulator(image), expected)
    assert not any(module.training for module in manipulator.modules())
    assert_keeps_promises(manipulator)


def test_simswap_aligns_the_source_by_landmarks(
    simswap_files: tuple[str, str, str], tmp_path: Path
) -> None:
    crop = photo(tmp_path / "crop.png", 112, 7)
    canvas = np.full((200, 220, 3), 90, np.uint8)
    canvas[40:152, 30:142] = (crop[0].permute(1, 2, 0) * 255).round().byte().numpy()
    Pillow.fromarray(canvas).save(tmp_path / "wide.png")
    points = [(x + 30, y + 40) for x, y in TEMPLATE]
    aligned = simswap(*simswap_files, str(tmp_path / "wide.png"), landmarks=points)
    squeezed = simswap(*simswap_files, str(tmp_path / "wide.png"))
    cropped = simswap(*simswap_files, str(tmp_path / "crop.png"))
    wanted = cropped.network.identity
    torch.testing.assert_close(aligned.network.identity, wanted, atol=1e-3, rtol=0)
    assert (squeezed.network.identity - wanted).abs().max() > 0.01
    with pytest.raises(ConfigError, match="five pairs"):
        simswap(*simswap_files, str(tmp_path / "wide.png"), landmarks=points[:3])


def test_the_published_pickle_is_refused_and_its_conversion_works(
    simswap_files: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, generator, converted = simswap_files
    photo(tmp_path / "source.png", 112, 7)
    monkeypatch.chdir(repository)
    with _first_on_path(Path(repository)):
        arcface = import_module("models.arcface_models")
        vars(arcface)["conv3x3"] = lambda i, o, s=1: nn.Conv2d(i, o, 3, s, 1, bias=False)
        with torch.random.fork_rng(devices=[]):
            network = arcface.ResNet(arcface.IRBlock, [3, 4, 23, 3])
        network.load_state_dict(torch.load(converted, weights_only=True))
        torch.save({"model": nn.DataParallel(network)}, "arcface_checkpoint.tar")
        exec(ARCFACE_CONVERSION, {})
    pickled = f"{repository}/arcface_checkpoint.tar"
    with pytest.raises(WeightsError, match=r"pickled module.*python -c"):
        simswap(repository, generator, pickled, str(tmp_path / "source.png"))
    source = str(tmp_path / "source.png")
    made = simswap(repository, generator, f"{repository}/arcface.pth", source)
    assert torch.equal(made.network.identity, simswap(*simswap_files, source).network.identity)


def test_simswap_refuses_a_size_without_a_model(simswap_files: tuple[str, str, str]) -> None:
    with pytest.raises(ConfigError, match="224 or 512, got 256"):
        simswap(*simswap_files, "source.png", size=256)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"holds no models/fs_networks_512\.py"):
        simswap(*simswap_files, "source.png", size=512)
