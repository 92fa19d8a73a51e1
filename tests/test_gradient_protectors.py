"""FGSM, I-FGSM and PGD: the loop on objectives by name."""

import pytest
import torch

from shields.errors import ConfigError
from shields.protectors import PROTECTORS
from shields.protectors.gradient import (
    Fgsm,
    FgsmConfig,
    Ifgsm,
    IfgsmConfig,
    Pgd,
    PgdProtectorConfig,
)
from tests import tiny
from tests.climbing import SIZE, generator

#: objective of the gradient protectors -> protector whose objective it is
OBJECTIVES = {
    "encoder": "encoder",
    "reconstruction": "vae",
    "zero-latent": "photoguard",
    "identity": "cvl",
    "round-trip": "cvl-d",
    "facelock": "facelock",
    "diffusion": "advdm",
}


class TestGradientProtectors:
    """FGSM, I-FGSM and PGD on objectives by name."""

    def test_fgsm_is_the_budget_times_the_sign_of_one_gradient(self, image, mask):
        network = tiny.autoencoder()
        for levels in (2.55, 8.0, 300.0):
            config = FgsmConfig(levels=levels, objective="zero-latent")
            change = Fgsm(config, autoencoder=network)(image, mask, rng=generator())
            view = image.clone().requires_grad_(True)
            value = -network.encode(view).flatten(1).norm(dim=1).sum()
            (slope,) = torch.autograd.grad(value, view)
            low, high = config.budget.bounds(image, mask)
            expected = torch.where(slope > 0, high, low)
            assert torch.allclose(change, expected, atol=1e-6)

    def test_ifgsm_starts_at_the_photo_and_pgd_does_not(self, image, mask):
        network = tiny.autoencoder()
        few = {"steps": 1, "step": 1.0, "objective": "zero-latent"}
        near = Ifgsm(IfgsmConfig(**few), autoencoder=network)(image, mask, rng=generator())
        far = Pgd(PgdProtectorConfig(**few), autoencoder=network)(image, mask, rng=generator())
        assert near.abs().max() == pytest.approx(1 / 255, rel=1e-4)
        assert far.abs().max() > 7 / 255

    @pytest.mark.parametrize("cls", [Fgsm, Ifgsm, Pgd])
    def test_an_untargeted_objective_moves_although_its_gradient_at_the_photo_is_zero(
        self, cls, image, mask
    ):
        protector = cls(autoencoder=tiny.autoencoder())
        change = protector(image, mask, rng=generator())
        assert (protector.evaluate(image, image + change, mask) > 0).all()

    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_an_objective_by_name_is_that_of_its_owner(self, name, image, mask):
        config = PgdProtectorConfig(steps=3, objective=name)
        networks = {role: getattr(tiny, role)() for role in Pgd.roles(config)}
        owner = PROTECTORS[OBJECTIVES[name]]
        assert set(networks) == set(owner.roles(owner.Config()))
        marks = tiny.landmarks(2, SIZE)
        ours = Pgd(config, **networks).evaluate(image, image, mask, landmarks=marks)
        theirs = owner(owner.Config(steps=3), **networks).evaluate(
            image, image, mask, landmarks=marks
        )
        assert torch.equal(ours, theirs)

    def test_id_guards_baselines_take_ten_steps_of_a_fifth_of_the_budget(self):
        for config in (IfgsmConfig.idguard(), PgdProtectorConfig.idguard()):
            assert (config.levels, config.step, config.steps) == (6.375, 1.275, 10)
        assert (IfgsmConfig.idguard().start, PgdProtectorConfig.idguard().start) == (
            "zero",
            "uniform",
        )

    def test_an_unknown_objective_is_refused(self):
        with pytest.raises(ConfigError, match="objective"):
            PgdProtectorConfig(objective="world-peace")
