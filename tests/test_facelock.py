"""FaceLock: which terms run when, what they are, and that caching changes nothing."""

import dataclasses

import pytest
import torch

from shields.budget import Budget
from shields.errors import ConfigError
from shields.pgd import pgd
from shields.protectors.facelock import (
    Cvl,
    CvlConfig,
    CvlD,
    CvlDp,
    CvlDpConfig,
    FaceLock,
    FaceLockConfig,
    face_region,
    jittered,
)
from shields.types import Step
from tests import tiny

SIZE = 32


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def step_at(index, total=100, seed=0):
    return Step(index=index, total=total, rng=generator(seed))


@pytest.fixture
def image():
    return tiny.faces_image(2, SIZE)


@pytest.fixture
def mask():
    return torch.ones(2, 1, SIZE, SIZE)


@pytest.fixture
def marks():
    return tiny.landmarks(2, SIZE)


def counted(network, name, calls):
    """Count the calls of a method of one network, which goes on doing its work."""
    method = getattr(network, name)

    def count(*args):
        calls[name] = calls.get(name, 0) + 1
        return method(*args)

    setattr(network, name, count)
    return network


def build(config, calls=None, cls=FaceLock):
    calls = {} if calls is None else calls
    autoencoder = counted(counted(tiny.autoencoder(), "_encode", calls), "_decode", calls)
    return cls(
        config,
        autoencoder=autoencoder,
        recognizer=counted(tiny.recognizer(), "_embed", calls),
        perceptual=counted(tiny.perceptual(), "features", calls),
    )


def protected(image, seed=1):
    noise = torch.rand(image.shape, generator=generator(seed)) * 2 - 1
    return (image + noise * 8 / 255).clamp(0, 1)


class TestSchedule:
    def test_terms_join_at_their_step(self, image, mask, marks):
        """For 100 steps: the perceptual term from 26 on, the cosine from 35 on."""
        calls = {}
        protector = build(FaceLockConfig.paper(), calls)
        objective = protector.objective(image, mask, landmarks=marks, rng=generator())
        expected = {
            0: {"_encode": 1},
            25: {"_encode": 1},
            26: {"_encode": 1, "_decode": 1, "features": 1},
            34: {"_encode": 1, "_decode": 1, "features": 1},
            35: {"_encode": 1, "_decode": 1, "features": 1, "_embed": 1},
            99: {"_encode": 1, "_decode": 1, "features": 1, "_embed": 1},
        }
        for index, wanted in expected.items():
            calls.clear()
            objective(protected(image), step_at(index))
            assert calls == wanted, index

    def test_a_whole_run_calls_each_network_as_often_as_its_terms_are_due(self, image, mask, marks):
        calls = {}
        config = dataclasses.replace(FaceLockConfig.paper(), steps=20)
        build(config, calls)(image, mask, rng=generator(), landmarks=marks)
        # one clean pass of each but the decoder; perceptual from step 6, cosine from step 7
        assert calls == {"_encode": 1 + 20, "_decode": 14, "features": 1 + 14, "_embed": 1 + 13}

    def test_without_the_schedule_all_terms_run_from_the_start(self, image, mask, marks):
        calls = {}
        protector = build(dataclasses.replace(FaceLockConfig.paper(), scheduled=False), calls)
        objective = protector.objective(image, mask, landmarks=marks, rng=generator())
        calls.clear()
        objective(image, step_at(0))
        assert calls == {"_encode": 1, "_decode": 1, "features": 1, "_embed": 1}

    def test_the_step_decays_to_a_fiftieth(self):
        config = FaceLockConfig.paper()
        assert config.step_at(99) == pytest.approx(0.0199 * config.step)

    @pytest.mark.parametrize(
        "settings", [{"keep": "best"}, {"patience": 3}, {"latent_weight": 0.0}], ids=str
    )
    def test_settings_that_a_changing_objective_forbids_are_refused(self, settings):
        with pytest.raises(ConfigError, match="scheduled"):
            dataclasses.replace(FaceLockConfig.paper(), **settings)


class TestTerms:
    def test_the_objective_is_the_formula(self, image, mask, marks):
        config = FaceLockConfig(
            identity_weight=1.5, latent_weight=0.3, perceptual_weight=0.7, photo_weight=0.4
        )
        protector = build(config)
        view = protected(image)
        found = protector.evaluate(image, view, mask, landmarks=marks)

        network, eyes, sense = tiny.autoencoder(), tiny.recognizer(), tiny.perceptual()
        matrix = eyes.matrix(marks, image)
        decoded = network.reconstruct(view)
        for index in range(2):
            one = slice(index, index + 1)
            cosine = torch.nn.functional.cosine_similarity
            clean_face = eyes(image[one], matrix[one])
            expected = (
                -1.5 * cosine(eyes(decoded[one], matrix[one]), clean_face)
                - 0.4 * cosine(eyes(view[one], matrix[one]), clean_face)
                + 0.7 * sense(decoded[one], image[one])
                + 0.3 * (network.encode(view[one]) - network.encode(image[one])).square().mean()
            )
            assert found[index].item() == pytest.approx(expected.item(), rel=1e-4)

    @pytest.mark.parametrize(
        ("weights", "roles"),
        [
            ({}, {"autoencoder", "recognizer"}),
            ({"perceptual_weight": 1.0}, {"autoencoder", "recognizer", "perceptual"}),
            ({"identity_weight": 0.0}, {"autoencoder"}),
            ({"identity_weight": 0.0, "latent_weight": 0.0, "photo_weight": 1.0}, {"recognizer"}),
            ({"identity_weight": 0.0, "latent_weight": 0.0, "perceptual_weight": 1.0},
             {"autoencoder", "perceptual"}),
        ],
        ids=str,
    )  # fmt: skip
    def test_a_term_without_weight_needs_and_runs_no_network(
        self, weights, roles, image, mask, marks
    ):
        config = FaceLockConfig(steps=2, **weights)
        assert set(FaceLock.roles(config)) == roles
        networks = {role: getattr(tiny, role)() for role in roles}
        perturbation = FaceLock(config, **networks)(image, mask, rng=generator(), landmarks=marks)
        assert (perturbation != 0).any()
        for role in roles:
            rest = {name: net for name, net in networks.items() if name != role}
            with pytest.raises(ConfigError, match=role):
                FaceLock(config, **rest)

    def test_sizes_that_the_autoencoder_must_pad_are_cut_back(self, mask):
        image = tiny.faces_image(1, 30, width=27)
        protector = build(FaceLockConfig(steps=2, perceptual_weight=1.0))
        perturbation = protector(image, rng=generator(), landmarks=tiny.landmarks(1, 27))
        assert perturbation.shape == image.shape

    @pytest.mark.parametrize("name", ["identity_weight", "latent_weight", "photo_weight", "jitter"])
    def test_negative_weights_are_refused(self, name):
        with pytest.raises(ConfigError, match=name):
            FaceLockConfig(**{name: -0.1})

    def test_one_term_at_least_must_have_weight(self):
        with pytest.raises(ConfigError, match="above 0"):
            FaceLockConfig(identity_weight=0.0, latent_weight=0.0)


class TestCaching:
    @pytest.mark.parametrize("jitter", [0.0, 0.02])
    def test_caching_the_clean_side_gives_the_same_bits_as_recomputing_it(
        self, image, mask, marks, jitter
    ):
        config = FaceLockConfig(steps=5, perceptual_weight=1.0, photo_weight=0.5, jitter=jitter)
        networks = tiny.autoencoder(), tiny.recognizer(), tiny.perceptual()
        network, eyes, sense = networks

        def recomputed(view, step):
            latent = network.encode(view)
            decoded = network.decode(latent).clamp(0, 1)
            with torch.no_grad():
                clean_latent, matrix = network.encode(image), eyes.matrix(marks, image)
                clean_face, clean_features = eyes(image, matrix), sense.features(image)
            matrix = jittered(matrix, jitter, eyes.crop_size, step.rng)
            terms = [
                0.2 * (latent - clean_latent).square().flatten(1).mean(dim=1),
                sense.distance(sense.features(decoded), clean_features),
                -(eyes(decoded, matrix) * clean_face).sum(dim=1),
                -0.5 * (eyes(view, matrix) * clean_face).sum(dim=1),
            ]
            return torch.stack(terms).sum(dim=0)

        protector = FaceLock(config, autoencoder=network, recognizer=eyes, perceptual=sense)
        cached = protector(image, mask, rng=generator(5), landmarks=marks)
        plain = pgd(image, recomputed, Budget(levels=8), config, mask=mask, rng=generator(5))
        assert torch.equal(cached, plain)

    def test_evaluate_gives_the_value_of_the_last_step(self, image, mask, marks):
        """The walk's last look is at the iterate before its last move."""
        seen = []
        protector = build(dataclasses.replace(FaceLockConfig.paper(), steps=9, step=1.0))
        before_last = []
        inner = protector.objective

        def watched(*args, **kwargs):
            objective = inner(*args, **kwargs)

            def value(view, step):
                gain = objective(view, step)
                before_last.append(view.detach().clone())
                seen.append(gain.detach())
                return gain

            return value

        protector.objective = watched
        protector(image, mask, rng=generator(), landmarks=marks)
        del protector.objective
        found = protector.evaluate(image, before_last[-1], mask, landmarks=marks)
        assert torch.allclose(found, seen[-1], atol=1e-6)


class TestJitter:
    def test_none_leaves_the_alignment_alone_and_draws_nothing(self):
        rng, matrix = generator(), torch.rand(2, 2, 3)
        state = rng.get_state()
        assert jittered(matrix, 0.0, (32, 24), rng) is matrix
        assert torch.equal(rng.get_state(), state)

    def test_it_is_an_affine_map_after_the_alignment_the_same_for_the_batch(self):
        matrix = torch.rand(2, 2, 3, generator=generator(1))
        changed = jittered(matrix, 0.1, (32, 24), generator(2))
        rows = torch.tensor([[0.0, 0.0, 1.0]])
        square = [torch.cat([side, rows]).double() for side in matrix]
        moved = [torch.cat([side, rows]).double() for side in changed]
        maps = [after @ before.inverse() for before, after in zip(square, moved, strict=True)]
        assert torch.allclose(maps[0], maps[1], atol=1e-3)
        assert not torch.allclose(maps[0], torch.eye(3).double(), atol=1e-2)

    def test_its_size_is_what_the_setting_says(self):
        matrix = torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]]])
        rng = generator(3)
        draws = torch.stack([jittered(matrix, 0.02, (32, 24), rng)[0] for _ in range(4000)])
        centre = draws @ torch.tensor([11.5, 15.5, 1.0]) - torch.tensor([11.5, 15.5])
        assert draws[..., :2].std(dim=0).mean().item() == pytest.approx(0.02, rel=0.05)
        assert centre.std(dim=0)[0].item() == pytest.approx(0.02 * 12, rel=0.05)
        assert centre.std(dim=0)[1].item() == pytest.approx(0.02 * 16, rel=0.05)
        assert centre.mean(dim=0).abs().max() < 0.02

    def test_the_objective_draws_anew_in_each_step(self, image, mask, marks):
        protector = build(FaceLockConfig(jitter=0.05, latent_weight=0.0))
        objective = protector.objective(image, mask, landmarks=marks, rng=generator())
        view = protected(image)
        values = [objective(view, step_at(0, seed=seed)) for seed in (1, 1, 2)]
        assert torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])


class TestDesigns:
    def test_cvl_runs_no_autoencoder_and_lowers_the_photos_own_cosine(self, image, mask, marks):
        assert set(Cvl.roles(CvlConfig())) == {"recognizer"}
        eyes = tiny.recognizer()
        perturbation = Cvl(CvlConfig(steps=10), recognizer=eyes)(
            image, mask, rng=generator(), landmarks=marks
        )
        matrix = eyes.matrix(marks, image)
        cosine = (eyes(image, matrix) * eyes(image + perturbation, matrix)).sum(dim=1)
        assert (cosine < 0.9).all()

    def test_cvl_d_is_the_cosine_after_the_autoencoder_alone(self, image, mask, marks):
        network, eyes = tiny.autoencoder(), tiny.recognizer()
        protector = CvlD(autoencoder=network, recognizer=eyes)
        matrix, view = eyes.matrix(marks, image), protected(image)
        expected = -(eyes(network.reconstruct(view), matrix) * eyes(image, matrix)).sum(dim=1)
        assert torch.allclose(protector.evaluate(image, view, mask, landmarks=marks), expected)

    @pytest.mark.parametrize("reading", ["literal", "prose"])
    def test_cvl_dp_adds_a_length_in_the_face(self, reading, image, mask, marks):
        network, eyes = tiny.autoencoder(), tiny.recognizer()
        config = CvlDpConfig(pixel_weight=0.3, reading=reading)
        protector = CvlDp(config, autoencoder=network, recognizer=eyes)
        plain = CvlD(autoencoder=network, recognizer=eyes)
        view = protected(image)
        added = protector.evaluate(image, view, mask, landmarks=marks) - plain.evaluate(
            image, view, mask, landmarks=marks
        )
        region = face_region(eyes.matrix(marks, image), eyes.crop_size, image)
        after = view if reading == "literal" else network.reconstruct(view)
        for index in range(2):
            length = ((after[index] - image[index]) * region[index]).norm()
            assert added[index].item() == pytest.approx(0.3 * length.item(), rel=1e-3)

    def test_the_literal_reading_drives_the_face_to_the_budgets_border(self, image, mask, marks):
        protector = build(CvlDpConfig(pixel_weight=1e6, steps=16), cls=CvlDp)
        perturbation = protector(image, mask, rng=generator(), landmarks=marks)
        eyes = tiny.recognizer()
        region = face_region(eyes.matrix(marks, image), eyes.crop_size, image).expand_as(image)
        edge = perturbation[region > 0].abs()
        assert (edge > 7.9 / 255).float().mean() > 0.99

    def test_prose_asks_for_the_autoencoder_where_no_other_term_does(self):
        config = CvlDpConfig(identity_weight=0.0, photo_weight=1.0, reading="prose")
        assert "autoencoder" in CvlDp.roles(config)
        literal = dataclasses.replace(config, reading="literal")
        assert "autoencoder" not in CvlDp.roles(literal)

    def test_the_face_region_is_what_the_crop_shows(self):
        matrix = torch.tensor([[[0.5, 0, -2.0], [0, 0.5, -3.0]]])  # x 4 up, y 6 up, at half size
        region = face_region(matrix, (4, 8), torch.zeros(1, 3, 20, 30))
        rows, columns = region[0, 0].nonzero().unbind(1)
        # crop -0.5 to 7.5 is photo 3 to 19 in x; -0.5 to 3.5 is photo 5 to 13 in y
        assert (int(columns.min()), int(columns.max())) == (3, 18)
        assert (int(rows.min()), int(rows.max())) == (5, 12)
        assert region.sum() == 16 * 8
        turned = torch.tensor([[[0.47, 0.13, -7.3], [-0.13, 0.47, 3.1]]])
        plain = face_region(turned, (32, 24), torch.zeros(1, 3, 120, 130))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = face_region(turned, (32, 24), torch.zeros(1, 3, 120, 130))
        assert torch.equal(cast, plain)


class TestPresets:
    def test_paper_and_code_are_the_parameter_card(self):
        paper, code = FaceLockConfig.paper(), FaceLockConfig.code()
        assert (paper.levels, paper.step, paper.steps) == (2.55, 0.3825, 100)
        assert (code.levels, code.step, code.steps) == (3.825, 1.275, 100)
        for config in (paper, code):
            assert config.decay == "linear"
            assert config.start == "uniform"
            assert config.latent_weight == 0.2
            assert config.scheduled
            assert config.identity_weight == config.perceptual_weight == 1

    def test_hardened_aims_past_the_networks_at_hand(self):
        config = FaceLockConfig().hardened()
        wanted = {"robust": True, "draws": 2, "photo_weight": 1.0, "jitter": 0.02,
                  "momentum": 0.9, "smooth": 7}  # fmt: skip
        assert {name: getattr(config, name) for name in wanted} == wanted
        assert dataclasses.replace(FaceLockConfig(), photo_weight=2.0).hardened().photo_weight == 2


def test_the_objective_rises_on_nearly_every_seed(marks, mask):
    rises = 0
    for seed in range(20):
        image = tiny.faces_image(2, SIZE, seed=seed)
        protector = FaceLock(
            FaceLockConfig(steps=6),
            autoencoder=tiny.autoencoder(seed), recognizer=tiny.recognizer(seed),
        )  # fmt: skip
        perturbation = protector(image, mask, rng=generator(seed), landmarks=marks)
        before = protector.evaluate(image, image, mask, landmarks=marks)
        after = protector.evaluate(image, image + perturbation, mask, landmarks=marks)
        rises += int((after > before).all())
    assert rises >= 19
