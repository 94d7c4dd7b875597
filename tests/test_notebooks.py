"""Every page runs top to bottom, as nbdev runs it, and what it computes is what it shows; each page is one test.

Stored outputs are what the docs show. Their numbers are compared with those of this run to 1e-5 of their size; cells that hold times, memory,
versions or rounding errors carry `#| tags: [measured]` and are left out. A page without any compared number fails.

They were stored on an AMD processor. On others PyTorch's matrix library adds in another order, and a hundred steps of training make more of the last
digit than that: there a number may be off by a quarter of its size, or by 0.04, which is more than one answer of thirty-two.
"""
import gc
import json
import math
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
ALL = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
TUTORIALS = [p for p in ALL if p.parent.name == "tutorials" and p.stem != "colab"]  # they start runs and take minutes: tests/test_tutorials.py
PAGES = [p for p in ALL if p not in TUTORIALS]
CPU = Path("/proc/cpuinfo")
SAME = CPU.exists() and "AuthenticAMD" in CPU.read_text(encoding="utf-8")
CLOSE = dict(rel_tol=1e-5, abs_tol=1e-12) if SAME else dict(rel_tol=0.25, abs_tol=0.04)
NUMBER = re.compile(r"(?<![\w.])[-−]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.]*\w)")


def numbers(cell):
    """The numbers in the plain text of a code cell's outputs, in order."""
    texts = ["".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in cell.get("outputs", []) if o.get("name") != "stderr"]  # bars are not stored
    texts = [re.sub(r"<[^>]*>|0x[0-9a-f]+|\x1b\[[\d;]*m", "", t) for t in texts]
    return [float(n.replace("−", "-")) for t in texts for n in NUMBER.findall(t)]


def differences(stored, ran, close=CLOSE):
    """(cells whose numbers differ, how many numbers were compared); both are lists of cells of one page."""
    wrong, compared, by_id = [], 0, {c["id"]: c for c in ran}
    for cell in stored:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "[measured]" in source or "#| eval: false" in source or re.search(r"^#\| (cuda|slow)", source, flags=re.M):
            continue
        a, b = numbers(cell), numbers(by_id[cell["id"]])
        compared += len(a)
        if len(a) != len(b) or not all(math.isclose(x, y, **close) for x, y in zip(a, b)):
            wrong.append(f"{cell['id']}: {source.strip().splitlines()[-1][:100]}\n   stored {a[:12]}\n   ran    {b[:12]}")
    return wrong, compared


@pytest.fixture
def one_thread():
    """The order of a sum, and with it the last digits, must not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shells(monkeypatch):
    """The shells of pages. IPython keeps each of them, and all that its page made, until Python ends: a worker grew to 5 GB."""
    import nbdev.test

    made, shell = [], nbdev.test.CaptureShell
    monkeypatch.setattr(nbdev.test, "CaptureShell", lambda *a, **k: made.append(shell(*a, **k)) or made[-1])
    yield made
    for shell in made: shell.reset()
    made.clear()
    gc.collect()


def check_page(page, monkeypatch):
    """Run a page, and compare its numbers with those that are stored."""
    import nbdev.test
    from nbdev.config import get_config

    ran, flags = [], get_config(ROOT).tst_flags
    monkeypatch.setattr(nbdev.test, "write_nb", lambda nb, path: ran.extend(nb.cells))
    passed, _ = nbdev.test.test_nb(page, skip_flags=flags.split() if isinstance(flags, str) else flags, basepath=ROOT, save=True)
    assert passed, f"{page.name} failed; the traceback is above"
    wrong, compared = differences(json.loads(page.read_text(encoding="utf-8"))["cells"], ran)
    assert not wrong, f"{page.name} shows other numbers than it computes; run it again and store its outputs, or tag the cell\n" + "\n".join(wrong)
    assert compared, f"{page.name} shows no number that can be compared"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page(page, monkeypatch, one_thread, shells):
    check_page(page, monkeypatch)


@pytest.mark.parametrize("near, far, close", [("2.50001", "2.5010", dict(rel_tol=1e-5, abs_tol=1e-12)), ("2.9", "3.5", dict(rel_tol=0.25, abs_tol=0.04))])
def test_a_changed_number_is_found(near, far, close):
    cell = lambda text, source="x": {"id": "a", "cell_type": "code", "source": source, "outputs": [{"data": {"text/plain": text}}]}
    assert differences([cell("loss 2.50000")], [cell(f"loss {near}")], close) == ([], 1)
    assert differences([cell("loss 2.5000")], [cell(f"loss {far}")], close)[0] and differences([cell("1 2")], [cell("1")], close)[0]
    assert differences([cell("1 s", "#| tags: [measured]\nx")], [cell("2 s")], close) == ([], 0)
