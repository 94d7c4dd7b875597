"""Run folders: resumed as if never interrupted, one run and one process in each, damaged files named."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import losses, run, TIMED
from safetensors.torch import load_file

from qlora_kit.data.files import UserError
from qlora_kit.training.loop import RunFailed
from qlora_kit.run.checkpoint import checkpoints, load_checkpoint
from qlora_kit.run.config import load_config
from qlora_kit.run.monitor import read_metrics
from qlora_kit.run.run_folder import environment, newest_run
from qlora_kit.run.train import train
from qlora_kit.training.engine import RankInfo


@pytest.mark.parametrize("step", [1, 4, 7])
def test_resumed_equals_uninterrupted_to_the_last_bit(whole, tmp_path, step):
    path, full = whole
    cut = tmp_path / "cut"
    shutil.copytree(full.run, cut)
    for checkpoint in checkpoints(cut):  # a power cut after `step`: later checkpoints never came to be
        if load_checkpoint(checkpoint).step > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(cut / "adapter")
    resumed = run(path, f"training.output_dir={cut}", resume=cut)
    assert losses(resumed) == losses(full)
    a, b = (load_checkpoint(checkpoints(r.run)[0]) for r in (full, resumed))
    assert a.step == b.step == full.summary["steps"] and a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)
    files = [load_file(r.run / "adapter/adapter_model.safetensors") for r in (full, resumed)]
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])


def test_resume_refuses_another_learning_rate(whole):
    path, full = whole
    with pytest.raises(UserError, match=r"learning_rate.*0\.01.*0\.02"):
        run(path, f"training.output_dir={full.run}", "training.learning_rate=0.02", resume=full.run)


def test_a_run_is_never_written_over(tiny_config):
    path = tiny_config("twice", training__max_steps=1)
    assert [run(path).run.name for _ in range(3)] == ["twice", "twice-2", "twice-3"]


@pytest.mark.parametrize("name", ["llama", "a[1]b", "50%"])
def test_the_newest_run_is_one_of_this_config(tiny_config, monkeypatch, name):
    """runs/NAME-3 is the third run of NAME.yaml, or the first of NAME-3.yaml; a name may hold what a glob would read."""
    path, other = (tiny_config(stem, training__max_steps=1, training__save_steps=1, training__output_dir=None) for stem in (name, f"{name}-3"))
    monkeypatch.chdir(path.parent)
    runs = [run(p).run.name for p in (path, path, other)]
    assert runs == [name, f"{name}-2", f"{name}-3"]
    assert newest_run(load_config(path), path.stem).name == f"{name}-2" and newest_run(load_config(other), other.stem).name == f"{name}-3"
    (path.parent / f"runs/{name}-3/environment.json").unlink()  # of an older kit, which recorded no name
    assert newest_run(load_config(path), path.stem).name == f"{name}-3"


def test_a_tilde_is_the_home_and_no_folder(tiny_config, monkeypatch):
    path = tiny_config("tilde", training__max_steps=1, training__output_dir="~/runs/tilde")
    monkeypatch.setenv("HOME", str(path.parent / "home"))
    monkeypatch.chdir(path.parent)
    assert run(path).run == path.parent / "home/runs/tilde" and not (path.parent / "~").exists()


def test_no_git_is_no_commit(tiny_config, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment(load_config(tiny_config("plain")), RankInfo())["commit"] is None


def test_resume_refuses_other_rows_and_another_base(tiny_config, tiny_llama, tmp_path, capsys):
    """One letter of one answer, and one number of the base, in place; `--force` goes on and says so."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    path = tiny_config("same", model__base_model=str(base), training__max_steps=2, training__save_steps=1)
    first = run(path)
    shutil.rmtree(checkpoints(first.run)[0])
    rows, weights = path.parent / "rows.json", base / "model.safetensors"
    kept = rows.read_text(), weights.read_bytes()
    rows.write_text(kept[0].replace("Count", "Sum", 1))
    with pytest.raises(UserError, match=r"the training rows \(or .*\) are not those .*--force"): run(path, resume=first.run)
    rows.write_text(kept[0])
    weights.write_bytes(kept[1][:-1] + bytes([kept[1][-1] ^ 1]))
    with pytest.raises(UserError, match="the weights of model.base_model are not those"): run(path, resume=first.run)
    assert train(load_config(path), path.stem, base=path.parent, resume=first.run, force=True).status == "done"
    assert "the run goes on with what is there now" in capsys.readouterr().err


def test_a_run_keeps_the_day_on_which_it_began(tiny_config, tmp_path, monkeypatch):
    """A template that prints today's date, a resume on another day, and the adapter's own record of it."""
    import datetime

    from qlora_kit.data import tokens
    from qlora_kit.run import run_folder
    from qlora_kit.use.trained import load_trained

    def on(day):
        fixed = type("day", (datetime.date,), dict(today=classmethod(lambda cls: datetime.date.fromisoformat(day))))
        for module in (tokens, run_folder): monkeypatch.setattr(module, "date", fixed)

    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %B %Y') }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else '' }}\n{% endfor %}"
                                          "{% if add_generation_prompt %}assistant: {% endif %}")
    path = tiny_config("dated", data__template=str(tmp_path / "dated.jinja"), training__max_steps=4, training__save_steps=2, training__eval_steps=2)
    on("2026-01-31")
    full = run(path)
    expected = losses(full)
    shutil.rmtree(checkpoints(full.run)[0])
    on("2026-02-01")
    again = run(path, resume=full.run)
    assert losses(again) == expected and json.loads((full.run / "environment.json").read_text())["date"] == "2026-01-31"
    assert json.loads((full.run / "adapter/qlora_kit.json").read_text())["date"] == "2026-01-31" == load_trained(str(full.run))[1].chat_date
    with pytest.raises(UserError, match="the training rows"):  # without the record the tokens would be others
        (full.run / "environment.json").unlink()
        run(path, resume=full.run)


def test_resume_keeps_the_rows_of_a_step(whole):
    path, full = whole
    with pytest.raises(UserError, match="4 rows.*8"):
        run(path, f"training.output_dir={full.run}", "training.batch_size=4", resume=full.run)


def test_a_step_is_kept_when_the_checkpoint_came_from_two_ranks(whole, tmp_path):
    """The settings are those of two ranks with two rows each; alone it takes two micro-batches."""
    from qlora_kit.run.checkpoint import checkpoint_info
    from qlora_kit.run.run_folder import keep_step

    path, full = whole
    checkpoint = checkpoints(full.run)[0]
    size = checkpoint_info(checkpoint)["size"]
    assert size == 4
    for batch_size, accumulation, ranks, shares in ((2, 2, 1, (2, 2)), (2, 1, 1, (2, 2)), (2, 2, 2, (2, 1)), (2, 1, 4, (1, 1)), (4, 1, 2, (2, 1))):
        cfg = load_config(path, [f"training.batch_size={batch_size}", f"training.gradient_accumulation_steps={accumulation}"])
        kept = keep_step(cfg, checkpoint, ranks)
        assert (kept.training.batch_size, kept.training.gradient_accumulation_steps) == shares
        assert cfg.training.batch_size == batch_size, "the caller's settings stay as they are"
    with pytest.raises(UserError, match="4 rows.*3 ranks"):
        keep_step(cfg, checkpoint, 3)
    cut = tmp_path / "cut"
    shutil.copytree(full.run, cut)
    for later in checkpoints(cut)[:2]:
        shutil.rmtree(later)
    resumed = run(path, f"training.output_dir={cut}", "training.gradient_accumulation_steps=1", resume=cut)
    assert losses(resumed) == losses(full)


def interrupted(number):
    """Stands in for a part of the run in which the signal comes."""
    def part(*args, **options):
        signal.raise_signal(number)
        pytest.fail("went on after the signal")
    return part


@pytest.mark.parametrize("text", ["", "\0" * 300, "model:\n  base_mod", "- a list", "model: {lora_r: no number}", "\xff"])
def test_a_damaged_config_is_named_and_the_run_goes_on_without_it(whole, tmp_path, capsys, text):
    from qlora_kit.tools.commands import run_app

    path, full = whole
    cut = tmp_path / "cut"
    shutil.copytree(full.run, cut)
    shutil.rmtree(checkpoints(cut)[0])
    (cut / "config.yaml").write_bytes(text.encode("latin-1"))
    words = ["train", str(path), "--resume", str(cut), f"training.output_dir={cut}"]
    assert run_app(words) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and f"{cut}/config.yaml is damaged" in line and f"checkpoints/{checkpoints(cut)[0].name} is whole" in line and "Delete config.yaml" in line
    if text: return
    (cut / "config.yaml").unlink()
    assert run_app(words) == 0
    assert "config.yaml is gone" in capsys.readouterr().err
    assert [{k: v for k, v in r.items() if k not in TIMED} for r in read_metrics(cut)] == losses(full)
    assert (cut / "config.yaml").exists()


def started(path, *words):
    return subprocess.Popen([sys.executable, "-m", "qlora_kit.tools.commands", "train", str(path), *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for(true, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_living_run_is_not_resumed_and_a_killed_one_is_by_one_of_two(tiny_config):
    from qlora_kit.run.monitor import ask

    path = tiny_config("living", training__num_epochs=100_000, training__save_steps=5, training__save_total_limit=2)
    folder, first = path.parent / "runs/living", started(path)
    both = []
    try:
        wait_for(lambda: checkpoints(folder))
        refused = started(path, "--resume", str(folder))
        err = refused.communicate(timeout=120)[1].strip().splitlines()
        assert refused.returncode == 2 and f"process {first.pid} on" in err[-1] and "sign of life" in err[-1] and "control/stop" in err[-1]
        with pytest.raises(UserError, match=f"process {first.pid} on"):
            run(path, resume=folder)
        assert first.poll() is None and json.loads((folder / "state.json").read_text())["pid"] == first.pid
        first.kill(), first.wait()
        both = [started(path, "--resume", str(folder)) for _ in range(2)]
        wait_for(lambda: any(p.poll() is not None for p in both))
        over, lives = sorted(both, key=lambda p: p.poll() is None)
        assert over.returncode == 2 and f"process {lives.pid} on" in over.stderr.read()
        steps = len(read_metrics(folder))
        wait_for(lambda: len(read_metrics(folder)) > steps + 5)
        ask(folder, "stop")
        lives.communicate(timeout=120)
        logged = [r["step"] for r in read_metrics(folder)]
        assert logged == list(range(1, len(logged) + 1)) and json.loads((folder / "state.json").read_text())["state"] == "stopped"
    finally:
        for p in [first, *both]: p.kill(), p.wait()


def test_two_who_start_at_once_get_two_folders(tiny_config):
    path = tiny_config("race", training__max_steps=1)
    both = [started(path) for _ in range(2)]
    for p in both:
        p.communicate(timeout=300)
        assert p.returncode == 0
    assert sorted(p.name for p in (path.parent / "runs").iterdir()) == ["race", "race-2"]
    assert all(json.loads((p / "summary.json").read_text())["steps"] == 1 for p in (path.parent / "runs").iterdir())


def test_a_run_whose_folder_is_given_to_another_writes_nothing_there(tiny_config, monkeypatch):
    from qlora_kit.run import train as module

    path = tiny_config("moved", training__save_steps=1)
    folder, log = path.parent / "runs/moved", module.Monitor.log

    def move(self, record):
        log(self, record)
        if record["step"] == 2:
            folder.rename(folder.with_name("aside"))
            folder.mkdir()
            (folder / "lock").touch()

    monkeypatch.setattr(module.Monitor, "log", move)
    with pytest.raises(RunFailed, match="no longer the folder"):
        run(path)
    assert [p.name for p in folder.iterdir()] in (["lock"], ["lock", "curves.png"])
    assert checkpoints(folder.with_name("aside"))


def test_a_launcher_has_no_last_word_on_a_run_that_another_process_goes_on_with(tmp_path):
    from qlora_kit.tools.processes import last_word
    from qlora_kit.run.monitor import hold, release, write_state

    state = lambda: json.loads((tmp_path / "state.json").read_text())["state"]
    hold(tmp_path)
    write_state(tmp_path, "running")
    last_word(tmp_path)
    assert state() == "running"
    release(tmp_path)
    last_word(tmp_path)
    assert state() == "failed"


def test_a_run_lets_go_of_its_folder_however_it_ends(tiny_config, whole, monkeypatch):
    from qlora_kit.run import monitor
    from qlora_kit.run import train as module

    path, full = whole
    assert not monitor.HELD
    with pytest.raises(UserError, match="learning_rate"):
        run(path, f"training.output_dir={full.run}", "training.learning_rate=0.02", resume=full.run)
    for number in (signal.SIGINT, signal.SIGTERM):
        monkeypatch.setattr(module, "make_engine", interrupted(number))
        with pytest.raises(module.Stopped):
            run(tiny_config("let-go"))
    assert not monitor.HELD
