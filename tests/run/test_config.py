"""Config: every way to get a file wrong, the original config as it stands, and where inputs are looked for."""
import os
import subprocess
import sys

import pytest

from qlora_kit.run.config import (
    check_values, find_input, is_own, load_config, load_hook, read_yaml, RunConfig)
from qlora_kit.data.files import UserError

SPEC = """
model:    {base_model: "microsoft/DialoGPT-medium", lora_r: 16, lora_alpha: 32, lora_dropout: 0.1}
training: {num_epochs: 3, batch_size: 4, learning_rate: 2e-4, max_length: 512}
data:     {train_file: "data/sample_data.json", validation_split: 0.1}
"""


@pytest.fixture
def project(tmp_path):
    """configs/ and data/ side by side; returns a function that writes the config and loads it."""
    for name in ("configs", "data"): (tmp_path / name).mkdir()
    (tmp_path / "data/sample_data.json").write_text("[]")
    path = tmp_path / "configs/run.yaml"

    def load(text=SPEC, *overrides):
        path.write_text(text)
        return load_config(path, overrides)

    load.folder = tmp_path
    return load


def test_the_original_config_loads_as_it_stands(project):
    cfg = project()
    assert cfg.model.base_model == "microsoft/DialoGPT-medium" and (cfg.model.lora_r, cfg.model.lora_alpha, cfg.model.lora_dropout) == (16, 32, 0.1)
    assert (cfg.training.num_epochs, cfg.training.batch_size, cfg.training.learning_rate, cfg.training.max_length) == (3, 4, 2e-4, 512)
    assert cfg.data.validation_split == 0.1 and cfg.data.train_file == str((project.folder / "data/sample_data.json").resolve())


DATA = "data: {train_file: data/sample_data.json}\n"

@pytest.mark.parametrize("text,says", [
    (DATA + "training:\n  learnig_rate: 1", r"run.yaml:3: unknown key training.learnig_rate; did you mean learning_rate\?"),
    (DATA + "model:\n  seed: 1", "run.yaml:3: unknown key model.seed; it belongs to the section training"),
    (DATA + "deepspeed:\n  zzz: 1", "unknown key deepspeed.zzz; known here: stage, offload_param"),
    (DATA + "trainning: {}", r"run.yaml:2: unknown key trainning; did you mean training\?"),
    (DATA + "training:\n  batch_size: yes", "run.yaml:3: training.batch_size is True; input should be a valid integer"),
    (DATA + "training:\n  learning_rate: fast", "run.yaml:3: training.learning_rate is 'fast'; input should be a valid number"),
    (DATA + "training:\n  batch_size: 0", "run.yaml:3: training.batch_size is 0; input should be greater than or equal to 1"),
    (DATA + "model:\n  quant_type: int4", "run.yaml:3: model.quant_type is 'int4'; input should be 'nf4', 'fp4' or 'none'"),
    (DATA + "model:\n  target_modules: 3", "run.yaml:3: model.target_modules is 3; input should be a valid string or input should be a valid list"),
    (DATA + "training:\n  seed: 1\n  seed: 2", "run.yaml:4: training.seed stands on line 3 already"),
    (DATA + "model:\n  lora_r: 16\n lora_alpha: 32", "run.yaml:4: not valid YAML"),
    (DATA + "training: fast", "training must hold settings"),
    ("- 1", "the file must hold settings"),
    ("training: {seed: 1}", "data is missing; add data: {train_file"),
    ("training:\ndata:\n  validation_split: 0.1", "run.yaml:2: data.train_file is missing"),
    ("data: {train_file: data/nothing.json}", "data.train_file: 'data/nothing.json' was not found; looked in"),
    (DATA + "model: {base_model: ./nothing}", "model.base_model: './nothing' was not found"),
    ("data: {train_file: data/sample_data.json, score: exact_match}", "data.score_file must name the rows"),
])
def test_every_mistake_is_named(project, text, says):
    with pytest.raises(UserError, match=says): project(text)


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(UserError) as e: check_values({"model": {"lora_r": 0, "seed": 1}})
    assert len(str(e.value).splitlines()) == 3


@pytest.mark.parametrize("word,says", [
    ("learning_rate=1", "is no override; write section.key=value"), ("training.learning_rate", "is no override"),
    ("model.target_modules=[a", "not valid YAML"), ("training.batch_size=many", "^command line: training.batch_size is 'many'"),
    ("trainning.seed=1", "^command line: unknown key trainning"), ("training.sead=1", r"^command line: unknown key training.sead; did you mean seed\?")])
def test_a_wrong_override_is_not_blamed_on_the_file(project, word, says):
    with pytest.raises(UserError, match=says): project(SPEC, word)


def test_overrides_mean_what_they_mean_in_the_file(project):
    cfg = project(SPEC, "training.learning_rate=1e-4", "training.max_steps=null", "model.target_modules=[q_proj, v_proj]", "training.output_dir=a=b")
    assert cfg.training.learning_rate == 1e-4 and cfg.training.max_steps is None
    assert cfg.model.target_modules == ["q_proj", "v_proj"] and cfg.training.output_dir == "a=b"


def test_a_commented_out_section_means_its_defaults(project):
    assert project(DATA + "training:\n#  seed: 1\n").training == RunConfig.model_validate({"data": {"train_file": "x"}}).training


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="No such file"): read_yaml(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"data: {train_file: \xe9}")
    with pytest.raises(UserError, match="not UTF-8"): read_yaml(tmp_path / "latin.yaml")


def test_inputs_are_looked_for_beside_the_config_then_its_parent_then_here(tmp_path, monkeypatch):
    base, here = tmp_path / "project/configs", tmp_path / "here"
    here.mkdir(); base.mkdir(parents=True)
    monkeypatch.chdir(here)
    for place in (here, base.parent, base):
        (place / "rows.json").write_text("[]")
        assert find_input("rows.json", base) == (place / "rows.json").resolve()


HOOKED = "data: {train_file: data/sample_data.json, load_dataset: %s}\n"


@pytest.mark.parametrize("name", ["os.system", "subprocess:run", "shutil.rmtree", "yaml.safe_load", "builtins.eval", "qlora_kit.tools.commands.main", "qlora_kit.data.rows.load_rows"])
def test_a_config_names_functions_of_its_own_project_only(project, monkeypatch, name):
    """Not of Python, of a library or of the kit, although all of them can be imported."""
    monkeypatch.chdir(project.folder)
    with pytest.raises(UserError, match="^data.load_dataset is|configs/run.yaml: data.load_dataset is .*own project only.*import what you need in a file there"):
        project(HOOKED % f'"{name}"')
    with pytest.raises(UserError, match="own project only"): load_hook(name, project.folder / "configs", "data.load_dataset")


@pytest.mark.parametrize("name", ["..outside.load", "../outside.load", "/{outside}.load", ".outside.load", "outside", "outside.", "", "a b.load", "outside.__import__", "__builtins__.eval",
                                  "__import__('os').system", "outside.load()", "outside::load", "outside.load\n"])
def test_a_name_that_is_no_name_is_not_looked_for(project, name):
    outside = project.folder.parent / "outside.py"
    outside.write_text("raise SystemExit('was imported')")
    with pytest.raises(UserError, match="no module.function"):
        load_hook(name.format(outside=outside.with_suffix("")), project.folder / "configs", "data.load_dataset")


@pytest.mark.parametrize("link", ["linked.py", "linked", "package/__init__.py"])
def test_a_link_out_of_the_project_is_refused(project, tmp_path_factory, link):
    """The module itself, its folder, or only the package above it, whose file would run first."""
    outside = tmp_path_factory.mktemp("outside")
    for name in ("linked.py", "__init__.py"): (outside / name).write_text("raise SystemExit('was imported')")
    (project.folder / "package").mkdir()
    (project.folder / "package/inner.py").write_text("def load(path): return []")
    target = {"linked.py": outside / "linked.py", "linked": outside, "package/__init__.py": outside / "__init__.py"}[link]
    (project.folder / link).symlink_to(target)
    name = {"linked.py": "linked.load", "linked": "linked.linked.load", "package/__init__.py": "package.inner.load"}[link]
    with pytest.raises(UserError, match="leads out of the project"): load_hook(name, project.folder / "configs", "data.load_dataset")


IMPORTER = """
import sys
del sys.path[0]  # the current folder, which -c puts there
from pathlib import Path
from qlora_kit.run.config import load_hook
load = load_hook(sys.argv[1], Path("configs"), "data.load_dataset")
print(load(3), *(Path(getattr(m, "__file__", None) or ".").parent == Path.cwd() for n, m in sorted(sys.modules.items()) if n in ("yaml", "json", "wave", "colorsys")))
"""


def call_hook(project, name):
    return subprocess.run([sys.executable, "-c", IMPORTER, name], cwd=project.folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})


def test_a_hook_finds_its_neighbours_and_every_library_stays_itself(project):
    """Files with the names of libraries lie beside it: some of these are loaded already, `wave` and `colorsys` are not."""
    folder = project.folder
    for name in ("yaml", "json", "wave", "colorsys", "typing"): (folder / f"{name}.py").write_text("raise SystemExit('planted')")
    (folder / "utils").mkdir()
    (folder / "utils/reader.py").write_text("import colorsys, json, wave, yaml\nfrom utils.text import twice\nfrom . import text\nimport beside\n"
                                            "def load(x):\n    import late\n    return twice(x) + late.ONE\n")
    (folder / "utils/text.py").write_text("def twice(x): return 2*x")
    (folder / "beside.py").write_text("")
    (folder / "late.py").write_text("ONE = 1")
    for init in (False, True):  # a folder without and with __init__.py
        if init: (folder / "utils/__init__.py").write_text("")
        done = call_hook(project, "utils.reader:load")
        assert done.stdout.split() == ["7", "False", "False", "False", "False"], done.stdout + done.stderr


@pytest.mark.parametrize("name", ["yaml", "wave", "pydantic"])
def test_a_hook_cannot_have_the_name_of_a_library(project, name):
    (project.folder / f"{name}.py").write_text("raise SystemExit('was imported')")
    done = call_hook(project, f"{name}.load")
    assert done.returncode == 1 and "UserError" in done.stderr and f"another module of this process is called '{name}'" in done.stderr and "rename" in done.stderr


def test_a_name_that_another_project_has_taken_is_no_silent_mixture(project, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for folder, what in ((project.folder, 1), (other, 2)): (folder / "twin_of_two.py").write_text(f"def load(path): return [{what}]")
    assert load_hook("twin_of_two.load", project.folder / "configs", "data.load_dataset")("x") == [1]
    with pytest.raises(UserError, match="another module of this process is called 'twin_of_two'"): load_hook("twin_of_two.load", other / "configs", "data.load_dataset")


@pytest.mark.parametrize("body, says", [
    ("import sys\ndef load(path): sys.exit(0)", r"data.load_dataset: faulty_N.load ended with SystemExit: 0 \(.*faulty_N.py:2\)"),
    ("def load(path):\n    return {}['output']", r"faulty_N.load ended with KeyError: 'output' \(.*faulty_N.py:2\)"),
    ("def load(path):\n    raise ValueError('two\\nlines')", r"ended with ValueError: two lines \(.*:2\)"),
    ("import sys\nsys.exit(0)", r"ended with SystemExit: 0 \(.*faulty_N.py:2\)"),
    ("import nothing_of_this_name", "ended with ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    ("def lood(path): return []\nload = 3", r"faulty_N.py has no function load; it has lood"),
    ("def load(path:", "ended with SyntaxError"),
])
def test_what_a_hook_does_wrong_is_one_line_with_its_name(project, body, says, request):
    name = f"faulty_{abs(hash(body))}"
    (project.folder / f"{name}.py").write_text(body)
    with pytest.raises(UserError, match=says.replace("faulty_N", name)) as e: load_hook(f"{name}.load", project.folder / "configs", "data.load_dataset")("rows.json")
    assert len(str(e.value).splitlines()) == 1


def test_a_users_error_and_a_lack_of_memory_pass_a_hook_as_they_are(project):
    import torch

    (project.folder / "passing.py").write_text("import torch\nfrom qlora_kit.data.files import UserError\n"
                                               "def load(kind): raise {'user': UserError('rows.json:3: no output'), 'card': torch.OutOfMemoryError('full'), 'host': MemoryError()}[kind]")
    load = load_hook("passing.load", project.folder / "configs", "data.load_dataset")
    for kind, error in (("user", UserError), ("card", torch.OutOfMemoryError), ("host", MemoryError)):
        with pytest.raises(error) as e: load(kind)
        assert kind != "user" or str(e.value) == "rows.json:3: no output"


def test_whose_config_it_is(project, monkeypatch, tmp_path_factory):
    folder = project.folder
    (folder / "readers_of_mine.py").write_text("def load(path): return []")
    for name in ("runs/x/adapter", "elsewhere"): (folder / name).mkdir(parents=True)
    (folder / "runs/x/adapter/adapter_config.json").touch()
    for place, own in ((folder, {"configs": True, ".": True, "runs/x": False, "runs/x/adapter": False, "elsewhere": False}),
                       (folder / "configs", {".": True, "..": False}), (folder / "runs/x", {".": False}), (folder.parent, {f"{folder.name}/configs": False, folder.name: False})):
        monkeypatch.chdir(place)
        assert {path: is_own(place / path) for path in own} == own
    text = HOOKED % "readers_of_mine.load"
    with pytest.raises(UserError, match="run.yaml names data.load_dataset: readers_of_mine.load, and is no config of the project where you work.*--trust-hooks runs load of .*readers_of_mine.py"): project(text)
    path = folder / "configs/run.yaml"
    assert load_config(path, trust_hooks=True).data.load_dataset == load_config(path, ["data.load_dataset=readers_of_mine:load"]).data.load_dataset.replace(":", ".")
    monkeypatch.chdir(folder)
    assert project(text).data.load_dataset == "readers_of_mine.load"
    (folder / "elsewhere/linked.yaml").symlink_to(path)
    assert load_config(folder / "elsewhere/linked.yaml").data.load_dataset  # a link to a config is that config
    (folder / "configs/linked.yaml").symlink_to(tmp_path_factory.mktemp("strange") / "c.yaml")
    (folder / "configs/linked.yaml").write_text(text)
    with pytest.raises(UserError, match="--trust-hooks"): load_config(folder / "configs/linked.yaml")
