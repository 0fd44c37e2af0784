"""Check and read files and folders that a user names. Faults are described in one line."""

from __future__ import annotations

import codecs
import errno
import os
import unicodedata
from pathlib import Path

from hpsearch.errors import HpsearchError

MAX_STEM_BYTES = 200
"""Longest usable stem. Most file systems allow 255 bytes, and outputs add suffixes to an image's name."""

_CONTROL = ("Cc", "Zl", "Zp")
"""Unicode categories of control characters and of the characters that separate lines and paragraphs."""


def printable(name: str | Path) -> str:
    """Return `name` on one line, with escapes for control characters and for bytes that are not UTF-8 (`\\xe9`)."""
    return "".join(_printable(character) for character in str(name))


def text_fault(text: str) -> str:
    """Return why `text` cannot be written to settings, tables and records, empty if it can."""
    categories = {unicodedata.category(character) for character in text}
    if "Cs" in categories:
        return "is not UTF-8"
    return "" if categories.isdisjoint(_CONTROL) else "has control characters"


def name_fault(stem: str) -> str:
    """Return why an image cannot have a name of this stem, empty if it can."""
    if fault := text_fault(stem):
        return fault
    return f"is longer than {MAX_STEM_BYTES} bytes" if len(stem.encode()) > MAX_STEM_BYTES else ""


def require_usable_path(path: Path, error: type[HpsearchError]) -> None:
    """Raise `error` if the path or a folder above it has a name that settings and records cannot hold."""
    for part in path.absolute().parts:
        if fault := text_fault(part):
            raise error(f"{printable(path.absolute())}: the folder name {printable(part)} {fault}: rename it")


def name_key(name: str) -> str:
    """Return a key that is equal for names that differ only in case or Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def user_path(text: str) -> Path:
    """Return a path from the user's text, with `~` expanded if that home folder is known."""
    return Path(os.path.expanduser(text))


def broken_link(path: Path) -> str:
    """Describe a broken link and its target, empty if `path` is anything else."""
    try:
        path.stat()
    except OSError as error:
        try:
            target = os.readlink(path)
        except OSError:
            return ""
        why = "leads back to itself" if error.errno == errno.ELOOP else "is not there"
        if error.errno not in (errno.ELOOP, errno.ENOENT, errno.ENOTDIR):
            why = f"cannot be read: {error.strerror}"
        return f"{printable(path)} is a link to {printable(target)}, which {why}"
    except ValueError:
        return ""
    return ""


def folder_fault(path: Path) -> str:
    """Return why `path` cannot be listed as a folder, empty if it can."""
    try:
        with os.scandir(path):
            return ""
    except FileNotFoundError:
        return broken_link(path) or f"there is no folder {printable(path)}"
    except NotADirectoryError:
        return (
            f"{printable(path)} is a file, not a folder" if path.exists() else f"there is no folder {printable(path)}"
        )
    except OSError as error:
        return broken_link(path) or f"{printable(path)} cannot be listed: {error.strerror or error}"
    except ValueError as error:
        return f"{printable(path)} is no path: {error}"


def file_fault(path: Path) -> str:
    """Return why `path` cannot be opened as a file, empty if it can."""
    try:
        with path.open("rb"):
            return ""
    except FileNotFoundError:
        return broken_link(path) or f"there is no file {printable(path)}"
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return broken_link(path) or f"{printable(path)} cannot be read: {reason}"


def list_folder(path: Path, error: type[HpsearchError]) -> list[Path]:
    """Return the entries of the folder `path`, sorted. Raise `error`, with the reason, if it cannot be listed."""
    try:
        return sorted(path.iterdir())
    except (OSError, ValueError) as caught:
        raise error(folder_fault(path) or f"{printable(path)} cannot be listed: {caught}") from caught


def read_text(path: Path, what: str, error: type[HpsearchError]) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark, lines ending in `\\n`.

    Raises `error`, naming `what` and the file, for a file that is missing, unreadable or in another encoding.
    """
    named = f"{what} {printable(path)}".strip()
    try:
        content = path.read_bytes()
    except FileNotFoundError as caught:
        raise error(broken_link(path) or f"{named} does not exist") from caught
    except (OSError, ValueError) as caught:
        raise error(f"{named} cannot be read: {getattr(caught, 'strerror', None) or caught}") from caught
    if _is_utf_16(content):
        raise error(f"{named} is UTF-16 text: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as caught:
        line = content.count(b"\n", 0, caught.start) + 1
        raise error(
            f"{named} is not UTF-8 text (byte 0x{content[caught.start]:02x} in line {line}): save it as UTF-8"
        ) from caught
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _is_utf_16(content: bytes) -> bool:
    """Return whether `content` begins with the mark of UTF-16 or 32, or every other byte is 0, as in English text."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        return True
    zeros = sorted(content[start::2].count(0) for start in (0, 1))
    return zeros[0] == 0 and zeros[1] > len(content) // 4


def _printable(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cs":
        # Python represents bytes of a file name that are not UTF-8 so (PEP 383).
        code = ord(character)
        return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
    return repr(character)[1:-1] if category in _CONTROL else character
