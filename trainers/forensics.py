"""Proactive forensics with ID-Guard's weights: a message that is still legible in a forgery.

Source:
    ID-Guard (Qu et al., 2025), https://arxiv.org/abs/2409.13349, section IV-E2: minimise
    mean (m - D(M_k(E(x, m))))^2 over manipulators k, weighed by a strategy.

Differs:
    The networks are our own, the paper describes none. Its discriminator keeps marked photos
    looking well; here a budget bounds the mark, and a penalty keeps it small.
    The strategies' indicator is how far the error is below guessing: 1 - 4 * error.
    Beside the paper's error rate, of forgeries, those of marked photos that nobody forged are
    measured, and both after JPEG at quality 75.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from shields.errors import ConfigError, WeightsError
from shields.metrics import ssim
from shields.models.generators import Generator
from shields.models.round_trip import load_manipulator
from shields.transforms import Jpeg, parse
from shields.types import Image, Perturbation
from shields.weights import Card, WeightStore, build, load_strictly, read_state_dict
from trainers.ars_targets import conditions_of
from trainers.data import batches_done
from trainers.disruption_measure import as_saved
from trainers.idguard_faces import cut_faces, plain_name
from trainers.scheme import resized
from trainers.weighting import STRATEGIES, DynamicPriority, TaskReport, WeightStrategy

__all__ = ["ForensicsTraining", "MessageDecoder", "MessageEncoder", "MessageModel",
           "bit_error_rate", "load_messages"]  # fmt: skip


#: what a card of such a pair says
_ARCHITECTURE = "message"


class MessageEncoder(nn.Module):
    """Photo and message -> mark, (B, 3, H, W) in image units, inside a budget.

    Args:
        bits: Length of a message.
        width: Channels.
        levels: Budget.
    """

    def __init__(self, bits: int = 16, width: int = 32, levels: float = 6.375) -> None:
        super().__init__()
        self.levels = levels
        self.message = nn.Linear(bits, width)
        self.photo = nn.Conv2d(3, width, 3, padding=1)
        self.joined = nn.Sequential(
            nn.SiLU(), nn.Conv2d(2 * width, width, 3, padding=1),
            nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1),
        )  # fmt: skip

    def forward(self, image: Image, message: Tensor) -> Perturbation:
        """Mark (B, 3, H, W), [0, 1], with (B, bits) of zeros and ones."""
        photo = self.photo(2 * image - 1)
        planes = self.message(2 * message - 1)[..., None, None].expand_as(photo)
        raw: Tensor = self.joined(torch.cat([photo, planes], dim=1))
        return raw.tanh() * (self.levels / 255)


class MessageDecoder(nn.Module):
    """Forgery -> one logit a bit.

    Args:
        bits: Length of a message.
        width: Channels of the first layer; they double with every halving.
        depth: Halvings.
    """

    def __init__(self, bits: int = 16, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.SiLU()]
        for level in range(depth):
            few = width * 2**level
            layers += [nn.Conv2d(few, 2 * few, 4, 2, 1), nn.GroupNorm(1, 2 * few), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.bits = nn.Linear(width * 2**depth, bits)

    def forward(self, image: Image) -> Tensor:
        """Read (B, 3, H, W), about [0, 1]: (B, bits)."""
        logits: Tensor = self.bits(self.features(2 * image - 1).mean(dim=(2, 3)))
        return logits


def bit_error_rate(logits: Tensor, message: Tensor) -> Tensor:
    """Share (B,) of the bits that were read wrongly.

    Example:
        >>> bit_error_rate(torch.tensor([[2.0, -1, 3, -4]]), torch.tensor([[1.0, 1, 1, 0]]))
        tensor([0.2500])
    """
    return ((logits > 0) != (message > 0.5)).float().mean(dim=1)


class _Pair(nn.Module):
    """Encoder and decoder as one file holds them."""

    def __init__(self, bits: int = 16, width: int = 32, levels: float = 6.375) -> None:
        super().__init__()
        self.encoder, self.decoder = (
            MessageEncoder(bits, width, levels),
            MessageDecoder(bits, width),
        )


class MessageModel(Generator):
    """A trained pair: marks photos with a message, and reads it from what became of them.

    As a generator it draws the message, the same for a whole batch.
    """

    multiple = 8

    def __init__(self, pair: _Pair) -> None:
        super().__init__()
        self.encoder, self.decoder = pair.encoder, pair.decoder
        self.levels, self.bits = pair.encoder.levels, pair.decoder.bits.out_features
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Build both networks from the card's `[config]` and fill them from a weights file."""
        pair = build(_Pair, card)
        load_strictly(pair, read_state_dict(source), card.name)
        return cls(pair)

    def mark(self, image: Image, message: Tensor, *, levels: float | None = None) -> Image:
        """Mark photos so that the message can be read from them later.

        Args:
            image: (B, 3, H, W), [0, 1].
            message: (B, bits), zeros and ones.
            levels: Budget; what it was trained at where left out.

        Raises:
            ConfigError: The message has another length.
        """
        if message.shape != (len(image), self.bits):
            raise ConfigError(
                f"`message` must be {(len(image), self.bits)}, got {tuple(message.shape)}"
            )
        scale = 1.0 if levels is None else levels / self.levels
        return (image + scale * self.encoder(image, message.to(image))).clamp(0, 1)

    def read(self, image: Image) -> Tensor:
        """Read the message of (B, 3, H, W), about [0, 1]: (B, bits), zeros and ones."""
        return (self.decoder(image) > 0).to(image)

    def _generate(self, image: Image, levels: float, rng: torch.Generator) -> Perturbation:
        message = torch.randint(2, (1, self.bits), generator=rng).to(image)
        mark: Perturbation = self.encoder(image, message.expand(len(image), -1))
        return mark * (levels / self.levels)


def load_messages(path: Path) -> MessageModel:
    """Load what was exported, by the path of its card or of its weights.

    Raises:
        WeightsError: The card is of something else, or the weights are absent or damaged.
    """
    card = Card.read(path.with_suffix(".toml"))
    if card.architecture != _ARCHITECTURE:
        raise WeightsError(f"{path} holds a {card.architecture!r}, needed is a {_ARCHITECTURE!r}")
    model = MessageModel.load(WeightStore(path.parent).find(card), card)
    model.name = card.name
    return model


class ForensicsTraining(pl.LightningModule):
    """Encoder and decoder, through several manipulators at once.

    Args:
        manipulators: Cards, or addresses of code; autoencoders count.
        conditions: Manipulator -> what it is asked for, by turns; all it can do where left out.
        strategy: "equal", "hmm", "dtp", "mgda", or "prior" and "kpi", which want `alpha`.
        alpha: Prior weight of each manipulator.
        bits: Length of a message.
        width: Channels of both networks.
        penalty: Weight of the mark's mean square, in [-1, 1] units.
        handling: What happens to marked photos before they are forged, as
            `shields.transforms.parse` reads it, such as "jpeg:60..95"; nothing where left out.
        levels: Budget of the mark, levels.
        size: Side of a training crop, pixels.
        region: Smallest and largest share of the packed face's side that a crop shows.
        rate: Adam's learning rate.
        seed: Fixes crops and messages.
    """

    def __init__(
        self,
        manipulators: tuple[str, ...] = ("stargan-smile",),
        conditions: dict[str, list[str]] | None = None,
        strategy: Literal["equal", "prior", "hmm", "dtp", "mgda", "kpi"] = "mgda",
        alpha: tuple[float, ...] = (),
        bits: int = 16,
        width: int = 32,
        penalty: float = 1.0,
        handling: str = "",
        levels: float = 6.375,
        size: int = 96,
        region: tuple[float, float] = (0.85, 0.95),
        rate: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        pair = _Pair(bits, width, levels)
        self.encoder, self.decoder = pair.encoder, pair.decoder
        self.handling = parse(handling) if handling else None
        self.width, self.levels = width, levels
        self.bits, self.size, self.region, self.seed = bits, size, region, seed
        self.penalty, self.rate = penalty, rate
        # A list hides the manipulators from checkpoints and from the optimizer.
        store = WeightStore()
        self._manipulators = [load_manipulator(name, store) for name in manipulators]
        self._asked = conditions_of(self._manipulators, conditions or {})
        self.strategy = _strategy(strategy, alpha, len(manipulators))

    @property
    def batches_done(self) -> int:
        """Batches trained on so far, those before a resumption included."""
        return batches_done(self.trainer)

    def read(self, number: int, image: Image, turn: int) -> Tensor:
        """Forge by one manipulator and read the forgery: (B, bits) logits."""
        names = self._asked[number]
        manipulator = self._manipulators[number].to(self.device)
        logits: Tensor = self.decoder(manipulator(image, names[turn % len(names)]))
        return logits

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """One step of both networks."""
        rng = torch.Generator().manual_seed(self.seed + self.batches_done)
        face, _ = cut_faces(batch, self.size, self.region, rng)
        message = torch.randint(2, (len(face), self.bits), generator=rng).to(face)
        mark = self.encoder(face, message)
        view = (face + mark).clamp(0, 1)
        if self.handling is not None:
            view = self.handling(view, rng)
        turn, count = self.batches_done, len(self._manipulators)
        losses = torch.stack([
            (self.read(number, view, turn).sigmoid() - message).square().mean()
            for number in range(count)
        ])  # fmt: skip
        weights = self.strategy(
            TaskReport(
                indicators=1 - 4 * losses.detach().float(),
                gradients=self._flat(losses) if self.strategy.needs_gradients else None,
            )
        )
        size = (2 * mark).square().mean()
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((weights * losses).sum() + self.penalty * size)
        optimizer.step()
        names = [plain_name(manipulator.name) for manipulator in self._manipulators]
        self.log_dict({f"weight_{name}": weights[place] for place, name in enumerate(names)})
        self.log_dict({f"loss_{name}": losses[place].detach() for place, name in enumerate(names)})

    def _flat(self, losses: Tensor) -> Tensor:
        """Gradients (N, P) of both networks' parameters."""
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Held-out people, marks in whole levels: bit error rates, PSNR and SSIM of marked photos.

        `val_bit_error_NAME` is of forgeries, of "none" where nobody forged; `val_bit_error_jpeg_…`
        after JPEG 75 before that. `val_bit_error` is the paper's: the mean over manipulators.
        """
        face = (resized(batch["face"].float() / 255, self.size).clamp(0, 1) * 255).round() / 255
        rng = torch.Generator().manual_seed(index)
        message = torch.randint(2, (len(face), self.bits), generator=rng).to(face)
        with torch.autocast(self.device.type, enabled=False):
            view = as_saved(face, self.encoder(face, message), self.levels)
            values = self._errors(view, message, "val_bit_error")
            handled = Jpeg().apply(view, quality=75)
            values |= self._errors(handled, message, "val_bit_error_jpeg")
        error = (view - face).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
        values["val_psnr"] = (-10 * error.log10()).mean()
        values["val_ssim"] = ssim(view, face).mean()
        self.log_dict(values, batch_size=len(face))

    def _errors(self, view: Image, message: Tensor, before: str) -> dict[str, Tensor]:
        """Bit error rates of marked photos: of their forgeries, in the mean, and of themselves."""
        values = {}
        for number, manipulator in enumerate(self._manipulators):
            turns = range(len(self._asked[number]))
            errors = [bit_error_rate(self.read(number, view, turn), message) for turn in turns]
            values[f"{before}_{plain_name(manipulator.name)}"] = torch.cat(errors).mean()
        mean = torch.stack(list(values.values())).mean()
        own = bit_error_rate(self.decoder(view), message).mean()
        return {**values, before: mean, f"{before}_none": own}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam for both networks."""
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        return torch.optim.Adam(parameters, lr=self.rate)

    @property
    def CARD(self) -> dict[str, str]:  # noqa: N802  a constant with the other trainers
        """What the card says beside what is measured."""
        names = ", ".join(manipulator.name for manipulator in self._manipulators)
        return {
            "role": "generator",
            "architecture": _ARCHITECTURE,
            "summary": f"Messages of {self.bits} bits that are read from forgeries by {names}.",
            "licence": "Apache-2.0; trained on LFW (research use)",
            "data": "the packs that the recipe names; a tenth of the people, chosen by a hash of "
            f"the name, is held out; results on them at {self.size} pixels and {self.levels:g} "
            "levels; `none` is nobody's forgery, `jpeg` a quality of 75",
            "teacher": "",
        }

    def export(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """State dict of both networks, and what they are built from."""
        state = {f"encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        state |= {f"decoder.{name}": value for name, value in self.decoder.state_dict().items()}
        return state, {"bits": self.bits, "width": self.width, "levels": self.levels}


def _strategy(name: str, alpha: tuple[float, ...], tasks: int) -> WeightStrategy:
    kind: Any = STRATEGIES[name]
    wants = name in ("prior", "kpi")
    if wants and len(alpha) != tasks:
        raise ConfigError(f"the strategy {name!r} wants `alpha`, {tasks} numbers; got {len(alpha)}")
    if kind is DynamicPriority:
        return DynamicPriority(tasks)
    strategy: WeightStrategy = kind(alpha) if wants else kind()
    return strategy
