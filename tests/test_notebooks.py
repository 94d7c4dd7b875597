"""Every page runs top to bottom, as nbdev runs it; each page is one test."""
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page(page):
    from nbdev.config import get_config
    from nbdev.test import test_nb

    flags = get_config(ROOT).tst_flags
    passed, _ = test_nb(page, skip_flags=flags.split() if isinstance(flags, str) else flags, basepath=ROOT)
    assert passed, f"{page.name} failed; the traceback is above"
