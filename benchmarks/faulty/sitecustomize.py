"""Inject faults into every Python process that has this folder on its PYTHONPATH (see `benchmarks/faults.py`).

The folder HPSEARCH_FAULTS contains `request.json`, which describes one fault for one start of a study. The processes
record what they have done in this folder:

    fired/NAME      the fault with this name has happened, in the process that reached it first; it happens only once
    epochs          one byte for each trained epoch, even if its result was lost
    fired.jsonl     the kinds of writes that have failed

A request has one of two forms:

    [{"name": ..., "signal": 9, "role": "coordinator", "function": "file.py:name", "call": 2, "line": 3}, ...]
        Each process takes the first entry that is for its role and has not happened yet. It sends itself the signal
        at that line event of that call of that function of hpsearch. With "again": true, every process does this.
    {"name": ..., "errno": 5, "root": "/out", "every": 1}
        The first write of each kind below `root` fails, once over all starts. `every` = n selects every n-th kind.

The package itself contains no code for this and runs as installed.
"""

import errno
import json
import os
import re
import signal
import sqlite3
import sys
import threading
import zlib

_FOLDER = os.environ.get("HPSEARCH_FAULTS")
_ROLE = "worker" if "hpsearch.workers.process" in sys.orig_argv else "coordinator"
_MINE = "hpsearch" in sys.orig_argv or _ROLE == "worker"
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_SQL = re.compile(r"\s*(INSERT INTO|UPDATE|DELETE FROM|CREATE TABLE)\s+\W?(\w+)", re.IGNORECASE)


def _claim(name):
    """Whether this process is the one that does the fault of that name."""
    try:
        os.close(os.open(os.path.join(_FOLDER, "fired", name), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _note(file, content):
    descriptor = os.open(os.path.join(_FOLDER, file), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(descriptor, content)
    os.close(descriptor)


def _trace_calls(request):
    """Count trained epochs; send the signal at the line that was asked for."""
    wanted_file, _, wanted_name = request.get("function", ":").partition(":")
    left = {"calls": request.get("call", 0), "lines": request.get("line", 0)}

    def strike():
        if request.get("again") or _claim(request["name"]):
            os.kill(os.getpid(), request["signal"])

    def on_line(frame, event, _):
        # Any event of this call: a line, its return, its exception.
        left["lines"] -= 1
        if left["lines"] == 0 or (event == "return" and left["lines"] > 0):
            left["lines"] = -1
            strike()
        return on_line

    def on_call(frame, event, _):
        code = frame.f_code
        is_epoch = code.co_name == "_train_epoch" and code.co_filename.endswith("training/loop.py")
        # Those of the measurement before a study have no folder: a local of `_fit`, which calls `_run_epoch`.
        if is_epoch and frame.f_back.f_back.f_locals["paths"] is not None:
            _note("epochs", b".")
        if code.co_name != wanted_name or not code.co_filename.endswith(wanted_file):
            return None
        left["calls"] -= 1
        if left["calls"] != 0:
            return None
        if left["lines"] == 0:
            strike()
            return None
        return on_line

    threading.settrace(on_call)
    sys.settrace(on_call)


def _kind(path, root):
    """What a file is, without the numbers of trials, folds, processes and runs."""
    name = os.path.relpath(path, root)
    name = re.sub(r"[0-9a-f]{24,}", "#", name)
    return re.sub(r"\d+", "#", name)


def _fail_writes(request):
    root = os.path.abspath(request["root"])
    faults = os.path.abspath(_FOLDER)

    def write(action, path):
        if not isinstance(path, str | bytes | os.PathLike):
            return
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith(root + os.sep) or path.startswith(faults):
            return
        kind = f"{_ROLE} {action} {_kind(path, root)}"
        number = zlib.crc32(kind.encode())
        if number % request["every"] == 0 and _claim(f"{number:08x}"):
            _note("fired.jsonl", json.dumps(kind).encode() + b"\n")
            raise OSError(request["errno"], os.strerror(request["errno"]), path)

    def hook(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            # `os.open` gives flags, `open` a mode.
            if (set(mode) & set("wax+")) if isinstance(mode, str) else (flags or 0) & _WRITING:
                write("open", path)
        elif event == "os.rename":
            write("rename", arguments[1])
        elif event in ("os.remove", "os.rmdir"):
            write("remove", arguments[0])
        elif event == "os.mkdir":
            write("mkdir", arguments[0])

    plain_sync = os.fsync

    def fsync(descriptor):
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        try:
            path = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            path = None
        write("fsync", path)
        return plain_sync(descriptor)

    os.fsync = fsync
    plain_connect = sqlite3.connect

    def connect(database, *arguments, **options):
        class Cursor(sqlite3.Cursor):
            def execute(self, sql, *values):
                if statement := _SQL.match(sql):
                    as_sqlite(f"sql {statement[1].upper()} {statement[2]} in", database)
                return super().execute(sql, *values)

        class Connection(sqlite3.Connection):
            def cursor(self, factory=Cursor):
                return super().cursor(factory)

            def commit(self):
                if self.in_transaction:
                    as_sqlite("sql COMMIT in", database)
                super().commit()

        return plain_connect(database, *arguments, **{**options, "factory": Connection})

    def as_sqlite(action, database):
        try:
            write(action, database)
        except OSError as error:
            full = error.errno == errno.ENOSPC
            text = "database or disk is full" if full else "disk I/O error"
            if error.errno == errno.EROFS:
                text = "attempt to write a readonly database"
            raise sqlite3.OperationalError(text) from None

    sqlite3.connect = sqlite3.dbapi2.connect = connect
    sys.addaudithook(hook)


if _FOLDER and _MINE:
    with open(os.path.join(_FOLDER, "request.json")) as _file:
        _request = json.load(_file)
    if isinstance(_request, dict):
        _fail_writes(_request)
    else:
        _fired = os.listdir(os.path.join(_FOLDER, "fired"))
        _left = [each for each in _request if each["role"] == _ROLE and each["name"] not in _fired]
        _trace_calls(_left[0] if _left else {})
    # A signal that was ignored by whoever started this would not show.
    signal.signal(signal.SIGINT, signal.default_int_handler)
