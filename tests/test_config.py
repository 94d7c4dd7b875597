"""Config: every way to get a file wrong, the original config as it stands, and where inputs are looked for."""
import pytest

from qlora_kit.config import RunConfig, check, find_input, load_config, read_yaml
from qlora_kit.data import UserError

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
    with pytest.raises(UserError) as e: check({"model": {"lora_r": 0, "seed": 1}})
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
