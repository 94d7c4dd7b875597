"""Widgets in a real JupyterLab in a real browser. `make test-browser` runs these."""
import json
import os
import re
import time

import psutil
import pytest
from lab import lab  # noqa: F401

from qlora_kit.checkpoint import checkpoints, step_of
from qlora_kit.monitor import read_metrics

pytestmark = pytest.mark.browser

SLOW = """
import os, time
from qlora_kit import train as kit
from qlora_kit.data import load_conversations

seed_step = kit.seed_step

def step(seed, step, rank):
    seed_step(seed, step, rank)
    time.sleep(0.2)
    if os.environ.get("FAIL") == f"{rank} {step}": raise ValueError("boom <b>in row 7</b>")

def load(path):
    kit.seed_step = step
    return load_conversations(path)
"""
IMPORT = "from qlora_kit.dashboard import start, watch"


def shoot(page, name):
    """A screenshot of the notebook, where one is wanted."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.tab.screenshot(path=f"{folder}/{name}.png")


def number(text, name):
    return float(re.search(rf"{name}\s*([\d,.]+)", text)[1].replace(",", ""))


@pytest.fixture(scope="module")
def rows(lab, tiny_llama):
    """A config beside the notebooks: two ranks, hundreds of slow steps."""
    import yaml

    from conftest import write_rows

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


def test_a_run_of_two_ranks_is_started_watched_saved_stopped_and_found_again(lab, rows):
    run = rows / "runs/two"
    page = lab.open("launch", [IMPORT, 'run = start("tiny.yaml", 2, "training.output_dir=runs/two")\nwatch(run)', "6*7", IMPORT + '\nwatch("runs/two")'])
    page.run(0)
    begun = time.monotonic()
    page.run(1)
    page.run(2)
    assert time.monotonic() - begun < 15, "the cells wait for the run"
    board = page.output(1)
    board.get_by_text("starting").wait_for()
    board.get_by_text("running").wait_for(timeout=120_000)
    drawn = lambda: len(board.locator("svg[role=img] polyline").first.get_attribute("points").split())
    page.until(lambda: board.locator("svg[role=img] polyline").count() and drawn() >= 3)
    before = drawn()
    page.until(lambda: drawn() > before)
    assert not checkpoints(run)
    board.get_by_role("button", name="save now").click()
    page.until(lambda: checkpoints(run))
    board.get_by_text(f"step {step_of(checkpoints(run)[0])}", exact=True).wait_for()
    saved = step_of(checkpoints(run)[0])
    page.until(lambda: number(board.inner_text(), "step") > saved + 2)
    shoot(page, "running")
    board.get_by_role("button", name="stop after this step").click()
    board.get_by_text("stopped").wait_for()
    for name in ("save now", "stop after this step"):
        assert board.get_by_role("button", name=name).is_disabled()
    steps = read_metrics(run)[-1]["step"]
    assert saved <= steps == step_of(checkpoints(run)[0]) == json.loads((run / "summary.json").read_text())["steps"]
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2
    assert number(board.inner_text(), "step") == steps
    shoot(page, "stopped")
    page.restart()
    page.run(3)
    again = page.output(3)
    again.get_by_text("stopped").wait_for()
    assert number(again.inner_text(), "step") == steps and again.locator("svg[role=img]").count() == 4
    page.close()


def test_a_restarted_kernel_finds_a_living_run_and_stops_it(lab, rows):
    run = rows / "runs/living"
    page = lab.open("restart", [IMPORT + '\nrun = start("tiny.yaml", 1, "training.output_dir=runs/living")\nwatch(run)', IMPORT + '\nwatch("runs/living")'], dark=True)
    page.run(0)
    page.output(0).get_by_text("running").wait_for(timeout=120_000)
    page.restart()
    page.run(1)
    board = page.output(1)
    board.get_by_text("running").wait_for()
    before = len(read_metrics(run))
    page.until(lambda: number(board.inner_text(), "step") >= before + 5)
    shoot(page, "dark")
    board.get_by_role("button", name="stop after this step").click()
    board.get_by_text("stopped").wait_for()
    assert step_of(checkpoints(run)[0]) == read_metrics(run)[-1]["step"]
    page.close()


def test_the_error_of_the_failing_rank_is_shown_as_text(lab, rows):
    page = lab.open("fail", ["import os\nos.environ['FAIL'] = '1 6'\n" + IMPORT + '\nwatch(start("tiny.yaml", 2, "training.output_dir=runs/failing"))'])
    page.run(0)
    board = page.output(0)
    board.get_by_text("rank 1: ValueError: boom <b>in row 7</b>").first.wait_for(timeout=120_000)
    board.get_by_text("failed").first.wait_for()
    assert "Traceback" in board.locator("pre").inner_text() or "ValueError" in board.locator("pre").inner_text()
    shoot(page, "failed")
    page.close()
