"""Download one large file over HTTP and resume it where an earlier attempt stopped."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import requests
import urllib3

import hpsearch
from hpsearch.errors import ConfigError, DatasetError, RecordError
from hpsearch.paths import read_json, storage_error, write_json

logger = logging.getLogger(__name__)

Report = Callable[[int, int], None]
"""Progress callback, called with (bytes on disk, bytes of the whole file)."""

_CHUNK_BYTES = 1 << 18
_MAX_WAIT_S = 60
_RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
_HEADERS = {"User-Agent": f"hpsearch/{hpsearch.__version__}", "Accept-Encoding": "identity"}


class DamagedFileError(Exception):
    """A complete file is not the one on the server. Another download may help."""


class _RetryableError(Exception):
    """An attempt failed in a way that another attempt may not."""

    def __init__(self, text: str, response: requests.Response | None = None) -> None:
        super().__init__(text)
        self.raw: urllib3.BaseHTTPResponse | None = None if response is None else response.raw


@dataclass(frozen=True)
class _Version:
    """Identifies one version of a file on a server."""

    size: int
    validator: str
    """A strong ETag, or else the date of the last change (RFC 9110, 13.1.5). Empty if the server sends neither."""
    md5: str
    """Of the whole file, in hexadecimal. Empty if the server does not send it."""

    def is_continued_by(self, response: requests.Response, done: int) -> bool:
        """Return whether `response` is the rest of this version after its first `done` bytes."""
        content_range = response.headers.get("Content-Range")
        return content_range == f"bytes {done}-{self.size - 1}/{self.size}" and self.validator == _validator(response)


def check_address(url: str) -> str:
    """Return `url` if it is an HTTP address. Raise ConfigError otherwise."""
    if not re.fullmatch(r"https?://([!-~]+@)?([\w.-]+|\[[\da-fA-F:]+])(:[1-9]\d*)?(/[!-~]*)?", url, re.ASCII):
        raise ConfigError(f"{url!r} is not a download address: it must begin with https:// or http://")
    return url


def part_of(path: Path) -> Path:
    """Return where the bytes of `path` are kept until the file is complete."""
    return path.with_name(f"{path.name}.part")


class Downloader:
    """Downloads files and retries failed attempts.

    The wait before a retry doubles from `backoff_s` up to a minute, or is what the server asks for. A download fails
    after `retries` retries in a row that received no new data. Silence for `timeout_s` ends an attempt.
    """

    def __init__(self, *, retries: int, backoff_s: float, timeout_s: float) -> None:
        self._policy = urllib3.Retry(
            retries, backoff_factor=backoff_s, backoff_max=_MAX_WAIT_S, retry_after_max=_MAX_WAIT_S
        )
        self._timeout_s = timeout_s

    def size(self, url: str) -> int | None:
        """Return the file's size in bytes, None if the server does not tell it. DatasetError if there is no file."""
        try:
            with self._request("HEAD", url, {}) as response:
                return _content_length(response) if response.status_code == 200 else None
        except _RetryableError:
            return None

    def download(self, url: str, path: Path, report: Report) -> None:
        """Write the file at `url` to `path`. An incomplete file is kept, and the next call continues it.

        Raises DatasetError if the server does not deliver the file, DamagedFileError if its MD5 is not the
        announced one, and StorageError if the file cannot be written.
        """
        part = part_of(path)
        note = path.with_name(f"{path.name}.part.json")
        try:
            version = self._receive_all(url, part, note, report)
            if version.md5 and _md5(part) != version.md5:
                part.unlink()
                raise DamagedFileError("its MD5 is not the one that the server announced")
            part.replace(path)
            note.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(path, error) from error

    def _receive_all(self, url: str, part: Path, note: Path, report: Report) -> _Version:
        """Repeat `_receive` until `part` is complete. DatasetError if no retries are left."""
        policy, furthest = self._policy, 0
        while True:
            try:
                return self._receive(url, part, note, report)
            except _RetryableError as error:
                logger.warning("%s: %s; retrying", url, error)
                if _size(part) > furthest:
                    policy, furthest = self._policy, _size(part)
                    continue
                try:
                    policy = policy.increment(error=error)
                except urllib3.exceptions.MaxRetryError:
                    raise DatasetError(
                        f"cannot download {url}: {error}; {self._policy.total} retries in a row received no data; "
                        "the same command continues an incomplete file"
                    ) from error
                policy.sleep(error.raw)

    def _receive(self, url: str, part: Path, note: Path, report: Report) -> _Version:
        """Complete `part` in one attempt and return the version of the file."""
        version, done = _read_note(note), _size(part)
        if version is not None and done == version.size:
            return version
        resumed = version if version and version.validator and 0 < done < version.size else None
        asked = {"Range": f"bytes={done}-", "If-Range": resumed.validator} if resumed else {}
        with self._request("GET", url, asked) as response:
            if resumed and resumed.is_continued_by(response, done):
                version = resumed
            elif response.status_code == 200:
                version, done = _announced(url, response), 0
                part.unlink(missing_ok=True)
                write_json(note, asdict(version))
            else:
                part.unlink(missing_ok=True)
                raise _RetryableError(f"the server sent {response.status_code} and not the bytes from {done} on")
            with part.open("ab") as file:
                try:
                    for chunk in _chunks(response):
                        done += file.write(chunk)
                        report(done, version.size)
                finally:
                    # The next attempt trusts the length of the file, also after a power cut.
                    file.flush()
                    os.fsync(file.fileno())
        if done != version.size:
            raise _RetryableError(f"the server sent {done} of {version.size} bytes")
        return version

    @contextmanager
    def _request(self, method: str, url: str, headers: Mapping[str, str]) -> Iterator[requests.Response]:
        """Yield an answer with a status that `_check_status` accepts. The body is not read yet."""
        headers = {**_HEADERS, **headers}
        with requests.Session() as session:
            if url.startswith("https:"):
                del session.adapters["http://"]  # A redirect must not leave TLS.
            try:
                response = session.request(
                    method, url, headers=headers, timeout=self._timeout_s, stream=True, allow_redirects=True
                )
            except (requests.TooManyRedirects, requests.exceptions.SSLError, ValueError) as error:
                raise DatasetError(f"cannot download {url}: {_reason(error)}") from error
            except requests.RequestException as error:
                raise _RetryableError(_reason(error)) from error
            with response:
                _check_status(url, response)
                yield response


def _check_status(url: str, response: requests.Response) -> None:
    """Raise _RetryableError for a temporary failure, DatasetError for a final one."""
    status = response.status_code
    if status in _RETRIED_STATUS:
        raise _RetryableError(f"the server sent {status}", response)
    if status in (200, 206, 416) or (response.request.method == "HEAD" and status in (405, 501)):
        return
    hint = "; check the address" if status in (403, 404, 410) else ""
    raise DatasetError(f"cannot download {url}: the server sent {status} {response.reason}{hint}")


def _announced(url: str, response: requests.Response) -> _Version:
    """Return the version of a file that is sent from its beginning."""
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise DatasetError(f"{url} is a web page and not an archive: check whether the network wants a login")
    size = _content_length(response)
    if size is None:
        raise DatasetError(f"{url} comes without its size, so it is unknown when it is complete")
    return _Version(size, _validator(response), _announced_md5(response.headers))


def _validator(response: requests.Response) -> str:
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _announced_md5(headers: Mapping[str, str]) -> str:
    """Return the MD5 of the whole file in hexadecimal if the server sends it, else an empty text."""
    if re.fullmatch(r"[\w+/]{22}==", digest := headers.get("Content-MD5", ""), re.ASCII):
        return base64.b64decode(digest).hex()
    # S3's ETag is the MD5 of files uploaded in one piece without SSE-C or SSE-KMS. Elsewhere it can be anything.
    etag = re.fullmatch(r'"([0-9a-f]{32})"', headers.get("ETag", ""))
    is_encrypted = any(name.lower().startswith("x-amz-server-side-encryption-") for name in headers)
    is_plain = headers.get("x-amz-server-side-encryption", "AES256") == "AES256" and not is_encrypted
    return etag[1] if etag and "x-amz-request-id" in headers and is_plain else ""


def _chunks(response: requests.Response) -> Iterator[bytes]:
    try:
        while chunk := response.raw.read1(_CHUNK_BYTES):
            yield chunk
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise _RetryableError(f"the connection broke off: {_reason(error)}") from error


def _content_length(response: requests.Response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if re.fullmatch(r"\d{1,18}", length) else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_note(note: Path) -> _Version | None:
    """Return the version that an incomplete file belongs to, None if it is not known."""
    try:
        return _Version(**read_json(note))
    except (RecordError, TypeError):
        return None


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _reason(error: BaseException) -> str:
    """Return the text of the first error in the chain, in one line: requests and urllib3 wrap it several times."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return " ".join(str(error).split()) or type(error).__name__
