"""The whole run on a tiny real checkpoint: adapter, invariants, and the ways a run can end."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import losses, run
from safetensors.torch import load_file

from qlora_kit.data.files import UserError
from qlora_kit.training.loop import RunFailed
from qlora_kit.run.checkpoint import checkpoints, load_checkpoint
from qlora_kit.run.config import load_config
from qlora_kit.run.monitor import read_metrics
from qlora_kit.run.train import train


def test_the_run_learned_and_left_its_folder(whole):
    _, full = whole
    assert full.summary["last_loss"] < full.summary["first_loss"] - 0.5 and full.status == "done"
    names = {p.name for p in full.run.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "curves.png", "checkpoints", "adapter", "summary.json", "logs", "state.json"} <= names
    assert json.loads((full.run / "state.json").read_text())["state"] == "done"


def test_plain_peft_loads_the_adapter_and_agrees(whole, tiny_llama, same_arithmetic):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora_kit.model.loader import load_model, packed_hash
    from qlora_kit.model.lora import load_adapter

    _, full = whole
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=quantized, dtype=torch.float32, device_map={"": "cpu"})
    theirs = PeftModel.from_pretrained(theirs, full.run / "adapter").eval()
    ours = load_adapter(load_model(tiny_llama), full.run / "adapter").eval()
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)
        with theirs.disable_adapter():
            base = theirs(ids).logits
    assert not torch.equal(base, theirs(ids).logits)
    assert packed_hash(theirs) == packed_hash(ours)


def test_frozen_bytes_never_change(tiny_config):
    from qlora_kit.training.engine import RankInfo
    from qlora_kit.model.loader import packed_hash
    from qlora_kit.training.loop import Progress
    from qlora_kit.run.train import fit_job
    from qlora_kit.run.assemble import make_engine, make_job

    path = tiny_config()
    folder = path.parent / "hash"
    folder.mkdir()
    job = make_job(load_config(path), folder, RankInfo(), base=path.parent)
    before = packed_hash(job.model)
    engine = make_engine(job)
    engine.module.train()
    fit_job(job, engine, Progress(), log=lambda record: None)
    assert packed_hash(job.model) == before


def test_recompute_changes_no_bit(tiny_config):
    runs = [run(tiny_config(f"re-{r}", training__recompute=r, training__max_steps=3)) for r in ("none", "layer")]
    assert losses(runs[0]) == losses(runs[1])


def test_early_stop_keeps_the_best_adapter(tiny_config):
    path = tiny_config("early", training__learning_rate=0.5, training__lr_scheduler="constant", training__early_stop_patience=2, training__eval_steps=1,
                       training__save_steps=1, training__num_epochs=20)
    result = run(path)
    assert result.status == "early_stop" and result.summary["steps"] < 100
    records = [r for r in read_metrics(result.run) if "val_loss" in r]
    best = min(records, key=lambda r: r["val_loss"])
    kept = load_checkpoint(result.run / f"checkpoints/step-{best['step']:06d}").tensors
    adapter = load_file(result.run / "adapter/adapter_model.safetensors")
    for name, tensor in adapter.items():
        assert torch.equal(tensor, kept["param/" + name.replace(".weight", ".default.weight")])


def test_a_run_that_stopped_early_at_its_last_step_keeps_the_best_adapter_on_resume(tiny_config):
    """Patience is over at the last step; a resume has nothing to train, and must not write the last state over the best."""
    settings = dict(training__learning_rate=0.5, training__lr_scheduler="constant", training__early_stop_patience=2, training__eval_steps=1, training__save_steps=1,
                    training__num_epochs=20, training__warmup_ratio=0)
    total = run(tiny_config("early", **settings)).summary["steps"]
    path = tiny_config("last", **settings, training__max_steps=total)
    first = run(path)
    adapter = (first.run / "adapter/adapter_model.safetensors").read_bytes()
    again = run(path, resume=first.run)
    assert first.status == again.status == "early_stop" and first.summary["steps"] == again.summary["steps"] == total
    assert (first.run / "adapter/adapter_model.safetensors").read_bytes() == adapter


def test_other_questions_get_no_answers_of_the_old_ones(scored_config, tmp_path, capsys):
    from conftest import write_rows

    path = scored_config("questions")
    first = run(path)
    shutil.rmtree(checkpoints(first.run)[0])
    rows = json.loads((tmp_path / "score.json").read_text())
    (tmp_path / "score.json").write_text(json.dumps([rows[0] | dict(instruction="Another question?", output="no"), *rows[1:]]))
    again = train(load_config(path), path.stem, base=path.parent, resume=first.run)
    assert "the questions are others now" in capsys.readouterr().err and again.summary["score_before"] is None
    kept = json.loads((first.run / "answers.json").read_text())
    assert kept[0]["reference"] == "no" and "before" not in kept[0] and all("after" in entry for entry in kept)


def test_the_control_folder_stops_a_run(tiny_config, monkeypatch):
    from qlora_kit.run import train as module

    path = tiny_config("control")
    log = module.Monitor.log

    def ask(self, record):
        log(self, record)
        if record["step"] == 2:
            (self.folder / "control/stop").touch()

    monkeypatch.setattr(module.Monitor, "log", ask)
    result = run(path)
    assert result.status == "stop" and result.summary["steps"] == 3 and load_checkpoint(checkpoints(result.run)[0]).step == 3


@pytest.fixture(scope="module")
def tiny_dialogpt(tmp_path_factory):
    """What microsoft/DialoGPT-medium is, but small: GPT-2 (`Conv1D`, dropout), a .bin checkpoint, no pad token, no chat template."""
    from conftest import save_tokenizer
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("tiny_dialogpt")
    save_tokenizer(folder, template=None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.eos_token = None, "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0))
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_the_config_of_the_specification_trains_a_gpt2(tiny_dialogpt, tmp_path, monkeypatch):
    from conftest import write_rows

    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path / "rows.json")
    path = tmp_path / "train_config.yaml"
    path.write_text(f"""
model:    {{base_model: "{tiny_dialogpt}", lora_r: 16, lora_alpha: 32, lora_dropout: 0.1}}
training: {{num_epochs: 3, batch_size: 4, learning_rate: 2e-4, max_length: 512}}
data:     {{train_file: "rows.json", validation_split: 0.1}}
""")
    result = run(path, f"training.output_dir={tmp_path / 'runs'}", "training.learning_rate=5e-3")
    assert result.summary["last_loss"] < result.summary["first_loss"] and result.summary["best_val_loss"]
    names = load_file(result.run / "adapter/adapter_model.safetensors")
    assert {"c_attn", "c_proj", "c_fc"} <= {part for name in names for part in name.split(".")}


def test_tensorboard_gets_the_same_numbers(tiny_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(tiny_config("board", training__report_to="tensorboard", training__max_steps=3))
    events = EventAccumulator(str(result.run / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in read_metrics(result.run)], rel=1e-6)


def test_a_refused_start_leaves_no_folder(tiny_config):
    path = tiny_config("refused", training__report_to="none", model__target_modules=["nothing"])
    with pytest.raises(UserError, match="nothing"):
        run(path)
    assert not (path.parent / "runs/refused").exists()


def interrupted(number):
    """Stands in for a part of the run in which the signal comes."""
    def part(*args, **options):
        signal.raise_signal(number)
        pytest.fail("went on after the signal")
    return part


@pytest.mark.parametrize("number, part", [(signal.SIGINT, "make_job"), (signal.SIGTERM, "make_engine")])
def test_a_signal_while_loading_ends_the_run_at_once(tiny_config, monkeypatch, number, part):
    from qlora_kit.run import train as module

    path, before = tiny_config("loading"), signal.getsignal(number)
    monkeypatch.setattr(module, part, interrupted(number))
    with pytest.raises(module.Stopped, match=number.name):
        run(path)
    assert json.loads((path.parent / "runs/loading/state.json").read_text())["state"] == "stopped"
    assert signal.getsignal(number) is before


def test_a_signal_among_the_last_questions_leaves_adapter_and_summary(tiny_config, monkeypatch):
    from qlora_kit.run import train as module

    path = tiny_config("asked", training__max_steps=1)
    answers = iter([lambda *a: 0.25, interrupted(signal.SIGINT)])
    monkeypatch.setattr(module, "answer", lambda *a: next(answers)())
    result = run(path)
    assert result.status == "SIGINT" and (result.run / "adapter/adapter_model.safetensors").exists()
    summary = json.loads((result.run / "summary.json").read_text())
    assert summary["status"] == "SIGINT" and summary["steps"] == 1 and summary["score_before"] == 0.25 and summary["score_after"] is None
    assert json.loads((result.run / "state.json").read_text())["state"] == "stopped"


def test_the_first_error_of_several_ranks_stands(tmp_path):
    """Rank 1 speaks, rank 0 finds a closed socket; and a rank that was killed is found by its process number."""
    import socket

    from qlora_kit.training.engine import RankInfo
    from qlora_kit.run.monitor import write_state
    from qlora_kit.run.interruptions import Stopped
    from qlora_kit.run.train import end_badly
    from qlora_kit.run.run_folder import heartbeat

    state = lambda: json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "logs").mkdir()
    ended = lambda rank, e: end_badly(None, tmp_path, None, place=RankInfo(rank, 2), e=e)
    closed = RuntimeError("Connection closed by peer")
    for rank in (0, 1):
        (tmp_path / f"logs/rank-{rank}.pid").write_text(f"{socket.gethostname()} {os.getpid()}")
    write_state(tmp_path, "running")
    ended(1, ValueError("boom"))
    heartbeat(tmp_path, 1)
    assert ended(0, closed).already_reported and state()["state"] == "failed" and state()["error"] == "rank 1: ValueError: boom"
    write_state(tmp_path, "running")
    ended(1, Stopped("SIGTERM"))
    assert isinstance(ended(0, closed), Stopped) and state()["state"] == "stopped"
    write_state(tmp_path, "running")
    gone = subprocess.Popen(["true"])
    gone.wait()
    for rank, pid in enumerate((os.getpid(), gone.pid)):
        (tmp_path / f"logs/rank-{rank}.pid").write_text(f"{socket.gethostname()} {pid}")
    e = ended(0, closed)
    assert isinstance(e, RunFailed) and "rank 1 ended without a word" in state()["error"]


@pytest.fixture
def scored_config(tiny_config, tmp_path):
    """Three steps, and two questions before and after."""
    from conftest import write_rows

    write_rows(tmp_path / "score.json", 2)
    return lambda name, **changes: tiny_config(name, training__max_steps=3, training__save_steps=1, training__eval_steps=2, data__score="exact_match",
                                               data__score_file="score.json", **changes)


def test_no_fault_at_any_write_loses_a_run(scored_config, tmp_path):
    path = scored_config("faults")
    whole = run(path).run
    (tmp_path / "scratch").mkdir()
    done = subprocess.run([sys.executable, str(Path(__file__).parents[2] / "dev/write_faults.py"), str(path), str(whole), str(tmp_path / "scratch")],
                          capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("text", ["", "[{", "{}", "[]", "[1]"])
def test_damaged_answers_cost_a_run_their_score_only(scored_config, text, capsys):
    path = scored_config("answers")
    first = run(path)
    assert first.summary["score_before"] is not None
    shutil.rmtree(checkpoints(first.run)[0])
    (first.run / "answers.json").write_text(text)
    again = train(load_config(path), path.stem, base=path.parent, resume=first.run)
    err = capsys.readouterr().err
    assert again.status == "done" and again.summary["score_before"] is None and again.summary["score_after"] == first.summary["score_after"]
    assert sum("answers.json: damaged" in line for line in err.splitlines()) == 1
    assert all("after" in entry for entry in json.loads((first.run / "answers.json").read_text()))


def test_a_rank_of_a_former_run_keeps_silent(tmp_path):
    import socket

    from qlora_kit.training.engine import RankInfo
    from qlora_kit.run.monitor import write_state
    from qlora_kit.run.train import end_badly

    (tmp_path / "logs").mkdir()
    write_state(tmp_path, "running")
    for text in (None, f"{socket.gethostname()} 1"):
        if text: (tmp_path / "logs/rank-1.pid").write_text(text)
        assert end_badly(None, tmp_path, None, place=RankInfo(1, 2), e=RuntimeError("Connection closed by peer")).already_reported
        assert json.loads((tmp_path / "state.json").read_text())["state"] == "running"
