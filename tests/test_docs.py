from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from hpsearch.cli import group
from hpsearch.config import setting_names

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "experiments/README.md", *(ROOT / "docs").glob("*.md")])
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
def test_every_command_that_is_shown_can_be_typed(page: str, command: str) -> None:
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
    for page in ("reference", "api"):
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
