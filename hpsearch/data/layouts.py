"""Find the pairs of image and mask, in the archive's layout, one folder per split, or folders of one's own.

    archive   ROOT/ISIC-2017_Training_Data and ROOT/ISIC-2017_Training_Part1_GroundTruth, ..._Validation_...,
              ..._Test_v2_...
    splits    ROOT/train, ROOT/validation (or val), ROOT/test, each with a folder of images and one of masks
    folders   any two folders; the test split is a list, or a share drawn from the names

Which of them it is follows from the folders that are there. Only names are read here, with one exception: byte-equal
images of one's own are found before a test share is drawn, so that no copy of a test image is trained on.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from hpsearch.config.data import DataConfig
from hpsearch.errors import DatasetError
from hpsearch.paths import sha256_file, sha256_text
from hpsearch.user_files import (
    broken_link,
    folder_fault,
    list_folder,
    name_fault,
    name_key,
    printable,
    read_text,
    require_usable_path,
    user_path,
)

Split = Literal["train", "val", "test"]
Layout = Literal["archive", "splits", "folders"]

JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
READABLE = (*JPEG, ".png")
"""Name endings (lower case) of the images that can be decoded."""
FOREIGN = (
    *(".bmp", ".dib", ".tif", ".tiff", ".gif", ".webp", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl"),
    *(".dcm", ".dicom", ".svg", ".psd", ".tga", ".ppm", ".pgm", ".pbm", ".dng"),
)
"""Name endings of images that cannot: named as errors instead of passed over."""

_ARCHIVE_FOLDER = re.compile(r"isic-2017_(training|validation|test|test_v2)_(data|part1_groundtruth)", re.IGNORECASE)
_ARCHIVE_SPLIT: Mapping[str, Split] = {"training": "train", "validation": "val", "test": "test", "test_v2": "test"}
_SPLIT_FOLDERS: Mapping[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_MASK_FOLDER = re.compile(r"mask|truth|label|segment|annotation|(^|[^a-z])gt([^a-z]|$)", re.IGNORECASE)
_IMAGE_FOLDER = re.compile(r"image|img|data|input|photo", re.IGNORECASE)
_MISSING = (
    "no dataset in {root}: {needs}. Give the folder of ISIC-2017 with --data DIR (`hpsearch data download` "
    "fetches it), your own with --images DIR --masks DIR, or use the built-in one with --data sample"
)


@dataclass(frozen=True)
class Sample:
    """One image with its mask."""

    id: str
    """The stem of the image's name in Unicode form NFC."""
    image: Path
    mask: Path
    split: Split


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an image (an error), or worth knowing about it (a note)."""

    kind: str
    """What is wrong, in a few words that are the same for every image (`missing mask`)."""
    id: str
    files: tuple[Path, ...]
    text: str
    """What is wrong with this one, both values named."""
    split: Split


@dataclass(frozen=True)
class Dataset:
    """All pairs of a dataset, train before val before test, sorted by id inside each split."""

    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]
    """Files that could not be paired."""
    root: Path
    layout: Layout
    flags: str = ""
    """How the command line names it: `--data DIR`, or `--images DIR --masks DIR`."""

    def split(self, *splits: Split) -> tuple[Sample, ...]:
        """The samples of these splits, in the dataset's order."""
        return tuple(sample for sample in self.samples if sample.split in splits)


def find_samples(config: DataConfig) -> Dataset:
    """The dataset that `config` names.

    Raises DatasetError, saying how to get one, where no layout is recognised or where two are.
    """
    if config.images:
        flags = f"--images {shlex.quote(config.images)} --masks {shlex.quote(config.masks)}"
        return replace(_own_folders(config), flags=flags)
    return replace(_in_root(config), flags=f"--data {shlex.quote(config.root)}")


def _in_root(config: DataConfig) -> Dataset:
    root = user_path(config.root)
    require_usable_path(root, DatasetError)
    archive = _archive_folders(root)
    splits = _split_folders(root)
    if archive and splits:
        raise DatasetError(
            f"{root} holds two layouts, {sorted(p.name for p in archive.values())[0]} and "
            f"{splits['train'].name}: move one of them elsewhere"
        )
    if archive:
        return _archive(root, archive)
    if splits:
        return _one_folder_per_split(root, splits)
    nested = _archive_folders(root / "ISIC-2017") or _split_folders(root / "ISIC-2017")
    if nested:
        raise DatasetError(f"no dataset in {root}, but in {root / 'ISIC-2017'}: use --data {root / 'ISIC-2017'}")
    if own := _own_folders_in(root):
        images, masks = (shlex.quote(str(path)) for path in own)
        raise DatasetError(
            f"{root} is not laid out like ISIC-2017, but looks like images and masks of your own: "
            f"use --images {images} --masks {masks}"
        )
    if fault := folder_fault(root):
        raise DatasetError(_MISSING.format(root=root, needs=fault))
    needs = "it needs ISIC-2017_Training_Data and ISIC-2017_Training_Part1_GroundTruth, or train, validation and test"
    raise DatasetError(_MISSING.format(root=root, needs=needs))


def _own_folders_in(root: Path) -> tuple[Path, Path] | None:
    """Folders of images and of masks that someone may have meant by `root`: inside it, or itself."""
    inside = _folders(root)
    masks = [path for path in inside if _MASK_FOLDER.search(path.name) and _by_key(path)]
    images = [path for path in inside if path not in masks and _by_key(path)]
    if len(masks) == 1 and len(images) == 1:
        return images[0], masks[0]
    if not folder_fault(root) and (stems := _by_key(root)) and _find_suffix(stems, stems, together=True):
        return root, root
    return None


def _archive_folders(root: Path) -> dict[tuple[Split, str], Path]:
    """(split, `data` or `part1_groundtruth`) to the folder of the archive that is there."""
    found: dict[tuple[Split, str], Path] = {}
    for path in _folders(root):
        if match := _ARCHIVE_FOLDER.fullmatch(path.name):
            key = (_ARCHIVE_SPLIT[match[1].lower()], match[2].lower())
            if key in found:
                raise DatasetError(f"{root} holds both {found[key].name} and {path.name}: keep one of them")
            # Unpacking an archive into a folder of its own name nests it once.
            inner = path / path.name
            found[key] = path if folder_fault(inner) else inner
    return found


def _split_folders(root: Path) -> dict[Split, Path]:
    found: dict[Split, Path] = {}
    for path in _folders(root):
        split = _SPLIT_FOLDERS.get(path.name.lower())
        if split is not None:
            if split in found:
                raise DatasetError(f"{root} holds both {found[split].name} and {path.name}: keep one of them")
            found[split] = path
    # A folder named test alone can be anything.
    return found if "train" in found else {}


def _archive(root: Path, folders: Mapping[tuple[Split, str], Path]) -> Dataset:
    samples: list[Sample] = []
    problems: list[Problem] = []
    for split in get_args(Split):
        images, masks = folders.get((split, "data")), folders.get((split, "part1_groundtruth"))
        if images is None and masks is None:
            continue
        if images is None or masks is None:
            there = images or masks
            assert there is not None
            partner = "Part1_GroundTruth" if masks is None else "Data"
            raise DatasetError(f"{there} is there, but the folder ..._{partner} beside it is not")
        found, damage = _pairs(images, masks, split, "_segmentation")
        samples += found
        problems += damage
    return _dataset(samples, problems, root, "archive")


def _one_folder_per_split(root: Path, folders: Mapping[Split, Path]) -> Dataset:
    samples: list[Sample] = []
    problems: list[Problem] = []
    for split in get_args(Split):
        if split in folders:
            images, masks = _image_and_mask_folder(folders[split])
            found, damage = _pairs(images, masks, split, "")
            samples += found
            problems += damage
    return _dataset(samples, problems, root, "splits")


def _image_and_mask_folder(folder: Path) -> tuple[Path, Path]:
    inside = _folders(folder)
    masks = [path for path in inside if _MASK_FOLDER.search(path.name)]
    rest = [path for path in inside if path not in masks]
    # The one folder that is left holds the images, whatever its name.
    images = rest if len(rest) == 1 else [path for path in rest if _IMAGE_FOLDER.search(path.name)]
    if len(masks) != 1 or len(images) != 1:
        raise DatasetError(
            f"{folder} must hold one folder of images and one of masks (such as images and masks), "
            f"got {', '.join(path.name for path in inside) or 'no folder'}"
        )
    return images[0], masks[0]


def _own_folders(config: DataConfig) -> Dataset:
    images, masks = user_path(config.images), user_path(config.masks)
    for what, path in (("images", images), ("masks", masks)):
        require_usable_path(path, DatasetError)
        if fault := folder_fault(path):
            raise DatasetError(f"{fault}: --{what} (data.{what}) must name a folder")
        if not _by_key(path):
            raise DatasetError(f"{path}, given as --{what}, holds no JPEG or PNG file ({', '.join(READABLE)})")
    is_chosen = bool(config.mask_suffix)
    samples, problems = _pairs(images, masks, "train", config.mask_suffix, is_chosen=is_chosen)
    if not samples and all(len(problem.files) == 1 for problem in problems):
        swapped, _ = _pairs(masks, images, "train", config.mask_suffix)
        advice = "were --images and --masks swapped?" if swapped else _advice_on_names(images, masks, config)
        raise DatasetError(f"no name in {masks} goes with one in {images}: {advice}")
    ids = [sample.id for sample in samples] + [problem.id for problem in problems]
    test = _listed_test_ids(config, ids) if config.test_list else _drawn_test_ids(config, samples)
    return _dataset(
        [replace(sample, split="test") if sample.id in test else sample for sample in samples],
        [replace(problem, split="test") if problem.id in test else problem for problem in problems],
        images,
        "folders",
    )


def _advice_on_names(images: Path, masks: Path, config: DataConfig) -> str:
    """What to do where not one mask belongs to an image by its name."""
    image, *_ = (path for paths in _by_key(images).values() for path in paths)
    names = _by_key(masks)
    mask, *_ = (path for paths in names.values() for path in paths)
    if foreign := [path for path in (image, mask) if path.suffix.lower() in FOREIGN]:
        return _unsupported(foreign[0])
    if config.mask_suffix:
        return (
            f"with data.mask_suffix = {config.mask_suffix} (taken literally) the mask of {image.name} is "
            f"{image.stem}{config.mask_suffix}.png, but the masks have names like {mask.name}; left out, the suffix "
            "is found by itself"
        )
    if masks.samefile(images):
        return f"they are one folder, in which the mask of {image.name} would be {image.stem}_mask.png or the like"
    in_front = [stem for stem in names if stem.endswith(name_key(image.stem))]
    example = names[in_front[0]][0] if in_front else mask
    return (
        f"a mask is named like its image, with or without something behind (mask of {image.name}: {image.stem}.png "
        f"or {image.stem}_mask.png), but the masks have names like {example.name}: rename them"
        + (f" ({example.name} to {image.stem}{example.suffix})" if in_front else "")
    )


def _listed_test_ids(config: DataConfig, ids: Iterable[str]) -> set[str]:
    """Return the ids in the test list; raise DatasetError where it lists anything else."""
    path = user_path(config.test_list)
    names = [line.strip() for line in read_text(path, "data.test_list", DatasetError).split("\n")]
    by_key = {name_key(id): id for id in ids}
    listed, unknown = set(), []
    for name in filter(None, names):
        key = name_key(name) if name_key(name) in by_key else name_key(without_ending(name))
        if key in by_key:
            listed.add(by_key[key])
        else:
            unknown.append(name)
    if unknown:
        raise DatasetError(f"{path} lists {unknown[0]!r} ({len(unknown)} such), which is no image with a mask")
    if not 0 < len(listed) < len(by_key):
        what = "none" if not listed else "all"
        raise DatasetError(f"{path} lists {what} of the {len(by_key)} images: a search and a test need some each")
    return listed


def _drawn_test_ids(config: DataConfig, samples: Sequence[Sample]) -> set[str]:
    """About `test_share` of the ids; byte-equal images and images of one group fall on one side."""
    from hpsearch.data.folds import connected, groups_file, read_groups

    table = groups_file(config)
    groups = read_groups(table) if table else None
    units = connected([sample.id for sample in samples], same_bytes(samples), groups)
    members = defaultdict(list)
    for sample, unit in zip(samples, units, strict=True):
        members[unit].append(sample.id)
    # Ranked by a hash of the names, so that an added image moves few others between the splits.
    ranked = sorted(members.values(), key=lambda ids: sha256_text(f"0:{ids[0]}"))
    wanted = max(1, round(config.test_share * len(samples)))
    test: set[str] = set()
    for ids in ranked:
        if len(test) >= wanted:
            break
        test |= set(ids)
    return test


def without_ending(name: str) -> str:
    """The id in a name that a list or table gives, with or without `.jpg`."""
    return name[: name.rindex(".")] if name.lower().endswith(READABLE) else name


def same_bytes(samples: Sequence[Sample]) -> list[str]:
    """A label for each sample, equal for byte-equal images; only images of equal length are read."""
    lengths = [_length(sample.image) for sample in samples]
    shared = Counter(lengths)
    return [
        file_sha256(sample.image) if shared[length] > 1 and length >= 0 else f"only {sample.id}"
        for sample, length in zip(samples, lengths, strict=True)
    ]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal, and a unique label for a file that cannot be read."""
    try:
        return sha256_file(path)
    except OSError:
        # Decoding the file reports the reason.
        return f"unreadable {path}"


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _pairs(
    images: Path, masks: Path, split: Split, suffix: str, *, is_chosen: bool = False
) -> tuple[list[Sample], list[Problem]]:
    """Images and masks whose stems match, and what is left over. An empty `suffix` is found.

    `is_chosen` says that the user chose the suffix, perhaps among those of several masks.
    """
    for folder in (images, masks):
        require_usable_path(folder, DatasetError)
    image_files, mask_files = _by_key(images), _by_key(masks)
    together = images.samefile(masks)
    suffix = name_key(suffix) or _find_suffix(image_files, mask_files, together=together)
    if together:
        all_files = image_files
        image_files = {key: paths for key, paths in all_files.items() if not suffix or not key.endswith(suffix)}
        # In one folder a second mask looks like an image: its name has to say more.
        for key in [key for key in image_files if key + suffix not in all_files]:
            if suffix and (owner := _owner(key, suffix, image_files)) and _says_mask(key[len(owner) :], suffix):
                del image_files[key]
        mask_files = {key: paths for key, paths in all_files.items() if key not in image_files and suffix}
    further = _further_masks(image_files, mask_files, suffix, is_chosen=is_chosen)
    pairs: list[Sample] = []
    problems: list[Problem] = []
    for key, paths in image_files.items():
        id = unicodedata.normalize("NFC", paths[0].stem)
        partners = mask_files.pop(key + suffix, [])
        others = [path for other in further.get(key, ()) for path in mask_files.pop(other)]
        files = (*paths, *partners, *others)
        if problem := _unusable(id, files, split):
            problems.append(problem)
        elif len(paths) > 1 or len(partners) > 1:
            same = paths if len(paths) > 1 else partners
            text = f"{same[0]} and {same[1].name} have one name (but for case, Unicode form or ending): keep one"
            problems.append(Problem("two files of one name", id, tuple(same), text, split))
        elif not partners:
            there = f" (only {', '.join(path.name for path in others)})" if others else ""
            text = f"{paths[0]} has no mask {id}{suffix}.png in {masks}{there}"
            problems.append(Problem("missing mask", id, (*paths, *others), text, split))
        elif others:
            named = f"{', '.join(path.name for path in (*partners, *others[:-1]))} and {others[-1].name}"
            text = f"{paths[0]} has {1 + len(others)} masks, {named}: join them into one, or keep one"
            problems.append(Problem("several masks", id, files, text, split))
        else:
            pairs.append(Sample(id, paths[0], partners[0], split))
    for key, paths in mask_files.items():
        if is_chosen and not key.endswith(suffix) and _owner(key, suffix, image_files):
            # Masks of another kind, such as those of other attributes, beside those that were chosen.
            continue
        id = unicodedata.normalize("NFC", paths[0].stem)
        if suffix and name_key(id[-len(suffix) :]) == suffix:
            id = id[: -len(suffix)]
        text = f"{paths[0]} has no image {id}.jpg in {images}"
        missing = Problem("missing image", id, tuple(paths), text, split)
        problems.append(_unusable(id, paths, split) or missing)
    return pairs, problems


def _unusable(id: str, files: Sequence[Path], split: Split) -> Problem | None:
    """Return what is wrong with these files of one image, as far as names and links tell."""
    for path in files:
        if fault := name_fault(path.stem):
            text = f"{printable(path)}: its name {fault}: rename it"
            return Problem("unusable name", printable(id), tuple(files), text, split)
    for path in files:
        if fault := broken_link(path):
            return Problem("dangling link", id, tuple(files), fault, split)
    for path in files:
        if path.suffix.lower() in FOREIGN:
            return Problem("unknown format", id, tuple(files), _unsupported(path), split)
    return None


def _unsupported(path: Path) -> str:
    return f"{path} is a {path.suffix.lower()} file, which cannot be read: convert it to PNG or JPEG"


def _further_masks(
    images: Collection[str], masks: Iterable[str], suffix: str, *, is_chosen: bool
) -> dict[str, list[str]]:
    """Return the keys of the masks that an image has beside the one of its name and `suffix`, by the image's key.

    A mask that belongs to no image by its name is another mask of the image whose stem it begins with, as
    `x_mask_1.png` is of `x.png`. Where images are named like that too (`x.png` and `x_2.png`), a mask `x_3.png`
    lacks its image instead, unless its name says that it is a mask. A suffix that was chosen says which of
    several masks counts: only those that begin with it are more of the same.
    """
    found: dict[str, list[str]] = defaultdict(list)
    extend: bool | None = None
    for key in masks:
        if (key.endswith(suffix) and key[: len(key) - len(suffix)] in images) or not (
            owner := _owner(key, suffix, images)
        ):
            continue
        rest = key[len(owner) :]
        if is_chosen and not rest.startswith(suffix):
            continue
        if not _says_mask(rest, suffix):
            if extend is None:
                extend = any(_owner(image, suffix, images) for image in images)
            if extend:
                continue
        found[owner].append(key)
    return found


def _owner(key: str, suffix: str, images: Container[str]) -> str | None:
    """Return the longest image key that `key` begins with, up to `suffix` or the end of a word (not im1 of im10)."""
    for end in range(len(key) - 1, 0, -1):
        if key[:end] in images and ((suffix and key.startswith(suffix, end)) or not key[end].isalnum()):
            return key[:end]
    return None


def _says_mask(rest: str, suffix: str) -> bool:
    """Whether the rest of a name says that the file is a mask, by a word for it or by `suffix` in front."""
    return bool(suffix and rest.startswith(suffix)) or bool(_MASK_FOLDER.search(rest.removesuffix(suffix)))


def _by_key(folder: Path) -> dict[str, list[Path]]:
    """Image files by `name_key` of their stem, sorted; superpixels and hidden files are none.

    A link to nothing, or a file that cannot be looked at, is among them, so that it is named and not passed over.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for path in list_folder(folder, DatasetError):
        key = name_key(path.stem)
        is_image = path.suffix.lower() in (*READABLE, *FOREIGN) and not path.name.startswith(".")
        if is_image and not key.endswith("_superpixels") and may_be_file(path):
            found[key].append(path)
    return found


def may_be_file(path: Path) -> bool:
    """Whether `path` is a file, or a link or name that cannot be followed and may have been meant as one."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def _find_suffix(images: Iterable[str], masks: Iterable[str], *, together: bool) -> str:
    """What most masks' stems have beyond their images'; the shortest of equally good ones."""
    stems = set(images)
    votes: Counter[str] = Counter()
    for mask in masks:
        for end in range(len(mask), 0, -1):
            # In one folder every mask would be its own partner.
            if mask[:end] in stems and not (together and end == len(mask)):
                votes[mask[end:]] += 1
    return min(votes, key=lambda suffix: (-votes[suffix], len(suffix), suffix), default="")


def _dataset(samples: list[Sample], problems: list[Problem], root: Path, layout: Layout) -> Dataset:
    if not samples and not problems:
        raise DatasetError(_MISSING.format(root=root, needs="its folders hold no images and masks"))
    # Folders of splits are often numbered each from 1: such ids get the split's name in front.
    n_splits = Counter(key for key, _ in {(name_key(sample.id), sample.split) for sample in samples})
    named = [
        replace(sample, id=f"{sample.split}-{sample.id}") if n_splits[name_key(sample.id)] > 1 else sample
        for sample in samples
    ]
    order = get_args(Split)
    named.sort(key=lambda sample: (order.index(sample.split), sample.id))
    problems.sort(key=lambda problem: (order.index(problem.split), problem.kind, problem.id))
    return Dataset(tuple(named), tuple(problems), root, layout)


def _folders(root: Path) -> list[Path]:
    """Folders in `root`, sorted; links to nothing too, so that one which is needed is named when it is listed."""
    if not os.path.isdir(root):
        return []
    inside = [path for path in list_folder(root, DatasetError) if not path.name.startswith(".")]
    return [path for path in inside if os.path.isdir(path) or (not path.suffix and broken_link(path))]
