"""The contracts behind which other people's networks stand.

Callers see images in [0, 1] and nothing else: native ranges, legal sizes and train/eval mode are
hidden here. Networks are frozen, but a gradient always reaches the image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.errors import ImageError
from shields.types import Face, Image

__all__ = ["Autoencoder", "Detector", "Frozen", "Perceptual", "Recognizer"]


class Frozen(nn.Module):
    """A network without trainable parameters whose mode nobody can change by accident."""

    #: name under which reports mention it, e.g. the card's
    name: str = ""
    #: methods in which the time goes, for `accelerate`
    HOT: ClassVar[tuple[str, ...]] = ()

    def freeze(self) -> None:
        """Pin evaluation mode and take the parameters out of training; call after building."""
        self.requires_grad_(False)
        super().train(False)

    def accelerate(self, backend: str = "inductor") -> None:
        """Compile what the loops call (`torch.compile`); pays off from some hundred calls on.

        Args:
            backend: A compiler that `torch.compile` knows.
        """
        for name in self.HOT:
            setattr(self, name, torch.compile(getattr(self, name), backend=backend))

    def train(self, mode: bool = True) -> Self:
        """Do nothing: the mode belongs to the network, not to a caller."""
        return self


class Autoencoder(Frozen, ABC):
    """Image <-> latent; `encode` and `decode` take any size and pad to what the network needs."""

    #: sides of what `decode` returns are multiples of this, pixels
    multiple: int = 8
    HOT = ("_encode", "_decode")

    @abstractmethod
    def _encode(self, image: Image) -> Tensor:
        """(B, 3, H, W), [0, 1], sides legal -> posterior mean, not scaled."""

    @abstractmethod
    def _decode(self, latent: Tensor) -> Image:
        """Latent -> (B, 3, H, W) about [0, 1], not clamped."""

    def encode(self, image: Image) -> Tensor:
        """Encode (B, 3, H, W), [0, 1] to the posterior mean, unscaled: (B, C, H/f, W/f)."""
        bottom, right = (-side % self.multiple for side in image.shape[2:])
        if bottom or right:
            image = functional.pad(image, (0, right, 0, bottom), mode="replicate")
        return self._encode(image)

    def decode(self, latent: Tensor) -> Image:
        """Decode a latent to an image of about [0, 1]: not clamped, so that gradients survive."""
        return self._decode(latent)

    def reconstruct(self, image: Image) -> Image:
        """Encode, decode and clamp: (B, 3, H, W) -> (B, 3, H, W), [0, 1], same size."""
        height, width = image.shape[2:]
        return self.decode(self.encode(image)).clamp(0, 1)[..., :height, :width]


class Recognizer(Frozen, ABC):
    """Aligned face -> unit embedding; `align` fixes the warp from the clean photo's landmarks."""

    #: height and width of the aligned crop, pixels
    crop_size: tuple[int, int]
    #: (5, 2) x, y of the landmarks in the crop
    template: Tensor
    #: cosine above which two faces count as one person, where it was measured
    threshold: float | None = None
    HOT = ("_embed",)

    @abstractmethod
    def _embed(self, face: Image) -> Tensor:
        """(B, 3, *crop_size), [0, 1] -> (B, D), not normalised."""

    def features(self, face: Image) -> tuple[Tensor, ...]:
        """Deep feature maps of an aligned crop, shallow to deep; for perceptual distances."""
        raise ImageError(f"the recognizer {self.name!r} offers no feature maps")

    def align(self, image: Image, matrix: Tensor) -> Image:
        """Warp (B, 3, H, W) by crop-from-image matrices (B, 2, 3) to (B, 3, *crop_size)."""
        from shields.faces import warp

        return warp(image, matrix, self.crop_size)

    def matrix(self, landmarks: Tensor | None, image: Image) -> Tensor:
        """Alignment (B, 2, 3) of each image from its landmarks (B, 5, 2), in pixels.

        Without landmarks, or where a row of them is NaN, the whole image is squeezed into the crop.
        """
        from shields.faces import alignment

        return alignment(landmarks, image, self.template, self.crop_size)

    def embed(self, face: Image) -> Tensor:
        """Embed an aligned crop (B, 3, *crop_size), [0, 1]: (B, D), unit length."""
        return functional.normalize(self._embed(face).float(), dim=1)

    def forward(self, image: Image, matrix: Tensor) -> Tensor:
        """Align and embed: (B, 3, H, W), (B, 2, 3) -> (B, D), unit length."""
        return self.embed(self.align(image, matrix))


class Perceptual(Frozen, ABC):
    """A distance between images as people see them; the clean side is computed once."""

    HOT = ("features",)

    @abstractmethod
    def features(self, image: Image) -> tuple[Tensor, ...]:
        """Normalised feature maps of (B, 3, H, W), [0, 1]."""

    @abstractmethod
    def distance(self, features: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> Tensor:
        """Distance (B,) between two sets of features, 0 for equal ones."""

    def forward(self, image: Image, other: Image) -> Tensor:
        """Distance (B,) between two batches of images."""
        return self.distance(self.features(image), self.features(other))


class Detector(ABC):
    """Finds faces; knows no gradients."""

    @abstractmethod
    def __call__(self, image: Image) -> list[Face]:
        """Find the faces in (1, 3, H, W), [0, 1], largest first; an empty list where none is."""


def unit_range_to_signed(image: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1]."""
    return image * 2 - 1


def signed_range_to_unit(image: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]."""
    return (image + 1) / 2
