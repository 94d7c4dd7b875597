"""The kit and plain peft on the demo's own batches, on a CPU: python nbs/studies/cpu_speed.py [--steps N] [--out FILE]

Both train SmolLM2-135M in NF4 with LoRA on all linears, step by step in turn, on the same batches from the same start. Plain is transformers, bitsandbytes, peft and torch's AdamW as their documentation has it. One JSON line: median seconds of a step, tokens a second, their ratio, and the losses of both."""
import argparse
import json
import logging
import statistics
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from functools import partial
from importlib.resources import files
from pathlib import Path

import torch
from level_speed import report
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.tools.contestants import TARGETS
from qlora_kit.run.config import load_config
from qlora_kit.training.engine import join_ranks
from qlora_kit.model.base import resolve_base
from qlora_kit.model.lora import lora_parameters
from qlora_kit.run.assemble import make_engine, make_job, predict_memory
from qlora_kit.training.loop import lr_at, train_step


def kit(cfg, base):
    """A job of the demo and its engine."""
    place, log = join_ranks(), logging.getLogger("qlora_kit")
    job = make_job(cfg, Path("."), place, base=base, predict=partial(predict_memory, cfg, place, force=True, log=log))
    engine = make_engine(job)
    engine.module.train()
    return job, engine


def plain(cfg, start):
    """A function of a batch that takes a step and returns its mean loss."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(resolve_base(cfg.model.base_model), quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}, attn_implementation="sdpa")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=cfg.model.lora_r, lora_alpha=cfg.model.lora_alpha, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")).train()
    trained = lora_parameters(model)
    assert trained.keys() == start.keys()
    for name, p in trained.items():
        p.data.copy_(start[name])
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, weight_decay=0.0)

    def step(batch, lr):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["mask"], labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), cfg.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def main():
    ask = argparse.ArgumentParser()
    ask.add_argument("--steps", type=int, default=12)
    ask.add_argument("--out")
    a = ask.parse_args()
    file = Path(str(files("qlora_kit"))) / "assets/scaffold/configs/train_config.yaml"
    cfg = load_config(file)
    job, engine = kit(cfg, file.parent)
    theirs = plain(cfg, {name: p.detach().clone() for name, p in lora_parameters(job.model).items()})
    spent, losses, tokens = {"kit": [], "plain": []}, {"kit": [], "plain": []}, []
    for i in range(a.steps + 2):  # the first two warm up
        [batch], n = list(replace(job.feed, joined=False).batches(i)), job.feed.count(i)[1]
        rows = [int(e.ne(job.feed.pad_id).nonzero().max()) + 1 for e in batch["input_ids"]]
        batch = batch | {"mask": torch.stack([torch.arange(batch["input_ids"].shape[1]) < k for k in rows]).long()}
        start = time.perf_counter()
        done = train_step(engine, list(job.feed.batches(i)), lr=lr_at(i, job.plan.total, peak=cfg.training.learning_rate, scheduler=cfg.training.lr_scheduler, warmup_ratio=cfg.training.warmup_ratio), seed=cfg.training.seed, step=i)
        loss = done.read()[0]
        middle = time.perf_counter()
        losses["plain"].append(theirs(batch, done.lr))
        end = time.perf_counter()
        losses["kit"].append(loss)
        spent["kit"].append(middle - start)
        spent["plain"].append(end - middle)
        tokens.append((n, batch["input_ids"].numel()))
        print(f"step {i}: kit {middle - start:.2f} s, loss {loss:.5f}; plain {end - middle:.2f} s, loss {losses['plain'][-1]:.5f}; {n} tokens of {tokens[-1][1]}", flush=True)
    n = sum(t for t, _ in tokens[2:])
    speed = {who: n / sum(s[2:]) for who, s in spent.items()}
    line = dict(task="cpu", model=cfg.model.base_model, batch=cfg.training.batch_size, steps=a.steps, threads=torch.get_num_threads(), date=str(date.today()), versions={p: version(p) for p in ("torch", "transformers", "peft", "bitsandbytes")},
                tokens_per_s=speed, ratio=speed["kit"] / speed["plain"], median_s={who: statistics.median(s[2:]) for who, s in spent.items()}, full=n / sum(t for _, t in tokens[2:]), last_loss={who: x[-1] for who, x in losses.items()})
    report(line, a.out)


if __name__ == "__main__":
    main()
