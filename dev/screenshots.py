"""Stills of the widgets as the pages make them: python dev/screenshots.py FOLDER [WIDGET ...]; the good ones go to nbs/images.

Each page is run from its first cell to the one that shows the widget; then the widget is used a little, and photographed in both themes.
"""
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from PIL import Image

from lab import jupyter

NBS = Path(__file__).parent.parent / "nbs"


def inspector(page, box):
    for _ in range(6):
        box.get_by_role("button", name="next").click()
    box.get_by_text("row 7", exact=False).first.wait_for()


def explorer(page, box):
    box.locator(".widget-hslider", has_text="outlier").locator(".noUi-handle").focus()
    for _ in range(20):
        page.tab.keyboard.press("ArrowRight")
    page.until(lambda: "outliers at 20" in box.inner_text())


def planner(page, box):
    page.until(lambda: "fits:" in box.inner_text() or "smallest change" in box.inner_text())


def chat(page, box):
    box.locator("textarea").fill("Who painted the Mona Lisa?")
    box.get_by_role("button", name="ask both").click()
    page.until(lambda: "done" in box.inner_text(), 120)


WIDGETS = {inspector: ("data/05_inspector", "inspect_rows(smol, rows, max_length=128"), explorer: ("model/04_explorer", "explore_layers(weights, layer)"),
           planner: ("memory/03_planner", 'Planner("'), chat: ("use/03_chat", "comparison\n")}


def cells_until(name, begins):
    """The code of a page, up to the cell that shows a widget."""
    codes = [c.source.replace("#| tags: [measured]\n", "") for c in nbformat.read(NBS / f"{name}.ipynb", 4).cells if c.cell_type == "code"]
    return codes[: next(i for i, c in enumerate(codes) if f"{c}\n".startswith(begins)) + 1]


def shoot(lab, folder, use, name, begins):
    """Two pictures of one widget."""
    codes = cells_until(name, begins)
    page = lab.open(name, codes, size=(1080, 1400))
    page.command("application:toggle-left-area")
    page.run_all(300)
    box = page.output(len(codes) - 1)
    use(page, box)
    for theme in ("Light", "Dark"):
        page.command("apputils:change-theme", theme=f"JupyterLab {theme}")
        page.tab.locator(f"body[data-jp-theme-name='JupyterLab {theme}']").wait_for(state="attached")
        page.tab.wait_for_timeout(1000)
        file = folder / f"{use.__name__}_{theme.lower()}.png"
        box.locator(".jp-OutputArea-output").last.screenshot(path=file)
        Image.open(file).convert("RGB").quantize(200, dither=Image.Dither.NONE).save(file, optimize=True)
    page.close()


if __name__ == "__main__":
    folder, wanted = Path(sys.argv[1]), sys.argv[2:]
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as work, jupyter(Path(home), Path(work)) as lab:
        for use, (name, begins) in WIDGETS.items():
            if not wanted or use.__name__ in wanted:
                shoot(lab, folder, use, name, begins)
