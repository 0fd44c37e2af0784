from __future__ import annotations

import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from hpsearch.cli import group, main
from hpsearch.config import setting_names
from hpsearch.data.sample import draw_sample
from tests.test_architecture import LAYERS

ROOT = Path(__file__).parents[1]
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md")]
PAGES = sorted([*TOP, ROOT / "experiments/README.md", *(ROOT / "docs").glob("*.md")])
STUDIES = sorted((ROOT / "experiments").glob("*.toml"))
SHELL = re.compile(r"[|;&<>]")
ROWS = [f"R{number}" for number in range(1, 26)]


def commands(path: Path) -> Iterator[str]:
    """Everything in a page that one could type: indented lines, and code within a line, that begin with hpsearch."""
    for line in path.read_text(encoding="utf-8").splitlines():
        code = line.removeprefix("#") if path.suffix == ".toml" else line
        if re.match(r"    +hpsearch ", code):
            yield code.strip()
        else:
            yield from re.findall(r"`(hpsearch [^`]*)`", line)


def parse(command: str) -> click.Context:
    """What click makes of a command, without running it; fails as the command line would.

    A command without its arguments is its name.
    """
    words = shlex.split(command, comments=True)[1:]
    context, found = click.Context(group, info_name="hpsearch"), group
    while isinstance(found, click.Group):
        name, sub, words = found.resolve_command(context, words)
        assert name is not None
        assert sub is not None
        context = click.Context(sub, info_name=name, parent=context)
        if not words and isinstance(sub, click.Group):
            return context
        found = sub
    try:
        return found.make_context(context.info_name, words, parent=context.parent)
    except click.MissingParameter:
        return context


ALL = sorted({(path.relative_to(ROOT).as_posix(), each) for path in [*PAGES, *STUDIES] for each in commands(path)})


@pytest.mark.parametrize(("page", "command"), ALL)
def test_every_command_that_is_shown_can_be_typed(
    page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.toml").touch()
    # `hpsearch data check|cache` and the like name several commands at once, a pipe is the shell's.
    first, *rest = SHELL.split(command) if not page.endswith(".toml") else [command]
    context = parse(first)
    for alternative in rest:
        if "|" in command and alternative.isidentifier():
            parse(f"{' '.join(first.split()[:-1])} {alternative}")
    for name in re.findall(r"--set ([a-z_.]+)=", first):
        assert name.removeprefix("search.") in setting_names()
    assert context.command is not group


def test_the_pages_show_commands() -> None:
    assert len(ALL) > 40


def test_a_command_that_cannot_be_typed_would_be_noticed() -> None:
    with pytest.raises(click.UsageError):
        parse("hpsearch study --trails 50")
    with pytest.raises(click.UsageError):
        parse("hpsearch sudy")


def test_the_reference_is_what_the_code_says() -> None:
    script = runpy.run_path(str(ROOT / "docs/make_reference.py"))
    for page in ("reference", "api", "files"):
        stored = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
        assert stored == script[page](), "run `python docs/make_reference.py`"


def test_the_reference_has_every_setting_and_the_functions_behind_every_command() -> None:
    script = runpy.run_path(str(ROOT / "docs/make_reference.py"))
    made = script["reference"]()
    assert [name for name in setting_names() if f"| `{name}`" not in made] == []
    # A training is a study of one trial; stopping asks another process.
    commands = {path.removeprefix("hpsearch ") for path, _ in script["all_commands"]()} - {"train", "stop"}
    assert set(script["BEHIND"]) == commands


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        page = path.parent / name if name else path
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(page), target


def named_files(text: str) -> set[str]:
    """Return the files and folders of the repository in a page's code spans; for `FOLDER/NAME.py` the folder."""
    names = re.findall(r"`((?:hpsearch|tests|benchmarks|docs|examples|experiments)/[\w./-]*)", text)
    return {name.rstrip("/").removesuffix("/NAME.py") for name in names}


# The log of the experiments names files of its time.
@pytest.mark.parametrize("path", [page for page in PAGES if page.parent.name != "experiments"], ids=lambda p: p.name)
def test_every_file_that_a_page_names_exists(path: Path) -> None:
    names = named_files(path.read_text(encoding="utf-8"))
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


def test_a_name_without_a_file_would_be_noticed() -> None:
    text = "`hpsearch/none.py`, `tests/stats/`, `hpsearch/training/losses/NAME.py` and `hpsearch study`"
    assert named_files(text) == {"hpsearch/none.py", "tests/stats", "hpsearch/training/losses"}


EXAMPLES = re.findall(
    r"^```python\n# (hpsearch/\S+\.py)\n(.*?)^```",
    (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    re.M | re.S,
)
"""File and source of each module that is shown whole."""


@pytest.mark.parametrize(("file", "source"), EXAMPLES, ids=[file for file, _ in EXAMPLES])
def test_the_modules_that_contributing_shows_can_be_imported(file: str, source: str) -> None:
    namespace: dict[str, object] = {}
    exec(compile(source, file, "exec"), namespace)
    assert {"loss", "make", "build"} & set(namespace)


def test_the_table_of_layers_has_every_package_in_the_order_that_is_enforced() -> None:
    rows = re.findall(r"^\| (`\w+/`) \|", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), re.MULTILINE)
    shown = [row.strip("`/") for row in rows]
    enforced = [name for layer in LAYERS for name in layer.names if (ROOT / "hpsearch" / name).is_dir()]
    assert [name for name in shown if name in enforced] == enforced


def anchors(page: Path) -> set[str]:
    """What a heading can be linked by, as GitHub and GitLab make it."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def feature_rows() -> dict[str, str]:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    return {line.split("|")[1].strip(): line for line in lines if re.match(r"\| R\d+ \|", line)}


def test_the_feature_table_has_a_line_for_every_row_of_the_report() -> None:
    assert list(feature_rows()) == ROWS


@pytest.mark.parametrize("row", ROWS)
def test_what_the_feature_table_names_is_there(row: str) -> None:
    line = feature_rows()[row]
    spans = re.findall(r"`([^`]+)`", line)
    shown = [span for span in spans if span.startswith("hpsearch ")]
    files = [span for span in spans if re.match(r"(hpsearch|tests|experiments|benchmarks|docs|examples)/", span)]
    settings = [span for span in spans if re.fullmatch(r"[a-z]+\.(?!pt$)[a-z_]+", span)]
    for command in shown:
        parse(command)
    for name in files:
        file, _, test = name.partition("::")
        assert (ROOT / file).exists(), name
        if test:
            assert re.search(rf"^    *def {test}\(|^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), name
    assert set(settings) <= set(setting_names())
    assert shown or settings, "a row says what to type"
    assert any(name.startswith(("tests/", "benchmarks/")) for name in files) or "experiments/README.md#" in line


RUN = [
    ("hpsearch data check --data ISIC-2017", ""),
    ("hpsearch data check --data ISIC-2017 --duplicates", ""),
    ("hpsearch data cache --data ISIC-2017", "--size 32"),
    ("hpsearch plan --memory 8GB", ""),
    (
        "hpsearch study --config isic2017-64 --data ISIC-2017 --trials 50 --folds 5",
        "--trials 2 --folds 2 --tracking none {small}",
    ),
    ("hpsearch final --best --study isic2017-64", "--threads 1 --tracking none"),
    ("hpsearch status", ""),
    ("hpsearch status --study isic2017-64", ""),
    ("hpsearch report --study isic2017-64", ""),
    ("hpsearch predict photos --out-dir predictions --overlays", "--threads 1"),
    ("hpsearch track", ""),
    (
        "hpsearch train --config report-fig19 --data ISIC-2017 "
        "--set data.size=96 --set unet.depth=2 --set unet.base_channels=8",
        "--threads 1 --tracking none",
    ),
]
"""Commands as the pages show them, in an order in which they can be typed, and what makes them small.

Only `track` delivers to MLflow: in one process, what an earlier command delivers might still be under way.
"""
SMALL = "--set data.size=32 --set train.epochs=1 --set unet.base_channels=4 --set study.confirm=0 --threads 1"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_that_are_shown_do_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_mlflow_db: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {" ".join(shlex.split(command, comments=True)) for _, command in ALL}
    monkeypatch.chdir(tmp_path)
    draw_sample(Path("ISIC-2017"), n_train=12, n_val=4, n_test=4)
    shutil.copytree("ISIC-2017/ISIC-2017_Test_v2_Data", "photos")
    for command, smaller in RUN:
        assert command in shown
        if command == "hpsearch track":
            shutil.copyfile(empty_mlflow_db, "mlflow.db")
        with pytest.raises(SystemExit) as ended:
            main([*shlex.split(command)[1:], *smaller.format(small=SMALL).split()])
        assert ended.value.code == 0, (command, capsys.readouterr())
    assert len(list(Path("predictions").glob("*_segmentation.png"))) == 4
    assert Path("studies/isic2017-64/report.html").is_file()
    assert Path("studies/train-report-fig19").is_dir()
