"""Trackers: what reaches TensorBoard, trackio and wandb, on rank 0, offline; and failures that cost nothing but the tracker. The last two are tested where they are installed."""
import json
import os
import sqlite3
import subprocess
import sys

import pytest

from qlora_kit.run import trackers
from qlora_kit.run.config import load_config
from qlora_kit.data.files import UserError
from qlora_kit.run.monitor import Monitor, read_metrics
from qlora_kit.run.assemble import check_choices
from qlora_kit.run.train import train
from qlora_kit.run.trackers import Careful, open_tracker


def run(path, *overrides, **options):
    return train(load_config(path, overrides), path.stem, quiet=True, base=path.parent, **options)


def scalars(folder, name="loss"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(name)]


def test_tensorboard_gets_every_record_once_over_a_resume(tiny_config):
    path = tiny_config("board", training__report_to="tensorboard")
    first = run(path, "training.max_steps=3")
    run(path, "training.max_steps=5", resume=first.run)
    expected = [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in read_metrics(first.run)]
    assert scalars(first.run) == expected and len(expected) == 5
    assert len(scalars(first.run, "mem_peak_gb")) == 5


def test_steps_after_the_checkpoint_are_forgotten(tmp_path):
    for first, loss in ((1, 0.5), (3, 0.25)):
        tracker = open_tracker("tensorboard", tmp_path, {}, first - 1)
        for step in range(first, 5):
            tracker.log({"step": step, "loss": loss, "grad_norm": None, "note": "text"})
        tracker.close()
    assert scalars(tmp_path) == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25)]


def test_none_imports_nothing(tiny_config):
    path = tiny_config("plain", training__max_steps=1)
    code = ("import sys; from pathlib import Path; from qlora_kit.run.config import load_config; from qlora_kit.run.train import train; p = Path(sys.argv[1]);"
            "train(load_config(p), quiet=True, base=p.parent); sys.exit(any(m in sys.modules for m in ('torch.utils.tensorboard', 'wandb', 'trackio')))")
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 0


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_said_before_anything_is_loaded(tiny_config, monkeypatch, name):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    path = tiny_config("missing", training__report_to=name, model__base_model="nobody/nothing")
    with pytest.raises(UserError, match=f"pip install {name}"):
        run(path)
    assert not (path.parent / "runs/missing").exists()
    with pytest.raises(UserError, match="mlflow"):
        trackers.check_tracker("mlflow")


def test_an_unknown_tracker_is_refused_by_the_config(tiny_config):
    with pytest.raises(UserError, match="'trackio'"):
        load_config(tiny_config("unknown", training__report_to="mlflow"))


class Broken:
    """Fails at the record of step 2 and at its end."""

    def __init__(self, *_):
        self.steps = []

    def log(self, record):
        self.steps.append(record["step"])
        if record["step"] == 2:
            raise ConnectionError("the server went away")

    def close(self):
        raise ConnectionError("still away")


def test_a_tracker_that_fails_costs_one_line_and_not_the_run(tiny_config, monkeypatch):
    made = []
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda *args: made.append(Broken()) or made[-1])
    result = run(tiny_config("broken", training__report_to="tensorboard", training__max_steps=5))
    assert result.status == "done" and len(read_metrics(result.run)) == 5 and made[0].steps == [1, 2]
    log = (result.run / "logs/rank-0.log").read_text()
    assert log.count("the server went away") == 1 and "still away" not in log and "tensorboard failed" in log


def test_a_careful_tracker_warns_once_on_stderr_and_an_interrupt_passes(capsys):
    careful = Careful(Broken(), "board")
    for step in (1, 2, 3):
        careful.log({"step": step})
    careful.close()
    assert capsys.readouterr().err.count("\n") == 1

    class Interrupted(Broken):
        def log(self, record):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Careful(Interrupted(), "board").log({"step": 1})


def test_a_tracker_that_cannot_begin_is_an_error(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="could not begin.*set it to none"):
        open_tracker("tensorboard", tmp_path / "run", {})


def test_other_ranks_report_nothing(tmp_path):
    broken = Broken()
    monitor = Monitor(tmp_path, 2, quiet=True, rank=1, also=broken)
    monitor.log({"step": 1, "loss": 1.0})
    monitor.close()
    assert broken.steps == []


def test_tracker_choice_is_checked_by_every_run(tiny_config, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(UserError, match="wandb"):
        check_choices(load_config(tiny_config("checked", training__report_to="wandb")))


def test_trackio_for_real(tiny_config, tmp_path):
    """In a process of its own: where its database lies is read from the environment at import."""
    pytest.importorskip("trackio")
    path, env = tiny_config("trackio", training__report_to="trackio"), {**os.environ, "TRACKIO_DIR": str(tmp_path / "db")}
    for words in (["training.max_steps=3"], ["training.max_steps=5", "--resume", str(tmp_path / "runs/trackio")]):
        done = subprocess.run([sys.executable, "-m", "qlora_kit.tools.commands", "train", str(path), *words], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "Trackio" not in done.stdout
    records = sqlite3.connect(tmp_path / "db/qlora_kit.db").execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, step) for name, step, _ in records] == [("trackio", i) for i in range(1, 6)]
    assert [json.loads(m)["loss"] for *_, m in records] == [r["loss"] for r in read_metrics(tmp_path / "runs/trackio")]


def test_wandb_for_real(tiny_config, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    path = tiny_config("wandb", training__report_to="wandb")
    first = run(path, "training.max_steps=3")
    run(path, "training.max_steps=5", resume=first.run)
    parts = sorted((first.run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(parts) == 2 and parts[0].name == parts[1].name, "a resumed run keeps its id"
    assert wandb.run is None and len(read_metrics(first.run)) == 5
