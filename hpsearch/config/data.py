"""Settings of the data and of its augmentation. Imports no torch: the coordinator reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from hpsearch.errors import ConfigError
from hpsearch.paths import absolute
from hpsearch.user_files import printable, text_fault

Color = Literal["rgb", "grayscale"]
LOCATIONS = ("root", "images", "masks", "test_list", "groups", "cache_dir")
"""Settings of the data that name a file or folder."""

GRAY_WEIGHTS = (0.299, 0.587, 0.114)
"""Of red, green and blue in grayscale: luma of ITU-R BT.601."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, at which size, and how they are kept."""

    root: str = "ISIC-2017"
    """Folder of the dataset in either layout of ISIC-2017, or `sample` for the built-in one."""
    images: str = ""
    """Folder of one's own images; `masks` goes with it, and `root` is then not read."""
    masks: str = ""
    """Folder of the masks of `images`, matched by the stem of the name."""
    mask_suffix: str = ""
    """What a mask's stem has beyond its image's (`_segmentation`); empty: found by itself."""
    test_share: float = 0.2
    """Share of one's own images that is set aside as the test split, drawn from the seed 0."""
    test_list: str = ""
    """Text file with one id a line: the test split of one's own images, instead of `test_share`."""
    size: int | tuple[int, int] = 572
    """Height and width that the network sees; one number for both."""
    color: Color = "rgb"
    """Channels that the network sees; both come from the same cache."""
    match: Literal["resize", "crop"] = "resize"
    """How an image is brought to `size`."""
    exif: Literal["auto", "apply", "ignore"] = "auto"
    """EXIF orientation of the files; `auto`: as the sizes in the pool prove, applied where they prove nothing."""
    max_value: int = 0
    """Value that becomes 255 in images of more than 8 bits; 0: the least of 255, 1023, 4095, 16383, 65535 that fits
    the pool."""
    cache: Literal["auto", "memory", "files", "memmap", "none"] = "auto"
    """Where decoded images are kept."""
    cache_size: int | tuple[int, int] = 0
    """Size of the cached images if `augment.crop` takes fresh crops of `size` from them; 0: `size`."""
    cache_dir: str = ""
    """Folder of the caches; empty: `cache/` in the project folder."""
    n_search_train: int = 0
    """Use only the first n training images in the search; 0: all."""
    n_search_validation: int = 0
    """Use only the first n validation images in the search; 0: all."""
    n_final_train: int = 0
    """Use only the first n pool images in `final`; 0: all."""
    n_final_test: int = 0
    """Use only the first n test images in `final`; 0: all."""
    groups: str = ""
    """CSV with the columns `image` and one other (patient, lesion): a group never spans two folds."""
    group_duplicates: bool = False
    """Keep near-duplicate images in one fold."""
    exclude_bad: bool = False
    """Leave out images with errors instead of refusing the dataset."""

    def __post_init__(self) -> None:
        for name in ("size", "cache_size"):
            value = getattr(self, name)
            sides = value if isinstance(value, tuple) else (value, value)
            if len(sides) != 2 or (min(sides) < 8 and not (name == "cache_size" and value == 0)):
                raise ConfigError(f"data.{name} must be one number or [height, width], each at least 8, got {value}")
        for name in ("root", "images", "masks", "test_list", "cache_dir", "groups"):
            if fault := text_fault(getattr(self, name)):
                raise ConfigError(f"data.{name}: the path {printable(getattr(self, name))} {fault}: rename it")
        if bool(self.images) != bool(self.masks):
            raise ConfigError(
                "data.images and data.masks (--images, --masks) go together: give both; they may be one folder"
            )
        if not 0 < self.test_share < 1:
            raise ConfigError(f"data.test_share must lie between 0 and 1, got {self.test_share}")
        if self.max_value and not 255 <= self.max_value <= 65535:
            raise ConfigError(f"data.max_value must be 0 (found) or lie between 255 and 65535, got {self.max_value}")
        for role in ("n_search_train", "n_search_validation", "n_final_train", "n_final_test"):
            if getattr(self, role) < 0:
                raise ConfigError(f"data.{role} must be 0 (all) or more, got {getattr(self, role)}")

    def absolute(self) -> DataConfig:
        """Return the same data with absolute paths, so that they are found from any folder."""
        # `root` may be no folder, or one that is not read.
        is_root_read = self.root != "sample" and not self.images
        names = [name for name in LOCATIONS if getattr(self, name) and (name != "root" or is_root_read)]
        changed: dict[str, Any] = {name: str(absolute(getattr(self, name))) for name in names}
        return replace(self, **changed)

    def located_as(self, other: DataConfig) -> DataConfig:
        """Return the same data at the paths of `other`."""
        named: dict[str, Any] = {name: getattr(other, name) for name in LOCATIONS}
        return replace(self, **named)

    @property
    def height(self) -> int:
        return self.size[0] if isinstance(self.size, tuple) else self.size

    @property
    def width(self) -> int:
        return self.size[1] if isinstance(self.size, tuple) else self.size

    @property
    def cached_size(self) -> tuple[int, int]:
        """Height and width of the images in the cache."""
        if not self.cache_size:
            return self.height, self.width
        return self.cache_size if isinstance(self.cache_size, tuple) else (self.cache_size, self.cache_size)

    @property
    def n_channels(self) -> int:
        """Channels that the network sees."""
        return 3 if self.color == "rgb" else 1


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of a training batch; 0 switches each off."""

    hflip: float = 0.5
    """Probability of a horizontal flip, mask too."""
    vflip: float = 0.0
    """Probability of a vertical flip, mask too."""
    rotate: float = 0.0
    """Rotation by up to so many degrees either way, mask too."""
    scale: float = 0.0
    """Zoom by a factor within 1 ± scale, mask too."""
    crop: bool = False
    """Fresh random crops of `data.size` each epoch, from a cache at `data.cache_size`."""
    brightness: float = 0.0
    """Brightness factor within 1 ± brightness."""
    contrast: float = 0.0
    """Contrast factor within 1 ± contrast."""
    saturation: float = 0.0
    """Saturation factor within 1 ± saturation."""
    hue: float = 0.0
    """Hue shift within ± hue, as a share of the colour circle (at most 0.5)."""
    blur: float = 0.0
    """Gaussian blur of up to so many pixels standard deviation."""
    noise: float = 0.0
    """Gaussian noise of up to this standard deviation, where images run from 0 to 1."""

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name} is a probability, got {getattr(self, name)}")
        limits = {"rotate": 180, "scale": 0.9, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5}
        limits |= {"blur": 20, "noise": 1}
        for name, limit in limits.items():
            if not 0 <= getattr(self, name) <= limit:
                raise ConfigError(f"augment.{name} must lie between 0 and {limit}, got {getattr(self, name)}")
