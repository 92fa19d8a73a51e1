"""pSp, SimSwap and StyleCLIP as manipulators: their code and weights stay the user's.

A factory takes the folder of a checkout and its official files, builds the networks from the
checkout's own classes, and hides ranges, sizes and traps behind the contract. Like any factory of
yours, these can be named in a card: `architecture = "shields.models.recipes:psp"`, arguments in
`[config]`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.errors import ConfigError, WeightsError
from shields.faces import alignment, warp
from shields.models.arcface import ARCFACE_POINTS
from shields.models.checkouts import Checkpoint, built, existing, import_from, one_line
from shields.models.manipulation import Manipulator, resized, wrap
from shields.photo import read
from shields.types import Image
from shields.weights import load_strictly, read_state_dict

__all__ = ["ARCFACE_CONVERSION", "psp", "simswap", "styleclip"]

#: to be run by `python -c` in SimSwap's folder; runs whatever the pickle says
ARCFACE_CONVERSION = (
    "import torch; "
    "m = torch.load('arcface_checkpoint.tar', map_location='cpu', weights_only=False); "
    "m = m['model'] if isinstance(m, dict) else m; "
    "torch.save(getattr(m, 'module', m).state_dict(), 'arcface.pth')"
)

_PSP = "https://github.com/eladrich/pixel2style2pixel"
_E4E = "https://github.com/omertov/encoder4editing"
_SIMSWAP = "https://github.com/neuralchen/SimSwap"
_STYLECLIP = "https://github.com/orpatashnik/StyleCLIP"

#: side at which the encoders of StyleGAN2 look at a face, and to which its pictures are pooled
_SIDE = 256
#: the rows of W+ that carry colour and texture, and how much of them the second photo gives
_STYLE_ROWS, _STYLE_SHARE = 8, 0.8
#: strength with which StyleCLIP's mappers were trained
_MAPPER_SHARE = 0.1


def _photo(file: str, home: str) -> Image:
    return read(existing(file, home)).image()


class _Inversion(nn.Module):
    """Image, [-1, 1], 256 pixels -> W+ codes -> StyleGAN2's picture of them, pooled to 256."""

    average: Tensor | None
    other: Tensor | None

    def __init__(self, encoder: nn.Module, decoder: nn.Module, average: Tensor | None) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("average", None if average is None else average.float())
        self.register_buffer("other", None)

    def codes(self, image: Image) -> Tensor:
        """(B, 3, 256, 256) -> (B, 18, 512)."""
        codes: Tensor = self.encoder(image)
        return codes if self.average is None else codes + self.average

    def edit(self, codes: Tensor, name: str) -> Tensor:
        """Take colour and texture from the second photo, where there is one."""
        if self.other is None:
            return codes
        given, own = self.other[:, _STYLE_ROWS:], codes[:, _STYLE_ROWS:]
        mixed = _STYLE_SHARE * given + (1 - _STYLE_SHARE) * own
        return torch.cat([codes[:, :_STYLE_ROWS], mixed], dim=1)

    def forward(self, image: Image, name: str = "") -> Image:
        """(B, 3, 256, 256) -> the same shape, about [-1, 1]."""
        try:
            codes = self.edit(self.codes(image), name)
            # noise is drawn anew at each call otherwise, and no gradient would be worth anything
            pictures = self.decoder([codes], input_is_latent=True, randomize_noise=False)[0]
        except (AssertionError, RuntimeError) as error:
            if image.is_cuda:
                raise
            raise ConfigError(
                f"the network fails on the {image.device.type} ({one_line(error)}); its StyleGAN2 "
                "operators are written for CUDA: ask for the device cuda"
            ) from error
        return functional.adaptive_avg_pool2d(pictures, _SIDE)


class _Mapped(_Inversion):
    """The same, with an edit of the codes by a small network each."""

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        average: Tensor | None,
        mappers: Mapping[str, nn.Module],
    ) -> None:
        super().__init__(encoder, decoder, average)
        self.names, self.mappers = [*mappers], nn.ModuleList(mappers.values())

    def edit(self, codes: Tensor, name: str) -> Tensor:
        """Move the codes a little along what the mapper of that name says."""
        edited: Tensor = codes + _MAPPER_SHARE * self.mappers[self.names.index(name)](codes)
        return edited


class _Swap(nn.Module):
    """SimSwap's generator with one identity."""

    identity: Tensor

    def __init__(self, generator: nn.Module, identity: Tensor) -> None:
        super().__init__()
        self.generator = generator
        self.register_buffer("identity", identity)

    def forward(self, image: Image) -> Image:
        swapped: Image = self.generator(image, self.identity.expand(len(image), -1))
        return swapped


def _encoder(
    repository: str, home: str, weights: Checkpoint, *, default: str
) -> tuple[nn.Module, ModuleType]:
    """Build and fill the encoder that a checkpoint names; its repository's StyleGAN2, too."""
    encoders, stylegan = import_from(
        repository, home, "models.encoders.psp_encoders", "models.stylegan2.model"
    )
    # Files of several years: what is not said was fixed in the code of its day.
    options = {"input_nc": 3, "label_nc": 0, "n_styles": 18, "output_size": 1024,
               "stylegan_size": 1024, "encoder_type": default} | dict(weights.options)  # fmt: skip
    kind = str(options["encoder_type"])
    encoder = built(encoders, kind, 50, "ir_se", Namespace(**options))
    return weights.fill(encoder, "encoder"), stylegan


def _average(weights: Checkpoint) -> Tensor | None:
    if not weights.options.get("start_from_latent_avg", True):
        return None
    if weights.average is None:
        raise WeightsError(f"{weights.path} lacks `latent_avg`, the mean face its codes start from")
    return weights.average


def psp(
    repository: str,
    weights: str,
    *,
    mode: Literal["recon", "mix"] = "recon",
    other: str = "",
) -> Manipulator:
    """pSp: a face as StyleGAN2 would draw it, or with colour and texture of a second face.

    It was trained on faces aligned as in FFHQ; hand it such crops.

    Args:
        repository: Folder of the checkout.
        weights: `psp_ffhq_encode.pt`.
        mode: "recon", or "mix": rows 8 to 17 of W+ are 0.8 of the other face's, 0.2 of its own.
        other: The second photo, for "mix"; aligned like the first.

    Raises:
        ConfigError: The folder is no such checkout, or its code does not run here.
        WeightsError: The file is absent, damaged or does not fit.

    Source:
        pixel2style2pixel (Richardson et al., 2021), https://arxiv.org/abs/2008.00951; the mixing
        as TAFIM (Aneja et al., 2022) does it, https://arxiv.org/abs/2112.09151.
    """
    if mode not in {"recon", "mix"} or (mode == "mix") != bool(other):
        raise ConfigError("psp: `mode` is 'recon', or 'mix' with a second photo as `other`")
    checkpoint = Checkpoint.read(weights, _PSP)
    encoder, stylegan = _encoder(repository, _PSP, checkpoint, default="GradualStyleEncoder")
    size = checkpoint.options.get("output_size", 1024)
    decoder = checkpoint.fill(built(stylegan, "Generator", size, 512, 8), "decoder")
    network = _Inversion(encoder, decoder, _average(checkpoint)).eval()
    if other:
        native = resized(_photo(other, _PSP), (_SIDE, _SIDE)) * 2 - 1
        with torch.no_grad():
            network.other = network.codes(native)
        if network.other.ndim != 3:
            raise ConfigError(f"{weights} encodes into W, where rows cannot be mixed; use 'recon'")
    manipulator = wrap(network, native_range="signed", native_size=_SIDE)
    manipulator.name = f"psp-{mode}"
    return manipulator


def styleclip(
    repository: str, edits: Mapping[str, str], encoder_repository: str, encoder_weights: str
) -> Manipulator:
    """StyleCLIP's mappers behind e4e; each edit is a condition.

    All edits are kept in memory and share StyleGAN2, of which every file carries a copy: the first
    file's is taken.

    Args:
        repository: Folder of StyleCLIP's checkout.
        edits: Name -> file: `{"afro": ".../afro.pt", "mohawk": ".../mohawk.pt"}`.
        encoder_repository: Folder of the checkout of encoder4editing.
        encoder_weights: `e4e_ffhq_encode.pt`.

    Raises:
        ConfigError: A folder is no such checkout, or its code does not run here.
        WeightsError: A file is absent, damaged or does not fit.

    Source:
        StyleCLIP (Patashnik et al., 2021), https://arxiv.org/abs/2103.17249; e4e (Tov et al.,
        2021), https://arxiv.org/abs/2102.02766.
    """
    if not edits:
        raise ConfigError(
            "styleclip: name at least one edit and its file, such as afro and afro.pt"
        )
    start = Checkpoint.read(encoder_weights, _E4E)
    encoder, _ = _encoder(encoder_repository, _E4E, start, default="Encoder4Editing")
    kinds, stylegan = import_from(
        repository, _STYLECLIP, "mapper.latent_mappers", "models.stylegan2.model"
    )
    decoder, mappers = None, {}
    for name, file in edits.items():
        checkpoint = Checkpoint.read(file, _STYLECLIP)
        options = Namespace(**checkpoint.options)
        if getattr(options, "work_in_stylespace", False):
            raise ConfigError(f"{file} edits StyleSpace; only mappers of W+ can be used")
        kind = getattr(options, "mapper_type", "LevelsMapper")
        mappers[name] = checkpoint.fill(built(kinds, kind, options), "mapper")
        if decoder is None:
            size = getattr(options, "stylegan_size", 1024)
            decoder = checkpoint.fill(built(stylegan, "Generator", size, 512, 8), "decoder")
    assert decoder is not None, "there is at least one edit"
    network = _Mapped(encoder, decoder, _average(start), mappers).eval()
    manipulator = wrap(network, conditions=[*edits], native_range="signed", native_size=_SIDE)
    manipulator.name = "styleclip"
    return manipulator


def simswap(
    repository: str,
    weights: str,
    arcface: str,
    source: str,
    *,
    landmarks: Sequence[Sequence[float]] = (),
    size: Literal[224, 512] = 224,
) -> Manipulator:
    """SimSwap: the photo that is protected receives the identity of a source photo.

    Args:
        repository: Folder of the checkout.
        weights: `people/latest_net_G.pth`, or that of the 512 model.
        arcface: State dict of the identity network; `ARCFACE_CONVERSION` makes it, once, from
            the pickled module that is published.
        source: Photo of the person who is put in.
        landmarks: Five points x, y of the face in the source photo, pixels: eyes, nose, corners of
            the mouth. Without them the photo is taken for an aligned crop, and squeezed.
        size: Side at which the generator works, pixels.

    Raises:
        ConfigError: The folder is no such checkout.
        WeightsError: A file is absent, damaged or does not fit.

    Source:
        SimSwap (Chen et al., 2020), https://arxiv.org/abs/2106.06340.

    Differs:
        The source is aligned to ArcFace's one template and shrunk by area, where the authors take
        one of five templates and every second pixel.
    """
    if size not in {224, 512}:
        raise ConfigError(f"simswap: `size` must be 224 or 512, got {size}")
    suffix = "" if size == 224 else "_512"
    (networks,) = import_from(repository, _SIMSWAP, f"models.fs_networks{suffix}")
    generator = built(networks, "Generator_Adain_Upsample", 3, 3, 512, 9)
    load_strictly(generator, read_state_dict(existing(weights, _SIMSWAP)), weights)
    identity = _identity(repository, existing(arcface, _SIMSWAP), source, landmarks)
    network = _Swap(generator, identity).eval()
    manipulator = wrap(network, native_range="unit", native_size=size)
    manipulator.name = f"simswap-{size}"
    return manipulator


def _identity(
    repository: str, path: Path, source: str, landmarks: Sequence[Sequence[float]]
) -> Tensor:
    """Unit vector (1, 512) of the source photo."""
    try:
        state = read_state_dict(path)
    except WeightsError as error:
        raise WeightsError(
            f"{path} is no state dict; the published arcface_checkpoint.tar is a pickled module, "
            "and opening it runs code: if you trust it, convert it once, in SimSwap's folder: "
            f'python -c "{ARCFACE_CONVERSION}"'
        ) from error
    folder = Path(repository).expanduser() / "models"
    name = "arcface_models" if (folder / "arcface_models.py").is_file() else "models"
    (networks,) = import_from(repository, _SIMSWAP, f"models.{name}")
    # It is called there but defined nowhere, since the authors only ever unpickle the network.
    vars(networks).setdefault("conv3x3", _conv3x3)
    arcface = built(networks, "ResNet", networks.IRBlock, [3, 4, 23, 3])
    load_strictly(arcface, state, path.name)
    image = _photo(source, _SIMSWAP)
    points = torch.tensor(landmarks).float()[None] if landmarks else None
    if points is not None and points.shape != (1, 5, 2):
        raise ConfigError(f"simswap: `landmarks` must be five pairs x, y, got {landmarks!r}")
    matrix = alignment(points, image, torch.tensor(ARCFACE_POINTS), (112, 112))
    face = warp(image, matrix, (112, 112))
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.no_grad():
        vector: Tensor = arcface.eval()((face - mean) / deviation)
        return functional.normalize(vector, dim=1)


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
