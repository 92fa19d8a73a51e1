"""RelGAN: its norm in closed form, its files, its relative vectors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shields.errors import ConfigError, ImageError, UnknownName, WeightsError
from shields.models.relgan import PRESETS, RelGANModel
from shields.models.relgan_network import RelganGenerator, SwitchNorm, _Moments
from shields.weights import Card, read_state_dict
from tests import tiny

FIVE = PRESETS[5]
CARD = Card(
    name="own", role="manipulator", architecture="relgan", file="own.pth", config={"sign": 1}
)


def with_config(**config):
    return Card(
        name="own", role="manipulator", architecture="relgan", file="own.pth", config=config
    )


def network(seed=0, attributes=5, width=8):
    """A random generator whose norms have statistics, shares and scales of their own."""
    with tiny.seeded(seed):
        built = RelganGenerator(attributes, width, blocks=4)
        for module in built.modules():
            if isinstance(module, SwitchNorm):
                nn.init.normal_(module.mean_weight)
                nn.init.normal_(module.var_weight)
                nn.init.normal_(module.weight, 1, 0.2)
                nn.init.normal_(module.bias, 0, 0.2)
                nn.init.normal_(module.running_mean, 0, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return built


def model(sign=1, seed=0, native_size=None):
    built = RelGANModel(network(seed), FIVE, sign, native_size)
    built.name = "random-relgan"
    return built


def reference(norm, features, mean_bn, var_bn):
    """Switchable norm written out pixel by pixel sums, in float64."""
    x = features.double()
    batch, channels, height, width = x.shape
    flat = x.reshape(batch, channels, height * width)
    mean_in = flat.sum(2) / flat.shape[2]
    var_in = ((flat - mean_in[..., None]) ** 2).sum(2) / (flat.shape[2] - 1)
    mean_ln = mean_in.sum(1, keepdim=True) / channels
    var_ln = (var_in + mean_in**2).sum(1, keepdim=True) / channels - mean_ln**2
    p, q = norm.mean_weight.double().exp(), norm.var_weight.double().exp()
    p, q = p / p.sum(), q / q.sum()
    mean = p[0] * mean_in + p[1] * mean_ln + p[2] * mean_bn
    var = q[0] * var_in + q[1] * var_ln + q[2] * var_bn
    normal = (x - mean[..., None, None]) / (var[..., None, None] + 1e-5).sqrt()
    return normal * norm.weight.double() + norm.bias.double()


class TestSwitchNorm:
    @pytest.fixture
    def norm(self):
        rng = torch.Generator().manual_seed(0)
        norm = SwitchNorm(6)
        for value in norm.state_dict().values():
            value.uniform_(0.3, 1.7, generator=rng)
        return norm

    @pytest.fixture
    def features(self):
        rng = torch.Generator().manual_seed(1)
        return torch.randn(3, 6, 5, 7, generator=rng) * 2 + 0.5

    def test_evaluation_blends_instance_layer_and_running_statistics(self, norm, features):
        wanted = reference(norm, features, norm.running_mean[..., 0], norm.running_var[..., 0])
        assert torch.allclose(norm.eval()(features).double(), wanted, atol=1e-5)

    def test_training_uses_the_batch_and_moves_the_running_statistics(self, norm, features):
        before = [norm.running_mean.clone(), norm.running_var.clone()]
        x = features.double()
        mean_in, var_in = x.mean((2, 3)), x.var((2, 3))
        mean_bn = mean_in.mean(0)
        var_bn = (var_in + mean_in**2).mean(0) - mean_bn**2
        out = norm.train()(features)
        assert torch.allclose(out.double(), reference(norm, features, mean_bn, var_bn), atol=1e-5)
        for old, new, seen in zip(
            before, [norm.running_mean, norm.running_var], [mean_bn, var_bn], strict=True
        ):
            wanted = 0.9 * old[0, :, 0] + 0.1 * seen.float()
            assert torch.allclose(new[0, :, 0], wanted, atol=1e-5)

    def test_all_weight_on_the_first_share_is_instance_norm(self, norm, features):
        with torch.no_grad():
            norm.mean_weight.copy_(torch.tensor([50.0, 0, 0]))
            norm.var_weight.copy_(torch.tensor([50.0, 0, 0]))
        pixels = features[0, 0].numel()
        # PyTorch's own takes the biased variance.
        normal = nn.functional.instance_norm(features) * ((pixels - 1) / pixels) ** 0.5
        wanted = normal * norm.weight + norm.bias
        assert torch.allclose(norm.eval()(features), wanted, atol=1e-4)

    def test_all_weight_on_the_last_share_is_the_running_statistics(self, norm, features):
        with torch.no_grad():
            norm.mean_weight.copy_(torch.tensor([0, 0, 50.0]))
            norm.var_weight.copy_(torch.tensor([0, 0, 50.0]))
        wanted = nn.functional.batch_norm(
            features, norm.running_mean.flatten(), norm.running_var.flatten(),
            norm.weight.flatten(), norm.bias.flatten(),
        )  # fmt: skip
        assert torch.allclose(norm.eval()(features), wanted, atol=1e-5)

    @pytest.mark.parametrize("training", [False, True])
    def test_gradients_are_those_of_finite_differences(self, norm, training):
        norm = norm.train(training)
        rng = torch.Generator().manual_seed(2)
        x, weights, step = (torch.randn(2, 6, 2, 3, generator=rng) for _ in range(3))
        x.requires_grad_()

        def value(image):
            return (norm(image) * weights).sum()

        (gradient,) = torch.autograd.grad(value(x), x)
        with torch.no_grad():
            rise = value(x + 1e-2 * step) - value(x - 1e-2 * step)
        assert torch.isclose(2e-2 * (gradient * step).sum(), rise, rtol=0.01)

    def test_moments_have_torchs_first_and_second_derivatives(self):
        rng = torch.Generator().manual_seed(2)
        x = torch.randn(2, 2, 2, 3, generator=rng, dtype=torch.double).requires_grad_()
        found = []
        for moments in (_Moments.apply, lambda x: torch.var_mean(x, dim=(2, 3), keepdim=True)):
            variance, mean = moments(x)
            value = (variance * mean).square().sum()
            (first,) = torch.autograd.grad(value, x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x)
            found.append((value, first, second))
        assert all(torch.allclose(*pair) for pair in zip(*found, strict=True))

    def test_half_precision_comes_back_as_it_was(self, norm, features):
        whole = norm.eval()(features)
        half = norm(features.bfloat16())
        assert half.dtype == torch.bfloat16
        assert torch.allclose(half.float(), whole, atol=0.05)


class TestGenerator:
    @pytest.mark.parametrize(("attributes", "count"), [(5, 8_434_345), (17, 8_471_977)])
    def test_it_has_the_published_size(self, attributes, count):
        built = RelganGenerator(attributes)
        assert sum(parameter.numel() for parameter in built.parameters()) == count
        assert len(built.state_dict()) == 138

    def test_keys_are_the_authors(self):
        keys = set(RelganGenerator(5, 8).state_dict())
        convolutions = ["conv_in.0", "down1.0", "down2.0", "up2.0", "up1.0", "conv_out.0"]
        norms = ["conv_in.1", "down1.1", "down2.1", "up2.1", "up1.1"]
        for block in range(6):
            convolutions += [f"resb.{block}.f.0", f"resb.{block}.f.3"]
            norms += [f"resb.{block}.f.1", f"resb.{block}.f.4"]
        own = ["weight", "bias", "mean_weight", "var_weight", "running_mean", "running_var"]
        wanted = {f"{name}.{key}" for name in convolutions for key in ("weight", "bias")}
        assert keys == wanted | {f"{name}.{key}" for name in norms for key in own}

    def test_feature_map_is_behind_the_third_residual_block(self):
        built = RelganGenerator(5, 8).eval()
        seen = {}
        built.resb[2].register_forward_hook(lambda *call: seen.update(map=call[2]))
        image = 2 * tiny.faces_image(2, 32) - 1
        forged, features = built(image, torch.zeros(2, 5))
        assert torch.equal(features, seen["map"])
        assert (features.shape, forged.shape) == ((2, 32, 8, 8), (2, 3, 32, 32))
        assert forged.abs().max() <= 1


class TestConditions:
    def test_names_add_and_remove(self):
        names = model().conditions
        assert names[:4] == ("black_hair", "not_black_hair", "blond_hair", "not_blond_hair")
        assert len(names) == 10

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize(
        ("name", "index", "value"),
        [
            ("blond_hair", 1, 1),
            ("not_male", 3, -1),
            ("young:0.25", 4, 0.25),
            ("not_young:1", 4, -1),
        ],
    )
    def test_a_vector_says_what_changes(self, sign, name, index, value):
        vector = torch.zeros(1, 5)
        vector[:, index] = sign * value
        condition = model(sign).condition(name)
        assert torch.equal(condition.value, vector)
        assert condition.name == name

    def test_first_condition_is_the_default(self):
        assert model().condition().name == "black_hair"

    def test_the_photos_labels_do_not_matter(self):
        labels = torch.ones(2, 5)
        built = model()
        assert torch.equal(
            built.condition("male", labels=labels).value, built.condition("male").value
        )

    def test_strength_nought_asks_for_nothing_whatever_the_name(self):
        image, built = tiny.faces_image(1, 32), model()
        assert torch.equal(built(image, "male:0"), built(image, "not_blond_hair:0"))
        assert not torch.equal(built(image, "male:0"), built(image, "male:0.5"))

    def test_opposite_signs_forge_what_the_other_name_forges(self):
        image = tiny.faces_image(1, 32)
        assert torch.equal(model(1)(image, "male"), model(-1)(image, "not_male"))

    @pytest.mark.parametrize("strength", ["2", "-0.5", "much", "", "nan"])
    def test_strength_beyond_the_range_is_refused(self, strength):
        with pytest.raises(ConfigError, match=r"number in \[0, 1\]"):
            model().condition(f"male:{strength}")

    def test_unknown_name_gets_a_hint(self):
        with pytest.raises(UnknownName, match="did you mean blond_hair"):
            model().condition("blonde_hair")

    @pytest.mark.parametrize("sign", [0, 2, 0.5])
    def test_sign_must_be_one_of_two(self, sign):
        with pytest.raises(ConfigError, match="sign"):
            RelGANModel(network(), FIVE, sign)


class TestModel:
    def test_mode_cannot_be_changed(self):
        image, built = tiny.faces_image(2, 32), model()
        before = built(image, "male")
        parent = nn.Sequential(built).train()
        assert torch.equal(parent[0].eval().train()(image, "male"), before)
        assert not any(module.training for module in built.network.modules())

    def test_a_batch_equals_its_singles(self):
        image, built = tiny.faces_image(3, 32), model()
        singles = torch.cat([built(image[i : i + 1], "young") for i in range(3)])
        assert torch.allclose(built(image, "young"), singles, atol=1e-6)

    def test_gradient_reaches_the_image_alone_and_buffers_stay(self):
        image, built = tiny.faces_image(2, 32).requires_grad_(), model()
        state = {key: value.clone() for key, value in built.state_dict().items()}
        forged, features = built.outputs(image, "not_male")
        (forged.square().sum() + features.square().sum()).backward()
        assert torch.isfinite(image.grad).all()
        assert (image.grad.flatten(1).abs().sum(1) > 0).all()
        assert all(parameter.grad is None for parameter in built.parameters())
        assert all(torch.equal(value, state[key]) for key, value in built.state_dict().items())

    def test_images_are_converted_to_and_from_the_native_range(self):
        image, built = tiny.faces_image(1, 32), model()
        vector = torch.tensor([[0.0, 0, 0, 1, 0]])
        native = built.network(2 * image - 1, vector)[0]
        assert torch.allclose(built(image, "male"), (native + 1) / 2)

    def test_native_size_is_hidden(self):
        image = tiny.faces_image(1, 50)
        built = model(native_size=32)
        assert built(image).shape == image.shape
        assert built.features(image).shape[2:] == (8, 8)

    def test_side_off_the_multiple_of_four_is_refused(self):
        with pytest.raises(ImageError, match="nearest such size is 32x32"):
            model()(tiny.faces_image(1, 33))


class TestFiles:
    @pytest.fixture
    def state(self):
        return network(3).state_dict()

    def same(self, path, card=CARD):
        loaded = RelGANModel.load(path, card)
        image = tiny.faces_image(2, 32)
        assert torch.equal(loaded(image, "young"), model(seed=3)(image, "young"))

    def save_as_the_authors_do(self, path, state, prefix=""):
        discriminator = {f"{prefix}convs.0.weight": torch.ones(2, 2)}
        adam = {"state": {0: {"step": 1, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}
        torch.save(
            {
                "G": {prefix + key: value for key, value in state.items()},
                "D": discriminator,
                "optimG": adam,
                "optimD": adam,
            },
            path,
        )

    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_authors_checkpoint_loads(self, tmp_path, state, prefix):
        self.save_as_the_authors_do(tmp_path / "own.pth", state, prefix)
        self.same(tmp_path / "own.pth")

    @pytest.mark.parametrize("wrap", [dict, lambda state: {"state_dict": state}])
    def test_bare_state_dict_loads(self, tmp_path, state, wrap):
        torch.save(wrap(state), tmp_path / "own.pth")
        self.same(tmp_path / "own.pth")

    def test_safetensors_load(self, tmp_path, state):
        save_file(state, tmp_path / "own.safetensors")
        self.same(tmp_path / "own.safetensors")

    def test_sizes_and_names_come_from_file_and_card(self, tmp_path):
        torch.save(network(0, attributes=1, width=4).state_dict(), tmp_path / "own.pth")
        card = with_config(sign=-1, attributes=["Smiling"], native_size=16)
        loaded = RelGANModel.load(tmp_path / "own.pth", card)
        assert loaded.conditions == ("smiling", "not_smiling")
        assert (loaded.sign, loaded.native_size) == (-1, 16)

    @pytest.mark.parametrize("sign", [None, 0, "1", True])
    def test_card_must_say_which_sign_adds(self, tmp_path, state, sign):
        torch.save(state, tmp_path / "own.pth")
        card = with_config() if sign is None else with_config(sign=sign)
        with pytest.raises(WeightsError, match="which `sign` adds"):
            RelGANModel.load(tmp_path / "own.pth", card)

    def test_number_of_names_must_fit(self, tmp_path, state):
        torch.save(state, tmp_path / "own.pth")
        card = with_config(sign=1, attributes=["Male", "Young"])
        with pytest.raises(WeightsError, match=r"take 5 attributes, 2 are named: Male, Young"):
            RelGANModel.load(tmp_path / "own.pth", card)

    def test_unknown_number_of_attributes_needs_names(self, tmp_path):
        torch.save(network(attributes=3).state_dict(), tmp_path / "own.pth")
        with pytest.raises(WeightsError, match="0 are named: none"):
            RelGANModel.load(tmp_path / "own.pth", CARD)

    def test_another_network_is_refused(self, tmp_path):
        torch.save(nn.Conv2d(3, 3, 3).state_dict(), tmp_path / "own.pth")
        with pytest.raises(WeightsError, match="not those of a RelGAN generator"):
            RelGANModel.load(tmp_path / "own.pth", CARD)

    def test_truncated_state_is_refused(self, tmp_path, state):
        del state["up1.1.running_var"]
        torch.save(state, tmp_path / "own.pth")
        with pytest.raises(WeightsError, match="1 missing"):
            RelGANModel.load(tmp_path / "own.pth", CARD)


class TestReadPart:
    def test_the_first_name_that_is_there_wins(self, tmp_path):
        path = tmp_path / "own.pt"
        torch.save({"gen": {"a": torch.zeros(1)}, "gen_test": {"a": torch.ones(1).half()}}, path)
        state = read_state_dict(path, ("gen_test", "gen"))
        assert torch.equal(state["a"], torch.ones(1))
        assert state["a"].dtype == torch.float32
        assert torch.equal(read_state_dict(path, ("none", "gen"))["a"], torch.zeros(1))

    def test_absent_part_says_what_there_is(self, tmp_path):
        path = tmp_path / "own.pt"
        torch.save({"D": {"a": torch.zeros(1)}, "optim": {}}, path)
        with pytest.raises(WeightsError, match="holds no 'G' but D, optim"):
            read_state_dict(path, ("G",))

    def test_part_of_something_else_than_tensors_is_refused(self, tmp_path):
        path = tmp_path / "own.pt"
        torch.save({"G": {"a": [1, 2]}}, path)
        with pytest.raises(WeightsError, match=r"'G\.a' is a list, not a tensor"):
            read_state_dict(path, ("G",))

    def test_values_must_be_finite_in_the_part_alone(self, tmp_path):
        path = tmp_path / "own.pt"
        torch.save({"G": {"a": torch.ones(1)}, "D": {"a": torch.tensor([float("nan")])}}, path)
        assert set(read_state_dict(path, ("G",))) == {"a"}
        with pytest.raises(WeightsError, match="not finite"):
            read_state_dict(path, ("D",))

    def test_code_in_a_pickle_never_runs(self, tmp_path):
        path, trace = tmp_path / "own.pt", tmp_path / "trace"

        class Evil:
            def __reduce__(self):
                return (trace.write_text, ("ran",))

        torch.save({"G": {"a": torch.ones(1)}, "D": Evil()}, path)
        with pytest.raises(WeightsError, match="damaged, or holds more than tensors"):
            read_state_dict(path, ("G",))
        assert not trace.exists()

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off"])
    def test_damaged_file_is_refused(self, tmp_path, content):
        path = tmp_path / "own.pt"
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="damaged"):
            read_state_dict(path, ("G",))
