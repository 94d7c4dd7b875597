"""`pip install -r requirements.txt` of a project, in an environment that knows nothing yet."""
import subprocess
import sys

import pytest

from qlora_kit.tools.commands import run_app


@pytest.mark.fresh
def test_requirements_install_the_kit_that_made_the_project(tmp_path, tiny_llama):
    from conftest import write_rows

    project = tmp_path / "deepspeed_train"
    assert run_app(["new", str(project)]) == 0
    write_rows(project / "data/rows.json")
    python = tmp_path / "env/bin/python"

    def run(*words):
        r = subprocess.run([str(w) for w in words], cwd=project, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1500)
        assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-2000:]
        return r

    run(sys.executable, "-m", "venv", tmp_path / "env")
    run(python, "-m", "pip", "install", "-q", "-r", "requirements.txt")
    where = run(python, "-c", "import qlora_kit, importlib.metadata as m; print(m.version('qlora_kit'), qlora_kit.__file__)").stdout
    assert str(tmp_path) in where, where
    trained = run(python, "scripts/train.py", f"model.base_model={tiny_llama}", "data.train_file=data/rows.json", "data.score=none", "training.max_steps=2")
    assert "adapter" in trained.stdout
    assert (project / "runs/train_config/adapter/adapter_model.safetensors").exists()
