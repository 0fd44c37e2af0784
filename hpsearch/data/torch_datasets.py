"""The four roles that images play, as PyTorch datasets for a notebook or a training loop of one's own.

    search-train        the training split: what the search trains on (2000 images in ISIC-2017)
    search-validation   the validation split: what it can be scored on (150)
    final-train         both together: what the chosen configuration is trained on (2150)
    final-test          the test split: what it is scored on, once (600)

`hpsearch study` and `hpsearch final` use the same caches, but batches.py, which is faster.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hpsearch.config.data import Color, DataConfig
from hpsearch.data.batches import DeviceData, ToInput
from hpsearch.data.cache import Normalization, open_cache
from hpsearch.data.prepare import Prepared, prepare_pool, prepare_test
from hpsearch.errors import ConfigError, DatasetError

Role = Literal["search-train", "search-validation", "final-train", "final-test"]

_LIMITS: dict[Role, str] = {
    "search-train": "n_search_train",
    "search-validation": "n_search_validation",
    "final-train": "n_final_train",
    "final-test": "n_final_test",
}


class RoleDataset(Dataset[tuple[Tensor, Tensor]]):
    """The images and masks of one role, decoded once into a cache and read from it.

        from torch.utils.data import DataLoader
        from hpsearch import DataConfig, RoleDataset

        config = DataConfig(root="ISIC-2017", size=256)
        train = RoleDataset("search-train", config, n=500)
        held_out = RoleDataset("search-validation", config, normalization=train.normalization)
        image, mask = train[0]      # (3, 256, 256) float32, normalised; (1, 256, 256) uint8, 0 or 1
        for images, masks in DataLoader(train, batch_size=16, shuffle=True, num_workers=2):
            ...

    The images of a role are sorted by id, of final-train those of the training split come first; `n` takes the first
    of them and overrides the limit in `config`. `normalization` defaults to that of the images that the network of
    this role is trained on: search-train's for the search, final-train's for the final, within the limits of
    `config`. The cache lies in `cache_root` unless `config.cache_dir` names a folder; it is built if missing.

    Raises DatasetError where images are missing or damaged, or the role has none.
    """

    role: Role
    """The role, as given."""
    color: Color
    """Channels of the images, `rgb` or `grayscale`."""
    cache_path: Path
    """The cache that is read."""
    ids: tuple[str, ...]
    """Name of each image, in the order of the dataset."""
    normalization: Normalization
    """Mean and standard deviation of each channel, by which images are normalised."""

    def __init__(
        self,
        role: Role,
        config: DataConfig,
        *,
        n: int | None = None,
        normalization: Normalization | None = None,
        cache_root: Path | str = "cache",
    ) -> None:
        if role not in _LIMITS:
            raise ConfigError(f"unknown role {role!r}; known: {', '.join(_LIMITS)}")
        if n is not None and n < 1:
            raise ConfigError(f"n must be at least 1, got {n}")
        # Crops of larger cached images belong to augmentation, which is not here.
        config = replace(config, cache_size=0)
        cache_root = Path(config.cache_dir or cache_root)
        limit: dict[str, Any] = {} if n is None else {_LIMITS[role]: n}
        prepared, self._indices = _prepare(role, replace(config, **limit), cache_root)
        if len(self._indices) == 0:
            raise DatasetError(f"the dataset has no images for the role {role}")
        self.role = role
        self.color = config.color
        self.cache_path = prepared.cache_path
        self.ids = tuple(prepared.ids[i] for i in self._indices)
        self._opened: tuple[int, DeviceData] | None = None
        self.normalization = normalization or self._training_normalization(config, cache_root)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (C, H, W) float32, normalised, and mask (1, H, W) uint8, 0 or 1."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Several at once, which is what a DataLoader asks for: read and normalised together."""
        data = self._data()
        # NumPy's own check of the bounds raises the IndexError that ends a for loop.
        batch = self._indices[np.asarray(indices, np.int64)]
        ((images, masks),) = data.stream([batch], held_out=self._is_held_out)
        return list(zip(ToInput(data, self.normalization)(images), masks.unsqueeze(1), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file would be pickled as all of its bytes: a worker opens it anew.
        return {**self.__dict__, "_opened": None}

    @property
    def _is_held_out(self) -> bool:
        return self.role in ("search-validation", "final-test")

    def _data(self) -> DeviceData:
        # A forked worker must not share its parent's decoders.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), DeviceData(open_cache(self.cache_path), "cpu", color=self.color)
        return self._opened[1]

    def _training_normalization(self, config: DataConfig, cache_root: Path) -> Normalization:
        if not self._is_held_out:
            return self._data().cache.normalization(self._indices, self.color)
        training: Role = "search-train" if self.role == "search-validation" else "final-train"
        prepared, indices = _prepare(training, config, cache_root)
        same = prepared.cache_path == self.cache_path
        cache = self._data().cache if same else open_cache(prepared.cache_path)
        return cache.normalization(indices, self.color)


def _prepare(role: Role, config: DataConfig, cache_root: Path) -> tuple[Prepared, NDArray[np.int64]]:
    """The cache that holds the role, and which of its images are the role's."""
    if role == "final-test":
        prepared = prepare_test(config, cache_root)
    else:
        prepared = prepare_pool(config, cache_root, role="final" if role == "final-train" else "search")
    splits = {"search-train": ("train",), "search-validation": ("val",)}.get(role, ("train", "val", "test"))
    return prepared, np.flatnonzero([split in splits for split in prepared.splits])
