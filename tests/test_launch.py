"""A scaffolded project, used as a person would use it."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_kit.launch import run_app
from qlora_kit.monitor import read_metrics

BIN = Path(sys.executable).parent


def call(*words, cwd, check=None, **env):
    r = subprocess.run([str(w) for w in words], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600,
                       env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **env})
    assert check is None or r.returncode == check, r.stdout + r.stderr
    return r


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_llama):
    """`qlora-kit new`, then the config pointed at a tiny model and few rows."""
    import yaml

    from conftest import write_rows

    folder = tmp_path_factory.mktemp("project") / "deepspeed_train"
    assert run_app(["new", str(folder)]) == 0
    config = folder / "configs/train_config.yaml"
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    values["model"] |= {"base_model": str(tiny_llama), "lora_r": 4}
    values["training"] |= {"batch_size": 2, "max_steps": 6, "learning_rate": 0.01, "save_steps": 2}
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    write_rows(folder / "data/sample_data.json")
    write_rows(folder / "data/heldout_data.json", 3)
    return folder


def test_the_tree_is_the_one_promised(project):
    promised = """configs/train_config.yaml configs/deepspeed_config.json data/sample_data.json models/__init__.py scripts/train.py
        scripts/inference.py utils/data_utils.py utils/model_utils.py requirements.txt setup.py README.md""".split()
    assert [p for p in promised if not (project / p).is_file()] == []
    assert "nbs/17_launch.ipynb" in (project / "scripts/train.py").read_text()


def test_both_scripts_run_as_they_stand(project):
    r = call("python", "scripts/train.py", cwd=project, check=0)
    assert "held-out score" in r.stdout and "adapter" in r.stdout
    summary = json.loads((project / "runs/train_config/summary.json").read_text())
    assert summary["steps"] == 6 and summary["score_before"] is not None and summary["score_after"] is not None
    r = call("python", "scripts/inference.py", cwd=project, check=0)
    assert r.stderr == ""
    call("python", project / "scripts/inference.py", "Count to 3.", "--max-new-tokens", "4", cwd="/", check=0)


def test_debug_shows_the_first_batch(project):
    r = call("python", "scripts/train.py", "--debug", "training.max_steps=1", "data.score=none", cwd=project, check=0)
    assert "Count to" in r.stdout


def test_sigterm_saves_and_the_run_goes_on(project):
    folder = project / "runs/terminated"
    words = ["python", "scripts/train.py", "training.output_dir=runs/terminated", "training.max_steps=null", "training.num_epochs=60", "data.score=none"]
    process = subprocess.Popen([str(BIN / words[0]), *words[1:]], cwd=project, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (folder.exists() and (folder / "metrics.jsonl").exists() and len(read_metrics(folder)) >= 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    stopped = json.loads((folder / "summary.json").read_text())
    assert stopped["status"] == "SIGTERM"
    r = call(*words[:3], "training.max_steps=null", "training.num_epochs=60", "data.score=none", "--resume", folder, cwd=project, check=0)
    steps = [r["step"] for r in read_metrics(folder)]
    assert steps == sorted(set(steps)) and steps[-1] > stopped["steps"], r.stderr


def test_hooks_of_the_project_are_used(project):
    r = call("python", "scripts/train.py", "training.max_steps=1", "data.score=none", "data.load_dataset=utils.data_utils.load_custom_dataset",
             "model.create_model=models.create_model", cwd=project, check=0)
    assert "adapter" in r.stdout


@pytest.mark.parametrize("words, expected", [
    (["train", "missing.yaml"], "missing.yaml"),
    (["train", "{config}", "training.learnig_rate=1"], "did you mean learning_rate"),
    (["train", "{config}", "training.batch_size=many"], "batch_size"),
    (["train", "{config}", "data.train_file=nowhere.json"], "nowhere.json"),
    (["train", "{config}", "model.base_model=nobody/nothing", "data.score=none"], "base_model"),
    (["train", "{config}", "--resume", "runs/none"], "checkpoint"),
    (["trian"], "train"),
    (["generate", "runs/none", "hello"], "base_model"),
])
def test_a_mistake_is_one_line_and_exit_code_2(project, words, expected, capsys, monkeypatch):
    monkeypatch.chdir(project)
    assert run_app([w.format(config="configs/train_config.yaml") for w in words]) == 2
    err = capsys.readouterr().err
    assert expected in err and "Traceback" not in err and len(err.strip().splitlines()) <= 2


def test_inspect_counts_rows_and_trains_nothing(project, capsys, monkeypatch):
    monkeypatch.chdir(project)
    before = set(project.rglob("*"))
    assert run_app(["inspect", "configs/train_config.yaml", "--rows", "2"]) == 0
    assert "training" in capsys.readouterr().out and {p for p in project.rglob("*") if "__pycache__" not in p.parts} <= before


def test_the_shipped_files_pass_the_checks(tmp_path, monkeypatch):
    from qlora_kit.config import load_config
    from qlora_kit.launch import ASSETS
    from qlora_kit.zero import read_deepspeed, resolve, zero_config

    cfg = load_config(ASSETS / "scaffold/configs/train_config.yaml")
    assert cfg.model.base_model == "smollm2-135m-instruct" and cfg.data.score == "exact_match"
    resolved = resolve(read_deepspeed(ASSETS / "scaffold/configs/deepspeed_config.json"), zero_config())
    assert "auto" not in json.dumps(resolved)


def test_help_has_an_example_for_every_command(capsys):
    for command in ("new", "inspect", "train", "generate"):
        assert run_app([command, "--help"]) == 0
        assert "Example: qlora-kit" in capsys.readouterr().out
