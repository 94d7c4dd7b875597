"loss: additive over micro-batches, equal to transformers' own, one call of the head whatever the targets."
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from qlora_kit.data import UserError
from qlora_kit.loss import LossModel, target_loss


def llama(V=128):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2))


def padded_batch():
    "Rows of unequal length, targets in the middle and at the end, one row without any."
    ids = torch.randint(128, (6, 20), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    for b, (length, first) in enumerate([(20, 1), (12, 11), (15, 9), (20, 20), (7, 3), (18, 5)]):
        mask[b, length:], labels[b, first:length] = 0, ids[b, first:length]
    labels[0, 8:12] = -100
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def test_sum_is_transformers_mean_times_targets_in_fp64():
    model, batch = llama().double(), padded_batch()
    N = int((batch["labels"][:, 1:] != -100).sum())
    assert LossModel(model, chunk=5)(**batch).item() / N == pytest.approx(model(**batch).loss.item(), rel=1e-6)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_micro_batches_add_up(k):
    model, batch = llama(), padded_batch()
    def gradients(parts):
        model.zero_grad()
        loss = 0
        for part in parts:
            out = LossModel(model, chunk=8)(**part)
            (out / 40).backward()
            loss += out.item()
        return loss, [p.grad.clone() for p in model.parameters()]
    parts = [dict(zip(batch, xs)) for xs in zip(*(x.chunk(k) for x in batch.values()))]
    (one, g1), (many, gk) = gradients([batch]), gradients(parts)
    assert many == pytest.approx(one, rel=1e-6)
    assert all((a - b).norm() <= 2e-6 * b.norm() for a, b in zip(gk, g1))


@pytest.mark.parametrize("N", [0, 1, 40, 190])
def test_head_is_called_once_and_left_as_it_was(N):
    head, calls = nn.Linear(8, 50, bias=False), []
    head.register_forward_pre_hook(lambda *_: calls.append(1))
    hidden = torch.randn(10, 20, 8, requires_grad=True)
    labels = torch.full((10, 20), -100)
    labels[:, 1:] = torch.where(torch.arange(190).view(10, 19) < N, 7, -100)
    loss, n = target_loss(hidden, labels, head, chunk=16)
    loss.backward()
    assert (n, len(calls), "forward" in vars(head)) == (N, 1, False)
    assert hidden.grad is not None and head.weight.grad is not None
    assert int((hidden.grad.abs().sum(-1) > 0).sum()) == N and (N > 0 or head.weight.grad.abs().max() == 0)


def test_filler_stays_finite_even_when_masked_out():
    model = llama()
    loss = LossModel(model)(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), -100))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())


def test_logits_live_in_chunks_only():
    largest = 0
    def head(h):
        nonlocal largest
        largest = max(largest, len(h))
        return h @ torch.ones(8, 50)
    target_loss(torch.randn(4, 30, 8), torch.ones(4, 30, dtype=torch.int64), head, chunk=10)
    assert largest == 10


def test_model_with_a_layer_before_its_head_is_refused():
    bert = BertLMHeadModel(BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, is_decoder=True))
    with pytest.raises(UserError, match="BertLMHeadModel with module cls"): LossModel(bert)


def test_loss_in_bf16_is_summed_in_fp32():
    hidden, labels = torch.randn(8, 400, 8, dtype=torch.bfloat16), torch.ones(8, 400, dtype=torch.int64)
    loss, n = target_loss(hidden, labels, nn.Linear(8, 50).bfloat16())
    assert loss.dtype == torch.float32 and n == 8 * 399


RANKS = """
import deepspeed, torch, torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from qlora_kit.loss import LossModel
torch.set_num_threads(1)
deepspeed.init_distributed("gloo")
def build():
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2))
    return LossModel(get_peft_model(llama, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)), chunk=8)
def row(n, seed):
    ids = torch.randint(128, (1, 64), generator=torch.Generator().manual_seed(seed))
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids.masked_fill(torch.arange(64) < 64 - n, -100))
alone, model = build(), build()
weights = lambda m: [p for p in m.parameters() if p.requires_grad]
config = dict(train_micro_batch_size_per_gpu=1, zero_optimization=dict(stage=3, stage3_param_persistence_threshold=0), zero_allow_untested_optimizer=True, gradient_clipping=0.0)
engine, *_ = deepspeed.initialize(model=model, model_parameters=weights(model), optimizer=torch.optim.SGD(weights(model), lr=0.5), config=config)
optimizer = torch.optim.SGD(weights(alone), lr=0.5)
for step, counts in enumerate([(60, 0), (3, 50), (40, 60)]):
    rows, N = [row(n, 2*step+i) for i, n in enumerate(counts)], sum(counts)
    loss_sum = engine(**rows[dist.get_rank()])
    engine.backward(loss_sum * dist.get_world_size() / N); engine.step()
    total = loss_sum.detach().clone(); dist.all_reduce(total)
    reference = sum(alone(**r) for r in rows)
    (reference / N).backward(); optimizer.step(); optimizer.zero_grad()
    assert abs(total - reference) <= 1e-5 * reference, (step, total, reference)
print("ranks agree")
"""


@pytest.mark.ranks
def test_two_zero3_ranks_with_unequal_targets_equal_one_process(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "ranks.py"]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | dict(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
                         capture_output=True, text=True, timeout=300)
    assert run.stdout.count("ranks agree") == 2, run.stderr[-3000:]
