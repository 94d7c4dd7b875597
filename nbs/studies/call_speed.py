"""What the processor spends on starting a card's kernels: python nbs/studies/call_speed.py [--out FILE]

One JSON line: µs of single calls whose kernels take no time worth counting, compiled, written by hand, and PyTorch's own; and ms of a training step of 32 layers so narrow that the card hardly counts. Without a card the same calls run as plain operations."""
import argparse
import json
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from level_speed import build, report

from qlora_kit.training.recompute import set_levels
from qlora_kit.model.linear import decoded
from qlora_kit.memory.predict import Setup
from qlora_kit.model.kernels import compiled, kernel, swiglu

NARROW = dict(model_type="llama", vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=32, num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=False)


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def started(run, times):
    """Seconds until the processor is through with one call, the card left behind; a few warm up."""
    for _ in range(3):
        run()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        run()
    spent = (time.perf_counter() - start) / times
    wait()
    return spent


def main():
    ask = argparse.ArgumentParser()
    ask.add_argument("--out")
    a = ask.parse_args()
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(NARROW), encoding="utf-8")
        model, engine = build(Setup(folder, 4, 128, device="cuda" if cuda else "cpu", dtype="bfloat16" if cuda else "float32"))
    g, u = torch.randn(2, 4, 128, 512, device=engine.device, dtype=torch.bfloat16 if cuda else torch.float32)
    linear = next(m for m in model.modules() if isinstance(m, Linear4bit))
    body = swiglu.__wrapped__
    slow = compiled(body)
    with torch.no_grad():
        calls = {"compiled, rows free to vary": lambda: slow(g, u), "compiled": lambda: kernel(body)(g, u), "kernel": lambda: swiglu(g, u), "decode": lambda: decoded(linear, g.dtype), "g*u": lambda: g * u}
        us = {name: 1e6 * started(run, 300 if cuda else 20) for name, run in calls.items() if cuda or name != "compiled"}
    ids = torch.randint(512, (4, 128), generator=torch.Generator().manual_seed(0))

    def step():
        engine.backward(engine.forward(dict(input_ids=ids, labels=ids)), ids.numel())
        engine.step(1e-4)
    ms = {}
    for level in ("dense", "mlp", "layer"):
        set_levels(model, level)
        ms[level] = 1e3 * started(step, 8 if cuda else 1)
    line = dict(task="calls", card=torch.cuda.get_device_name() if cuda else "cpu", date=str(date.today()), versions={n: version(n) for n in ("torch", "transformers", "bitsandbytes")}, us=us, ms_a_step=ms)
    report(line, a.out)


if __name__ == "__main__":
    main()
