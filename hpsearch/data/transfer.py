"""Gets one large file over HTTP, going on where it was broken off, and believes a server only what fits together."""

from __future__ import annotations

import base64
import hashlib
import http
import http.client
import logging
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import hpsearch
from hpsearch.errors import ConfigError, DatasetError, RecordError, StorageError
from hpsearch.paths import free_bytes, read_json, storage_error, write_json

logger = logging.getLogger(__name__)

Report = Callable[[int, int], None]
"""Called with the bytes that are there and the bytes of the whole file."""

_AGENT = f"hpsearch/{hpsearch.__version__}"
_CHUNK = 1 << 18
_MAX_WAIT_S = 60.0
_RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
_SCHEMES = {"http": ("http", "https"), "https": ("https",)}
"""Where a redirect may lead, by where it starts: never from https to where anyone may listen."""


class WrongDigestError(Exception):
    """A file is not what the server says it is, though all its bytes came."""


def check_address(url: str) -> str:
    """`url` itself, if files can be fetched from it; ConfigError otherwise."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in _SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"{url!r} is no address to download from: it must begin with https:// or http://")
    return url


def part_of(path: Path) -> Path:
    """Where the first bytes of `path` are kept until all have come."""
    return path.with_name(f"{path.name}.part")


def _note_of(path: Path) -> Path:
    """Tells which version of the file that part belongs to."""
    return path.with_name(f"{path.name}.part.json")


@dataclass(frozen=True)
class _Version:
    """What tells one version of a file on a server from another; empty where the server does not say."""

    size: int
    etag: str
    modified: str
    md5: str
    """Of the whole file, hexadecimal."""

    def is_same(self, other: _Version) -> bool:
        told = ((self.etag, other.etag), (self.modified, other.modified))
        return self.size == other.size and all(a == b for a, b in told if a and b)

    @property
    def validator(self) -> str:
        """For If-Range (RFC 9110, 13.1.5): a strong ETag, or else the date."""
        return self.etag if self.etag.startswith('"') else self.modified


class _InterruptedError(Exception):
    """An attempt failed in a way that the next one may not."""

    def __init__(self, text: str, wait_s: float = 0.0) -> None:
        super().__init__(text)
        self.wait_s = wait_s


class _ContradictionError(_InterruptedError):
    """The rest of a file was asked for, and what is announced does not go with the part that is there."""


class _NoHeadError(Exception):
    """The server tells nothing about a file without sending it."""


class Fetcher:
    """Gets files, and does not give up at once.

    A connection that breaks off is taken up again after `backoff_s`, then twice that and so on up to a minute; after
    `retries` attempts in a row that brought nothing new it is given up. Silence for `timeout_s` is a break, too.
    """

    def __init__(self, *, retries: int, backoff_s: float, timeout_s: float) -> None:
        self._retries = retries
        self._backoff_s = backoff_s
        self._timeout_s = timeout_s
        self._opener = urllib.request.build_opener(_Redirects)

    def size(self, url: str) -> int | None:
        """Bytes of the file; None if the server does not tell without sending it. DatasetError if it has none."""
        patience = _Patience(self._retries, self._backoff_s)
        while True:
            try:
                with self._open(url, "HEAD", {}) as response:
                    version = _version(response.headers, response.headers.get("Content-Length", ""))
                    return None if version is None else version.size
            except _NoHeadError:
                return None
            except _InterruptedError as error:
                patience.wait(url, error, 0)

    def fetch(self, url: str, path: Path, report: Report, *, in_pieces: bool = True) -> None:
        """Write the file at `url` to `path`, whole or not at all. A part stays for the next call.

        If not `in_pieces`, the server is always asked for the whole file, and what is there already is passed over:
        that needs no trust in its word on which piece it sends.

        Raises DatasetError when the file cannot be had, WrongDigestError when its MD5 is not what the server says,
        StorageError when it cannot be written.
        """
        part, note = part_of(path), _note_of(path)
        patience, contradictions = _Patience(self._retries, self._backoff_s), 0
        while True:
            try:
                # Whoever contradicts himself twice is asked for the whole file once.
                ask_for_rest = in_pieces and contradictions < 2
                version = self._receive(url, part, note, report, ask_for_rest=ask_for_rest)
                break
            except _InterruptedError as error:
                contradictions = contradictions + 1 if isinstance(error, _ContradictionError) else 0
                patience.wait(url, error, _size(part))
        try:
            if version.md5 and _md5(part) != version.md5:
                part.unlink()
                raise WrongDigestError("its MD5 is not the one that the server gives")
            part.replace(path)
            note.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(path, error) from error

    def _receive(self, url: str, part: Path, note: Path, report: Report, *, ask_for_rest: bool) -> _Version:
        """Complete `part` in one attempt; the version that it now is. _InterruptedError if bytes are missing yet."""
        have, known = _size(part), _read_note(note)
        if known is None or have > known.size:
            have, known = 0, None
        elif have == known.size:
            return known
        asked = {}
        if have and known is not None and ask_for_rest:
            asked["Range"] = f"bytes={have}-"
            if known.validator:
                asked["If-Range"] = known.validator
        with self._open(url, "GET", asked) as response:
            begin, version = _announced(url, response)
            same = known is not None and version.is_same(known)
            if response.status == 206 and not (asked and same and begin == have):
                raise _ContradictionError("the server answers with a part that does not follow what is there")
            try:
                if known is not None and same:
                    version = known  # an answer with a part tells no MD5
                else:
                    have = 0
                    part.unlink(missing_ok=True)
                    write_json(note, asdict(version))
                _check_room(part, version.size - have)
                with part.open("ab") as file:
                    _append(file, response, version.size, report, have=have, skip=have - begin)
            except OSError as error:
                raise storage_error(part, error) from error
        return version

    def _open(self, url: str, method: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        headers = {"User-Agent": _AGENT, "Accept-Encoding": "identity", **headers}
        request = urllib.request.Request(url, method=method, headers=headers)
        try:
            response: http.client.HTTPResponse = self._opener.open(request, timeout=self._timeout_s)
            return response
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(url, method, error) from error
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise DatasetError(f"{url} cannot be trusted: {reason.verify_message}") from error
            raise _InterruptedError(_one_line(reason)) from error


class _Patience:
    """Waits before another attempt, longer each time, until too many in a row have brought nothing new."""

    def __init__(self, retries: int, backoff_s: float) -> None:
        self._retries = retries
        self._backoff_s = backoff_s
        self._failures = 0
        self._furthest = 0

    def wait(self, url: str, error: _InterruptedError, reached: int) -> None:
        """An attempt ended with `error` when `reached` bytes were there. DatasetError if there shall be no other."""
        self._failures = 0 if reached > self._furthest else self._failures + 1
        self._furthest = max(self._furthest, reached)
        if self._failures > self._retries:
            raise DatasetError(
                f"{url} cannot be fetched: {error}, and nothing new came {self._failures} times in a row; what is "
                "there is kept, and the same command goes on from it"
            ) from error
        pause = min(_MAX_WAIT_S, max(error.wait_s, self._backoff_s * 2.0 ** max(0, self._failures - 1)))
        logger.warning("%s: %s; next attempt in %.0f s", url, error, pause)
        time.sleep(pause)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect with the method of the request, to `_SCHEMES` only."""

    max_redirections = 5

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in _SCHEMES[req.type]:
            fp.close()
            raise DatasetError(f"{req.full_url} leads to {newurl}, where nothing is fetched from")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            request.method = req.get_method()
        return request


def _append(
    file: IO[bytes],
    response: http.client.HTTPResponse,
    size: int,
    report: Report,
    *,
    have: int,
    skip: int,
) -> None:
    """Append to `file` what `response` brings after its first `skip` bytes, until `size` bytes are there."""
    try:
        while have < size:
            try:
                chunk = response.read1(min(_CHUNK, skip or size - have))
            except (OSError, http.client.HTTPException) as error:
                raise _InterruptedError(f"the connection broke off: {_one_line(error)}") from error
            if not chunk:
                raise _InterruptedError(f"the connection broke off at {have} of {size} bytes")
            if skip:
                skip -= len(chunk)
                continue
            file.write(chunk)
            have += len(chunk)
            report(have, size)
    finally:
        # The next attempt trusts the length of the file, also after a power cut.
        file.flush()
        os.fsync(file.fileno())


def _announced(url: str, response: http.client.HTTPResponse) -> tuple[int, _Version]:
    """Where in the file the body of an answer begins, and which version of the file that is."""
    headers = response.headers
    if headers.get_content_type() == "text/html":
        raise DatasetError(f"{url} is answered with a web page, not an archive: does the network want a login?")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise DatasetError(f"{url} comes encoded as {headers['Content-Encoding']}, which was not asked for")
    if response.status == 200:
        version = _version(headers, headers.get("Content-Length", ""))
        if version is None:
            raise DatasetError(f"{url} comes without its size: nothing could tell whether all of it has come")
        return 0, version
    found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", headers.get("Content-Range", ""))
    if response.status != 206 or found is None:
        raise _ContradictionError(f"the server answers {response.status} without saying which part it sends")
    version, length = _version(headers, found[3]), int(found[2]) - int(found[1]) + 1
    announced = int(headers.get("Content-Length", length)) if headers.get("Content-Length", "0").isdecimal() else 0
    if version is None or not 0 < length <= version.size - int(found[1]) or announced != length:
        raise _ContradictionError(f"the server answers with an impossible part, {found[0]!r}")
    return int(found[1]), replace(version, md5="")


def _refusal(url: str, method: str, error: urllib.error.HTTPError) -> Exception:
    """What to raise on an answer that is no success."""
    if error.code in _RETRIED_STATUS:
        wait = error.headers.get("Retry-After", "")
        return _InterruptedError(f"the server answers {error.code}", float(wait) if wait.isdecimal() else 0.0)
    if error.code == 416:
        return _ContradictionError("the server has nothing after the part that is there")
    if method == "HEAD" and error.code in (405, 501):
        return _NoHeadError()
    if 300 <= error.code < 400:
        return DatasetError(f"{url} cannot be fetched: the server answers {error.code} and leads nowhere")
    phrase = http.HTTPStatus(error.code).phrase if error.code in set(http.HTTPStatus) else ""
    hint = "; is the address right?" if error.code in (403, 404, 410) else ""
    return DatasetError(f"{url} cannot be fetched: the server answers {error.code} {phrase}{hint}")


def _version(headers: http.client.HTTPMessage, size: str) -> _Version | None:
    """The version that an answer tells of; None if `size` is none."""
    if not re.fullmatch(r"\d{1,18}", size):
        return None
    return _Version(int(size), headers.get("ETag", ""), headers.get("Last-Modified", ""), _promised_md5(headers))


def _promised_md5(headers: http.client.HTTPMessage) -> str:
    """MD5 of the whole file, hexadecimal, if an answer gives it; else empty."""
    try:
        if digest := base64.b64decode(headers.get("Content-MD5", ""), validate=True):
            return digest.hex()
    except ValueError:
        return ""
    # S3 has the MD5 as ETag for what was uploaded in one piece and not encrypted with a key of one's own. Other
    # servers may make ETags that look the same from something else.
    etag = re.fullmatch(r'"([0-9a-f]{32})"', headers.get("ETag", ""))
    is_s3 = "x-amz-request-id" in headers and headers.get("x-amz-server-side-encryption", "AES256") == "AES256"
    with_own_key = "x-amz-server-side-encryption-customer-algorithm" in headers
    return etag[1] if etag and is_s3 and not with_own_key else ""


def _check_room(path: Path, missing: int) -> None:
    free = free_bytes(path)
    if missing > free:
        raise StorageError(
            f"{path.parent} has {free / 2**20:.0f} MiB free, and {missing / 2**20:.0f} MiB of {path.name} are missing"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_note(note: Path) -> _Version | None:
    """The version that a part belongs to; None if that is not known, so that the file must be begun anew."""
    try:
        version = _Version(**read_json(note))
    except (RecordError, TypeError):
        return None
    told = (version.etag, version.modified, version.md5)
    return version if isinstance(version.size, int) and all(isinstance(text, str) for text in told) else None


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
