"""Settings of the data and of augmentation. Imports no torch: the coordinator reads them."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from hpsearch.config.values import Size, as_pair, check_at_least, check_between, check_size, require
from hpsearch.paths import absolute
from hpsearch.user_files import printable, text_fault

Color = Literal["rgb", "grayscale"]
LOCATIONS = ("root", "images", "masks", "test_list", "groups", "cache_dir")
"""Settings of the data that name a file or folder."""

GRAY_WEIGHTS = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grayscale: the luma of ITU-R BT.601."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images are used, at which size, and how they are cached."""

    root: str = "ISIC-2017"
    """Folder of the dataset in either layout of ISIC-2017, or `sample` for the built-in one."""
    images: str = ""
    """Folder of your own images, used together with `masks`; `root` is then not read."""
    masks: str = ""
    """Folder of the masks of `images`, matched by the stem of the file name."""
    mask_suffix: str = ""
    """Suffix of a mask's stem after the stem of its image (`_segmentation`); empty: detected."""
    test_share: float = 0.2
    """Share of your own images in the test split, drawn at random with seed 0."""
    test_list: str = ""
    """Text file with one id per line: the test split of your own images, instead of `test_share`."""
    size: Size = 572
    """Height and width of the images that the network sees; one number for both."""
    color: Color = "rgb"
    """Channels that the network sees; both use the same cache."""
    match: Literal["resize", "crop"] = "resize"
    """How an image is fitted to `size`; `resize_mode` is another name of this setting."""
    exif: Literal["auto", "apply", "ignore"] = "auto"
    """EXIF orientation of the files; `auto`: detected from the sizes of the pool's images and masks, applied where
    these do not tell."""
    max_value: int = 0
    """Value that becomes 255 in images of more than 8 bits; 0: the smallest of 255, 1023, 4095, 16383 and 65535 that
    no pixel of the pool exceeds."""
    cache: Literal["auto", "memory", "files", "memmap", "none"] = "auto"
    """Where decoded images are stored."""
    cache_size: Size = 0
    """Size of the cached images from which `augment.crop` takes random crops of `size`; 0: `size`."""
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
    """CSV file with the columns `image` and one other (patient, lesion); all images of a group are in one fold."""
    group_duplicates: bool = False
    """Keep near-duplicate images in one fold."""
    exclude_bad: bool = False
    """Exclude images with errors instead of refusing the dataset."""

    def __post_init__(self) -> None:
        check_size("data.size", self.size)
        if self.cache_size != 0:
            check_size("data.cache_size", self.cache_size)
        for name in LOCATIONS:
            path = getattr(self, name)
            fault = text_fault(path)
            require(not fault, f"data.{name}: the path {printable(path)} {fault}: rename it")
        require(
            bool(self.images) == bool(self.masks),
            "data.images and data.masks (--images, --masks) go together: give both; they may be one folder",
        )
        require(0 < self.test_share < 1, f"data.test_share must lie between 0 and 1, got {self.test_share}")
        require(
            self.max_value == 0 or 255 <= self.max_value <= 65535,
            f"data.max_value must be 0 (detected) or lie between 255 and 65535, got {self.max_value}",
        )
        check_at_least("data", self, 0, "n_search_train", "n_search_validation", "n_final_train", "n_final_test")

    def absolute(self) -> Self:
        """Return the same settings with absolute paths, which are valid from any folder."""
        is_root_read = self.root != "sample" and not self.images
        names = [name for name in LOCATIONS if getattr(self, name) and (name != "root" or is_root_read)]
        changed: dict[str, Any] = {name: str(absolute(getattr(self, name))) for name in names}
        return replace(self, **changed)

    def located_as(self, other: Self) -> Self:
        """Return the same settings with the paths of `other`."""
        named: dict[str, Any] = {name: getattr(other, name) for name in LOCATIONS}
        return replace(self, **named)

    @property
    def height(self) -> int:
        """Height of the images that the network sees."""
        return as_pair(self.size)[0]

    @property
    def width(self) -> int:
        """Width of the images that the network sees."""
        return as_pair(self.size)[1]

    @property
    def cached_size(self) -> tuple[int, int]:
        """Height and width of the images in the cache."""
        return as_pair(self.cache_size or self.size)

    @property
    def n_channels(self) -> int:
        """Channels that the network sees."""
        return 3 if self.color == "rgb" else 1


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random augmentation of training batches; 0 switches an operation off."""

    hflip: float = 0.5
    """Probability of a horizontal flip, mask included."""
    vflip: float = 0.0
    """Probability of a vertical flip, mask included."""
    rotate: float = 0.0
    """Largest rotation in degrees in either direction, mask included."""
    scale: float = 0.0
    """Zoom by a factor within 1 ± scale, mask included."""
    crop: bool = False
    """Take new random crops of `data.size` in each epoch from a cache at `data.cache_size`."""
    brightness: float = 0.0
    """Brightness factor within 1 ± brightness."""
    contrast: float = 0.0
    """Contrast factor within 1 ± contrast."""
    saturation: float = 0.0
    """Saturation factor within 1 ± saturation."""
    hue: float = 0.0
    """Hue shift within ± hue, as a share of the colour circle (at most 0.5)."""
    blur: float = 0.0
    """Largest standard deviation of Gaussian blur, in pixels."""
    noise: float = 0.0
    """Largest standard deviation of Gaussian noise, for images with values from 0 to 1."""

    def __post_init__(self) -> None:
        check_between("augment", self, 0, hflip=1, vflip=1, rotate=180, scale=0.9, blur=20, noise=1)
        check_between("augment", self, 0, brightness=1, contrast=1, saturation=1, hue=0.5)
