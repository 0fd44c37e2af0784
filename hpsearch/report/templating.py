"""Render the templates of the report: the page, the model card, and the paragraphs that both contain."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from hpsearch import __version__, paths
from hpsearch.report import formats

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """Return a rendered template. Values in HTML are escaped."""
    return _environment().get_template(template).render(**values)


def paragraphs(template: str, **values: Any) -> list[str]:
    """Return the paragraphs of a rendered text, which empty lines separate."""
    blocks = render(template, **values).split("\n\n")
    return [" ".join(block.split()) for block in blocks if block.strip()]


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    made = Environment(
        loader=PackageLoader("hpsearch.report"),
        autoescape=select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    made.globals |= {"version": __version__, "formats": formats, "command_line": paths.command_line}
    return made
