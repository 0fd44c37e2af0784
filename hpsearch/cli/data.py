"""`hpsearch data`: check, cache, generate, download or augment datasets."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpsearch.cli.options import AT_LEAST_0, AT_LEAST_1, OrderedGroup, Settings, config_options, out_option
from hpsearch.cli.terminal import counter, echo_table
from hpsearch.config.data import DataConfig
from hpsearch.paths import ProjectPaths
from hpsearch.report.formats import count

if TYPE_CHECKING:
    from hpsearch.data.integrity import CheckReport

NO_CACHE = "there is no cache of this dataset to compare with: create one with `hpsearch data cache`"


@click.group("data", cls=OrderedGroup)
def data() -> None:
    """Check, cache, generate, download or augment datasets."""


@data.command("check")
@out_option
@config_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON that lists every affected file.")
@click.option("--full", is_flag=True, help="Also compare files and cached images with the hashes in the cache.")
@click.option("--duplicates", is_flag=True, help="Also find near-duplicates, except within the test split.")
def check(project: ProjectPaths, settings: Settings, as_json: bool, full: bool, duplicates: bool) -> int:
    """Decode a whole dataset and show its errors and notes.

    The exit code is 1 if there are errors or, with --full, if files have changed.
    """
    from hpsearch.data import integrity
    from hpsearch.data.duplicates import find_in_dataset
    from hpsearch.data.prepare import cache_root, check_contents, locate

    study = settings.load()
    config, root = study.data, cache_root(project, study)
    progress = None if as_json else counter("checking images")
    report = integrity.check(locate(config, root), config=config, cache_root=root, progress=progress)
    table, lines = report.to_dict(), []
    if full and not report.errors:
        folders, changed = check_contents(config, root)
        table["changed"] = [problem.text for problem in changed]
        same = f"files and {count(len(folders), 'cache')} unchanged" if folders else NO_CACHE
        lines = [f"error: {text}" for text in table["changed"]] or [same]
    if duplicates and not report.errors:
        sheet = project.root / "duplicates.png"
        pairs = find_in_dataset(config, root, with_test=True, sheet=sheet)
        names = ("a", "b", "similarity", "pool_and_test")
        table["near_duplicates"] = [dict(zip(names, (p.a, p.b, p.similarity, p.across), strict=True)) for p in pairs]
        for p in pairs:
            across = ", POOL AND TEST" if p.across else ""
            lines.append(f"near-duplicate: {p.a} and {p.b}, similarity {p.similarity:.3f}{across}")
        lines.append(count(len(pairs), "near-duplicate pair") + (f", see {sheet}" if pairs else ""))
    if as_json:
        click.echo(json.dumps(table, indent=1))
    else:
        _print_report(report)
        click.echo("\n".join(lines), nl=bool(lines))
    return 1 if report.errors or table.get("changed") else 0


def _print_report(report: CheckReport) -> None:
    click.echo("\n".join([*report.overview(), *([] if report.errors else ["no errors"])]))
    rows = []
    for level, kind, n, texts in report.rows():
        more = [f"and {n - len(texts)} more (--json lists all)"] if n > len(texts) else []
        rows.append((level, kind, str(n), "\n".join([*texts, *more])))
    echo_table(("", "kind", "number", "which"), rows)


@data.command("cache")
@out_option
@config_options
def cache(project: ProjectPaths, settings: Settings) -> None:
    """Build the cache that a study with the same options would use."""
    from hpsearch.data.prepare import PoolCaches, cache_root

    study = settings.load()
    caches = PoolCaches(study, cache_root(project, study), progress=counter("decoding images"))
    caches.prepare_listed(study)
    for (height, width), prepared in caches.made.items():
        click.echo(f"{len(prepared.index)} images, {height}x{width}: {prepared.cache_path}")


@data.command("sample")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", default=0, help="Seed of the random images (default: 0).")
@click.option("--train", "n_train", default=120, type=AT_LEAST_1, help="Number of training images (default: 120).")
@click.option("--val", "n_val", default=30, type=AT_LEAST_0, help="Number of validation images (default: 30).")
@click.option("--test", "n_test", default=50, type=AT_LEAST_0, help="Number of test images (default: 50).")
@click.option(
    "--large", "n_large", default=0, type=AT_LEAST_0, help="Make this many training images large (30 megapixels)."
)
def sample(folder: Path, **sizes: int) -> None:
    """Generate a small synthetic dataset in FOLDER.

    The images resemble dermoscopic images, and the folders have the same layout as ISIC-2017.
    """
    from hpsearch.data.sample import draw_sample

    draw_sample(folder, **sizes, progress=counter("generating images"))
    click.echo(f"generated {folder}: use it with --data {folder}")


@data.command("download")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("ISIC-2017"))
@click.option("--only", multiple=True, metavar="train|val|test|ARCHIVE", help="Download only this part; repeatable.")
@click.option("--from", "base_url", metavar="URL", help="Use this mirror instead of the challenge's server.")
@click.option("--remove-archives", is_flag=True, help="Remove each archive once it is unpacked.")
@click.option("--no-check", is_flag=True, help="Do not check the dataset after the download.")
def download(folder: Path, only: tuple[str, ...], base_url: str | None, remove_archives: bool, no_check: bool) -> int:
    """Download ISIC-2017 Part 1 to FOLDER (default: ISIC-2017), unpack and check it.

    Run the same command again to continue an interrupted download.
    """
    from hpsearch.data import download as downloads
    from hpsearch.data import integrity
    from hpsearch.data.layouts import find_samples

    folders = downloads.download(
        folder,
        only=only or None,
        base_url=base_url or downloads.OFFICIAL,
        keep_archives=not remove_archives,
        progress=_show_download if sys.stderr.isatty() else None,
    )
    click.echo(f"{len(folders)} folders in {folder}")
    if no_check:
        return 0
    report = integrity.check(find_samples(DataConfig(root=str(folder))), progress=counter("checking images"))
    _print_report(report)
    return 1 if report.errors else 0


def _show_download(archive: str, step: str, done_bytes: int, total_bytes: int) -> None:
    text = f"\r{archive}.zip: {step} {done_bytes / 2**20:.0f}/{total_bytes / 2**20:.0f} MiB"
    click.echo(text, nl=done_bytes >= total_bytes, err=True)


@data.command("augment")
@out_option
@config_options
@click.option("--copies", default=1, type=AT_LEAST_1, help="Write this many augmented versions per training image.")
@click.option("--to", "target", type=click.Path(path_type=Path), help="Write into this folder (default: DATA_Aug).")
@click.option("--groups", metavar="FILE.csv", help="Read image groups from FILE; the copy gets its own groups.csv.")
def augment(project: ProjectPaths, settings: Settings, copies: int, target: Path | None) -> None:
    """Write an augmented copy of a dataset.

    By default, the copy is written to DATA_Aug, next to DATA. It has the same layout. The
    settings in the section [augment] define the changes, and the same --seed gives the same copy.

    \b
        hpsearch data augment --data ISIC-2017 --copies 2 --set augment.rotate=20
        hpsearch study --data ISIC-2017_Aug
    """
    from hpsearch.data.export_augmented import export_augmented
    from hpsearch.data.prepare import cache_root, locate

    config = settings.load()
    root = cache_root(project, config)
    dataset, progress = locate(config.data, root), counter("writing augmented images")
    folder = export_augmented(dataset, config, root, copies=copies, target=target, progress=progress)
    changes = ", ".join(f"{name} {value:g}" for name, value in asdict(config.augment).items() if value)
    n_train = len(dataset.split("train"))
    click.echo(
        f"{folder}: {n_train} training images, {count(copies, 'augmented version')} of each ({changes}), "
        f"{len(dataset.samples) - n_train} unchanged images for validation and test\n"
        f"use it with --data {folder}: all versions of an image stay in one fold"
    )
