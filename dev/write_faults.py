"""Resumes a run again and again in processes that meet a fault at one of their writes; then it must resume as if nothing had been.

    python write_faults.py CONFIG RUN SCRATCH     RUN: a whole run; what lies after its first checkpoint is taken away before each resume
"""
import builtins
import io
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import torch

from qlora_kit.data import files
from qlora_kit.run.checkpoint import checkpoints, step_of
from qlora_kit.run.config import load_config
from qlora_kit.run.train import train

torch.set_num_threads(1)
CONFIG, WHOLE, SCRATCH = (Path(a) for a in sys.argv[1:])
TIMED = ("tokens_per_s", "samples_per_s", "mem_gb", "mem_peak_gb", "elapsed_s")


class Faults:
    """Counts what the kit is about to do to files below a folder, and strikes at one of these moments."""

    def __init__(self, folder, strike=None, how=None):
        self.folder, self.strike, self.how, self.seen = folder, strike, how, []
        for module in (builtins, io): module.open = self.opening(module.open)
        os.replace, os.rename, os.ftruncate = self.before(os.replace), self.before(os.rename), self.before(os.ftruncate)
        files.fsync, files.exchange = self.before(files.fsync), self.after(self.before(files.exchange))

    def meet(self, what, path):
        path = Path(os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path).absolute()
        if self.folder not in [path, *path.parents]: return
        name = f"{what} {path.relative_to(self.folder)}"
        self.seen.append(re.sub(r"[0-9a-f]{8}", "#", name))
        if self.how == "kill" and len(self.seen) == self.strike: os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "full" and len(self.seen) >= self.strike: raise OSError(28, "No space left on device", str(path))

    def opening(self, real):
        def opened(path, mode="r", *args, **options):
            file = real(path, mode, *args, **options)
            if set(mode) & set("wxa+"):
                try: self.meet("opened", path)
                except OSError: file.close(); raise
            return file
        return opened

    def before(self, real):
        def act(*args): self.meet(f"before {real.__name__}", args[0]); return real(*args)
        act.__name__ = real.__name__
        return act

    def after(self, real):
        def act(*args):
            done = real(*args)
            self.meet(f"after {real.__name__}", args[0])
            return done
        return act


def cut(name):
    folder = SCRATCH / name
    shutil.copytree(WHOLE, folder)
    for later in checkpoints(folder)[:-1]: shutil.rmtree(later)
    return folder


def resume(folder): return train(load_config(CONFIG), CONFIG.stem, resume=str(folder), quiet=True, base=CONFIG.parent)


def child(act):
    """How a forked process ended that did this: its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try: act()
        except OSError as e: os._exit(28 if e.errno == 28 else 1)
        except BaseException as e: print(f"{type(e).__name__}: {e}", file=sys.stderr); os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def result(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = [folder / "adapter/adapter_model.safetensors", folder / "answers.json", *sorted(checkpoints(folder)[0].glob("*.safetensors"))]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines], [(f.name, f.read_bytes()) for f in files]


def count():
    folder = cut("count")
    faults = Faults(folder)
    resume(folder)
    (SCRATCH / "seen.json").write_text(json.dumps(faults.seen))


def kind(what):
    """One moment stands for all of its kind: steps, and files of the adapter, are alike."""
    return re.sub(r"(new)/.*", r"\1/", re.sub(r"\d+", "0", what))


if __name__ == "__main__":
    assert child(count) == 0
    seen, expected, wrong = json.loads((SCRATCH / "seen.json").read_text()), result(SCRATCH / "count"), []
    moments = {kind(what): number for number, what in reversed(list(enumerate(seen, 1)))}
    assert len(moments) > 20, seen
    for what, number in sorted(moments.items(), key=lambda m: m[1]):
        how = "kill" if what.startswith(("opened", "after", "before exchange")) else "full"
        folder = cut(f"{number}-{how}")
        ended = child(lambda: (Faults(folder, number, how), resume(folder)))
        again = child(lambda: resume(folder))
        left = [p.name for p in folder.rglob("*") if re.search(r"\.(tmp|new|old|part)$", p.name)]
        fine = ended == {"kill": -9, "full": 28}[how] and again == 0 and not left and result(folder) == expected
        print(f"{number:3} {how} {what}: ended {ended}, resumed {again}, left {left}", flush=True)
        if not fine: wrong.append((what, how))
        shutil.rmtree(folder)
    assert not wrong, wrong
