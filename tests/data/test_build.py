"""A cache appears whole or not at all, once however many build it, and only where there is room."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock

from hpsearch.config.data import DataConfig
from hpsearch.data import build
from hpsearch.data.build import build_cache
from hpsearch.data.cache import INDEX, Index, Kind, Preparation, open_cache
from hpsearch.data.dataset import Sample
from hpsearch.data.decode_pool import Decoders
from hpsearch.data.layouts import find_samples
from hpsearch.errors import CacheError, DatasetError, StorageError
from tests.cached import sha256_of

RESIZE = Preparation(24, 40, ("resize",))
CROP = Preparation(24, 40, ("random crop", "centre crop"))


@pytest.fixture
def samples(tiny_archive: Path, tmp_path: Path) -> tuple[Sample, ...]:
    """A pool that a test may change."""
    shutil.copytree(tiny_archive, tmp_path / "data")
    return find_samples(DataConfig(root=str(tmp_path / "data"))).split("train", "val")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def no_decoder(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, decoding fails the test."""
    return lambda: monkeypatch.setattr(build, "Decoders", lambda: pytest.fail("it was decoded again"))


def names(root: Path) -> list[str]:
    """What lies in the folder of the caches, locks aside."""
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.usefixtures("one_decoder")
class TestBuilding:
    @pytest.mark.parametrize("kind", ["memmap", "files", "memory", "none"])
    def test_second_time_nothing_is_decoded(
        self, samples: Sequence[Sample], root: Path, kind: Kind, no_decoder: Callable[[], None]
    ) -> None:
        folder = build_cache(samples, RESIZE, kind, root)
        no_decoder()
        assert build_cache(samples, RESIZE, kind, root) == folder
        assert names(root) == [folder.name]

    def test_progress_is_told_of_every_image(self, samples: Sequence[Sample], root: Path) -> None:
        told: list[tuple[int, int]] = []
        build_cache(samples, RESIZE, "memmap", root, progress=lambda done, total: told.append((done, total)))
        assert told == [(done, 11) for done in range(1, 12)]

    @pytest.mark.parametrize("kind", ["memmap", "files"])
    @pytest.mark.parametrize("preparation", [RESIZE, CROP])
    def test_bad_pairs_leave_no_gap(
        self, samples: Sequence[Sample], root: Path, kind: Kind, preparation: Preparation
    ) -> None:
        for i in (0, 4, 10):
            samples[i].image.write_bytes(b"no image")
        good = [sample for i, sample in enumerate(samples) if i not in (0, 4, 10)]
        with_bad = open_cache(build_cache(samples, preparation, kind, root))
        without = open_cache(build_cache(good, preparation, kind, root))
        assert with_bad.ids == without.ids == tuple(sample.id for sample in good)
        assert with_bad.key != without.key
        for held_out in (False, True):
            pairs = zip(
                with_bad.read(np.arange(8), held_out=held_out),
                without.read(np.arange(8), held_out=held_out),
                strict=True,
            )
            assert all(np.array_equal(a, b) for a, b in pairs)
        assert [(problem.id, problem.kind) for problem in with_bad.index.problems] == [
            (samples[i].id, "undecodable file") for i in (0, 4, 10)
        ]
        assert with_bad.damaged() == []
        assert {path.name: path.stat().st_size for path in with_bad.path.glob("*.npy")} == {
            path.name: path.stat().st_size for path in without.path.glob("*.npy")
        }

    def test_no_good_pair_at_all_is_an_error_and_leaves_nothing(self, samples: Sequence[Sample], root: Path) -> None:
        for sample in samples:
            sample.image.write_bytes(b"no image")
        with pytest.raises(DatasetError, match=r"none of the 11 images can be used: .*neither JPEG nor PNG"):
            build_cache(samples, RESIZE, "memmap", root)
        assert names(root) == []

    @pytest.mark.parametrize("kind", ["memmap", "files", "none"])
    def test_interrupted_building_leaves_nothing(self, samples: Sequence[Sample], root: Path, kind: Kind) -> None:
        def interrupt(done: int, total: int) -> None:
            if done == 11:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build_cache(samples, RESIZE, kind, root, progress=interrupt)
        assert names(root) == []
        assert len(open_cache(build_cache(samples, RESIZE, kind, root))) == 11

    def test_what_killed_builders_left_is_removed(self, samples: Sequence[Sample], root: Path) -> None:
        folder = build_cache(samples, RESIZE, "memmap", root)
        left = [root / f".{folder.name}.tmp", root / ".0123-files.tmp"]
        folder.rename(left[0])
        left[1].mkdir()
        assert build_cache(samples, RESIZE, "memmap", root) == folder
        assert names(root) == [folder.name]

    def test_unfinished_cache_of_a_living_builder_is_left_alone(self, samples: Sequence[Sample], root: Path) -> None:
        theirs = root / ".0123-files.tmp"
        theirs.mkdir(parents=True)
        with FileLock(root / ".0123-files.lock"):
            build_cache(samples, RESIZE, "memmap", root)
            assert theirs.is_dir()

    def test_damaged_cache_is_built_again(
        self, samples: Sequence[Sample], root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = build_cache(samples, RESIZE, "memmap", root)
        os.truncate(folder / "masks.npy", 500)
        with caplog.at_level(logging.WARNING):
            build_cache(samples, RESIZE, "memmap", root)
        assert "masks.npy has 500 bytes" in caplog.text
        assert open_cache(folder).damaged() == []

    @pytest.mark.parametrize("kind", ["memmap", "files"])
    def test_cache_with_a_changed_pixel_is_built_again(
        self, samples: Sequence[Sample], root: Path, kind: Kind, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = build_cache(samples, RESIZE, kind, root)
        path = sorted(folder.glob("*.npy"))[0]
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        build_cache(samples, RESIZE, kind, root)
        assert "is damaged at ISIC_" in caplog.text
        assert open_cache(folder).damaged() == []

    @pytest.mark.parametrize("kind", ["memmap", "none"])
    def test_moved_images_need_no_decoding_but_are_found_again(
        self, samples: Sequence[Sample], root: Path, tmp_path: Path, kind: Kind, no_decoder: Callable[[], None]
    ) -> None:
        folder = build_cache(samples, RESIZE, kind, root)
        (tmp_path / "data").rename(tmp_path / "elsewhere")
        moved = find_samples(DataConfig(root=str(tmp_path / "elsewhere"))).split("train", "val")
        no_decoder()
        assert build_cache(moved, RESIZE, kind, root) == folder
        cache = open_cache(folder)
        assert cache.index.samples == moved
        assert cache.read(np.array([1]))[0].shape == (1, 24, 40, 3)

    def test_replaced_image_makes_another_cache(self, samples: Sequence[Sample], root: Path) -> None:
        folder = build_cache(samples, RESIZE, "memmap", root)
        shutil.copy(samples[1].image, samples[0].image)
        shutil.copy(samples[1].mask, samples[0].mask)
        other = build_cache(samples, RESIZE, "memmap", root)
        assert other != folder
        assert sha256_of(open_cache(other))[0] == sha256_of(open_cache(folder))[1]

    def test_ready_cache_needs_no_right_to_write(
        self, samples: Sequence[Sample], root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = build_cache(samples, RESIZE, "memmap", root)
        monkeypatch.setattr(build, "FileLock", lambda _: pytest.fail("it wanted the lock"))
        assert build_cache(samples, RESIZE, "memmap", root) == folder

    def test_refusing_disk_is_named(
        self, samples: Sequence[Sample], root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(build, "_write_pixels", refuse)
        with pytest.raises(StorageError, match=r"-memmap: No space left on device \(\d+ MiB free"):
            build_cache(samples, RESIZE, "memmap", root)
        assert names(root) == []


@pytest.mark.usefixtures("one_decoder")
class TestChoice:
    def machine(self, monkeypatch: pytest.MonkeyPatch, *, disk: int, memory: int) -> None:
        monkeypatch.setattr(build, "free_bytes", lambda _: disk)
        monkeypatch.setattr(build.psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))

    @pytest.mark.parametrize(
        ("disk", "memory", "kind"),
        [(10**12, 0, "memmap"), (0, 10**12, "memory"), (0, 11 * 24 * 40 * 4, "none"), (0, 0, "none")],
    )
    def test_auto_takes_the_fastest_that_there_is_room_for(
        self,
        samples: Sequence[Sample],
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        disk: int,
        memory: int,
        kind: Kind,
    ) -> None:
        self.machine(monkeypatch, disk=disk, memory=memory)
        assert Index.read(build_cache(samples, RESIZE, "auto", root)).kind == kind

    def test_auto_takes_what_is_there(
        self, samples: Sequence[Sample], root: Path, monkeypatch: pytest.MonkeyPatch, no_decoder: Callable[[], None]
    ) -> None:
        folder = build_cache(samples, RESIZE, "files", root)
        self.machine(monkeypatch, disk=0, memory=10**12)
        no_decoder()
        assert build_cache(samples, RESIZE, "auto", root) == folder

    @pytest.mark.parametrize("kind", ["memmap", "files"])
    def test_too_small_a_disk_is_refused_before_anything_is_decoded(
        self,
        samples: Sequence[Sample],
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        kind: Kind,
        no_decoder: Callable[[], None],
    ) -> None:
        self.machine(monkeypatch, disk=10**6, memory=10**12)
        no_decoder()
        with pytest.raises(CacheError, match=r"need 0 MiB, .* has 1 MiB free: free some space, .*data\.cache_dir"):
            build_cache(samples, RESIZE, kind, root)


BUILDER = """
import signal, sys, time
from pathlib import Path
from hpsearch.data.build import build_cache
from hpsearch.data.cache import Preparation
from hpsearch.config.data import DataConfig
from hpsearch.data.layouts import find_samples

def slow(done, total):
    print("image", flush=True)
    time.sleep(float(sys.argv[3]))

# A shell starts what runs in the background with this signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
pool = find_samples(DataConfig(root=sys.argv[1])).split("train", "val")
print(build_cache(pool, Preparation(24, 40, ("resize",)), "memmap", Path(sys.argv[2]), progress=slow))
"""


def builder(data: Path, root: Path, pause_s: float) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", BUILDER, str(data), str(root), str(pause_s)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_builders_at_the_same_time_build_once(tiny_archive: Path, root: Path) -> None:
    builders = [builder(tiny_archive, root, 0.05) for _ in range(3)]
    outputs = [process.communicate(timeout=200)[0].split() for process in builders]
    assert [process.returncode for process in builders] == [0, 0, 0]
    assert len({output[-1] for output in outputs}) == 1
    assert sorted(output.count("image") for output in outputs) == [0, 0, 11]
    assert open_cache(Path(outputs[0][-1])).damaged() == []


@pytest.mark.slow
def test_builder_that_was_killed_leaves_nothing_that_is_taken_for_a_cache(tiny_archive: Path, root: Path) -> None:
    with builder(tiny_archive, root, 0.2) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "image\n"
        process.send_signal(signal.SIGKILL)
    assert [name for name in names(root) if not name.startswith(".")] == []
    assert len(names(root)) == 1
    output, _ = builder(tiny_archive, root, 0).communicate(timeout=200)
    assert output.count("image") == 11
    assert open_cache(Path(output.split()[-1])).damaged() == []
    assert len(names(root)) == 1


@pytest.mark.slow
def test_interrupted_builder_leaves_nothing(tiny_archive: Path, root: Path) -> None:
    with builder(tiny_archive, root, 0.2) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "image\n"
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
    assert names(root) == []


def test_index_appears_last(
    samples: Sequence[Sample], root: Path, one_decoder: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[list[str]] = []
    original = Index.write

    def write(self: Index, path: Path) -> None:
        written.append(sorted(other.name for other in path.parent.iterdir()))
        original(self, path)

    monkeypatch.setattr(Index, "write", write)
    folder = build_cache(samples, RESIZE, "memmap", root)
    assert written == [["images.npy", "masks.npy"]]
    assert (folder / INDEX).is_file()
