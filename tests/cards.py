"""Cards, and small random networks of every architecture, saved as their publishers do."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import nn

from shields.models.arcface_networks import IResNetwork, IrNetwork, SharedSlopeNetwork
from shields.models.classifiers import AttributeClassifier
from shields.models.hisd_network import HisdGenerator
from shields.models.networks import FaceEmbedder, MobileFaceNet, PortraitAutoencoder, Taef2
from shields.models.relgan_network import RelganGenerator, SwitchNorm
from shields.models.star_networks import AttentionGenerator, FixedPointGenerator, StarGenerator
from tests import tiny


def write_card(folder, name, role, architecture, *, file="", extra=""):
    text = f'name = "{name}"\nrole = "{role}"\narchitecture = "{architecture}"\n'
    text += f'file = "{file}"\n' if file else 'repository = "nobody/nothing"\n'
    (folder / f"{name}.toml").write_text(text + extra)


def randomised(network: nn.Module, seed: int) -> nn.Module:
    """Give normalisations statistics of their own, so that ignoring them would show."""
    rng = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(std=0.1, generator=rng)
            module.running_var.uniform_(0.5, 1.5, generator=rng)
    return network


def save_file_model(folder, name, role, architecture, network, extra=""):
    save_file(network.state_dict(), folder / f"{name}.safetensors")
    write_card(folder, name, role, architecture, file=f"{name}.safetensors", extra=extra)


def save_diffusers(folder):
    from diffusers import AutoencoderKLFlux2, AutoencoderTiny

    small = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    flux2 = AutoencoderKLFlux2(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    parts = {"kl": tiny.diffusion_parts()["vae"], "tiny": small, "flux2": flux2}
    for name, network in parts.items():
        network.save_pretrained(folder / f"small-{name}")
        write_card(folder, f"small-{name}", "autoencoder", "diffusers")


def save_every_architecture(folder):
    """A card and weights of every architecture."""
    from facenet_pytorch import InceptionResnetV1
    from torchvision.models import squeezenet1_1

    with tiny.seeded(0):
        save_file_model(
            folder, "small-portrait-ae", "autoencoder", "portrait-ae",
            PortraitAutoencoder(fine=8, coarse=8, blocks=1, latent_channels=4),
            "[config]\nfine = 8\ncoarse = 8\nblocks = 1\nlatent_channels = 4\n",
        )  # fmt: skip
        save_file_model(
            folder, "small-taef2", "autoencoder", "taef2", Taef2(width=8, latent_channels=4),
            "[config]\nwidth = 8\nlatent_channels = 4\n",
        )  # fmt: skip
        save_file_model(
            folder, "small-face-embedder", "recognizer", "face-embedder",
            randomised(FaceEmbedder(widths=(8, 8, 8, 8), blocks=(1, 1, 1, 1), dimensions=16), 1),
            "[config]\nwidths = [8, 8, 8, 8]\nblocks = [1, 1, 1, 1]\ndimensions = 16\n"
            "[results]\nval_threshold = 0.3\n",
        )  # fmt: skip
        save_file_model(
            folder, "random-mobilefacenet", "recognizer", "mobilefacenet",
            randomised(MobileFaceNet(), 2), "[results]\nthreshold = 0.2\n",
        )  # fmt: skip
        facenet = randomised(InceptionResnetV1(), 3).state_dict()
        # As published: with the classifier of the training set behind it.
        facenet |= {"logits.weight": torch.zeros(10, 512), "logits.bias": torch.zeros(10)}
        torch.save(facenet, folder / "random-facenet.pt")
        write_card(
            folder, "random-facenet", "recognizer", "inception-resnet-v1", file="random-facenet.pt"
        )
        torch.save(squeezenet1_1(weights=None).state_dict(), folder / "squeeze.pth")
        write_card(
            folder, "random-lpips-squeeze", "perceptual", "lpips-squeeze", file="squeeze.pth"
        )
        save_diffusers(folder)
        save_arcface(folder)
        save_manipulators(folder)


def save_arcface(folder):
    sizes = {"blocks": (1, 1, 1, 1), "widths": (16, 16, 16, 16), "dimensions": 16}
    config = "[config]\nblocks = [1, 1, 1, 1]\nwidths = [16, 16, 16, 16]\ndimensions = 16\n"
    layouts = {
        "arcface-ir": IrNetwork, "arcface-iresnet": IResNetwork,
        "arcface-ir-se101": SharedSlopeNetwork,
    }  # fmt: skip
    for name, network in layouts.items():
        save_file_model(
            folder, f"small-{name}", "recognizer", name, randomised(network(**sizes), 4), config
        )


def save_manipulators(folder):
    generators = {
        "stargan": StarGenerator(2, width=8, blocks=2),
        "aggan": AttentionGenerator(2, width=8, blocks=2),
        "fpgan": FixedPointGenerator(2, width=8, blocks=2),
        "relgan": RelganGenerator(2, 8, blocks=4),
        "hisd": HisdGenerator(
            (2, 3), width=8, inner=8, blocks=3, style=16, noise=4, hidden=8,
            extractor=(4, 8, 8, 8),
        ),
    }  # fmt: skip
    two = '[config]\nattributes = ["Blond_Hair", "Smiling"]\n'
    hisd = '[config]\ntags = ["hat", "hair"]\n'
    hisd += 'attributes = [["with", "without"], ["black", "blond", "brown"]]\n'
    for name, network in generators.items():
        for parameter in network.parameters():  # far enough from zero for edits to differ
            parameter.data.mul_(1.5)
        for module in network.modules():
            if isinstance(module, SwitchNorm):
                module.running_var.fill_(1)
        extra = hisd if name == "hisd" else two + "sign = 1\n" * (name == "relgan")
        save_file_model(folder, f"small-{name}", "manipulator", name, network, extra)
    save_file_model(
        folder, "small-classifier", "classifier", "attribute-classifier",
        randomised(AttributeClassifier(("Smiling", "Young"), 16, (4, 8)), 5),
        '[config]\nattributes = ["Smiling", "Young"]\nsize = 16\nwidths = [4, 8]\n',
    )  # fmt: skip
