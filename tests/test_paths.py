from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from hpsearch import paths
from hpsearch.errors import ConfigError, RecordError, StorageError
from hpsearch.paths import ProjectPaths


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    paths.write_json(path, {"a": 1})
    with pytest.raises(KeyError), paths.atomic_write(path) as temporary:
        raise KeyError(temporary.write_text("half"))
    assert paths.read_json(path) == {"a": 1}
    assert [each.name for each in path.parent.iterdir()] == ["file.json"]


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert paths.sha256_file(tmp_path / "a") == paths.sha256_text("abc") == expected


def test_nan_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        paths.write_json(tmp_path / "file.json", {"a": float("nan")})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(StorageError, match="--out"):
        paths.write_text(tmp_path / "file", "text")


def test_a_full_disk_is_told_with_the_room_that_is_left(tmp_path: Path) -> None:
    error = paths.storage_error(tmp_path / "file", OSError(errno.ENOSPC, "complete"))
    assert str(tmp_path / "file") in str(error)
    assert "MiB free" in str(error)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / ".trial.json.4711.tmp").write_text("half")
    (tmp_path / "trials" / "trial.json").write_text("whole")
    paths.remove_stale_temporaries(tmp_path)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["trial.json"]


def test_a_project_is_named_by_a_string_too(tmp_path: Path) -> None:
    assert ProjectPaths(str(tmp_path)) == ProjectPaths(tmp_path)
    assert ProjectPaths(str(tmp_path)).study("one").toml == tmp_path / "studies" / "one" / "study.toml"


def test_an_absolute_path_leads_where_the_relative_one_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "far" / "away")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.absolute("photos") == tmp_path / "here" / "photos"
    assert paths.absolute("../far/./photos/") == tmp_path / "far" / "photos"
    assert paths.absolute("~/photos") == tmp_path / "photos"
    assert paths.absolute(".") == tmp_path / "here"
    # A link may be pointed elsewhere later, so it stays; `..` behind one is not its parent folder here.
    assert paths.absolute("link") == tmp_path / "here" / "link"
    assert paths.absolute("link/..").resolve() == tmp_path / "far"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1}}'])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"file\.json is damaged"):
        paths.read_json(path)


@pytest.mark.parametrize("name", ["isic2017", "Straße 7", "a+b-c.d", "лесион"])
def test_names_that_can_be_folders_are_studies(tmp_path: Path, name: str) -> None:
    study = ProjectPaths(tmp_path).study(name)
    assert study.name == name
    assert study.project.root == tmp_path


@pytest.mark.parametrize(
    "name",
    ["", "..", "../x", "a/b", "/etc", ".hidden", "<script>", "a'b", 'a"b', "x" * 81, "a\n", "x); DROP TABLE t"],
)
def test_names_that_could_leave_the_folder_or_break_a_page_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="study name"):
        ProjectPaths(tmp_path).study(name)
