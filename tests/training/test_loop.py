"""The loop under a whole run: what a step sums, when a loss ends it, and what its speed counts."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import losses, run
from safetensors.torch import load_file, save_file

from qlora_kit.data.files import UserError
from qlora_kit.training.loop import RunFailed
from qlora_kit.run.checkpoint import checkpoint_info, checkpoints, load_checkpoint
from qlora_kit.run.monitor import read_metrics


def test_accumulated_micro_batches_equal_the_large_batch(tiny_config):
    """Three steps with unequal target counts; fp32 sums in another order differ by a few roundings of 6e-8."""
    runs = [run(tiny_config(f"acc{k}", training__batch_size=8 // k, training__gradient_accumulation_steps=k, training__max_steps=3, model__lora_dropout=0.0)) for k in (1, 2, 4)]
    for other in runs[1:]:
        for a, b in zip(losses(runs[0]), losses(other)):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_run_and_spares_the_checkpoint(tiny_config):
    path = tiny_config("nan", training__learning_rate=1e20, training__max_grad_norm=1e20, training__lr_scheduler="constant", training__save_steps=1)
    with pytest.raises(RunFailed, match="learning_rate"):
        run(path)
    folder = path.parent / "runs/nan"
    assert load_checkpoint(checkpoints(folder)[0]).step >= 1
    state = json.loads((folder / "state.json").read_text())
    assert state["state"] == "failed" and "learning_rate" in state["error"]


def test_a_loss_that_is_no_number_before_any_update_is_not_blamed_on_the_rate(tiny_config, tiny_llama, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunFailed, match="at step 1; no update came before it") as failure:
        run(tiny_config("broken", model__base_model=str(broken)))
    assert "learning_rate" not in str(failure.value)


def test_speed_does_not_count_evaluations_and_checkpoints(tiny_config, monkeypatch):
    """The clock stands still but for what is no training, which takes a thousand seconds, and a second in each step."""
    import qlora_kit.run.train as kit

    now, spent = [0.0], {"train_step": 1, "evaluate_step": 1000, "save": 1000}
    for name, seconds in spent.items():
        def slow(*args, seconds=seconds, act=getattr(kit, name), **options):
            now[0] += seconds
            return act(*args, **options)
        monkeypatch.setattr(kit, name, slow)
    monkeypatch.setattr(kit.time, "monotonic", lambda: now[0])
    records = read_metrics(run(tiny_config("speed", training__save_steps=1, training__eval_steps=2, training__max_steps=4, data__validation_split=0.2)).run)
    assert now[0] > 3000 and sum("val_loss" in r for r in records) >= 2
    assert [r["samples_per_s"] for r in records] == pytest.approx([records[0]["samples_per_s"]] * 4)


def test_a_step_that_is_saved_is_no_faster_than_its_neighbours(tiny_config):
    """Within a factor of 50, which a checkpoint's own time stays in; with the clock read twice for one step it was thousands."""
    result = run(tiny_config("rates", training__save_steps=2, training__max_steps=7, data__validation_split=0.0))
    rates = [r["tokens_per_s"] for r in read_metrics(result.run)]
    assert len(rates) == 7 and max(rates) < 50 * min(rates), rates


def test_a_validation_loss_that_is_no_number_ends_the_run_and_is_never_the_best(tiny_config, monkeypatch):
    from qlora_kit.run import train as module
    from qlora_kit.training.loop import Progress

    losses = iter([2.0, float("nan")])
    monkeypatch.setattr(module, "evaluate_step", lambda job, engine: next(losses))
    path = tiny_config("nan-val", training__eval_steps=1, training__save_steps=1)
    with pytest.raises(RunFailed, match="the validation loss is nan at step 2"): run(path)
    folder = path.parent / "runs/nan-val"
    assert checkpoint_info(checkpoints(folder)[0])["progress"]["best_val"] == 2.0
    old = Progress(step=3, best_val=float("nan"), best_step=1, waiting=1)  # of an older kit
    assert old.evaluated(2.5) and old.best_val == 2.5


@pytest.mark.parametrize("family, shape, causal", [
    ("llama", dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=320), True),
    ("gpt2", dict(n_embd=64, n_layer=2, n_head=4, vocab_size=320), True), ("bloom", dict(hidden_size=64, n_layer=2, n_head=4, vocab_size=320), True),
    ("xlnet", dict(d_model=64, n_layer=2, n_head=4, d_inner=128, vocab_size=320), False)])
def test_a_model_that_looks_ahead_is_refused(family, shape, causal):
    """transformers' own models of two layers; XLNet's reads all tokens at once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_kit.training.loop import check_causal
    from qlora_kit.training.loss import LossModel

    torch.manual_seed(0)
    module = LossModel(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)))
    engine = SimpleNamespace(module=module, forward=lambda batch: module(**batch))
    if causal: return check_causal(engine)
    with pytest.raises(UserError, match="depends on tokens behind it"): check_causal(engine)
