from __future__ import annotations

import pytest

from hpsearch.cli.progress import DecodingLines


@pytest.mark.parametrize(
    ("total", "shown"), [(2150, [1, 538, 1075, 1613, 2150]), (8, [1, 2, 4, 6, 8]), (2, [1, 2]), (1, [1])]
)
def test_decoding_is_said_in_a_few_lines(total: int, shown: list[int]) -> None:
    lines: list[str] = []
    show = DecodingLines(lines.append)
    for _ in range(2):
        lines.clear()
        for done in range(1, total + 1):
            show(done, total)
        assert lines == [f"decoding images: {done} of {total}" for done in shown]
