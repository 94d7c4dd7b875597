"""What needs a card: the whole run in bf16, and two ranks that share one card."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_kit.run.config import load_config
from qlora_kit.run.monitor import read_metrics

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_a_run_in_bf16_learns_and_resumes(tiny_config):
    """Resumed and uninterrupted differ by no more than atomics reorder: the tiny model uses none, so they are equal."""
    import shutil

    from qlora_kit.run.checkpoint import checkpoints, load_checkpoint
    from qlora_kit.run.train import train

    path = tiny_config("card", training__save_steps=2)
    full = train(load_config(path), path.stem, quiet=True, base=path.parent)
    assert full.summary["last_loss"] < full.summary["first_loss"] - 0.3 and full.summary["mem_peak_gb"] > 0
    cut = path.parent / "runs/cut"
    shutil.copytree(full.run, cut)
    for checkpoint in checkpoints(cut):
        if load_checkpoint(checkpoint).step > 4:
            shutil.rmtree(checkpoint)
    resumed = train(load_config(path, [f"training.output_dir={cut}"]), path.stem, quiet=True, base=path.parent, resume=cut)
    for a, b in zip(read_metrics(full.run), read_metrics(resumed.run)):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)


def test_two_ranks_share_the_card_under_zero3(tiny_config):
    """gloo carries what NCCL refuses; bf16 keeps eight significant bits, hence 2e-2 on the loss."""
    path = tiny_config("one", training__max_steps=5, training__batch_size=4, training__gradient_accumulation_steps=1, model__lora_dropout=0.0)
    two = tiny_config("two", training__max_steps=5, training__batch_size=2, training__gradient_accumulation_steps=1, model__lora_dropout=0.0)
    ds = path.parent / "ds.json"
    ds.write_text('{"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3}}')
    run = lambda *words: subprocess.run([str(w) for w in words], cwd=path.parent, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=400,
                                        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"})
    alone = run(sys.executable, "-c", "import sys; from qlora_kit.tools.commands import main; main()", "train", path)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    script = path.parent / "train.py"
    script.write_text("import sys\nfrom qlora_kit.tools.commands import run_app\nif __name__ == '__main__': sys.exit(run_app(['train', *sys.argv[1:]]))\n")
    both = run(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2", script, two, "--deepspeed", ds)
    assert both.returncode == 0, both.stdout[-3000:] + both.stderr[-3000:]
    for a, b in zip(read_metrics(path.parent / "runs/one"), read_metrics(path.parent / "runs/two")):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-2)
