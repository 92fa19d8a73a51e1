"""The protectors by name, and how one is put together from a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

from shields.errors import ConfigError
from shields.protectors.base import IterativeConfig, Protector, ProtectorConfig
from shields.registry import Registry, did_you_mean

if TYPE_CHECKING:
    import torch

    from shields.weights import WeightStore

__all__ = ["PROTECTORS", "load"]

#: in the order in which they are listed
PROTECTORS: Registry[type[Protector]] = Registry(
    "protector",
    {
        "facelock": "shields.protectors.facelock:FaceLock",
        "cvl": "shields.protectors.facelock:Cvl",
        "cvl-d": "shields.protectors.facelock:CvlD",
        "cvl-dp": "shields.protectors.facelock:CvlDp",
        "photoguard": "shields.protectors.photoguard:PhotoGuard",
        "photoguard-eot": "shields.protectors.photoguard:PhotoGuardEot",
        "photoguard-diffusion": "shields.protectors.photoguard:PhotoGuardDiffusion",
        "encoder": "shields.protectors.encoder:Encoder",
        "vae": "shields.protectors.encoder:Vae",
        "cw": "shields.protectors.cw:Cw",
        "advdm": "shields.protectors.advdm:AdvDm",
        "mist": "shields.protectors.advdm:Mist",
        "sds": "shields.protectors.advdm:Sds",
        "sdst": "shields.protectors.advdm:Sdst",
        "editshield": "shields.protectors.editshield:EditShield",
        "disrupting": "shields.protectors.disrupting:Disrupting",
        "antiforgery": "shields.protectors.antiforgery:AntiForgery",
        "df-rap": "shields.protectors.dfrap:DfRap",
        "faceshield": "shields.protectors.faceshield:FaceShield",
        "ars": "shields.protectors.learned:Ars",
        "idguard": "shields.protectors.idguard_universal:IdGuard",
        "idguard-universal": "shields.protectors.idguard_universal:IdGuardUniversal",
        "tafim": "shields.protectors.learned_baselines:Tafim",
        "pg": "shields.protectors.learned_baselines:Pg",
        "iap-like": "shields.protectors.learned_baselines:IapLike",
        "cmua": "shields.protectors.learned_baselines:Cmua",
        "fgsm": "shields.protectors.gradient:Fgsm",
        "ifgsm": "shields.protectors.gradient:Ifgsm",
        "pgd": "shields.protectors.gradient:Pgd",
    },
)


def load(
    name: str,
    config: ProtectorConfig | None = None,
    *,
    networks: Mapping[str, str],
    store: WeightStore,
    device: torch.device,
) -> Protector:
    """Build a protector together with the networks that its settings call for.

    Args:
        name: A name of `PROTECTORS`.
        config: The method's config; its class default if left out.
        networks: Role -> network, for roles that shall not have the method's default. A role
            that the method has and these settings switch off is not loaded.
        store: Where weights are looked for.
        device: Where the networks are put.

    Raises:
        UnknownName: There is no protector or network of that name.
        ConfigError: The method has no such role, or `config` is of another method.
    """
    from shields import models

    protector = PROTECTORS[name]
    if config is None:
        config = protector.Config()
    if not isinstance(config, protector.Config):
        raise ConfigError(
            f"{name!r} needs a {protector.Config.__name__}, got a {type(config).__name__}"
        )
    for role in networks:
        if role not in protector.NETWORKS:
            hint = did_you_mean(role, protector.NETWORKS)
            raise ConfigError(f"{name!r} has no network for the role {role!r}; {hint}")
    loaded = {}
    for role, default in protector.roles(config).items():
        if role not in networks and role == "generator" and default not in store.names():
            raise ConfigError(
                f"{name!r} needs a trained network, and none comes with the package: name one with "
                f"--generator; `shields train {name} fit` trains it, `… export` writes its card"
            )
        loaded[role] = models.load(role, networks.get(role, default), store=store, device=device)
    if isinstance(config, IterativeConfig) and config.compile:
        for network in loaded.values():
            network.accelerate()
    # The constructors differ in their keywords: the roles are what they have in common.
    build = cast("Callable[..., Protector]", protector)
    return build(config, **loaded)
