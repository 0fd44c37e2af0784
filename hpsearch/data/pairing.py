"""Pair the images of one folder with the masks of another folder by file name."""

import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterable, Sequence
from pathlib import Path

from hpsearch.data.dataset import Problem, Sample, Split
from hpsearch.data.formats import is_image_name, readable_suffixes
from hpsearch.errors import DatasetError
from hpsearch.user_files import broken_link, list_folder, name_fault, name_key, printable, require_usable_path

MASK_WORD = re.compile(r"mask|truth|label|segment|annotation|(^|[^a-z])gt([^a-z]|$)", re.IGNORECASE)
"""Pattern of the words that mark a folder or a file as masks."""
FilesByKey = dict[str, list[Path]]
"""Maps the `name_key` of a stem (file name without extension) to the image files with this stem."""


def find_pairs(
    images: Path, masks: Path, split: Split, suffix: str, *, is_chosen: bool = False
) -> tuple[list[Sample], list[Problem]]:
    """Return the pairs of images and masks whose names match, and problems for the remaining files.

    The stem (file name without extension) of a mask is the stem of its image followed by `suffix`. If `suffix` is
    empty, it is determined from the file names. Set `is_chosen` if the user chose the suffix. Masks with other
    suffixes are then ignored.
    """
    for folder in (images, masks):
        require_usable_path(folder, DatasetError)
    image_files, mask_files = images_by_key(images), images_by_key(masks)
    together = images.samefile(masks)
    suffix = name_key(suffix) or find_suffix(image_files, mask_files, together=together)
    if together:
        image_files, mask_files = _separated(image_files, suffix)
    partners, others, alone = _assign(mask_files, image_files, suffix, is_chosen=is_chosen)
    pairs: list[Sample] = []
    faults: list[tuple[str, _Fault]] = []
    for key, paths in image_files.items():
        id = _id(paths)
        if fault := _pair_fault(paths, partners[key], others[key], missing=f"mask {id}{suffix}.png in {masks}"):
            faults.append((id, fault))
        else:
            pairs.append(Sample(id, paths[0], partners[key][0], split))
    for paths in alone:
        id = _id(paths)
        if suffix and name_key(id[-len(suffix) :]) == suffix:
            id = id[: -len(suffix)]
        missing = ("missing image", f"{paths[0]} has no image {id}.jpg in {images}", tuple(paths))
        faults.append((id, _file_fault(paths) or missing))
    return pairs, [Problem(kind, printable(id), files, text, split) for id, (kind, text, files) in faults]


def images_by_key(folder: Path) -> FilesByKey:
    """Return the image files of a folder, sorted and grouped by the `name_key` of their stem.

    Hidden files and ISIC-2017's superpixel images are left out. Broken links and inaccessible files are included, so
    that they are reported.
    """
    found: FilesByKey = defaultdict(list)
    for path in list_folder(folder, DatasetError):
        key = name_key(path.stem)
        if is_image_file(path) and not key.endswith("_superpixels"):
            found[key].append(path)
    return found


def find_suffix(images: Iterable[str], masks: Iterable[str], *, together: bool) -> str:
    """Return the most frequent suffix that turns the stem of an image into the stem of a mask.

    The shortest suffix wins ties. The result is empty if no mask matches an image. Set `together` if images and masks
    are in one folder.
    """
    stems = set(images)
    # In a shared folder, every file would match itself with an empty suffix.
    votes = Counter(
        mask[end:]
        for mask in masks
        for end in range(len(mask), 0, -1)
        if mask[:end] in stems and not (together and end == len(mask))
    )
    return min(votes, key=lambda suffix: (-votes[suffix], len(suffix), suffix), default="")


def is_image_file(path: Path) -> bool:
    """Return whether `path` is an image file that is not hidden.

    Files that cannot be decoded or accessed (such as broken links) are included, so that they are reported.
    """
    if not is_image_name(path.name) or path.name.startswith("."):
        return False
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def _id(paths: Sequence[Path]) -> str:
    return unicodedata.normalize("NFC", paths[0].stem)


_Fault = tuple[str, str, tuple[Path, ...]]
"""Kind, text and files of a problem."""


def _pair_fault(
    paths: Sequence[Path], partners: Sequence[Path], others: Sequence[Path], *, missing: str
) -> _Fault | None:
    """Return the problem of an image and its masks, or None if they are a valid pair.

    `paths` are the files with the name of the image, `partners` the masks with this name and the suffix, and `others`
    further masks of the image. `missing` describes the expected mask if there is none.
    """
    files = (*paths, *partners, *others)
    if fault := _file_fault(files):
        return fault
    for same in (paths, partners):
        if len(same) > 1:
            text = f"{same[0]} and {same[1].name} differ only in case, Unicode form or ending: keep one of them"
            return "two files of one name", text, tuple(same)
    if not partners:
        only = f" (only {', '.join(path.name for path in others)})" if others else ""
        return "missing mask", f"{paths[0]} has no {missing}{only}", (*paths, *others)
    if others:
        named = ", ".join(path.name for path in (*partners, *others))
        text = f"{paths[0]} has {1 + len(others)} masks, {named}: merge them, or keep one"
        return "several masks", text, files
    return None


def _file_fault(files: Sequence[Path]) -> _Fault | None:
    """Return the first problem with the name, link or format of a file in `files`, or None if there is none."""
    for path in files:
        if fault := name_fault(path.stem):
            return "unusable name", f"{printable(path)}: its name {fault}: rename it", tuple(files)
        if fault := broken_link(path):
            return "dangling link", fault, tuple(files)
        if path.suffix.lower() not in readable_suffixes():
            text = f"{path} is a {path.suffix.lower()} file, which cannot be read: convert it to PNG or JPEG"
            return "unknown format", text, tuple(files)
    return None


def _separated(files: FilesByKey, suffix: str) -> tuple[FilesByKey, FilesByKey]:
    """Separate the files of one folder into images and masks. The stems of masks end in `suffix`."""
    if not suffix:
        return files, {}
    images = {key: paths for key, paths in files.items() if not key.endswith(suffix)}
    # A file without the suffix may still be a second mask of an image. Its name then contains a word such as `mask`.
    for key in [key for key in images if key + suffix not in files]:
        if (owner := _owner(key, suffix, images)) and _says_mask(key[len(owner) :], suffix):
            del images[key]
    return images, {key: paths for key, paths in files.items() if key not in images}


def _assign(
    masks: FilesByKey, images: Collection[str], suffix: str, *, is_chosen: bool
) -> tuple[FilesByKey, FilesByKey, list[list[Path]]]:
    """Return the mask of each image, the further masks of each image, and the masks without an image.

    The mask of an image has its name and `suffix`. A mask that matches no image is a further mask of an image if its
    name starts with the image's stem. For example, `x_mask_1.png` is a further mask of `x.png`. If images have such
    names too (`x.png` and `x_2.png`), a mask `x_3.png` is treated as a mask without an image. A further mask must
    then have a word such as `mask` in its name. If the user chose the suffix, the rest of the name must start with
    it. Masks with other suffixes, such as masks of dermoscopic attributes, are then ignored.
    """
    partners: FilesByKey = defaultdict(list)
    others: FilesByKey = defaultdict(list)
    alone = []
    images_extend = any(_owner(image, suffix, images) for image in images)
    for key, paths in masks.items():
        stem, owner = key.removesuffix(suffix), _owner(key, suffix, images)
        rest = key.removeprefix(owner or "")
        is_further = rest.startswith(suffix) if is_chosen else _says_mask(rest, suffix) or not images_extend
        if stem in images and key == stem + suffix:
            partners[stem] = paths
        elif owner and stem not in images and is_further:
            others[owner] += paths
        elif not (owner and is_chosen) or key.endswith(suffix):
            alone.append(paths)
    return partners, others, alone


def _owner(key: str, suffix: str, images: Container[str]) -> str | None:
    """Return the longest image key that is a prefix of `key`, or None if there is none.

    The prefix must be followed by `suffix` or by a character that is not alphanumeric, so `im1` does not match
    `im10`.
    """
    for end in range(len(key) - 1, 0, -1):
        if key[:end] in images and ((suffix and key.startswith(suffix, end)) or not key[end].isalnum()):
            return key[:end]
    return None


def _says_mask(rest: str, suffix: str) -> bool:
    """Return whether a file's name marks it as a mask: `rest` starts with `suffix` or contains a word such as `mask`.

    `rest` is the part of the file's key that follows the key of the image.
    """
    return bool(suffix and rest.startswith(suffix)) or bool(MASK_WORD.search(rest.removesuffix(suffix)))
