"""The parts of the variance against the spread of generated scores."""

from __future__ import annotations

import numpy as np
import pytest

from hpsearch.stats.run_variance import fold_mean_squares


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_the_image_part_is_unbiased_for_few_images(rng: np.random.Generator) -> None:
    finals = [[0.1 * rng.standard_normal((3, 3)) for _ in range(4)] for _ in range(2000)]
    assert np.mean([fold_mean_squares(each)[1] for each in finals]) == pytest.approx(0.1**2 / 3, rel=0.05)
