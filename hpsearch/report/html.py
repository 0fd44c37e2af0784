"""Writes the report of a study: one HTML file that loads nothing, and its figures as PNG and PDF."""

from __future__ import annotations

import base64
import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from hpsearch import __version__, paths
from hpsearch.errors import CacheError
from hpsearch.report import trial_rows, words
from hpsearch.report.rows import FinalRow, StudyRows, TrialRow, Winner, describe_dimension, show_value, study_rows
from hpsearch.report.words import SCORES, interval
from hpsearch.stats.intervals import Interval
from hpsearch.tuning.record import StudyRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "dice": (0.849, None, None),
    "jaccard": (0.765, 0.762, 0.760),
    "accuracy": (0.934, None, None),
    "sensitivity": (0.825, None, None),
    "specificity": (0.975, None, None),
}
"""First, second and third place of the ISIC-2017 Part 1 challenge."""
_CSS = """
:root { color-scheme: light; --ink: #1c1c1c; --pale: #565656; --line: #d9d9d9; --blue: #00568a; --wash: #f3f7fa; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; }
body { font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main, header, footer { max-width: 1120px; margin: 0 auto; padding: 0 32px; }
header { padding-top: 36px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 22px; margin: 52px 0 10px; padding-top: 14px; border-top: 2px solid var(--ink); }
h3 { font-size: 17px; margin: 28px 0 6px; }
p { margin: 8px 0; max-width: 82ch; }
.pale, figcaption, caption, footer { color: var(--pale); }
nav { margin: 14px 0 0; font-size: 14px; }
nav a { color: var(--blue); margin-right: 16px; }
.cards { display: flex; flex-wrap: wrap; gap: 14px; margin: 22px 0 18px; }
.card { flex: 1 1 220px; background: var(--wash); border-left: 4px solid var(--blue); padding: 12px 16px; }
.card dt { font-size: 14px; color: var(--pale); }
.card dd { margin: 0; }
.card .number { font-size: 30px; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card .range { font-size: 14px; font-variant-numeric: tabular-nums; }
.note { border-left: 4px solid #b35900; background: #fff6ec; padding: 8px 14px; }
figure { margin: 18px 0 8px; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: 14px; max-width: 88ch; margin-top: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 14px 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-size: 14px; padding-bottom: 6px; max-width: 88ch; }
caption.short { white-space: nowrap; }
th, td { padding: 4px 10px 4px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
td.long { white-space: normal; overflow-wrap: anywhere; }
thead th { border-bottom: 1.5px solid var(--ink); vertical-align: bottom; }
td.n, th.n { text-align: right; }
tbody th { font-weight: 600; }
tr.tied { background: var(--wash); }
pre { background: #f6f6f6; border: 1px solid var(--line); padding: 12px 14px; }
pre { font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
footer { margin-top: 48px; padding-top: 14px; padding-bottom: 40px; }
footer { font-size: 13px; border-top: 1px solid var(--line); }
@page { margin: 16mm 14mm; }
@media print {
  body { font-size: 10.5pt; }
  main, header, footer { max-width: none; padding-left: 0; padding-right: 0; }
  nav { display: none; }
  .card { flex-basis: 130px; padding: 8px 10px; }
  .card .number { font-size: 20px; }
  .card dt, .card .range { font-size: 8pt; }
  h2, h3 { break-after: avoid; }
  tr { break-inside: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding-right: 6px; }
  .card, tr.tied, .note, pre { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


@dataclass(frozen=True)
class Picture:
    """A figure as the page shows it."""

    png: bytes
    width: int
    """Width and height in CSS pixels."""
    height: int


def write_report(record: StudyRecord) -> Path:
    """Write report.html and figures/ of a study, whatever it has reached; the page's path.

    Raises RecordError if the study's folder is damaged or holds no folds yet, StorageError when the disk refuses.
    """
    # Half a second to import, and nothing else of a report needs it.
    from hpsearch.report.figures import to_png
    from hpsearch.report.study_figures import to_pdf

    rows = study_rows(record)
    pictures = {}
    for name, figure in _draw(record, rows):
        png = to_png(figure, dpi=DPI)
        for ending, content in ((".png", png), (".pdf", to_pdf(figure))):
            with paths.atomic_write(record.paths.figures / f"{name}{ending}", sync=False) as temporary:
                temporary.write_bytes(content)
        width, height = figure.get_size_inches()
        pictures[name] = Picture(png, round(96 * width), round(96 * height))
    points = trial_rows.trial_curves(record, rows.winner.number) if rows.winner is not None else []
    paths.write_text(record.paths.report, render(rows, pictures, gap=words.gap(points, rows.metric)))
    return record.paths.report


def render(rows: StudyRows, pictures: Mapping[str, Picture], *, gap: str = "") -> str:
    """The whole page. Sections without their figure say why there is none.

    pictures: by name, as `write_report` draws them. gap: the sentence on overfitting.
    """
    sections = [
        ("answer", "The answer", _answer(rows, pictures)),
        ("ranking", "Ranking", _ranking(rows, pictures)),
        ("race", "The race", _race(rows, pictures)),
        ("settings", "What the settings do", _settings(rows, pictures)),
        ("cost", "Accuracy against cost", _cost(rows, pictures)),
        ("curves", "Learning curves", _curves(rows, pictures, gap)),
        ("cases", "Cases", _cases(rows, pictures)),
        ("test", "Test", _test(rows, pictures)),
        ("repeat", "How to repeat it", _repeat(rows)),
    ]
    if rows.coordinators:
        sections.insert(-1, ("machines", "Machines", _machines(rows)))
    if rows.winner is None:
        sections = [each for each in sections if each[0] in ("answer", "race", "test", "machines", "repeat")]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "\n".join(
        f'<section aria-labelledby="{key}">\n<h2 id="{key}">{title}</h2>\n{"".join(content)}\n</section>'
        for key, title, content in sections
    )
    folds = f"{rows.n_folds} folds" if rows.config.study.folds != "fixed" else "one fixed split"
    about = f"{SCORES[rows.metric]}, {folds}, {rows.n_images} images held out. {words.progress(rows)}."
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(rows.name)}: report</title>
<link rel="icon" href="data:,">
<style>{_CSS}</style>
</head>
<body>
<header>
<h1>{escape(rows.name)}</h1>
<p class="pale">{escape(about)}</p>
<nav aria-label="Sections">{links}</nav>
{"".join(_notes(rows))}
</header>
<main>
{body}
</main>
<footer>State of the record: {_time(rows.updated_at)}. Made by hpsearch {__version__}. Not a medical device.</footer>
</body>
</html>
"""


# Figures


def _draw(record: StudyRecord, rows: StudyRows) -> Iterator[tuple[str, Figure]]:
    from hpsearch.report import figures, study_figures

    metric, winner, dimensions = rows.metric, rows.winner, dict(rows.config.search)
    best = winner.number if winner is not None else None
    if rows.trials:
        yield "race", study_figures.draw_race(rows.trials, rows.n_folds, metric=metric)
    if winner is None or best is None:
        return
    yield "answer", study_figures.draw_answer(_estimates(rows, winner), metric=metric)
    yield "ranking", study_figures.draw_ranking(rows.full, winner.tied, winner.cheapest, metric=metric)
    if rows.importances:
        yield "importances", study_figures.draw_importances(rows.importances)
    if dimensions:
        yield "slices", study_figures.draw_slices(rows.trials, dimensions, best, metric=metric)
        yield "parallel", study_figures.draw_parallel(rows.trials, dimensions, best, metric=metric)
    yield "costs", study_figures.draw_costs(rows.full, best, metric=metric)
    title = f"{rows.name}, trial {best}"
    yield "curves", figures.draw_curves(trial_rows.trial_curves(record, best), title=title)
    if (cases := _read_cases(record, best)) is not None:
        yield "cases", figures.draw_panels(cases, metric=metric, title=f"{title}: held-out images")
    groups = [(f"{rows.n_images} images out of fold, trial {best}", winner.scores)]
    if (final := _final_of(rows, best)) is not None:
        groups.append((f"{final.n_test} test images, retrained", final.scores))
    yield "distribution", study_figures.draw_distribution(groups, metric=metric)


def _read_cases(record: StudyRecord, number: int) -> list[trial_rows.Case] | None:
    """None where nothing can be shown: the decoded images may have been removed to save space."""
    try:
        return trial_rows.trial_cases(record, number) or None
    except CacheError:
        return None


def _estimates(rows: StudyRows, winner: Winner) -> list[tuple[str, Interval]]:
    final = _final_of(rows, winner.number)
    predicted = final.predicted if final is not None and final.predicted is not None else winner.predicted
    plain = "cross-validation, plain" if rows.config.study.folds != "fixed" else "validation, plain"
    result = [(plain, winner.statistics.total)]
    if winner.corrected.method != "single":
        result.append(("corrected for the choice", winner.corrected.interval))
    result.append((f"predicted for {winner.n_predicted} test images", predicted))
    return result if final is None else [*result, (f"test, {final.n_test} images", final.test[rows.metric])]


def _final_of(rows: StudyRows, number: int) -> FinalRow | None:
    """The last final of that trial."""
    return next((final for final in reversed(rows.finals) if final.trial == number), None)


# Sections


def _notes(rows: StudyRows) -> Iterator[str]:
    if rows.is_running:
        yield '<p class="note">The study is running: this is what it has reached so far.</p>'
    if rows.config.data.root == "sample" and not rows.config.data.images:
        yield '<p class="note">The images are drawn, not real: the numbers say nothing about real ones.</p>'
    if rows.second_fits is not None:
        done, total = rows.second_fits
        yield (
            '<p class="note">The best are fitted once more, to tell luck from merit: '
            f"{done} of {total} fits are done. Until all are, everything here goes by the first fits alone.</p>"
        )
    for warning in rows.warnings:
        yield f'<p class="note">{escape(warning)}.</p>'
    if any(final.n_trials_after for final in rows.finals):
        yield (
            '<p class="note">The search went on after the test set had been scored: see <a href="#test">Test</a>.</p>'
        )
    if any(final.n_looks_before for final in rows.finals):
        yield (
            '<p class="note">The test set had been scored before this study began: see <a href="#test">Test</a>.</p>'
        )
    if any(final.leaks for final in rows.finals):
        yield '<p class="note">Pool and test share duplicates or near-duplicates: see <a href="#test">Test</a>.</p>'


def _answer(rows: StudyRows, pictures: Mapping[str, Picture]) -> Iterator[str]:
    winner = rows.winner
    if winner is not None:
        yield f'<dl class="cards">{"".join(_cards(rows, winner))}</dl>'
    yield from _paragraphs(words.answer(rows))
    final = _final_of(rows, winner.number) if winner is not None else None
    if final is not None:
        yield from _paragraphs(words.final(final, rows.metric))
    if winner is None:
        if not rows.is_running:
            more = f" --trials {rows.n_counted + 1}" if rows.n_counted >= rows.config.study.trials else ""
            command = escape(paths.command_line(f"study{more}", rows.name))
            yield f"<p><code>{command}</code> goes on with the search.</p>"
        return
    estimates = "; ".join(f"{name} {interval(value)}" for name, value in _estimates(rows, winner))
    yield _figure(
        pictures,
        "answer",
        f"Means and intervals: {estimates}.",
        "What the best configuration scores. Thick lines: 95 % intervals of the mean; for the prediction and the "
        "test they are of the mean over that many test images.",
    )
    best, first = rows.trial(winner.number), rows.trials[0]
    lines = [
        [name, show_value(value), show_value(first.params.get(name, "")), describe_dimension(dimension)]
        for (name, value), (_, dimension) in zip(best.params.items(), rows.config.search, strict=True)
    ]
    if lines:
        head = ["setting", f"best (trial {best.number})", f"default (trial {first.number})", "searched"]
        yield _table(
            "The best configuration. All other settings are below, as they were in every trial.", head, lines
        )


def _cards(rows: StudyRows, winner: Winner) -> Iterator[str]:
    score, corrected = SCORES[rows.metric], winner.corrected
    name = "Corrected estimate" if corrected.method != "single" else "Estimate"
    yield _card(f"{name}, {score}", f"{corrected.mean:.4f}", _range(corrected.interval))
    if corrected.method != "single":
        yield _card("Plain cross-validation mean", f"{winner.statistics.mean:.4f}", _range(winner.statistics.total))
    final = _final_of(rows, winner.number)
    if final is not None:
        test = final.test[rows.metric]
        yield _card(f"Test, {final.n_test} images", f"{test.mean:.4f}", _range(test))
    else:
        low, high = winner.predicted.low, winner.predicted.high
        yield _card(
            "Predicted test mean",
            f"{low:.3f}\N{EN DASH}{high:.3f}",
            f"95 % for {winner.n_predicted} images; not yet run",
        )
    if winner.gain is not None:
        gain = winner.gain
        yield _card(
            "Gain over the default", _minus(f"{gain.difference:+.4f}"), _minus(f"[{gain.low:+.4f}, {gain.high:+.4f}]")
        )


def _card(name: str, number: str, below: str) -> str:
    return (
        f'<div class="card"><dt>{escape(name)}</dt><dd class="number">{escape(number)}</dd>'
        f'<dd class="range">{escape(below)}</dd></div>'
    )


def _ranking(rows: StudyRows, pictures: Mapping[str, Picture]) -> Iterator[str]:
    winner = rows.winner
    assert winner is not None
    full = rows.full
    yield _figure(
        pictures,
        "ranking",
        f"Means with intervals of the {len(full)} full trials; tied with the best: "
        f"{', '.join(f'trial {number}' for number in winner.tied)}.",
        "Fully evaluated trials, best first. The intervals hold the luck of the images and of the runs. They are "
        "wider than the difference of two trials is uncertain, because all were scored on the same images; the tied "
        "set uses the pairs.",
    )
    names = [name for name, _ in rows.config.search]
    head = [
        "trial",
        "",
        *(name.partition(".")[2].replace("_", " ") for name in names),
        "mean",
        "95 % interval",
    ]
    head += ["sd of folds", "over folds (t)", "time"]
    lines = []
    for row in full:
        assert row.statistics is not None
        folds = row.statistics.folds
        lines.append(
            [
                str(row.number),
                _standing(row, winner),
                *(show_value(row.params[name]) for name in names),
                f"{row.statistics.mean:.4f}",
                _range(row.statistics.total),
                f"{row.statistics.sd_folds:.4f}" if folds is not None else "",
                _range(folds) if folds is not None else "",
                words.duration(row.seconds),
            ]
        )
    yield _table(
        "All full trials. 95 % interval: bootstrap over images, with the spread from run to run. Over folds: "
        "corrected resampled t (Nadeau and Bengio, 2003), which knows only the folds' means. Shaded: cannot be told "
        "from the best.",
        head,
        lines,
        shaded=[row.number in winner.tied for row in full],
    )


def _standing(row: TrialRow, winner: Winner) -> str:
    """`best`, `tied, cheapest`, and whether it was fitted once more."""
    standing = _place(row, winner)
    return ", ".join(each for each in (standing, "two fits" if row.is_confirmed else "") if each)


def _place(row: TrialRow, winner: Winner) -> str:
    if row.number == winner.number:
        return "best, cheapest" if row.number == winner.cheapest and len(winner.tied) > 1 else "best"
    if row.number == winner.cheapest:
        return "tied, cheapest"
    return "tied" if row.number in winner.tied else ""


def _race(rows: StudyRows, pictures: Mapping[str, Picture]) -> Iterator[str]:
    yield from _paragraphs([words.race(rows)])
    yield _figure(
        pictures,
        "race",
        f"Every trial's mean or estimate, and the folds it was trained on. {words.progress(rows)}.",
        "Above: means of full trials (filled), estimates of dropped ones (hollow), and the best mean so far; "
        "triangles lie below the axis. Below: folds trained, in colour how the trial ended; crosses: not one "
        "epoch was trained.",
    )
    others = [row for row in rows.trials if row.outcome != "full"]
    if others:
        lines = [
            [
                str(row.number),
                row.outcome,
                words.stopped_at(row, rows.n_folds),
                f"{row.value:.4f}" if row.value is not None else "",
                words.duration(row.seconds),
                row.reason,
            ]
            for row in others
        ]
        head = ["trial", "outcome", "until", "estimate", "time", "why"]
        yield _table("Trials that were not evaluated on all folds. Folds count from 0.", head, lines)


def _settings(rows: StudyRows, pictures: Mapping[str, Picture]) -> Iterator[str]:
    if not rows.config.search:
        yield from _paragraphs(["Nothing was searched: every setting was given."])
        return
    if rows.importances:
        shares = "; ".join(f"{name} {share:.0%}" for name, share in rows.importances.items())
        yield _figure(
            pictures,
            "importances",
            f"Importances: {shares}.",
            "Share of the variance between trials that each setting explains (fANOVA), over the whole search space: "
            "a setting with ruinous values counts for much even if its good values are alike. Dropped trials enter "
            "with their estimates.",
        )
    else:
        yield from _paragraphs(["Too few trials were judged to say how important each setting is."])
    names = ", ".join(name for name, _ in rows.config.search)
    yield _figure(
        pictures,
        "slices",
        f"Means and estimates of all trials against each of {names}.",
        "Every trial against each setting by itself. Filled: full trials; hollow: estimates of dropped ones; "
        "triangles lie below the axis.",
    )
    yield _figure(
        pictures,
        "parallel",
        f"Parallel coordinates of all trials over {names}.",
        "Every trial as a line through its settings to its mean or estimate, on the right.",
    )


def _cost(rows: StudyRows, pictures: Mapping[str, Picture]) -> Iterator[str]:
    device = rows.repeat.machine.get("device_name", "the device of the study")
    yield _figure(
        pictures,
        "costs",
        f"{SCORES[rows.metric]} of the full trials against time, memory and parameters, with the Pareto fronts.",
        f"Full trials against what they cost: seconds of training and evaluation of all folds on {device}, predicted "
        "peak memory of a training step, and parameters. Numbers name trials on the front.",
    )


def _curves(rows: StudyRows, pictures: Mapping[str, Picture], gap: str) -> Iterator[str]:
    assert rows.winner is not None
    yield from _paragraphs([gap] if gap else [])
    yield _figure(
        pictures,
        "curves",
        f"Loss, Dice, Jaccard and pixel accuracy of trial {rows.winner.number} over the epochs. {gap}",
        f"Trial {rows.winner.number}: thin lines are folds, thick ones their mean. Pixel accuracy is high even where "
        "small lesions are missed.",
    )


def _cases(rows: StudyRows, pictures: Mapping[str, Picture]) -> Iterator[str]:
    assert rows.winner is not None
    number = rows.winner.number
    yield _figure(
        pictures,
        "distribution",
        f"Histogram of the {SCORES[rows.metric]} of single images, trial {number}.",
        "What a mean hides: the score of every single image, each from a network that had not seen it.",
    )
    if "cases" in pictures:
        yield _figure(
            pictures,
            "cases",
            f"Best, median and worst held-out images of trial {number}: image, mask, prediction, and both.",
            "Best, median and worst of the held-out images of which a prediction was kept, out of fold.",
        )
    else:
        yield from _paragraphs(["No predictions can be shown: none were kept, or the decoded images were removed."])


def _test(rows: StudyRows, pictures: Mapping[str, Picture]) -> Iterator[str]:
    if rows.winner is None and not rows.finals:
        yield "<p>The test set is scored once a configuration has been evaluated on all folds.</p>"
    elif not rows.finals:
        command = escape(paths.command_line("final --best", rows.name))
        yield (
            "<p>The test set has not been scored in this study. "
            f"<code>{command}</code> retrains the best configuration and does it.</p>"
        )
    is_sample = rows.config.data.root == "sample" and not rows.config.data.images
    for final in rows.finals:
        yield f"<h3>Trial {final.trial}, {_time(final.ended_at)}</h3>"
        if rows.winner is None or final is not _final_of(rows, rows.winner.number):
            yield from _paragraphs(words.final(final, rows.metric))
        yield _test_table(rows, final, with_published=not is_sample)


def _test_table(rows: StudyRows, final: FinalRow, *, with_published: bool) -> str:
    height, width = rows.config.eval_size
    head = [
        "score",
        f"cross-validation, {rows.n_images} images",
        f"test, {final.n_test} images",
        *(["test, with choices"] if final.chosen_test else []),
        *([f"test, ensemble of {final.ensemble.n_networks}"] if final.ensemble else []),
        *(["test, original resolution"] if final.official else []),
        *(["challenge, 1st", "2nd", "3rd"] if with_published else []),
    ]
    lines = []
    for name in list(dict.fromkeys([*final.test, *final.official])):
        tables = [final.cv, final.test]
        tables += [final.chosen_test] if final.chosen_test else []
        tables += [final.ensemble.test] if final.ensemble else []
        at_size = [interval(scores[name]) if name in scores else "" for scores in tables]
        official = [interval(final.official[name]) if name in final.official else ""] if final.official else []
        published = ["" if number is None else f"{number:.3f}" for number in PUBLISHED.get(name, (None,) * 3)]
        lines.append([SCORES.get(name, name), *at_size, *official, *(published if with_published else [])])
    text = (
        f"Means over images at {height}x{width} pixels, with 95 % intervals that hold the luck of the images alone."
    )
    if final.official:
        text += (
            " Original resolution: as the challenge scores, each mask at its image's own size, by one network"
            f"{' with the choices made for it' if final.chosen_test else ''}."
        )
    if with_published:
        text += (
            " For scale, the published results of the ISIC-2017 Part 1 challenge: of its official test set of 600 "
            "images, scored at original resolution. They compare with this study only if its test images are those"
            + ("." if final.official else ", and then roughly, since the size differs.")
        )
    return _table(text, head, lines)


def _repeat(rows: StudyRows) -> Iterator[str]:
    yield "<h3>In words</h3>"
    yield from _paragraphs([words.methods(rows)])
    commands = "\n".join(f"{command}    # {what}" for command, what in words.commands(rows))
    yield f"<h3>Commands</h3>\n<pre><code>{escape(commands)}</code></pre>"
    facts = [("seed", str(rows.config.study.seed)), ("hpsearch", __version__), *words.facts(rows.repeat)]
    yield _table("What the numbers depend on beside the settings.", ["", ""], [list(each) for each in facts])
    yield f"<h3>Settings: {escape(rows.name)}.toml</h3>\n<pre><code>{escape(rows.repeat.toml)}</code></pre>"


def _machines(rows: StudyRows) -> Iterator[str]:
    lines = [
        [
            each.host,
            str(each.pid),
            _time(each.since),
            _time(each.beat_at) if each.beat_at is not None else "none",
            str(each.n_trials),
            f"{each.trials_per_hour:.1f}",
            f"{each.images_per_s:.1f}",
        ]
        for each in rows.coordinators
    ]
    head = ["machine", "process", "since", "last heartbeat", "trials", "trials/hour", "images/s"]
    yield _table("Every coordinator that had a part in the study; images a second over all its time.", head, lines)


# Elements


def _paragraphs(texts: Iterable[str]) -> Iterator[str]:
    return (f"<p>{escape(text)}</p>\n" for text in texts)


def _figure(pictures: Mapping[str, Picture], name: str, alt: str, caption: str) -> str:
    """The picture of that name with its caption; nothing where it was not drawn."""
    if name not in pictures:
        return ""
    picture = pictures[name]
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f'<figure id="figure-{name}">\n<img src="data:image/png;base64,{data}" width="{picture.width}" '
        f'height="{picture.height}" alt="{escape(alt)}">\n<figcaption>{escape(caption)}</figcaption>\n</figure>\n'
    )


def _table(
    caption: str,
    head: Sequence[str],
    lines: Sequence[Sequence[str]],
    *,
    shaded: Sequence[bool] = (),
) -> str:
    """A table of texts; the first cell of a line is its heading, and columns of numbers are set to the right."""
    numeric = [all(_is_number(line[column]) for line in lines) for column in range(len(head))]
    ends = [' class="n"' if each else "" for each in numeric]
    top = ""
    if any(head):
        cells = "".join(f'<th scope="col"{end}>{escape(name)}</th>' for name, end in zip(head, ends, strict=True))
        top = f"<thead><tr>{cells}</tr></thead>\n"
    body = []
    for number, line in enumerate(lines):
        cells = "".join(
            f"<td{end or _long(cell)}>{escape(cell)}</td>" if column else f'<th scope="row"{end}>{escape(cell)}</th>'
            for column, (cell, end) in enumerate(zip(line, ends, strict=True))
        )
        opening = '<tr class="tied">' if shaded and shaded[number] else "<tr>"
        body.append(f"{opening}{cells}</tr>")
    # A narrow table would break its caption into many lines.
    short = ' class="short"' if len(caption) < 90 else ""
    return (
        f'<div class="scroll" tabindex="0">\n<table>\n<caption{short}>{escape(caption)}</caption>\n{top}<tbody>\n'
        + "\n".join(body)
        + "\n</tbody>\n</table>\n</div>\n"
    )


def _long(cell: str) -> str:
    """Only sentences may be broken into lines."""
    return ' class="long"' if len(cell) > 32 else ""


def _is_number(text: str) -> bool:
    return text.strip("+-[], 0123456789.kMGexinhs\N{MINUS SIGN}") == ""


def _range(value: Interval) -> str:
    return _minus(f"[{value.low:.4f}, {value.high:.4f}]")


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _time(seconds: float) -> str:
    if not seconds:
        return "no trial yet"
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
