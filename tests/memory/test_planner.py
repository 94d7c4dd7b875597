import sys

import pytest
import yaml

from qlora_kit.run import config
from qlora_kit.memory import predict as memory
from qlora_kit.memory import planner as module
from qlora_kit.run.config import RunConfig
from qlora_kit.data.files import GB, UserError
from qlora_kit.tools.commands import plan_config, recipe_names
from qlora_kit.memory.predict import Setup
from qlora_kit.memory.budget import fit_card, smallest_change
from dataclasses import replace
from qlora_kit.memory.planner import (
    begin, change_for, config_setup, config_text, HUB, OFFLOAD, peaks, PLACES, fit_levels, Planner,
    RECIPES, RECOMPUTE_CHOICES, save_config, fit_verdict)
from qlora_kit.run.assemble import memory_setup

SMALL = HUB["smollm2-135m"]


def setup_of(cfg, model, ranks):
    """As `qlora-kit plan` sees a run on a card that has bf16; without one here, `auto` would be fp16."""
    setup = replace(memory_setup(cfg, model, "cuda", ranks=ranks), recompute=cfg.training.recompute) # a run puts auto into levels when it knows its card
    return replace(setup, dtype="bfloat16") if cfg.training.dtype == "auto" else setup


def test_a_recipe_is_read_as_plan_reads_it():
    assert sorted(RECIPES) == recipe_names()
    for name in recipe_names():
        setup, card = begin(name)
        cfg = plan_config(RECIPES[name])
        assert setup == setup_of(cfg, cfg.model.base_model, setup.ranks) and card == int(name.rsplit("x")[-1][:-2])*GB
        assert fit_levels(setup, card).fits


def test_what_a_config_leaves_out_is_the_configs_own_default():
    cfg = RunConfig.model_validate({"data": {"train_file": "x"}})
    for field, (section, key, default) in PLACES.items():
        if field != "base_model": assert getattr(getattr(cfg, section), key) == default, field
    for ranks in (1, 4):
        assert config_setup("data: {train_file: x}", ranks) == setup_of(cfg, "smollm2-135m", ranks)
    assert RECOMPUTE_CHOICES == config.RECOMPUTE


def test_auto_is_the_highest_levels_that_fit():
    auto = Setup(SMALL, batch=16, length=2048, recompute="auto")
    assert fit_levels(auto, 80*GB).setup.recompute[0] == "dense" and fit_levels(auto, 80*GB).fits
    limit = int(fit_card(replace(auto, recompute="layer"), 0).need*1.02)
    fit = fit_levels(auto, limit)
    assert fit.fits and fit.setup.recompute != fit_levels(auto, 80*GB).setup.recompute and "layers:" in fit_verdict(fit) and yaml.safe_load(config_text(auto, limit))["training"]["recompute"] == "auto"
    change, then = change_for(auto, int(fit_levels(auto, 0).need*0.9))
    assert then.fits and "recompute" not in change, "auto is on the last level already"


@pytest.mark.parametrize("setup", [
    Setup(SMALL), Setup(SMALL, batch=3, accumulation=5, length=640, r=12, ranks=2, stage=3), Setup(SMALL, recompute="pointwise", packed=True, dropout=0.1, ranks=4, stage=2, offload_optimizer="cpu"),
    Setup(SMALL, quant_type="fp4", double_quant=False, variant="rslora", optimizer="adamw_8bit", target_modules=("q_proj", "v_proj"), rank_pattern=(("q_proj", 4),), dtype="float16"),
    Setup("smollm2-135m", ranks=8, stage=3, offload_param="cpu", offload_optimizer="nvme"), Setup(SMALL, stage=3, offload_param="cpu", offload_optimizer="cpu")])
def test_the_config_that_it_writes_is_the_run_that_was_planned(setup, tmp_path):
    file = save_config(config_text(setup, 24*GB, "run.yaml"), tmp_path/"new/run.yaml")
    cfg = plan_config(file) # every check that a run would make, but for the data
    assert cfg.training.recompute == setup.recompute
    if setup.ranks > 1: assert setup_of(cfg, setup.base_model, setup.ranks) == setup == replace(config_setup(file.read_text(), setup.ranks), base_model=setup.base_model)
    if setup.ranks > 1: assert file.read_text().startswith(f"# qlora-kit launch run.yaml --ranks {setup.ranks}\n")
    elif setup.stage: assert "--deepspeed" in file.read_text().splitlines()[0] and cfg.deepspeed.offload_param == "cpu"
    else: assert file.read_text().startswith("# qlora-kit train run.yaml\n") and setup_of(cfg, setup.base_model, 1) == setup


def test_nothing_is_overwritten(tmp_path):
    (tmp_path/"a.yaml").write_text("mine")
    with pytest.raises(UserError, match="exists already; choose another name"): save_config("new", tmp_path/"a.yaml")
    with pytest.raises(UserError, match="choose another place"): save_config("new", tmp_path/"a.yaml/b.yaml")
    assert (tmp_path/"a.yaml").read_text() == "mine"


@pytest.mark.parametrize("start, words", [("lama", "received 'lama'; allowed are"), ("bad.yaml", "the file is no config"), ("odd.yaml", "training.recompute: received 'twice'")])
def test_what_is_no_start(start, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"bad.yaml").write_text("[1, 2")
    (tmp_path/"odd.yaml").write_text("training: {recompute: twice}")
    with pytest.raises(UserError, match=words): begin(start)
    with pytest.raises(UserError, match="memory: received -1"): Planner(SMALL, memory=-1)


def test_a_config_with_an_empty_section(tmp_path): assert config_setup("model:\ntraining: {batch_size: 2}").batch == 2


def test_the_verdict_is_that_of_the_memory_page():
    yes, no = fit_levels(Setup(SMALL), 24*GB), fit_levels(Setup(SMALL, batch=16, length=4096), 2*GB)
    assert fit_verdict(yes).startswith("✓ fits") and fit_verdict(no).startswith("✗ does not fit") and "smallest" not in fit_verdict(no)
    change, then = smallest_change(no.setup, no.limit)
    said = fit_verdict(no, (change, then))
    assert f"{then.need/GB:.1f} GB" in said and all(name.replace("_", " ") in said for name in change)
    assert "no combination" in fit_verdict(no, None)
    numbers, totals = peaks(no), no.prediction.totals
    assert numbers["load peak"]*GB == totals.pop("load") and numbers[f"train peak ({no.prediction.when})"]*GB == max(totals.values()) and numbers["the card"] == 2


def test_an_answer_is_computed_once(monkeypatch):
    calls = []
    monkeypatch.setattr("qlora_kit.memory.budget.predict", lambda s, f=memory.predict: calls.append(s) or f(s))
    fit_levels.cache_clear(); change_for.cache_clear()
    planner = Planner(Setup(SMALL, batch=16, length=4096), memory=2)
    first = planner.verdict()
    n = len(calls)
    assert n and planner.verdict() == first and planner.static() and len(calls) == n


def test_a_table_and_a_figure_where_widgets_are_not_installed(monkeypatch):
    planner = Planner("llama-3.2-1b-1x16gb")
    assert "application/vnd.jupyter.widget-view+json" in planner._repr_mimebundle_()
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    shown = planner._repr_mimebundle_()
    assert "<table" in shown["text/html"] and 'alt="Memory of each card at load' in shown["text/html"] and "packed weights" in shown["text/plain"] and "✓ fits" in shown["text/plain"]
    with pytest.raises(UserError, match="pip install"): planner.widget()


def every(widget):
    yield widget
    for child in getattr(widget, "children", ()): yield from every(child)


@pytest.fixture
def open_widget(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(*args, **kwargs):
        planner = Planner(*args, **kwargs)
        found = list(every(planner.widget()))
        by = {w.description: w for w in found if getattr(w, "description", "")}
        by |= {"said": found[[type(w).__name__ for w in found].index("HTML")], "yaml": next(w for w in found if type(w).__name__ == "Textarea"),
               "file": next(w for w in found if type(w).__name__ == "Text"), "saved": next(w for w in found if type(w).__name__ == "Label")}
        return planner, by

    return make


def test_every_control_changes_the_setup_and_what_is_written(open_widget):
    planner, w = open_widget(Setup(SMALL), memory=24)
    for name, field, value in (("batch", "batch", 4), ("accumulation", "accumulation", 2), ("length", "length", 4096), ("rank r", "r", 8), ("cards", "ranks", 4), ("ZeRO stage", "stage", 3),
                               ("recompute", "recompute", "none")):
        before, text = planner.fit.need, w["yaml"].value
        w[name].value = value
        assert getattr(planner.setup, field) == value and w["yaml"].value != text and planner.setup in (fit_card(planner.setup, planner.limit).setup,)
        if field not in ("accumulation",): assert planner.fit.need != before, name
        assert f"{planner.fit.need/GB:.1f} GB" in w["said"].value
    w["offload"].value = OFFLOAD["optimizer and weights to CPU"]
    assert (planner.setup.offload_param, planner.setup.offload_optimizer) == ("cpu", "cpu")
    w["GB of a card"].value = 1
    assert planner.limit == GB and "does not fit" in w["said"].value


def test_one_card_without_offload_has_no_stage(open_widget):
    planner, w = open_widget(Setup(SMALL), memory=24)
    w["ZeRO stage"].value = 3
    assert planner.setup.stage == 0
    w["offload"].value = OFFLOAD["optimizer and weights to CPU"]
    assert planner.setup.stage == 3


def test_the_change_can_be_applied_with_one_click(open_widget, monkeypatch):
    planner, w = open_widget(Setup(SMALL, batch=16, length=4096), memory=2)
    change = smallest_change(planner.setup, planner.limit)[0]
    expected, computed = replace(planner.setup, **change), []
    assert not w["apply the change"].disabled and "smallest change" in w["said"].value
    monkeypatch.setattr(module, "config_text", lambda *a, f=module.config_text: computed.append(1) or f(*a))
    w["apply the change"].click()
    assert planner.setup == expected and "✓ fits" in w["said"].value and w["apply the change"].disabled and len(computed) == 1
    assert w["batch"].value == expected.batch and w["accumulation"].value == expected.accumulation


def test_another_start_and_a_wrong_one(open_widget):
    planner, w = open_widget(Setup(SMALL), memory=24)
    w["model or config"].value = "llama-3.2-1b-1x16gb"
    assert planner.setup == begin("llama-3.2-1b-1x16gb")[0] and w["GB of a card"].value == 16 and w["batch"].value == planner.setup.batch
    w["model or config"].value = "<b>lama"
    assert "⚠ received &#x27;&lt;b&gt;lama&#x27;" in w["said"].value and planner.setup == begin("llama-3.2-1b-1x16gb")[0]


def test_saving_from_the_widget(open_widget, tmp_path):
    planner, w = open_widget(Setup(SMALL), memory=24)
    w["save config"].click()
    assert (tmp_path/"planned.yaml").read_text() == w["yaml"].value and "written: planned.yaml" in w["saved"].value
    assert yaml.safe_load(w["yaml"].value)["training"]["batch_size"] == 1
    w["yaml"].value += "# mine"
    w["save config"].click()
    assert "exists already" in w["saved"].value and "# mine" not in (tmp_path/"planned.yaml").read_text()
