"""Compiles DeepSpeed's operators beforehand, so that no test waits for a compiler: messages between CPU ranks, and offload to NVMe where libaio is found.

A compilation that was killed leaves a file `lock` behind, and every later run waits for it; one that is older than any
compilation takes is removed first.
"""
import os
import sys
import time
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

from torch.utils.cpp_extension import _get_build_directory

for name in ("deepspeed_shm_comm", "async_io", "pin_memory"):
    lock = Path(_get_build_directory(name, verbose=False)) / "lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > 600:
        lock.unlink()

from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

for builder in (ShareMemCommBuilder(), AsyncIOBuilder()):
    if not builder.is_compatible(verbose=False):
        print(f"{builder.name}: what it is built from is not installed; its tests are skipped", file=sys.stderr)
        continue
    started = time.time()
    builder.load(verbose=False)
    if time.time() - started > 5:
        print(f"{builder.name} compiled in {time.time() - started:.0f} s", file=sys.stderr)
