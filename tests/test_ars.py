"""The generator of ARS, the contract of generators, and the protector that runs one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from shields.errors import ConfigError, WeightsError
from shields.models.ars_network import SCALES, ArsGenerator, UNet
from shields.models.generators import ArsModel, Generator
from shields.models.manipulation import resized
from shields.protectors.learned import Ars, ArsConfig
from shields.weights import Card
from tests import tiny

TINY = {"widths": (8, 8, 16), "encoder": (4, 8), "channels": 8}


def network(seed: int = 0, **settings: object) -> ArsGenerator:
    with tiny.seeded(seed):
        return ArsGenerator(**(TINY | settings))


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def saved(folder, built: ArsGenerator, config: dict[str, object]) -> tuple:
    path = folder / "tiny.safetensors"
    save_file(built.state_dict(), path)
    card = Card(
        name="tiny", role="generator", architecture="ars", file=path.name, config=config
    )  # fmt: skip
    return path, card


class TestNetwork:
    def test_the_papers_unet_has_the_published_size(self) -> None:
        """Ronneberger's widths: 31.38 M, counted here layer by layer."""
        widths = (64, 128, 256, 512, 1024)
        count, before = 0, 3
        for width in widths:
            count += 9 * width * (before + width) + 4 * width
            before = width
        for fine, coarse in zip(widths[-2::-1], widths[:0:-1], strict=True):
            count += 9 * fine * (coarse + fine + fine) + 4 * fine
        count += 3 * 64 + 3
        with torch.device("meta"):
            built = UNet(3, 3, widths)
        assert sum(value.numel() for value in built.parameters()) == count

    def test_the_small_one_fits_into_six_megabytes(self, tmp_path) -> None:
        state = ArsGenerator(**SCALES["small"]).state_dict()
        save_file({name: value.half() for name, value in state.items()}, tmp_path / "small")
        assert (tmp_path / "small").stat().st_size < 6e6

    def test_the_paper_scale_has_three_large_unets(self) -> None:
        with torch.device("meta"):
            built = ArsGenerator(**SCALES["paper"])
        assert built.stage2.maps.in_channels + built.stage2.vector.in_channels == 2 * 128 + 3
        assert 90e6 < sum(value.numel() for value in built.parameters()) < 100e6

    def test_fusion_equals_a_layer_on_the_tiled_concatenation(self) -> None:
        """Eq. 6 taken literally: repeat n at every place, concatenate, convolve."""
        fusion = network().stage2
        generator = rng()
        features, basic = (torch.randn(2, count, 8, 12, generator=generator) for count in (8, 3))
        vector = torch.randn(2, 8, 1, 1, generator=generator)
        tiled = torch.cat([features, vector.expand(2, 8, 8, 12), basic], dim=1)
        weight = torch.cat(
            [fusion.maps.weight[:, :8], fusion.vector.weight, fusion.maps.weight[:, 8:]], dim=1
        )
        wanted = fusion.unet(torch.relu(functional.conv2d(tiled, weight, fusion.maps.bias)))
        torch.testing.assert_close(fusion(features, vector, basic), wanted)

    def test_the_embedding_knows_no_places(self) -> None:
        """1 x 1 x C whatever the size of the perturbation."""
        encoder = network().encoder
        assert encoder(torch.randn(2, 3, 16, 40)).shape == (2, 8, 1, 1)

    @pytest.mark.parametrize("bound", ["tanh", "clip"])
    def test_both_ways_stay_inside_the_budget(self, bound: str) -> None:
        built = network(bound=bound)
        with torch.no_grad():
            for last in (built.basic.last, built.stage2.unet.last):
                last.weight.mul_(100)
        basic, final = built(tiny.faces_image(2, 32), 6.0)
        for made in (basic, final):
            assert made.abs().max() <= 6 / 255 + 1e-7
            assert made.abs().max() > 5.9 / 255

    def test_clip_has_no_gradient_outside_and_tanh_has(self) -> None:
        raw = torch.tensor([0.5, 3.0], requires_grad=True)
        for bound, wanted in (("clip", [1.0, 0.0]), ("tanh", [0.7864, 0.0099])):
            made = network(bound=bound)._bounded(raw)
            (gradient,) = torch.autograd.grad(made.sum(), raw)
            torch.testing.assert_close(gradient, torch.tensor(wanted), atol=1e-4, rtol=0)

    def test_basic_alone_has_one_way(self) -> None:
        built = network(two_way=False)
        basic, final = built(tiny.faces_image(1, 16), 8.0)
        assert basic is final or torch.equal(basic, final)
        assert not any(key.startswith("stage") for key in built.state_dict())
        with pytest.raises(ValueError, match="no robust"):
            built.robust(tiny.faces_image(1, 16), basic, 8.0)

    def test_a_network_that_is_told_its_budget_answers_to_it(self) -> None:
        told, not_told = network(budgets=(4.0, 8.0), levels=8.0), network(levels=8.0)
        face = tiny.faces_image(1, 16)
        assert torch.equal(not_told.shape(face, 4.0), not_told.shape(face, 8.0))
        assert not torch.equal(told.shape(face, 4.0), told.shape(face, 8.0))
        # What it does not know is rounded to what it does.
        assert torch.equal(told.shape(face, 20.0), told.shape(face, 8.0))
        assert torch.equal(told.shape(face, 1.0), told.shape(face, 4.0))

    @pytest.mark.parametrize("settings", [{"bound": "no"}, {"budgets": (4.0, 8.0)}])
    def test_settings_that_contradict_are_refused(self, settings: dict[str, object]) -> None:
        with pytest.raises(ValueError, match="must be"):
            network(**settings)


class TestContract:
    @pytest.mark.parametrize("size", [(32, 32), (40, 24), (9, 70)])
    def test_any_size_comes_back(self, size: tuple[int, int]) -> None:
        image = tiny.faces_image(2, size[0], width=size[1])
        made = ArsModel(network()).perturb(image, levels=8, rng=rng())
        assert made.shape == image.shape
        assert made.dtype == torch.float32
        assert 0 < made.abs().max() <= 8 / 255

    def test_the_network_sees_multiples_and_the_border_repeated(self) -> None:
        seen = []

        class Echo(Generator):
            levels = 8.0

            def _generate(self, image: Tensor, levels: float, rng: torch.Generator) -> Tensor:
                seen.append(image)
                return image

        image = tiny.faces_image(1, 40)
        made = Echo().perturb(image, levels=51, rng=rng())
        assert seen[0].shape == (1, 3, 64, 64)
        assert torch.equal(seen[0][..., 50, :40], image[..., 39, :])
        assert torch.equal(made, image.clamp(-0.2, 0.2)), "and no network may leave the budget"

    def test_an_untold_network_is_scaled_to_any_budget(self) -> None:
        model, image = ArsModel(network(levels=8.0)), tiny.faces_image(1, 32)
        four, sixteen = (model.perturb(image, levels=n, rng=rng()) for n in (4, 16))
        torch.testing.assert_close(4 * four, sixteen)
        assert (model.perturb(image, levels=0, rng=rng()) == 0).all()
        assert model.levels == 8.0

    def test_neighbours_do_not_matter(self) -> None:
        model, image = ArsModel(network()), tiny.faces_image(3, 32)
        together = model.perturb(image, levels=8, rng=rng())
        alone = model.perturb(image[1:2], levels=8, rng=rng())
        torch.testing.assert_close(together[1:2], alone, atol=1e-6, rtol=0)

    def test_saved_and_loaded_it_makes_the_same(self, tmp_path) -> None:
        settings = json.loads(json.dumps(TINY | {"levels": 6.375, "two_way": True}))
        built = network(levels=6.375)
        model = ArsModel.load(*saved(tmp_path, built, settings))
        image = tiny.faces_image(1, 32)
        assert torch.equal(
            model.perturb(image, levels=6, rng=rng()),
            ArsModel(built).perturb(image, levels=6, rng=rng()),
        )
        assert model.levels == 6.375
        assert not any(value.requires_grad for value in model.parameters())

    @pytest.mark.parametrize(
        ("config", "message"),
        [(TINY | {"channels": 16}, "do not fit"), (TINY | {"bound": "no"}, "cannot be built"),
         ({"width": 8}, "cannot be built")],
    )  # fmt: skip
    def test_cards_that_do_not_fit_are_refused(self, tmp_path, config, message: str) -> None:
        with pytest.raises(WeightsError, match=message):
            ArsModel.load(*saved(tmp_path, network(), config))


class TestProtector:
    def test_it_is_one_forward_pass_inside_mask_and_range(self) -> None:
        model, image = ArsModel(network()), tiny.faces_image(2, 40)
        image[:, :, :4] = 0
        mask = torch.zeros(2, 1, 40, 40)
        mask[..., 10:] = 0.5
        made = Ars(ArsConfig(levels=8), generator=model)(image, mask, rng=rng())
        assert (made[..., :10] == 0).all()
        assert made.abs().max() <= 4 / 255 + 1e-7
        assert (image + made).min() >= 0
        free = model.perturb(image, levels=8, rng=rng())
        limit = 4 / 255
        inside = torch.maximum(free.clamp(-limit, limit), -image)[..., 10:]
        torch.testing.assert_close(made[..., 10:], inside)

    def test_presets_are_the_papers_budgets(self) -> None:
        assert ArsConfig() == ArsConfig.paper() == ArsConfig(levels=255 * 0.1 / 2)
        assert ArsConfig.visible().levels == pytest.approx(255 * 0.3 / 2)

    def test_what_makes_no_sense_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r'`norm` must be "linf", got \'l2\''):
            ArsConfig(norm="l2")
        with pytest.raises(ConfigError, match="generator"):
            Ars()

    def test_it_reports_no_objective_that_it_cannot_know(self) -> None:
        image = tiny.faces_image(1, 32)
        protector = Ars(generator=ArsModel(network()))
        assert protector.evaluate(image, image, torch.ones(1, 1, 32, 32)) is None


def test_a_large_photo_is_seen_at_the_side_that_was_trained_on() -> None:
    with tiny.seeded(0):
        network = ArsGenerator((4, 8), (4, 4), 8, side=32)
    image = tiny.faces_image(1, 64)
    small = resized(image, (32, 32))
    for made, wanted in zip(network(image, 8.0), network(small, 8.0), strict=True):
        assert torch.equal(made, resized(wanted, (64, 64)))
    # Small ones are seen as they are.
    network.side = 0
    unbound = network(small, 8.0)[1]
    network.side = 32
    assert torch.equal(network(small, 8.0)[1], unbound)
