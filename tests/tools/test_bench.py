"""The bench command on a CPU: real lines for the kit and plain peft, and peers that are missing, broken, dead or silent."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from qlora_kit.tools import bench, clock, contestants
from qlora_kit.data.files import UserError

ROOT = Path(__file__).parents[2]


def fake_package(folder, name, code, version="1.0"):
    """A package of one file, installed as far as its metadata goes."""
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One call of the command: two real contestants, a broken one, and two that are not there."""
    place = tmp_path_factory.mktemp("bench")
    rows = [{"instruction": "Count to five.", "input": "", "output": "one two three four five"}] * 400
    (place / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (place / "peers").mkdir()
    fake_package(place / "peers", "unsloth", "raise ImportError('no card, no peace')")
    (place / "peers/pydantic.py").write_text("raise ImportError('for peers only')", encoding="utf-8")  # what the kit reads configs with
    words = ["bench", "--shape", "tiny", "--batch", "2x128", "--steps", "2", "--rank", "4", "--recompute", "auto", "--against", "plain,unsloth,trl", "--rows", "rows.json",
             "--out", "out.jsonl", "--peers-path", "peers", "--workdir", "work"]
    done = subprocess.run([sys.executable, "-c", "from qlora_kit.tools.commands import main; main()", *words], cwd=place, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"})
    lines = [json.loads(line) for line in (place / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    return place, done, {(line["task"], line["who"], line["setting"]): line for line in lines}


def test_the_command_measures_the_kit_and_plain_peft(ran):
    _, done, lines = ran
    assert done.returncode == 0, done.stdout + done.stderr
    kit, plain = lines["tokens", "kit", "auto"], lines["tokens", "plain", "checkpointing"]
    for line in (kit, plain):
        assert line["tokens_per_s"] == pytest.approx(2 * 128 / line["seconds"]) and line["load_s"] > 0
        assert line["card"] == "cpu" and line["mfu"] is None and line["peak_gb"] is None
        assert {"torch", "transformers", "peft", "bitsandbytes"} <= set(line["versions"]) and line["date"] and "--shape tiny" in line["command"]
        assert {k: line[k] for k in ("shape", "B", "T", "rank", "steps", "warm")} == dict(shape="tiny", B=2, T=128, rank=4, steps=2, warm=3)
    assert plain["first_loss"] == pytest.approx(kit["first_loss"], rel=1e-5)  # the same weights, the same tokens
    assert "layers" in kit and "layers" not in plain


def test_it_checks_the_kit_before_the_speed(ran):
    _, done, lines = ran
    first = next(iter(lines.values()))
    assert first["task"] == "prepare" and first["check"]["right"] and first["check"]["bytes_unchanged"] and first["product_tflops"] > 0
    assert 0 < first["check"]["gradient"] < 1e-4
    assert "right" in done.stderr.splitlines()[0]


def test_a_gradient_that_is_no_number_is_not_right(monkeypatch):
    """No number is larger than NaN, so the largest of all differences may hide it."""
    found = iter([0.0, float("nan")])
    monkeypatch.setattr(bench, "farthest", lambda *_: next(found, 0.0))
    assert not bench.check_correctness(steps=1)["right"]


def test_peers_that_are_missing_or_refuse_are_lines_too(ran):
    _, done, lines = ran
    assert lines["rows", "trl", "checkpointing"]["missing"] == "not installed: pip install trl"
    assert lines["tokens", "unsloth", "its checkpointing"]["missing"] == "runs on a card only"  # found among the peers
    assert "not installed: pip install trl" in done.stdout and "Unsloth, nothing recomputed" in done.stdout


def test_examples_of_packed_steps_are_counted(ran):
    """All rows are alike, so each sequence holds as many as fit."""
    place, _, lines = ran
    first, line = lines["prepare", "kit", ""], lines["rows", "kit", "auto"]
    n = first["row_tokens"] // first["rows"]
    assert n * first["rows"] == first["row_tokens"] and 128 // n >= 2
    assert line["step_examples"] == 2 * (128 // n) and line["step_tokens"] == n * line["step_examples"]
    assert line["examples_per_s"] == pytest.approx(line["step_examples"] / line["seconds"])
    kept = (place / bench.weights_folder(Path("work"), "tiny") / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(kept) == first["rows"] < 400 and json.loads(kept[0])["messages"][-1]["content"].startswith("one two")


def test_the_checkpoint_is_an_ordinary_one(ran):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = bench.weights_folder(ran[0] / "work", "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    layers = model.model.layers
    assert len(layers) == 2 and layers[0].mlp.up_proj.weight.equal(layers[1].mlp.up_proj.weight) and layers[1].input_layernorm.weight.eq(1).all()
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template([dict(role="user", content="a")], tokenize=False).startswith("<|im_start|>user")
    before = (folder / "layer-1.safetensors").stat().st_mtime_ns
    bench.write_checkpoint(folder, bench.shape_of("tiny"))
    assert (folder / "layer-1.safetensors").stat().st_mtime_ns == before


def lines_of(code, tmp_path, timeout):
    """A fake Unsloth before a line of the kit that is too hasty to be measured."""
    common = dict(shape="tiny", B=1, T=8, rank=4, steps=1, warm=1, folder=str(tmp_path), card=True)
    peers = fake_package(tmp_path, "unsloth", code)
    return list(bench.measure([("unsloth", "its checkpointing", "tokens"), ("trl", "checkpointing", "rows")], common, tmp_path, timeout, str(peers)))


@pytest.mark.parametrize("cores", [1, 8])
def test_a_contestant_that_dies_says_how(tmp_path, cores, monkeypatch):
    """With cores to spare the next process is started ahead."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    died, absent = lines_of("import os, signal\nprint('last words', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)", tmp_path, 60)
    assert died["failed"] == "ended with SIGKILL: last words" and "tokens_per_s" not in died
    assert absent["missing"].startswith("not installed")


def test_a_contestant_that_hangs_costs_its_own_time_only(tmp_path):
    code = "import subprocess, time\nopen('pid', 'w').write(str(subprocess.Popen(['sleep', '99']).pid))\ntime.sleep(99)"
    hung, absent = lines_of(code, tmp_path, 4)
    assert hung["failed"] == "no end after 4 s" and absent["missing"]
    started = int((tmp_path / "pid").read_text())
    ended = lambda: not psutil.pid_exists(started) or psutil.Process(started).status() == psutil.STATUS_ZOMBIE
    until = time.monotonic() + 10  # a killed process goes when the system comes to it
    while not ended() and time.monotonic() < until:
        time.sleep(0.05)
    assert ended(), "what it had started runs on"


def test_what_is_known_stays_known(tmp_path):
    """A process that loads and then runs out of memory has a load time."""
    log = tmp_path / "log"
    log.write_text("\x1b[31mTraceback\x1b[0m\n\n", encoding="utf-8")
    job = dict(answer=str(tmp_path / "answer"), task="tokens", who="plain", setting="", shape="tiny", B=1, T=8)
    process = subprocess.Popen([sys.executable, "-c", f"""
import json, sys
with open({job['answer']!r}, "w") as f: f.write('{{"load_s": 3}}\\n' + json.dumps(dict(failed="out of card memory")) + "\\n")
sys.exit(0)"""], stdin=subprocess.PIPE, start_new_session=True)
    line = bench.line_of(job, bench.finish_child(bench.Child(job, process, log), 30))
    assert (line["load_s"], line["failed"]) == (3, "out of card memory") and "tokens_per_s" not in line
    assert bench.last_line(log) == "Traceback"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two ranks find, whichever way they share the model; one of the jobs is no way at all."""
    place = tmp_path_factory.mktemp("ranks")
    (place / "model").mkdir()
    clock.write_checkpoint(place / "model", clock.shape_of("tiny"))
    common = dict(shape="tiny", B=2, T=32, rank=4, steps=2, warm=1, folder=str(place / "model"), card=False, ranks=2)
    todo = [("kit", "stage 3, auto"), ("plain", "FSDP, layers only"), ("plain", "DeepSpeed 3"), ("plain", "FSDP 7")]
    return {line["setting"]: line for line in bench.measure([(*one, "ranks") for one in todo], common, place, 240)}


@pytest.mark.ranks
def test_all_ways_to_share_a_model_compute_the_same(two_ranks):
    """The same weights, and tokens that differ from rank to rank, so a way that mixes ranks up has another loss; fp32, hence 1e-5."""
    kit, layers, zero, _ = two_ranks.values()
    assert [line.get("failed") for line in (kit, layers, zero)] == [None]*3
    for peer in (layers, zero):
        assert [peer[k] for k in ("first_loss", "last_loss")] == pytest.approx([kit[k] for k in ("first_loss", "last_loss")], rel=1e-5)
    assert kit["tokens_per_s"] == pytest.approx(2 * 2 * 32 / kit["seconds"]) and kit["ranks"] == 2 and kit["layers"] == "2 dense"


@pytest.mark.ranks
def test_a_rank_that_fails_ends_the_others_with_its_own_reason(two_ranks):
    assert two_ranks["FSDP 7"]["failed"] == "KeyError: 'FSDP 7'"


def test_the_slowest_rank_and_the_fullest_card_count():
    found = bench.slowest([dict(seconds=1.0, peak_gb=None, layers="2 dense"), dict(seconds=1.5, peak_gb=None, load_s=2.0)])
    assert found == dict(seconds=1.5, peak_gb=None, layers="2 dense", load_s=2.0)


def test_flops_and_mfu_by_hand():
    shape = bench.shape_of("llama-3.2-1b")  # 16 layers of 2048, MLP 8192, 32 heads of 64, 8 of them for keys, a tied head of 128256
    N = 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192) + 128256 * 2048
    assert clock.product_weights(shape) == N
    assert clock.flops_per_token(shape, 1024) == 4 * N + 6 * 1024 * 2048 * 16
    assert bench.mfu(shape, 1024, 50_000, "NVIDIA H100 80GB HBM3") == pytest.approx(50_000 * (4 * N + 6 * 1024 * 2048 * 16) / 989e12)
    assert bench.mfu(shape, 1024, 50_000, "NVIDIA H100 PCIe") == pytest.approx(50_000 * (4 * N + 6 * 1024 * 2048 * 16) / 756e12)


def test_loading_is_timed_for_both(ran):
    told = {}
    for who in ("kit", "plain"):
        contestants.time_loading(dict(who=who, folder=str(bench.weights_folder(ran[0] / "work", "tiny"))), lambda **found: told.update({who: found}))
    assert told["kit"]["load_s"] > 0 and told["plain"]["load_s"] > 0 and told["kit"]["model_gb"] is None


def test_trainer_settings_say_what_a_step_is():
    job = dict(task="rows", who="trl", B=4, T=2048, warm=3, steps=8)
    own = dict(gradient_checkpointing=True)
    packed, tokens = contestants.sft_settings(job, "out", own), contestants.sft_settings(job | dict(task="tokens"), "out", own)
    assert packed["packing"] and (packed["per_device_train_batch_size"], packed["gradient_accumulation_steps"]) == (1, 4)
    assert not tokens["packing"] and tokens["per_device_train_batch_size"] == 4 and "gradient_accumulation_steps" not in tokens
    assert packed["max_steps"] == 11 and packed["max_length"] == 2048 and packed["gradient_checkpointing"]
    assert not contestants.sft_settings(job, "out", dict(gradient_checkpointing=False))["gradient_checkpointing"]


def test_a_loss_that_differs_is_pointed_out():
    line = lambda **found: dict(task="tokens", who="plain", setting="", **found)
    assert bench.other_loss(line(first_loss=11.9), line(first_loss=11.8)) is None
    assert "begins with a loss of 9.000" in bench.other_loss(line(first_loss=9.0), line(first_loss=11.8))


def test_mistakes_are_found_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "start_child", None)
    (tmp_path / "rows.json").write_text("[]", encoding="utf-8")
    for wrong, said in ((dict(batch="4,2048"), "4x2048"), (dict(against="ours"), "plain, unsloth, liger, trl"), (dict(fields="question"), "prompt=question"),
                        (dict(shape="llama-3.1-70b", rows=str(tmp_path / "rows.json")), "too large"), (dict(shape="gpt-9"), "llama-3.1-8b"),
                        (dict(ranks=2, shape="llama-3.1-70b"), "too large"), (dict(ranks=2, rows=str(tmp_path / "rows.json")), "--rows is measured on one rank")):
        with pytest.raises(UserError, match=said):
            bench.bench(bench.BenchOptions(**wrong))
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda _: type("", (), dict(free=10**9)))
    with pytest.raises(UserError, match="takes 16"):
        bench.bench(bench.BenchOptions(workdir=tmp_path))
