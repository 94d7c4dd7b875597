"""cuDNN's attention and FlashAttention by length, and what a length costs that was not seen before: python nbs/studies/attention_speed.py [--out FILE]

One JSON line: ms of one layer's attention, forward and backward, 8192 tokens in sequences of T, heads as in Llama-3.1-8B, bf16; ms more that the first call of a length takes; ms of one layer's
attention for a single new token, of a length seen before and of a new one. "cudnn" is what PyTorch takes where cuDNN is allowed; "flash" is what it takes otherwise. Needs a card."""
import argparse
import time
from datetime import date
from importlib.metadata import version

import torch
from level_speed import report
from torch.nn.functional import scaled_dot_product_attention

from qlora_kit.data.batches import cudnn_attention

TOKENS, HEADS, SHARED, WIDTH = 8192, 32, 8, 128  # queries have 32 heads, keys and values 8


def random(B, T, heads):
    """[B,heads,T,width], laid out as a model has it: all heads of a token side by side."""
    return torch.randn(B, T, heads, WIDTH, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()


def ms(run):
    """Milliseconds until the card is through with one call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def median(run, times=15):
    return sorted(ms(run) for _ in range(times))[times // 2]


def layer(B, T, cudnn):
    """A function that computes attention and its gradients once."""
    q, k, v, G = random(B, T, HEADS), random(B, T, SHARED), random(B, T, SHARED), random(B, T, HEADS)

    def run():
        with cudnn_attention(cudnn):
            y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(y, (q, k, v), G)
    return run


def token(keys, cudnn):
    """A function that computes the attention of one new token, which sees as many keys."""
    q, k, v = random(1, 1, HEADS), random(1, keys, SHARED), random(1, keys, SHARED)

    @torch.no_grad()
    def run():
        with cudnn_attention(cudnn):
            scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return run


def main():
    ask = argparse.ArgumentParser()
    ask.add_argument("--out")
    a = ask.parse_args()
    line = dict(task="attention", card=torch.cuda.get_device_name(), date=str(date.today()), versions={"torch": version("torch"), "cudnn": torch.backends.cudnn.version()})
    for name, cudnn in (("cudnn", True), ("flash", False)):
        found = line[name] = dict(very_first=ms(layer(4, 2048, cudnn)), ms={})
        for T in (128, 256, 512, 1024, 2048, 4096, 8192):
            found["ms"][T] = median(layer(TOKENS // T, T, cudnn))
        runs = [layer(4, T, cudnn) for T in range(401, 411)]
        found["new_length"] = sorted(ms(run) - ms(run) for run in runs)[5]
        runs = [token(keys, cudnn) for keys in range(300, 320)]
        found["new_token"], found["token"] = (sorted(map(ms, runs))[10] for _ in range(2))
    report(line, a.out)


if __name__ == "__main__":
    main()
