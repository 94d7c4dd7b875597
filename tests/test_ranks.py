"""Several CPU ranks under the real deepspeed launcher. `make test-ranks` runs these; one launch stays in `make test`."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_kit.checkpoint import checkpoints, load_checkpoint
from qlora_kit.launch import run_app
from qlora_kit.monitor import read_metrics

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_llama):
    from conftest import write_rows

    folder = tmp_path_factory.mktemp("ranks") / "deepspeed_train"
    assert run_app(["new", str(folder)]) == 0
    write_rows(folder / "data/rows.json")

    return folder


def settings(tiny_llama, *more):
    return [f"model.base_model={tiny_llama}", "model.lora_r=4", "data.train_file=data/rows.json", "data.score=none", "training.learning_rate=0.01",
            "training.num_epochs=4", *more]


def launch(project, ranks, *words, port=29511):
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    r = subprocess.run([str(BIN / "deepspeed"), f"--num_gpus={ranks}", f"--master_port={port}", "scripts/train.py", "--deepspeed", "configs/deepspeed_config.json", *words],
                       cwd=project, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    return r


def alone(project, *words):
    r = subprocess.run([sys.executable, "scripts/train.py", *words], cwd=project, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600)
    assert r.returncode == 0, r.stdout + r.stderr


def test_five_steps_on_two_ranks_equal_one_process(project, tiny_llama):
    """fp32: another order of the same sums moves a loss by a few roundings (6e-8), and Adam's division enlarges it step by step."""
    common = settings(tiny_llama, "training.max_steps=5", "training.save_steps=5")
    launch(project, 2, *common, "training.batch_size=2", "training.output_dir=runs/two")
    alone(project, *common, "training.batch_size=4", "training.output_dir=runs/one")
    two, one = (project / "runs" / n for n in ("two", "one"))
    assert len(read_metrics(two)) == 5
    for a, b in zip(read_metrics(one), read_metrics(two)):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4) and a["tokens"] == b["tokens"]
    adapters = [load_file(r / "adapter/adapter_model.safetensors") for r in (one, two)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        assert tensor.shape == adapters[1][name].shape and tensor.numel()
        assert (tensor - adapters[1][name]).norm() <= 1e-3 * tensor.norm()
    stage = json.loads((two / "deepspeed.json").read_text())
    assert stage["zero_optimization"]["stage"] == 3 and "auto" not in json.dumps(stage)


@pytest.mark.ranks
def test_two_ranks_resume_to_the_last_bit(project, tiny_llama):
    import shutil

    common = settings(tiny_llama, "training.batch_size=2", "training.max_steps=6", "training.save_steps=3", "model.lora_dropout=0.1")
    launch(project, 2, *common, "training.output_dir=runs/full", port=29512)
    full, cut = project / "runs/full", project / "runs/cut"
    shutil.copytree(full, cut)
    shutil.rmtree(cut / "checkpoints/step-000006")
    launch(project, 2, *common, "training.output_dir=runs/cut", "--resume", "runs/cut", port=29513)
    assert [r["loss"] for r in read_metrics(cut)] == [r["loss"] for r in read_metrics(full)]
    a, b = (load_checkpoint(checkpoints(r)[0]).tensors for r in (full, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)
