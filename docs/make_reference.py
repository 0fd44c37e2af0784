"""Writes the pages of docs/ that the code itself says: every command and setting, every function, every file.

python docs/make_reference.py             writes it anew
python docs/make_reference.py --check     exit code 1 if it is not what the code says
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import click

from hpsearch import EXPORTS
from hpsearch.cli import COMMANDS, group
from hpsearch.config import NOT_SEARCHABLE, SECTIONS, describe_type

HEAD = """# Reference

Every command with its options, and every setting of a study's TOML. Made from the code by
`python docs/make_reference.py`.
"""
API_HEAD = """# From Python

What each command does is one function. Those of the upper table can be imported from `hpsearch` itself, which loads
nothing until they are used; `examples/own_images.py` uses them from search to masks on images of one's own. Made from
the code by `python docs/make_reference.py`.
"""
FILES_HEAD = """# Every file

What each module owns, in its own words. Made from the code by `python docs/make_reference.py`.
"""
BEHIND = {
    "study": "hpsearch.search.coordinator.run_study",
    "final": "hpsearch.final.run_final",
    "status": "hpsearch.search.status.study_status",
    "plan": "hpsearch.models.costs.layer_costs, hpsearch.models.costs.training_memory",
    "predict": "hpsearch.inference.predictor.predict_files",
    "export": "hpsearch.inference.export.export_onnx, hpsearch.inference.export.export_toml",
    "report": "hpsearch.report.html.write_report",
    "track": "hpsearch.tracking.MlflowTracker.catch_up",
    "data check": "hpsearch.data.integrity.check, hpsearch.data.duplicates.find_in_dataset",
    "data cache": "hpsearch.data.prepare.prepare_pool, hpsearch.data.comparison.compare_caches",
    "data augment": "hpsearch.data.export_augmented.export_augmented",
    "data sample": "hpsearch.data.sample.draw_sample",
    "data download": "hpsearch.data.download.download",
}
"""Command to the functions that do it; `train` is a study of one trial, `stop` asks another process."""
PARTS = (
    "hpsearch.models.unet.UNet",
    "hpsearch.training.loop.fit",
    "hpsearch.training.losses.loss_function",
    "hpsearch.training.checkpoint.load_weights",
    "hpsearch.inference.scoring.score_folder",
    "hpsearch.serving.predict_masks",
)
"""What is useful by itself, in a notebook or a training loop of one's own."""
SHARED_BY = 4
"""Options that so many commands have are described once, before the commands."""
SETTINGS = """## Settings

What a study's TOML can hold, section by section; any of them behind `--set section.key=value`. A setting that is left
out has its default. An unknown key is an error that lists the known ones.

The table `[search]` says what is searched: a setting's full name, and a list of values or a range.

    [search]
    "unet.depth" = { low = 2, high = 5 }
    "train.lr" = { low = 1e-3, high = 3e-1, log = true }
    "data.color" = ["rgb", "grayscale"]

A range is of whole numbers if both ends are, and may have a `step`. What the TOML gives for a searched setting in its
own section is trial 0. `--set` of a searched setting pins it; `--set 'search.unet.depth=[2, 3]'` changes a range, and
moves trial 0 into it if it lies outside. Settings marked with `-` cannot be searched, because
trials must share them to be comparable.
"""


def reference() -> str:
    """The whole page."""
    commands = dict(all_commands())
    counts = collections.Counter(option for command in commands.values() for option in options(command))
    shared = [option for option, n in counts.items() if n >= SHARED_BY]
    blocks = [HEAD, "## Commands\n", "Options that many commands have:\n", "\n".join([*_option_table(shared), ""])]
    blocks += [describe_command(path, command, shared) for path, command in commands.items()]
    blocks.append(SETTINGS)
    blocks += [describe_section(section, cls) for section, cls in SECTIONS.items()]
    return "\n".join(blocks)


def all_commands() -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by what one types."""
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        if isinstance(command, click.Group):
            for sub_name, sub in command.commands.items():
                yield f"hpsearch {name} {sub_name}", sub
        else:
            yield f"hpsearch {name}", command


def options(command: click.Command) -> list[tuple[str, str]]:
    """(How it is written, what it means) of each option."""
    context = click.Context(command)
    records = [
        parameter.get_help_record(context)
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.hidden and parameter.name != "help"
    ]
    return [record for record in records if record is not None]


def describe_command(path: str, command: click.Command, shared: list[tuple[str, str]]) -> str:
    """A command's section."""
    arguments = [
        parameter.make_metavar(click.Context(command))
        for parameter in command.params
        if isinstance(parameter, click.Argument)
    ]
    # What click is told to show as it stands is indented, and so a code block here too.
    text = [line for line in inspect.cleandoc(command.help or "").splitlines() if line != "\b"]
    lines = [f"### `{' '.join([path, *arguments])}`", "", *text, ""]
    own = [option for option in options(command) if option not in shared]
    if own:
        lines += [*_option_table(own), ""]
    if common := [shown.split()[0] for shown, _ in options(command) if (shown, _) in shared]:
        lines += [f"{'Also' if own else 'Options'}: {', '.join(f'`{name}`' for name in common)}.", ""]
    return "\n".join(lines)


def describe_section(section: str, cls: type) -> str:
    """A section's table: setting, default, what it can be, meaning."""
    lines = [f"### `[{section}]`", "", (cls.__doc__ or "").strip(), ""]
    lines += ["| setting | default | | meaning |", "| --- | --- | --- | --- |"]
    hints, meanings = get_type_hints(cls, include_extras=True), attribute_docs(cls)
    for field in dataclasses.fields(cls):
        name = f"{section}.{field.name}"
        fixed = " -" if section == "study" or name in NOT_SEARCHABLE else ""
        default = _toml(field.default)
        kind = describe_type(hints[field.name])
        lines.append(f"| `{name}`{fixed} | `{default}` | {_cell(kind)} | {_cell(meanings[field.name])} |")
    return "\n".join([*lines, ""])


def attribute_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass; KeyError, later, for a field that has none."""
    (tree,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = inspect.cleandoc(str(text.value.value))
    return found


def _option_table(found: list[tuple[str, str]]) -> list[str]:
    return ["| option | meaning |", "| --- | --- |", *(f"| `{_cell(a)}` | {_cell(b)} |" for a, b in found)]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def api() -> str:
    """The page of functions."""
    blocks = [API_HEAD, "## From `hpsearch`\n"]
    blocks += [describe_object(f"hpsearch.{name}", full_name) for name, full_name in EXPORTS.items()]
    blocks += ["## Behind the commands\n", "| command | |", "| --- | --- |"]
    for command, names in BEHIND.items():
        blocks.append(f"| `hpsearch {command}` | {', '.join(f'`{name}`' for name in names.split(', '))} |")
    shown = {name for names in BEHIND.values() for name in names.split(", ")} - set(EXPORTS.values())
    blocks.append("")
    blocks += [describe_object(name, name) for name in sorted(shown)]
    blocks.append("## Parts\n")
    blocks += [describe_object(name, name) for name in PARTS]
    return "\n".join(blocks)


def files() -> str:
    """The page of files: a table for each folder, a line for each module that says what it owns."""
    root = Path(__file__).parents[1]
    folders = collections.defaultdict(list)
    for top in ("hpsearch", "benchmarks", "docs", "examples"):
        for path in sorted((root / top).rglob("*.py")):
            folders[path.parent.relative_to(root).as_posix()].append(path)
    for path in sorted((root / "experiments").glob("*.toml")):
        folders["experiments"].append(path)
    blocks = [FILES_HEAD]
    for folder, paths in folders.items():
        rows = [f"| `{path.name}` | {_cell(_first_line(path))} |" for path in paths]
        blocks.append("\n".join([f"## {folder}", "", "| file | |", "| --- | --- |", *rows, ""]))
    return "\n".join(blocks)


def _first_line(path: Path) -> str:
    """What a file says of itself first."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        return text.partition("\n")[0].lstrip("# ")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def describe_object(shown: str, full_name: str) -> str:
    """A function's or class's signature and docstring."""
    found = find(full_name)
    signature = inspect.signature(found)
    parameters = [each.replace(annotation=_Text(each.annotation)) for each in signature.parameters.values()]
    signature = signature.replace(parameters=parameters, return_annotation=_Text(signature.return_annotation))
    text = inspect.getdoc(found)
    assert text, full_name
    block = f"### `{shown}`\n\n```python\n{_wrapped(shown.rpartition('.')[2], str(signature))}\n```\n\n{text}\n"
    return "\n".join([block, *_field_table(found)]) if inspect.isclass(found) else block


def _field_table(cls: type) -> list[str]:
    """What each public field of a class holds, where its source says so."""
    fields = {name: text for name, text in attribute_docs(cls).items() if not name.startswith("_")}
    if dataclasses.is_dataclass(cls):
        fields = {field.name: fields[field.name] for field in dataclasses.fields(cls)}
    if not fields:
        return []
    return ["| field | |", "| --- | --- |", *(f"| `{name}` | {_cell(text)} |" for name, text in fields.items()), ""]


class _Text:
    """An annotation that is shown as it is written."""

    def __init__(self, annotation: Any) -> None:
        self._annotation = annotation

    def __repr__(self) -> str:
        return self._annotation if isinstance(self._annotation, str) else inspect.formatannotation(self._annotation)


def find(full_name: str) -> Any:
    """The function, class or method of that full name."""
    module, _, name = full_name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        module, _, owner = module.rpartition(".")
        return getattr(getattr(importlib.import_module(module), owner), name)


def _wrapped(name: str, signature: str) -> str:
    """A signature with a parameter a line where it is long."""
    if len(name) + len(signature) <= 100:
        return name + signature
    inside, _, result = signature[1:].rpartition(")")
    parameters, depth, start = [], 0, 0
    for place, letter in enumerate(inside):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parameters.append(inside[start:place].strip())
            start = place + 1
    parameters.append(inside[start:].strip())
    return "\n".join([f"{name}(", *(f"    {parameter}," for parameter in parameters), f"){result}"])


if __name__ == "__main__":
    stale = []
    for page, make in (("reference.md", reference), ("api.md", api), ("files.md", files)):
        path, made = Path(__file__).with_name(page), make()
        if "--check" not in sys.argv[1:]:
            path.write_text(made, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != made:
            stale.append(page)
    sys.exit(f"not what the code says: {', '.join(stale)}; make them anew" if stale else 0)
