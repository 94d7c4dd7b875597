"""Compiles DeepSpeed's operator for messages between CPU ranks, so that no test waits for a compiler.

A compilation that was killed leaves a file `lock` behind, and every later run waits for it; one that is older than any
compilation takes is removed first.
"""
import os
import sys
import time
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

from torch.utils.cpp_extension import _get_build_directory

lock = Path(_get_build_directory("deepspeed_shm_comm", verbose=False)) / "lock"
if lock.exists() and time.time() - lock.stat().st_mtime > 600:
    lock.unlink()

from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

started = time.time()
ShareMemCommBuilder().load(verbose=False)
if time.time() - started > 5:
    print(f"DeepSpeed's operator compiled in {time.time() - started:.0f} s", file=sys.stderr)
