"""Widgets in a real JupyterLab in a real browser. `make test-browser` runs these."""
import json
import re
import shutil
import time
from pathlib import Path

import psutil
import pytest
import yaml

from conftest import write_rows
from lab import jupyter
from qlora_kit.run.checkpoint import checkpoints, step_of
from qlora_kit.run.monitor import read_metrics

pytestmark = pytest.mark.browser

SLOW = """
import os, time
from qlora_kit.training import loop
from qlora_kit.data.rows import load_conversations

seed_step = loop.seed_step

def step(seed, step, rank):
    seed_step(seed, step, rank)
    time.sleep(0.2)
    if os.environ.get("FAIL") == f"{rank} {step}": raise ValueError("boom <b>in row 7</b>")

def load(path):
    loop.seed_step = step
    return load_conversations(path)
"""
DASHBOARD = "from qlora_kit.tools.dashboard import start, watch\n"
CHAT = """
import torch
from qlora_kit.use.chat import SideBySide
from qlora_kit.model.loader import load_model
from qlora_kit.model.base import load_tokenizer
from qlora_kit.model.lora import add_lora, lora_parameters
model = add_lora(load_model({folder!r}), r=4, alpha=8, seed=0).eval()
with torch.no_grad():
    for name, p in lora_parameters(model).items(): p += 0.1*("lora_B" in name)
SideBySide(model, load_tokenizer({folder!r}))
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with jupyter(tmp_path_factory.mktemp("jupyter"), tmp_path_factory.mktemp("notebooks")) as lab:
        yield lab


def number(text, name):
    return float(re.search(rf"{name}\s*([\d,.]+)", text)[1].replace(",", ""))


def move(page, box, name, key="ArrowRight", times=3):
    """Move the slider `name` with the keyboard."""
    box.locator(".widget-hslider", has_text=name).locator(".noUi-handle").focus()
    for _ in range(times):
        page.tab.keyboard.press(key)


def test_a_page_runs_top_to_bottom_and_a_script_in_its_data_stays_text(lab):
    shutil.copy(Path(__file__).parent.parent / "nbs/data/05_inspector.ipynb", lab.folder)
    page, dialogs = lab.open("05_inspector"), []
    page.tab.on("dialog", lambda d: (dialogs.append(d.message), d.dismiss()))
    page.run_all(120)
    box = page.tab.locator(".jp-NotebookPanel:visible .jp-OutputArea-output", has=page.tab.get_by_role("button", name="batches"))
    for _ in range(6):
        box.get_by_role("button", name="next").click()
    box.get_by_text("talks.json row 7", exact=True).wait_for()
    assert "<script>alert(1)</script>" in re.sub("[^ -~]", "", box.inner_text()).replace("\n", "") and box.locator("script").count() == 0
    box.get_by_role("button", name="batches").click()
    box.get_by_text("document 1,").first.wait_for()
    assert not dialogs
    page.close()


def test_bars_move_in_a_notebook_and_one_is_left(lab):
    work = "import time\nfrom qlora_kit.data.files import progress\nfor _ in progress(range(25), 'slow work'): time.sleep(0.1)"
    log = "from qlora_kit.run.monitor import Monitor\nm = Monitor('bar', 20)\nfor i in range(1, 21): m.log({'step': i, 'loss': 1/i}); time.sleep(0.05)\nm.close()"
    page = lab.open("bars", [work, log])
    page.cell(0).locator(".cm-content").click()
    page.tab.keyboard.press("Shift+Enter")
    page.output(0).get_by_text("slow work").wait_for()
    page.ran(0)
    page.until(lambda: "slow work" not in page.output(0).inner_text())
    page.run(1)
    page.until(lambda: "20/20" in page.output(1).inner_text())
    assert page.output(1).inner_text().strip().count("\n") == 0
    page.close()


def test_a_slider_of_the_explorer_changes_the_error(lab):
    page = lab.open("explorer", ["import torch\nfrom qlora_kit.model.explorer import explore_layers\ntorch.manual_seed(0)\nexplore_layers({'layer': torch.randn(256, 256)})"])
    page.run(0)
    box = page.output(0)
    box.get_by_text("largest error").wait_for()
    before = box.inner_text()
    move(page, box, "outlier", times=20)
    page.until(lambda: "outliers at 20" in box.inner_text())
    assert re.search(r"[\d.]+%", box.inner_text())[0] != re.search(r"[\d.]+%", before)[0]
    box.get_by_role("button", name="int4").click()
    page.until(lambda: "int4, blocks of 64" in box.inner_text())
    page.close()


def test_a_slider_of_the_planner_changes_the_number_and_its_config_is_saved(lab):
    page = lab.open("planner", ["from qlora_kit.memory.planner import Planner\nPlanner('llama-3.2-1b-1x16gb', memory=16)"])
    page.run(0)
    box = page.output(0)
    said = box.get_by_text("fits:")
    said.wait_for()
    before = said.inner_text()
    move(page, box, "batch")
    page.until(lambda: "fits:" in box.inner_text() and said.inner_text() != before)
    assert box.locator("img[alt^='Memory of each card']").is_visible()
    box.get_by_role("button", name="save config").click()
    box.get_by_text("written: planned.yaml").wait_for()
    assert (lab.folder / "planned.yaml").read_text().startswith("# qlora-kit train planned.yaml")
    page.close()


def test_both_sides_of_the_chat_answer_and_markup_does_nothing(lab, tiny_llama):
    page = lab.open("chat", [CHAT.format(folder=str(tiny_llama))])
    page.run(0)
    box = page.output(0)
    box.locator("textarea").fill("<img src=x onerror=\"document.title='harm'\">")
    box.get_by_role("button", name="ask both").click()
    box.get_by_text("done", exact=True).wait_for()
    cells = box.locator("tbody td")
    assert cells.count() == 3 and cells.nth(0).inner_text().startswith("<img") and cells.nth(1).inner_text() and cells.nth(2).inner_text()
    assert page.tab.title() != "harm" and box.locator("td img").count() == 0
    page.close()


@pytest.fixture(scope="module")
def rows(lab, tiny_llama):
    """A config beside the notebooks, of a run of hundreds of slow steps."""
    write_rows(lab.folder / "rows.json")
    (lab.folder / "slow.py").write_text(SLOW)
    values = {
        "model": {"base_model": str(tiny_llama), "lora_r": 4},
        "training": {"num_epochs": 500, "batch_size": 2, "learning_rate": 0.01, "max_length": 96, "save_steps": 1000, "eval_steps": 50},
        "data": {"train_file": "rows.json", "validation_split": 0.2, "load_dataset": "slow.load"},
    }
    (lab.folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    yield lab.folder
    for process in psutil.process_iter():  # what a failed test has left running
        try:
            if process.cwd() == str(lab.folder) and "train" in process.cmdline():
                process.kill()
        except psutil.Error:
            pass


def test_two_ranks_are_started_saved_found_by_a_new_kernel_stopped_and_found_again(lab, rows):
    run, attach = rows / "runs/two", DASHBOARD + 'watch("runs/two")'
    page = lab.open("launch", [DASHBOARD + 'watch(start("tiny.yaml", 2, "training.output_dir=runs/two"))', "6*7", attach])
    begun = time.monotonic()
    page.run(0)
    page.run(1)
    assert time.monotonic() - begun < 30, "the cells wait for the run"
    board = page.output(0)
    board.get_by_text("starting").wait_for()
    board.get_by_text("running").wait_for(timeout=120_000)
    points = lambda board: len(board.locator("svg[role=img] polyline").first.get_attribute("points").split())
    page.until(lambda: board.locator("svg[role=img] polyline").count() and points(board) >= 3)
    before = points(board)
    page.until(lambda: points(board) > before)
    assert not checkpoints(run)
    board.get_by_role("button", name="save now").click()
    page.until(lambda: checkpoints(run))
    saved = step_of(checkpoints(run)[0])
    board.get_by_text(f"step {saved}", exact=True).wait_for()

    page.restart()
    page.run(2)
    board = page.output(2)
    board.get_by_text("running").wait_for()
    page.until(lambda: number(board.inner_text(), "step") > saved + 2)
    board.get_by_role("button", name="stop after this step").click()
    board.get_by_text("stopped").wait_for()
    for name in ("save now", "stop after this step"):
        assert board.get_by_role("button", name=name).is_disabled()
    steps = read_metrics(run)[-1]["step"]
    assert saved < steps == step_of(checkpoints(run)[0]) == json.loads((run / "summary.json").read_text())["steps"]
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2

    page.restart()
    page.run(2)
    again = page.output(2)
    again.get_by_text("stopped").wait_for()
    assert number(again.inner_text(), "step") == steps and again.locator("svg[role=img]").count() == 4
    page.close()


def test_the_error_of_a_failed_run_is_shown_as_text(lab, rows):
    page = lab.open("fail", ["import os\nos.environ['FAIL'] = '0 6'\n" + DASHBOARD + 'watch(start("tiny.yaml", 1, "training.output_dir=runs/failing"))'])
    page.run(0)
    board = page.output(0)
    board.get_by_text("ValueError: boom <b>in row 7</b>").first.wait_for(timeout=120_000)
    board.get_by_text("failed").first.wait_for()
    assert "ValueError" in board.locator(".widget-html pre").inner_text()
    page.close()
