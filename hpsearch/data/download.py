"""Fetches the official archives of ISIC-2017 Part 1 and unpacks them, each whole or not at all.

folder/
  ISIC-2017_Training_Data.zip.part          what has come so far: the next start goes on from there
  ISIC-2017_Training_Data.zip.part.json     which version of the file that is
  ISIC-2017_Training_Data.zip               all of it; one that was fetched by hand is taken as well
  .ISIC-2017_Training_Data.unpacking/       while it is unpacked
  ISIC-2017_Training_Data/                  unpacked; the CRC of every file was right
  .download.lock                            held while a download runs
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from hpsearch.data.layouts import Split
from hpsearch.data.transfer import Fetcher, WrongDigestError, check_address, part_of
from hpsearch.data.unpack import DamagedArchiveError, differences, unpack
from hpsearch.errors import ConfigError, DatasetError, StorageError
from hpsearch.paths import free_bytes, storage_error

logger = logging.getLogger(__name__)

OFFICIAL = "https://isic-challenge-data.s3.amazonaws.com/2017/"
"""The challenge's public bucket."""


@dataclass(frozen=True)
class Archive:
    """One file of the challenge."""

    name: str
    """Its name on the server; without `.zip` that of the folder that it is unpacked into."""
    split: Split

    @property
    def folder(self) -> str:
        return self.name.removesuffix(".zip")


ARCHIVES = (
    Archive("ISIC-2017_Training_Data.zip", "train"),
    Archive("ISIC-2017_Training_Part1_GroundTruth.zip", "train"),
    Archive("ISIC-2017_Validation_Data.zip", "val"),
    Archive("ISIC-2017_Validation_Part1_GroundTruth.zip", "val"),
    Archive("ISIC-2017_Test_v2_Data.zip", "test"),
    Archive("ISIC-2017_Test_v2_Part1_GroundTruth.zip", "test"),
)


@dataclass(frozen=True)
class DownloadProgress:
    """How far one archive is."""

    archive: Archive
    step: Literal["download", "unpack"]
    done_bytes: int
    total_bytes: int


Report = Callable[[DownloadProgress], None]


def download(
    folder: Path,
    *,
    only: Sequence[str] | None = None,
    base_url: str = OFFICIAL,
    keep_archives: bool = True,
    progress: Report | None = None,
    retries: int = 6,
    backoff_s: float = 1.0,
    timeout_s: float = 60.0,
) -> tuple[Path, ...]:
    """Get archives from below `base_url` and unpack them in `folder`; the folders that they were unpacked into.

    `only` names splits (`train`, `val`, `test`) or archives. What is there is not fetched again: an unpacked folder,
    an archive, the first part of one. Broken connections are taken up again as `transfer.Fetcher` says; an archive
    that came damaged is fetched once more. Archives stay beside the folders, so that nothing is ever fetched twice,
    unless `keep_archives` is False: then each is removed when its folder is there.

    Raises ConfigError for an unknown name or address; DatasetError when the server does not give the files, or gives
    damaged or harmful ones; StorageError when there is no room, before anything is fetched if the sizes are known.
    """
    archives = _chosen(only)
    base_url = check_address(base_url).rstrip("/") + "/"
    fetcher = Fetcher(retries=retries, backoff_s=backoff_s, timeout_s=timeout_s)
    folder = folder.expanduser()
    with _locked(folder):
        wanted = [archive for archive in archives if not _is_unpacked(folder, archive)]
        _check_room(folder, wanted, base_url, fetcher, keep_archives=keep_archives)
        for archive in archives:
            if archive in wanted:
                _bring(folder, archive, base_url, fetcher, progress)
            if not keep_archives:
                (folder / archive.name).unlink(missing_ok=True)
    return tuple(folder / archive.folder for archive in archives)


def _chosen(only: Sequence[str] | None) -> list[Archive]:
    if only is None:
        return list(ARCHIVES)
    names = [name.removesuffix(".zip") for name in only]
    known = [*dict.fromkeys(archive.split for archive in ARCHIVES), *(archive.folder for archive in ARCHIVES)]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"there is no {unknown[0]!r} to download; known: {', '.join(known)}")
    return [archive for archive in ARCHIVES if archive.split in names or archive.folder in names]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / ".download.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(path).acquire(timeout=0)
    except Timeout as error:
        raise StorageError(f"another download into {folder} is running") from error
    except OSError as error:
        raise storage_error(path, error) from error
    with held:
        yield


def _is_unpacked(folder: Path, archive: Archive) -> bool:
    """Whether the archive's folder is there. DatasetError if it is not what the archive beside it holds."""
    target, path = folder / archive.folder, folder / archive.name
    if not target.is_dir() or not any(target.iterdir()):
        return False
    if path.is_file():
        try:
            missing = differences(path, target)
        except DamagedArchiveError as error:
            logger.warning("%s is damaged (%s), but %s is there", path, error, target)
            return True
        if missing:
            raise DatasetError(
                f"{target} is not what {path.name} holds: {len(missing)} files are missing or of another size "
                f"({missing[0]}); move the folder away to have it unpacked again"
            )
    return True


def _check_room(
    folder: Path, wanted: Sequence[Archive], base_url: str, fetcher: Fetcher, *, keep_archives: bool
) -> None:
    """StorageError if the disk cannot hold what is to come. Images are taken to be as large unpacked as packed."""
    used = peak = 0
    for archive in wanted:
        path, part = folder / archive.name, part_of(folder / archive.name)
        if path.is_file():
            size, missing = path.stat().st_size, 0
        else:
            told = fetcher.size(base_url + archive.name)
            if told is None:
                continue
            size, missing = told, max(0, told - part.stat().st_size) if part.is_file() else told
        used += missing + size
        peak = max(peak, used)
        if not keep_archives:
            used -= size
    free = free_bytes(folder)
    if peak > free:
        raise StorageError(
            f"{folder} has {free / 2**30:.1f} GiB free, and the archives with what is in them need "
            f"{peak / 2**30:.1f} GiB: choose another disk, or fewer of them"
        )


def _bring(folder: Path, archive: Archive, base_url: str, fetcher: Fetcher, progress: Report | None) -> None:
    """Have `archive` unpacked, from the file that is there or from the server."""

    def report(step: Literal["download", "unpack"]) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            if progress is not None:
                progress(DownloadProgress(archive, step, done, total))

        return tell

    path, target, url = folder / archive.name, folder / archive.folder, base_url + archive.name
    if path.is_file():
        try:
            unpack(path, target, report("unpack"))
            return
        except DamagedArchiveError as error:
            logger.warning("%s is damaged (%s) and is fetched again", path, error)
    for attempt in (1, 2):
        try:
            # A server that mixes up pieces gives damaged archives: the second time it is asked for none.
            fetcher.fetch(url, path, report("download"), in_pieces=attempt == 1)
            unpack(path, target, report("unpack"))
            return
        except (WrongDigestError, DamagedArchiveError) as error:
            path.unlink(missing_ok=True)
            if attempt == 2:
                raise DatasetError(f"{url} came damaged twice: {error}") from error
            logger.warning("%s came damaged (%s) and is fetched again", url, error)
