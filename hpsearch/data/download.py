"""Download and unpack the official archives of ISIC-2017 Part 1.

folder/
  ISIC-2017_Training_Data.zip.part          bytes received so far; the next download resumes after them
  ISIC-2017_Training_Data.zip.part.json     size and version (ETag or date) of the file on the server
  ISIC-2017_Training_Data.zip               the complete archive, downloaded by this module or by hand
  .ISIC-2017_Training_Data.unpacking/       exists while the archive is unpacked
  ISIC-2017_Training_Data/                  the unpacked files; the CRC of each has been verified
  .download.lock                            locked while a download runs
"""

import errno
import json
import logging
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import requests
import urllib3
from filelock import FileLock, Timeout

import hpsearch
from hpsearch.data.dataset import Split
from hpsearch.errors import ZIP_ERRORS, ConfigError, DatasetError, StorageError
from hpsearch.paths import free_bytes, storage_error

logger = logging.getLogger(__name__)

OFFICIAL = "https://isic-challenge-data.s3.amazonaws.com/2017/"
"""URL of the public bucket of the ISIC challenge."""
_PARTS: dict[str, Split] = {"Training": "train", "Validation": "val", "Test_v2": "test"}
ARCHIVES = {
    f"ISIC-2017_{part}_{content}": split
    for part, split in _PARTS.items()
    for content in ("Data", "Part1_GroundTruth")
}
"""Split of each archive. The key is the archive's name without `.zip`, which is also the name of its folder."""
RETRIES = 6
"""Maximum number of consecutive retries without new data before a download fails."""
BACKOFF_S = 1.0
"""Waiting time before the first retry. It doubles with each retry, up to 60 s."""
TIMEOUT_S = 60.0
"""Maximum time without data from the server before an attempt fails."""
_CHUNK_BYTES = 1 << 18
_RETRIED_STATUS = (206, 408, 416, 425, 429, 500, 502, 503, 504)
_HEADERS = {"User-Agent": f"hpsearch/{hpsearch.__version__}", "Accept-Encoding": "identity"}

Progress = Callable[[str, str, int, int], None]
"""Progress callback, called with a key of ARCHIVES, the step (`download` or `unpack`), bytes done and total bytes."""
Report = Callable[[int, int], None]
"""Progress callback, called with bytes done and total bytes."""


def download(
    folder: Path,
    *,
    only: Sequence[str] | None = None,
    base_url: str = OFFICIAL,
    keep_archives: bool = True,
    progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Download archives from `base_url`, unpack them in `folder` and return the unpacked folders.

    `only` selects splits (`train`, `val`, `test`) or archives by name; the default is all. Folders and archives that
    exist are not downloaded again, and incomplete downloads are resumed. Failed attempts are retried, and a damaged
    archive is downloaded a second time. Archives are kept next to the unpacked folders unless `keep_archives` is
    False.

    Raises ConfigError if a name in `only` is unknown, DatasetError if the server does not deliver the files or they
    are damaged, and StorageError if there is too little free space or another download into `folder` is running.
    """
    names = [name.removesuffix(".zip") for name in only or _PARTS.values()]
    known = [*_PARTS.values(), *ARCHIVES]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"there is no {unknown[0]!r} to download; known: {', '.join(known)}")
    archives = [archive for archive, split in ARCHIVES.items() if split in names or archive in names]
    folder = folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock", timeout=0):
            for archive in archives:
                if not any((folder / archive).glob("*")):
                    _download_and_unpack(folder / archive, f"{base_url.rstrip('/')}/{archive}.zip", progress)
                if not keep_archives:
                    (folder / f"{archive}.zip").unlink(missing_ok=True)
    except Timeout as error:
        raise StorageError(f"another download into {folder} is running") from error
    except OSError as error:
        raise storage_error(Path(error.filename or folder), error) from error
    return tuple(folder / archive for archive in archives)


def unpack(path: Path, folder: Path, report: Report) -> None:
    """Unpack the zip archive `path` into the new folder `folder`.

    If all files of the archive are in one top-level folder, its content becomes the content of `folder`. Files are
    written to a hidden folder, which is renamed at the end. The CRC of every file is verified. `report` is called
    after each file.

    Raises BadZipFile if the archive is damaged, and DatasetError if it has no files.
    """
    work = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(work, ignore_errors=True)
    try:
        with zipfile.ZipFile(path) as archive:
            # Skip hidden files and folders that file managers add.
            files = [
                info
                for info in archive.infolist()
                if not (info.is_dir() or "__MACOSX" in info.filename or Path(info.filename).name.startswith("."))
            ]
            if not files:
                raise DatasetError(f"{path} contains no files: remove the archive")
            done, total = 0, sum(info.file_size for info in files)
            for info in files:
                # No file can be written outside the folder: zipfile removes `..` and drive letters.
                archive.extract(info, work)
                done += info.file_size
                report(done, total)
        os.sync()
        inside = list(work.iterdir())
        (inside[0] if len(inside) == 1 and inside[0].is_dir() else work).replace(folder)
    except ZIP_ERRORS as error:
        # A damaged offset in the archive gives EINVAL. Any other OSError comes from the disk, not from the archive.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise zipfile.BadZipFile(f"{path.name}: {_reason(error)}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download_and_unpack(folder: Path, url: str, progress: Progress | None) -> None:
    """Download the archive if it is missing, and unpack it. If it is damaged, download it again, once."""
    path = folder.with_name(f"{folder.name}.zip")
    report = progress or (lambda *_: None)
    for is_last in (False, True):
        try:
            if not path.is_file():
                download_file(url, path, partial(report, folder.name, "download"))
            unpack(path, folder, partial(report, folder.name, "unpack"))
            return
        except zipfile.BadZipFile as error:
            path.unlink(missing_ok=True)
            if is_last:
                raise DatasetError(f"{url} is damaged, even after a second download: {error}") from error
            logger.warning("%s is damaged (%s); downloading it again", path, error)


def download_file(url: str, path: Path, report: Report) -> None:
    """Download `url` to `path`. An incomplete file is kept, and the next call resumes it.

    Raises DatasetError if the server does not deliver the file.
    """
    part, note = (path.with_name(f"{path.name}.part{ending}") for ending in ("", ".json"))
    n_failed, furthest = 0, 0
    while True:
        try:
            _receive(url, part, note, report)
            break
        except (requests.exceptions.SSLError, requests.TooManyRedirects, ValueError) as error:
            raise DatasetError(f"cannot download {url}: {_reason(error)}") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            logger.warning("%s: %s; retrying", url, _reason(error))
            n_failed = 0 if _size(part) > furthest else n_failed + 1
            furthest = max(furthest, _size(part))
            if n_failed > RETRIES:
                raise DatasetError(
                    f"cannot download {url}: {_reason(error)}; {RETRIES} retries in a row received no data; the same "
                    "command continues an incomplete file"
                ) from error
            if n_failed:
                time.sleep(min(BACKOFF_S * 2 ** (n_failed - 1), 60))
    part.replace(path)
    note.unlink(missing_ok=True)


def _receive(url: str, part: Path, note: Path, report: Report) -> None:
    """Try once to complete the file `part`. The JSON file `note` contains the size and version of the server's file.

    Raises RequestException or HTTPError if a retry may succeed, ValueError if it cannot, and StorageError if there is
    too little free space.
    """
    size, validator = _read_note(note)
    done = _size(part)
    if done == size:
        return
    resumes = validator != "" and 0 < done < size
    headers = _HEADERS | ({"Range": f"bytes={done}-", "If-Range": validator} if resumes else {})
    with requests.Session() as session:
        if url.startswith("https:"):
            del session.adapters["http://"]  # Do not follow a redirect from https to http.
        with session.get(url, headers=headers, timeout=TIMEOUT_S, stream=True) as answer:
            continues = resumes and answer.headers.get("Content-Range") == f"bytes {done}-{size - 1}/{size}"
            if not (continues and _validator(answer) == validator):
                _check_answer(answer, part)
                part.unlink(missing_ok=True)
                size, done = int(answer.headers["Content-Length"]), 0
                note.write_text(json.dumps([size, _validator(answer)]), encoding="utf-8")
            if (needed := 2 * size - done) > (free := free_bytes(part.parent)):
                raise StorageError(
                    f"{part.parent} has {free / 2**30:.1f} GiB free, but {part.stem} and its files need "
                    f"{needed / 2**30:.1f} GiB: choose another disk, or fewer archives with --only"
                )
            with part.open("ab") as file:
                # `read1` returns data as it arrives, so that nothing is lost if the connection breaks.
                while chunk := answer.raw.read1(_CHUNK_BYTES):
                    done += file.write(chunk)
                    report(done, size)
    if done != size:
        raise requests.RequestException(f"the server sent {done} of {size} bytes")


def _check_answer(answer: requests.Response, part: Path) -> None:
    """Check that the response contains the complete file, or raise RequestException (retry) or ValueError (give up).

    If the response has the wrong byte range, `part` is removed so that the next attempt starts from the beginning.
    """
    status = answer.status_code
    if status in (206, 416):
        part.unlink(missing_ok=True)
    if status in _RETRIED_STATUS:
        raise requests.RequestException(f"the server sent {status}")
    if status != 200:
        raise ValueError(f"the server sent {status} {answer.reason}: check the address")
    if answer.headers.get("Content-Type", "").startswith("text/html"):
        raise ValueError("the response is a web page, not an archive: check whether the network requires a login")
    if not answer.headers.get("Content-Length", "").isdecimal():
        raise ValueError("the response has no Content-Length, so an incomplete download could not be recognised")


def _validator(response: requests.Response) -> str:
    """Return the validator of the file's version: a strong ETag or the Last-Modified date (RFC 9110, 13.1.5).

    It is empty if the server sends neither.
    """
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _read_note(note: Path) -> tuple[int, str]:
    """Return the size and the validator stored in the file `note`, or (-1, "") if it is missing or invalid."""
    try:
        size, validator = json.loads(note.read_text(encoding="utf-8"))
        return int(size), str(validator)
    except (OSError, ValueError, TypeError):
        return -1, ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: BaseException) -> str:
    """Return the message of the innermost error in one line. requests and urllib3 wrap errors several times."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return " ".join(str(error).split()) or type(error).__name__
