"""Features of reference images, computed once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from shields.errors import ImageError

__all__ = ["Memory"]

#: reference features that one metric keeps, bytes
_KEPT = 256 * 2**20


class Memory:
    """Features of reference images, computed once; what was used least lately goes first.

    Args:
        limit: Of all that is kept, bytes.
    """

    def __init__(self, limit: int = _KEPT) -> None:
        self._limit, self._size = limit, 0
        self._kept: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()

    def __call__(
        self,
        keys: Sequence[Hashable],
        count: int,
        compute: Callable[[list[int]], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """Return features (count, …) of a batch, computing those that are not kept.

        Args:
            keys: One an image, or none at all: then nothing is kept.
            count: Images in the batch.
            compute: Rows of the batch -> their features.
        """
        if not keys:
            return compute(list(range(count)))
        if len(keys) != count:
            raise ImageError(f"{count} images need as many keys, got {len(keys)}")
        found = {key: self._kept[key] for key in keys if key in self._kept}
        absent: dict[Hashable, int] = {}
        for row, key in enumerate(keys):
            if key not in found:
                absent.setdefault(key, row)  # an image that is there twice is computed once
        computed = compute(list(absent.values())) if absent else ()
        for place, key in enumerate(absent):
            found[key] = tuple(features[place].clone() for features in computed)
        for key in dict.fromkeys(keys):
            self._keep(key, found[key])
        return tuple(map(torch.stack, zip(*(found[key] for key in keys), strict=True)))

    def _keep(self, key: Hashable, features: tuple[Tensor, ...]) -> None:
        if key not in self._kept:
            self._size += _bytes(features)
        self._kept[key] = features
        self._kept.move_to_end(key)
        while self._size > self._limit:
            _, oldest = self._kept.popitem(last=False)
            self._size -= _bytes(oldest)


def _bytes(features: tuple[Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in features)
