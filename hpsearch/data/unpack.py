"""Unpacks a zip archive of files whole or not at all, and nowhere but into its folder."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from hpsearch.errors import DatasetError, StorageError
from hpsearch.paths import free_bytes, storage_error

_MAX_RATIO = 10  # photographs hardly shrink in an archive: what grows by more is no dataset
_MAX_FILES = 100_000
_CHUNK = 1 << 18
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    OSError,
)
"""What `zipfile` raises on damaged bytes, depending on where the damage is."""


class DamagedArchiveError(Exception):
    """The bytes of an archive are not those that were packed: fetching it again may help."""


def unpack(path: Path, folder: Path, report: Callable[[int, int], None]) -> None:
    """Unpack the zip archive `path` into the new folder `folder`, without its own top folder if all files share one.

    The CRC of every file is compared. `report(done, total)` counts unpacked bytes. The folder appears when all is
    well; until then files lie in a hidden one beside it, which the next attempt removes.

    Raises DamagedArchiveError where bytes are wrong; DatasetError where the archive would do harm or holds no
    dataset; StorageError where there is no room, before anything is written.
    """
    work = folder.with_name(f".{folder.name}.unpacking")
    with _opened(path) as source:
        files = _files(source, path)
        total, done = sum(info.file_size for info in files.values()), 0
        try:
            shutil.rmtree(work, ignore_errors=True)
            free = free_bytes(folder)
            if total > free:
                raise StorageError(
                    f"{folder.parent} has {free / 2**20:.0f} MiB free, and what {path.name} holds takes "
                    f"{total / 2**20:.0f} MiB"
                )
            for name, info in files.items():
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                with (work / name).open("xb") as file:
                    for chunk in _content(source, info):
                        file.write(chunk)
                        done += len(chunk)
                        report(done, total)
                    file.flush()
                    os.fsync(file.fileno())
            work.replace(folder)
        except OSError as error:
            raise storage_error(folder, error) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


def differences(path: Path, folder: Path) -> list[str]:
    """Names of the files that `path` holds and `folder` lacks, or has at another size.

    Raises as `unpack`, but knows of damage only in the archive's list of files.
    """
    with _opened(path) as source:
        files = _files(source, path)
    sizes = {name: (folder / name).stat().st_size for name in files if (folder / name).is_file()}
    return [name for name, info in files.items() if sizes.get(name) != info.file_size]


def _opened(path: Path) -> zipfile.ZipFile:
    """The archive, its list of files complete as far as can be told."""
    try:
        source = zipfile.ZipFile(path)
    except ZIP_ERRORS as error:
        raise DamagedArchiveError(_one_line(error)) from error
    # A damaged length in the list swallows the files after it, which zipfile does not notice.
    n_files, told = len(source.infolist()), _n_files(path)
    if n_files != told:
        source.close()
        raise DamagedArchiveError(f"its list has {n_files} files instead of {told}")
    return source


def _n_files(path: Path) -> int:
    """How many files an archive says that it has (APPNOTE 4.3.16; for large ones 4.3.14), folders included."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16) - 128))
        end = file.read()
    record = end.rfind(b"PK\x05\x06")
    (told,) = struct.unpack("<H", end[record + 10 : record + 12])
    large = end.rfind(b"PK\x06\x06", 0, record)
    if told == 0xFFFF and large >= 0:
        (told,) = struct.unpack("<Q", end[large + 32 : large + 40])
    return int(told)


def _content(source: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """The bytes of a file, piece by piece; `zipfile` compares their CRC, and gives no more of them than announced."""
    done = 0
    try:
        with source.open(info) as file:
            while chunk := file.read(_CHUNK):
                done += len(chunk)
                yield chunk
    except ZIP_ERRORS as error:
        raise DamagedArchiveError(f"{info.filename}: {_one_line(error)}") from error
    if done != info.file_size:
        raise DamagedArchiveError(f"{info.filename} has {done} bytes instead of {info.file_size}")


def _files(source: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The files in an archive under the names that they get in their folder.

    Raises DatasetError for what no dataset has: links, names that lead elsewhere or fall together, more than one
    folder at the top, encrypted or absurdly large content.
    """

    def refused(reason: str) -> DatasetError:
        return DatasetError(f"{path} {reason}; nothing was unpacked, and the file is better removed")

    found: dict[tuple[str, ...], zipfile.ZipInfo] = {}
    for info in source.infolist():
        parts = tuple(info.filename.rstrip("/").split("/"))
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFDIR if info.is_dir() else stat.S_IFREG):
            raise refused(f"holds {info.filename!r}, which is no ordinary file")
        if not all(_is_plain(part) for part in parts):
            raise refused(f"holds {info.filename!r}, a name that leads elsewhere")
        if info.is_dir() or "__MACOSX" in parts or parts[-1].startswith("."):
            continue
        if info.flag_bits & 1:
            raise refused(f"holds {info.filename!r} encrypted")
        if parts in found:
            raise refused(f"holds {info.filename!r} twice")
        found[parts] = info
    if len(found) > _MAX_FILES:
        raise refused(f"holds {len(found)} files, too many for a dataset")
    total = sum(info.file_size for info in found.values())
    if total > _MAX_RATIO * path.stat().st_size:
        raise refused(f"would unpack to {total / 2**20:.0f} MiB, {_MAX_RATIO} times its size and more")
    tops = {parts[0] if len(parts) > 1 else "" for parts in found}
    if len(tops) != 1:
        raise refused(f"holds {len(tops)} folders of files instead of one")
    if tops != {""}:
        found = {parts[1:]: info for parts, info in found.items()}
    # On some disks names that differ in case only are one file.
    names = [tuple(part.casefold() for part in parts) for parts in found]
    folders = {parts[:depth] for parts in names for depth in range(1, len(parts))}
    if len({*names, *folders}) < len(names) + len(folders):
        raise refused("holds files whose names fall together")
    return {"/".join(parts): info for parts, info in found.items()}


def _is_plain(name: str) -> bool:
    """Whether `name` is the name of a file or folder itself, on every system."""
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & set('\\:*?"<>|')


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
