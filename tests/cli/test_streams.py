"""A command does its work whether or not anybody reads what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpsearch import cli

PROGRAM = """
import contextlib, os, sys
from hpsearch.cli.terminal import protect_streams
protect_streams()
with open(sys.argv[1], "w") as record:
    for descriptor in (1, 2):
        with contextlib.suppress(BrokenPipeError):
            os.write(descriptor, b"printed by a library")
    for line in range(20_000):
        print("printed to standard output", line)
        print("printed to standard error", line, file=sys.stderr)
    record.write("the work is done")
"""


@pytest.mark.parametrize(
    "closing", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "| true", "2>&1 | true", "> /dev/null"]
)
def test_work_goes_on_and_its_files_hold_nothing_that_was_printed(tmp_path: Path, closing: str) -> None:
    record, status = tmp_path / "record", tmp_path / "status"
    line = f'{{ "$0" -c "$1" "$2"; echo $? > "$3"; }} {closing}'
    arguments = [sys.executable, PROGRAM, str(record), str(status)]
    subprocess.run(["sh", "-c", line, *arguments], stderr=subprocess.DEVNULL, check=False, timeout=60)
    assert status.read_text() == "0\n"
    assert record.read_text() == "the work is done"


def test_what_is_read_arrives_whole_in_the_encoding_of_the_terminal() -> None:
    program = (
        "from hpsearch.cli.terminal import protect_streams; protect_streams(); print('Läsion', end=''); print(1 / 0)"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=False)
    assert done.stdout == "Läsion".encode("latin-1")
    assert b"ZeroDivisionError" in done.stderr


def test_every_command_begins_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    protected: list[bool] = []
    monkeypatch.setattr(cli, "protect_streams", lambda: protected.append(True))
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert protected == [True]
