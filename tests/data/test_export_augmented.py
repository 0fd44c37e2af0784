from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.io import read_image, write_jpeg, write_png

from hpsearch.config import StudyConfig
from hpsearch.config.data import AugmentConfig, DataConfig
from hpsearch.config.search import StudySettings
from hpsearch.data import export_augmented as module
from hpsearch.data.augment import augment_batch, draw_changes
from hpsearch.data.dataset import Dataset
from hpsearch.data.decode import read_pair
from hpsearch.data.export_augmented import export_augmented
from hpsearch.data.folds import make_folds, read_groups
from hpsearch.data.layouts import find_samples
from hpsearch.data.reading import PLAIN_READING
from hpsearch.data.sample import draw_sample
from hpsearch.errors import ConfigError, DatasetError

pytestmark = pytest.mark.usefixtures("one_decoder")

AUGMENT = AugmentConfig(hflip=0.5, rotate=20, brightness=0.2, contrast=0.2)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "ISIC-2017"
    draw_sample(folder, n_train=3, n_val=1, n_test=2)
    return folder


@pytest.fixture
def dataset(drawn: Path) -> Dataset:
    return find_samples(DataConfig(root=str(drawn)))


def export(
    dataset: Dataset,
    augment: AugmentConfig = AUGMENT,
    *,
    data: DataConfig | None = None,
    seed: int = 0,
    copies: int = 1,
    target: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    config = StudyConfig(data=data or DataConfig(), augment=augment, study=StudySettings(seed=seed))
    return export_augmented(dataset, config, copies=copies, target=target, progress=progress)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "augment",
    [
        AugmentConfig(hflip=1, vflip=1),
        AugmentConfig(hflip=0.5, rotate=180, scale=0.6),
        AugmentConfig(hflip=1, rotate=90, brightness=0.3, contrast=0.5, saturation=0.2, hue=0.1, blur=2, noise=0.1),
    ],
    ids=["flips", "warps", "all"],
)
def test_an_image_is_changed_like_a_batch_of_one(augment: AugmentConfig, own: Dataset, tmp_path: Path) -> None:
    target = export(own, augment, target=tmp_path / "aug", seed=5)
    by_id = {each.id: each for each in find_samples(DataConfig(root=str(target))).samples}
    for sample in own.split("train"):
        image, mask = read_pair(sample.image, sample.mask, PLAIN_READING)
        size = (mask.shape[0], mask.shape[1])
        seed = int.from_bytes(hashlib.sha256(f"5:{sample.id}:1".encode()).digest()[:8])
        changes = draw_changes(augment, 1, np.random.default_rng(seed), from_size=size, to_size=size)
        images, masks = augment_batch(image.permute(1, 2, 0)[None], mask[None], changes, size)
        expected = images[0].permute(2, 0, 1) if images.dtype == torch.uint8 else images[0].round()
        version = by_id[f"{sample.id}_aug1"]
        assert torch.equal(read_image(str(version.image)).float(), expected.float())
        assert torch.equal(read_image(str(version.mask))[0], masks[0] * 255)


def test_the_set_lies_beside_the_original_in_the_same_layout(dataset: Dataset, tmp_path: Path, drawn: Path) -> None:
    assert export(dataset, copies=2) == drawn.with_name("ISIC-2017_Aug")
    found = find_samples(DataConfig(root=str(drawn.with_name("ISIC-2017_Aug"))))
    assert found.layout == dataset.layout == "archive"
    assert found.problems == ()
    originals = [f"ISIC_000000{i}" for i in range(3)]
    assert [each.id for each in found.split("train")] == sorted(
        [*originals, *(f"{id}_aug{copy}" for id in originals for copy in (1, 2))]
    )
    for split in ("val", "test"):
        assert [each.id for each in found.split(split)] == [each.id for each in dataset.split(split)]
    for old, new in zip(dataset.split("val", "test"), found.split("val", "test"), strict=True):
        assert new.image.read_bytes() == old.image.read_bytes()
        assert new.mask.read_bytes() == old.mask.read_bytes()


def test_changed_versions_keep_the_size_and_differ_in_image_and_mask(dataset: Dataset, tmp_path: Path) -> None:
    found = find_samples(DataConfig(root=str(export(dataset, target=tmp_path / "aug"))))
    by_id = {each.id: each for each in found.samples}
    for old in dataset.split("train"):
        new = by_id[f"{old.id}_aug1"]
        before, after = read_image(str(old.image)), read_image(str(new.image))
        mask, moved = read_image(str(old.mask)), read_image(str(new.mask))
        assert after.shape == before.shape
        assert moved.shape == mask.shape
        assert moved.unique().tolist() == [0, 255]
        assert not torch.equal(after, before)
        assert not torch.equal(moved, mask)


def test_one_seed_gives_the_same_bytes_and_another_gives_others(dataset: Dataset, tmp_path: Path) -> None:
    first = contents(export(dataset, target=tmp_path / "a"))
    assert contents(export(dataset, target=tmp_path / "b")) == first
    other = contents(export(dataset, seed=1, target=tmp_path / "c"))
    assert other.keys() == first.keys()
    changed = {name for name in first if other[name] != first[name]}
    assert changed == {name for name in first if "_aug" in name} | {"augmentation.json"}


def test_groups_keep_every_version_in_the_fold_of_its_original(dataset: Dataset, tmp_path: Path) -> None:
    target = export(dataset, copies=2, target=tmp_path / "aug")
    found = find_samples(DataConfig(root=str(target)))
    pool = found.split("train", "val")
    folds = make_folds(
        [each.id for each in pool],
        [each.split for each in pool],
        [each.id for each in pool],
        folds=2,
        seed=0,
        groups=read_groups(target / "groups.csv"),
    )
    fold = dict(zip(folds.ids, folds.fold_of, strict=True))
    assert len(set(fold.values())) == 2
    assert all(fold[each.id] == fold[each.id.split("_aug")[0]] for each in pool)


def test_groups_of_patients_are_kept(dataset: Dataset, tmp_path: Path) -> None:
    patients = tmp_path / "patients.csv"
    patients.write_text("image,patient\n" + "".join(f"{each.id},anna\n" for each in dataset.samples))
    target = export(dataset, data=DataConfig(groups=str(patients)), target=tmp_path / "aug")
    rows = list(csv.reader((target / "groups.csv").read_text().splitlines()))
    assert rows[0] == ["image", "original"]
    assert len(rows) == 1 + 7
    assert {group for _, group in rows[1:]} == {"anna"}


def test_an_interrupted_export_leaves_no_dataset_and_the_next_one_replaces_it(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(export(dataset, target=tmp_path / "whole"))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "available_cores", lambda: 1)
    target = tmp_path / "aug"
    with pytest.raises(KeyboardInterrupt):
        export(dataset, seed=1, target=target, progress=interrupt)
    assert not target.exists()
    export(dataset, target=target)
    assert contents(target) == whole
    assert {path.name for path in tmp_path.iterdir()} == {"aug", "whole"}


def test_a_folder_that_is_there_is_left_alone(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="already exists"):
        export(dataset, target=tmp_path)


def test_changes_that_change_nothing_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="changes nothing"):
        export(dataset, AugmentConfig(hflip=0, crop=True), data=DataConfig(cache_size=600), target=tmp_path / "aug")
    with pytest.raises(ConfigError, match="copies must be at least 1"):
        export(dataset, copies=0, target=tmp_path / "aug")
    assert list(tmp_path.iterdir()) == []


def test_damaged_images_are_refused_or_left_out(drawn: Path, tmp_path: Path) -> None:
    root = tmp_path / "ISIC-2017"
    for name, content in contents(drawn).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    broken = root / "ISIC-2017_Training_Data" / "ISIC_0000001.jpg"
    broken.write_bytes(broken.read_bytes()[:500])
    (root / "ISIC-2017_Training_Part1_GroundTruth" / "ISIC_0000002_segmentation.png").unlink()
    dataset = find_samples(DataConfig(root=str(root)))
    with pytest.raises(DatasetError, match="ISIC_0000002"):
        export(dataset, target=tmp_path / "aug")
    target = export(dataset, data=DataConfig(exclude_bad=True), target=tmp_path / "aug")
    found = find_samples(DataConfig(root=str(target)))
    assert [each.id for each in found.split("train")] == ["ISIC_0000000", "ISIC_0000000_aug1"]
    assert found.problems == ()


@pytest.fixture
def own(drawn: Path, tmp_path: Path) -> Dataset:
    """Six PNG images of one's own in one folder, their masks in another."""
    for folder in ("photos", "m"):
        (tmp_path / folder).mkdir()
    for index, each in enumerate(find_samples(DataConfig(root=str(drawn))).samples):
        write_png(read_image(str(each.image)), str(tmp_path / "photos" / f"lesion {index}.PNG"))
        (tmp_path / "m" / f"lesion {index}_m.png").write_bytes(each.mask.read_bytes())
    return find_samples(DataConfig(images=str(tmp_path / "photos"), masks=str(tmp_path / "m")))


def test_folders_of_ones_own_become_one_folder_per_split(own: Dataset, tmp_path: Path) -> None:
    target = export(own)
    assert target == tmp_path / "photos_Aug"
    found = find_samples(DataConfig(root=str(target)))
    assert found.layout == "splits"
    test = {each.id for each in own.split("test")}
    assert test
    assert {each.id for each in found.split("test")} == test
    train = {each.id for each in own.split("train")}
    assert {each.id for each in found.split("train")} == train | {f"{id}_aug1" for id in train}
    assert {each.image.suffix for each in found.samples} == {".PNG", ".png"}


def test_jpegs_of_every_ending_keep_it(own: Dataset, tmp_path: Path) -> None:
    for sample in own.samples:
        write_jpeg(read_image(str(sample.image)), str(sample.image.with_suffix(".jfif")))
        sample.image.unlink()
    config = DataConfig(images=str(tmp_path / "photos"), masks=str(tmp_path / "m"))
    written = find_samples(DataConfig(root=str(export(find_samples(config)))))
    assert len(written.samples) > 6
    for sample in written.samples:
        assert sample.image.suffix == ".jfif"
        assert sample.image.read_bytes().startswith(b"\xff\xd8\xff")


def test_an_original_with_the_name_of_a_copy_is_refused(own: Dataset, tmp_path: Path) -> None:
    id = own.split("train")[0].id
    (tmp_path / "photos" / f"{id}_aug1.PNG").write_bytes((tmp_path / "photos" / f"{id}.PNG").read_bytes())
    (tmp_path / "m" / f"{id}_aug1_m.png").write_bytes((tmp_path / "m" / f"{id}_m.png").read_bytes())
    config = DataConfig(images=str(tmp_path / "photos"), masks=str(tmp_path / "m"), test_share=0.1)
    found = find_samples(config)
    with pytest.raises(DatasetError, match="an original has the name of an augmented version"):
        export(found)


def test_progress_counts_the_changed_versions(dataset: Dataset, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    record: Callable[[int, int], None] = lambda done, total: calls.append((done, total))  # noqa: E731
    export(dataset, copies=2, target=tmp_path / "aug", progress=record)
    assert calls == [(done, 6) for done in range(1, 7)]
