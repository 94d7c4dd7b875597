"""A scaffolded project, used as a person would use it."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from qlora_kit.tools.commands import run_app
from qlora_kit.run.monitor import read_metrics

BIN = Path(sys.executable).parent


def call(*words, cwd, check=None, **env):
    r = subprocess.run([str(w) for w in words], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600,
                       env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **env})
    assert check is None or r.returncode == check, r.stdout + r.stderr
    return r


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_llama):
    """`qlora-kit new`, then the config pointed at a tiny model and few rows."""
    import yaml

    from conftest import write_rows

    folder = tmp_path_factory.mktemp("project") / "deepspeed_train"
    assert run_app(["new", str(folder)]) == 0
    config = folder / "configs/train_config.yaml"
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    values["model"] |= {"base_model": str(tiny_llama), "lora_r": 4}
    values["training"] |= {"batch_size": 2, "max_steps": 6, "learning_rate": 0.01, "save_steps": 2}
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    write_rows(folder / "data/sample_data.json")
    write_rows(folder / "data/heldout_data.json", 3)
    return folder


def test_the_tree_is_the_one_promised(project):
    promised = """configs/train_config.yaml configs/deepspeed_config.json data/sample_data.json models/__init__.py scripts/train.py
        scripts/inference.py utils/data_utils.py utils/model_utils.py requirements.txt setup.py README.md""".split()
    assert [p for p in promised if not (project / p).is_file()] == []
    assert "nbs/tools/07_commands.ipynb" in (project / "scripts/train.py").read_text()


def test_both_scripts_run_as_they_stand(project):
    r = call("python", "scripts/train.py", cwd=project, check=0)
    assert "held-out score" in r.stdout and "adapter" in r.stdout
    summary = json.loads((project / "runs/train_config/summary.json").read_text())
    assert summary["steps"] == 6 and summary["score_before"] is not None and summary["score_after"] is not None
    r = call("python", "scripts/inference.py", cwd=project, check=0)
    assert r.stderr == ""
    call("python", project / "scripts/inference.py", "Count to 3.", "--max-new-tokens", "4", cwd="/", check=0)


def test_debug_shows_the_first_batch(project):
    r = call("python", "scripts/train.py", "--debug", "training.max_steps=1", "data.score=none", cwd=project, check=0)
    assert "Count to" in r.stdout


def test_sigterm_saves_and_the_run_goes_on(project):
    folder = project / "runs/terminated"
    words = ["python", "scripts/train.py", "training.output_dir=runs/terminated", "training.max_steps=null", "training.num_epochs=60", "data.score=none"]
    process = subprocess.Popen([str(BIN / words[0]), *words[1:]], cwd=project, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (folder.exists() and (folder / "metrics.jsonl").exists() and len(read_metrics(folder)) >= 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    stopped = json.loads((folder / "summary.json").read_text())
    assert stopped["status"] == "SIGTERM"
    r = call(*words[:3], "training.max_steps=null", "training.num_epochs=60", "data.score=none", "--resume", folder, cwd=project, check=0)
    steps = [r["step"] for r in read_metrics(folder)]
    assert steps == sorted(set(steps)) and steps[-1] > stopped["steps"], r.stderr


def test_hooks_of_the_project_are_used(project):
    r = call("python", "scripts/train.py", "training.max_steps=1", "data.score=none", "data.load_dataset=utils.data_utils.load_custom_dataset",
             "model.create_model=models.create_model", cwd=project, check=0)
    assert "adapter" in r.stdout and "--trust-hooks" not in r.stderr


HOSTILE = Path(__file__).parents[1]/"fixtures/hostile_run"


@pytest.fixture
def hostile(tmp_path, monkeypatch, tiny_llama):
    """A stranger's run folder below the folder where one works; a canary appears if anything of it is imported or called."""
    import yaml

    shutil.copytree(HOSTILE, tmp_path / "hostile")
    for name in ("model.safetensors", "tokenizer.json"): shutil.copyfile(tiny_llama / name, tmp_path / "hostile/adapter" / name)
    from conftest import write_rows

    write_rows(tmp_path / "rows.json")
    (tmp_path / "mine_to_be_named.py").write_text("import os\nopen(os.environ['CANARY'], 'a').close()\ndef load(path): return []")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CANARY", str(tmp_path / "CANARY"))

    def write(**changes):
        values = yaml.safe_load((HOSTILE / "config.yaml").read_text())
        for key, value in changes.items():
            section, name = key.split("__")
            values[section][name] = value
        (tmp_path / "hostile/config.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / "hostile"

    return write


NAMES = ["os.system", "subprocess:run", "builtins.exec", "reader.load", "reader:load", "hostile.reader.load", "yaml.load", "typing.load", "..reader.load", "{folder}/reader.load", "__init__.load",
         "reader.__builtins__", "mine_to_be_named.load"]
READERS = [["evaluate", "hostile"], ["evaluate", "hostile/adapter"], ["inspect", "hostile/config.yaml"], ["train", "hostile/config.yaml"], ["train", "hostile/config.yaml", "--resume", "hostile"],
           ["launch", "hostile/config.yaml", "--ranks", "2"]]


@pytest.mark.parametrize("words", READERS, ids=lambda words: " ".join(words))
def test_a_strangers_run_runs_nothing(hostile, words, tmp_path, monkeypatch, capsys):
    """Whatever function its config names, of Python, of the folder itself or of the project where one works: one line, exit code 2."""
    from qlora_kit.tools import processes as module

    monkeypatch.setattr(module, "Popen", lambda *a, **k: pytest.fail("started"))
    for name in NAMES:
        for field in ("data__load_dataset", "model__create_model") if words[0] != "evaluate" else ("data__load_dataset",):
            hostile(**{"data__load_dataset": None, "model__create_model": None, field: name.format(folder=tmp_path / "hostile")})
            assert run_app(words) == 2, (name, field)
            err = capsys.readouterr().err
            assert len(err.strip().splitlines()) == 1 and "--trust-hooks" in err and name.format(folder=tmp_path / "hostile") in err and "hostile/config.yaml" in err, err
            assert name != "mine_to_be_named.load" or str(tmp_path / "mine_to_be_named.py") in err
            assert not (tmp_path / "CANARY").exists() and not (tmp_path / "runs").exists(), (name, field)


@pytest.mark.parametrize("words", [["generate", "hostile", "a"], ["generate", "hostile/adapter", "a"], ["generate", "{base}", "a"], ["chat", "hostile"], ["merge", "hostile", "out"], ["evaluate", "hostile", "--data", "rows.json"],
                                   ["plan", "hostile/config.yaml"]], ids=lambda words: " ".join(words))
def test_nor_do_an_adapters_settings_and_a_bases_code(hostile, words, tmp_path, capsys, tiny_llama):
    """`auto_map` of config and tokenizer, `auto_mapping` and `megatron_core` of the adapter name modules of the folder."""
    folder = hostile(model__base_model=str(tmp_path / "hostile/adapter"))
    if words[0] != "plan":
        assert run_app([w.format(base=folder / "adapter") for w in words]) == 2
    else:
        assert run_app(words) == 2
    hostile(model__base_model=str(tiny_llama))  # a proper base: the adapter's settings are reached
    shutil.copyfile(tiny_llama / "config.json", folder / "adapter/config.json")
    code = run_app([w.format(base=folder / "adapter") for w in words])
    assert code == (0 if words[0] == "plan" else 2)
    err = capsys.readouterr().err
    assert "Traceback" not in err and not (tmp_path / "CANARY").exists()


def test_a_config_of_elsewhere_runs_functions_when_they_are_trusted(project, tmp_path, capsys, monkeypatch):
    """The whole project of another, named from outside of it."""
    words = ["inspect", str(project / "configs/trusted.yaml"), "--rows", "1"]
    (project / "configs/trusted.yaml").write_text((project / "configs/train_config.yaml").read_text().replace("data:", "data:\n  load_dataset: readers_for_inspect.load\n"))
    (project / "readers_for_inspect.py").write_text("from utils.data_utils import load_custom_dataset as load")
    monkeypatch.chdir(tmp_path)
    assert run_app(words) == 2 and "--trust-hooks runs load of" in capsys.readouterr().err
    assert run_app([*words, "--trust-hooks"]) == 0
    assert capsys.readouterr().err.startswith(f"--trust-hooks: data.load_dataset runs load of {project / 'readers_for_inspect.py'}\n")
    monkeypatch.chdir(project)
    assert run_app(["inspect", "configs/trusted.yaml", "--rows", "1"]) == 0 and "--trust-hooks" not in capsys.readouterr().err


@pytest.mark.parametrize("how", ["load", "create"])
def test_a_function_that_ends_the_process_is_no_success(project, how):
    (project / "leaving.py").write_text("import sys\ndef load(path):\n    yield {'instruction': 'a', 'output': 'b'}\n    sys.exit(0)\ndef create(*args): sys.exit(0)")
    field = {"load": "data.load_dataset", "create": "model.create_model"}[how]
    r = call("qlora-kit", "train", "configs/train_config.yaml", "data.score=none", "training.output_dir=runs/left", f"{field}=leaving.{how}", cwd=project, check=2)
    assert r.stderr.strip().splitlines()[-1].startswith(f"{field}: leaving.{how} ended with SystemExit: 0 ({project / 'leaving.py'}:") and "Traceback" not in r.stderr
    assert not (project / "runs/left").exists()


def test_whatever_ends_the_process_is_no_success(monkeypatch, capsys):
    from qlora_kit.tools import commands as module

    monkeypatch.setattr(module, "recipe_names", lambda: sys.exit(0))
    assert run_app(["recipe"]) == 1 and "sys.exit(0)" in capsys.readouterr().err


@pytest.mark.parametrize("torchrun", [False, True])
def test_ranks_import_nothing_of_the_folder_where_one_works(tmp_path, monkeypatch, torchrun):
    """The true launchers start `python -m`, which puts that folder first. The config is missing, so the ranks get as far as their own imports."""
    from qlora_kit.tools.processes import launch

    for name in ("typing", "argparse", "json", "yaml", "typer", "psutil", "torch", "numpy"): shutil.copyfile(HOSTILE / "yaml.py", tmp_path / f"{name}.py")
    for name in ("qlora_kit", "deepspeed", "transformers"):
        (tmp_path / name).mkdir()
        shutil.copyfile(HOSTILE / "yaml.py", tmp_path / name / "__init__.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CANARY", str(tmp_path / "CANARY"))
    run = launch("no_such.yaml", 2, output=True, torchrun=torchrun)
    assert run.wait() == 2, run.message("output")
    assert "no_such.yaml" in run.message("output") and not (tmp_path / "CANARY").exists(), run.message("output")


@pytest.mark.parametrize("words, expected", [
    (["train", "missing.yaml"], "missing.yaml"),
    (["train", "{config}", "training.learnig_rate=1"], "did you mean learning_rate"),
    (["train", "{config}", "training.batch_size=many"], "batch_size"),
    (["train", "{config}", "data.train_file=nowhere.json"], "nowhere.json"),
    (["train", "{config}", "model.base_model=nobody/nothing", "data.score=none"], "base_model"),
    (["train", "{config}", "--resume", "runs/none"], "checkpoint"),
    (["trian"], "train"),
    (["generate", "runs/none", "hello"], "base_model"),
])
def test_a_mistake_is_one_line_and_exit_code_2(project, words, expected, capsys, monkeypatch):
    monkeypatch.chdir(project)
    assert run_app([w.format(config="configs/train_config.yaml") for w in words]) == 2
    err = capsys.readouterr().err
    assert expected in err and "Traceback" not in err and len(err.strip().splitlines()) <= 2


def test_inspect_counts_rows_and_trains_nothing(project, capsys, monkeypatch):
    monkeypatch.chdir(project)
    before = set(project.rglob("*"))
    assert run_app(["inspect", "configs/train_config.yaml", "--rows", "2"]) == 0
    assert "training" in capsys.readouterr().out and {p for p in project.rglob("*") if "__pycache__" not in p.parts} <= before


def test_the_shipped_files_pass_the_checks(tmp_path, monkeypatch):
    from qlora_kit.run.config import load_config
    from qlora_kit.tools.commands import ASSETS
    from qlora_kit.training.zero import read_deepspeed, resolve, zero_config

    cfg = load_config(ASSETS / "scaffold/configs/train_config.yaml")
    assert cfg.model.base_model == "smollm2-135m-instruct" and cfg.data.score == "exact_match"
    resolved = resolve(read_deepspeed(ASSETS / "scaffold/configs/deepspeed_config.json"), zero_config())
    assert "auto" not in json.dumps(resolved)


def test_help_has_an_example_for_every_command(capsys):
    for command in ("new", "inspect", "train", "launch", "generate"):
        assert run_app([command, "--help"]) == 0
        assert "Example: qlora-kit" in capsys.readouterr().out


LAUNCHER = """
import os, subprocess, sys
from pathlib import Path
ranks = [subprocess.Popen([sys.executable, "-c", os.environ["RANKS"]], env={**os.environ, "RANK": str(r)}, start_new_session=bool(r)) for r in range(2)]
sys.exit(max(abs(p.wait()) for p in ranks) and 1)
"""
RANKS = """
import os, signal, subprocess, sys, time
from pathlib import Path
helper = subprocess.Popen(["sleep", "600"]) # what a rank starts is no rank
told, rank = Path(os.environ["QLORA_KIT_TELL"]), os.environ["RANK"]
def note(number, frame):
    helper.kill(); helper.wait()
    if rank == "0": (told/"exit").write_text(str(128+number))
    sys.exit(128+number)
for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, note)
(told/f"up-{rank}").touch()
while True: time.sleep(1)
"""


@pytest.fixture
def pretend(tmp_path):
    """A launcher with two ranks in sessions of their own, without a model."""
    from qlora_kit.tools.processes import family, launch_environment, Launched

    def start(ranks=RANKS):
        process = subprocess.Popen([sys.executable, "-c", LAUNCHER], env={**launch_environment(2, tmp_path), "RANKS": ranks}, start_new_session=True)
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("up-*"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return Launched(["pretend"], 2, tmp_path, process)

    yield start
    for p in family(tmp_path):
        p.kill()


DEAD = """
import os, signal, subprocess, sys
if sys.argv[1] == "told": # SIGTERM ends it, as it ends DeepSpeed's command; the process below it ignores the signal
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
middle = subprocess.Popen([sys.executable, "-c", sys.argv[2]], start_new_session=True)
if sys.argv[1] == "killed": os.kill(os.getpid(), signal.SIGKILL)
signal.pause()
"""
LATE = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(told := __import__("pathlib").Path(os.environ["QLORA_KIT_TELL"])/"up").touch()
time.sleep(2)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={**os.environ, "RANK": "0"}, start_new_session=True).wait()
"""


@pytest.mark.parametrize("how, code", [("killed", 1), ("told", 143)])
def test_ranks_that_come_after_their_launcher_died_are_ended_too(tmp_path, how, code):
    """Between the command and the ranks is a process that has not started them yet; these ranks do not watch by themselves."""
    from qlora_kit.tools.processes import family, launch_environment, Launched

    process = subprocess.Popen([sys.executable, "-c", DEAD, how, LATE], env=launch_environment(2, tmp_path), start_new_session=True)
    run, ended = Launched(["pretend"], 2, tmp_path, process), []
    while not (tmp_path / "up").exists():
        time.sleep(0.05)
    waiting = threading.Thread(target=lambda: ended.append(run.wait([signal.SIGTERM] if how == "told" else [])), daemon=True)
    waiting.start()
    waiting.join(15)
    left = family(tmp_path)
    for p in left:
        p.kill()
    assert not left and ended == [code]
    time.sleep(3)
    assert family(tmp_path) == []


def test_one_look_without_a_process_is_not_the_end(tmp_path, monkeypatch):
    """One may be born during the look."""
    from qlora_kit.tools import processes as module

    done, looks = subprocess.Popen(["true"]), iter([[], [psutil.Process()], [], []])
    done.wait()
    monkeypatch.setattr(module, "family", lambda told: next(looks))
    monkeypatch.setattr(module, "ranks_of", lambda processes, alone: {})
    assert module.Launched(["qlora-kit"], 1, tmp_path, done).wait() == 0 and list(looks) == []


def test_a_launcher_that_says_0_without_a_word_of_its_ranks_has_failed(tmp_path):
    """DeepSpeed's command does so when the process below it was killed."""
    from qlora_kit.tools.processes import Launched

    done = subprocess.Popen(["true"])
    done.wait()
    assert [Launched(command, 2, tmp_path, done).exit_code() for command in (["deepspeed"], ["qlora-kit"], ["deepspeed", "--hostfile=hosts"])] == [1, 0, 0]
    assert Launched(["deepspeed"], 2, tmp_path, done, asked=[(signal.SIGTERM, 0.0)]).exit_code() == 143
    (tmp_path / "exit").write_text("0")
    assert Launched(["deepspeed"], 2, tmp_path, done).exit_code() == 0


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_goes_to_every_rank_and_the_code_comes_back(pretend, tmp_path, number, code):
    from qlora_kit.tools.processes import family, ranks_of

    run = pretend()
    assert len(family(tmp_path)) == 5 and sorted(ranks_of(family(tmp_path))) == [0, 1]
    assert run.wait([number]) == code and family(tmp_path) == []


def test_ranks_that_outlive_one_of_them_are_killed(pretend, tmp_path):
    from qlora_kit.tools.processes import family, ranks_of

    run = pretend()
    threading.Timer(1.5, ranks_of(family(tmp_path))[1].kill).start()
    assert run.wait(grace=1) == 1 and family(tmp_path) == []


def test_a_helper_of_a_run_without_a_launcher_is_no_rank(tmp_path):
    """Under DeepSpeed one process sets RANK for itself; what it starts then inherits it, and may end long before the run does."""
    from qlora_kit.tools.processes import launch_environment, Launched

    script = "import os, subprocess, time; os.environ['RANK'] = '0'; subprocess.run(['sleep', '1']); time.sleep(4)"
    run = Launched(["qlora-kit"], 1, tmp_path, subprocess.Popen([sys.executable, "-c", script], env=launch_environment(1, tmp_path)))
    assert run.wait(grace=1) == 0


def test_asked_again_everything_is_killed(pretend, tmp_path):
    from qlora_kit.tools.processes import family

    run = pretend(RANKS.replace("signal.signal(s, note)", "signal.signal(s, lambda *_: None)"))
    run.pass_on(signal.SIGTERM)
    assert len(family(tmp_path)) == 5
    run.asked[0] = (signal.SIGTERM, time.monotonic() - 3)
    assert run.wait([signal.SIGTERM]) == 143 and family(tmp_path) == []


def test_one_process_is_launched_told_to_stop_and_answers_with_its_code(project, monkeypatch):
    """Not waited for, printing into a file, as a notebook does it; the run folder is known as soon as it is chosen."""
    from qlora_kit.tools.processes import family, launch

    monkeypatch.chdir(project)
    run = launch("configs/train_config.yaml", 1, ["training.output_dir=runs/launched", "training.max_steps=null", "training.num_epochs=500", "data.score=none"], output=True)
    deadline = time.monotonic() + 300
    while not (run.run and (run.run / "metrics.jsonl").exists() and read_metrics(run.run)):
        assert time.monotonic() < deadline and run.process.poll() is None, run.message("output")
        time.sleep(0.1)
    assert run.run == project / "runs/launched"
    assert run.wait([signal.SIGINT]) == 130, run.message("output")
    assert "SIGINT" in run.message("output") and json.loads((run.run / "state.json").read_text())["state"] == "stopped" and family(run.mailbox) == []


def test_the_commands_that_launch_writes(monkeypatch, tmp_path):
    from qlora_kit.data.files import UserError
    from qlora_kit.tools.processes import chosen_slots, launch_command, read_hosts

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch_command("c.yaml", 1, ["a.b=1"]) == ["qlora-kit", "train", "c.yaml", "a.b=1"]
    assert "--num_gpus=4" in launch_command("c.yaml", 4) and "--module" in launch_command("c.yaml", 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    assert "--include=localhost:2,5" in launch_command("c.yaml", 2) and "--num_gpus=4" in launch_command("c.yaml", 4)
    file = tmp_path / "hosts"
    file.write_text("# two\na slots=2\n\nb slots=4 # larger\n")
    hosts = read_hosts(file)
    assert hosts == [("a", 2), ("b", 4)]
    words = launch_command("c.yaml", 2, hosts=hosts, hostfile=file)
    assert {f"--hostfile={file}", "--master_addr=a"} <= set(words) and not any("num_gpus" in w for w in words)  # each host its slots
    same = chosen_slots(hosts, 2)
    assert same == [("a", 2), ("b", 2)] and "--num_gpus=2" in launch_command("c.yaml", 2, hosts=same, hostfile=file)
    assert {"--no_ssh", "--node_rank=1"} <= set(launch_command("c.yaml", 4, hosts=hosts, hostfile=file, node_rank=1))
    assert {"--nnodes=2", "--node_rank=1", "--master_addr=a"} <= set(launch_command("c.yaml", 2, hosts=same, node_rank=1, torchrun=True))
    for wrong, told in ((dict(ranks=3), "a has 2 slots"), (dict(ranks=None, torchrun=True), "give --ranks 2")):
        with pytest.raises(UserError, match=told): chosen_slots(hosts, **wrong)


@pytest.mark.parametrize("text", ["a slots=2\nb slots=4\n", "# two\n\na slots=2   # first\n", "a 4\n", "a slots=2\na slots=4\n", "a slots=x\n", "a slots = 2\n", "a\n", "", "# none\n"])
def test_hostfiles_are_read_as_deepspeed_reads_them(text, tmp_path, caplog):
    from deepspeed.launcher.runner import fetch_hostfile

    from qlora_kit.data.files import UserError
    from qlora_kit.tools.processes import read_hosts

    file = tmp_path / "hosts"
    file.write_text(text)
    try: expected = list(fetch_hostfile(str(file)).items())
    except ValueError: expected = None
    if expected: assert read_hosts(file) == expected
    else:
        with pytest.raises(UserError, match=r"hosts(:\d)?: "): read_hosts(file)


def test_threads_are_shared_unless_they_are_set(monkeypatch, tmp_path):
    from qlora_kit.tools.processes import launch_environment

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("RANK", "3")
    cores = len(os.sched_getaffinity(0))
    assert launch_environment(2, tmp_path)["OMP_NUM_THREADS"] == str(max(1, cores // 2)) and launch_environment(1000, tmp_path)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in launch_environment(1, tmp_path) and "RANK" not in launch_environment(2, tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch_environment(2, tmp_path)["OMP_NUM_THREADS"] == "7"


def test_launch_checks_the_config_before_it_starts_anything(project, monkeypatch, capsys):
    from qlora_kit.tools import processes as module

    monkeypatch.chdir(project)
    monkeypatch.setattr(module, "Popen", lambda *a, **k: pytest.fail("started"))
    assert run_app(["launch", "configs/train_config.yaml", "--ranks", "2", "training.batch_size=many"]) == 2
    assert run_app(["launch", "configs/train_config.yaml", "--hostfile", "nowhere"]) == 2
    err = capsys.readouterr().err
    assert "batch_size" in err and "nowhere" in err and "Traceback" not in err


def test_a_stop_outside_the_loop_is_a_code_and_a_line(project, monkeypatch, capsys):
    from qlora_kit.run import train as module

    monkeypatch.chdir(project)
    monkeypatch.setattr(module, "make_engine", lambda *a: signal.raise_signal(signal.SIGTERM))
    assert run_app(["train", "configs/train_config.yaml", "data.score=none", "training.output_dir=runs/none"]) == 143
    assert capsys.readouterr().err.strip().endswith("stopped by SIGTERM")


def test_a_streaming_run_is_evaluated_on_the_rows_that_it_held_out(tiny_config):
    """A stream is divided row by row; the splitter of whole files would score rows that were learned."""
    from conftest import run

    from qlora_kit.data.rows import held_out, load_conversations
    from qlora_kit.tools.commands import held_out_rows

    done = run(tiny_config("stream", data__streaming=True, data__validation_split=0.3, training__max_steps=1))
    _, rows = held_out_rows(str(done.run))
    everything = load_conversations(done.run.parents[1] / "rows.json")
    assert 0 < len(rows) < len(everything) and [c.messages for c in rows] == [c.messages for c in everything if held_out(c, 0.3, seed=0)]


@pytest.mark.parametrize("words", [["inspect", "{config}"], ["plan", "llama-3.1-8b-1x24gb", "--gpu-memory", "24GB"]], ids=lambda words: words[0])
def test_a_terminal_that_lacks_a_sign_ends_no_command(words, tiny_config, tmp_path):
    (tmp_path / "signs.json").write_text(json.dumps([dict(instruction="请解释", input="", output="✓ 茶")] * 4), encoding="utf-8")
    config = tiny_config("signs", data__train_file=str(tmp_path / "signs.json"), data__validation_split=0)
    done = subprocess.run([sys.executable, "-m", "qlora_kit.tools.commands", *(w.format(config=config) for w in words)], capture_output=True, timeout=120,
                          env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and b"?" in done.stdout, done.stderr.decode("cp1252")


def test_a_port_that_is_taken_is_one_line():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = "from qlora_kit.data.files import UserError\nfrom qlora_kit.training.engine import join_ranks\ntry: join_ranks(several=True)\nexcept UserError as e: print(e)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                              env=os.environ | dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu"))
    assert f"the ranks cannot meet at 127.0.0.1:{port}" in done.stdout and "--port" in done.stdout, done.stderr[-500:]
