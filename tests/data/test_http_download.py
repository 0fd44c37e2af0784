import io
import logging
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from hpsearch.data import download as module
from hpsearch.data.download import download_file
from hpsearch.errors import DatasetError
from tests.data.mirror import (
    Behaviour,
    Handler,
    Mirror,
    answers,
    answers_whole,
    answers_whole_but_breaks_off_after,
    breaks_off_after,
    claims_range,
    redirects_to,
    serve,
)

SIZE = 300_000
CONTENT = random.Random(0).randbytes(SIZE)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(Mirror(files={"file": CONTENT})) as mirror:
        yield mirror


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Three retries without a pause."""
    for name, value in {"RETRIES": 3, "BACKOFF_S": 0.0, "TIMEOUT_S": 10.0}.items():
        monkeypatch.setattr(module, name, value)
    return monkeypatch


def fetch(mirror: Mirror, path: Path, *, retries: int = 3) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RETRIES", retries)
        download_file(mirror.url + "file", path, lambda done, total: None)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_comes_whole_and_alone(mirror, tmp_path):
    progress = []
    download_file(mirror.url + "file", tmp_path / "file", lambda *at: progress.append(at))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert files_in(tmp_path) == ["file"]
    assert progress[-1] == (SIZE, SIZE)
    assert progress == sorted(progress)
    assert mirror.gets() == [("file", "")]


def test_empty_file_comes_too(mirror, tmp_path):
    mirror.files["file"] = b""
    fetch(mirror, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("seed", range(5))
def test_file_is_byte_equal_after_twenty_breaks_and_not_much_is_sent_twice(mirror, tmp_path, seed):
    rng = random.Random(seed)
    mirror.behaviours.extend(breaks_off_after(rng.randrange(1, SIZE // 20)) for _ in range(20))
    fetch(mirror, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(mirror.gets()) == 21
    assert mirror.sent_bytes == SIZE


@pytest.mark.parametrize("seed", range(5))
def test_file_is_byte_equal_after_twenty_resets_and_lies(mirror, tmp_path, seed):
    rng = random.Random(seed)
    lies = [
        answers_whole_but_breaks_off_after(SIZE // 3),
        claims_range("bytes 0-{last}/{size}"),
        claims_range("bytes {begin}-{last}/123"),
        claims_range("bytes {begin}-{last}/999999999"),
        claims_range("bytes 299999-{last}/{size}"),
        claims_range("bytes {begin}-{last}/*"),
        claims_range("items 1-2/3"),
        claims_range(""),
        answers(503),
        answers(416, Content_Range="bytes */300000"),
    ]
    for _ in range(20):
        mirror.behaviours.append(breaks_off_after(rng.randrange(1, SIZE // 30), reset=rng.random() < 0.5))
        mirror.behaviours.append(rng.choice(lies))
    fetch(mirror, tmp_path / "file", retries=40)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert files_in(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "claim",
    [
        "bytes 0-{last}/{size}",
        "bytes 1001-{last}/{size}",
        "bytes {begin}-{last}/123",
        "bytes {begin}-{last}/999999999",
        "bytes {begin}-299998/{size}",
        "bytes {last}-{begin}/{size}",
        "bytes {begin}-{last}/*",
        "bytes {begin}-{size}/{size}",
        "items 1-2/3",
        "",
    ],
)
def test_a_wrong_range_is_discarded_and_the_whole_file_requested(mirror, tmp_path, claim):
    mirror.behaviours.extend([breaks_off_after(1000), claims_range(claim)])
    fetch(mirror, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [asked for _, asked in mirror.gets()] == ["", "bytes=1000-", ""]


def test_a_rest_of_unknown_length_that_ends_early_is_continued(mirror, tmp_path):
    def ends_early(handler: Handler, content: bytes) -> None:
        handler.answer(content, 1000, content[1000:3000], length="")

    mirror.behaviours.extend([breaks_off_after(1000), ends_early])
    fetch(mirror, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [asked for _, asked in mirror.gets()] == ["", "bytes=1000-", "bytes=3000-"]


def test_part_that_nobody_asked_for_is_not_taken(mirror, tmp_path):
    mirror.behaviours.append(lambda handler, content: handler.answer(content, 0, content, status=206))
    fetch(mirror, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(mirror.gets()) == 2


def behaviours(rng: random.Random) -> list[Behaviour]:
    """Any faults in any order."""
    size = rng.randrange(1, SIZE)
    kinds = [
        breaks_off_after(size),
        breaks_off_after(size, reset=True),
        breaks_off_after(0),
        answers_whole,
        answers_whole_but_breaks_off_after(size),
        claims_range("bytes 0-{last}/{size}"),
        claims_range("bytes {begin}-{last}/7"),
        claims_range("bytes 7-{last}/{size}"),
        claims_range("nonsense"),
        answers(500),
        answers(404),
        answers(416),
        answers(204),
    ]
    return rng.choices(kinds, k=rng.randrange(1, 12))


@pytest.mark.parametrize("seed", range(40))
def test_any_faults_end_in_the_file_or_in_one_line_and_the_next_start_completes_it(mirror, tmp_path, seed):
    mirror.behaviours.extend(behaviours(random.Random(seed)))
    if failure := failure_of(mirror, tmp_path / "file"):
        assert mirror.url + "file" in failure
        assert "\n" not in failure
        assert not (tmp_path / "file").exists()
        mirror.behaviours.clear()
        fetch(mirror, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert files_in(tmp_path) == ["file"]


def failure_of(mirror: Mirror, path: Path) -> str:
    """The message that fetching ends with; empty if it succeeds."""
    try:
        fetch(mirror, path, retries=2)
    except DatasetError as error:
        return str(error)
    return ""


def test_next_start_asks_only_for_the_rest(mirror, tmp_path):
    mirror.behaviours.extend([breaks_off_after(100_000), answers(503)])
    with pytest.raises(
        DatasetError,
        match=r"the server sent 503; 0 retries in a row received no data.* same command continues",
    ):
        fetch(mirror, tmp_path / "file", retries=0)
    assert files_in(tmp_path) == ["file.part", "file.part.json"]
    fetch(mirror, tmp_path / "file")
    assert mirror.gets() == [("file", ""), *2 * [("file", "bytes=100000-")]]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_interrupting_loses_nothing_that_has_come(mirror, tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done > 1000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download_file(mirror.url + "file", tmp_path / "file", interrupt)
    kept = (tmp_path / "file.part").read_bytes()
    assert len(kept) > 1000
    assert kept == CONTENT[: len(kept)]
    if len(kept) < SIZE:
        fetch(mirror, tmp_path / "file")
        assert mirror.gets()[-1] == ("file", f"bytes={len(kept)}-")


def test_whole_part_is_taken_without_another_request(mirror, tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download_file(mirror.url + "file", tmp_path / "file", interrupt)
    fetch(mirror, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(mirror.gets()) == 1


def test_attempts_that_bring_nothing_are_counted_anew_after_one_that_does(mirror, tmp_path):
    mirror.behaviours.extend(3 * [*3 * [answers(503)], breaks_off_after(1000)])
    fetch(mirror, tmp_path / "file", retries=3)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_attempts_that_only_repeat_what_is_there_are_no_progress(mirror, tmp_path):
    mirror.behaviours.extend(100 * [answers_whole_but_breaks_off_after(5000)])
    with pytest.raises(DatasetError, match=r"IncompleteRead.*; 3 retries in a row received no data"):
        fetch(mirror, tmp_path / "file", retries=3)
    assert len(mirror.gets()) == 5


def test_a_server_without_ranges_sends_the_file_from_its_beginning(mirror, tmp_path):
    mirror.behaviours.extend([breaks_off_after(200_000), answers_whole_but_breaks_off_after(100_000), answers_whole])
    fetch(mirror, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_file_that_changed_on_the_server_is_begun_anew(mirror, tmp_path):
    mirror.behaviours.extend([breaks_off_after(100_000), answers(503)])
    with pytest.raises(DatasetError):
        fetch(mirror, tmp_path / "file", retries=0)
    changed = mirror.files["file"] = random.Random(1).randbytes(SIZE)
    fetch(mirror, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == changed


def test_part_of_another_version_is_not_taken_for_this_one(mirror, tmp_path):
    """The server ignores If-Range: only the ETag of its answer tells that the file is another."""
    mirror.behaviours.extend([breaks_off_after(100_000), answers(503)])
    with pytest.raises(DatasetError):
        fetch(mirror, tmp_path / "file", retries=0)
    changed = mirror.files["file"] = random.Random(1).randbytes(SIZE)

    def sends_rest_of_the_new_one(handler: Handler, content: bytes) -> None:
        handler.answer(content, 100_000, content[100_000:])

    mirror.behaviours.append(sends_rest_of_the_new_one)
    fetch(mirror, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == changed


@pytest.mark.parametrize("note", ["", "[]", "7", '["x", "y"]', '[300000, ""]', '{"size": 300000, "validator": ""}'])
def test_part_without_a_note_of_its_version_is_begun_anew(mirror, tmp_path, note):
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    (tmp_path / "file.part.json").write_text(note)
    fetch(mirror, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_part_longer_than_the_file_is_begun_anew(mirror, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    (tmp_path / "file.part.json").write_text('[10, "x"]')
    fetch(mirror, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_web_page_of_the_network_costs_no_bytes_that_were_received(mirror, tmp_path):
    mirror.behaviours.extend([breaks_off_after(1000), answers(200, Content_Type="text/html")])
    with pytest.raises(DatasetError, match="the response is a web page"):
        fetch(mirror, tmp_path / "file")
    fetch(mirror, tmp_path / "file")
    assert mirror.gets()[-1] == ("file", "bytes=1000-")


def test_last_modified_serves_where_there_is_no_strong_etag(mirror, tmp_path):
    mirror.etag = lambda content: 'W/"weak"'
    mirror.headers["Last-Modified"] = "Mon, 02 Jan 2017 03:04:05 GMT"
    seen = []

    def notes_condition(handler: Handler, content: bytes) -> None:
        seen.append(handler.headers["If-Range"])
        answers_whole(handler, content)

    mirror.behaviours.extend([breaks_off_after(1000), notes_condition])
    fetch(mirror, tmp_path / "file")
    assert seen == ["Mon, 02 Jan 2017 03:04:05 GMT"]
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("behaviour", "text"),
    [
        (answers(404), "the server sent 404 Not Found: check the address"),
        (answers(403), "the server sent 403 Forbidden: check the address"),
        (answers(401), "the server sent 401 Unauthorized"),
        (answers(499), "the server sent 499"),
        (answers(304), "the server sent 304"),
        (answers(204), "the server sent 204"),
        (answers(200, Content_Type="text/html"), "is a web page"),
        (answers(200, Content_Length=""), "has no Content-Length"),
        (answers(200, Content_Length="-5"), "has no Content-Length"),
        (redirects_to("file:///etc/passwd"), "No connection adapters were found for 'file:///etc/passwd'"),
        (redirects_to("ftp://127.0.0.1/file"), "No connection adapters were found for 'ftp://127.0.0.1/file'"),
    ],
)
def test_what_another_attempt_cannot_change_ends_at_once_in_one_line(mirror, tmp_path, behaviour, text):
    mirror.behaviours.append(behaviour)
    with pytest.raises(DatasetError) as caught:
        fetch(mirror, tmp_path / "file")
    assert text in str(caught.value)
    assert mirror.url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(mirror.gets()) == 1
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_answers_that_pass_are_waited_out(mirror, tmp_path, status):
    mirror.behaviours.extend(2 * [answers(status)])
    fetch(mirror, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_waits_grow_to_a_minute(mirror, tmp_path, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    mirror.behaviours.extend([*9 * [answers(503)], breaks_off_after(10)])
    monkeypatch.setattr(module, "BACKOFF_S", 1.0)
    monkeypatch.setattr(module, "RETRIES", 20)
    download_file(mirror.url + "file", tmp_path / "file", lambda *_: None)
    assert waited == [1, 2, 4, 8, 16, 32, 60, 60, 60]  # an attempt that received new data is not waited for


def test_each_failed_attempt_is_logged(mirror, tmp_path, caplog):
    mirror.behaviours.append(answers(503))
    with caplog.at_level(logging.WARNING):
        fetch(mirror, tmp_path / "file")
    assert [record.getMessage() for record in caplog.records] == [f"{mirror.url}file: the server sent 503; retrying"]


def test_redirect_is_followed_with_the_range(mirror, tmp_path):
    mirror.files["other"] = CONTENT
    mirror.behaviours.extend([breaks_off_after(1000), redirects_to("/other")])
    fetch(mirror, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert mirror.gets()[-1] == ("other", "bytes=1000-")


def test_endless_redirects_end_in_one_line(mirror, tmp_path):
    mirror.behaviours.extend(100 * [redirects_to("/file")])
    with pytest.raises(DatasetError, match="Exceeded 30 redirects") as caught:
        fetch(mirror, tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_a_redirect_from_https_to_http_is_refused(mirror, tmp_path, monkeypatch):
    class Redirect(requests.adapters.HTTPAdapter):
        def send(self, request, *args, **kwargs):
            response = requests.Response()
            response.status_code, response.request, response.url, response.raw = (
                302,
                request,
                request.url,
                io.BytesIO(),
            )
            response.headers["Location"] = mirror.url + "file"
            return response

    session = requests.Session()
    session.mount("https://", Redirect())
    monkeypatch.setattr(requests, "Session", lambda: session)
    with pytest.raises(DatasetError, match=rf"No connection adapters were found for '{mirror.url}file'"):
        download_file("https://example.org/file", tmp_path / "file", lambda *_: None)
    assert mirror.gets() == []


def test_server_that_is_not_there_ends_in_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/file"
        with pytest.raises(DatasetError, match=r"Connection refused; 3 retries in a row received no data") as caught:
            download_file(url, tmp_path / "file", lambda *_: None)
    assert "\n" not in str(caught.value)


def test_silent_server_is_not_waited_for_for_ever(tmp_path, patience):
    patience.setattr(module, "TIMEOUT_S", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/file"
        with pytest.raises(DatasetError, match="timed out"):
            download_file(url, tmp_path / "file", lambda *_: None)


def test_server_that_speaks_no_http_ends_in_one_line(tmp_path, mirror):
    def says_nonsense(handler: Handler, content: bytes) -> None:
        handler.wfile.write(b"nonsense\r\n\r\n")

    mirror.behaviours.extend(10 * [says_nonsense])
    with pytest.raises(DatasetError) as caught:
        fetch(mirror, tmp_path / "file")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "file:///etc/passwd", "ftp://host/x", "http://", "host/path", "http://["])
def test_an_address_that_is_not_of_the_web_ends_in_one_line(url, tmp_path):
    with pytest.raises(DatasetError, match="cannot download") as caught:
        download_file(url, tmp_path / "file", lambda *_: None)
    assert files_in(tmp_path) == []
    assert "\n" not in str(caught.value)
