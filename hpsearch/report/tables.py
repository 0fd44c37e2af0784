"""Build the tables of a report: the estimates, the ranking of the trials and the scores of a retrained model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpsearch.report.final_record import FinalResult
from hpsearch.report.formats import SCORES, bounds, duration, interval, number, setting
from hpsearch.report.rows import N_TEST, StudyRows, TrialRow
from hpsearch.stats.intervals import Interval
from hpsearch.store.fits import FitRecord

PUBLISHED: dict[str, Sequence[str]] = {
    "dice": ("0.849", "", ""),
    "jaccard": ("0.765", "0.762", "0.760"),
    "accuracy": ("0.934", "", ""),
    "sensitivity": ("0.825", "", ""),
    "specificity": ("0.975", "", ""),
}
"""Published scores of the first, second and third place of ISIC-2017 Part 1; empty if a score was not published."""


@dataclass(frozen=True)
class Table:
    """A table of text cells. The first cell of each line is its heading."""

    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    shaded: Sequence[bool] = ()
    """Whether each line is highlighted; empty if no line is."""

    @property
    def is_numeric(self) -> list[bool]:
        """Whether each column contains only numbers, so that it is aligned to the right."""
        letters = "+-[], 0123456789.kMGexinhs\N{MINUS SIGN}"
        return [not any(cell.strip(letters) for cell in column) for column in zip(*self.lines, strict=True)]


def estimates(rows: StudyRows) -> list[tuple[str, Interval]]:
    """Return (name, interval) pairs of the winner: plain mean, corrected mean, prediction and test result, if any."""
    found, final = rows.estimates, rows.winner_final
    assert found is not None
    n_test = N_TEST if final is None else final.n_test
    predicted = found.predicted(n_test=n_test) if final is None else final.predicted
    assert predicted is not None
    plain = "validation, plain" if rows.is_fixed_split else "cross-validation, plain"
    result = [(plain, found.statistics[found.winner].total)]
    if found.corrected.method != "single":
        result.append(("corrected for selection", found.corrected.interval))
    result.append((f"predicted for {n_test} test images", predicted))
    return result if final is None else [*result, (f"test, {final.n_test} images", final.test[rows.metric])]


def _place(row: TrialRow, rows: StudyRows) -> str:
    """Return the labels of a trial in the ranking, for example `best` or `tied, cheapest`."""
    found = rows.estimates
    assert found is not None
    labels = {
        "best": row.number == found.winner,
        "tied": row.number in found.tied and row.number != found.winner,
        "cheapest": row.number == found.cheapest_tied and len(found.tied) > 1,
        "two fits": row.number in rows.standing.confirmed,
    }
    return ", ".join(name for name, applies in labels.items() if applies)


COLUMNS: dict[str, Callable[[Any, StudyRows], str]] = {
    "trial": lambda row, _: str(row.number),
    "": _place,
    "mean": lambda row, _: number(row.statistics.mean),
    "95 % interval": lambda row, _: bounds(row.statistics.total),
    "sd of folds": lambda row, rows: number(row.statistics.sd_folds) if rows.record.n_folds > 1 else "",
    "over folds (t)": lambda row, _: bounds(row.statistics.folds) if row.statistics.folds else "",
    "time": lambda row, _: duration(row.seconds),
}
"""Maps the heading of each column of the ranking to a function that returns a trial's cell."""


def ranking(rows: StudyRows) -> Table:
    """Return the table of all complete trials, best first. Trials that are tied with the best are shaded.

    Its columns are `COLUMNS`, followed by the searched settings.
    """
    assert rows.estimates is not None
    names = list(rows.config.search)
    head = (*COLUMNS, *(name.partition(".")[2].replace("_", " ") for name in names))
    lines = [
        (*(cell(row, rows) for cell in COLUMNS.values()), *(setting(row.params[name]) for name in names))
        for row in rows.complete
    ]
    return Table(head, tuple(lines), tuple(row.number in rows.estimates.tied for row in rows.complete))


def hosts(rows: StudyRows) -> Table:
    """Return the table of the hosts of a cluster that ran fits, with the mean speed of one worker there."""
    by_host: dict[str, list[tuple[str, FitRecord]]] = {}
    for trial in rows.record.trials():
        for replicate, evaluation in enumerate((trial, rows.record.replicate(trial.number))):
            fits = rows.record.fits(trial.number, replicate)
            for fold, worker in evaluation.workers.items() if evaluation is not None else ():
                by_host.setdefault(worker.rpartition(":")[0], []).append((worker, fits[int(fold)]))
    lines = []
    for host, found in sorted(by_host.items()) if any(by_host) else ():
        devices = {summary.runtime.get("device_name", "") for _, fit in found if (summary := fit.summary())}
        epochs = [row for _, fit in found for row in fit.epochs()]
        n_images = sum(row.images_per_s * row.train_s for row in epochs)
        speed = n_images / sum(row.train_s for row in epochs) if epochs else 0.0
        n_workers = len({worker for worker, _ in found})
        lines.append(
            (host or "without cluster", ", ".join(sorted(devices)), f"{n_workers}", f"{len(found)}", f"{speed:.0f}")
        )
    return Table(("host", "device", "workers", "fits", "images/s"), lines)


def final_scores(rows: StudyRows, final: FinalResult, *, with_published: bool = False) -> Table:
    """Return the table of a model's out-of-fold and test scores, optionally with the published challenge results."""
    ensemble = final.ensemble
    columns: dict[str, Mapping[str, Interval]] = {
        f"cross-validation, {rows.n_images} images": final.cv_scores,
        f"test, {final.n_test} images": final.test,
        "test, post-processed": final.chosen_test,
        f"test, ensemble of {ensemble.n_networks if ensemble else 0}": ensemble.test if ensemble else {},
        "test, original resolution": final.official,
    }
    columns = {title: scores for title, scores in columns.items() if scores}
    lines = []
    for name, title in SCORES.items():
        if name in final.test or name in final.official:
            ours = (interval(scores[name]) if name in scores else "" for scores in columns.values())
            lines.append((title, *ours, *(PUBLISHED.get(name, ("",) * 3) if with_published else ())))
    places = ("challenge, 1st", "2nd", "3rd") if with_published else ()
    return Table(("score", *columns, *places), tuple(lines))
