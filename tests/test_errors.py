"""Messages show no credentials."""

from __future__ import annotations

import pytest

from hpsearch.errors import redact


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("postgresql://user:secret@host/db", "postgresql://***@host/db"),
        ("postgresql+psycopg://user:se/c@ret@host:5432/db", "postgresql+psycopg://***@host:5432/db"),
        ("cannot reach https://token@host/mlflow: refused", "cannot reach https://***@host/mlflow: refused"),
        ("mysql://host/db?user=me&password=secret&x=1", "mysql://host/db?user=me&password=***&x=1"),
        ("http://host:5000/path and a@b", "http://host:5000/path and a@b"),
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
    ],
)
def test_redact_hides_credentials_and_nothing_else(text: str, redacted: str) -> None:
    assert redact(text) == redacted
