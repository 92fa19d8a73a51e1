"""What may happen to photos while ARS trains, against independent computations."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.fft import dctn, idctn

from shields.jpeg import real_jpeg
from shields.transforms import parse
from tests import tiny
from trainers.ars_perturbation import AdvNet, CleanDrop, MaskedDct, PerturbationModule

ZIGZAG = [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0)]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestPerturbationModule:
    def test_drop_takes_whole_pixels_from_one_of_the_two(self) -> None:
        clean, protected = torch.zeros(2, 3, 50, 50), torch.ones(2, 3, 50, 50)
        mixed = CleanDrop(keep=0.7)(protected, clean, rng())
        assert torch.equal(mixed, mixed[:, :1].expand_as(mixed))
        assert set(mixed.unique().tolist()) == {0.0, 1.0}
        assert mixed.mean() == pytest.approx(0.7, abs=0.03)
        assert not torch.equal(mixed[0], mixed[1]), "every photo has a mask of its own"

    @pytest.mark.parametrize("kept", [1, 3, 10])
    def test_masked_dct_equals_scipy_on_grey(self, kept: int) -> None:
        block = tiny.faces_image(1, 8)[:, :1]
        coefficients = dctn(block[0, 0].numpy(), norm="ortho")
        mask = torch.zeros(8, 8)
        for place in ZIGZAG[:kept]:
            mask[place] = 1
        wanted = torch.from_numpy(idctn(coefficients * mask.numpy(), norm="ortho"))
        found = MaskedDct().apply(block.expand(1, 3, 8, 8), luma=kept, chroma=1)
        torch.testing.assert_close(found[0, 1], wanted.float(), atol=2e-5, rtol=0)

    def test_masked_dct_loses_colour_by_its_own_count(self) -> None:
        image = tiny.faces_image(1, 21, width=30)
        everything = MaskedDct().apply(image, luma=64, chroma=64)
        torch.testing.assert_close(everything, image, atol=1e-5, rtol=0)
        luma = torch.tensor([0.299, 0.587, 0.114])
        found = 0.4 + 0.2 * MaskedDct().apply(image, luma=64, chroma=1)
        brightness = torch.einsum("c,bcyx->byx", luma, found)
        wanted = torch.einsum("c,bcyx->byx", luma, 0.4 + 0.2 * image)
        torch.testing.assert_close(brightness, wanted, atol=2e-2, rtol=0)
        assert (found - (0.4 + 0.2 * image)).abs().max() > 1e-3

    def test_each_part_comes_up_half_of_the_time(self) -> None:
        """Halving the contrast k times of four: k is binomial, 2 in the mean, variance 1."""
        module = PerturbationModule(drop=None, parts=(parse("contrast:0.5"),) * 4)
        clean, generator = tiny.faces_image(1, 8), rng()
        counts = []
        for _ in range(400):
            view, reference = module(clean, clean, generator)
            assert reference is clean
            counts.append(round(-math.log2(float(view.std() / clean.std()))))
        spread = torch.tensor(counts).float()
        assert spread.mean() == pytest.approx(2, abs=0.2)
        assert spread.var() == pytest.approx(1, abs=0.2)

    def test_the_paper_has_four_parts(self) -> None:
        clean, generator = tiny.faces_image(1, 32), rng()
        module = PerturbationModule()
        views = [module(clean * 0.9, clean, generator)[0] for _ in range(160)]
        untouched = sum(torch.equal(view, clean * 0.9) for view in views)
        assert 3 <= untouched <= 20, "160 / 2^4 = 10"

    def test_the_gradient_reaches_the_protected_photo_through_all_parts(self) -> None:
        protected = tiny.faces_image(1, 16).requires_grad_()
        module = PerturbationModule(probability=1.0)
        view, _ = module(protected, protected.detach() * 0.5, rng())
        (gradient,) = torch.autograd.grad(view.sum(), protected)
        assert 0 < (gradient != 0).float().mean() <= 1
        assert view.shape == protected.shape

    def test_the_clean_photo_moves_along(self) -> None:
        module = PerturbationModule(
            drop=None, parts=(parse("rotate:5..20"), parse("blur"), parse("crop:0.5..0.7")),
            probability=1.0,
        )  # fmt: skip
        clean = tiny.faces_image(1, 32)
        view, reference = module(clean, clean, rng())
        assert (reference - clean).abs().mean() > 0.02
        assert (view - reference).abs().mean() < 0.02, "all but the blur happened to both"

    def test_the_codec_itself_can_take_part(self) -> None:
        module = PerturbationModule(drop=None, parts=(parse("jpeg:50"),), probability=1.0)
        image = tiny.faces_image(1, 24).requires_grad_()
        view, _ = module(image, image, rng())
        assert torch.equal(view, real_jpeg(image, 50, "4:2:0"))
        (gradient,) = torch.autograd.grad(view.sum(), image)
        assert (gradient == 1).all()

    def test_the_adv_net_begins_by_changing_nothing(self) -> None:
        with tiny.seeded(0):
            network = AdvNet((8, 8))
        image = tiny.faces_image(1, 16)
        assert 0 < (network(image) - image).abs().max() < 0.02
