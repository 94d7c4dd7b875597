"""What others have keeps working: a project, its hooks and a run folder that the kit made before it had chapters."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import write_rows

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
HOOKS = ("models.create_model", "models.hooked.create_model")


@pytest.fixture
def project(tiny_llama, tmp_path):
    """The old project, with the tiny model in the place of the embedded one."""
    folder = tmp_path / "project"
    shutil.copytree(FIXTURES / "old_project", folder)
    for name in ("configs", "data"):
        (folder / name).mkdir()
    write_rows(folder / "data/sample_data.json")
    values = {
        "model": {"base_model": str(tiny_llama), "lora_r": 2, "lora_alpha": 4},
        "training": {"max_steps": 2, "batch_size": 2, "learning_rate": 0.01, "max_length": 96},
        "data": {"train_file": "data/sample_data.json", "validation_split": 0.2,
                 "load_dataset": "utils.data_utils.load_custom_dataset"},
    }
    (folder / "configs/train_config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder


@pytest.fixture
def old_run(tiny_llama, tmp_path):
    """A run of two steps by the old kit, on the model that `tiny_llama` makes from its seed."""
    run = tmp_path / "old_run"
    shutil.copytree(FIXTURES / "old_run", run)
    write_rows(tmp_path / "rows.json")
    for file in (run / "config.yaml", run / "adapter/adapter_config.json"):
        text = file.read_text(encoding="utf-8").replace("FOLDER/run", str(run))
        text = text.replace("FOLDER", str(tmp_path)).replace("BASE", str(tiny_llama))
        file.write_text(text, encoding="utf-8")
    return run


def script(folder, *words):
    """Run a script of the project as a person would; what it printed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def kit(*words):
    from qlora_kit.launch import run_app  # the old address on purpose

    return run_app([str(word) for word in words])


@pytest.mark.parametrize("hook", HOOKS)
def test_scripts_and_hooks_of_an_old_project_train_and_answer(project, hook):
    script(project, "scripts/train.py", f"model.create_model={hook}")
    run = project / "runs/train_config"
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["steps"] == 2
    script(project, "scripts/inference.py", "Count to 3.")


def test_the_old_module_of_the_commands_runs_as_a_module():
    assert "train" in script(ROOT, "-m", "qlora_kit.launch", "--help")


def test_an_old_run_goes_on_where_it_was(old_run):
    assert kit("train", old_run / "config.yaml", "--resume", old_run, "training.max_steps=4") == 0
    lines = (old_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert json.loads((old_run / "summary.json").read_text(encoding="utf-8"))["steps"] == 4


def test_an_old_run_is_evaluated_as_it_was(old_run, capsys):
    before = json.loads((old_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert kit("evaluate", old_run, "--json") == 0
    after = json.loads(capsys.readouterr().out)
    assert after["loss"] == pytest.approx(before["val_loss"], abs=1e-5)


def test_an_old_run_answers(old_run, capsys):
    assert kit("generate", old_run, "Count to 3.") == 0


@pytest.mark.parametrize("old", ["launch", "loader", "lora", "data"])
def test_old_names_are_the_new_things(old):
    from importlib import import_module

    module = import_module(f"qlora_kit.{old}")
    wanted = {"launch": "train_script inference_script run_app launch launch_command main",
              "loader": "load_model resolve_base load_tokenizer cache_folder",
              "lora": "add_lora save_adapter lora_parameters trainable_table load_adapter",
              "data": "Conversation load_rows load_conversations UserError progress"}[old].split()
    assert not [name for name in wanted if not hasattr(module, name)]
