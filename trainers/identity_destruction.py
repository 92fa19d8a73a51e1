"""ID-Guard's Identity Destruction Module: how far a forgery is from the one of the clean photo.

Every function is pure and returns one number a sample. Forgeries are in [0, 1], as everywhere; the
distances are those of [-1, 1], so that they compare with published ones.

Source:
    ID-Guard (Qu et al., 2025), https://arxiv.org/abs/2409.13349, Eqs. 5 to 9; and what is known of
    its code, https://github.com/ZOMIN28/ID-Guard.

Differs:
    Eq. 9 adds a similarity to distances that are maximised; here it is subtracted, as the code does
    and the text means. Norms are mean squares over all elements, as in the code. The preset `paper`
    sums both masks, weighs all terms equally and compares embeddings; `code` multiplies the masks,
    weighs 1, 0.1 and 0.01 and compares feature maps at every place.
    A recognizer sees an aligned face where landmarks are known; the code feeds it the whole frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor
from torch.nn import functional

from shields.errors import ConfigError
from shields.models.base import Recognizer
from shields.models.manipulation import Condition, Manipulator
from shields.types import Image, Mask

__all__ = ["DestructionConfig", "Terms", "View", "compare", "feature_distance", "gain",
           "identity_similarity", "identity_view", "look", "masked_distance"]  # fmt: skip

Masks = Literal["sum", "product"]
Identity = Literal["embedding", "map"]


@dataclass(frozen=True, kw_only=True)
class DestructionConfig:
    """Weights and readings of the module; a weight of 0 leaves a term out of the computation."""

    #: weight of the masked distance between forgeries
    mask: float = 1.0
    #: weight of the similarity of identities, which is subtracted
    identity: float = 0.1
    #: weight of the distance between the manipulator's feature maps
    features: float = 0.01
    #: one distance under each mask, added; or one under the product of both
    masks: Masks = "product"
    #: what is compared: a recognizer's embeddings, or its last feature maps, place by place
    compared: Identity = "map"

    def __post_init__(self) -> None:
        for name, choices in (("masks", Masks), ("compared", Identity)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(
                    f"`{name}` must be one of {', '.join(get_args(choices))}, "
                    f"got {getattr(self, name)!r}"
                )
        weights = (self.mask, self.identity, self.features)
        if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
            raise ConfigError(f"weights must be 0 or more, and one above 0, got {weights}")

    @classmethod
    def paper(cls) -> Self:
        """Eq. 9: four terms without weights."""
        return cls(mask=1, identity=1, features=1, masks="sum", compared="embedding")

    @classmethod
    def code(cls) -> Self:
        """As the authors' code trains."""
        return cls()


@dataclass(frozen=True, kw_only=True)
class View:
    """What is looked at in one forgery."""

    #: (B, 3, H, W), about [0, 1]
    forgery: Image
    #: (B, D) or (B, C, h, w); None where identities do not count
    identity: Tensor | None = None
    #: (B, C, h, w) of the manipulator; None where it offers none, or where they do not count
    features: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The module's terms, (B,) each and not weighted."""

    #: distance under the mask or masks
    mask: Tensor
    #: distance under the heat map alone, the paper's key performance indicator
    heat: Tensor
    #: similarity of identities, [-1, 1]; the only term that is to fall
    identity: Tensor
    #: distance between feature maps
    features: Tensor


def masked_distance(clean: Image, protected: Image, mask: Mask) -> Tensor:
    """Mean square (B,) of the difference of two forgeries under a mask, in [-1, 1] units.

    The mean is over all pixels, those outside the mask included, as in the authors' code.
    """
    return (2 * (protected - clean) * mask).square().mean(dim=(1, 2, 3))


def identity_similarity(clean: Tensor, protected: Tensor) -> Tensor:
    """Cosine (B,) of embeddings (B, D), or the mean one of (B, C, h, w) over all places."""
    cosine = functional.cosine_similarity(clean, protected, dim=1)
    return cosine.flatten(1).mean(dim=1) if cosine.ndim > 1 else cosine


def feature_distance(clean: Tensor, protected: Tensor, mask: Mask) -> Tensor:
    """Mean square (B,) of the difference of feature maps (B, C, h, w) under a resized mask."""
    small = functional.interpolate(mask, size=clean.shape[2:], mode="bilinear", align_corners=True)
    return ((protected - clean) * small).square().mean(dim=(1, 2, 3))


def identity_view(
    recognizer: Recognizer, forgery: Image, matrix: Tensor, compared: Identity
) -> Tensor:
    """What a recognizer sees in a forgery, aligned by crop-from-image matrices (B, 2, 3)."""
    if compared == "embedding":
        embedding: Tensor = recognizer(forgery, matrix)
        return embedding
    return recognizer.features(recognizer.align(forgery, matrix))[-1]


def look(
    manipulator: Manipulator,
    image: Image,
    condition: Condition | str,
    config: DestructionConfig,
    *,
    recognizer: Recognizer | None = None,
    matrix: Tensor | None = None,
) -> View:
    """Forge once and keep what the terms compare; of the clean photo once per condition.

    Args:
        manipulator: The network.
        image: (B, 3, H, W), [0, 1].
        condition: What to forge.
        config: Which terms count.
        recognizer: Needed where identities count.
        matrix: Alignment (B, 2, 3) of the clean photos; the whole frame where left out.

    Raises:
        ConfigError: Identities count and no recognizer was given.
    """
    forgery, features = manipulator.outputs(image, condition)
    identity = None
    if config.identity:
        if recognizer is None:
            raise ConfigError("identities count: pass a recognizer, or set `identity` to 0")
        matrix = recognizer.matrix(None, image) if matrix is None else matrix
        identity = identity_view(recognizer, forgery, matrix, config.compared)
    return View(forgery=forgery, identity=identity, features=features if config.features else None)


def compare(
    clean: View, protected: View, binary: Mask, heat: Mask, config: DestructionConfig
) -> Terms:
    """Compute all terms.

    Args:
        clean: Of the clean photo; it needs no graph.
        protected: Of the protected one.
        binary: (B, 1, H, W), [0, 1]: eyes, brows, nose, mouth and lips.
        heat: (B, 1, H, W), [0, 1]: what a recognizer goes by.
        config: How masks are joined.

    Returns:
        (B,) each; 0 for terms whose parts the views do not have.
    """
    warm = masked_distance(clean.forgery, protected.forgery, heat)
    if config.masks == "sum":
        mask = masked_distance(clean.forgery, protected.forgery, binary) + warm
    else:
        mask = masked_distance(clean.forgery, protected.forgery, binary * heat)
    identity = features = torch.zeros_like(warm)
    if clean.identity is not None and protected.identity is not None:
        identity = identity_similarity(clean.identity, protected.identity)
    if clean.features is not None and protected.features is not None:
        features = feature_distance(clean.features, protected.features, binary)
    return Terms(mask=mask, heat=warm, identity=identity, features=features)


def gain(terms: Terms, config: DestructionConfig) -> Tensor:
    """What a generator maximises, (B,): distances up, similarity down."""
    total = config.mask * terms.mask - config.identity * terms.identity
    return total + config.features * terms.features
