"""Speed and memory of each level of recomputation, random weights of a known shape on one card: python nbs/studies/level_speed.py [--shape NAME] [--batch B,…] [--within GB] [--out FILE]

A step is forward, backward, clipping and AdamW; it is waited for, and the median of eight counts, after three that warm up. One JSON line for each level.
`--within` asks what a smaller card would do: `auto` fills that many GB, and a level that needs more is left out."""
import argparse
import json
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from itertools import product

import torch

from qlora_kit.data.batches import attend_documents
from qlora_kit.data.files import GB
from qlora_kit.training.engine import LocalEngine, make_optimizer
from qlora_kit.training.recompute import set_levels, levels_in_words, LEVELS
from qlora_kit.model.linear import fast_linears
from qlora_kit.model.lora import add_lora
from qlora_kit.training.loss import LossModel
from qlora_kit.memory.predict import predict, Setup, shape_text, stand_in
from qlora_kit.memory.budget import fill_card, fit_card
from qlora_kit.model.kernels import fast_pointwise


def build(setup):
    """A model of random weights with LoRA of rank 16 on all linears, and its engine."""
    model = add_lora(stand_in(shape_text(setup.base_model), dtype=getattr(torch, setup.dtype), device=setup.device), setup.r, 32, dropout=0.0, seed=0)
    fast_linears(model)
    fast_pointwise(model)
    attend_documents(model)
    module = LossModel(model).to(setup.device).train()
    return model, LocalEngine(module, make_optimizer(module), 1.0, setup.device)


def measure(model, engine, setup, levels, steps=8, warm=3):
    """Seconds of the median step, and the peak in bytes."""
    set_levels(model, levels)
    cuda = setup.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(model.config.vocab_size, (setup.batch, setup.length), generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(warm + steps):
        start = time.perf_counter()
        engine.backward(engine.forward(dict(input_ids=ids, labels=ids)), ids.numel())
        engine.step(1e-4)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[warm:])[steps // 2], torch.cuda.max_memory_allocated() if cuda else 0


def report(line, out):
    """Print a measurement, and append it to a file if one is named."""
    print(json.dumps(line), flush=True)
    if out:
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def main():
    ask = argparse.ArgumentParser()
    ask.add_argument("--shape", default="llama-3.1-8b")
    ask.add_argument("--batch", default="4")
    ask.add_argument("--length", type=int, default=2048)
    ask.add_argument("--levels", default=",".join(("auto", *LEVELS)))
    ask.add_argument("--within", type=float)
    ask.add_argument("--out")
    a = ask.parse_args()
    cuda = torch.cuda.is_available()
    limit = a.within * GB if a.within else torch.cuda.get_device_properties(0).total_memory if cuda else 2**33
    first, *others = (Setup(a.shape, int(batch), a.length, device="cuda" if cuda else "cpu", dtype="bfloat16" if cuda else "float32") for batch in a.batch.split(","))
    model, engine = build(first)
    about = dict(card=torch.cuda.get_device_name() if cuda else "cpu", date=str(date.today()), versions={n: version(n) for n in ("torch", "transformers", "bitsandbytes")})
    if a.within:
        about["within_gb"] = a.within
    for setup, level in product((first, *others), a.levels.split(",")):
        chosen = fill_card(setup, limit) if level == "auto" else replace(setup, recompute=level)
        if a.within and not fit_card(chosen, limit).fits:
            continue
        line = dict(shape=a.shape, batch=setup.batch, length=a.length, level=level, predicted_gb=predict(chosen).peak / GB, **about)
        try:
            seconds, peak = measure(model, engine, setup, chosen.recompute)
            line |= dict(layers=levels_in_words(chosen.recompute) if level == "auto" else level, ms=1e3 * seconds, tokens_per_s=setup.batch * setup.length / seconds, peak_gb=peak / GB)
        except torch.OutOfMemoryError:
            line |= dict(layers="more than the card has")
            engine.optimizer.zero_grad()
        report(line, a.out)


if __name__ == "__main__":
    main()
