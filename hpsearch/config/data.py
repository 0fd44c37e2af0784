"""Data and augmentation settings. Does not import torch, so that commands start fast."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from hpsearch.config.values import Size, as_pair, check_at_least, check_between, check_size, require
from hpsearch.paths import absolute
from hpsearch.user_files import printable, text_fault

Color = Literal["rgb", "grayscale"]
LOCATIONS = ("root", "images", "masks", "test_list", "groups", "cache_dir")
"""Names of the data settings whose values are paths of files or folders."""

GRAY_WEIGHTS = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the conversion to grayscale (luma of ITU-R BT.601)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings of the images: where they are, their size, and how they are cached."""

    root: str = "ISIC-2017"
    """Folder of the dataset. It contains the unpacked archives of ISIC-2017, or one folder per split (`train`,
    `validation`, `test`). `sample` selects the built-in synthetic dataset."""
    images: str = ""
    """Folder of your own images, which are used instead of `root`. Requires `masks`."""
    masks: str = ""
    """Folder of the masks of `images`. Files are matched by name, without the extension and `mask_suffix`."""
    mask_suffix: str = ""
    """Text after the image's name in the file name of its mask, such as `_segmentation`; empty: detect it."""
    test_share: float = 0.2
    """Fraction of your own images in the test split. The images are selected by a hash of their names, independently
    of `study.seed`."""
    test_list: str = ""
    """Text file that lists the test images of your own dataset, one file name per line. Used instead of
    `test_share`."""
    size: Size = 572
    """Height and width of the images that the network sees, in pixels; a single number sets both."""
    color: Color = "rgb"
    """Colour mode of the images that the network sees. Both modes use the same cache."""
    match: Literal["resize", "crop"] = "resize"
    """How an image is fitted to `size`: `resize` changes its resolution, `crop` keeps it and cuts out a part.
    `resize_mode` is an alias of this setting."""
    exif: Literal["auto", "apply", "ignore"] = "auto"
    """Whether the EXIF orientation of images and masks is applied. `auto` compares in how many pairs the sizes of
    image and mask match with and without it. In case of a tie, it is applied."""
    max_value: int = 0
    """Pixel value that is scaled to 255 in images of more than 8 bits per channel. 0: the smallest of 255, 1023,
    4095, 16383 and 65535 that no training or validation image exceeds."""
    cache: Literal["auto", "memory", "files", "memmap", "none"] = "auto"
    """How decoded images are cached: in memory-mapped files (`memmap`), in one file per image (`files`), in the
    memory of each process (`memory`), or not at all (`none`). `auto` prefers `memmap` if there is enough disk
    space."""
    cache_size: Size = 0
    """Size of the cached images, from which `augment.crop` takes crops of `size`; 0: the same as `size`."""
    cache_dir: str = ""
    """Folder for the caches; empty: `cache/` in the project folder."""
    n_search_train: int = 0
    """Use only the first n training images, sorted by name, in the search; 0: all."""
    n_search_validation: int = 0
    """Use only the first n validation images, sorted by name, in the search; 0: all."""
    n_final_train: int = 0
    """Use only the first n images for training in `hpsearch final`: first the training images, then the validation
    images, each sorted by name; 0: all."""
    n_final_test: int = 0
    """Score only the first n test images, sorted by name, in `hpsearch final`; 0: all."""
    groups: str = ""
    """CSV file with two columns: `image`, and one that names the group of each image, such as its patient or lesion.
    All images of a group are put in the same fold."""
    group_duplicates: bool = False
    """Whether to keep near-duplicate images in the same fold."""
    exclude_bad: bool = False
    """Whether to exclude images with errors. If false, a dataset with such images is rejected."""

    def __post_init__(self) -> None:
        check_size("data.size", self.size)
        check_size("data.cache_size", self.cache_size or self.size)
        for name in LOCATIONS:
            path = getattr(self, name)
            fault = text_fault(path)
            require(not fault, f"data.{name}: the path {printable(path)} {fault}: rename it")
        text = "data.images and data.masks (--images, --masks) must be given together; they may be the same folder"
        require(bool(self.images) == bool(self.masks), text)
        require(0 < self.test_share < 1, f"data.test_share must lie between 0 and 1, got {self.test_share}")
        text = f"data.max_value must be 0 (detected) or lie between 255 and 65535, got {self.max_value}"
        require(self.max_value == 0 or 255 <= self.max_value <= 65535, text)
        check_at_least("data", self, 0, "n_search_train", "n_search_validation", "n_final_train", "n_final_test")

    def absolute(self) -> Self:
        """Return the same settings with all paths made absolute."""
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
        """Number of channels of the images that the network sees."""
        return 3 if self.color == "rgb" else 1


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Settings of the random augmentation of training images; 0 or false disables an operation."""

    hflip: float = 0.5
    """Probability of flipping image and mask horizontally."""
    vflip: float = 0.0
    """Probability of flipping image and mask vertically."""
    rotate: float = 0.0
    """Largest rotation of image and mask in either direction, in degrees."""
    scale: float = 0.0
    """Largest relative zoom: image and mask are scaled by a factor from 1 - scale to 1 + scale."""
    crop: bool = False
    """Whether to take new random crops of `data.size` in each epoch, from cached images of `data.cache_size`."""
    brightness: float = 0.0
    """Largest relative change of brightness: the factor ranges from 1 - brightness to 1 + brightness."""
    contrast: float = 0.0
    """Largest relative change of contrast: the factor ranges from 1 - contrast to 1 + contrast."""
    saturation: float = 0.0
    """Largest relative change of saturation: the factor ranges from 1 - saturation to 1 + saturation."""
    hue: float = 0.0
    """Largest shift of the hue in either direction, as a fraction of the colour circle (at most 0.5)."""
    blur: float = 0.0
    """Largest standard deviation of Gaussian blur, in pixels."""
    noise: float = 0.0
    """Largest standard deviation of Gaussian noise, relative to pixel values from 0 to 1."""

    def __post_init__(self) -> None:
        check_between("augment", self, 0, hflip=1, vflip=1, rotate=180, scale=0.9, blur=20, noise=1)
        check_between("augment", self, 0, brightness=1, contrast=1, saturation=1, hue=0.5)
