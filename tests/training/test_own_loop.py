"""The loop that README.md shows is a script that runs, alone and on two ranks."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import write_rows

ROOT = Path(__file__).parents[2]


def script(folder, model):
    """The block as it is written, with the tiny model in place of the embedded one."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## A loop of your own.*?```\s*python\n(.*?)```", text, flags=re.S)[1]
    assert "smollm2-135m-instruct" in block
    (folder / "data").mkdir()
    write_rows(folder / "data/sample_data.json")
    (folder / "loop.py").write_text(block.replace("smollm2-135m-instruct", str(model)), encoding="utf-8")


def losses(printed):
    return [float(loss) for loss in re.findall(r"^\d+ ([\d.]+)$", printed, flags=re.M)]


def ran(folder, *words):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([*words, "loop.py"], cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return losses(done.stdout)


def test_the_loop_of_the_readme_runs_alone(tiny_llama, tmp_path):
    script(tmp_path, tiny_llama)
    found = ran(tmp_path, sys.executable)
    assert len(found) == 10 and all(0 < loss < 10 for loss in found)


@pytest.mark.ranks
def test_the_loop_of_the_readme_runs_on_two_ranks(tiny_llama, tmp_path):
    from qlora_kit.training.engine import free_port

    script(tmp_path, tiny_llama)
    found = ran(tmp_path, "deepspeed", "--num_gpus=2", f"--master_port={free_port()}")
    assert len(found) == 10
