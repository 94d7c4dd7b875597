"""Train two steps of a random model and print predicted and measured memory as JSON, in bytes.

python dev/measure_memory.py '{"base_model": "llama-3.1-8b", "batch": 4, "length": 2048, "device": "cuda"}'

CPU: peak of RssAnon above its value after the imports. CUDA: max_memory_allocated. The weights are random, made in place in NF4, so no
checkpoint is read. A process of its own for each measurement: what an earlier one left would count.
"""
import ctypes
import gc
import json
import sys
import threading
import time
from dataclasses import asdict


def hand_back_at_once():
    """glibc keeps freed blocks for later; told so, it returns each above 64 KiB, and RssAnon shows what is in use."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 2**16)  # M_TRIM_THRESHOLD


class Watch:
    """Peak of RssAnon, looked at every millisecond; a lower bound."""

    def __init__(self):
        from qlora_kit.run.monitor import resident_bytes

        self.look, self.start, self.peak, self.running = resident_bytes, resident_bytes(), 0, True
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while self.running:
            self.peak = max(self.peak, self.look())
            time.sleep(0.001)

    def stop(self):
        self.running = False
        self.thread.join()
        return self.peak - self.start

    def again(self):
        now, self.peak = self.peak - self.start, 0
        return now


def batches(setup, vocab, device):
    """Micro-batches in which every token is a target; with several rows, the last is padded by one token."""
    import torch

    ids = torch.randint(vocab, (setup.batch, setup.length), device=device)
    mask = torch.ones_like(ids)
    if setup.batch > 1:
        mask[-1, -1] = 0
    return [dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))] * setup.accumulation


def train(setup, watch):
    """Build, then two optimizer steps through the engine; peaks of both parts in bytes."""
    import torch

    from qlora_kit.training.engine import LocalEngine, make_optimizer
    from qlora_kit.model.linear import fast_linears
    from qlora_kit.training.recompute import set_levels
    from qlora_kit.model.lora import add_lora
    from qlora_kit.training.loss import LossModel
    from qlora_kit.memory.predict import shape_text, stand_in
    from qlora_kit.model.kernels import fast_pointwise

    model = stand_in(shape_text(setup.base_model), setup.quant_type, setup.double_quant, dtype=getattr(torch, setup.dtype), device=setup.device)
    model = add_lora(model, setup.r, 32, dropout=setup.dropout, seed=0)
    if setup.fast:
        fast_linears(model)
        fast_pointwise(model)
    set_levels(model, setup.recompute)
    module = LossModel(model).to(setup.device)
    engine = LocalEngine(module, make_optimizer(module), 1.0, setup.device)
    engine.module.train()
    built = watch.again() if watch else torch.cuda.max_memory_allocated()
    parts = batches(setup, model.config.get_text_config().vocab_size, setup.device)
    for _ in range(2):
        for part in parts:
            loss = engine.forward(part)
            engine.backward(loss, setup.batch * setup.length)
            assert loss.item() > 0
        assert engine.step(1e-4) > 0
    return built


def measure(setup):
    """Predicted and measured bytes."""
    import torch

    import qlora_kit.training.engine  # noqa: F401  imports count before the start
    from qlora_kit.memory.predict import predict

    prediction = predict(setup)
    gc.collect()
    cuda = setup.device == "cuda"
    if cuda:
        torch.zeros(1, device="cuda")
        torch.cuda.reset_peak_memory_stats()
    watch = None if cuda else Watch()
    built = train(setup, watch)
    peak = torch.cuda.max_memory_allocated() if cuda else max(watch.stop(), built)
    extra = dict(reserved=torch.cuda.max_memory_reserved(), card=torch.cuda.get_device_name()) if cuda else {}
    return dict(setup=asdict(setup), predicted=prediction.peak, measured=peak, built=built, ratio=prediction.peak / peak, totals=prediction.totals,
                when=prediction.when, **extra)


def main(argv):
    hand_back_at_once()
    from qlora_kit.memory.predict import Setup

    print(json.dumps(measure(Setup(**json.loads(argv[0])))))


if __name__ == "__main__":
    main(sys.argv[1:])
