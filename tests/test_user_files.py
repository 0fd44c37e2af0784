"""Files and folders that a user names: odd names are shown, bad paths and encodings end in one clear line."""

from __future__ import annotations

import codecs
import errno
import os
from pathlib import Path
from unicodedata import normalize

import pytest

from hpsearch import config as configs
from hpsearch.cli import main
from hpsearch.config.data import DataConfig
from hpsearch.errors import ConfigError, DatasetError
from hpsearch.paths import study_name_of
from hpsearch.search.new_trials import read_params
from hpsearch.user_files import (
    broken_link,
    file_fault,
    folder_fault,
    list_folder,
    name_fault,
    name_key,
    printable,
    read_text,
)

NOT_UTF_8 = os.fsdecode(b"l\xe9sions")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (NOT_UTF_8, r"l\xe9sions"),
        ("a\nb\tc\x7f", r"a\nb\tc\x7f"),
        ("\u2028", r"\u2028"),
        ("\ud800", r"\ud800"),
        ("é 皮膚 😀 'x' \\n", "é 皮膚 😀 'x' \\n"),
    ],
)
def test_printable_is_one_line_of_utf_8(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert printable(name).encode().decode().splitlines() == [shown]


def test_names_are_equal_in_every_unicode_form_and_case() -> None:
    names = ["Lésion Å", "LÉSION å", normalize("NFD", "lésion Å"), normalize("NFC", "lésion \u212b")]
    assert len({name_key(name) for name in names}) == 1
    assert name_key("im1") != name_key("im10")
    assert [name_fault(name) for name in names] == [""] * 4


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_text_is_read_with_and_without_a_byte_order_mark(tmp_path: Path, encoding: str, newline: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(newline.join(["é", "b", ""]).encode(encoding))
    assert read_text(path, "", ConfigError) == "é\nb\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes("[train]\nlr = 0.1\n".encode(encoding))
    for read in (lambda: configs.load(path), lambda: read_params(path, configs.load(None))):
        with pytest.raises(ConfigError, match=r"a\.toml is UTF-16 text: save it as UTF-8$"):
            read()


def test_other_encodings_are_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"a\nl\xe9sion\n")
    with pytest.raises(
        DatasetError, match=r"the list .*list\.txt is not UTF-8 text \(byte 0xe9 in line 2\): save it"
    ):
        read_text(path, "the list", DatasetError)


def test_settings_with_a_byte_order_mark_are_settings(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(codecs.BOM_UTF8 + b"[train]\r\nepochs = 7\r\n")
    assert configs.load(path).train.epochs == 7
    assert read_params(path, configs.load(None, ["train.epochs=7"])) == {}


def test_what_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    long = tmp_path / ("x" * 300)
    faults = {
        tmp_path / "gone": "there is no {} {p}",
        tmp_path / "link": "{p} is a link to nowhere, which does not exist",
        tmp_path / "loop": "{p} is a link to loop, which points to itself",
        long: "{p} cannot be {verb}: File name too long",
    }
    for path, text in faults.items():
        assert folder_fault(path) == text.format("folder", p=path, verb="listed")
        assert file_fault(path) == text.format("file", p=path, verb="read")
        with pytest.raises(DatasetError):
            list_folder(path, DatasetError)
        with pytest.raises(ConfigError) as error:
            read_text(path, "", ConfigError)
        assert len(str(error.value).splitlines()) == 1
    assert folder_fault(tmp_path / "file") == f"{tmp_path}/file is a file, not a folder"
    assert folder_fault(tmp_path / "file" / "x") == f"there is no folder {tmp_path}/file/x"
    assert file_fault(tmp_path) == f"{tmp_path} cannot be read: Is a directory"
    assert folder_fault(tmp_path) == file_fault(tmp_path / "file") == broken_link(tmp_path / "file") == ""


@pytest.mark.parametrize("name", ["root", "images", "masks", "test_list", "groups", "cache_dir"])
@pytest.mark.parametrize(("path", "fault"), [(NOT_UTF_8, "is not UTF-8"), ("a\0b", "has control characters")])
def test_settings_cannot_name_a_path_that_a_record_cannot_hold(name: str, path: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{name}: the path .* {fault}: rename it"):
        DataConfig(**{"images": "a", "masks": "b", name: path})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("photos", "photos"),
        ("a (1)", "a _1_"),
        ("#1 50%", "1 50_"),
        ("_x.", "x"),
        ("(((", "images"),
        ("皮膚 é", "皮膚 é"),
    ],
)
def test_a_study_can_be_called_like_any_folder_of_images(folder: str, name: str) -> None:
    assert study_name_of(Path("/somewhere") / folder) == name


class TestCommands:
    """Each command ends with one line for a path that cannot be used."""

    @pytest.fixture
    def ends(self, capsys: pytest.CaptureFixture[str]) -> object:
        def run(*arguments: str) -> str:
            with pytest.raises(SystemExit) as caught:
                main(list(arguments))
            captured = capsys.readouterr()
            assert (caught.value.code, captured.err.count("\n")) == (1, 1), captured.err
            return captured.err

        return run

    @pytest.mark.parametrize(
        "command", [["study"], ["train"], ["data", "check"], ["data", "cache"], ["data", "augment"]]
    )
    @pytest.mark.parametrize(
        "flags", [["--data", "{}"], ["--images", "{}", "--masks", "."], ["--images", ".", "--masks", "{}"]]
    )
    def test_data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends, command, flags) -> None:  # type: ignore[no-untyped-def]
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a.png").touch()
        (tmp_path / "link").symlink_to("nowhere")
        said = {
            "x" * 300: "File name too long",
            "a.png": "a.png is a file, not a folder",
            "link": "link is a link to nowhere, which does not exist",
            NOT_UTF_8: r"l\xe9sions is not UTF-8: rename it",
        }
        for path, text in said.items():
            assert text in ends(*command, *(flag.format(path) for flag in flags))

    def test_project_and_settings(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends) -> None:  # type: ignore[no-untyped-def]
        monkeypatch.chdir(tmp_path)
        (tmp_path / "link").symlink_to("nowhere")
        for command in (["status"], ["study", "--data", "sample"], ["final"], ["report"], ["stop"]):
            assert "File name too long" in ends(*command, "--out", "x" * 300)
            assert "link is a link to nowhere, which does not exist" in ends(*command, "--out", "link")
            assert r"l\xe9sions is not UTF-8" in ends(*command, "--out", NOT_UTF_8)
        assert "File name too long" in ends("study", "--config", "x" * 300)

    def test_predict(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends) -> None:  # type: ignore[no-untyped-def]
        monkeypatch.chdir(tmp_path)
        (tmp_path / "link.png").symlink_to("nowhere")
        (tmp_path / "photos").mkdir()
        assert "link.png is a link to nowhere, which does not exist" in ends("predict", "link.png")
        assert "File name too long" in ends("predict", "x" * 300)
        assert r"there is no file l\xe9sions" in ends("predict", NOT_UTF_8)

        def refuse(path: object) -> object:
            raise PermissionError(errno.EACCES, "Permission denied", path)

        for name in ("scandir", "listdir"):
            monkeypatch.setattr(os, name, refuse)
        assert "photos cannot be listed: Permission denied" in ends("predict", "photos")
