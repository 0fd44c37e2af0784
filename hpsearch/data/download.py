"""Download the official archives of ISIC-2017 Part 1 and unpack them.

folder/
  ISIC-2017_Training_Data.zip.part          bytes received so far: the next start continues after them
  ISIC-2017_Training_Data.zip.part.json     the version of the file on the server that they belong to
  ISIC-2017_Training_Data.zip               the whole archive, downloaded here or by hand
  .ISIC-2017_Training_Data.unpacking/       exists while the archive is unpacked
  ISIC-2017_Training_Data/                  unpacked, with the CRC of every file verified
  .download.lock                            locked while a download runs
"""

import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PureWindowsPath

from filelock import FileLock, Timeout

from hpsearch.data.dataset import Split
from hpsearch.data.http_download import Report, download_file, part_of, remote_size
from hpsearch.errors import ZIP_ERRORS, ConfigError, DatasetError, StorageError
from hpsearch.paths import free_bytes, storage_error

logger = logging.getLogger(__name__)

OFFICIAL = "https://isic-challenge-data.s3.amazonaws.com/2017/"
"""The challenge's public bucket."""
_PARTS: dict[str, Split] = {"Training": "train", "Validation": "val", "Test_v2": "test"}
ARCHIVES = {
    f"ISIC-2017_{part}_{content}": split
    for part, split in _PARTS.items()
    for content in ("Data", "Part1_GroundTruth")
}
"""Split of each archive, by its name without `.zip`, which is also the name of its folder."""


class DamagedFileError(Exception):
    """An archive is damaged. Another download may help."""


Progress = Callable[[str, str, int, int], None]
"""Progress callback, called with a key of ARCHIVES, the step (`download` or `unpack`), and bytes done and in all."""


def download(
    folder: Path,
    *,
    only: Sequence[str] | None = None,
    base_url: str = OFFICIAL,
    keep_archives: bool = True,
    progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Download archives from below `base_url`, unpack them in `folder` and return the unpacked folders.

    `only` names splits (`train`, `val`, `test`) or archives. Unpacked folders, archives and partial archives that
    exist are used and not downloaded again. Failed attempts are retried, and a damaged archive is downloaded again.
    Archives stay beside their folders unless `keep_archives` is False.

    Raises ConfigError for an unknown name, DatasetError if the server does not deliver the files or delivers damaged
    or harmful ones, and StorageError if there is not enough free space. The space is checked before the first
    download if the server tells the sizes.
    """
    names = [name.removesuffix(".zip") for name in only or _PARTS.values()]
    known = [*_PARTS.values(), *ARCHIVES]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"there is no {unknown[0]!r} to download; known: {', '.join(known)}")
    archives = [archive for archive, split in ARCHIVES.items() if split in names or archive in names]
    base_url = base_url.rstrip("/") + "/"
    folder = folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock", timeout=0):
            wanted = [archive for archive in archives if not any((folder / archive).glob("*"))]
            _check_free_space(folder, wanted, base_url, keep_archives=keep_archives)
            for archive in archives:
                if archive in wanted:
                    _download_and_unpack(folder / archive, f"{base_url}{archive}.zip", progress)
                if not keep_archives:
                    (folder / f"{archive}.zip").unlink(missing_ok=True)
    except Timeout as error:
        raise StorageError(f"another download into {folder} is running") from error
    except OSError as error:
        raise storage_error(Path(error.filename or folder), error) from error
    return tuple(folder / archive for archive in archives)


def unpack(path: Path, folder: Path, report: Report) -> None:
    """Unpack the zip archive `path` into the new folder `folder`, without the top folder that all its files share.

    The CRC of every file is verified. Files are written to a hidden folder, which is renamed at the end.

    Raises DamagedFileError for damaged bytes, and DatasetError for an archive that is harmful or has no files.
    """
    work = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(work, ignore_errors=True)
    with _opened(path) as archive:
        files = _files(archive, path)
        total, done = sum(info.file_size for info in files.values()), 0
        try:
            for name, info in files.items():
                with _damage_named(name):
                    content = archive.read(info)
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                with (work / name).open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                done += info.file_size
                report(done, total)
            work.replace(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _check_free_space(folder: Path, wanted: Sequence[str], base_url: str, *, keep_archives: bool) -> None:
    """Raise StorageError if the disk cannot hold the archives and, at about the same size, their files."""
    unpacked, missing = [0], [0]
    for archive in wanted:
        path = folder / f"{archive}.zip"
        size = path.stat().st_size if path.is_file() else remote_size(base_url + path.name) or 0
        have = next((file.stat().st_size for file in (path, part_of(path)) if file.is_file()), 0)
        unpacked.append(size)
        missing.append(max(0, size - have))
    needed = sum(unpacked) + (sum(missing) if keep_archives else max(missing))
    if needed > (free := free_bytes(folder)):
        raise StorageError(
            f"{folder} has {free / 2**30:.1f} GiB free, but the archives and their files need {needed / 2**30:.1f} "
            "GiB: choose another disk, or fewer archives with --only"
        )


def _download_and_unpack(folder: Path, url: str, progress: Progress | None) -> None:
    """Unpack the archive that exists or the downloaded one. A damaged archive is downloaded again once."""

    path = folder.with_name(f"{folder.name}.zip")
    report = progress or (lambda *_: None)
    n_downloads = 0
    while True:
        try:
            if not path.is_file():
                n_downloads += 1
                download_file(url, path, partial(report, folder.name, "download"))
            unpack(path, folder, partial(report, folder.name, "unpack"))
            return
        except DamagedFileError as error:
            path.unlink(missing_ok=True)
            if n_downloads == 2:
                raise DatasetError(f"{url} was damaged after two downloads: {error}") from error
            logger.warning("%s is damaged (%s); downloading it again", path, error)


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    """Turn what `zipfile` raises on damaged bytes in the block into a DamagedFileError."""
    try:
        yield
    except ZIP_ERRORS as error:
        raise DamagedFileError(f"{name}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _opened(path: Path) -> zipfile.ZipFile:
    """Open an archive and check that its directory is complete. Raise DamagedFileError otherwise."""
    with _damage_named(path.name), path.open("rb") as file:
        archive = zipfile.ZipFile(path)
        file.seek(-22, os.SEEK_END)
        end = file.read()
    # A damaged length in the directory hides the files after it, and zipfile does not compare their number.
    n_files, told = len(archive.infolist()), int.from_bytes(end[10:12], "little")
    if end.startswith(b"PK\x05\x06") and told not in (n_files, 0xFFFF):
        archive.close()
        raise DamagedFileError(f"its directory has {n_files} files instead of {told}")
    return archive


def _files(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the files to unpack by their name in the folder. DatasetError if a name leads out of it."""
    names = {}
    for info in archive.infolist():
        # Windows' rules are the strictest: they know drives and the backslash.
        name = PureWindowsPath(info.filename)
        if name.anchor or ".." in name.parts:
            raise DatasetError(f"{path} holds {info.filename!r}, a path outside its folder; remove the archive")
        if not info.is_dir() and "__MACOSX" not in name.parts and not name.name.startswith("."):
            names[name.parts] = info
    if not names:
        raise DatasetError(f"{path} holds no files; remove the archive")
    has_top = len({parts[0] for parts in names}) == 1 and all(len(parts) > 1 for parts in names)
    return {"/".join(parts[has_top:]): info for parts, info in names.items()}
