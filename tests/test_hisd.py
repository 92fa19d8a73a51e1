"""HiSD: sizes, files of every layout, styles from noise and from photos, and the sheet's traps."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from shields.errors import ImageError, UnknownName, WeightsError
from shields.models.hisd import HiSDModel
from shields.models.hisd_network import HisdGenerator, sizes
from shields.weights import Card, WeightStore
from tests import tiny
from tests.hisd_sheet import Reference

SMALL = {
    "width": 8, "inner": 8, "blocks": 3, "style": 16, "noise": 4, "hidden": 8,
    "extractor": (4, 8, 8, 8),
}  # fmt: skip
CARD = Card(name="small-hisd", role="manipulator", architecture="hisd", file="small.pt")


def generator(seed: int = 0, **changes: object) -> HisdGenerator:
    with tiny.seeded(seed):
        network = HisdGenerator(**(SMALL | changes))  # type: ignore[arg-type]
        for name, value in network.named_parameters():
            if "in1" in name or "in2" in name:  # so that a norm left out, or swapped, would show
                value.data.add_(0.3 * torch.randn(value.shape))
            elif "translators" in name or "mappers" in name:  # styles that differ visibly
                value.data.mul_(1.7)
    return network


def model(seed: int = 0) -> HiSDModel:
    return HiSDModel(generator(seed))


def image(size: int = 24, batch: int = 2) -> Tensor:
    return tiny.faces_image(batch, size)


class TestSizes:
    @pytest.mark.parametrize(
        ("extractor", "parameters", "keys", "last"),
        [
            ((32, 64, 128, 256, 512, 512, 512), 19_043_939, 263, 8),
            ((64, 128, 256, 512, 1024, 2048), 48_245_891, 258, 7),
        ],
        ids=["256", "128"],
    )
    def test_published_networks_have_their_counts(
        self, extractor: tuple[int, ...], parameters: int, keys: int, last: int
    ) -> None:
        with torch.device("meta"):
            network = HisdGenerator(extractor=extractor)
        state = network.state_dict()
        assert sum(value.numel() for value in network.parameters()) == parameters
        assert len(state) == keys
        assert state[f"extractors.model.{last}.weight"].shape == (768, extractor[-1], 1, 1)
        assert sizes(state)["extractor"] == extractor

    def test_keys_are_those_of_the_sheet(self) -> None:
        with torch.device("meta"):
            state = HisdGenerator().state_dict()
        shapes = {
            "encoder.0.weight": (64, 3, 1, 1),
            "encoder.1.in1.weight": (1, 64, 1),
            "encoder.2.in2.bias": (1, 128, 1),
            "decoder.0.in2.weight": (1, 128, 1),
            "decoder.1.sc.weight": (64, 128, 1, 1),
            "decoder.2.bias": (3,),
            "extractors.model.0.weight": (32, 3, 1, 1),
            "translators.2.model.7.conv2.bias": (64,),
            "translators.0.style_to_params.weight": (1792, 256),
            "translators.1.features.0.weight": (256, 64, 1, 1),
            "translators.1.masks.0.bias": (256,),
            "mappers.0.pre_model.0.weight": (256, 32),
            "mappers.1.pre_model.2.linear.bias": (256,),
            "mappers.2.post_models.2.0.linear.weight": (256, 256),
            "mappers.2.post_models.2.2.weight": (256, 256),
        }
        assert {key: tuple(state[key].shape) for key in shapes} == shapes
        # No bias in a skip, nothing in an AdaIN, no buffer anywhere.
        assert not [key for key in state if "sc.bias" in key or "adain" in key or "running" in key]
        assert "mappers.0.post_models.2.2.weight" not in state

    def test_all_sizes_are_read_from_the_tensors(self) -> None:
        changes = {"attributes": (2, 3), "width": 4, "inner": 6, "extractor": (4, 6, 10)}
        network = generator(**changes)
        assert sizes(network.state_dict()) == SMALL | changes

    def test_another_networks_weights_are_refused(self) -> None:
        with pytest.raises(WeightsError, match="not the weights of a HiSD generator"):
            sizes(tiny.manipulator().network.state_dict())


class TestNetwork:
    @pytest.mark.parametrize("tag", [0, 2])
    def test_edit_equals_one_written_from_the_sheet(self, tag: int) -> None:
        network = generator()
        plain = Reference(dict(network.state_dict()))
        photo, style = 2 * image(16) - 1, torch.randn(1, 16)
        forged, code = network(photo, style, tag)
        expected = plain.encode(photo)
        assert torch.allclose(code, expected, atol=1e-5)
        expected = plain.decode(plain.translate(expected, style, tag, 8, 3))
        assert torch.allclose(forged, expected, atol=1e-4)

    def test_styles_equal_ones_written_from_the_sheet(self) -> None:
        network = generator()
        plain = Reference(dict(network.state_dict()))
        photo, noise = 2 * image(24) - 1, torch.randn(3, 4)
        for tag in range(3):
            taken = plain.extract(photo, tag, 3, 3)
            assert torch.allclose(network.extract(photo, tag), taken, atol=1e-5)
        styles = network.imagine(noise, 2)
        for attribute in range(3):
            made = plain.imagine(noise, 2, attribute)
            assert torch.allclose(styles[:, attribute], made, atol=1e-5)

    def test_style_that_says_nothing_leaves_plain_instance_norm(self) -> None:
        network = generator()
        for value in network.translators[0].style_to_params.parameters():
            value.data.zero_()
        code = network.encode(image(16))
        one, other = (network.translate(code, torch.randn(1, 16), 0) for _ in range(2))
        assert torch.equal(one, other)
        plain = Reference(dict(network.state_dict()))
        expected = plain.translate(code, torch.zeros(1, 16), 0, 8, 3)
        assert torch.allclose(one, expected, atol=1e-5)

    def test_mask_forced_shut_keeps_the_code(self) -> None:
        network = generator()
        network.translators[1].masks[0].weight.data.zero_()
        network.translators[1].masks[0].bias.data.fill_(-200)
        code = network.encode(image(16))
        assert torch.equal(network.translate(code, torch.randn(1, 16), 1), code)

    def test_calls_do_not_influence_each_other(self) -> None:
        network, photo = generator(), image(16)
        styles = [torch.randn(1, 16) for _ in range(2)]
        first = network(photo, styles[0], 0)[0]
        network(photo, styles[1], 0)
        assert torch.equal(network(photo, styles[0], 0)[0], first)
        # Nothing that hangs on a graph is left behind: a copy can be made.
        assert torch.equal(copy.deepcopy(network)(photo, styles[0], 0)[0], first)

    def test_flat_image_has_a_finite_gradient(self) -> None:
        photo = torch.full((1, 3, 16, 16), 0.5, requires_grad=True)
        model()(photo, "bangs:with").sum().backward()
        assert torch.isfinite(photo.grad).all()


class TestConditions:
    def test_they_are_tag_and_value(self) -> None:
        assert model().conditions == (
            "bangs:with", "bangs:without", "eyeglasses:with", "eyeglasses:without",
            "hair_color:black", "hair_color:blond", "hair_color:brown",
        )  # fmt: skip

    def test_noise_is_fixed_and_names_choose_tag_and_end(self) -> None:
        manipulator = model()
        condition = manipulator.condition("hair_color:brown")
        assert (condition.part, condition.name) == (2, "hair_color:brown")
        assert condition.value.shape == (1, 16)
        expected = manipulator.network.imagine(manipulator.network.fixed_noise(), 2)[:, 2]
        assert torch.equal(condition.value, expected)
        torch.randn(5)  # whatever else is drawn
        assert torch.equal(manipulator.condition("hair_color:brown").value, condition.value)

    def test_all_conditions_give_different_forgeries_but_one_feature_map(self) -> None:
        manipulator, photo = model(), image(16)
        results = [manipulator.outputs(photo, name) for name in manipulator.conditions]
        for index, (forged, features) in enumerate(results):
            assert torch.equal(features, results[0][1])
            for other, _ in results[:index]:
                assert (forged - other).abs().max() > 1e-3

    def test_mistaken_names_are_told(self) -> None:
        with pytest.raises(UnknownName, match="did you mean bangs:without"):
            model().condition("bangs:withou")
        with pytest.raises(UnknownName, match="no tag 'eyeglases'; did you mean eyeglasses"):
            model().condition("eyeglases=photo.png")
        with pytest.raises(UnknownName, match="no tag 'hat'"):
            model().reference("hat", image())


class TestReference:
    def test_style_is_the_extractors_and_serves_a_batch(self) -> None:
        manipulator, photo = model(), image(16, 3)
        shown = image(40, 1)
        condition = manipulator.reference("eyeglasses", shown)
        assert (condition.part, tuple(condition.value.shape)) == (1, (1, 16))
        assert not condition.value.requires_grad
        assert torch.equal(condition.value, manipulator.network.extract(2 * shown - 1, 1))
        together = manipulator(photo, condition)
        alone = torch.cat([manipulator(one[None], condition) for one in photo])
        assert torch.allclose(together, alone, atol=1e-5)
        assert (together - manipulator(photo, "eyeglasses:with")).abs().max() > 1e-3

    def test_batch_of_references_gives_each_photo_its_own(self) -> None:
        manipulator, photo, shown = model(), image(16, 2), image(32, 2)
        together = manipulator(photo, manipulator.reference("bangs", shown))
        second = manipulator(photo[1:], manipulator.reference("bangs", shown[1:]))
        assert torch.allclose(together[1:], second, atol=1e-5)

    def test_command_lines_form_reads_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "with=sign.png"
        levels = torch.randint(0, 256, (36, 40, 3), dtype=torch.uint8)
        PILImage.fromarray(levels.numpy()).save(path)
        manipulator = model()
        condition = manipulator.condition(f"hair_color={path}")
        shown = levels.permute(2, 0, 1)[None] / 255
        assert torch.equal(condition.value, manipulator.reference("hair_color", shown).value)
        assert (condition.part, condition.name) == (2, f"hair_color={path}")
        assert torch.equal(manipulator(image(), condition.name), manipulator(image(), condition))
        with pytest.raises(ImageError, match=r"none\.png"):
            manipulator.condition(f"bangs={tmp_path / 'none.png'}")

    def test_native_size_holds_for_references_too(self) -> None:
        manipulator = HiSDModel(generator(), native_size=16)
        shown = image(48, 1)
        small = functional.interpolate(shown, (16, 16), mode="bilinear", antialias=True)
        expected = manipulator.network.extract(2 * small - 1, 0)
        assert torch.allclose(manipulator.reference("bangs", shown).value, expected)

    def test_too_small_or_out_of_range_is_refused(self) -> None:
        assert model().network.least == 8
        with torch.device("meta"):
            assert HisdGenerator().least == 64
        with pytest.raises(ImageError, match="8 pixels or more, got 7x9"):
            model().reference("bangs", tiny.faces_image(1, 7, width=9))
        with pytest.raises(ImageError, match=r"`reference` must lie in \[0, 1\]"):
            model().reference("bangs", 2 * image() - 1)


class TestContract:
    def test_gradient_reaches_the_image_alone_and_nothing_else_changes(self) -> None:
        manipulator, photo = model(), image(16)
        before = {name: value.clone() for name, value in manipulator.state_dict().items()}
        given = photo.clone().requires_grad_()
        forged, features = manipulator.outputs(given, "hair_color:blond")
        assert forged.shape == photo.shape
        assert features.shape == (2, 32, 4, 4)
        forged.sum().backward()
        assert torch.isfinite(given.grad).all()
        assert (given.grad != 0).float().mean() > 0.9
        assert all(value.grad is None for value in manipulator.parameters())
        assert torch.equal(given, photo)
        for name, value in manipulator.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_mode_set_by_a_caller_changes_no_bit(self) -> None:
        manipulator, photo = model(), image(16)
        results = [change()(photo) for change in (manipulator.eval, manipulator.train)]
        assert torch.equal(*results)

    def test_result_is_not_clamped(self) -> None:
        manipulator = model()
        manipulator.network.decoder[2].bias.data.fill_(9)
        assert manipulator(image(16)).max() > 1.5

    @pytest.mark.parametrize("size", [26, 4])
    def test_illegal_sizes_are_refused(self, size: int) -> None:
        expected = "nearest such size is 24x24" if size == 26 else "8 pixels or more, got 4x4"
        with pytest.raises(ImageError, match=expected):
            model()(image(size))


class TestLoading:
    def save(self, folder: Path, content: object) -> Path:
        torch.save(content, folder / "small.pt")
        return folder / "small.pt"

    @pytest.mark.parametrize("layout", ["gen_test", "both", "module.", "bare", "safetensors"])
    def test_every_layout_gives_the_same_bits(self, layout: str, tmp_path: Path) -> None:
        state = dict(generator().state_dict())
        if layout == "safetensors":
            path = tmp_path / "small.safetensors"
            save_file(state, path)
        else:
            wrapped = {f"module.{key}": value for key, value in state.items()}
            path = self.save(tmp_path, {
                "gen_test": {"gen_test": state},
                "both": {"gen": dict(generator(1).state_dict()), "gen_test": state},
                "module.": {"gen_test": wrapped},
                "bare": state,
            }[layout])  # fmt: skip
        loaded, photo = HiSDModel.load(path, CARD), image(16)
        for name in ("bangs:with", "hair_color:brown"):
            assert torch.equal(loaded(photo, name), model()(photo, name))

    def test_raw_weights_are_used_with_a_warning(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, {"gen": dict(generator(1).state_dict())})
        with pytest.warns(UserWarning, match="no averaged weights"):
            loaded = HiSDModel.load(path, CARD)
        assert torch.equal(loaded(image(16)), model(1)(image(16)))

    def test_card_names_tags_values_and_size(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, dict(generator(attributes=(2,)).state_dict()))
        config = {"tags": ["Smiling"], "attributes": [["with", "without"]], "native_size": 16}
        loaded = HiSDModel.load(path, replace(CARD, config=config))
        assert loaded.conditions == ("smiling:with", "smiling:without")
        assert loaded(image(18)).shape == (2, 3, 18, 18)

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ({"tags": ["hat"], "attributes": [["with"]]}, "3 tags of 2, 2, 3 .* 1 tags of 1"),
            ({"tags": ["hat"]}, "belong together"),
            ({"tags": ["hat", "bangs"], "attributes": [["with"]]}, "2 tags need as many lists"),
            ({"width": 8}, "no setting width"),
        ],
    )
    def test_cards_that_do_not_fit_are_refused(
        self, config: dict[str, object], said: str, tmp_path: Path
    ) -> None:
        path = self.save(tmp_path, dict(generator().state_dict()))
        with pytest.raises(WeightsError, match=said):
            HiSDModel.load(path, replace(CARD, config=config))

    def test_wrong_or_truncated_files_are_refused(self, tmp_path: Path) -> None:
        state = dict(generator().state_dict())
        incomplete = {key: value for key, value in state.items() if "decoder.1.conv2" not in key}
        with pytest.raises(WeightsError, match=r"2 missing \(decoder\.1\.conv2"):
            HiSDModel.load(self.save(tmp_path, {"gen_test": incomplete}), CARD)
        with pytest.raises(WeightsError, match="not the weights of a HiSD"):
            HiSDModel.load(self.save(tmp_path, tiny.manipulator().network.state_dict()), CARD)
        with pytest.raises(WeightsError, match="holds no 'gen_test' or 'gen'"):
            HiSDModel.load(self.save(tmp_path, {"dis": state}), CARD)
        whole = self.save(tmp_path, state).read_bytes()
        (tmp_path / "small.pt").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(WeightsError, match="damaged"):
            HiSDModel.load(tmp_path / "small.pt", CARD)

    def test_published_card_fits_the_published_names(self) -> None:
        card = WeightStore().card("hisd")
        config = dict(card.config)
        assert HiSDModel(generator()).conditions == tuple(
            f"{tag}:{value}"
            for tag, values in zip(config["tags"], config["attributes"], strict=True)
            for value in values
        )
        assert "NC-SA" in card.licence
        assert not card.sha256
