"""Checkpoint: kills at random moments, exceptions between writes, pruning, draws, settings."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_kit.run import checkpoint
from qlora_kit.run.checkpoint import (
    check_names, check_resume, checkpoint_info, checkpoints, load_checkpoint, newest_checkpoint,
    save_checkpoint, share_step, State)
from qlora_kit.training.engine import seed_step
from qlora_kit.data.files import UserError


def state(step, size=1000):
    return State(step, {f"{what}/w":torch.full((size,), float(step)) for what in ("param", "exp_avg", "exp_avg_sq")}, dict(twice=2*step))


def names(run): return [p.name for p in checkpoints(run)]


KILLER = """
import os, random, signal, sys, time
import torch
from test_checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint, state
torch.set_num_threads(1)
run, found = sys.argv[1], []
save_checkpoint(run, state(1, 200_000))
for kill in range(24):
    saved, tell = os.pipe()
    child = os.fork()
    if child == 0:
        step = load_checkpoint(newest_checkpoint(run)).step
        while True: # every third process saves one step again and again
            step += kill % 3 > 0
            save_checkpoint(run, state(step, 200_000), keep=2)
            os.write(tell, b".")
    os.read(saved, 1) # it has saved once; now at any moment
    time.sleep(random.uniform(0, 0.06))
    os.kill(child, signal.SIGKILL); os.waitpid(child, 0); os.close(saved); os.close(tell)
    loaded = load_checkpoint(newest_checkpoint(run))
    assert all((t == loaded.step).all() for t in loaded.tensors.values()) and len(loaded.tensors) == 3 and loaded.info == dict(twice=2*loaded.step)
    found.append(loaded.step)
assert found == sorted(found) and found[-1] > 16, found
"""


def test_killed_at_random_moments(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path)], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a damaged checkpoint had to be passed over"


def test_exception_between_files_leaves_the_previous_one(tmp_path, monkeypatch):
    first = save_checkpoint(tmp_path, state(1))
    real,written = checkpoint.save_file,[]
    def fails_second(tensors, path):
        written.append(path)
        if len(written) == 2: raise OSError("No space left on device")
        real(tensors, path)
    monkeypatch.setattr(checkpoint, "save_file", fails_second)
    with pytest.raises(OSError, match="No space"): save_checkpoint(tmp_path, state(2))
    assert len(written) == 2 and [p.name for p in (tmp_path/"checkpoints").iterdir()] == ["step-000001"]
    assert newest_checkpoint(tmp_path) == first


def test_stop_between_the_two_renames_of_a_step_saved_twice(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(1))
    real = Path.rename
    def rename(self, target):
        if self.suffix == ".tmp": raise KeyboardInterrupt
        return real(self, target)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt): save_checkpoint(tmp_path, state(1))
    monkeypatch.undo()
    assert load_checkpoint(newest_checkpoint(tmp_path)).step == 1
    save_checkpoint(tmp_path, state(1))
    assert names(tmp_path) == ["step-000001"]


def test_keeps_newest_and_best_and_leaves_a_future_behind(tmp_path):
    for step in (1, 2, 3, 4, 5): save_checkpoint(tmp_path, state(step), keep=1, best_step=2)
    assert names(tmp_path) == ["step-000005", "step-000002"]
    for step in (6, 7): save_checkpoint(tmp_path, state(step), keep=None)
    assert len(names(tmp_path)) == 4
    save_checkpoint(tmp_path, state(3), keep=2) # resumed before step 5
    assert names(tmp_path) == ["step-000003", "step-000002"]
    save_checkpoint(tmp_path, state(4), keep=0)
    assert names(tmp_path) == ["step-000004"]


def test_stop_while_deleting_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(1), keep=1)
    def stops(path, **_):
        if path.exists(): (path/"params.safetensors").unlink(); raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint.shutil, "rmtree", stops)
    with pytest.raises(KeyboardInterrupt): save_checkpoint(tmp_path, state(2), keep=1)
    assert [checkpoint.damage(p) for p in checkpoints(tmp_path)] == [None]


def test_views_and_transposed_tensors_are_written_whole(tmp_path):
    whole = torch.arange(12.).reshape(3, 4)
    views = {"param/row":whole[1], "param/overlap":whole.view(-1)[2:6], "param/t":whole.T, "exp_avg/expanded":torch.ones(1).expand(3)}
    loaded = load_checkpoint(save_checkpoint(tmp_path, State(1, views))).tensors
    assert loaded.keys() == views.keys() and all(torch.equal(loaded[k], views[k]) for k in views)


def test_no_two_steps_or_ranks_share_their_draws():
    def draws(*place): seed_step(*place); return torch.rand(4).tolist()
    places = [(seed, step, rank) for seed in (0, 1, 10**12) for step in (0, 1, 999_999) for rank in (0, 1, 4098)]
    assert len({tuple(draws(*place)) for place in places}) == len(places) and draws(10**12, 5, 1) == draws(10**12, 5, 1)


def test_another_model_is_refused_before_anything_is_touched():
    tensors = {"param/a":torch.zeros(1), "param/b":torch.zeros(2)}
    check_names(tensors, {"a":torch.zeros(1), "b":torch.zeros(2)})
    for names in ({"a":torch.zeros(3), "b":torch.zeros(2)}, {"a":torch.zeros(1)}, {"a":torch.zeros(1), "b":torch.zeros(2), "c":torch.zeros(1)}):
        with pytest.raises(UserError, match="shape of"): check_names(tensors, names)


BASE = dict(model=dict(lora_r=16), training=dict(num_epochs=3, max_steps=None, seed=1, save_steps=10, recompute="none"), data=dict(score="none"),
            deepspeed=dict(offload_optimizer="none"))

@pytest.mark.parametrize("section,key,value,allowed", [
    ("training", "num_epochs", 5, True), ("training", "num_epochs", 2, False), ("training", "max_steps", 10, False), ("training", "save_steps", 99, True),
    ("data", "score", "exact_match", True), ("training", "seed", 2, False), ("model", "lora_r", 8, False), ("training", "recompute", "layer", True), ("deepspeed", "offload_optimizer", "cpu", False)])
def test_which_settings_may_change(section, key, value, allowed):
    new = BASE | {section:BASE[section] | {key:value}}
    if allowed: assert len(check_resume(BASE, new)) == 1
    else:
        with pytest.raises(UserError) as e: check_resume(BASE, new)
        assert f"{section}.{key} (the run: {BASE[section][key]!r}, now: {value!r})" in str(e.value)


def test_all_refused_settings_are_named_and_nothing_else():
    with pytest.raises(UserError) as e: check_resume(BASE, BASE | dict(model=dict(lora_r=8), training=BASE["training"] | dict(seed=2, save_steps=5)))
    first = str(e.value).splitlines()[0]
    assert "model.lora_r" in first and "training.seed" in first and "save_steps" not in first
    assert check_resume(BASE, BASE) == []


def test_a_step_is_shared_by_any_number_of_ranks_or_refused():
    for size in range(1, 65):
        for ranks in range(1, 17):
            for batch_size in (1, 3, 8):
                if size % ranks:
                    with pytest.raises(UserError, match=rf"{size} rows.*{ranks} ranks"): share_step(size, ranks, batch_size)
                    continue
                B, k = share_step(size, ranks, batch_size)
                assert B*k*ranks == size and B <= batch_size
                if size//ranks % batch_size == 0: assert B == batch_size, "the micro-batch changes only where it must"


def test_info_is_read_without_tensors(tmp_path):
    path = save_checkpoint(tmp_path, State(3, {"param/w":torch.ones(2)}, dict(size=4, best=float("inf"))))
    for file in path.glob("*.safetensors"): file.unlink()
    assert checkpoint_info(path) == dict(size=4, best=float("inf"))
