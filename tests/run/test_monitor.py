"""Monitor: kills, terminals and files, strict JSON, going back, long runs."""
import fcntl
import json
import math
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from io import StringIO

import pytest
import torch

from qlora_kit.run import monitor as module
from qlora_kit.data.files import UserError
from qlora_kit.run.monitor import (
    ask, hold, holder, metrics_line, Monitor, plot_curves, read_metrics, read_requests, release,
    replaced, truncate_metrics, write_state)

WRITER = """
import sys
from qlora_kit.run.monitor import Monitor
assert "matplotlib.pyplot" not in sys.modules
monitor = Monitor(sys.argv[1], 10**9, quiet=True)
for step in range(monitor.file.step + 1, 10**9): monitor.log(dict(step=step, loss=1/step))
"""


def write_and_kill(folder, lines):
    before = len(read_metrics(folder))
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)])
    deadline = time.monotonic() + 60
    while len(read_metrics(folder)) < before + lines and process.poll() is None and time.monotonic() < deadline: time.sleep(0.05)
    assert process.poll() is None, "the writer ended by itself"
    process.send_signal(signal.SIGKILL); process.wait()


def test_killed_run_reads_and_goes_on(tmp_path):
    write_and_kill(tmp_path, 50)
    path = tmp_path/"metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7]) # whatever the moment of the kill: a torn last line
    write_and_kill(tmp_path, 50)
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == list(range(1, len(records) + 1)) and len(records) > 90
    elapsed = [r["elapsed_s"] for r in records]
    assert elapsed == sorted(elapsed)


def test_line_is_readable_when_log_returns(tmp_path):
    monitor = Monitor(tmp_path, 2, quiet=True)
    monitor.log(dict(step=1, loss=torch.tensor(0.5, requires_grad=True)))
    assert read_metrics(tmp_path)[0]["loss"] == 0.5
    assert {"mem_gb", "mem_peak_gb", "elapsed_s"} <= read_metrics(tmp_path)[0].keys()
    monitor.close(); monitor.close()
    assert (tmp_path/"curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("columns", [0, 140])
def test_terminal_gets_a_bar_and_a_file_a_few_lines(tmp_path, columns):
    master,slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    with os.fdopen(slave, "w") as terminal:
        monitor = Monitor(tmp_path/"a", 20, stream=terminal)
        for step in range(1, 21): monitor.log(dict(step=step, loss=1/step, lr=1e-4, **({"val_loss":0.25} if step == 10 else {})))
        monitor.say("a line of its own")
        monitor.close()
        shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "20/20" in shown and "val_loss=0.25" in shown and "a line of its own" in shown and "\r" in shown
    lines = StringIO()
    monitor = Monitor(tmp_path/"b", 1000, stream=lines)
    for step in range(1, 1001): monitor.log(dict(step=step, loss=1/step))
    monitor.close()
    assert [line.split()[1] for line in lines.getvalue().splitlines()] == ["1/1000", "1000/1000"]


def test_quiet_and_other_ranks_are_silent(tmp_path, capfd):
    for kind in (dict(quiet=True), dict(rank=1)):
        folder = tmp_path/str(len(kind))/"-".join(kind)
        monitor = Monitor(folder, 2, **kind)
        monitor.log(dict(step=1, loss=1.)); monitor.say("hello"); monitor.close()
        assert folder.exists() == ("quiet" in kind)
    assert capfd.readouterr() == ("", "")


def test_nonfinite_numbers_are_strict_json_and_come_back(tmp_path):
    values = [math.nan, math.inf, -math.inf, torch.tensor(math.nan)]
    (tmp_path/"metrics.jsonl").write_text("".join(metrics_line(dict(step=i, loss=v)) for i,v in enumerate(values)))
    for line in open(tmp_path/"metrics.jsonl"): json.loads(line, parse_constant=pytest.fail)
    read = [r["loss"] for r in read_metrics(tmp_path)]
    assert math.isnan(read[0]) and read[1:3] == [math.inf, -math.inf] and math.isnan(read[3])
    plot_curves(tmp_path)


def test_damage_in_the_middle_names_its_line(tmp_path):
    good = metrics_line(dict(step=1, loss=1.))
    (tmp_path/"metrics.jsonl").write_text(good + '{"step": 2, "lo\n' + good)
    with pytest.raises(UserError, match="line 2"): read_metrics(tmp_path)


def test_truncate_keeps_bytes_and_leaves_no_temporary_file(tmp_path):
    lines = [metrics_line(dict(step=s, loss=1/s)) for s in (10, 20, 30)]
    (tmp_path/"metrics.jsonl").write_text("".join(lines) + '{"step": 4')
    assert truncate_metrics(tmp_path, 20) == 1
    assert (tmp_path/"metrics.jsonl").read_text() == "".join(lines[:2])
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_long_run_is_drawn_with_few_points_and_keeps_its_spike(tmp_path):
    loss = lambda s: 99. if s == 777 else 1 + 1/s
    (tmp_path/"metrics.jsonl").write_text("".join(f'{{"step": {s}, "loss": {loss(s)}}}\n' for s in range(1, 100_001)))
    axes = plot_curves(tmp_path).axes[0]
    assert all(len(line.get_xdata()) <= 1000 for line in axes.lines)
    assert axes.dataLim.y1 >= 99


def test_a_second_reader_gets_each_record_once_it_is_in_the_file(tmp_path):
    class Also:
        seen,closed = [],0
        def log(self, record): self.seen.append((record, read_metrics(tmp_path)[-1]))
        def close(self): self.closed += 1
    also = Also()
    monitor = Monitor(tmp_path, 2, quiet=True, also=also)
    for step in (1, 2): monitor.log(dict(step=step, loss=torch.tensor(1/step)))
    monitor.close(); monitor.close()
    assert [a for a,_ in also.seen] == [b for _,b in also.seen] == read_metrics(tmp_path) and also.closed == 1


def test_a_run_is_asked_in_the_words_it_knows(tmp_path):
    for name in ("save", "stop"): ask(tmp_path, name)
    assert read_requests(tmp_path) == {"save", "stop"}
    with pytest.raises(UserError, match="save or to stop"): ask(tmp_path, "pause")


def test_state_says_how_long_the_run_is(tmp_path):
    assert json.loads(write_state(tmp_path, "running", total=60).read_text())["total"] == 60
    assert json.loads(write_state(tmp_path, "failed", error="boom").read_text())["total"] is None


HOLDER = """
import multiprocessing, subprocess, sys, time
from qlora_kit.run.monitor import hold
hold(sys.argv[1])
fork = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
fork.start()
told = subprocess.Popen(["sleep", "600"], close_fds=False)
print(fork.pid, told.pid, flush=True)
time.sleep(600)
"""


def test_a_killed_process_holds_nothing_though_its_children_live(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    children = [int(pid) for pid in process.stdout.readline().split()]
    try:
        with pytest.raises(UserError, match=f"process {process.pid} on .* ended.* touch .*control/stop"): hold(tmp_path)
        process.kill(); process.wait()
        for pid in children: os.kill(pid, 0)
        hold(tmp_path)
        assert holder(tmp_path)["pid"] == os.getpid()
    finally:
        release(tmp_path)
        for pid in children: os.kill(pid, signal.SIGKILL)


RACER = """
import sys, time
from pathlib import Path
from qlora_kit.data.files import UserError
from qlora_kit.run.monitor import hold
here, me = Path(sys.argv[1]), sys.argv[2]
(here/f"ready-{me}").touch()
while not (here/"go").exists(): pass
try: hold(here); (here/f"held-{me}").touch()
except UserError: (here/f"refused-{me}").touch()
time.sleep(600)
"""


def test_of_several_at_the_same_instant_one_gets_the_folder(tmp_path):
    n, found = 4, lambda what: len(list(tmp_path.glob(f"{what}-*")))
    processes = [subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path), str(i)]) for i in range(n)]
    try:
        deadline = time.monotonic() + 120
        while found("ready") < n and time.monotonic() < deadline: time.sleep(0.05)
        (tmp_path/"go").touch()
        while found("held") + found("refused") < n and time.monotonic() < deadline: time.sleep(0.05)
        assert (found("held"), found("refused")) == (1, n - 1)
    finally:
        for p in processes: p.kill(); p.wait()


def test_the_same_process_does_not_get_it_twice(tmp_path):
    hold(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} on"): hold(tmp_path)
    release(tmp_path); release(tmp_path)
    hold(tmp_path); release(tmp_path)


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("lives", [True, False])
def test_where_locks_prove_nothing_signs_of_life_do(tmp_path, monkeypatch, capfd, locks, lives):
    """A disk that keeps locks to one machine, and one that has none: the file names another machine, which touches it, or does not any more."""
    def none(*args): raise OSError(37, "No locks available")
    monkeypatch.setattr(module, "BEAT", 0.2)
    if not locks: monkeypatch.setattr(module.fcntl, "flock", none)
    (tmp_path/"lock").write_text(json.dumps(dict(pid=1, host="elsewhere")))
    touching = subprocess.Popen([sys.executable, "-c", f"import os, time\nwhile True: os.utime({str(tmp_path/'lock')!r}); time.sleep(0.1)"]) if lives else None
    try:
        if lives:
            with pytest.raises(UserError, match="process 1 on elsewhere"): hold(tmp_path)
        else: hold(tmp_path); release(tmp_path)
    finally:
        if lives: touching.kill(); touching.wait()
    assert "process 1 on elsewhere still trains here" in capfd.readouterr().err


def test_a_holder_touches_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.05)
    hold(tmp_path)
    os.utime(tmp_path/"lock", (0, 0))
    deadline = time.monotonic() + 30
    while (tmp_path/"lock").stat().st_mtime == 0 and time.monotonic() < deadline: time.sleep(0.02)
    assert (tmp_path/"lock").stat().st_mtime > 0
    release(tmp_path)


def test_a_folder_that_was_moved_or_given_away_is_noticed(tmp_path):
    run = tmp_path/"run"
    run.mkdir(); hold(run)
    assert not replaced(run) and not replaced(tmp_path)
    run.rename(tmp_path/"aside")
    assert replaced(run)
    run.mkdir(); (run/"lock").touch()
    assert replaced(run)
    release(run)
    assert not replaced(run)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match="lock: .*may write to"): hold(tmp_path/"nowhere")
