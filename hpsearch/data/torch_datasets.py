"""Provide the images as PyTorch datasets, for notebooks and custom training loops.

    search-train        training split, for training during the search (2000 images in ISIC-2017)
    search-validation   validation split, for scoring during the search (150 images)
    final-train         training and validation splits, for training the final model (2150 images)
    final-test          test split, for scoring the final model once (600 images)

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
    """PyTorch dataset of the images and masks of one role, read from a cache.

        from torch.utils.data import DataLoader
        from hpsearch import DataConfig, RoleDataset

        config = DataConfig(root="ISIC-2017", size=256)
        train = RoleDataset("search-train", config, n=500)
        held_out = RoleDataset("search-validation", config, normalization=train.normalization)
        image, mask = train[0]      # (3, 256, 256) float32, normalised; (1, 256, 256) uint8, 0 or 1
        for images, masks in DataLoader(train, batch_size=16, shuffle=True, num_workers=2):
            ...

    `role` is `search-train`, `search-validation`, `final-train` or `final-test`. Images are sorted by id. In
    final-train, the training split comes before the validation split. `n` keeps only the first `n` images and
    overrides the limit in `config`, such as `n_search_train`.

    `normalization` defaults to the mean and standard deviation of the training images within the limits of `config`:
    those of search-train for both search roles, and those of final-train for both final roles. The cache is in
    `config.cache_dir` if it is set, otherwise in `cache_root`. It is built if it is missing.

    Raises DatasetError if images are missing or unusable, or if the role has no images.
    """

    role: Role
    """Role of the images, as passed to the constructor."""
    color: Color
    """Colour mode of the images, `rgb` or `grayscale`."""
    cache_path: Path
    """Folder of the cache."""
    ids: tuple[str, ...]
    """Ids of the images, in the order of the dataset."""
    normalization: Normalization
    """Mean and standard deviation of each channel, used to normalise the images."""

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
        self.role, self.color = role, config.color
        self._opened: tuple[int, DeviceData] | None = None
        limit: dict[str, Any] = {} if n is None else {f"n_{role.replace('-', '_')}": n}
        prepared = prepare_pool(
            # Larger cached images are needed only for random crops, and these datasets are not augmented.
            replace(config, cache_size=0, **limit),
            Path(config.cache_dir or cache_root),
            role="test" if role == "final-test" else "final" if role == "final-train" else "search",
        )
        self.cache_path = prepared.cache_path
        left_out = {"search-train": "val", "search-validation": "train"}.get(role)
        samples = prepared.index.samples
        self._indices = np.flatnonzero([sample.split != left_out for sample in samples])
        self.ids = tuple(samples[i].id for i in self._indices)
        if not self.ids:
            raise DatasetError(f"the dataset has no images for the role {role}")
        self._is_held_out = role in ("search-validation", "final-test")
        if normalization is None and self._is_held_out:
            training: Role = "search-train" if role == "search-validation" else "final-train"
            normalization = RoleDataset(training, config, cache_root=cache_root).normalization
        self.normalization = normalization or self._data().cache.normalization(self._indices, config.color)
        if (n := len(self.normalization.mean)) != config.n_channels:
            raise ConfigError(
                f"normalization has {n} channels, images of color {config.color!r} have {config.n_channels}"
            )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the image (C, H, W) float32, normalised, and its mask (1, H, W) uint8, 0 or 1."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return several items, which are read and normalised as one batch. DataLoader calls this method."""
        data = self._data()
        # Index the array, because its IndexError after the last image ends a for loop over the dataset.
        batch = self._indices[np.asarray(indices, np.int64)]
        ((images, masks),) = data.stream([batch], held_out=self._is_held_out)
        return list(zip(ToInput(self.normalization, "cpu")(images), masks.unsqueeze(1), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a memory-mapped file would copy all its bytes, so DataLoader workers reopen the cache instead.
        return {**self.__dict__, "_opened": None}

    def _data(self) -> DeviceData:
        # A forked worker must not share the decoding subprocess of its parent.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), DeviceData(open_cache(self.cache_path))
        return self._opened[1]
