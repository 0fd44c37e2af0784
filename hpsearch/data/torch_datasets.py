"""PyTorch datasets of the images that the search and the final model use, for notebooks and own training loops.

    search-train        the training split, on which the search trains (2000 images in ISIC-2017)
    search-validation   the validation split, on which it can be scored (150)
    final-train         both together, on which the chosen configuration is trained (2150)
    final-test          the test split, on which it is scored once (600)

`hpsearch study` and `hpsearch final` read the same caches through batches.py, which is faster.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from hpsearch.config.data import Color, DataConfig
from hpsearch.data.batches import DeviceData, ToInput
from hpsearch.data.cache import Normalization, open_cache
from hpsearch.data.prepare import prepare_pool
from hpsearch.errors import ConfigError, DatasetError

Role = Literal["search-train", "search-validation", "final-train", "final-test"]


class RoleDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images and masks of one role, read from a cache.

        from torch.utils.data import DataLoader
        from hpsearch import DataConfig, RoleDataset

        config = DataConfig(root="ISIC-2017", size=256)
        train = RoleDataset("search-train", config, n=500)
        held_out = RoleDataset("search-validation", config, normalization=train.normalization)
        image, mask = train[0]      # (3, 256, 256) float32, normalised; (1, 256, 256) uint8, 0 or 1
        for images, masks in DataLoader(train, batch_size=16, shuffle=True, num_workers=2):
            ...

    The images of a role are sorted by id, in final-train after the split. `n` selects the first of them and overrides
    the limit in `config`. `normalization` defaults to that of the training images: those of search-train for the
    search, of final-train for the final model, within the limits of `config`. The cache is in `cache_root` unless
    `config.cache_dir` names a folder, and is built if it is missing.

    Raises DatasetError if images are missing or unusable, or the role has none.
    """

    role: Role
    """Role of the images: the first argument."""
    color: Color
    """Channels of the images."""
    cache_path: Path
    """Folder of the cache."""
    ids: tuple[str, ...]
    """Ids of the images, in the order of the dataset."""
    normalization: Normalization
    """Mean and standard deviation per channel that images are normalised with."""

    def __init__(
        self,
        role: Role,
        config: DataConfig,
        *,
        n: int | None = None,
        normalization: Normalization | None = None,
        cache_root: Path | str = "cache",
    ) -> None:
        if role not in get_args(Role):
            raise ConfigError(f"unknown role {role!r}; known: {', '.join(get_args(Role))}")
        if n is not None and n < 1:
            raise ConfigError(f"n must be at least 1, got {n}")
        self.role = role
        self.color = config.color
        self._opened: tuple[int, DeviceData] | None = None
        limit: dict[str, Any] = {} if n is None else {f"n_{role.replace('-', '_')}": n}
        prepared = prepare_pool(
            # Crops of larger cached images belong to augmentation, which these datasets do not have.
            replace(config, cache_size=0, **limit),
            Path(config.cache_dir or cache_root),
            role="test" if role == "final-test" else "final" if role == "final-train" else "search",
        )
        self.cache_path = prepared.cache_path
        left_out = {"search-train": "val", "search-validation": "train"}.get(role)
        self._indices = np.flatnonzero([split != left_out for split in prepared.splits])
        self.ids = tuple(prepared.ids[i] for i in self._indices)
        if not self.ids:
            raise DatasetError(f"the dataset has no images for the role {role}")
        self._is_held_out = role in ("search-validation", "final-test")
        if normalization is None and self._is_held_out:
            training: Role = "search-train" if role == "search-validation" else "final-train"
            normalization = RoleDataset(training, config, cache_root=cache_root).normalization
        self.normalization = normalization or self._data().cache.normalization(self._indices, self.color)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the image (C, H, W) float32, normalised, and its mask (1, H, W) uint8, 0 or 1."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return several items that are read and normalised together. DataLoader calls it."""
        data = self._data()
        # NumPy raises the IndexError that ends a for loop.
        batch = self._indices[np.asarray(indices, np.int64)]
        ((images, masks),) = data.stream([batch], held_out=self._is_held_out)
        return list(zip(ToInput(data, self.normalization)(images), masks.unsqueeze(1), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file would be pickled with all its bytes. A worker opens it again.
        return {**self.__dict__, "_opened": None}

    def _data(self) -> DeviceData:
        # A forked worker must not share its parent's decoders.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), DeviceData(open_cache(self.cache_path), "cpu", color=self.color)
        return self._opened[1]
