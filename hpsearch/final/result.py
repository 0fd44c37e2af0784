"""Check, compute and write the result of a `final` run, which retrains a configuration and scores the test images."""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hpsearch import paths
from hpsearch.config.data import DataConfig
from hpsearch.data.cache import Index
from hpsearch.data.duplicates import DuplicatePair, find_in_dataset
from hpsearch.errors import RecordError
from hpsearch.inference.scoring import COLUMNS, mask_name, score_table
from hpsearch.paths import FinalPaths
from hpsearch.report import trial_rows
from hpsearch.report.final_record import FinalRecord
from hpsearch.stats.intervals import Floats, Interval, bootstrap_mean
from hpsearch.store.fits import FitRecord, load_array
from hpsearch.store.record import StudyRecord
from hpsearch.store.trials import read_record
from hpsearch.typed_json import to_json

logger = logging.getLogger(__name__)


def stored_result(
    folder: FinalPaths, pool: Index, test: Index, *, n_seeds: int, ensemble: bool
) -> FinalRecord | None:
    """Return the result in `folder` if it is complete and has the same images, number of seeds and `ensemble`."""
    files = (folder.result, folder.model, folder.table, *(folder.masks / mask_name(image) for image in test.ids))
    if not all(path.is_file() for path in files):
        return None
    stored = read_record(FinalRecord, folder.result)
    found = (stored.pool_key, stored.test_key, stored.n_seeds, stored.ensemble is not None)
    return stored if found == (pool.key, test.key, n_seeds, ensemble) else None


def find_leaks(data: DataConfig, cache_root: Path, pool: Index, test: Index) -> tuple[DuplicatePair, ...]:
    """Return the pairs of a pool image and a test image that are near-duplicates. They are stored in `cache_root`."""
    known = cache_root / f"near-duplicates-{pool.key}-{test.key}.json"
    if known.is_file():
        try:
            return tuple(DuplicatePair(**pair) for pair in paths.read_json(known)["across"])
        except (RecordError, KeyError, TypeError) as error:
            logger.warning("%s; searching again", error)
    logger.info("looking for near-duplicates across pool and test")
    pairs = find_in_dataset(data, cache_root, with_test=True, role="final")
    across = tuple(pair for pair in pairs if pair.across and {pair.a, pair.b} & set(test.ids))
    paths.write_json(known, {"across": to_json(across)})
    return across


def read_scores(counts: Path) -> dict[str, Floats]:
    """Return all scores by name, each (n,) for n images, computed from a file of pixel counts."""
    return trial_rows.image_scores(load_array(counts, ndim=2))


def read_official_scores(counts: Path, test: Index) -> dict[str, Floats]:
    """Return the scores of the ISIC-2017 challenge by name, each (n,), computed from a file of pixel counts."""
    table = score_table(test.ids, load_array(counts, ndim=2))
    return {name: table[name].to_numpy(np.float64) for name in COLUMNS}


def intervals(scores: Mapping[str, Floats]) -> dict[str, Interval]:
    """Return the mean of each score with its 95 % interval over the images."""
    return {name: bootstrap_mean(values) for name, values in scores.items()}


def write_table(folder: FinalPaths, images: Sequence[str], columns: Mapping[str, Floats]) -> None:
    """Write test.csv, which has one row of scores per test image."""
    text = io.StringIO()
    rows = zip(images, *([f"{value:.6f}" for value in values] for values in columns.values()), strict=True)
    csv.writer(text).writerows([["image", *columns], *rows])
    paths.write_text(folder.table, text.getvalue())


def draw_figures(record: StudyRecord, folder: FinalPaths, final: FinalRecord) -> None:
    """Write curves.png (learning curves of the networks) and panels.png (examples of test images)."""
    from hpsearch.report import figures

    title = f"{final.study}, trial {final.trial}, retrained"
    fits = [FitRecord(folder.seed(index)).epochs() for index in range(final.n_seeds)]
    cases = trial_rows.final_cases(record, folder, final.test_key)
    panels = figures.draw_panels(cases, metric=final.metric, title=f"{title}: test images")
    for path, figure in ((folder.curves, figures.draw_curves(fits, title=title)), (folder.panels, panels)):
        with paths.atomic_write(path) as temporary:
            temporary.write_bytes(figures.to_bytes(figure))
