"""Compiles DeepSpeed's operator for messages between CPU ranks beforehand, so that no test waits for a compiler.

A lock that a killed compilation left behind is passed over, as in a run (page Interruptions).
"""
import os
import sys
import time

os.environ["DS_ACCELERATOR"] = "cpu"

from qlora_kit.run.interruptions import guard_compilations, Stopped

guard_compilations()

from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

builder, started = ShareMemCommBuilder(), time.time()
if builder.is_compatible(verbose=False):
    try:
        builder.load(verbose=False)
    except Stopped:
        sys.exit(143)
    if time.time() - started > 5:
        print(f"{builder.name} compiled in {time.time() - started:.0f} s", file=sys.stderr)
else:
    print(f"{builder.name}: what it is built from is not installed; its tests are skipped", file=sys.stderr)
