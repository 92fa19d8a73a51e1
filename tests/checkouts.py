"""Small repositories on disk, laid out like pSp, e4e, StyleCLIP and SimSwap.

Only names, arguments and the keys of the files are those of the originals; the networks are ours.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
from torch import Tensor, nn

from shields.models.checkouts import import_from
from tests import tiny

STYLEGAN = """
    import torch
    from torch import nn

    class PixelNorm(nn.Module):
        def forward(self, input):
            return input * torch.rsqrt(input.square().mean(-1, keepdim=True) + 1e-8)

    class EqualLinear(nn.Linear):
        def __init__(self, in_dim, out_dim, bias=True, bias_init=0, lr_mul=1, activation=None):
            super().__init__(in_dim, out_dim, bias)

    class Generator(nn.Module):
        def __init__(self, size, style_dim, n_mlp, channel_multiplier=2):
            super().__init__()
            self.size, self.rows = size, 2 * (size.bit_length() - 1) - 2
            self.input = nn.Parameter(torch.randn(1, 8, 16, 16))
            self.convs = nn.ModuleList(EqualLinear(style_dim, 8) for _ in range(self.rows))
            self.to_rgb = nn.Conv2d(8, 3, 1)
            self.noises = nn.Module()
            self.noises.register_buffer("noise_0", torch.randn(1, 1, 16, 16))

        def forward(self, styles, return_latents=False, truncation=1, input_is_latent=False,
                    noise=None, randomize_noise=True):
            assert input_is_latent
            latent, out = styles[0], self.input
            assert latent.shape[1] == self.rows
            for row, conv in enumerate(self.convs):
                out = torch.sin(out + conv(latent[:, row])[:, :, None, None])
            noise = self.noises.noise_0
            if randomize_noise:
                noise = torch.randn_like(noise)
            image = nn.functional.interpolate(self.to_rgb(out + 0.1 * noise), self.size)
            return image, latent if return_latents else None
"""

ENCODERS = """
    import torch
    from torch import nn
    from models.stylegan2.model import EqualLinear

    class {name}(nn.Module):
        def __init__(self, num_layers, mode="ir", opts=None):
            super().__init__()
            assert num_layers == 50 and mode == "ir_se"
            self.style_count = {rows}
            stem = nn.Conv2d({inputs}, 8, 4, 4)
            self.input_layer = nn.Sequential(stem, nn.BatchNorm2d(8), nn.PReLU(8))
            self.pool = nn.AdaptiveAvgPool2d((2, self.style_count // 2))
            self.styles = EqualLinear(8, 512)

        def forward(self, x):
            assert x.shape[2:] == (256, 256)
            return self.styles(self.pool(self.input_layer(x)).flatten(2).transpose(1, 2))
"""

MAPPERS = """
    import torch
    from torch import nn
    from models.stylegan2.model import EqualLinear, PixelNorm

    class LevelsMapper(nn.Module):
        def __init__(self, opts):
            super().__init__()
            self.opts = opts
            self.course_mapping = nn.Sequential(PixelNorm(), EqualLinear(512, 512, lr_mul=0.01))
            if not opts.no_fine_mapper:
                self.fine_mapping = nn.Sequential(PixelNorm(), EqualLinear(512, 512, lr_mul=0.01))

        def forward(self, x):
            coarse, rest = self.course_mapping(x[:, :8]), x[:, 8:]
            fine = torch.zeros_like(rest) if self.opts.no_fine_mapper else self.fine_mapping(rest)
            return torch.cat([coarse, fine], dim=1)
"""

SWAPPER = """
    import torch
    from torch import nn

    class Generator_Adain_Upsample(nn.Module):
        def __init__(self, input_nc, output_nc, latent_size, n_blocks=6, deep=False):
            super().__init__()
            assert n_blocks == 9 and not deep
            stem = nn.Conv2d(input_nc, 8, 7, padding=3)
            self.first_layer = nn.Sequential(stem, nn.BatchNorm2d(8), nn.ReLU(True))
            self.style = nn.Linear(latent_size, 16)
            self.last_layer = nn.Sequential(nn.Conv2d(8, output_nc, 3, padding=1), nn.Tanh())

        def forward(self, input, dlatents):
            assert input.shape[2:] == (224, 224)
            scale, shift = self.style(dlatents)[:, :, None, None].chunk(2, dim=1)
            return (self.last_layer(self.first_layer(input) * (1 + scale) + shift) + 1) / 2
"""

#: as the original: `conv3x3` is called, and defined nowhere
ARCFACE = """
    import torch
    from torch import nn

    class IRBlock(nn.Module):
        def __init__(self, inplanes, planes, stride=1, downsample=None, use_se=True):
            super().__init__()
            self.conv1 = conv3x3(inplanes, planes, stride)
            self.bn1 = nn.BatchNorm2d(planes)

        def forward(self, x):
            return torch.tanh(x + self.bn1(self.conv1(x)))

    class ResNet(nn.Module):
        def __init__(self, block, layers, use_se=True):
            super().__init__()
            assert layers == [3, 4, 23, 3]
            self.conv1 = nn.Conv2d(3, 4, 16, stride=16, bias=False)
            self.layer1 = block(4, 4)
            self.fc = nn.Linear(4 * 7 * 7, 512)

        def forward(self, x):
            return self.fc(self.layer1(self.conv1(x)).flatten(1))
"""


def write(folder: Path, files: dict[str, str]) -> Path:
    """Write source files, and return the folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return folder


def build(repository: Path, module: str, name: str, seed: int, *arguments: object) -> nn.Module:
    """A network of a checkout with seeded weights, its running statistics far from 0 and 1."""
    (loaded,) = import_from(str(repository), "nowhere", module)
    with tiny.seeded(seed):
        network: nn.Module = getattr(loaded, name)(*arguments)
        for module_inside in network.modules():
            if isinstance(module_inside, nn.BatchNorm2d):
                assert module_inside.running_mean is not None
                nn.init.normal_(module_inside.running_mean)
    return network


def parts(**networks: nn.Module) -> dict[str, Tensor]:
    """One state dict of several networks, each under its name."""
    return {
        f"{part}.{key}": value
        for part, network in networks.items()
        for key, value in network.state_dict().items()
    }


def psp_checkout(folder: Path) -> Path:
    """What `psp` imports of pixel2style2pixel."""
    encoders = ENCODERS.format(
        name="GradualStyleEncoder", rows="opts.n_styles", inputs="opts.input_nc"
    )
    return write(
        folder,
        {"models/encoders/psp_encoders.py": encoders, "models/stylegan2/model.py": STYLEGAN},
    )


def e4e_checkout(folder: Path) -> Path:
    """What `styleclip` imports of encoder4editing."""
    encoders = ENCODERS.format(
        name="Encoder4Editing", rows="2 * (opts.stylegan_size.bit_length() - 1) - 2", inputs=3
    )
    return write(
        folder,
        {"models/encoders/psp_encoders.py": encoders, "models/stylegan2/model.py": STYLEGAN},
    )


def styleclip_checkout(folder: Path) -> Path:
    """What `styleclip` imports of StyleCLIP."""
    return write(
        folder, {"mapper/latent_mappers.py": MAPPERS, "models/stylegan2/model.py": STYLEGAN}
    )


def simswap_checkout(folder: Path) -> Path:
    """What `simswap` imports of SimSwap."""
    return write(
        folder,
        {
            "models/__init__.py": "from .arcface_models import IRBlock, ResNet\n",
            "models/arcface_models.py": ARCFACE,
            "models/fs_networks.py": SWAPPER,
        },
    )


def save_psp(path: Path, repository: Path, options: object) -> Path:
    """A file as pSp's trainer saves it, of a StyleGAN2 of 512 pixels with 16 rows of codes."""
    from argparse import Namespace

    encoder = build(
        repository, "models.encoders.psp_encoders", "GradualStyleEncoder", 1, 50, "ir_se",
        Namespace(input_nc=3, n_styles=16),
    )  # fmt: skip
    decoder = build(repository, "models.stylegan2.model", "Generator", 2, 512, 512, 8)
    average = torch.randn(16, 512, generator=torch.Generator().manual_seed(3))
    state = parts(encoder=encoder, decoder=decoder)
    torch.save({"state_dict": state, "latent_avg": average, "opts": options}, path)
    return path
