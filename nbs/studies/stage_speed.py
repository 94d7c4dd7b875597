"""Times a step on one card without DeepSpeed, at stages 1 and 2, and at stage 3 with the frozen weights in the machine's memory and on a disk.

    python nbs/studies/stage_speed.py            Llama-3.1-8B's shape, random weights, 4 × 2048 tokens, every layer recomputed; four minutes on an H200
    python nbs/studies/stage_speed.py --tiny     the same on a CPU, to try the script

Each case adds a JSON line to stage_speed.jsonl: median milliseconds of six steps after four, the processor's part of them by verb, the peak, and losses.
"""
import argparse
import gc
import importlib.metadata as metadata
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}

import torch

from qlora_kit.data.files import GB
from qlora_kit.memory.predict import Setup, predict, shape_text, stand_in
from qlora_kit.model.kernels import fast_pointwise
from qlora_kit.model.linear import fast_linears
from qlora_kit.model.lora import add_lora
from qlora_kit.training.engine import DeepSpeedEngine, free_port, join_ranks, leave, LocalEngine, make_optimizer
from qlora_kit.training.loss import LossModel
from qlora_kit.training.recompute import set_levels
from qlora_kit.training.zero import zero_config

TINY = dict(vocab_size=512, hidden_size=64, intermediate_size=144, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
CASES = {"no DeepSpeed": None, "stage 1": dict(stage=1), "stage 2": dict(stage=2), "stage 3, memory": dict(stage=3, offload_param="cpu"),
         "stage 3, memory, 12 buffers": dict(stage=3, offload_param="cpu"), "stage 3, disk": dict(stage=3, offload_param="nvme")}


def measure(choice, buffers, place, text, length, folder):
    """One case: build, warm up, time."""
    dtype = torch.bfloat16 if place.device != "cpu" else torch.float32
    zero = choice and zero_config(micro_batch=4, dtype=str(dtype)[6:], hidden_size=json.loads(text)["hidden_size"], nvme_path=folder, **choice)
    torch.manual_seed(0)
    model = add_lora(stand_in(text, dtype=dtype, device=place.device), 16, alpha=32, seed=0)
    fast_linears(model)
    fast_pointwise(model)
    set_levels(model, "layer")
    module = LossModel(model).train()
    optimizer = make_optimizer(module)
    engine = DeepSpeedEngine(module, optimizer, zero, place, buffers) if zero else LocalEngine(module, optimizer, device=place.device)
    gc.collect()
    card = place.device != "cpu"
    if card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(500, (4, length), generator=torch.Generator().manual_seed(0))
    times, losses = [], []
    for _ in range(10):
        moments = [time.perf_counter()]
        loss = engine.forward(dict(input_ids=ids, labels=ids))
        moments.append(time.perf_counter())
        engine.backward(loss, ids.numel())
        moments.append(time.perf_counter())
        engine.step(1e-4)
        moments.append(time.perf_counter())
        if card: torch.cuda.synchronize()
        times.append([1e3*(b - a) for a, b in zip(moments, moments[1:])] + [1e3*(time.perf_counter() - moments[0])])
        losses.append(float(loss.detach())/ids.numel())
    forward, backward, step, whole = (median(column) for column in zip(*times[4:]))
    if zero: engine.ds.destroy()
    return dict(step_ms=whole, processor_ms=dict(forward=forward, backward=backward, step=step), losses=losses,
                peak_gb=torch.cuda.max_memory_allocated()/GB if card else 0.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    args = parser.parse_args()
    os.environ["MASTER_PORT"] = str(free_port())
    place, length = join_ranks(several=True), 16 if args.tiny else 2048
    text = json.dumps(json.loads(shape_text("llama-3.1-8b")) | (TINY if args.tiny else {}))
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "deepspeed")}
    for name, choice in CASES.items():
        buffers = 12 if "12" in name else 2
        with tempfile.TemporaryDirectory() as folder: said = measure(choice, buffers, place, text, length, folder)
        setup = Setup("llama-3.1-8b", 4, length, packed=True, buffers=buffers, **(choice or {}))
        line = dict(case=name, date=time.strftime("%Y-%m-%d"), card=torch.cuda.get_device_name() if place.device != "cpu" else "CPU", versions=versions,
                    **said, predicted_gb=predict(setup).peak/GB)
        with open(args.out, "a", encoding="utf-8") as f: f.write(json.dumps(line) + "\n")
        print(f"{name:30} {said['step_ms']:8.1f} ms  {said['peak_gb']:6.2f} GB  loss {said['losses'][-1]:.6f}", flush=True)
    leave()
