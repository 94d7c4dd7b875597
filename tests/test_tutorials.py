"""Each tutorial runs top to bottom, real runs and launches included, and shows the numbers that it computes. `make test-tutorials` runs these."""
import tempfile

import pytest
from test_notebooks import TUTORIALS, check_page, one_thread, shells  # noqa: F401 (fixtures)

NAMES = ("first_run", "your_own_data", "fit_your_card", "two_cards", "when_it_goes_wrong")


@pytest.mark.tutorials
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial(page, monkeypatch, tmp_path, one_thread, shells):  # noqa: F811
    import pandas as pd

    pd.reset_option("display.max_colwidth")  # a page before this one may have changed it
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for what it launches; as in `one_thread`, and two threads that share a core with a neighbour are slower than one
    check_page(page, monkeypatch)


def test_every_tutorial_is_there_and_tested():
    assert {p.stem for p in TUTORIALS} == set(NAMES)
