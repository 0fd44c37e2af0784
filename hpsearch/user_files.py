"""Check and read files and folders that a user names, and describe faults in one line."""

import errno
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from hpsearch.errors import HpsearchError

MAX_STEM_BYTES = 200
"""Maximum length of an image's file stem. Most file systems allow names of 255 bytes, and outputs append suffixes to
the stem."""

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters, line and paragraph separators, and the surrogates that represent bytes that are not UTF-8."""


def printable(name: str | Path) -> str:
    """Return `name` on one line, with escapes for control characters and for bytes that are not UTF-8 (`\\xe9`)."""

    def escape(match: re.Match[str]) -> str:
        # Python represents bytes of a file name that are not UTF-8 as U+DC80 to U+DCFF (PEP 383).
        byte = ord(match[0]) - 0xDC00
        return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else repr(match[0])[1:-1]

    return _UNPRINTABLE.sub(escape, str(name))


def text_fault(text: str) -> str:
    """Return why `text` cannot be stored in settings, tables and records; empty if it can."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "is not UTF-8"
    return "has control characters" if _UNPRINTABLE.search(text) else ""


def name_fault(stem: str) -> str:
    """Return why an image's file name cannot have this stem; empty if it can."""
    if fault := text_fault(stem):
        return fault
    return f"is longer than {MAX_STEM_BYTES} bytes" if len(stem.encode()) > MAX_STEM_BYTES else ""


def require_usable_path(path: Path, error: type[HpsearchError]) -> None:
    """Raise `error` if the name of the path or of a parent folder cannot be stored in settings and records."""
    for part in path.absolute().parts:
        if fault := text_fault(part):
            raise error(f"{printable(path.absolute())}: the folder name {printable(part)} {fault}: rename it")


def name_key(name: str) -> str:
    """Return a key that is equal for names that differ only in case or Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def user_path(text: str) -> Path:
    """Convert text that a user entered to a path. `~` is expanded if the home folder is known."""
    return Path(os.path.expanduser(text))


def broken_link(path: Path) -> str:
    """Describe a broken link and its target; empty if `path` is not a broken link."""
    if not os.path.islink(path):
        return ""
    try:
        path.stat()
    except OSError as error:
        reasons = {errno.ELOOP: "points to itself", errno.ENOENT: "does not exist", errno.ENOTDIR: "does not exist"}
        why = reasons.get(error.errno or 0, f"cannot be read: {error.strerror}")
        return f"{printable(path)} is a link to {printable(os.readlink(path))}, which {why}"
    return ""


def folder_fault(path: Path) -> str:
    """Return why `path` cannot be listed as a folder; empty if it can."""
    return _fault(path, "folder", "listed", lambda: os.scandir(path).close())


def file_fault(path: Path) -> str:
    """Return why `path` cannot be opened as a file; empty if it can."""
    return _fault(path, "file", "read", lambda: path.open("rb").close())


def _fault(path: Path, kind: str, verb: str, attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except (FileNotFoundError, NotADirectoryError):
        if path.exists():
            return f"{printable(path)} is a file, not a folder"
        return broken_link(path) or f"there is no {kind} {printable(path)}"
    except (OSError, ValueError) as error:
        return broken_link(path) or f"{printable(path)} cannot be {verb}: {getattr(error, 'strerror', '') or error}"
    return ""


def list_folder(path: Path, error: type[HpsearchError]) -> list[Path]:
    """Return the sorted entries of the folder `path`. Raise `error`, with the reason, if it cannot be listed."""
    try:
        return sorted(path.iterdir())
    except (OSError, ValueError) as caught:
        raise error(folder_fault(path) or f"{printable(path)} cannot be listed: {caught}") from caught


def read_text(path: Path, what: str, error: type[HpsearchError]) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark, with lines ending in `\\n`.

    Raises `error` if the file is missing, unreadable or in another encoding. Messages begin with `what`, such as
    `--enqueue`, and the path.
    """
    named = f"{what} {printable(path)}".strip()
    try:
        content = path.read_bytes()
    except FileNotFoundError as caught:
        raise error(broken_link(path) or f"{named} does not exist") from caught
    except (OSError, ValueError) as caught:
        raise error(f"{named} cannot be read: {getattr(caught, 'strerror', None) or caught}") from caught
    if b"\0" in content:
        raise error(f"{named} is UTF-16 text: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as caught:
        line = content.count(b"\n", 0, caught.start) + 1
        fault = f"byte 0x{content[caught.start]:02x} in line {line}"
        raise error(f"{named} is not UTF-8 text ({fault}): save it as UTF-8") from caught
    return text.replace("\r\n", "\n").replace("\r", "\n")
