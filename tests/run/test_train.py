"""The whole run on a tiny real checkpoint: resume, adapter, invariants, and the ways a run can end."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_kit.run.checkpoint import checkpoints, load_checkpoint
from qlora_kit.run.config import config_yaml, load_config
from qlora_kit.data.files import UserError
from qlora_kit.training.engine import join_ranks
from qlora_kit.run.monitor import read_metrics
from qlora_kit.training.loop import check_document_isolation, RunFailed
from qlora_kit.run.assemble import make_engine, make_job
from qlora_kit.run.train import train

TIMED = ("tokens_per_s", "samples_per_s", "mem_gb", "mem_peak_gb", "elapsed_s")


def run(path, *overrides, **options):
    return train(load_config(path, overrides), path.stem, quiet=True, base=path.parent, **options)


def losses(result):
    return [{k: v for k, v in r.items() if k not in TIMED} for r in read_metrics(result.run)]


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory):
    """An uninterrupted run with a checkpoint at every step; dropout on, accumulation 2."""
    import yaml

    from conftest import write_rows

    folder = tmp_path_factory.mktemp("whole")
    write_rows(folder / "rows.json")
    values = {
        "model": {"base_model": str(tiny_llama), "lora_r": 4, "lora_dropout": 0.1},
        "training": {"num_epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01, "max_length": 96,
                     "save_steps": 1, "eval_steps": 4, "save_total_limit": 50, "output_dir": str(folder / "runs/whole")},
        "data": {"train_file": "rows.json", "validation_split": 0.2},
    }
    path = folder / "whole.yaml"
    path.write_text(yaml.safe_dump(values))
    return path, run(path)


@pytest.mark.parametrize("step", [1, 4, 7])
def test_resumed_equals_uninterrupted_to_the_last_bit(whole, tmp_path, step):
    path, full = whole
    cut = tmp_path / "cut"
    shutil.copytree(full.run, cut)
    for checkpoint in checkpoints(cut):  # a power cut after `step`: later checkpoints never came to be
        if load_checkpoint(checkpoint).step > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(cut / "adapter")
    resumed = run(path, f"training.output_dir={cut}", resume=cut)
    assert losses(resumed) == losses(full)
    a, b = (load_checkpoint(checkpoints(r.run)[0]) for r in (full, resumed))
    assert a.step == b.step == full.summary["steps"] and a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)
    files = [load_file(r.run / "adapter/adapter_model.safetensors") for r in (full, resumed)]
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])


def test_the_run_learned_and_left_its_folder(whole):
    _, full = whole
    assert full.summary["last_loss"] < full.summary["first_loss"] - 0.5 and full.status == "done"
    names = {p.name for p in full.run.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "curves.png", "checkpoints", "adapter", "summary.json", "logs", "state.json"} <= names
    assert json.loads((full.run / "state.json").read_text())["state"] == "done"


def test_plain_peft_loads_the_adapter_and_agrees(whole, tiny_llama):
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


def test_accumulated_micro_batches_equal_the_large_batch(tiny_config):
    """Three steps with unequal target counts; fp32 sums in another order differ by a few roundings of 6e-8."""
    runs = [run(tiny_config(f"acc{k}", training__batch_size=8 // k, training__gradient_accumulation_steps=k, training__max_steps=3, model__lora_dropout=0.0)) for k in (1, 2, 4)]
    for other in runs[1:]:
        for a, b in zip(losses(runs[0]), losses(other)):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def test_recompute_changes_no_bit(tiny_config):
    runs = [run(tiny_config(f"re-{r}", training__recompute=r, training__max_steps=3)) for r in ("none", "layer")]
    assert losses(runs[0]) == losses(runs[1])


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


def test_rows_of_a_batch_have_no_pads_on_a_cpu(tiny_config, tmp_path):
    path = tiny_config("joined", training__batch_size=4)
    job = make_job(load_config(path), tmp_path / "run", join_ranks(), base=path.parent)
    sizes = [batch["input_ids"].shape for batch in job.feed.batches(0)]
    assert job.feed.joined and all(B == 1 for B, _ in sizes) and sum(T for _, T in sizes) == job.feed.count(0)[1]


def test_a_model_that_looks_across_documents_pads_the_rows_of_a_cpu(tiny_config, tmp_path):
    """Each token of the first layer is told its predecessor, as in a model with a convolution."""
    path = tiny_config("across", training__batch_size=4)
    for across in (False, True):
        job = make_job(load_config(path), tmp_path / "run", join_ranks(), base=path.parent)
        if across: job.model.get_base_model().model.layers[0].register_forward_pre_hook(lambda layer, args: (args[0] + args[0].roll(1, 1), *args[1:]))
        check_document_isolation(make_engine(job), job.feed)
        assert job.feed.joined is not across and (len(next(job.feed.batches(0))["input_ids"]) > 1) is across


def test_a_step_that_is_saved_is_no_faster_than_its_neighbours(tiny_config):
    """Within a factor of 50, which a checkpoint's own time stays in; with the clock read twice for one step it was thousands."""
    result = run(tiny_config("rates", training__save_steps=2, training__max_steps=7, data__validation_split=0.0))
    rates = [r["tokens_per_s"] for r in read_metrics(result.run)]
    assert len(rates) == 7 and max(rates) < 50 * min(rates), rates


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


def test_resume_refuses_another_learning_rate(whole):
    path, full = whole
    with pytest.raises(UserError, match=r"learning_rate.*0\.01.*0\.02"):
        run(path, f"training.output_dir={full.run}", "training.learning_rate=0.02", resume=full.run)


def test_a_run_is_never_written_over(tiny_config):
    path = tiny_config("twice", training__max_steps=1)
    assert [run(path).run.name for _ in range(3)] == ["twice", "twice-2", "twice-3"]


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


def test_resume_keeps_the_rows_of_a_step(whole):
    path, full = whole
    with pytest.raises(UserError, match="4 rows.*8"):
        run(path, f"training.output_dir={full.run}", "training.batch_size=4", resume=full.run)


def test_a_refused_start_leaves_no_folder(tiny_config):
    path = tiny_config("refused", training__report_to="none", model__target_modules=["nothing"])
    with pytest.raises(UserError, match="nothing"):
        run(path)
    assert not (path.parent / "runs/refused").exists()


def test_a_step_is_kept_when_the_checkpoint_came_from_two_ranks(whole, tmp_path):
    """The settings are those of two ranks with two rows each; alone it takes two micro-batches."""
    from qlora_kit.run.checkpoint import checkpoint_info
    from qlora_kit.run.run_folder import keep_step

    path, full = whole
    checkpoint = checkpoints(full.run)[0]
    size = checkpoint_info(checkpoint)["size"]
    assert size == 4
    for batch_size, accumulation, ranks, shares in ((2, 2, 1, (2, 2)), (2, 1, 1, (2, 2)), (2, 2, 2, (2, 1)), (2, 1, 4, (1, 1)), (4, 1, 2, (2, 1))):
        cfg = load_config(path, [f"training.batch_size={batch_size}", f"training.gradient_accumulation_steps={accumulation}"])
        kept = keep_step(cfg, checkpoint, ranks)
        assert (kept.training.batch_size, kept.training.gradient_accumulation_steps) == shares
        assert cfg.training.batch_size == batch_size, "the caller's settings stay as they are"
    with pytest.raises(UserError, match="4 rows.*3 ranks"):
        keep_step(cfg, checkpoint, 3)
    cut = tmp_path / "cut"
    shutil.copytree(full.run, cut)
    for later in checkpoints(cut)[:2]:
        shutil.rmtree(later)
    resumed = run(path, f"training.output_dir={cut}", "training.gradient_accumulation_steps=1", resume=cut)
    assert losses(resumed) == losses(full)


def test_a_bad_row_is_named_before_the_model_is_looked_for(tiny_config, monkeypatch):
    from qlora_kit.run import assemble as module

    path = tiny_config("row")
    rows = json.loads((path.parent / "rows.json").read_text())
    del rows[6]["output"]
    (path.parent / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setattr(module, "resolve_base", lambda *a: pytest.fail("the model was asked for first"))
    with pytest.raises(UserError, match="row 7"):
        run(path)


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
    assert ended(0, closed).hushed and state()["state"] == "failed" and state()["error"] == "rank 1: ValueError: boom"
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


@pytest.mark.parametrize("text", ["", "\0" * 300, "model:\n  base_mod", "- a list", "model: {lora_r: no number}", "\xff"])
def test_a_damaged_config_is_named_and_the_run_goes_on_without_it(whole, tmp_path, capsys, text):
    from qlora_kit.tools.commands import run_app

    path, full = whole
    cut = tmp_path / "cut"
    shutil.copytree(full.run, cut)
    shutil.rmtree(checkpoints(cut)[0])
    (cut / "config.yaml").write_bytes(text.encode("latin-1"))
    words = ["train", str(path), "--resume", str(cut), f"training.output_dir={cut}"]
    assert run_app(words) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and f"{cut}/config.yaml is damaged" in line and f"checkpoints/{checkpoints(cut)[0].name} is whole" in line and "Delete config.yaml" in line
    if text: return
    (cut / "config.yaml").unlink()
    assert run_app(words) == 0
    assert "config.yaml is gone" in capsys.readouterr().err
    assert [{k: v for k, v in r.items() if k not in TIMED} for r in read_metrics(cut)] == losses(full)
    assert (cut / "config.yaml").exists()


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


def started(path, *words):
    return subprocess.Popen([sys.executable, "-m", "qlora_kit.tools.commands", "train", str(path), *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for(true, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_living_run_is_not_resumed_and_a_killed_one_is_by_one_of_two(tiny_config):
    from qlora_kit.run.monitor import ask

    path = tiny_config("living", training__num_epochs=100_000, training__save_steps=5, training__save_total_limit=2)
    folder, first = path.parent / "runs/living", started(path)
    both = []
    try:
        wait_for(lambda: checkpoints(folder))
        refused = started(path, "--resume", str(folder))
        err = refused.communicate(timeout=120)[1].strip().splitlines()
        assert refused.returncode == 2 and f"process {first.pid} on" in err[-1] and "sign of life" in err[-1] and "control/stop" in err[-1]
        with pytest.raises(UserError, match=f"process {first.pid} on"):
            run(path, resume=folder)
        assert first.poll() is None and json.loads((folder / "state.json").read_text())["pid"] == first.pid
        first.kill(), first.wait()
        both = [started(path, "--resume", str(folder)) for _ in range(2)]
        wait_for(lambda: any(p.poll() is not None for p in both))
        over, lives = sorted(both, key=lambda p: p.poll() is None)
        assert over.returncode == 2 and f"process {lives.pid} on" in over.stderr.read()
        steps = len(read_metrics(folder))
        wait_for(lambda: len(read_metrics(folder)) > steps + 5)
        ask(folder, "stop")
        lives.communicate(timeout=120)
        logged = [r["step"] for r in read_metrics(folder)]
        assert logged == list(range(1, len(logged) + 1)) and json.loads((folder / "state.json").read_text())["state"] == "stopped"
    finally:
        for p in [first, *both]: p.kill(), p.wait()


def test_two_who_start_at_once_get_two_folders(tiny_config):
    path = tiny_config("race", training__max_steps=1)
    both = [started(path) for _ in range(2)]
    for p in both:
        p.communicate(timeout=300)
        assert p.returncode == 0
    assert sorted(p.name for p in (path.parent / "runs").iterdir()) == ["race", "race-2"]
    assert all(json.loads((p / "summary.json").read_text())["steps"] == 1 for p in (path.parent / "runs").iterdir())


def test_a_run_whose_folder_is_given_to_another_writes_nothing_there(tiny_config, monkeypatch):
    from qlora_kit.run import train as module

    path = tiny_config("moved", training__save_steps=1)
    folder, log = path.parent / "runs/moved", module.Monitor.log

    def move(self, record):
        log(self, record)
        if record["step"] == 2:
            folder.rename(folder.with_name("aside"))
            folder.mkdir()
            (folder / "lock").touch()

    monkeypatch.setattr(module.Monitor, "log", move)
    with pytest.raises(RunFailed, match="no longer the folder"):
        run(path)
    assert [p.name for p in folder.iterdir()] in (["lock"], ["lock", "curves.png"])
    assert checkpoints(folder.with_name("aside"))


def test_a_rank_of_a_former_run_keeps_silent(tmp_path):
    import socket

    from qlora_kit.training.engine import RankInfo
    from qlora_kit.run.monitor import write_state
    from qlora_kit.run.train import end_badly

    (tmp_path / "logs").mkdir()
    write_state(tmp_path, "running")
    for text in (None, f"{socket.gethostname()} 1"):
        if text: (tmp_path / "logs/rank-1.pid").write_text(text)
        assert end_badly(None, tmp_path, None, place=RankInfo(1, 2), e=RuntimeError("Connection closed by peer")).hushed
        assert json.loads((tmp_path / "state.json").read_text())["state"] == "running"


def test_a_launcher_has_no_last_word_on_a_run_that_another_process_goes_on_with(tmp_path):
    from qlora_kit.tools.processes import last_word
    from qlora_kit.run.monitor import hold, release, write_state

    state = lambda: json.loads((tmp_path / "state.json").read_text())["state"]
    hold(tmp_path)
    write_state(tmp_path, "running")
    last_word(tmp_path)
    assert state() == "running"
    release(tmp_path)
    last_word(tmp_path)
    assert state() == "failed"


def test_a_run_lets_go_of_its_folder_however_it_ends(tiny_config, whole, monkeypatch):
    from qlora_kit.run import monitor
    from qlora_kit.run import train as module

    path, full = whole
    assert not monitor.HELD
    with pytest.raises(UserError, match="learning_rate"):
        run(path, f"training.output_dir={full.run}", "training.learning_rate=0.02", resume=full.run)
    for number in (signal.SIGINT, signal.SIGTERM):
        monkeypatch.setattr(module, "make_engine", interrupted(number))
        with pytest.raises(module.Stopped):
            run(tiny_config("let-go"))
    assert not monitor.HELD


@pytest.mark.parametrize("said, stage, backend, overlap", [(None, 3, "nccl", True), (None, 3, "gloo", False), (None, 2, "nccl", False), (False, 3, "nccl", False), (True, 2, "gloo", True)])
def test_gathers_run_beside_the_computation_where_every_rank_has_a_card(tiny_config, tmp_path, monkeypatch, said, stage, backend, overlap):
    """By default; a word of the run's config or of the DeepSpeed file counts, and the file's stage does."""
    from qlora_kit.run.assemble import deepspeed_config

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    choice = {} if said is None else {"deepspeed__overlap_comm": said}
    cfg, place = load_config(tiny_config("overlap", deepspeed__stage=stage, **choice)), join_ranks()
    place.ranks = 2
    assert deepspeed_config(cfg, place, 64)["zero_optimization"]["overlap_comm"] is overlap
    if said is not None or stage != 3: return
    cfg, file = load_config(tiny_config("file")), tmp_path / "ds.json"
    for zero, expected in (({"stage": 2}, False), ({"stage": "auto", "overlap_comm": "auto"}, overlap), ({"overlap_comm": False}, False)):
        file.write_text(json.dumps({"zero_optimization": zero}))
        assert deepspeed_config(cfg, place, 64, str(file))["zero_optimization"]["overlap_comm"] is expected, zero
    again = tmp_path / "again.yaml"  # as a run folder keeps it, every default written down
    again.write_text(config_yaml(cfg))
    assert deepspeed_config(load_config(again), place, 64)["zero_optimization"]["overlap_comm"] is overlap
