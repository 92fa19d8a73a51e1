"""`wrap` and the base of manipulators: conditions, ranges, sizes, mode, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.errors import ConfigError, ImageError, UnknownName
from shields.models.manipulation import Condition, Manipulator, resized, wrap
from tests import tiny


def image(side: int = 32, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


class Swapper(nn.Module):
    """As many user modules are: [-1, 1], 224 pixels only, a tuple out, batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)
        )

    def forward(self, native: Tensor) -> tuple[Tensor, str]:
        assert native.shape[2:] == (224, 224)
        return torch.tanh(self.layers(native)), "mask"


def swapper(seed: int = 0) -> Swapper:
    with tiny.seeded(seed):
        return Swapper().eval()


def test_a_users_module_works_through_wrap() -> None:
    module = swapper()
    manipulator = wrap(module, native_range="signed", native_size=224)
    given = image(96)
    native = (
        functional.interpolate(given, size=(224, 224), mode="bilinear", align_corners=False) * 2 - 1
    )
    by_hand = functional.interpolate(
        (module(native)[0] + 1) / 2,
        size=(96, 96),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    torch.testing.assert_close(manipulator(given), by_hand)
    assert manipulator.name == "Swapper"


def test_its_gradient_reaches_the_image_and_no_parameter() -> None:
    module = swapper()
    assert all(parameter.requires_grad for parameter in module.parameters())
    manipulator = wrap(module, native_size=224)
    given = image(96).requires_grad_(True)
    manipulator(given).square().sum().backward()
    assert given.grad is not None
    assert (given.grad != 0).float().mean() > 0.99
    assert all(not parameter.requires_grad for parameter in module.parameters())


def test_the_gradient_is_that_of_finite_differences() -> None:
    manipulator = wrap(lambda native: native.square() * 0.5, native_range="signed")
    given = image(8, 1).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: manipulator(x), (given,))


@pytest.mark.parametrize(
    ("native", "output", "expected"),
    [("unit", None, 0.5), ("signed", None, 0.5), ("unit", "signed", 0.75), ("signed", "unit", 0.0)],
)
def test_ranges_are_converted_both_ways(native: str, output: str | None, expected: float) -> None:
    manipulator = wrap(lambda given: given, native_range=native, output_range=output)  # type: ignore[arg-type]
    result = manipulator(torch.full((1, 3, 4, 4), 0.5))
    assert torch.equal(result, torch.full((1, 3, 4, 4), expected))


def test_results_are_not_clamped() -> None:
    manipulator = wrap(lambda given: given * 3, native_range="unit")
    assert float(manipulator(torch.ones(1, 3, 4, 4)).max()) == 3


@pytest.mark.parametrize("wrapped", [lambda x: x, lambda x: (x, None), lambda x: [[x], 1, 2]])
def test_pictures_are_taken_out_of_tuples_and_lists(wrapped: object) -> None:
    given = image()
    assert callable(wrapped)
    assert torch.equal(wrap(wrapped, native_range="unit")(given), given)


@pytest.mark.parametrize(
    "result",
    [None, "image", (), {"image": 1}, torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8),
     torch.zeros(2, 1, 8, 8)],
)  # fmt: skip
def test_results_that_are_no_images_are_refused(result: object) -> None:
    manipulator = wrap(lambda given: result)
    with pytest.raises(ImageError, match=r"must return an image \(2, 3, H, W\)"):
        manipulator(image())


def test_a_result_of_another_size_is_brought_back() -> None:
    manipulator = wrap(lambda given: given.repeat_interleave(2, 2).repeat_interleave(2, 3))
    given = image(8)
    assert manipulator(given).shape == given.shape
    constant = torch.full((1, 3, 8, 8), 0.25)
    torch.testing.assert_close(manipulator(constant), constant)


def test_conditions_are_chosen_by_name() -> None:
    factors = {"dark": 0.5, "same": 1.0}
    manipulator = wrap(
        lambda given, name: given * factors[name], conditions=[*factors], native_range="unit"
    )
    given = image()
    assert manipulator.conditions == ("dark", "same")
    assert torch.equal(manipulator(given, "same"), given)
    assert torch.equal(manipulator(given), given * 0.5)
    assert torch.equal(manipulator(given, manipulator.condition("same")), given)


def test_an_unknown_condition_has_a_hint() -> None:
    manipulator = wrap(lambda given, name: given, conditions=["blond_hair", "smiling"])
    manipulator.name = "mine"
    with pytest.raises(UnknownName, match="'mine' has no condition 'smilin'; did you mean smiling"):
        manipulator(image(), "smilin")
    with pytest.raises(UnknownName, match="there are: default"):
        wrap(lambda given: given)(image(), "smiling")


@pytest.mark.parametrize(
    ("size", "nearest"), [((30, 32), "32x32"), ((33, 47), "32x48"), ((1, 8), "8x8")]
)
def test_sizes_off_the_multiple_name_the_nearest(size: tuple[int, int], nearest: str) -> None:
    manipulator = wrap(lambda given: given, multiple=8)
    with pytest.raises(ImageError, match=f"got {size[0]}x{size[1]}; .* is {nearest}"):
        manipulator(torch.zeros(1, 3, *size))
    assert manipulator(torch.zeros(1, 3, 32, 48)).shape == (1, 3, 32, 48)


def test_any_size_is_legal_where_the_network_has_its_own() -> None:
    seen = []

    def note(given: Tensor) -> Tensor:
        seen.append(tuple(given.shape[2:]))
        return given

    manipulator = wrap(note, native_size=16, multiple=8)
    assert manipulator(torch.zeros(1, 3, 30, 47)).shape == (1, 3, 30, 47)
    assert seen == [(16, 16)]


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    given = image(16)
    assert resized(given, (16, 16)) is given
    assert torch.equal(wrap(lambda x: x, native_range="unit", native_size=16)(given), given)


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_its_owners_and_nobody_elses(*, training: bool) -> None:
    module = swapper().train(training)
    # layers of one module may be in different modes
    module.layers[0].train(not training)
    manipulator = wrap(module, native_size=224)
    parent = nn.ModuleList([manipulator])
    for call in (manipulator.eval, manipulator.train, parent.eval, parent.train):
        call()
        assert module.training == training
        assert module.layers[1].training == training
        assert module.layers[0].training != training


def test_calling_eval_and_train_changes_no_output_bit() -> None:
    manipulator = wrap(swapper(), native_size=224)
    given = image(64)
    before = manipulator(given)
    assert torch.equal(manipulator.train()(given), before)
    assert torch.equal(manipulator.eval()(given), before)


def test_the_feature_map_comes_with_the_image() -> None:
    manipulator = wrap(
        lambda native: native, native_size=16, features=lambda native: native[:, :, ::4, ::4]
    )
    given = image(32)
    forged, features = manipulator.outputs(given)
    assert features is not None
    assert features.shape == (2, 3, 4, 4)
    assert torch.equal(manipulator.features(given), features)
    assert torch.equal(manipulator(given), forged)
    assert float(features.min()) < 0  # of the native range


def test_a_layer_of_the_network_gives_its_features_in_the_same_pass() -> None:
    module, passes = swapper(), []
    module.layers[0].register_forward_hook(lambda *_: passes.append(1))
    manipulator = wrap(module, native_size=224, features=module.layers[1])
    forged, features = manipulator.outputs(image())
    assert len(passes) == 1
    native = resized(image(), (224, 224)) * 2 - 1
    assert features is not None
    assert torch.equal(features, module.layers[1](module.layers[0](native)))
    assert torch.equal(forged, manipulator(image()))
    assert not module.layers[1]._forward_hooks


def test_a_manipulator_without_features_says_so_by_name() -> None:
    manipulator = wrap(lambda native: native)
    manipulator.name = "mine"
    with pytest.raises(ConfigError, match="'mine' offers no feature map"):
        manipulator.features(image())


def test_a_module_moves_with_the_manipulator() -> None:
    module = swapper()
    wrap(module).to(torch.float64)
    assert next(module.parameters()).dtype == torch.float64


class Echo(Manipulator):
    """The least that the contract asks for."""

    def _run(self, image: Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        return image + condition.value.sum(), None

    def _condition(self, name: str, labels: Tensor | None) -> Condition:
        return Condition(name=name, value=torch.zeros(1, 1) if labels is None else labels)


def test_a_subclass_needs_only_run() -> None:
    manipulator, given = Echo(), image()
    assert torch.equal(manipulator(given), given)
    told = manipulator.condition(labels=torch.tensor([[0.25]]))
    assert torch.equal(manipulator(given, told), given + 0.25)
    with pytest.raises(ImageError, match="multiples of 4"):
        manipulator(image(30))


def test_the_owner_of_a_method_is_frozen_too_and_keeps_its_mode() -> None:
    module = swapper().train()
    manipulator = wrap(module.forward, native_size=224)
    assert all(not parameter.requires_grad for parameter in module.parameters())
    assert module.training
    assert module.layers[1].training
    assert {id(parameter) for parameter in module.parameters()} <= {
        id(parameter) for parameter in manipulator.parameters()
    }


def test_the_network_inside_a_function_is_frozen_and_moves_along() -> None:
    module = swapper()
    manipulator = wrap(lambda native: module(native), native_size=224)
    assert all(not parameter.requires_grad for parameter in module.parameters())
    assert {id(p) for p in module.parameters()} <= {id(p) for p in manipulator.parameters()}
    assert torch.equal(manipulator(image(64)), wrap(module, native_size=224)(image(64)))
