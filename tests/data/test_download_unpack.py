import errno
import io
import random
import stat
import zipfile
from pathlib import Path

import pytest

from hpsearch.data.download import unpack
from hpsearch.errors import DatasetError

FILES = {f"ISIC_{number:07d}.jpg": random.Random(number).randbytes(3000 + number) for number in range(5)}


def packed(files: dict[str, bytes], *, top: str = "Data/", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", method) as file:
        if top:
            file.mkdir(top)
        for name, content in files.items():
            file.writestr(top + name, content)
    return memory.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def unpacked(tmp_path: Path, archive: bytes) -> Path:
    (tmp_path / "Data.zip").write_bytes(archive)
    unpack(tmp_path / "Data.zip", tmp_path / "Data", lambda done, total: None)
    return tmp_path / "Data"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("top", ["Data/", "Any name/", ""])
def test_files_are_unpacked_as_they_were_whatever_the_folder_in_the_archive_is_called(tmp_path, top, method):
    assert contents(unpacked(tmp_path, packed(FILES, top=top, method=method))) == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Data", "Data.zip"]


def test_folders_below_the_top_stay(tmp_path):
    files = {"images/a.jpg": FILES["ISIC_0000000.jpg"], "masks/a.png": FILES["ISIC_0000001.jpg"]}
    assert contents(unpacked(tmp_path, packed(files))) == files


def test_what_file_managers_add_is_left_out(tmp_path):
    clutter = {"Data/.DS_Store": b"x", "__MACOSX/Data/._ISIC_0000000.jpg": b"x"}
    both = {f"Data/{name}": content for name, content in FILES.items()} | clutter
    assert contents(unpacked(tmp_path, packed(both, top=""))) == FILES


def test_progress_counts_unpacked_bytes(tmp_path):
    (tmp_path / "Data.zip").write_bytes(packed(FILES))
    progress = []
    unpack(tmp_path / "Data.zip", tmp_path / "Data", lambda *at: progress.append(at))
    total = sum(len(content) for content in FILES.values())
    assert progress[-1] == (total, total)
    assert progress == sorted(progress)


def refused(tmp_path: Path, archive: bytes, text: str) -> None:
    with pytest.raises(DatasetError) as caught:
        unpacked(tmp_path / "inside", archive)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "inside" / "Data.zip") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert [path.name for path in (tmp_path / "inside").iterdir()] == ["Data.zip"]


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if "refused" in request.node.name:
        (tmp_path / "inside").mkdir()


@pytest.mark.parametrize("name", ["../outside.jpg", "Data/../../outside.jpg", "/tmp/outside.jpg"])
def test_name_that_leads_elsewhere_stays_in_the_folder(tmp_path, name):
    both = {f"Data/{each}": content for each, content in FILES.items()} | {name: b"x"}
    found = contents(unpacked(tmp_path, packed(both, top="")))
    assert sorted(found.values()) == sorted(both.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Data", "Data.zip"]


def test_an_encrypted_file_counts_as_damage(tmp_path):
    archive = bytearray(packed({"a.jpg": FILES["ISIC_0000000.jpg"]}, top=""))
    archive[6] |= 1
    archive[archive.rindex(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(zipfile.BadZipFile, match=r"a\.jpg.* is encrypted"):
        unpacked(tmp_path, bytes(archive))


def test_a_link_is_unpacked_as_a_plain_file(tmp_path):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as file:
        info = zipfile.ZipInfo("Data/a.jpg")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, b"/etc/passwd")
    link = unpacked(tmp_path, memory.getvalue()) / "a.jpg"
    assert not link.is_symlink()
    assert link.read_bytes() == b"/etc/passwd"


def test_several_top_folders_stay(tmp_path):
    files = {"Data/a.jpg": b"abc", "Other/b.jpg": b"abc"}
    assert contents(unpacked(tmp_path, packed(files, top=""))) == files


def test_archive_without_files_is_refused(tmp_path):
    refused(tmp_path, packed({}), "contains no files")


def test_damaged_byte_is_found_by_the_crc_and_nothing_is_left(tmp_path):
    archive = bytearray(packed(FILES, method=zipfile.ZIP_STORED))
    archive[archive.index(FILES["ISIC_0000004.jpg"]) + 100] ^= 1
    with pytest.raises(zipfile.BadZipFile, match=r"CRC.*ISIC_0000004\.jpg"):
        unpacked(tmp_path, bytes(archive))
    assert [path.name for path in tmp_path.iterdir()] == ["Data.zip"]


@pytest.mark.parametrize("length", [0, 1, 21, 22, 100, 5000, 15000])
def test_archive_cut_short_is_damaged(tmp_path, length):
    with pytest.raises(zipfile.BadZipFile):
        unpacked(tmp_path, packed(FILES)[:length])
    assert [path.name for path in tmp_path.iterdir()] == ["Data.zip"]


def test_any_damage_is_found_or_does_no_harm(tmp_path):
    whole, rng = packed(FILES), random.Random(0)
    directory = whole.index(b"PK\x01\x02")
    outcomes = set()
    for number in range(200):
        archive = bytearray(whole)
        # Every other time in the list of files at the end, where most of the fields are.
        first = directory if number % 2 else 0
        for _ in range(rng.randrange(1, 4)):
            archive[rng.randrange(first, len(archive))] = rng.randrange(256)
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            found = contents(unpacked(folder, bytes(archive)))
        except (zipfile.BadZipFile, DatasetError) as error:
            outcomes.add(type(error))
            assert [path.name for path in folder.iterdir()] == ["Data.zip"]
        else:
            outcomes.add(None)
            assert set(found.values()) <= set(FILES.values())
    # Only the list of files can change unnoticed: no CRC covers it. The check of the dataset misses what is gone.
    assert {None, zipfile.BadZipFile} <= outcomes
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(str(number) for number in range(200))


def test_an_archive_with_a_zip64_directory_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    archive = packed(FILES)
    assert b"PK\x06\x06" in archive
    assert contents(unpacked(tmp_path, archive)) == FILES


def test_what_an_interrupted_attempt_left_is_removed(tmp_path):
    (tmp_path / ".Data.unpacking").mkdir()
    (tmp_path / ".Data.unpacking" / "ISIC_0000000.jpg").write_bytes(b"half")
    assert contents(unpacked(tmp_path, packed(FILES))) == FILES
    assert not (tmp_path / ".Data.unpacking").exists()


def test_interruption_leaves_no_folder(tmp_path):
    (tmp_path / "Data.zip").write_bytes(packed(FILES))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(tmp_path / "Data.zip", tmp_path / "Data", interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["Data.zip"]


def test_folder_with_files_in_it_is_not_replaced(tmp_path):
    (tmp_path / "Data").mkdir()
    (tmp_path / "Data" / "mine.jpg").write_bytes(b"mine")
    with pytest.raises(OSError, match="not empty"):
        unpacked(tmp_path, packed(FILES))
    assert contents(tmp_path / "Data") == {"mine.jpg": b"mine"}


def test_disk_that_fills_up_is_a_storage_error_and_leaves_nothing(tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extract", fails)
    with pytest.raises(OSError, match="No space left"):
        unpacked(tmp_path, packed(FILES))
    assert [path.name for path in tmp_path.iterdir()] == ["Data.zip"]
