import errno
import io
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpsearch.config.data import DataConfig
from hpsearch.data import download as module
from hpsearch.data.download import ARCHIVES, OFFICIAL, download
from hpsearch.data.layouts import find_samples
from hpsearch.errors import ConfigError, DatasetError, StorageError
from tests.data.mirror import (
    Mirror,
    answers,
    breaks_off_after,
    claims_range,
    damages_byte,
    serve,
)

N_IMAGES = {"train": 4, "val": 2, "test": 3}


def files_of(folder: str, split: str) -> dict[str, bytes]:
    """What the folder of an archive holds: names as in the challenge, random bytes."""
    rng = random.Random(folder)
    first = sum(len(name) for name in split)
    ids = [f"ISIC_{first * 100 + number:07d}" for number in range(N_IMAGES[split])]
    if folder.endswith("GroundTruth"):
        return {f"{name}_segmentation.png": rng.randbytes(3000) for name in ids}
    superpixels = {f"{name}_superpixels.png": rng.randbytes(2000) for name in ids}
    return {f"{name}.jpg": rng.randbytes(20_000 + rng.randrange(9000)) for name in ids} | superpixels


def packed(folder: str, files: dict[str, bytes]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as file:
        file.mkdir(folder)
        for name, content in files.items():
            file.writestr(f"{folder}/{name}", content)
    return memory.getvalue()


FILES = {archive: files_of(archive, split) for archive, split in ARCHIVES.items()}
ZIPS = {f"{archive}.zip": packed(archive, FILES[archive]) for archive in ARCHIVES}
VAL = ("ISIC-2017_Validation_Data", "ISIC-2017_Validation_Part1_GroundTruth")


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "BACKOFF_S", 0.0)
    with serve(Mirror(files=dict(ZIPS))) as mirror:
        yield mirror


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ISIC-2017"


def get(mirror: Mirror, folder: Path, *only: str, **settings: object) -> tuple[Path, ...]:
    return download(folder, only=only or None, base_url=mirror.url, **settings)


def unpacked(folder: Path) -> dict[str, dict[str, bytes]]:
    """Content of every visible folder in `folder`."""
    return {
        path.name: {file.name: file.read_bytes() for file in path.iterdir()}
        for path in folder.iterdir()
        if path.is_dir()
    }


def zips(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != ".download.lock")


def test_all_six_archives_are_unpacked_and_kept(mirror, folder):
    folders = get(mirror, folder)
    assert folders == tuple(folder / archive for archive in ARCHIVES)
    assert unpacked(folder) == FILES
    assert {name: (folder / name).read_bytes() for name in zips(folder)} == ZIPS


def test_what_was_downloaded_is_found_as_a_dataset(mirror, folder):
    get(mirror, folder)
    dataset = find_samples(DataConfig(root=str(folder)))
    assert (dataset.layout, dataset.problems) == ("archive", ())
    assert {split: len(dataset.split(split)) for split in N_IMAGES} == N_IMAGES


def test_official_address_is_that_of_the_challenge():
    assert OFFICIAL + next(iter(ZIPS)) == (
        "https://isic-challenge-data.s3.amazonaws.com/2017/ISIC-2017_Training_Data.zip"
    )
    assert len(ARCHIVES) == 6


@pytest.mark.parametrize(
    ("only", "folders"),
    [
        (("val",), VAL),
        (("ISIC-2017_Test_v2_Part1_GroundTruth.zip",), ("ISIC-2017_Test_v2_Part1_GroundTruth",)),
        (("ISIC-2017_Test_v2_Data", "val"), (*VAL, "ISIC-2017_Test_v2_Data")),
    ],
)
def test_only_what_was_asked_for_is_fetched(mirror, folder, only, folders):
    assert [path.name for path in get(mirror, folder, *only)] == list(folders)
    assert sorted(unpacked(folder)) == sorted(folders)
    assert [name for name, _ in mirror.gets()] == [f"{name}.zip" for name in folders]


def test_unknown_name_is_an_error_that_lists_the_known(mirror, folder):
    with pytest.raises(
        ConfigError, match="no 'validation' to download; known: train, val, test, ISIC-2017_Training_D"
    ):
        get(mirror, folder, "validation")
    assert mirror.requests == []


@pytest.mark.parametrize("slash", ["", "/"])
def test_mirror_may_lie_below_a_path(mirror, folder, slash):
    mirror.files = {f"some/where/{name}": content for name, content in ZIPS.items()}
    download(folder, only=["val"], base_url=f"{mirror.url}some/where{slash}")
    assert sorted(unpacked(folder)) == list(VAL)


def test_address_that_is_none_is_refused(folder):
    with pytest.raises(DatasetError, match=r"cannot download /some/folder/.*No scheme supplied"):
        download(folder, base_url="/some/folder")


def test_second_start_fetches_nothing(mirror, folder):
    get(mirror, folder, "val")
    mirror.requests.clear()
    assert len(get(mirror, folder, "val")) == 2
    assert mirror.requests == []


def test_archives_are_removed_on_request(mirror, folder):
    get(mirror, folder, "val", keep_archives=False)
    assert zips(folder) == []
    assert unpacked(folder) == {name: FILES[name] for name in VAL}
    mirror.requests.clear()
    get(mirror, folder, "val", keep_archives=False)
    assert mirror.requests == []


def test_archives_that_were_kept_are_removed_later_on_request(mirror, folder):
    get(mirror, folder, "val")
    get(mirror, folder, "val", keep_archives=False)
    assert zips(folder) == []
    assert sorted(unpacked(folder)) == list(VAL)


def test_archive_that_was_fetched_by_hand_is_only_unpacked(mirror, folder):
    folder.mkdir()
    for name in VAL:
        (folder / f"{name}.zip").write_bytes(ZIPS[f"{name}.zip"])
    get(mirror, folder, "val")
    assert mirror.requests == []
    assert unpacked(folder) == {name: FILES[name] for name in VAL}


def test_damaged_archive_that_was_there_is_fetched_again(mirror, folder):
    folder.mkdir()
    (folder / f"{VAL[0]}.zip").write_bytes(ZIPS[f"{VAL[0]}.zip"][:-100])
    get(mirror, folder, VAL[0])
    assert unpacked(folder) == {VAL[0]: FILES[VAL[0]]}
    assert (folder / f"{VAL[0]}.zip").read_bytes() == ZIPS[f"{VAL[0]}.zip"]


@pytest.mark.parametrize("seed", range(3))
def test_twenty_random_breaks_and_lies_end_in_byte_equal_files(mirror, folder, seed, monkeypatch):
    rng = random.Random(seed)
    for _ in range(20):
        mirror.behaviours.append(breaks_off_after(rng.randrange(1, 6000), reset=rng.random() < 0.5))
        if rng.random() < 0.5:
            mirror.behaviours.append(rng.choice([answers(500), answers(503), claims_range("bytes 5-{last}/{size}")]))
    monkeypatch.setattr(module, "RETRIES", 40)
    get(mirror, folder)
    assert unpacked(folder) == FILES
    assert {name: (folder / name).read_bytes() for name in zips(folder)} == ZIPS
    assert not mirror.behaviours


def test_killed_download_is_continued_by_the_next_start(mirror, folder):
    """The process dies without any clean-up, its connection hanging."""
    size = len(ZIPS[f"{VAL[0]}.zip"])
    script = f"""
import os, pathlib
from hpsearch.data.download import download
def die(archive, step, done, total):
    if done > {size // 3}:
        os._exit(9)
download(pathlib.Path({str(folder)!r}), only=["val"], base_url={mirror.url!r}, progress=die)
"""
    mirror.behaviours.append(breaks_off_after(size // 2))
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    mirror.requests.clear()
    get(mirror, folder, "val")
    assert unpacked(folder) == {name: FILES[name] for name in VAL}


def test_interrupted_start_is_continued_by_the_next(mirror, folder):
    def interrupt(archive: str, *_: object) -> None:
        if archive == VAL[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(mirror, folder, "val", progress=interrupt)
    assert sorted(unpacked(folder)) == [VAL[0]]
    mirror.requests.clear()
    get(mirror, folder, "val")
    assert unpacked(folder) == {name: FILES[name] for name in VAL}
    assert all(name == f"{VAL[1]}.zip" for _, name, _ in mirror.requests)


def test_archive_that_came_damaged_is_fetched_once_more(mirror, folder):
    mirror.behaviours.append(damages_byte(5000))
    get(mirror, folder, VAL[0])
    assert unpacked(folder) == {VAL[0]: FILES[VAL[0]]}
    assert len(mirror.gets()) == 2


def test_archive_that_always_comes_damaged_ends_in_one_line(mirror, folder):
    mirror.behaviours.extend(5 * [damages_byte(5000)])
    with pytest.raises(
        DatasetError, match=r"Validation_Data\.zip is damaged, even after a second download: .*CRC.*ISIC_\d+\.jpg"
    ) as caught:
        get(mirror, folder, VAL[0])
    assert "\n" not in str(caught.value)
    assert len(mirror.gets()) == 2
    assert unpacked(folder) == {}
    assert zips(folder) == []


def test_file_that_is_no_archive_ends_in_one_line(mirror, folder):
    mirror.files[f"{VAL[0]}.zip"] = b"The bucket has moved."
    with pytest.raises(DatasetError, match=r"even after a second download: .*File is not a zip file"):
        get(mirror, folder, VAL[0])


def test_missing_archive_ends_in_one_line(mirror, folder):
    del mirror.files[f"{VAL[1]}.zip"]
    with pytest.raises(DatasetError, match=r"Part1_GroundTruth\.zip: the server sent 404"):
        get(mirror, folder, "val")
    assert unpacked(folder) == {VAL[0]: FILES[VAL[0]]}


def test_archive_that_leads_elsewhere_is_unpacked_in_its_folder(mirror, folder):
    mirror.files[f"{VAL[0]}.zip"] = packed("..", {"outside.jpg": b"x"})
    get(mirror, folder, VAL[0])
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert unpacked(folder) == {VAL[0]: {"outside.jpg": b"x"}}


def test_folder_beside_a_damaged_archive_is_left_as_it_is(mirror, folder):
    get(mirror, folder, "val")
    (folder / f"{VAL[0]}.zip").write_bytes(b"no archive any more")
    mirror.requests.clear()
    get(mirror, folder, "val")
    assert mirror.requests == []
    assert unpacked(folder) == {name: FILES[name] for name in VAL}


def test_empty_folder_counts_as_none(mirror, folder):
    (folder / VAL[0]).mkdir(parents=True)
    get(mirror, folder, VAL[0])
    assert unpacked(folder) == {VAL[0]: FILES[VAL[0]]}


def test_missing_room_is_said_before_the_bytes_of_an_archive_are_fetched(mirror, folder, monkeypatch):
    needed = 2 * len(ZIPS[f"{VAL[0]}.zip"])
    monkeypatch.setattr(module, "free_bytes", lambda path: needed - 1)
    with pytest.raises(
        StorageError, match=r"has 0\.0 GiB free, but ISIC-2017_Validation_Data.zip and its files need"
    ):
        get(mirror, folder, VAL[0])
    assert unpacked(folder) == {}
    monkeypatch.setattr(module, "free_bytes", lambda path: needed)
    get(mirror, folder, VAL[0])
    assert sorted(unpacked(folder)) == [VAL[0]]


def test_progress_tells_bytes_of_both_steps_of_each_archive(mirror, folder):
    seen: list[tuple[str, str, int, int]] = []
    get(mirror, folder, "val", progress=lambda *at: seen.append(at))
    steps = list(dict.fromkeys((archive, step) for archive, step, _, _ in seen))
    assert steps == [(name, step) for name in VAL for step in ("download", "unpack")]
    for name, step in steps:
        of_step = [at for at in seen if at[:2] == (name, step)]
        done = [at[2] for at in of_step]
        total = len(ZIPS[f"{name}.zip"]) if step == "download" else sum(len(file) for file in FILES[name].values())
        assert {at[3] for at in of_step} == {total}
        assert done == sorted(done)
        assert done[-1] == total


def test_second_download_into_the_same_folder_is_refused(mirror, folder):
    refusals = []

    def start_another(*_: object) -> None:
        if not refusals:
            with pytest.raises(StorageError, match=r"another download into .*ISIC-2017 is running") as caught:
                get(mirror, folder, "val")
            refusals.append(caught.value)

    get(mirror, folder, "val", progress=start_another)
    assert len(refusals) == 1
    assert sorted(unpacked(folder)) == list(VAL)


@pytest.mark.parametrize("step", ["download", "unpack"])
def test_disk_that_fills_up_is_a_storage_error_and_the_next_start_continues(mirror, folder, step):
    def fails(archive: str, current: str, done: int, total: int) -> None:
        if current == step:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / archive))

    with pytest.raises(StorageError, match=rf"cannot write .*{VAL[0]}: No space left"):
        get(mirror, folder, "val", progress=fails)
    assert unpacked(folder) == {}
    assert zips(folder)
    get(mirror, folder, "val")
    assert unpacked(folder) == {name: FILES[name] for name in VAL}


def test_folder_that_cannot_be_made_is_a_storage_error(mirror, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write"):
        get(mirror, tmp_path / "file" / "ISIC-2017")
    assert mirror.requests == []


def test_module_loads_without_torch():
    code = "import sys, hpsearch.data.download, hpsearch.data.duplicates; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
