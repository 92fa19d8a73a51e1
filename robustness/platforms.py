"""What large networks are reported to do to an uploaded photo.

Nobody publishes these pipelines and they change without notice: every number is a report of a
year, from the source that its preset names, and every number can be set otherwise
(`facebook:1920,quality=92`). A preset shrinks by Lanczos what is above the size limit, keeps the
aspect ratio, and encodes as JPEG with the tables of libjpeg. Metadata never reaches an attack, and
progressive or optimised files decode to the same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from robustness.attacks import Attack, Subsampling, encoded, resized

__all__ = ["Facebook", "Instagram", "Platform", "SocialNetwork", "Telegram", "WeChat", "Weibo",
           "WhatsApp", "X"]  # fmt: skip

#: quality -> how often Facebook, Twitter, WeChat and Weibo answered with it, published with DF-RAP
_QUALITIES = {
    71: 0.0132, 72: 0.0268, 75: 0.0127, 78: 0.0573, 79: 0.0156, 80: 0.2213, 84: 0.0107,
    85: 0.2193, 86: 0.0110, 88: 0.0107, 89: 0.0120, 90: 0.0120, 91: 0.0171, 92: 0.2272,
    100: 0.1331,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Platform(Attack):
    """Shrink to a limit, then JPEG."""

    #: the photo is shrunk to this, pixels; 0 = no limit is reported
    side: int = 0
    #: which side the limit is for
    limited: Literal["longer", "width"] = "longer"
    #: libjpeg's scale
    quality: int = 85
    subsampling: Subsampling = "4:2:0"
    #: photos whose longer side is no longer than this are left alone, pixels
    spared: int = 0

    limits: ClassVar = {"side": (0, 65535), "quality": (1, 100), "spared": (0, 65535)}

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = pixels.shape[:2]
        if max(height, width) <= self.spared:
            return pixels
        length = width if self.limited == "width" else max(height, width)
        if self.side and length > self.side:
            # In whole numbers: the limited side meets its limit exactly.
            size = max(height * self.side // length, 1), max(width * self.side // length, 1)
            pixels = resized(pixels, size)
        return encoded(pixels, "JPEG", quality=self.quality, subsampling=self.subsampling)


@dataclass(frozen=True, kw_only=True)
class Facebook(Platform):
    """Longer side 2048 pixels, JPEG 84, 4:2:0, as reported.

    Source:
        Size: commonly stated; 1920 was observed in 2021. Quality: that of the files that came back
        in DF-RAP's study (2023) for small faces. The network chooses between 71 and 95 by size and
        content, and 92 is the most common.
    """

    name = "facebook"

    side: int = 2048
    quality: int = 84


@dataclass(frozen=True, kw_only=True)
class Instagram(Platform):
    """Width 1080 pixels, JPEG 75, 4:2:0, as reported for the feed.

    Source:
        A vendor's study of twenty uploads: quality 75 to 85 by content; here the harsher end.
    """

    name = "instagram"

    side: int = 1080
    limited: Literal["longer", "width"] = "width"
    quality: int = 75


@dataclass(frozen=True, kw_only=True)
class X(Platform):
    """Longer side 4096 pixels, JPEG 85, 4:2:0; photos up to 900 pixels untouched, as reported.

    Source:
        The platform's announcement of December 2018 (a JPEG of lower quality is kept; small PNGs
        are kept), and DF-RAP's study (2023) for the limit of 900 pixels.
    """

    name = "x"

    side: int = 4096
    spared: int = 900


@dataclass(frozen=True, kw_only=True)
class WhatsApp(Platform):
    """Longer side 1600 pixels, JPEG 75, 4:2:0, as reported for standard quality.

    Source:
        Vendors' articles, 2026; the option "HD" keeps more.
    """

    name = "whatsapp"

    side: int = 1600
    quality: int = 75


@dataclass(frozen=True, kw_only=True)
class WeChat(Platform):
    """Longer side 1280 pixels, JPEG 95, 4:2:0, as reported for chats.

    Source:
        Size: developers who compared sent and received photos
        (https://mo4tech.com/ios-wechat-chat-circle-of-friends-image-compression-algorithm.html);
        they leave very long pictures larger. Quality: that of the files that came back in DF-RAP's
        study (2023), whose authors still saw the largest changes here.
    """

    name = "wechat"

    side: int = 1280
    quality: int = 95


@dataclass(frozen=True, kw_only=True)
class Weibo(Platform):
    """Width 2000 pixels, JPEG 85, 4:2:0, as reported.

    Source:
        DF-RAP's study (2023) saw a limited width, at times 2000, HEIC on iOS, and slight changes
        or none on the web. The quality is ours: a common one of that study.
    """

    name = "weibo"

    side: int = 2000
    limited: Literal["longer", "width"] = "width"


@dataclass(frozen=True, kw_only=True)
class Telegram(Platform):
    """Longer side 1280 pixels, JPEG 87, 4:2:0, as commonly stated for photos (not files)."""

    name = "telegram"

    side: int = 1280
    quality: int = 87


@dataclass(frozen=True, kw_only=True)
class SocialNetwork(Attack):
    """JPEG 4:2:0 at a quality drawn as often as networks answered with it; the size is kept.

    Source:
        DF-RAP (2023): qualities of what came back from Facebook, Twitter, WeChat and Weibo for
        uploaded mosaics of faces, published with its code.
    """

    name = "osn"

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        shares = np.array(list(_QUALITIES.values()))
        quality = int(rng.choice(list(_QUALITIES), p=shares / shares.sum()))
        return encoded(pixels, "JPEG", quality=quality, subsampling="4:2:0")
