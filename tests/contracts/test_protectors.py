"""What every protector promises: one body over the registry and a few tiny settings of each."""

import dataclasses
import functools
import inspect
import io
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from shields.budget import per_sample_norm
from shields.errors import ConfigError, ImageError
from shields.photo import quantize
from shields.protectors import PROTECTORS
from shields.protectors.base import IterativeConfig, IterativeProtector, Protector
from shields.registry import did_you_mean
from tests import tiny

SIZE = 32
#: settings beside each method's default that take another path through its code
VARIANTS = {
    "facelock": [
        {"perceptual_weight": 1.0, "scheduled": True, "steps": 4},
        {"photo_weight": 1.0, "jitter": 0.02, "momentum": 0.9, "smooth": 7, "robust": True},
        {"levels": 7.65, "step": 3.0, "rounding": True},
        {"levels": 900.0, "norm": "l2", "update": "l2", "step": 300.0},
    ],
    "cvl-dp": [{"reading": "prose"}],
    "photoguard": [{"target": "grey"}, {"levels": 2.55, "decay": "linear"}],
    "encoder": [{"robust": True, "precision": "bfloat16"}],
    "photoguard-eot": [{"reference": "transformed"}],
    "photoguard-diffusion": [
        {"levels": 900.0, "norm": "l2", "update": "l2", "step": 300.0, "draws": 2},
        {"prompt": "a hat", "strength": 0.5, "eta": 0.0, "inference_steps": 2},
    ],
    "cw": [{"as_coded": True, "start": "grey", "keep": "last"}],
    "advdm": [{"sign": "-", "checkpoint": True}, {"antithetic": False, "stratified": False}],
    "sds": [{"sign": "+"}],
    "editshield": [{"as_coded": True, "norm": "none"}],
    "disrupting": [
        {"classes": "joint", "keep": "best", "patience": 2},
        {"blur": "spread", "conditions": "smiling"},
        {"blur": "eot", "steps": 2},
        {"aim": "nullify", "start": "zero", "checkpoint": True},
        {"aim": "white", "blur": "fixed", "robust": True},
    ],
    "antiforgery": [
        {"as_coded": True, "norm": "none"},
        {"robust": True, "update": "sign", "rounding": True},
        {"norm": "l2", "levels": 200.0},
    ],
    "df-rap": [{"conditions": "smiling", "gradient": "straight", "balance": 0.5}],
    "faceshield": [
        {"softened": False, "low_passed": False, "momentum": 0.9},
        {"detector_weight": 0.0, "keep": "best"},
    ],
    "pgd": [
        {"objective": name}
        for name in (
            "reconstruction", "zero-latent", "identity", "round-trip", "facelock", "diffusion",
        )
    ]
    + [
        {"update": "adam", "keep": "best", "patience": 2},
        {"space": "tanh", "update": "adam", "step": 0.1},
    ],
}  # fmt: skip
#: methods that draw timesteps and noise in each step: one value is no measure of them; their
#: direction is tested in test_diffusion_protectors.py
NOISY = {"advdm", "mist", "sds", "sdst", "photoguard-diffusion"}

CASES = [(name, settings) for name in PROTECTORS for settings in [{}, *VARIANTS.get(name, [])]]


def case_id(value):
    return (
        value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()) or "-"
    )


@functools.cache
def network(role):
    """One network a role: no protector may change it, and one test watches that."""
    return getattr(tiny, role)()


def build(name, settings):
    cls = PROTECTORS[name]
    config = cls.Config()
    if isinstance(config, IterativeConfig):
        few = {"steps": min(config.steps, 2 if name in NOISY else 3)}
        settings = few | settings
    config = dataclasses.replace(config, **settings)
    own = {"idguard": "idguard", "idguard-universal": "idguard"}.get(name)
    return cls(config, **{role: network(own or role) for role in cls.roles(config)})


def photo(batch=2):
    """Values of whole levels, black and white among them."""
    image = (tiny.faces_image(batch, SIZE) * 255).round() / 255
    image[:, :, :3, :3] = 0
    image[:, :, -3:, -3:] = 1
    return image


def half_mask(batch=2):
    """Zero on the left, feathered, one on the right."""
    ramp = torch.linspace(-0.5, 1.5, SIZE).clamp(0, 1)
    return ramp.expand(batch, 1, SIZE, SIZE).clone()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}[{case_id(case[1])}]")
def case(request):
    return request.param


@pytest.fixture
def protector(case):
    return build(*case)


def protect(protector, image, mask, seed=0):
    marks = tiny.landmarks(len(image), SIZE)
    return protector(image, mask, rng=rng(seed), landmarks=marks)


def png_round_trip(pixels):
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "PNG")
    return np.asarray(PillowImage.open(file))


def test_the_perturbation_keeps_every_bound(protector):
    image, mask = photo(), half_mask()
    progress = []
    perturbation = protector(
        image, mask, rng=rng(), landmarks=tiny.landmarks(2, SIZE),
        progress=lambda *values: progress.append(values),
    )  # fmt: skip
    budget = protector.config.budget
    assert perturbation.shape == image.shape
    assert perturbation.dtype == torch.float32
    assert perturbation.device == image.device
    assert not perturbation.requires_grad
    assert (perturbation[:, :, :, mask[0, 0, 0] == 0] == 0).all()
    assert (perturbation != 0).flatten(1).any(dim=1).all(), "nothing was done"
    assert ((image + perturbation) >= 0).all()
    assert ((image + perturbation) <= 1).all()
    if budget.norm == "l2":
        assert (per_sample_norm(perturbation) <= budget.epsilon * (1 + 1e-5)).all()
    if budget.norm == "linf":
        assert (perturbation.abs() <= budget.epsilon * mask + 1e-7).all()
    assert progress == [] or progress[-1][0] <= progress[-1][1]


def test_the_saved_photo_obeys_the_whole_levels(protector):
    image, mask = photo(1), half_mask(1)
    perturbation = protect(protector, image, mask)
    clean = (image[0].permute(1, 2, 0) * 255).round().byte().numpy()
    saved = png_round_trip(quantize(clean, perturbation, protector.config.budget, mask))
    moved = np.abs(saved.astype(int) - clean)
    assert saved.shape == clean.shape
    assert saved.dtype == np.uint8
    if protector.config.norm == "l2":
        assert np.sqrt((moved**2).sum()) <= protector.config.levels
    else:
        assert moved.max() <= protector.config.budget.whole_levels
    assert (moved[:, mask[0, 0, 0].numpy() == 0] == 0).all()


def test_equal_seeds_give_equal_bits(protector):
    image, mask = photo(), half_mask()
    assert torch.equal(protect(protector, image, mask), protect(protector, image, mask))


def test_no_budget_means_no_perturbation(case):
    name, settings = case
    perturbation = protect(build(name, settings | {"levels": 0.0}), photo(), half_mask())
    assert (perturbation == 0).all()


def test_a_batch_equals_its_singles(protector):
    image, mask, marks = photo(), half_mask(), tiny.landmarks(2, SIZE)
    together = protector(image, mask, rng=rng(), landmarks=marks)
    for index in range(2):
        one = slice(index, index + 1)
        alone = protector(image[one], mask[one], rng=rng(), landmarks=marks[one])
        # Sums over a batch of two are not taken in the order of a single one, so a gradient may
        # differ in its last bit, and a sign where it is as good as zero.
        differing = (alone - together[one]).abs() > 0.01 / 255
        assert differing.float().mean() < 0.01


def test_the_objective_rises(case, protector):
    if (
        not isinstance(protector, IterativeProtector)
        or case[0] in NOISY
        or "diffusion" in case[1].values()
    ):
        pytest.skip(
            "one value is no measure of an objective with noise of its own, or there is none"
        )
    image, mask, marks = photo(), torch.ones(2, 1, SIZE, SIZE), tiny.landmarks(2, SIZE)
    perturbation = protector(image, mask, rng=rng(), landmarks=marks)
    before = protector.evaluate(image, image, mask, landmarks=marks)
    after = protector.evaluate(image, image + perturbation, mask, landmarks=marks)
    assert before.shape == after.shape == (2,)
    assert (after > before).all()


def test_nothing_is_left_changed(protector):
    image, mask = photo(), half_mask()
    copies = image.clone(), mask.clone()
    weights = [{k: v.clone() for k, v in net.state_dict().items()} for net in protector.networks]
    flags = [[p.requires_grad for p in net.parameters()] for net in protector.networks]
    modes = [[part.training for part in net.modules()] for net in protector.networks]
    state = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    own = dict(vars(protector))
    protect(protector, image, mask)
    assert torch.equal(image, copies[0])
    assert torch.equal(mask, copies[1])
    for net, before, flag, mode in zip(protector.networks, weights, flags, modes, strict=True):
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        assert [p.requires_grad for p in net.parameters()] == flag
        assert [part.training for part in net.modules()] == mode
        assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert (np.random.get_state()[1] == state[2]).all()  # noqa: NPY002
    assert vars(protector) == own, "a protector keeps no state between calls"


def test_a_face_that_was_not_found_does_not_hinder(protector):
    marks = tiny.landmarks(2, SIZE)
    marks[1] = float("nan")
    perturbation = protector(photo(), rng=rng(), landmarks=marks)
    assert perturbation.isfinite().all()
    assert protector(photo(1), rng=rng()).isfinite().all()


@pytest.mark.parametrize(
    "image",
    [torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.full((1, 3, 8, 8), -1.0),
     torch.full((1, 3, 8, 8), float("nan")), torch.zeros(1, 3, 8, 8, dtype=torch.float64)],
    ids=["no batch", "one channel", "network's range", "not a number", "double"],
)  # fmt: skip
def test_an_image_that_is_not_one_is_refused(image):
    with pytest.raises(ImageError, match="image"):
        build("encoder", {})(image, rng=rng())


def test_masks_and_landmarks_must_fit_the_image():
    protector = build("facelock", {})
    with pytest.raises(ImageError, match="mask"):
        protector(photo(), torch.ones(2, 1, 4, 4), rng=rng())
    with pytest.raises(ImageError, match="landmarks"):
        protector(photo(), rng=rng(), landmarks=torch.zeros(1, 5, 2))


@pytest.mark.parametrize("name", PROTECTORS)
class TestConfigs:
    def test_every_preset_survives_json(self, name):
        config = PROTECTORS[name].Config
        for make in [config, *config.presets().values()]:
            settings = make()
            assert config(**json.loads(json.dumps(settings.to_dict()))) == settings

    def test_every_preset_keeps_its_class_and_runs_hardened(self, name):
        config = PROTECTORS[name].Config
        for make in config.presets().values():
            assert type(make()) is config
        if issubclass(config, IterativeConfig):
            hardened = config().hardened()
            assert hardened.robust
            assert hardened.draws >= 2

    def test_settings_are_parsed_from_text_and_wrong_ones_explained(self, name):
        config = PROTECTORS[name].Config()
        assert config.with_settings({"levels": "4"}).levels == 4.0
        with pytest.raises(ConfigError, match="levels"):
            config.with_settings({"lebels": "4"})
        with pytest.raises(ConfigError, match="`levels` must be a float, got 'many'"):
            config.with_settings({"levels": "many"})
        with pytest.raises(ConfigError, match="norm"):
            config.with_settings({"norm": "l7"})
        with pytest.raises(ConfigError, match="levels"):
            config.with_settings({"levels": "-1"})
        if isinstance(config, IterativeConfig):
            assert config.with_settings({"robust": "true", "steps": "1"}).robust
            with pytest.raises(ConfigError, match="true or false"):
                config.with_settings({"robust": "maybe"})
            with pytest.raises(ConfigError, match="steps"):
                config.with_settings({"steps": "2.5"})

    def test_every_field_says_what_it_is(self, name):
        """A line that starts with `#:` stands above each field, wherever it is defined."""
        for cls in PROTECTORS[name].Config.__mro__[:-1]:
            lines = [line.strip() for line in inspect.getsource(cls).splitlines()]
            for field in inspect.get_annotations(cls):
                if field.startswith("_"):
                    continue
                at = next(i for i, line in enumerate(lines) if line.startswith(f"{field}:"))
                assert lines[at - 1].startswith("#:"), f"{cls.__name__}.{field}"

    def test_file_and_class_say_where_the_method_comes_from(self, name):
        cls = PROTECTORS[name]
        assert issubclass(cls, Protector)
        text = inspect.getmodule(cls).__doc__
        assert "Source:" in text
        assert "Differs:" in text
        assert "https://" in text
        assert cls.paper.startswith("https://")
        assert cls.paper in text, "the link of the class stands in the module's docstring"
        assert 20 < len(cls.__doc__.splitlines()[0]) <= 100
        assert cls.__doc__.splitlines()[0].endswith(".")
        assert "paper" in cls.Config.presets()

    def test_a_network_that_is_needed_and_missing_is_named(self, name):
        cls = PROTECTORS[name]
        roles = cls.roles(cls.Config())
        if not roles:
            pytest.skip("runs no network of others")
        with pytest.raises(ConfigError, match=next(iter(roles))):
            cls()


def test_neighbouring_names_are_suggested():
    assert "facelock" in did_you_mean("facelok", PROTECTORS)
