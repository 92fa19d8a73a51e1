"""Networks that enlarge or restore photos, from any checkpoint that spandrel can read.

Source:
    spandrel, https://github.com/chaiNNer-org/spandrel (MIT): tells the architecture from the
    weights. Files are opened by `shields.weights` alone, so nothing in them is run.
    GFP-GAN: Towards Real-World Blind Face Restoration with Generative Facial Prior (Wang, Li,
    Zhang, Shan, 2021), https://arxiv.org/abs/2101.04061; the five points of the aligned face are
    those of facexlib, which its code aligns by.

Differs:
    spandrel's GFPGAN takes what it is given for [-1, 1] and draws noise at every call; here it gets
    that range, and the noise that is stored with its weights, so that results repeat.
    A restored face is pasted back with a square soft edge, in facexlib within what a second network
    calls skin and hair.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from shields.codec import resize
from shields.errors import MissingPackage, WeightsError
from shields.faces import similarity, warp
from shields.models.base import signed_range_to_unit, unit_range_to_signed
from shields.models.restoration import Restorer
from shields.types import Face, Image
from shields.weights import Card, read_state_dict

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

__all__ = ["FaceRestorer", "SpandrelRestorer", "restored"]

#: where publishers put the network in a checkpoint of several, the best first
_PARTS = ("params_ema", "params-ema", "model_state_dict", "params", "model", "net")
#: side of an aligned face, the five points in it, and the width of its soft edge, pixels
_FACE_SIDE, _FACE_EDGE = 512, 48
_FACE_POINTS = (
    (192.98138, 239.94708), (318.90277, 240.1936), (256.63416, 314.01935),
    (201.26117, 371.41043), (313.08905, 371.15118),
)  # fmt: skip
#: what an aligned face shows beyond the photo's border
_BEYOND = (135 / 255, 133 / 255, 132 / 255)


class SpandrelRestorer(Restorer):
    """A network that spandrel recognised: (B, 3, H, W) -> (B, 3, scale H, scale W)."""

    def __init__(self, descriptor: ImageModelDescriptor[Any]) -> None:
        super().__init__()
        self.network: torch.nn.Module = descriptor.model
        self.scale = descriptor.scale
        self._descriptor = descriptor
        # As spandrel calls it, ranges and sides included, but for its ban on gradients.
        self._call = inspect.unwrap(type(descriptor).__call__)
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> SpandrelRestorer:
        """Open a weights file; a restorer of aligned faces comes back as a `FaceRestorer`.

        Raises:
            WeightsError: The file is damaged, or spandrel knows no network with such weights.
        """
        return _restorer(_described(read_state_dict(source, _PARTS), card.name))

    def _restore(self, image: Image) -> Image:
        if self._descriptor.architecture.id == "GFPGAN":
            signed = unit_range_to_signed(image)
            made = self.network(signed, return_rgb=False, randomize_noise=False)[0]
            return signed_range_to_unit(made)
        return self._call(self._descriptor, image)


class FaceRestorer(SpandrelRestorer):
    """A network that restores one aligned face of 512 x 512."""

    def paste(self, image: Image, faces: Sequence[Sequence[Face]], batch: int = 4) -> Image:
        """Restore the faces of photos and put them back.

        Args:
            image: (B, 3, H, W), [0, 1].
            faces: Of each photo, in its pixels.
            batch: Faces that run at once.

        Returns:
            (B, 3, H, W), [0, 1]; what lies around the faces is left as it is.
        """
        owners = [index for index, found in enumerate(faces) for _ in found]
        if not owners:
            return image
        points = torch.stack([torch.as_tensor(face.landmarks) for found in faces for face in found])
        # On the CPU in double precision: the inverse is taken of it.
        matrices = similarity(points.double().cpu(), torch.tensor(_FACE_POINTS))
        aligned = torch.cat(
            [
                _aligned(image[owner, None], matrix[None])
                for owner, matrix in zip(owners, matrices, strict=True)
            ]
        )
        made = torch.cat(
            [restored(self, part, (_FACE_SIDE,) * 2) for part in torch.split(aligned, batch)]
        )
        result = image.clone()
        for owner, matrix, face in zip(owners, matrices, made.clamp(0, 1), strict=True):
            _put(result[owner], matrix, face)
        return result


def _aligned(image: Image, matrix: Tensor) -> Image:
    """(1, 3, H, W), (1, 2, 3) -> (1, 3, 512, 512); beyond the photo there is grey."""
    beyond = image.new_tensor(_BEYOND).view(1, 3, 1, 1)
    return warp(image - beyond, matrix.float(), (_FACE_SIDE, _FACE_SIDE)) + beyond


def _put(photo: Tensor, matrix: Tensor, face: Tensor) -> None:
    """Blend a restored face (3, 512, 512) into a photo (3, H, W), in place."""
    linear = matrix[:, :2].inverse()
    back = torch.cat([linear, -(linear @ matrix[:, 2:])], dim=1)
    corners = torch.tensor([[x, y, 1.0] for x in (0, _FACE_SIDE - 1) for y in (0, _FACE_SIDE - 1)])
    reached = corners.double() @ back.T
    left, top = (max(math.floor(v), 0) for v in reached.min(dim=0).values.tolist())
    right, bottom = (math.ceil(v) + 1 for v in reached.max(dim=0).values.tolist())
    region = photo[:, top:bottom, left:right]
    if region.numel() == 0:
        return
    back[:, 2] -= torch.tensor([left, top])
    ramp = ((torch.arange(_FACE_SIDE) + 0.5) / _FACE_EDGE).clamp_max(1).mul(math.pi / 2).sin()
    line = (ramp * ramp.flip(0)).square().to(face)
    sheet = torch.cat([face, (line[:, None] * line)[None]])[None]
    *colours, soft = warp(sheet, back[None].float(), (region.shape[1], region.shape[2]))[0]
    # The warp fades to black beyond the face; the soft edge is 0 there before.
    region += soft * (torch.stack(colours) - region)


def _described(state: dict[str, Tensor], name: str) -> ImageModelDescriptor[Any]:
    """Let spandrel find out which network weights belong to."""
    try:
        from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError
    except ModuleNotFoundError as error:
        raise MissingPackage(
            f"the network {name!r} needs the package spandrel: pip install 'shields[restore]'"
        ) from error
    try:
        with torch.random.fork_rng(devices=[]):
            descriptor = ModelLoader().load_from_state_dict(state)
    except UnsupportedModelError:
        raise WeightsError(
            f"{name!r} is no network that spandrel knows; its keys begin with "
            f"{', '.join(list(state)[:3])}; is it the generator's own file?"
        ) from None
    # Of building and filling any of forty architectures; the types are many.
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(f"the weights of {name!r} do not fit their network: {said}") from error
    channels = descriptor.input_channels, descriptor.output_channels
    if not isinstance(descriptor, ImageModelDescriptor) or channels != (3, 3):
        raise WeightsError(
            f"{name!r} is a network for {descriptor.purpose} of {channels[0]} channels; needed is "
            "one that takes a photo alone, in RGB"
        )
    return descriptor


def _restorer(descriptor: ImageModelDescriptor[Any]) -> SpandrelRestorer:
    kind = FaceRestorer if descriptor.purpose == "FaceSR" else SpandrelRestorer
    return kind(descriptor)


def restored(network: Restorer, image: Image, size: tuple[int, int]) -> Image:
    """Restore and bring to a size; a gradient flows, at the price of a second run."""
    if image.requires_grad and torch.is_grad_enabled():
        return resize(recompute(network.restore, image, use_reentrant=False), size)
    return resize(network.restore(image), size)
