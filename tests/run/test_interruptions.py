"""Signals, launchers that die, and locks that killed compilations leave behind: with real processes, and torch's own compiler driver."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from qlora_kit.run import interruptions
from qlora_kit.run.interruptions import (
    all_seen, Baton, dropped, intact, is_abandoned, keep_locked, launchers, pass_over)

MARKED = {**{k: v for k, v in os.environ.items() if k not in ("RANK", "QLORA_KIT_TELL")}, "TORCHELASTIC_RUN_ID": "test", "RANK": "0"}


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("module", ["qlora_kit.run.interruptions", "qlora_kit.tools.commands", "qlora_kit.launch"])
def test_the_watch_begins_before_the_slow_imports(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'peft', 'deepspeed') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


RANK = """
import sys, time
sys.path = [p for p in sys.path if p not in ("", sys.argv[1])]
from qlora_kit.run.interruptions import launchers, Signals, watch_launcher
time.sleep(float(sys.argv[2]))
watch_launcher(launchers(), every=0.1)
open(sys.argv[1] + "/up", "w").close()
if sys.argv[3] == "importing": time.sleep(600)
with Signals() as signals:
    signals.at_once = False
    while not signals: time.sleep(0.05)
open(sys.argv[1] + "/noted", "w").write(signals[0])
"""


@pytest.mark.parametrize("killed", ["command", "DeepSpeed's process"])
@pytest.mark.parametrize("when", ["training", "importing"])
def test_a_rank_notices_that_its_launcher_is_gone(tmp_path, when, killed):
    """Three generations, named as DeepSpeed names them: when one of the first two is killed, the third ends, at once or after its step."""
    (tmp_path / "deepspeed/launcher").mkdir(parents=True)
    for part in ("deepspeed", "deepspeed/launcher"):
        (tmp_path / part / "__init__.py").touch()
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "deepspeed/launcher/launch.py").write_text(
        "import subprocess, sys\nrank = subprocess.Popen([sys.executable, 'rank.py', *sys.argv[1:]])\nopen('pids', 'a').write(str(rank.pid))\nrank.wait()")
    middle = [sys.executable, "-m", "deepspeed.launcher.launch", str(tmp_path), "0", when]
    code = "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); open('pids', 'w').write(f'{p.pid} '); p.wait()"
    command = subprocess.Popen([sys.executable, "-c", code, *middle], cwd=tmp_path, env=MARKED)
    until(lambda: (tmp_path / "up").exists())
    between, rank = map(int, (tmp_path / "pids").read_text().split())
    if killed == "command":
        command.kill()
        command.wait()
    else:
        os.kill(between, signal.SIGKILL)
    until(lambda: gone(rank), 10)
    assert not (tmp_path / "noted").exists() if when == "importing" else (tmp_path / "noted").read_text() == "SIGTERM"
    command.kill()
    if not gone(between):
        os.kill(between, signal.SIGKILL)
    command.wait()


@pytest.mark.skipif(interruptions.is_python(1), reason="a container whose first process is Python adopts as a launcher would")
def test_a_launcher_that_dies_before_the_first_look_is_missed(tmp_path):
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL).pid, flush=True)"
    launcher = subprocess.run([sys.executable, "-c", code, "-c", RANK, str(tmp_path), "1", "importing"], env=MARKED, stdout=subprocess.PIPE, text=True, check=True)
    until(lambda: gone(int(launcher.stdout)), 20)


def test_a_command_that_died_before_deepspeeds_process_had_a_rank(monkeypatch):
    """Its process was adopted then. On one machine the command is its parent and Python; on several it may be a remote shell."""
    import base64

    world = {hosts: base64.urlsafe_b64encode(json.dumps(dict.fromkeys(hosts.split(), [0])).encode()).decode() for hosts in ("a", "a b")}
    monkeypatch.setattr(interruptions, "is_python", lambda number: number != 7)
    for hosts, parent, expected in (("a", 7, interruptions.GONE), ("a", 8, 8), ("a b", 7, 7), ("a", 0, 0)):
        seen = {"ppid": parent, "cmdline": ["python", "-m", "deepspeed.launcher.launch", f"--world_info={world[hosts]}", "train.py"]}
        monkeypatch.setattr(interruptions, "ask_process", lambda number, what, default=None: seen[what])
        assert interruptions.command_of(99) == expected


SHOW = "import os; from qlora_kit.run.interruptions import *; print([(os.getpid(), os.getppid()), launchers(), intact(launchers())])"


def shown(*command):
    r = subprocess.run(command, env=MARKED, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return eval(r.stdout)


def test_a_shell_between_launcher_and_rank_is_stepped_over():
    """This process stands for a program that starts ranks through torch's library."""
    (me, shell), links, whole = shown("sh", "-c", f"{sys.executable} -c '{SHOW}'; true")
    assert links == [(me, shell), (shell, os.getpid())] and whole
    assert shown("env", "-u", "TORCHELASTIC_RUN_ID", "sh", "-c", f"{sys.executable} -c '{SHOW}'; true")[1] == [], "a shell with RANK is no launcher"
    (me, parent), links, whole = shown(sys.executable, "-c", SHOW)
    assert links == [(me, os.getpid())] and whole


@pytest.mark.skipif(subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode != 0, reason="no rights to make a namespace")
@pytest.mark.parametrize("more", [[], ["--mount-proc"]])
def test_a_rank_without_a_visible_parent_goes_on(more):
    """As under `docker exec`: the parent's number is 0, or /proc shows the processes of another world."""
    (me, parent), links, whole = shown("unshare", "--pid", "--fork", *more, sys.executable, "-c", SHOW)
    assert (me, parent, links, whole) == (1, 0, [], True)
    (me, parent), links, whole = shown("unshare", "--pid", "--fork", *more, "sh", "-c", f"{sys.executable} -c '{SHOW}'; true")
    assert parent == 1 and links in ([], [(me, 1)]) and whole


def test_without_proc_the_parent_is_still_watched(monkeypatch):
    def nothing(*args): raise psutil.NoSuchProcess(1)
    monkeypatch.setattr(psutil, "Process", nothing)
    monkeypatch.setattr(interruptions, "can_look", lambda: False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("RANK", "0")
    assert launchers() == [(os.getpid(), os.getppid())] and intact(launchers())
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert launchers() == [(os.getpid(), 1)] and intact(launchers())


def test_a_locked_file_is_dropped_with_the_last_that_holds_it(tmp_path):
    """As `launch` hands it to the command: our own handle is closed, the child's counts."""
    with keep_locked(tmp_path / "launcher") as file:
        child = subprocess.Popen(["sleep", "600"], pass_fds=[file.fileno()])
    assert not dropped(tmp_path / "launcher") and not dropped(tmp_path / "missing")
    child.kill()
    child.wait()
    assert dropped(tmp_path / "launcher")


@pytest.mark.parametrize("file", ["caller", "launcher"])
def test_a_rank_ends_with_any_of_the_processes_above_it(tmp_path, file):
    locks = {name: keep_locked(tmp_path / name) for name in ("caller", "launcher")}
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), "0", "importing"], env={**MARKED, "QLORA_KIT_TELL": str(tmp_path)}, stderr=subprocess.PIPE, text=True)
    until(lambda: (tmp_path / "up").exists())
    assert rank.poll() is None
    locks[file].close()
    assert rank.wait(20) == 143 and "the command that started it is gone" in rank.stderr.read()


COMPILE = """
import sys
from torch.utils import cpp_extension
if sys.argv[2] == "ours":
    from qlora_kit.run.interruptions import guard_compilations
    guard_compilations()
print("begins", flush=True)
cpp_extension.load("operator", [sys.argv[1] + "/operator.cpp"], build_directory=sys.argv[1] + "/operator", is_python_module=False)
print("loaded")
"""


@pytest.fixture
def compiling(tmp_path):
    """A small operator, and a compiler that sleeps before it compiles."""
    (tmp_path / "operator").mkdir()
    (tmp_path / "operator.cpp").write_text('extern "C" int operation() { return 7; }\n')
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *operator.cpp*) sleep "$SLOW";; esac\nexec /usr/bin/c++ "$@"\n')
    compiler.chmod(0o755)

    def start(whose="ours", slow=0, wait=True):
        env = {**os.environ, "CXX": str(compiler), "SLOW": str(slow), "TORCH_DONT_CHECK_COMPILER_ABI": "1"}
        p = subprocess.Popen([sys.executable, "-c", COMPILE, str(tmp_path), whose], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        assert p.stdout.readline() == "begins\n"
        started.append(p)
        if wait:
            until(lambda: any(n.name() == "sleep" for n in psutil.Process(p.pid).children(recursive=True)))
        return p

    started = []
    yield start
    for p in started:
        if p.poll() is None:
            p.kill()
            p.communicate()


def test_a_killed_compilation_stops_torch_and_not_us(compiling, tmp_path):
    """Its ninja lives on for a while and is waited for; then the lock is nobody's."""
    lock = tmp_path / "operator/lock"
    killed = compiling("torch's", slow=4)
    killed.kill()
    killed.wait()
    assert lock.exists() and interruptions.builders(tmp_path / "operator")
    theirs = compiling("torch's", wait=False)
    with pytest.raises(subprocess.TimeoutExpired):
        theirs.wait(10)
    theirs.kill()
    first, second = compiling(wait=False), compiling(wait=False)
    said = [p.communicate(timeout=60) for p in (first, second)]
    assert all(out == "loaded\n" for out, _ in said), said
    err = "".join(err for _, err in said)
    assert err.count("the compilation that left it behind was killed") == 1 and sorted(p.name for p in (tmp_path / "operator").glob("*lock*")) == []


def test_sigterm_leaves_no_lock_and_no_compiler(compiling, tmp_path):
    p = compiling(slow=600)
    p.terminate()
    _, err = p.communicate(timeout=20)
    assert "Stopped: SIGTERM" in err and not (tmp_path / "operator/lock").exists()
    until(lambda: interruptions.builders(tmp_path / "operator") == [], 10)
    assert compiling(wait=False).communicate(timeout=60)[0] == "loaded\n"


def test_who_waits_says_for_whom(compiling, monkeypatch, capsys, tmp_path):
    p = compiling(slow=3)
    interruptions.wait_for_lock(tmp_path / "operator", first=1.0)
    err = capsys.readouterr().err
    assert f"process {p.pid} (python" in err and "compiling operator" in err
    out, said = p.communicate(timeout=30)
    assert out == "loaded\n" and "compiling operator in" in said


def test_a_young_lock_on_a_shared_disk_is_waited_for(tmp_path, monkeypatch, capsys):
    lock = tmp_path / "lock"
    lock.touch()
    if all_seen(tmp_path):
        assert is_abandoned(tmp_path)
    disks = psutil.disk_partitions(all=True)
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [d._replace(fstype="nfs4") for d in disks])
    assert not all_seen(tmp_path) and not is_abandoned(tmp_path) and not pass_over(tmp_path)
    threading.Timer(2.5, lock.unlink).start()
    interruptions.wait_for_lock(tmp_path, first=1.0)
    assert "another machine may" in capsys.readouterr().err
    lock.touch()
    os.utime(lock, (time.time() - 700,) * 2)
    assert is_abandoned(tmp_path) and pass_over(tmp_path) and not lock.exists()


def test_a_library_written_by_half_is_not_taken_for_a_whole_one(tmp_path):
    for name in ("build.ninja", "operator.so", "lock"):
        (tmp_path / name).touch()
    assert interruptions.is_built(tmp_path)
    if not all_seen(tmp_path):
        os.utime(tmp_path / "lock", (time.time() - 700,) * 2)
    baton = Baton(str(tmp_path / "lock"))
    (tmp_path / "lock").rename(tmp_path / "abandoned")
    assert not interruptions.is_built(tmp_path) and baton.try_acquire()
    baton.release()
    assert interruptions.is_built(tmp_path) and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_our_baton_is_used_as_torch_uses_its_own():
    import inspect

    from torch.utils import cpp_extension
    from torch.utils.file_baton import FileBaton

    calls = {name for name in vars(FileBaton) if not name.startswith("_")}
    assert calls <= {name for name in vars(Baton) if not name.startswith("_")} and "FileBaton(" in inspect.getsource(cpp_extension._jit_compile)
