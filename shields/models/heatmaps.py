"""Heat maps: which places of a photo a recognizer goes by, through the `grad-cam` library.

Source:
    Grad-CAM (Selvaraju et al., 2017), https://arxiv.org/abs/1610.02391.
    Grad-CAM++ (Chattopadhay et al., 2018), https://arxiv.org/abs/1710.11063.
    Library: https://github.com/jacobgil/pytorch-grad-cam (MIT).

Differs:
    Where a network names no people, the score is the length of its embedding along the direction
    of the clean one: the cosine of an embedding with itself is at its maximum, so it has no
    gradient. The map is brought back from the aligned crop to the photo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from shields.errors import ConfigError, ImageError, MissingPackage
from shields.faces import warp
from shields.models.base import Recognizer
from shields.types import Image, check_image

__all__ = ["Method", "NamesPeople", "heat_map", "last_map"]

Method = Literal["grad-cam", "grad-cam++"]


@runtime_checkable
class NamesPeople(Protocol):
    """A recognizer whose network has classes: its heat map asks for the likeliest person."""

    def logits(self, face: Image) -> Tensor:
        """(B, 3, *crop_size), [0, 1] -> (B, classes)."""


def heat_map(
    recognizer: Recognizer,
    image: Image,
    landmarks: Tensor | None = None,
    *,
    method: Method = "grad-cam++",
    layer: nn.Module | None = None,
) -> Tensor:
    """Show which places of photos their recognition depends on.

    It depends on the clean photo alone: compute it once per photo.

    Args:
        recognizer: Any; its parameters stay frozen and get no gradient.
        image: (B, 3, H, W), [0, 1].
        landmarks: (B, 5, 2) x, y, pixels; without them the whole photo is squeezed into the crop.
        method: "grad-cam", or "grad-cam++", which ID-Guard uses.
        layer: The module whose output is weighed, (B, C, h, w); `last_map`'s where left out.

    Returns:
        (B, 1, H, W), float32, every photo's from 0 to 1; all 0 where nothing speaks for the score.
        It lies on the photo, 0 outside the aligned crop, and carries no gradient.

    Raises:
        ConfigError: There is no such method, or the layer is not part of the recognizer.
        ImageError: The image is none, or the recognizer has no feature maps.
        MissingPackage: `grad-cam` is not installed.
    """
    check_image(image)
    if method not in get_args(Method):
        raise ConfigError(f"`method` must be one of {get_args(Method)}, got {method!r}")
    # a caller may have switched gradients off
    with torch.inference_mode(False), torch.enable_grad():
        image = image.detach().clone()
        matrix = recognizer.matrix(landmarks, image)
        face = recognizer.align(image, matrix).detach().clamp(0, 1)
        layer = last_map(recognizer, face) if layer is None else layer
        if not any(layer is module for module in recognizer.modules()):
            raise ConfigError(f"`layer` must be a module of the recognizer {recognizer.name!r}")
        crop = _library_map(recognizer, face, layer, method)[:, None].to(image.device)
    # `warp` takes the map that leads to its result: here from crop to photo
    height, width = image.shape[2:]
    return _stretched(warp(crop, _inverse(matrix), (height, width)))


def last_map(recognizer: Recognizer, face: Image) -> nn.Module:
    """Find the module that returns the last feature map of a recognizer.

    Args:
        recognizer: Any.
        face: (B, 3, *crop_size), [0, 1], to run it once.

    Returns:
        The one that makes the last of its `features`; where it offers none, or makes them by no
        module, the last one that returns a map of more than one place.

    Raises:
        ImageError: No module returns such a map.
    """
    with torch.no_grad():
        with _recorded(recognizer) as passed:
            _scores(recognizer)(face)
        once = [module for module, _ in passed]
        maps = [
            module
            for module, output in passed
            if output.ndim == 4 and min(output.shape[2:]) > 1 and once.count(module) == 1
        ]
        try:
            with _recorded(recognizer) as shown:
                wanted = recognizer.features(face)[-1]
            # An outer module may hand on what an inner one made; the outer one runs once for sure.
            found = [module for module, output in shown if output is wanted and module in maps]
        except ImageError:
            found = []
    if not maps:
        raise ImageError(f"no module of the recognizer {recognizer.name!r} returns a feature map")
    return (found or maps)[-1]


@contextmanager
def _recorded(network: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Note every module that returns a tensor, in the order in which they finish."""
    passed: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor):
            passed.append((module, output))

    hooks = [module.register_forward_hook(note) for module in network.modules()]
    try:
        yield passed
    finally:
        for hook in hooks:
            hook.remove()


def _scores(recognizer: Recognizer) -> Callable[[Image], Tensor]:
    """What is scored: logits where there are classes, else the embedding, not normalised."""
    return recognizer.logits if isinstance(recognizer, NamesPeople) else recognizer._embed


class _Scored(nn.Module):
    """The library calls a module, and asks its parameters for the device."""

    def __init__(self, recognizer: Recognizer) -> None:
        super().__init__()
        self.recognizer = recognizer

    def forward(self, face: Image) -> Tensor:
        return _scores(self.recognizer)(face).float()


def _targets(recognizer: Recognizer, face: Image) -> list[Callable[[Tensor], Tensor]]:
    """One score per photo: its likeliest class, or its length along its own embedding."""
    with torch.no_grad():
        clean = _scores(recognizer)(face).float()
    if isinstance(recognizer, NamesPeople):
        directions = nn.functional.one_hot(clean.argmax(dim=1), clean.shape[1]).to(clean)
    else:
        directions = nn.functional.normalize(clean, dim=1)
    return [partial(torch.dot, own) for own in directions]


def _library_map(recognizer: Recognizer, face: Image, layer: nn.Module, method: Method) -> Tensor:
    """Run the library on aligned faces: (B, *crop_size), [0, 1], on the CPU."""
    targets = _targets(recognizer, face)
    kind = _method(method)
    cam = kind(_Scored(recognizer), [layer])
    try:
        # The parameters are frozen: only a face that wants a gradient leads one to the layer.
        values = cam.forward(face.requires_grad_(True), targets)
    finally:
        cam.activations_and_grads.release()
    return torch.from_numpy(values).float()


def _method(method: Method) -> Any:  # noqa: ANN401  a class of a package without types
    try:
        import pytorch_grad_cam
    except ModuleNotFoundError as error:
        raise MissingPackage(
            "heat maps need the package grad-cam: pip install 'shields[heatmaps]'"
        ) from error
    plain = method == "grad-cam"
    return pytorch_grad_cam.GradCAM if plain else pytorch_grad_cam.GradCAMPlusPlus


def _inverse(matrix: Tensor) -> Tensor:
    """Turn crop-from-image (B, 2, 3) into image-from-crop."""
    linear = torch.linalg.inv(matrix[:, :, :2])
    shift = -(linear * matrix[:, None, :, 2]).sum(dim=2)
    return torch.cat([linear, shift[..., None]], dim=2)


def _stretched(maps: Tensor) -> Tensor:
    """Bring every map (B, 1, H, W) to [0, 1], smallest to largest value."""
    least = maps.amin(dim=(1, 2, 3), keepdim=True)
    span = maps.amax(dim=(1, 2, 3), keepdim=True) - least
    return torch.where(span > 0, (maps - least) / span.clamp_min(1e-12), 0.0)
