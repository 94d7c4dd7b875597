"""What the first pages tell a person to type: each command runs here, on the tiny model, or is one that `make` knows."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import write_rows

ROOT = Path(__file__).parent.parent
WORDS = ("make", "qlora-kit", "python", "deepspeed", "source", "cd", "uv", "touch", "DS_ACCELERATOR=cpu")
OTHERS = {  # what runs it elsewhere, because it installs or launches for minutes
    "source .venv/bin/activate": "the shell's",
    "deepspeed": "tests/run/test_ranks.py",
    "DS_ACCELERATOR=cpu deepspeed": "tests/run/test_ranks.py",
    "uv": "needs a network",
    "touch .venv/.installed": "the shell's",
}


def commands(text):
    """The lines of indented or fenced blocks, and of a table's first column, that begin with a command."""
    lines = re.findall(r"^    (\S.*)$", text, flags=re.M)
    lines += [line for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S) for line in block.splitlines()]
    lines += re.findall(r"^\| `([^`]+)` \|", text, flags=re.M)
    lines += re.findall(r"`((?:make|qlora-kit) [^`]+)`", text)
    return [line.split("  #")[0].strip() for line in lines if line.split()[:1] and line.split()[0] in WORDS]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def targets():
    return set(re.findall(r"^([a-z-]+):", text_of("Makefile"), flags=re.M))


@pytest.mark.parametrize("page", ["README.md", "README.zh.md", "CONTRIBUTING.md"])
def test_make_knows_every_target(page):
    named = {word for line in commands(text_of(page)) if line.startswith("make ") for word in line.split()[1:2]}
    assert named and named <= targets(), named - targets()


def test_both_readmes_have_the_same_commands():
    assert {c for c in commands(text_of("README.md")) if "inference" not in c} == {c for c in commands(text_of("README.zh.md")) if "inference" not in c}


@pytest.mark.parametrize("page", ["README.md", "README.zh.md", "CONTRIBUTING.md"])
def test_options_and_commands_of_the_console_script_exist(page):
    import typer

    from qlora_kit.tools.commands import app

    known = typer.main.get_command(app).commands
    for line in commands(text_of(page)):
        if line.startswith("qlora-kit "):
            name, *rest = shlex.split(line)[1:]
            assert name in known, line
            options = {o for p in known[name].params for o in p.opts}
            assert {w.split("=")[0] for w in rest if w.startswith("--")} <= options | {"--help"}, line


def test_the_commands_for_ones_own_data_run_in_their_order(tiny_llama, tmp_path):
    """In an empty folder, as they are written; between `cd` and the first script the tiny model takes the embedded one's place."""
    lines = [c for c in commands(text_of("README.md")) if not c.startswith(("make", *OTHERS))]
    start = lines.index("qlora-kit new deepspeed_train")
    folder, ran = tmp_path, []
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/qlora-kit").write_text(f'#!/bin/sh\nexec {sys.executable} -m qlora_kit.launch "$@"\n', encoding="utf-8")
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    for file in (tmp_path / "bin").iterdir():
        file.chmod(0o755)
    for line in dict.fromkeys(lines[start:]):
        if line.startswith("cd "):
            folder = folder / line.split()[1]
            shrink(folder, tiny_llama)
        elif line.startswith(("qlora-kit new", "qlora-kit inspect configs", "python scripts")):
            done = subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            ran.append(line.split()[:2])
    assert ["python", "scripts/train.py"] in ran and ["python", "scripts/inference.py"] in ran and len(ran) >= 3


def shrink(folder, model):
    path = folder / "configs/train_config.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["model"] |= {"base_model": str(model), "lora_r": 2}
    values["training"] |= {"max_steps": 2, "eval_steps": 2}
    values["data"] |= {"score": "none"}
    values["data"].pop("score_file")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    write_rows(folder / "data/sample_data.json")


def test_files_that_the_pages_name_exist():
    for page in ("README.md", "README.zh.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", text_of(page)):
            assert (ROOT / link).exists(), f"{page}: {link}"


def test_an_unknown_target_would_be_seen():
    assert commands("    make nothing-of-this\n") == ["make nothing-of-this"] and "nothing-of-this" not in targets()
