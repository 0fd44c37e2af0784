"""Download one large file over HTTP and resume it where an earlier attempt stopped."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import requests
import urllib3

import hpsearch
from hpsearch.errors import DatasetError

logger = logging.getLogger(__name__)

Report = Callable[[int, int], None]
"""Progress callback, called with (bytes on disk, bytes of the whole file)."""

RETRIES = 6
"""Retries in a row that received no new data before a download fails."""
BACKOFF_S = 1.0
"""Wait before the first of these retries. It doubles up to a minute."""
TIMEOUT_S = 60.0
"""Silence of the server that ends an attempt."""
_CHUNK_BYTES = 1 << 18
_RETRIED_STATUS = (405, 408, 425, 429, 500, 501, 502, 503, 504)
_HEADERS = {"User-Agent": f"hpsearch/{hpsearch.__version__}", "Accept-Encoding": "identity"}


class _RetryableError(Exception):
    """An attempt failed in a way that another attempt may not."""


def part_of(path: Path) -> Path:
    """Return where the bytes of `path` are kept until the file is complete."""
    return path.with_name(f"{path.name}.part")


def remote_size(url: str) -> int | None:
    """Return the file's size in bytes, None if the server does not tell it. DatasetError if there is no file."""
    try:
        with _request("HEAD", url) as response:
            return _content_length(response)
    except _RetryableError:
        return None


def download_file(url: str, path: Path, report: Report) -> None:
    """Write the file at `url` to `path`. An incomplete file is kept, and the next call continues it.

    Raises DatasetError if the server does not deliver the file.
    """
    part, note = part_of(path), path.with_name(f"{path.name}.part.json")
    n_failed, furthest = 0, 0
    while True:
        try:
            _receive(url, part, note, report)
            break
        except _RetryableError as error:
            logger.warning("%s: %s; retrying", url, error)
            n_failed = 0 if _size(part) > furthest else n_failed + 1
            furthest = max(furthest, _size(part))
            if n_failed > RETRIES:
                raise DatasetError(
                    f"cannot download {url}: {error}; {RETRIES} retries in a row received no data; the same command "
                    "continues an incomplete file"
                ) from error
            if n_failed:
                time.sleep(min(BACKOFF_S * 2 ** (n_failed - 1), 60))
    part.replace(path)
    note.unlink(missing_ok=True)


def _receive(url: str, part: Path, note: Path, report: Report) -> None:
    """Complete `part` in one attempt. `note` has the version of the file that its bytes belong to."""
    size, validator = _read_note(note)
    done = _size(part)
    if 0 <= size == done:
        return
    resumes = validator != "" and 0 < done < size
    with _request("GET", url, {"Range": f"bytes={done}-", "If-Range": validator} if resumes else {}) as answer:
        continues = resumes and answer.headers.get("Content-Range") == f"bytes {done}-{size - 1}/{size}"
        if not (continues and _validator(answer) == validator):
            if answer.headers.get("Content-Type", "").startswith("text/html"):
                raise DatasetError(f"{url} is a web page, no archive: check whether the network wants a login")
            part.unlink(missing_ok=True)
            if answer.status_code != 200:
                raise _RetryableError(f"the server sent {answer.status_code} and not the bytes that were requested")
            if (length := _content_length(answer)) is None:
                raise DatasetError(f"{url} comes without its size, so it is unknown when it is complete")
            size, done = length, 0
            note.write_text(json.dumps([size, _validator(answer)]), encoding="utf-8")
        with part.open("ab") as file:
            try:
                # `read1` returns what has arrived, so that nothing is lost if the connection breaks off.
                while chunk := answer.raw.read1(_CHUNK_BYTES):
                    done += file.write(chunk)
                    report(done, size)
            except urllib3.exceptions.HTTPError as error:
                raise _RetryableError(f"the connection broke off: {_reason(error)}") from error
    if done != size:
        raise _RetryableError(f"the server sent {done} of {size} bytes")


@contextmanager
def _request(method: str, url: str, headers: Mapping[str, str] | None = None) -> Iterator[requests.Response]:
    """Yield the answer to a request. Its body is not read yet.

    Raises _RetryableError for a temporary failure, DatasetError for a final one.
    """
    with requests.Session() as session:
        session.headers.update({**_HEADERS, **(headers or {})})
        if url.startswith("https:"):
            del session.adapters["http://"]  # A redirect must not leave TLS.
        try:
            response = session.request(method, url, timeout=TIMEOUT_S, stream=True, allow_redirects=True)
        except (requests.TooManyRedirects, requests.exceptions.SSLError, ValueError) as error:
            raise DatasetError(f"cannot download {url}: {_reason(error)}") from error
        except requests.RequestException as error:
            raise _RetryableError(_reason(error)) from error
        with response:
            status = response.status_code
            if status in _RETRIED_STATUS:
                raise _RetryableError(f"the server sent {status}")
            if status not in (200, 206, 416):
                hint = "; check the address" if status in (403, 404, 410) else ""
                raise DatasetError(f"cannot download {url}: the server sent {status} {response.reason}{hint}")
            yield response


def _content_length(response: requests.Response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _validator(response: requests.Response) -> str:
    """Return what identifies the version of the file: a strong ETag, or the date of its last change.

    See RFC 9110, 13.1.5. Empty if the server sends neither.
    """
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _read_note(note: Path) -> tuple[int, str]:
    """Return size and validator of the version that an incomplete file belongs to, (-1, "") if they are not known."""
    try:
        size, validator = json.loads(note.read_text(encoding="utf-8"))
        return int(size), str(validator)
    except (OSError, ValueError, TypeError):
        return -1, ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: BaseException) -> str:
    """Return the text of the first error in the chain, in one line: requests and urllib3 wrap it several times."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return " ".join(str(error).split()) or type(error).__name__
