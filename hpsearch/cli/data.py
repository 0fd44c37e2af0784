"""`hpsearch data`: check, cache, augment, draw or download datasets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpsearch.cli import Suggesting
from hpsearch.cli.options import Settings, config_options, out_option
from hpsearch.paths import ProjectPaths

if TYPE_CHECKING:
    from hpsearch.config.data import DataConfig
    from hpsearch.data.integrity import CheckReport


@click.group("data", cls=Suggesting)
def command() -> None:
    """Check, cache, augment, draw or download datasets."""


@command.command("check")
@out_option
@config_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON that names every file.")
@click.option(
    "--full", is_flag=True, help="Also compare files and cache with the hashes taken when the cache was built."
)
@click.option("--duplicates", "near", is_flag=True, help="Also look for near-duplicates, in the test split too.")
def check(project: ProjectPaths, settings: Settings, as_json: bool, full: bool, near: bool) -> int:
    """Decode a whole dataset and show its errors and notes. Exit code 1 if there are errors."""
    from hpsearch.data import integrity
    from hpsearch.data.prepare import locate

    config = settings.load().data
    root = cache_folder(project, config.cache_dir)
    progress = None if as_json else counter("checking images")
    report = integrity.check(locate(config, root), config=config, cache_root=root, progress=progress)
    result = report.to_dict()
    lines: list[str] = []
    if full and not report.errors:
        result["changed"], texts = _changed(config, root)
        lines += texts
    if near and not report.errors:
        result["near_duplicates"], texts = _near_duplicates(config, root, project.root / "duplicates.png")
        lines += texts
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        _print_report(report)
        click.echo("\n".join(lines), nl=bool(lines))
    return 1 if report.errors or result.get("changed") else 0


def _changed(config: DataConfig, root: Path) -> tuple[list[str], list[str]]:
    """Return what has changed since the caches were built, and the lines to print."""
    from hpsearch.data.prepare import check_contents

    folders, problems = check_contents(config, root)
    changed = [problem.text for problem in problems]
    lines = [f"error: {text}" for text in changed]
    if not folders:
        lines.append("there is no cache of this data yet to compare with: a study or `hpsearch data cache` makes it")
    elif not changed:
        lines.append(f"files and {len(folders)} cache(s) are what they were")
    return changed, lines


def _near_duplicates(config: DataConfig, root: Path, sheet: Path) -> tuple[list[dict[str, object]], list[str]]:
    """Return the near-duplicate pairs as plain types, and the lines to print."""
    from hpsearch.data.duplicates import find_in_dataset

    pairs = find_in_dataset(config, root, with_test=True, sheet=sheet)
    table = [{"a": p.a, "b": p.b, "similarity": p.similarity, "pool_and_test": p.across} for p in pairs]
    lines = [
        f"near-duplicate: {p.a} and {p.b}, similarity {p.similarity:.3f}{', POOL AND TEST' if p.across else ''}"
        for p in pairs
    ]
    return table, [*lines, f"{len(pairs)} near-duplicate pairs" + (f", see {sheet}" if pairs else "")]


def _print_report(report: CheckReport) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    for line in report.overview():
        console.print(Text(line))
    if not report.errors:
        console.print("no errors")
    table = Table("", "kind", "number", "which", box=None, pad_edge=False)
    for level, kind, n, texts in report.rows():
        more = [f"and {n - len(texts)} more (--json names all)"] if n > len(texts) else []
        table.add_row(level, kind, str(n), Text("\n".join([*texts, *more])))
    if table.row_count:
        console.print(table)


@command.command("cache")
@out_option
@config_options
@click.option("--compare", is_flag=True, help="Build and read every kind of cache, and compare time and memory.")
def cache(project: ProjectPaths, settings: Settings, compare: bool) -> None:
    """Decode the pool once, as a study would, or compare the kinds of cache on this data."""
    from rich.console import Console
    from rich.table import Table

    from hpsearch.data.comparison import compare_caches
    from hpsearch.data.pool_caches import PoolCaches

    study = settings.load()
    config = study.data
    root = cache_folder(project, config.cache_dir)
    if not compare:
        caches = PoolCaches(study, root, progress=counter("decoding images"))
        caches.prepare_listed(study)
        for (height, width), prepared in caches.made.items():
            click.echo(f"{prepared.n} images, {height}x{width}: {prepared.cache_path}, {prepared.seconds:.1f} s")
        return
    rows = compare_caches(config, root, progress=lambda kind: click.echo(f"measuring {kind}", err=True))
    table = Table("cache", "build", "epoch", "memory", "disk", "against decoding", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row.kind,
            f"{row.build_s:.1f} s",
            f"{row.epoch_s:.3f} s",
            f"{row.memory_bytes / 2**20:.0f} MiB",
            f"{row.disk_bytes / 2**20:.0f} MiB",
            f"{row.speedup:.0f}x",
        )
    Console(highlight=False).print(table)


@command.command("augment")
@out_option
@config_options
@click.option("--copies", default=1, type=click.IntRange(min=1), help="Changed versions of each training image.")
@click.option("--to", "target", type=click.Path(path_type=Path), help="Folder to write (default: DATA_Aug).")
@click.option("--groups", metavar="FILE.csv", help="Patient or lesion of each image, kept in groups.csv.")
def augment(project: ProjectPaths, settings: Settings, copies: int, target: Path | None) -> None:
    """Write an augmented copy of a dataset beside it: ISIC-2017_Aug, in the same layout.

    The changes are those of [augment], drawn from --seed. After an interruption the same command continues.

    \b
        hpsearch data augment --data ISIC-2017 --copies 2 --set augment.rotate=20
        hpsearch study --data ISIC-2017_Aug
    """
    from dataclasses import asdict

    from hpsearch.data.export_augmented import export_augmented
    from hpsearch.data.folds import groups_file, read_groups
    from hpsearch.data.prepare import locate
    from hpsearch.data.survey import decide_reading

    config = settings.load()
    root = cache_folder(project, config.data.cache_dir)
    dataset = locate(config.data, root)
    groups = groups_file(config.data)
    try:
        folder = export_augmented(
            dataset,
            config.augment,
            copies=copies,
            seed=config.study.seed,
            target=target,
            groups=read_groups(groups) if groups else None,
            reading=decide_reading(dataset, config.data, root).reading,
            exclude_bad=config.data.exclude_bad,
            progress=counter("writing changed versions"),
        )
    except KeyboardInterrupt:
        click.echo("\nstopped: run the same command again to continue", err=True)
        raise
    changes = ", ".join(f"{name} {value:g}" for name, value in asdict(config.augment).items() if value)
    n_train = len(dataset.split("train"))
    versions = f"{copies} changed version{'s' if copies > 1 else ''} of each ({changes})"
    others = f"{len(dataset.samples) - n_train} images for validation and test as they were"
    click.echo(f"{folder}: {n_train} training images, {versions}, {others}")
    click.echo(f"use it with --data {folder}: versions of one image stay in one fold")


@command.command("sample")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", default=0, help="Seed of the images.")
@click.option("--train", "n_train", default=120, type=click.IntRange(min=1), help="Training images.")
@click.option("--val", "n_val", default=30, type=click.IntRange(min=0), help="Validation images.")
@click.option("--test", "n_test", default=50, type=click.IntRange(min=0), help="Test images.")
@click.option(
    "--large", "n_large", default=0, type=click.IntRange(min=0), help="Very large images among the training images."
)
def sample(folder: Path, seed: int, n_train: int, n_val: int, n_test: int, n_large: int) -> None:
    """Draw a small synthetic dermoscopy dataset, in the archive's layout, into FOLDER."""
    from hpsearch.data.sample import draw_sample

    report = counter("drawing images")
    draw_sample(folder, seed=seed, n_train=n_train, n_val=n_val, n_test=n_test, n_large=n_large, progress=report)
    click.echo(f"drawn into {folder}: use it with --data {folder}")


@command.command("download")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("ISIC-2017"))
@click.option("--only", multiple=True, metavar="train|val|test|ARCHIVE", help="Only these. May be repeated.")
@click.option("--from", "base_url", metavar="URL", help="Mirror to use instead of the challenge's own bucket.")
@click.option("--remove-archives", is_flag=True, help="Remove each archive once it is unpacked.")
@click.option("--no-check", is_flag=True, help="Skip the check of the dataset at the end.")
def download(folder: Path, only: tuple[str, ...], base_url: str | None, remove_archives: bool, no_check: bool) -> int:
    """Download the archives of ISIC-2017 Part 1 into FOLDER, unpack and check them. Run again to continue."""
    from hpsearch.config.data import DataConfig
    from hpsearch.data import integrity
    from hpsearch.data.download import OFFICIAL, DownloadProgress
    from hpsearch.data.download import download as fetch
    from hpsearch.data.layouts import find_samples

    def show(progress: DownloadProgress) -> None:
        done, total = progress.done_bytes / 2**20, progress.total_bytes / 2**20
        ended = progress.done_bytes >= progress.total_bytes
        click.echo(f"\r{progress.archive.name}: {progress.step} {done:.0f}/{total:.0f} MiB", nl=ended, err=True)

    folders = fetch(
        folder,
        only=only or None,
        base_url=base_url or OFFICIAL,
        keep_archives=not remove_archives,
        progress=show if sys.stderr.isatty() else None,
    )
    click.echo(f"{len(folders)} folders in {folder}")
    if no_check:
        return 0
    report = integrity.check(find_samples(DataConfig(root=str(folder))), progress=counter("checking images"))
    click.echo("\n".join(report.summary()))
    return 1 if report.errors else 0


def cache_folder(project: ProjectPaths, cache_dir: str) -> Path:
    """Return the folder of the caches."""
    return Path(cache_dir) if cache_dir else project.cache


def counter(text: str) -> Callable[[int, int], None] | None:
    """Return a progress callback that shows `text 12/200` on the terminal, None without a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        click.echo(f"\r{text} {done}/{total}", nl=done == total, err=True)

    return show
