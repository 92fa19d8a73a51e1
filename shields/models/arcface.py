"""ArcFace, AdaFace and their kin behind the contract of a recognizer; no foreign code is run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from shields.errors import ConfigError, WeightsError
from shields.models.arcface_networks import (
    FaceNetwork,
    IResNetwork,
    IrNetwork,
    SharedSlopeNetwork,
)
from shields.models.base import Recognizer
from shields.types import Image
from shields.weights import Card, build, load_strictly, read_state_dict

__all__ = [
    "ARCFACE_POINTS",
    "ArcFaceModel",
    "FaceInput",
    "IResNetModel",
    "IrModel",
    "SharedSlopeModel",
]

#: where the five points fall in a crop of 112 x 112
ARCFACE_POINTS = (
    (38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655),
    (70.7299, 92.2041),
)  # fmt: skip
#: units in all -> units of the four stages, in every network that was published
_BLOCKS = {8: (2, 2, 2, 2), 16: (3, 4, 6, 3), 24: (3, 4, 14, 3), 49: (3, 13, 30, 3)}
#: what training frameworks put before every key of a network
_WRAPPERS = {"module", "model", "net", "backbone"}
#: the margin losses' own weights, of no use after training
_LOSS = "head."
#: architecture -> a key that no other layout has
_SIGNS = {
    "arcface-ir": "body.0.res_layer.0.weight",
    "arcface-iresnet": "layer1.0.bn3.weight",
    "arcface-ir-se101": "layer1.0.se.fc.0.weight",
}


@dataclass(frozen=True, kw_only=True)
class FaceInput:
    """How a network wants its pixels; a card's `[config]` may set each field."""

    #: order of the colours
    channels: Literal["rgb", "bgr"] = "rgb"
    #: what is subtracted from values in [0, 1], in the network's order of colours
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    #: what the difference is divided by
    deviation: Sequence[float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.channels not in ("rgb", "bgr"):
            raise ConfigError(f'`channels` must be "rgb" or "bgr", got {self.channels!r}')
        for name in ("mean", "deviation"):
            values = getattr(self, name)
            good = isinstance(values, Sequence) and len(values) == 3
            if not good or not all(isinstance(value, int | float) for value in values):
                raise ConfigError(f"`{name}` must be three numbers, got {values!r}")
        if min(self.deviation) <= 0:
            raise ConfigError(f"`deviation` must be above 0, got {self.deviation!r}")


class ArcFaceModel(Recognizer):
    """A network of ArcFace's school; a subclass names the layout of its weights."""

    crop_size = (112, 112)
    #: the network of this layout, and the name of the layout
    NETWORK: ClassVar[type[FaceNetwork]]
    LAYOUT: ClassVar[str]
    #: one key of each unit, where the depth is read from the file
    UNIT: ClassVar[str] = ""
    #: what the network was trained on, unless its card says otherwise
    INPUT: ClassVar[FaceInput] = FaceInput()
    mean: Tensor
    deviation: Tensor

    def __init__(
        self, network: FaceNetwork, pixels: FaceInput, threshold: float | None = None
    ) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.pixels, self.threshold = pixels, threshold
        self.register_buffer("template", torch.tensor(ARCFACE_POINTS), persistent=False)
        for name in ("mean", "deviation"):
            values = torch.tensor(getattr(pixels, name), dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Fill the network from a published file.

        What frameworks wrap around a network's keys is taken off, and a margin loss is left out.
        `[config]` may set `channels`, `mean`, `deviation` and whatever the network's constructor
        takes; the depth of a published network is read from the file.

        Raises:
            WeightsError: The file is damaged, or of another layout, depth or width.
        """
        state = _bare(read_state_dict(source))
        _check_layout(state, cls.LAYOUT, card.name)
        config = cls._found(state, card) | dict(card.config)
        asked = {name: config.pop(name) for name in vars(cls.INPUT) if name in config}
        try:
            pixels = replace(cls.INPUT, **asked)
        except ConfigError as error:
            raise WeightsError(f"card {card.name!r}: {error}") from error
        network = build(cls.NETWORK, replace(card, config=config))
        load_strictly(network, _counted(network, state), card.name)
        threshold = card.results.get("threshold")
        return cls(network, pixels, None if threshold is None else float(threshold))

    @classmethod
    def _found(cls, state: Mapping[str, Tensor], card: Card) -> dict[str, Any]:
        """Constructor arguments that the file itself tells."""
        if not cls.UNIT or "blocks" in card.config:
            return {}
        count = sum(re.fullmatch(cls.UNIT, key) is not None for key in state)
        if count not in _BLOCKS:
            raise WeightsError(
                f"the weights of {card.name!r} have {count} units, published networks have "
                f"{', '.join(map(str, _BLOCKS))}; is the file whole? If so, name the units of the "
                "four stages in its card: blocks = […]"
            )
        return {"blocks": _BLOCKS[count]}

    def _native(self, face: Image) -> Tensor:
        face = face.flip(1) if self.pixels.channels == "bgr" else face
        return (face - self.mean) / self.deviation

    def _embed(self, face: Image) -> Tensor:
        embedding: Tensor = self.network(self._native(face))
        return embedding

    def features(self, face: Image) -> tuple[Tensor, ...]:
        """Feature maps of the four stages, at 1/2, 1/4, 1/8 and 1/16; any size of 16 or more."""
        return self.network.maps(self._native(face))


class IrModel(ArcFaceModel):
    """AdaFace, CVLFace, TreB1eN: IR-18, -34, -50 and -101, and IR-SE50; which, the file tells.

    Source:
        AdaFace (Kim, Jain, Liu, 2022), https://arxiv.org/abs/2204.00964, weights of
        https://github.com/mk-minchul/AdaFace (BGR) and https://github.com/mk-minchul/CVLface (RGB);
        ArcFace (Deng et al., 2019), https://arxiv.org/abs/1801.07698, weights of
        https://github.com/TreB1eN/InsightFace_Pytorch.

    Differs:
        Embeddings of a face and of its mirror image are not added up, as some evaluations do.
    """

    NETWORK = IrNetwork
    LAYOUT = "arcface-ir"
    UNIT = r"body\.\d+\.res_layer\.0\.weight"

    @classmethod
    def _found(cls, state: Mapping[str, Tensor], card: Card) -> dict[str, Any]:
        return super()._found(state, card) | {
            "inner_norm": "body.0.res_layer.2.running_mean" in state,
            "attention": any(key.endswith(".fc1.weight") for key in state),
            "affine": "output_layer.4.weight" in state,
        }


class IResNetModel(ArcFaceModel):
    """InsightFace's iresnet18, 34, 50 and 100; which, the file tells.

    Source:
        ArcFace (Deng et al., 2019), https://arxiv.org/abs/1801.07698; weights of
        https://github.com/deepinsight/insightface, recognition/arcface_torch.
    """

    NETWORK = IResNetwork
    LAYOUT = "arcface-iresnet"
    UNIT = r"layer\d\.\d+\.bn1\.weight"


class SharedSlopeModel(ArcFaceModel):
    """SimSwap's and ID-Guard's ArcFace; the deepest feature map is the one that ID-Guard compares.

    Source:
        ArcFace (Deng et al., 2019), https://arxiv.org/abs/1801.07698; weights from
        https://github.com/foamliu/InsightFace-v2.

    Differs:
        ID-Guard feeds it whole frames in [-1, 1], neither aligned nor normalised as in training.
        Here a face is aligned and normalised; `mean` and `deviation` of 0.5 in the card, and no
        landmarks, give what ID-Guard does.
    """

    NETWORK = SharedSlopeNetwork
    LAYOUT = "arcface-ir-se101"
    INPUT = FaceInput(mean=(0.485, 0.456, 0.406), deviation=(0.229, 0.224, 0.225))


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out a margin loss, and take off what stands before every other key."""
    bare = {key: value for key, value in state.items() if not key.startswith(_LOSS)}
    while bare:
        outer = {key.partition(".")[0] for key in bare}
        if len(outer) > 1 or not outer <= _WRAPPERS:
            break
        bare = {key.partition(".")[2]: value for key, value in bare.items()}
    return bare


def _check_layout(state: Mapping[str, Tensor], layout: str, name: str) -> None:
    if _SIGNS[layout] in state:
        return
    other = next((known for known, key in _SIGNS.items() if key in state), None)
    hint = f"they are laid out as {other!r}: name that architecture in the card"
    if other is None:
        hint = f"{_SIGNS[layout]} is not among their keys ({', '.join(list(state)[:3])}, …)"
    raise WeightsError(f"the weights of {name!r} are none of {layout!r}; {hint}")


def _counted(network: FaceNetwork, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fill in the counters of normalisations, which old files lack and nothing reads."""
    own = network.state_dict()
    return {key: own[key] for key in own if key.endswith("num_batches_tracked")} | dict(state)
