from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from hpsearch.cli import group
from hpsearch.data.dataset import Split
from hpsearch.data.folds import make_folds
from hpsearch.report import figures, study_figures
from hpsearch.report.page import render, write_report
from hpsearch.report.rows import study_rows
from hpsearch.stats.intervals import Interval
from hpsearch.store import lock
from hpsearch.store.test_set_log import LoggedEvaluation, enter_evaluation
from tests.recorded import POOL_KEY, FakeStudy

VOID = {"meta", "link", "img", "br", "hr"}


class Page(HTMLParser):
    """What a reader meets: elements, headings, images, texts. Fails on elements that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        given = dict(attrs)
        assert not any(name.startswith("on") for name in given)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "img":
            self.images.append(given)
        self.links += [value for name, value in attrs if name in ("href", "src") and value]
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def report(study: FakeStudy) -> Page:
    return Page(write_report(study.record).read_text(encoding="utf-8"))


def quick_report(study: FakeStudy) -> Page:
    """Without figures, which take seconds."""
    return Page(render(study_rows(study.record), {}))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> FakeStudy:
    study = FakeStudy(tmp_path_factory.mktemp("html"))
    study.trial(**{"train.lr": 0.002})
    study.trial(**{"train.lr": 0.05, "unet.depth": 4})
    for outcome in (
        "pruned",
        "infeasible",
        "diverged",
        "failed",
        "pruned",
        "pruned",
        "pruned",
        "complete",
        "complete",
    ):
        study.trial(outcome)
    study.final(1)
    return study


@pytest.fixture(scope="module")
def page(study: FakeStudy) -> Page:
    return report(study)


def test_the_page_loads_nothing_from_anywhere(study: FakeStudy, page: Page) -> None:
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not page.tags & {"script", "iframe", "object", "form"}
    assert "url(" not in study.record.paths.report.read_text(encoding="utf-8")


def test_headings_descend_one_step_at_a_time_and_every_image_says_what_it_shows(page: Page) -> None:
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert len(page.images) == 9
    assert all(len(image["alt"] or "") > 20 for image in page.images)
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_every_figure_is_also_written_as_png_and_pdf(study: FakeStudy, page: Page) -> None:
    folder = study.record.paths.figures
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {path.stem for path in folder.glob("*.pdf")}
    assert len(names) == len(page.images)
    assert all(path.read_bytes().startswith(b"%PDF") for path in folder.glob("*.pdf"))


def test_the_answer_names_the_winner_its_numbers_and_the_test_result(study: FakeStudy, page: Page) -> None:
    rows = study_rows(study.record)
    found = rows.estimates
    assert found is not None
    gain = found.gain(found.winner)
    assert gain is not None
    answer = page.text[: page.text.index("setting best (trial")]
    assert f"Trial {found.winner} is the best of 4 configurations" in answer
    shown_gain = f"{gain.difference:+.4f}".replace("-", "\N{MINUS SIGN}")
    numbers = [found.corrected.mean, found.statistics[found.winner].mean, rows.finals[0].test["dice"].mean]
    assert all(f"{number:.4f}" in answer for number in numbers)
    assert shown_gain in answer
    assert "corrected for selection" in answer
    assert "The interval does not cover three things" in answer
    assert "With so few images the interval contains the true gain in about 91 to 97 % of studies" in answer


def test_pruned_trials_are_listed_with_their_reason(page: Page) -> None:
    assert "pruned 0.6100 2 s" in page.text
    assert "infeasible 0 s needs about 9.1 GiB" in page.text


def test_published_results_are_said_to_be_of_the_official_test_set_at_original_resolution(page: Page) -> None:
    assert "official test set of 600 images, scored at original resolution" in page.text
    assert "0.765 0.762 0.760" in page.text


def test_official_scores_stand_beside_those_at_the_size_of_training(study: FakeStudy) -> None:
    rows = study_rows(study.record)
    assert "test, original resolution" not in quick_report(study).text
    official = {"dice": Interval(0.81, 0.8, 0.82), "threshold_jaccard": Interval(0.7, 0.6, 0.8)}
    final = dataclasses.replace(rows.finals[0], official=official)
    page = Page(render(dataclasses.replace(rows, finals=(final,)), {}))
    assert "test, original resolution" in page.text
    assert "0.8100 [0.8000, 0.8200] 0.849" in page.text
    assert "Threshold Jaccard (0.65) 0.7000 [0.6000, 0.8000]" in page.text


def test_all_that_is_needed_to_repeat_it_is_there(study: FakeStudy, page: Page) -> None:
    folds = study.record.folds.to_dict()["digest"]
    for needed in (folds, POOL_KEY, "hpsearch study --config fake.toml --study fake", "torch 2.9.0"):
        assert needed in page.text
    assert study.config.to_toml() in "".join(page.texts)


def test_the_same_record_gives_the_same_page_and_figures(study: FakeStudy, page: Page) -> None:
    paths = study.record.paths
    files = [paths.report, *sorted(paths.figures.iterdir())]
    before = [path.read_bytes() for path in files]
    write_report(study.record)
    assert [path.read_bytes() for path in files] == before


def test_what_comes_from_outside_is_text_and_never_markup(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"quotes\""
    root = evil.replace('"', "")
    study = FakeStudy(tmp_path, overrides=(f'data.root="{root}"',))
    study.trial()
    study.record.write_evaluation(dataclasses.replace(study.trial("failed"), reason=evil))
    machine = {**study.machine, "device_name": evil}
    plan = study.record.plan()
    assert plan is not None
    study.record.write_plan({**plan, "machine": machine})
    page = quick_report(study)
    assert "script" not in page.tags
    assert page.text.count(evil) >= 2
    assert root in page.text


def test_a_study_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    page = report(FakeStudy(tmp_path))
    assert "no best one" in page.text
    assert page.images == []


def test_a_study_of_one_configuration_has_no_settings_to_show(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial()
    rows = study_rows(study.record)
    nothing = dataclasses.replace(rows.config, search=type(rows.config.search)())
    trials = tuple(dataclasses.replace(row, params={}) for row in rows.trials)
    page = Page(render(dataclasses.replace(rows, config=nothing, trials=trials), {}))
    assert "Nothing was searched" in page.text


def test_a_study_without_a_full_trial_shows_its_race_and_no_answer(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial("diverged")
    page = report(study)
    assert "No configuration has been evaluated on all folds yet, so there is no best one" in page.text
    assert "hpsearch study --study fake continues the search." in page.text
    assert "The test set can be evaluated once a configuration has been evaluated on all folds." in page.text
    assert "hpsearch final" not in page.text
    assert len(page.images) == 1
    assert "the training loss became nan" in page.text


def test_a_study_that_ended_without_a_full_trial_says_how_to_go_on(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    for _ in range(6):
        study.trial("failed")
    text = quick_report(study).text
    assert "None of the 6 trials was evaluated on all folds" in text
    assert "hpsearch study --trials 7 --study fake continues the search." in text


def test_a_running_study_says_so(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial()
    study.epoch(study.begin(), 0)
    assert "The study is running" not in quick_report(study).text
    with lock.hold(study.record.paths):
        assert "The study is running" in quick_report(study).text


def test_a_fixed_split_is_named_as_such(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, overrides=('study.folds="fixed"',))
    splits: list[Split] = ["train"] * 12 + ["val"] * 8
    ids = study.record.folds.ids
    hashes = [f"{i:064x}" for i in range(20)]
    study.record.write_folds(make_folds(ids, splits, hashes, folds="fixed", seed=0, groups=None), POOL_KEY)
    study.trial(**{"train.lr": 0.002})
    study.trial(**{"train.lr": 0.05})
    page = report(study)
    assert "one fixed split, 8 held-out images" in page.text
    assert "a standard deviation of 0.006 is assumed, and the interval does not cover a larger one" in page.text


def test_one_full_trial_is_reported_without_a_choice_and_without_the_images_that_were_removed(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial()
    for path in sorted(study.project.cache.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    page = report(study)
    assert "Trial 0 is the only configuration that was evaluated on all folds." in page.text
    assert "The only trial was trained on all folds." in page.text
    # There was no choice to correct for: one number, once.
    assert "Plain cross-validation mean" not in page.text
    assert "The test set has not been evaluated in this study." in page.text
    assert "the decoded images were removed" in page.text
    assert "figure-curves" in page.ids
    assert "figure-cases" not in page.ids


def test_templates_are_part_of_the_package() -> None:
    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = root / "hpsearch/report"
    shipped = {path for pattern in patterns["hpsearch.report"] for path in folder.glob(pattern)}
    assert {path for path in folder.rglob("*") if path.suffix in (".jinja", ".css")} == shipped != set()


@pytest.mark.slow
def test_fifty_trials_stay_under_5_mb(tmp_path: Path) -> None:
    # Larger than the cells of the gallery, so that every picture in it is as large as it can be.
    study = FakeStudy(tmp_path, epochs=1, size=256)
    for number in range(50):
        study.trial("complete" if number % 3 == 0 else "pruned")
    study.final(0)
    write_report(study.record)
    assert study.record.paths.report.stat().st_size < 5 * 2**20


def luminance(color: str) -> float:
    """Relative luminance of `#rrggbb` or `#rgb` (WCAG 2.2)."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_black_on_white_is_the_largest_contrast() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21)


def test_texts_and_marks_stand_out_from_what_is_behind_them() -> None:
    css = (Path(figures.__file__).parent / "templates/report.css").read_text(encoding="utf-8")
    named = dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6})", css))
    backgrounds = ["#fff", named["wash"], "#f6f6f6", "#fff6ec"]
    for text in (named["ink"], named["pale"], named["blue"], figures.INK, figures.PALE):
        assert all(contrast(text, behind) >= 4.5 for behind in backgrounds), text
    for mark in (figures.TRAIN, figures.HELD_OUT, figures.RIGHT, *study_figures.OUTCOMES.values()):
        assert contrast(mark, "#fff") >= 3, mark


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def said_by_chromium(page: Path, picture: Path) -> list[str]:
    """What the page writes to the console, refused requests included; `picture` shows it at 1280 pixels."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", f"--user-data-dir={picture.parent / 'profile'}"]
    command += ["--window-size=1280,6000", f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_shows_the_page_without_a_complaint(study: FakeStudy, page: Page, tmp_path: Path) -> None:
    report_file = study.record.paths.report
    assert said_by_chromium(report_file, tmp_path / "report.png") == []
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width == 1280
        rows = np.asarray(picture.convert("L"))
    # Nothing reaches the right edge: no table or figure is wider than the window.
    assert (rows[:, -8:] > 250).all()
    assert (rows < 100).any(axis=1).mean() > 0.2
    # A page that asks for something does complain.
    asking = tmp_path / "asking.html"
    text = report_file.read_text(encoding="utf-8")
    asking.write_text(text.replace("</main>", '<img src="http://127.0.0.1:9/x.png" alt=""></main>'), encoding="utf-8")
    assert said_by_chromium(asking, tmp_path / "asking.png")


def test_the_command_says_where_the_report_lies(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial("diverged")
    result = CliRunner().invoke(group, ["report", "--out", str(tmp_path), "--study", "fake"])
    assert result.exit_code == 0
    assert str(study.record.paths.report) in result.output
    assert study.record.paths.report.is_file()
    # The project is not tracked, and the report makes no database.
    assert "not logged to MLflow, because this project is not tracked" in result.output
    assert not study.project.mlflow_db.exists()


def test_the_report_shows_what_was_confirmed_chosen_looked_at_and_leaked(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, overrides=("study.confirm=2",))
    study.trial(**{"train.lr": 0.04})
    study.trial(**{"train.lr": 0.05, "unet.depth": 4})
    study.confirm(1, 0)
    gain = {"difference": 0.0123, "low": 0.0101, "high": 0.0145, "p": 0.001}
    decisions = [{"name": "threshold", "value": 0.4, "gain": gain, "taken": True}]
    decisions += [{"name": "clean", "value": True, "gain": {**gain, "low": -0.01}, "taken": False}]
    choices = {"threshold": 0.4, "flips": False, "clean": False, "ensemble": False}
    interval = {"mean": 0.87, "low": 0.86, "high": 0.88}
    scores = {"dice": interval, "jaccard": interval}
    study.final(
        1,
        test_set="0123",
        chosen={"choices": choices, "decisions": decisions, "n_images": 20, "source": "second fits of trial 1"},
        chosen_test=scores,
        ensemble={"n_networks": 2, "test": scores, "official": scores, "gain": gain},
        leaks=[{"a": "ISIC_1", "b": "ISIC_2", "split_a": "train", "split_b": "test", "similarity": 0.9}],
        without_leaks=0.8611,
    )
    began_at = study.record.trial(0).began_at
    evaluation = LoggedEvaluation(
        test_set="0123",
        at=began_at - 1,
        study="earlier",
        study_began_at=1.0,
        trial=3,
        folder="/somewhere",
        n_images=12,
        metric="dice",
        score=0.85,
    )
    enter_evaluation(study.project, evaluation)
    enter_evaluation(
        study.project, dataclasses.replace(evaluation, study="fake", study_began_at=began_at, at=study.clock, id="2")
    )
    text = quick_report(study).text
    assert "The mean of its first fits is" in text
    assert "best, two fits" in text or "best, cheapest, two fits" in text
    assert "the 2 configurations that were best on most bootstrap samples" in text
    assert "threshold 0.4: +0.0123 [+0.0101, +0.0145], used" in text
    assert (
        "largest component with holes filled: +0.0123 [\N{MINUS SIGN}0.0100, +0.0145], not used (within noise)"
        in text
    )
    assert "These 12 test images had been evaluated before: 1 evaluation of 1 configuration" in text
    assert "earlier trial 3 (0.8500)" in text
    assert "1 evaluation took place before this study began" in text
    assert "The test set had been evaluated before this study began" in text
    leaks = (
        "pool and test share 1 pair of duplicates or near-duplicates: ISIC_1 and ISIC_2. Without those test images"
    )
    assert leaks in text
    assert "test, ensemble of 2" in text
    assert "test, post-processed" in text


def test_a_search_that_goes_on_after_a_look_stays_marked_when_final_is_run_again(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.trial()
    evaluation = LoggedEvaluation(
        test_set="4567",
        at=study.clock,
        study="fake",
        study_began_at=study.record.trial(0).began_at,
        trial=0,
        folder="/somewhere",
        n_images=12,
        metric="dice",
        score=0.85,
    )
    enter_evaluation(study.project, evaluation)
    study.trial()
    study.final(1, test_set="4567")
    (final,) = study_rows(study.record).finals
    assert final.n_trials_after == 1
    assert "1 trial of this study began after its first evaluation" in quick_report(study).text
