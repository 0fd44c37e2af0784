"""Find image/mask pairs in any supported directory layout.

    archive   ROOT/ISIC-2017_Training_Data and ROOT/ISIC-2017_Training_Part1_GroundTruth, ..._Validation_...,
              ..._Test_v2_...
    splits    ROOT/train, ROOT/validation (or val), ROOT/test, each with a folder of images and a folder of masks
    folders   any folder of images and any folder of masks; the test split is given as a list or selected by a hash
              of the names

The layout is detected from the folders that exist. Only file names are read, with one exception: if a test split has
to be selected, byte-identical images are detected first, so that no copy of a test image is used for training.
"""

import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from hpsearch import user_files
from hpsearch.config.data import DataConfig
from hpsearch.data.dataset import Dataset, Layout, Problem, Sample, Split, same_bytes
from hpsearch.data.folds import connected, load_groups
from hpsearch.data.formats import readable_suffixes, without_suffix
from hpsearch.data.pairing import MASK_WORD, find_pairs, images_by_key
from hpsearch.errors import DatasetError
from hpsearch.paths import sha256_text

_SPLIT_NAMES: Mapping[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "test_v2"),
}
"""Names that each split can have in a folder name."""
_IMAGE_FOLDER = re.compile(r"image|img|data|input|photo", re.IGNORECASE)
_MISSING = (
    "no dataset in {root}: {needs}. Choose a dataset with --data DIR (`hpsearch data download` gets ISIC-2017), "
    "--images DIR --masks DIR, or --data sample (built in)"
)


def find_samples(config: DataConfig) -> Dataset:
    """Return the dataset in the folders that `config` names.

    Raises DatasetError if the folders have no known layout or more than one. If there is no dataset, the message says
    how to get one.
    """
    if config.images:
        flags = f"--images {shlex.quote(config.images)} --masks {shlex.quote(config.masks)}"
        return replace(_own_folders(config), flags=flags)
    return replace(_in_root(config), flags=f"--data {shlex.quote(config.root)}")


def _in_root(config: DataConfig) -> Dataset:
    root = user_files.user_path(config.root)
    user_files.require_usable_path(root, DatasetError)
    images, masks = (_by_split(root, f"isic-2017_{{}}_{content}") for content in ("data", "part1_groundtruth"))
    # A test folder without a train folder may be unrelated.
    splits = found if "train" in (found := _by_split(root, "{}")) else {}
    archive = masks | images
    if archive and splits:
        names = f"{next(iter(archive.values())).name} and {splits['train'].name}"
        raise DatasetError(f"{root} contains two layouts, {names}: move one of them elsewhere")
    for split, folder in archive.items():
        if split not in images or split not in masks:
            partner = "Data" if split in masks else "Part1_GroundTruth"
            raise DatasetError(f"{folder} exists, but ..._{partner} beside it is missing")
    folders = {split: _image_and_mask_folder(folder) for split, folder in splits.items()}
    folders |= {split: (images[split], masks[split]) for split in archive}
    if folders:
        results = [find_pairs(*pair, split, "_segmentation" if archive else "") for split, pair in folders.items()]
        samples = [sample for pairs, _ in results for sample in pairs]
        problems = [problem for _, faults in results for problem in faults]
        return _dataset(samples, problems, root, "archive" if archive else "splits")
    needs = "it needs ISIC-2017_Training_Data and ISIC-2017_Training_Part1_GroundTruth, or train, validation and test"
    raise DatasetError(_MISSING.format(root=root, needs=user_files.folder_fault(root) or needs))


def _by_split(root: Path, pattern: str) -> dict[Split, Path]:
    """Return the folder of each split in `root`.

    The folder's name is `pattern` with `{}` replaced by one of the split's names. Case is ignored.
    """
    folders = {path.name.lower(): path for path in _folders(root)}
    found: dict[Split, Path] = {}
    for split, names in _SPLIT_NAMES.items():
        here = [folders[name] for name in map(pattern.format, names) if name in folders]
        if len(here) > 1:
            raise DatasetError(f"{root} contains both {here[0].name} and {here[1].name}: keep one of them")
        if here:
            # Unpacking an archive into a folder with its own name nests the folder one level deeper.
            nested = here[0] / here[0].name
            found[split] = nested if nested.is_dir() else here[0]
    return found


def _image_and_mask_folder(folder: Path) -> tuple[Path, Path]:
    inside = _folders(folder)
    masks = [path for path in inside if MASK_WORD.search(path.name)]
    rest = [path for path in inside if path not in masks]
    # If there is only one other folder, it contains the images, whatever its name.
    images = rest if len(rest) == 1 else [path for path in rest if _IMAGE_FOLDER.search(path.name)]
    if len(masks) != 1 or len(images) != 1:
        raise DatasetError(
            f"{folder} must contain one folder of images and one of masks (such as images and masks), "
            f"got {', '.join(path.name for path in inside) or 'no folder'}"
        )
    return images[0], masks[0]


def _own_folders(config: DataConfig) -> Dataset:
    images, masks = user_files.user_path(config.images), user_files.user_path(config.masks)
    for what, path in (("images", images), ("masks", masks)):
        user_files.require_usable_path(path, DatasetError)
        if fault := user_files.folder_fault(path):
            raise DatasetError(f"{fault}: --{what} (data.{what}) must name a folder")
        if not images_by_key(path):
            endings = ", ".join(readable_suffixes())
            raise DatasetError(f"{path}, given as --{what}, contains no JPEG or PNG file ({endings})")
    suffix = config.mask_suffix
    samples, problems = find_pairs(images, masks, "train", suffix, is_chosen=bool(suffix))
    if not samples and all(problem.kind in ("missing image", "missing mask") for problem in problems):
        image, mask = (next(iter(images_by_key(folder).values()))[0] for folder in (images, masks))
        raise DatasetError(
            f"no mask in {masks} matches an image in {images}: the mask of {image.name} would be "
            f"{image.stem}{suffix or '_mask'}.png, but the masks have names such as {mask.name}. "
            "Rename them, set data.mask_suffix, or check whether --images and --masks are swapped"
        )
    ids = [*(sample.id for sample in samples), *(problem.id for problem in problems)]
    test = _listed_test_ids(config, ids) if config.test_list else _drawn_test_ids(config, samples)
    return _dataset(
        [replace(sample, split="test") if sample.id in test else sample for sample in samples],
        [replace(problem, split="test") if problem.id in test else problem for problem in problems],
        images,
        "folders",
    )


def _listed_test_ids(config: DataConfig, ids: Iterable[str]) -> set[str]:
    """Return the ids of the images in the test list.

    Raises DatasetError if the list has an unknown name, lists no image, or lists all images.
    """
    path = user_files.user_path(config.test_list)
    by_key = {user_files.name_key(id): id for id in ids}
    listed: set[str] = set()
    for name in filter(None, map(str.strip, user_files.read_text(path, "data.test_list", DatasetError).split("\n"))):
        id = by_key.get(user_files.name_key(name)) or by_key.get(user_files.name_key(without_suffix(name)))
        if id is None:
            raise DatasetError(f"{path} lists {name!r}, which is not an image with a mask")
        listed.add(id)
    if not 0 < len(listed) < len(by_key):
        what = "none" if not listed else "all"
        raise DatasetError(f"{path} lists {what} of the {len(by_key)} images: search and test split both need images")
    return listed


def _drawn_test_ids(config: DataConfig, samples: Sequence[Sample]) -> set[str]:
    """Select a test split of about `test_share` of the images, and return its ids.

    Byte-identical images stay together, and so do the images of a group.
    """
    units = connected([sample.id for sample in samples], same_bytes(samples), load_groups(config))
    members = defaultdict(list)
    for sample, unit in zip(samples, units, strict=True):
        members[unit].append(sample.id)
    # Rank by a hash of the ids, so that adding an image moves few others to another split.
    ranked = sorted(members.values(), key=lambda ids: sha256_text(f"0:{ids[0]}"))
    wanted = max(1, round(config.test_share * len(samples)))
    test: set[str] = set()
    for ids in ranked:
        if len(test) < wanted:
            test |= set(ids)
    return test


def _dataset(samples: list[Sample], problems: list[Problem], root: Path, layout: Layout) -> Dataset:
    if not samples and not problems:
        raise DatasetError(_MISSING.format(root=root, needs="its folders contain no images and masks"))
    # Images are often numbered from 1 in every split's folder. Prefix such ids with the name of the split.
    n_splits = Counter(key for key, _ in {(user_files.name_key(sample.id), sample.split) for sample in samples})
    named = [
        replace(sample, id=f"{sample.split}-{sample.id}") if n_splits[user_files.name_key(sample.id)] > 1 else sample
        for sample in samples
    ]
    order = get_args(Split)
    named.sort(key=lambda sample: (order.index(sample.split), sample.id))
    problems.sort(key=lambda problem: (order.index(problem.split), problem.kind, problem.id))
    return Dataset(tuple(named), tuple(problems), root, layout)


def _folders(root: Path) -> list[Path]:
    """Return the folders in `root`, sorted. Broken links are included, so that they are reported if needed."""
    if not os.path.isdir(root):
        return []
    inside = [path for path in user_files.list_folder(root, DatasetError) if not path.name.startswith(".")]
    return [path for path in inside if os.path.isdir(path) or (not path.suffix and user_files.broken_link(path))]
