"""Dashboard and comparison: reading what is new, signs of life, escaping, threads that end, runs that are started. The browser's part is in test_browser.py."""
import json
import os
import re
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest

from qlora_kit.tools import dashboard
from qlora_kit.run.checkpoint import save_checkpoint, State
from qlora_kit.tools.compare import compare, STYLES
from qlora_kit.run.run_folder import lives
from qlora_kit.tools.dashboard import (
    before_folder, BLUE, chart, curves, Dashboard, figures, Follower, GREEN, Line, ORANGE, Overview,
    patience, start, tail, thin, verdict, VIOLET, watch)
from qlora_kit.data.files import UserError
from qlora_kit.run.monitor import (
    metrics_line, MetricsFile, read_metrics, truncate_metrics, write_state)


def write(run, records, mode="w"):
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "metrics.jsonl", mode) as file:
        file.writelines(metrics_line(r) for r in records)


def steps(first, last, **more):
    return [{"step": i, "loss": 1 / i, "elapsed_s": float(i), **more} for i in range(first, last + 1)]


def seen(follower, name="loss"):
    return follower.column(name)[1].tolist()


def test_a_look_reads_only_what_is_new(tmp_path, monkeypatch):
    write(tmp_path, steps(1, 500))
    follower, read = Follower(tmp_path), []
    monkeypatch.setattr(dashboard, "parse_line", lambda line, parse=dashboard.parse_line: read.append(line) or parse(line))
    follower.look()
    assert len(read) == 500
    write(tmp_path, steps(501, 503), "a")
    follower.look()
    assert len(read) == 503 and follower.columns["step"][-1] == 503
    follower.look()
    assert len(read) == 503


def test_a_long_file_comes_in_pieces(tmp_path):
    write(tmp_path, steps(1, 300))
    follower = Follower(tmp_path, most=1000)
    assert follower.look() and 0 < len(follower.columns["step"]) < 300
    while follower.look():
        pass
    assert list(follower.columns["step"]) == list(range(1, 301))


def test_half_a_line_waits_for_its_other_half(tmp_path):
    follower, text = Follower(tmp_path), "".join(map(metrics_line, steps(1, 3)))
    assert follower.look() is False and seen(follower) == []
    for cut in range(len(text) + 1):
        (tmp_path / "metrics.jsonl").write_text(text[:cut])
        follower.look()
        assert len(seen(follower)) == text[:cut].count("\n")
    assert seen(follower) == [r["loss"] for r in read_metrics(tmp_path)]


@pytest.mark.parametrize("after", [1, 30, 200])
def test_a_resumed_run_is_read_anew(tmp_path, after):
    """As a resume does it: two replacements, after which a file system may give the first file's inode away again, then new lines, which may outgrow the old offset."""
    write(tmp_path, steps(1, 50))
    follower = Follower(tmp_path)
    follower.look()
    truncate_metrics(tmp_path, 40)
    file = MetricsFile(tmp_path)
    for record in steps(41, 40 + after, lr=1e-4):
        file.append(record | {"elapsed_s": record["elapsed_s"] + 0.5})
    file.close()
    follower.look()
    assert list(follower.columns["step"]) == list(range(1, 41 + after)) and len(seen(follower, "lr")) == after
    assert follower.columns["elapsed_s"][-1] == 40.5 + after
    (tmp_path / "metrics.jsonl").unlink()
    follower.look()
    assert seen(follower) == []


def test_a_field_that_comes_later_or_is_no_number(tmp_path):
    write(tmp_path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan"), "grad_norm": None}, {"step": 3, "loss": 1.0, "val_loss": 1.5}])
    follower = Follower(tmp_path)
    follower.look()
    assert seen(follower) == [2.0, 1.0] and follower.column("val_loss")[0].tolist() == [3.0] and seen(follower, "grad_norm") == []


@pytest.mark.parametrize("n", [1, 2, 3, 219, 220, 221, 5000])
def test_thin_keeps_extremes_mean_and_ends(n):
    rng = np.random.default_rng(n)
    at, values = np.cumsum(rng.integers(1, 4, n)).astype(float), rng.normal(size=n)
    step, low, mean, high = thin(at, values)
    assert len(step) <= 220 and low.min() == values.min() and high.max() == values.max() and (np.diff(step) > 0).all()
    assert (low <= mean + 1e-12).all() and (mean <= high + 1e-12).all()
    if n < 50:
        assert np.allclose(mean.mean(), values.mean()) and len(step) == n


@pytest.mark.parametrize("values", [[], [1.0], [0.0, 0.0], [3.0] * 40, [1e-300, 1e300]])
def test_charts_of_odd_curves_hold_finite_numbers(values):
    line = Line("a", np.arange(len(values), dtype=float), np.array(values, float))
    drawn = chart("t", [line])
    assert "nan" not in drawn and "inf" not in drawn and drawn.count("<svg") >= 1
    assert ("<circle" in drawn) == (0 < len(values) < 30)


def luminance(colour):
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_curves_stand_out_on_both_backgrounds():
    """3 : 1, what WCAG 2.1 asks of graphics, on JupyterLab's two backgrounds."""
    for colour in (BLUE, ORANGE, GREEN, VIOLET):
        assert 1.05 / (luminance(colour) + 0.05) >= 3 and (luminance(colour) + 0.05) / (luminance("#111111") + 0.05) >= 3, colour


def aged(run, seconds, **changes):
    said = json.loads(write_state(run, "running").read_text())
    beat = (datetime.now(timezone.utc) - timedelta(seconds=seconds)).isoformat()
    (run / "state.json").write_text(json.dumps(said | {"heartbeat": beat} | changes))


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_signs_of_life(tmp_path):
    aged(tmp_path, 1)
    assert verdict(tmp_path) == ("running", "")
    aged(tmp_path, 1, pid=dead_pid())
    assert verdict(tmp_path)[0] == "lost" and "--resume" in verdict(tmp_path)[1]
    aged(tmp_path, 5)
    assert verdict(tmp_path, patience=2)[0] == "silent"
    aged(tmp_path, 5, host="elsewhere", pid=1)
    assert verdict(tmp_path, patience=2)[0] == "lost" and verdict(tmp_path, patience=9) == ("running", "")
    write_state(tmp_path, "failed", error="rank 1: ValueError: boom")
    assert verdict(tmp_path) == ("failed", "rank 1: ValueError: boom")


def test_a_zombie_and_a_reused_number_are_not_alive():
    now = time.time()
    assert lives(os.getpid(), now + 60) and not lives(os.getpid(), now - 1e6), "this process is younger than that sign"
    child = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 20
    while lives(child.pid, now + 60) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not lives(child.pid, now + 60), "it has ended, and nobody has asked for its exit code yet"
    child.wait()


def test_a_run_that_ends_between_two_looks_is_not_lost(tmp_path, monkeypatch):
    aged(tmp_path, 1, pid=dead_pid())
    monkeypatch.setattr(dashboard, "lives", lambda pid, before: write_state(tmp_path, "done") is None)
    assert verdict(tmp_path) == ("done", "")


def test_patience_follows_the_pace(tmp_path):
    assert patience(Follower(tmp_path)) == 900
    for pause, expected in ((0.5, 120), (60.0, 1200)):
        write(tmp_path, [{"step": i, "loss": 1.0, "elapsed_s": pause * i} for i in range(1, 9)])
        follower = Follower(tmp_path)
        follower.look()
        assert patience(follower) == expected


def test_figures_and_time_left(tmp_path):
    write(tmp_path, steps(1, 10) + [{"step": 11, "loss": 0.1, "val_loss": 0.3, "elapsed_s": 11.0}, {"step": 12, "loss": 0.1, "val_loss": 0.4, "elapsed_s": 12.0}])
    write_state(tmp_path, "running", total=72)
    save_checkpoint(tmp_path, State(10, {}))
    follower = Follower(tmp_path)
    follower.look()
    shown = figures(tmp_path, follower, "running")
    assert shown["step"] == "12 of 72 (17%)" and shown["left"] == "01:00" and shown["validation"] == "0.4 (best 0.3, step 11)" and shown["last checkpoint"] == "step 10"
    assert "left" not in figures(tmp_path, follower, "lost")


def test_tail_reads_only_the_end(tmp_path):
    (tmp_path / "log").write_bytes(b"x" * 10**6 + b"\nold\n" + b"first\r\n" + "é\r 50%\r100%\n\n".encode() + b"\x1b[1mlast\x1b[0m")
    assert tail(tmp_path / "log", 3).splitlines() == ["first", "100%", "last"] and tail(tmp_path / "none") == ""
    assert len(tail(tmp_path / "log", 10**6)) < 9000


def evil(tmp_path):
    bad = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    run = tmp_path / "<b>bold"
    write(run, steps(1, 5, **{bad: 1.0}))
    (run / "logs").mkdir()
    (run / "logs/rank-1.log").write_text(bad)
    write_state(run, "failed", error=f"rank 1: ValueError: {bad}")
    return run


def test_what_a_run_wrote_is_never_html(tmp_path):
    run = evil(tmp_path)
    shown = Overview(run)._repr_html_()
    assert not re.search(r"<(script|img|b>bold)", shown) and shown.count("&lt;script&gt;") == 2
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", steps(1, 5))
    write_state(tmp_path / "other", "done")
    for path, bad in ((run, "<script>x</script>"), (tmp_path / "other", "y")):
        (path / "config.yaml").write_text(json.dumps({"data": {"train_file": bad}}))
    shown = compare(run, tmp_path / "other")._repr_html_()
    assert not re.search(r"<(script|img|b>bold)", shown) and "&lt;script&gt;" in shown


def test_watch_without_a_notebook_is_a_table(tmp_path):
    write(tmp_path, steps(1, 5))
    write_state(tmp_path, "done")
    shown = watch(tmp_path)
    assert isinstance(shown, Overview) and re.search(r"done\nstep +5\n", repr(shown))
    with pytest.raises(UserError, match="state.json"):
        watch(tmp_path / "nothing")


def test_watch_in_a_notebook_is_live_where_widgets_are_installed(tmp_path, monkeypatch):
    write_state(tmp_path, "done")
    monkeypatch.setattr(dashboard, "in_notebook", lambda: True)
    assert isinstance(board := watch(tmp_path), Dashboard)
    board.close()
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert isinstance(watch(tmp_path), Overview)
    with pytest.raises(UserError, match="pip install ipywidgets"):
        Dashboard(tmp_path)


def lasts(thread, seconds=10):
    thread.join(seconds)
    return thread.is_alive()


def test_the_thread_of_a_dashboard_ends_with_its_run(tmp_path):
    write(tmp_path, steps(1, 5))
    write_state(tmp_path, "running", total=9)
    board = Dashboard(tmp_path, every=0.02)
    assert "running" in board.header.value and not board.buttons["stop"].disabled
    write(tmp_path, steps(6, 9), "a")
    write_state(tmp_path, "done")
    assert not lasts(board.thread)
    assert "done" in board.header.value and "<b>9</b>" in board.header.value and all(b.disabled for b in board.buttons.values())


def test_the_thread_of_a_dashboard_ends_when_it_is_closed(tmp_path):
    write_state(tmp_path, "running")
    boards = [Dashboard(tmp_path, every=0.02), Dashboard(tmp_path, every=3600)]
    boards[0].box.close()
    boards[1].close()
    assert not lasts(boards[0].thread) and not lasts(boards[1].thread)


def test_a_look_that_fails_is_shown_and_the_next_one_goes_on(tmp_path, monkeypatch):
    write_state(tmp_path, "running")
    board, look = Dashboard(tmp_path, every=0.02), Overview.look
    monkeypatch.setattr(Overview, "look", lambda self: 1 / 0)
    deadline = time.monotonic() + 10
    while "division by zero" not in board.header.value and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "division by zero" in board.header.value
    monkeypatch.setattr(Overview, "look", look)
    write_state(tmp_path, "done")
    assert not lasts(board.thread) and "done" in board.header.value


def test_buttons_write_what_the_run_obeys(tmp_path):
    from qlora_kit.run.monitor import clear_requests, read_requests

    write_state(tmp_path, "running")
    board = Dashboard(tmp_path, every=0.02)
    for name in ("save", "stop"):
        board.buttons[name].click()
        assert read_requests(tmp_path) == {name} and board.buttons[name].disabled and "after this step" in board.buttons[name].description
        clear_requests(tmp_path)
    deadline = time.monotonic() + 10
    while board.buttons["save"].disabled and time.monotonic() < deadline:
        time.sleep(0.01)
    assert board.buttons["save"].description == "save now" and not board.buttons["save"].disabled
    board.close()


def test_nothing_is_drawn_again_when_nothing_is_new(tmp_path, monkeypatch):
    write(tmp_path, steps(1, 5))
    write_state(tmp_path, "running")
    drawn = []
    monkeypatch.setattr(dashboard, "curves", lambda metrics: drawn.append(1) or curves(metrics))
    board = Dashboard(tmp_path, every=3600)
    board.overview.look()
    board.show()
    assert len(drawn) == 1
    write(tmp_path, steps(6, 6), "a")
    board.overview.look()
    board.show()
    assert len(drawn) == 2
    board.close()


def until_over(look, seconds=120):
    deadline = time.monotonic() + seconds
    while look.look():
        assert time.monotonic() < deadline, repr(look) + look.log
        time.sleep(0.1)
    return look


def test_start_returns_at_once_and_the_run_is_tended(tiny_config):
    path = tiny_config("started")
    begun = time.monotonic()
    run = start(path, 1, "training.max_steps=4")
    assert time.monotonic() - begun < 10 and any(t.name == "tend a launch" for t in threading.enumerate())
    look = Overview(run)
    assert look.state == "starting" and look.figures == {}
    until_over(look)
    assert look.state == "done" and look.figures["step"] == "4" and run.run.name == "started" and run.process.wait(60) == 0
    records = read_metrics(run.run)
    (run.run / "metrics.jsonl").write_text("".join(json.dumps(r | {"mem_peak_gb": 50.0}) + "\n" for r in records))  # as if the first part had needed more
    until_over(Overview(start(path, 1, "training.max_steps=6", resume=run.run)))
    assert [r["step"] for r in read_metrics(run.run)] == [1, 2, 3, 4, 5, 6]
    assert json.loads((run.run / "summary.json").read_text())["mem_peak_gb"] == 50.0


def test_a_mistake_is_said_before_or_by_the_run(tiny_config):
    with pytest.raises(UserError, match="learning_rate"):
        start(tiny_config("wrong", training__learnig_rate=1))
    look = until_over(Overview(start(tiny_config("missing", model__target_modules=["nothing"]))))
    assert look.state == "failed" and "nothing" in look.log and look.run is None
    assert before_folder(look.target)[0] == "failed" and "nothing" in look._repr_html_()
    look = until_over(Overview(start(tiny_config("file"), deepspeed="no_such.json")))
    assert look.state == "failed" and "no_such.json" in look.log


def test_compare_shows_what_differs_and_nothing_else(tmp_path):
    for name, rate, state in (("a/demo", 1e-4, "done"), ("b/demo", 1e-3, "running")):
        run = tmp_path / name
        write(run, steps(1, 4))
        (run / "config.yaml").write_text(f"training: {{learning_rate: {rate}, seed: 1, output_dir: {name}}}\nmodel: {{target_modules: [q_proj]}}\n")
        write_state(run, state)
    (tmp_path / "a/demo/summary.json").write_text(json.dumps({"status": "done", "steps": 4, "last_loss": 0.25, "score_after": None}))
    both = compare(tmp_path / "a/demo", tmp_path / "b/demo")
    assert list(both.table.columns) == ["a/demo", "b/demo"] and both.table.loc["training.learning_rate"].tolist() == [1e-4, 1e-3]
    assert not {"training.seed", "training.output_dir", "model.target_modules", "score_after"} & set(both.table.index)
    assert both.table.loc["state"].tolist() == ["done", "running"] and both.table.loc["steps"].tolist() == [4, 4]
    shown = both._repr_html_()
    assert shown.count("<polyline") == 2 and len(set(STYLES[:20])) == 20 and STYLES[0][1] != STYLES[1][1]
    with pytest.raises(UserError, match="two or more"):
        compare(tmp_path / "a/demo")
