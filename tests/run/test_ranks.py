"""Several CPU ranks under the real launchers. `make test-ranks` runs these; one launch stays in `make test`."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from qlora_kit.run.checkpoint import checkpoints, load_checkpoint
from qlora_kit.training.engine import free_port
from qlora_kit.tools.commands import run_app
from qlora_kit.run.monitor import read_metrics

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_llama):
    from conftest import write_rows

    folder = tmp_path_factory.mktemp("ranks") / "deepspeed_train"
    assert run_app(["new", str(folder)]) == 0
    write_rows(folder / "data/rows.json")

    return folder


def settings(tiny_llama, *more):
    return [f"model.base_model={tiny_llama}", "model.lora_r=4", "data.train_file=data/rows.json", "data.score=none", "training.learning_rate=0.01",
            "training.num_epochs=4", *more]


ENV = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def bare(ranks, *words, script="scripts/train.py"):
    """The deepspeed command as one types it in a project."""
    return ["deepspeed", f"--num_gpus={ranks}", f"--master_port={free_port()}", script, "--deepspeed", "configs/deepspeed_config.json", *words]


def launch(project, ranks, *words, **options):
    """Ends well, and leaves nothing in the machine's memory."""
    command = bare(ranks, *words, **options)
    port = command[2].partition("=")[2]
    r = subprocess.run(command, cwd=project, env=ENV, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    assert not list(Path("/dev/shm").glob(f"*_{port}_*"))
    return r


def alone(project, *words):
    r = subprocess.run([sys.executable, "scripts/train.py", *words], cwd=project, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600)
    assert r.returncode == 0, r.stdout + r.stderr


def test_five_steps_on_two_ranks_equal_one_process(project, tiny_llama):
    """fp32: another order of the same sums moves a loss by a few roundings (6e-8), and Adam's division enlarges it step by step."""
    common = settings(tiny_llama, "training.max_steps=5", "training.save_steps=5")
    launch(project, 2, *common, "training.batch_size=2", "training.output_dir=runs/two")
    alone(project, *common, "training.batch_size=4", "training.output_dir=runs/one")
    two, one = (project / "runs" / n for n in ("two", "one"))
    assert len(read_metrics(two)) == 5
    for a, b in zip(read_metrics(one), read_metrics(two)):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4) and a["tokens"] == b["tokens"]
    adapters = [load_file(r / "adapter/adapter_model.safetensors") for r in (one, two)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        assert tensor.shape == adapters[1][name].shape and tensor.numel()
        assert (tensor - adapters[1][name]).norm() <= 1e-3 * tensor.norm()
    stage = json.loads((two / "deepspeed.json").read_text())
    assert stage["zero_optimization"]["stage"] == 3 and "auto" not in json.dumps(stage)


@pytest.mark.ranks
def test_packed_rows_evaluations_and_answers_on_two_ranks_are_those_of_one_process(project, tiny_llama):
    """Stage 3 before, between and after steps; fp32 sums in another order."""
    from conftest import write_rows

    write_rows(project / "data/score.json", 2)
    common = settings(tiny_llama, "training.max_steps=4", "training.save_steps=4", "training.eval_steps=2", "data.packing=best_fit", "training.max_length=96", "data.validation_split=0.2",
                      "model.lora_dropout=0.0", "training.gradient_accumulation_steps=2")
    common[common.index("data.score=none")] = "data.score=exact_match"
    launch(project, 2, *common, "data.score_file=data/score.json", "training.batch_size=1", "training.output_dir=runs/packed-two")
    alone(project, *common, "data.score_file=data/score.json", "training.batch_size=2", "training.output_dir=runs/packed-one")
    two, one = (project / "runs" / n for n in ("packed-two", "packed-one"))
    assert len(read_metrics(one)) == len(read_metrics(two)) == 4
    for a, b in zip(read_metrics(one), read_metrics(two)):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b.get("val_loss") == (pytest.approx(a["val_loss"], rel=1e-5) if "val_loss" in a else None)
    answers = [json.loads((run / "answers.json").read_text()) for run in (one, two)]
    assert answers[0] == answers[1] and all({"before", "after"} <= entry.keys() for entry in answers[0])
    zero = json.loads((two / "deepspeed.json").read_text())["zero_optimization"]
    assert zero["stage"] == 3 and zero["overlap_comm"] is False and not [key for key in zero if key.startswith("stage3")]


SPY = """
import json, os, signal, time
import torch
import yaml
from qlora_kit.run import train as kit
from qlora_kit.run import run_folder
from qlora_kit.training import loop
from qlora_kit.data.rows import load_conversations

RANK, HERE = int(os.environ.get("RANK", 0)), os.path.dirname(__file__)
seed_step, restore, load_checkpoint = loop.seed_step, kit.restore, run_folder.load_checkpoint

def step(seed, step, rank):
    seed_step(seed, step, rank)
    time.sleep(float(os.environ.get("SPY_SLOW", 0)))
    for what in ("fail", "hang"):
        if os.environ.get("SPY") == f"{what} {rank} {step}":
            open(f"{HERE}/stamp", "w").write(str(time.time()))
            if what == "fail": raise ValueError("boom")
            time.sleep(600)

def compared(engine, checkpoint):
    progress, saved = restore(engine, checkpoint), load_checkpoint(checkpoint).tensors
    t = yaml.safe_load((checkpoint.parents[1] / "config.yaml").read_text())["training"]
    now = engine.state()
    result = dict(ranks=engine.ranks, equal=now.keys() == saved.keys() and all(torch.equal(now[k], saved[k]) for k in saved), tensors=len(saved),
                  batch_size=t["batch_size"], accumulation=t["gradient_accumulation_steps"])
    open(f"{HERE}/restored-{engine.ranks}-{RANK}.json", "w").write(json.dumps(result))
    return progress

def load(path):
    loop.seed_step, kit.restore = step, compared
    if os.environ.get("SPY") == "load":
        open(f"{HERE}/loading-{RANK}", "w").close()
        time.sleep(600)
    return load_conversations("data/rows.json")
"""

TWO_RUNS = """
import sys
from pathlib import Path
sys.argv = [a for a in sys.argv if not a.startswith("--local_rank")]
from qlora_kit.run.config import load_config
from qlora_kit.training.engine import leave
from qlora_kit.tools.commands import quiet_libraries
from qlora_kit.run.train import train
quiet_libraries()
words = sys.argv[3:]
for name, more in (("plain", ["model.lora_dropout=0.0", "training.max_steps=14", "training.save_steps=4", "training.save_total_limit=50", "data.load_dataset=utils.spy.load"]),
                   ("dropped", ["model.lora_dropout=0.1", "training.max_steps=6", "training.save_steps=3"])):
    train(load_config("configs/train_config.yaml", [*words, *more, f"training.output_dir=runs/{name}"]), deepspeed=sys.argv[2], quiet=True, base=Path("configs"))
leave()
"""


@pytest.fixture(scope="module")
def runs(project, tiny_llama):
    """One launch of two ranks that trains twice: 14 steps without dropout, 6 steps with it."""
    (project / "utils/spy.py").write_text(SPY)
    (project / "scripts/two_runs.py").write_text(TWO_RUNS)
    launch(project, 2, *settings(tiny_llama, "training.batch_size=2"), script="scripts/two_runs.py")
    return project / "runs"


def cut_at(source, target, step):
    """The run as a power cut after `step` leaves it."""
    shutil.copytree(source, target)
    for checkpoint in checkpoints(target):
        if load_checkpoint(checkpoint).step > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(target / "adapter")
    return target


def tensors(run):
    return load_checkpoint(checkpoints(run)[0]).tensors


@pytest.mark.ranks
def test_two_ranks_resume_to_the_last_bit(project, tiny_llama, runs):
    full, cut = runs / "dropped", cut_at(runs / "dropped", runs / "cut", 3)
    launch(project, 2, *settings(tiny_llama, "training.batch_size=2", "training.max_steps=6", "training.save_steps=3", "model.lora_dropout=0.1"),
           "training.output_dir=runs/cut", "--resume", "runs/cut")
    assert [r["loss"] for r in read_metrics(cut)] == [r["loss"] for r in read_metrics(full)]
    a, b = tensors(full), tensors(cut)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks, launcher, shares", [(1, [], (2, 2)), (4, ["--torchrun"], (1, 1))])
def test_a_checkpoint_of_two_ranks_goes_on_with(project, tiny_llama, runs, ranks, launcher, shares):
    """Without dropout: bit-equal after loading, and then the same rows in another order of summation, 6e-8 each."""
    cut = cut_at(runs / "plain", runs / f"on-{ranks}", 4)
    words = settings(tiny_llama, "training.batch_size=2", "training.max_steps=14", "training.save_steps=4", "training.save_total_limit=50", "data.load_dataset=utils.spy.load",
                     "model.lora_dropout=0.0", f"training.output_dir={cut}")
    r = subprocess.run(["qlora-kit", "launch", "configs/train_config.yaml", "--ranks", str(ranks), *launcher, *words, "--resume", str(cut)], cwd=project, env=ENV,
                       capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    for rank in range(ranks):
        said = json.loads((project / f"utils/restored-{ranks}-{rank}.json").read_text())
        assert said["ranks"] == ranks and said["equal"] and said["tensors"] > 10 and (said["batch_size"], said["accumulation"]) == shares
    full, now = read_metrics(runs / "plain"), read_metrics(cut)
    assert [r["step"] for r in now] == [r["step"] for r in full] == list(range(1, 15)) and now[:4] == full[:4]
    assert [r["tokens"] for r in now] == [r["tokens"] for r in full]
    for a, b in zip(full[4:], now[4:]):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert f"torchrun --nnodes=1 --nproc_per_node={ranks}" in r.stderr if launcher else "torchrun" not in r.stderr


class Running:
    """A launched run that the test will disturb."""

    def __init__(self, project, command, name, **env):
        self.run, self.project = project / "runs" / name, project
        for old in (project / "utils").glob("loading-*"):
            old.unlink()
        self.process = subprocess.Popen(command, cwd=project, env={**ENV, **env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def until(self, condition, seconds=300):
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def trained(self, steps=3):
        self.until(lambda: (self.run / "metrics.jsonl").exists() and len(read_metrics(self.run)) >= steps)

    def pid(self, rank):
        return int((self.run / f"logs/rank-{rank}.pid").read_text().split()[1])

    def end(self, seconds=120):
        text, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, text

    @property
    def state(self):
        return json.loads((self.run / "state.json").read_text())

    def nothing_left(self, seconds=60):
        """Every process that was started in this project's folder has ended."""
        deadline = time.monotonic() + seconds
        while left := [p for p in psutil.process_iter() if here(p, self.project)]:
            assert time.monotonic() < deadline, [p.cmdline() for p in left]
            time.sleep(0.2)


def here(process, folder):
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder)
    except psutil.Error:
        return False


def kit(name, tiny_llama, *more):
    words = settings(tiny_llama, "training.batch_size=2", "training.num_epochs=100", "data.load_dataset=utils.spy.load", f"training.output_dir=runs/{name}")
    return ["qlora-kit", "launch", "configs/train_config.yaml", "--ranks", "2", *words, *more]


@pytest.fixture
def spied(project):
    (project / "utils/spy.py").write_text(SPY)
    return project


@pytest.mark.ranks
@pytest.mark.parametrize("what", ["fail", "hang"])
def test_one_rank_fails_and_the_others_end(spied, tiny_llama, what):
    """`fail`: sockets close. `hang`: only the limit of 20 s on a message ends the wait."""
    run = Running(spied, kit(what, tiny_llama, "--timeout", "20"), what, SPY=f"{what} 1 2")
    code, text = run.end(600)
    assert code == 1 and time.time() - float((spied / "utils/stamp").read_text()) < 60, text
    assert run.state["state"] == "failed"
    if what == "fail":
        assert run.state["error"] == "rank 1: ValueError: boom" and "rank 1: ValueError: boom" in text
        assert "boom" in (run.run / "logs/rank-1.log").read_text() and "Traceback" in (run.run / "logs/rank-1.log").read_text()
    else:
        assert run.state["error"].startswith("rank 0: ") and "20" in run.state["error"]
    run.nothing_left()


@pytest.mark.ranks
def test_one_rank_is_killed_and_the_others_end(spied, tiny_llama):
    run = Running(spied, kit("killed", tiny_llama, "--timeout", "20"), "killed", SPY_SLOW="0.3")
    run.trained()
    os.kill(run.pid(1), signal.SIGKILL)
    code, text = run.end(60)
    assert code == 1 and run.state["state"] == "failed" and "rank 1 ended without a word" in run.state["error"] and "rank 1 ended without a word" in text
    run.nothing_left()


@pytest.mark.ranks
def test_sigterm_to_launch_saves_on_every_rank(spied, tiny_llama):
    run = Running(spied, kit("told", tiny_llama), "told", SPY_SLOW="0.3")
    run.trained()
    run.process.send_signal(signal.SIGTERM)
    code, text = run.end()
    assert code == 143, text
    summary = json.loads((run.run / "summary.json").read_text())
    assert summary["status"] == "SIGTERM" and run.state["state"] == "stopped" and load_checkpoint(checkpoints(run.run)[0]).step == summary["steps"]
    assert text.count("results in") == 1 and text.count("SIGTERM: ") == 1, "rank 0 alone speaks"
    assert all("training from step 0" in (run.run / f"logs/rank-{r}.log").read_text() for r in (0, 1))
    threads = json.loads((run.run / "environment.json").read_text())["threads"]
    assert threads == int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // 2))
    run.nothing_left()


@pytest.mark.ranks
def test_sigint_while_loading_ends_at_once(spied, tiny_llama):
    run = Running(spied, kit("early", tiny_llama), "early", SPY="load")
    run.until(lambda: len(list((spied / "utils").glob("loading-*"))) == 2)
    run.process.send_signal(signal.SIGINT)
    code, text = run.end(60)
    assert code == 130 and run.state["state"] == "stopped" and "Traceback" not in text, text
    run.nothing_left()


@pytest.mark.ranks
@pytest.mark.parametrize("launcher, number", [("deepspeed", signal.SIGTERM), ("qlora-kit", signal.SIGKILL)])
def test_ranks_save_when_their_launcher_is_gone(spied, tiny_llama, launcher, number):
    """The bare command has no handler and dies; its ranks notice. A `launch` that is killed takes the command with it, and the ranks notice that."""
    command = kit(launcher, tiny_llama)
    run = Running(spied, bare(2, *command[5:]) if launcher == "deepspeed" else command, launcher, SPY_SLOW="0.3")
    run.trained()
    run.process.send_signal(number)
    run.process.wait(60)
    run.nothing_left()
    summary = json.loads((run.run / "summary.json").read_text())
    assert summary["status"] == "SIGTERM" and run.state["state"] == "stopped" and load_checkpoint(checkpoints(run.run)[0]).step == summary["steps"]
    run.process.communicate()


def of_launch(folder):
    """Living processes of the launches whose temporary folder this is, the ranks' helpers too."""
    found = []
    for p in psutil.process_iter():
        try:
            if p.status() != psutil.STATUS_ZOMBIE and p.environ().get("QLORA_KIT_TELL", "").startswith(str(folder)):
                found.append(p)
        except psutil.Error:
            pass
    return found


def known_as(process):
    """launch: the command; middle: DeepSpeed's process; rank."""
    try:
        if process.environ().get("RANK"):
            return "rank"
        return "middle" if "deepspeed.launcher.launch" in process.cmdline() else "command"
    except psutil.Error:
        return ""


@pytest.mark.ranks
@pytest.mark.parametrize("killed, seen, later, more", [
    ("launch", "middle", 0.5, []), ("launch", "rank", 3.0, ["--torchrun"]), ("command", "middle", 0.0, []), ("command", "rank", 4.0, []), ("middle", "middle", 1.0, []),
    ("middle", "rank", 0.0, []),
])
def test_nothing_lives_on_after_a_launcher_that_is_killed_early(project, tiny_llama, tmp_path, killed, seen, later, more):
    """Killed so many seconds after a process of that kind was seen: while the ranks import, or before there is one."""
    words = settings(tiny_llama, "training.num_epochs=10000", f"training.output_dir={tmp_path}/run")
    launched = subprocess.Popen(["qlora-kit", "launch", "configs/train_config.yaml", "--ranks", "2", *words, *more], cwd=project, env={**ENV, "TMPDIR": str(tmp_path)},
                                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while seen not in (kinds := {known_as(p): p.pid for p in of_launch(tmp_path)}):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(later)
    os.kill(launched.pid if killed == "launch" else kinds[killed], signal.SIGKILL)
    deadline = time.monotonic() + 20
    try:
        while of_launch(tmp_path):
            assert time.monotonic() < deadline, [p.cmdline() for p in of_launch(tmp_path)]
            time.sleep(0.1)
        time.sleep(1)
        assert of_launch(tmp_path) == [] and launched.wait(20) == (-signal.SIGKILL if killed == "launch" else 1)
    finally:
        for p in [*of_launch(tmp_path), launched]:
            p.kill()
        launched.wait()


@pytest.mark.ranks
def test_two_hosts_and_one_of_them_is_told_to_stop(spied, tiny_llama):
    """Both are this machine, each with a launch of its own. The signal reaches one rank; both stop after the same step."""
    (spied / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    port, command = str(free_port()), kit("hosts", tiny_llama)
    command[4] = "1"
    nodes = [Running(spied, [*command, "--hostfile", "hosts", "--node-rank", str(n), "--port", port], "hosts", SPY_SLOW="0.3") for n in (0, 1)]
    nodes[0].trained()
    nodes[1].process.send_signal(signal.SIGTERM)
    ended = [node.end() for node in nodes]
    assert [code for code, _ in ended] == [143, 143], ended
    assert nodes[0].state["state"] == "stopped" and json.loads((nodes[0].run / "environment.json").read_text())["ranks"] == 2
    nodes[0].nothing_left()
