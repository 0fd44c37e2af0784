"""hpsearch/report/text.py: paragraphs and escaping of templates."""

from __future__ import annotations

import pytest
from jinja2 import DictLoader, UndefinedError

from hpsearch.report import text


@pytest.fixture
def templates(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    made: dict[str, str] = {}
    monkeypatch.setattr(text._TEMPLATES, "loader", DictLoader(made))
    return made


def test_paragraphs_are_separated_by_empty_lines_and_have_single_spaces(templates: dict[str, str]) -> None:
    templates["two.txt.jinja"] = "One\n{{ value }}  line.\n\n\n\nTwo\n. "
    assert text.paragraphs("two", value="&") == ["One & line.", "Two ."]


def test_html_is_escaped_and_a_missing_value_is_an_error(templates: dict[str, str]) -> None:
    templates["page.html.jinja"] = templates["card.md.jinja"] = "{{ value }}"
    assert text.render("page.html.jinja", value="<b>") == "&lt;b&gt;"
    assert text.render("card.md.jinja", value="<b>") == "<b>"
    with pytest.raises(UndefinedError):
        text.render("card.md.jinja")
