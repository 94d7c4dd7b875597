"loss: additive over micro-batches, equal to transformers' own, one call of the head whatever the targets; a frozen head gives its gradient in the forward pass."
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from qlora_kit.data.batches import pack, pad, target_weight, Weighted
from qlora_kit.data.files import UserError
from qlora_kit.training import loss as module
from qlora_kit.training.loss import (
    add_noise, head_loss, LossModel, row_lengths, softmax_, sum_in_chunks, target_loss)


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


def frozen(V=50, D=8, bias=False, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    return nn.Linear(D, V, bias=bias, device=device, dtype=dtype).requires_grad_(False)


def targets(N=23, V=50, D=8, dtype=torch.float64, device="cpu"):
    g = torch.Generator().manual_seed(N)
    hidden, ids, weights = torch.randn(N, D, generator=g), torch.randint(V, (N,), generator=g), torch.rand(N, generator=g)
    return hidden.to(device, dtype).requires_grad_(), ids.to(device), weights.to(device, torch.promote_types(dtype, torch.float32))


SCALE = 2.0**-10 # of the loss, as N and a loss scale bring it; no power of two would cost one rounding more


def by_formula(head, hidden, ids, weights, softcap):
    "Loss and gradient in fp64, all logits at once."
    h = hidden.detach().double().requires_grad_()
    logits = nn.functional.linear(h, head.weight.double(), None if head.bias is None else head.bias.double())
    if softcap: logits = softcap*torch.tanh(logits/softcap)
    each = cross_entropy(logits, ids, reduction="none")
    loss = each.sum() if weights is None else (weights.double()*each).sum()
    return loss.detach(), torch.autograd.grad(SCALE*loss, h)[0]


def by_kit(*args, **kwargs):
    loss = head_loss(*args, **kwargs)
    return loss.detach(), torch.autograd.grad(SCALE*loss, args[1])[0]


@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
@pytest.mark.parametrize("bias, weighted, softcap", [(False, False, None), (True, True, None), (False, False, 0.7), (True, True, 0.7)])
def test_a_frozen_head_gives_the_formula_in_fp64(chunk, bias, weighted, softcap, monkeypatch):
    monkeypatch.setattr(module, "sum_in_chunks", lambda *_, **__: pytest.fail("the general way"))
    head, (hidden, ids, weights) = frozen(bias=bias), targets()
    args = head, hidden, ids, weights if weighted else None
    loss, grad = by_kit(*args, chunk=chunk, softcap=softcap)
    expected, reference = by_formula(*args, softcap)
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(expected.item(), rel=1e-13)
    assert (grad - reference).norm() < 1e-13*reference.norm()


def test_the_graph_can_be_used_twice_and_scaled():
    hidden, ids, _ = targets()
    loss = head_loss(frozen(), hidden, ids)
    one, = torch.autograd.grad(loss, hidden, retain_graph=True)
    scaled, = torch.autograd.grad(2.0**16*loss, hidden)
    assert torch.equal(2.0**16*one, scaled)


class Squared(nn.Linear):
    def forward(self, x): return super().forward(x).square()


@pytest.mark.parametrize("case", ["trained weight", "trained bias", "another forward", "subclass", "function", "no gradients", "hidden without gradient", "autocast"])
def test_any_other_head_takes_the_general_way(case, monkeypatch):
    monkeypatch.setattr(module, "gradient_in_chunks", lambda *_, **__: pytest.fail("not for this one"))
    head, (hidden, ids, _) = frozen(bias=True, dtype=torch.float32), targets(dtype=torch.float32)
    if case == "trained weight": head.weight.requires_grad_()
    if case == "trained bias": head.bias.requires_grad_()
    if case == "another forward": head.forward = lambda x, plain=head.forward: plain(x).square()
    if case == "subclass":
        head = Squared(8, 50).requires_grad_(False)
    if case == "function": head = frozen(bias=True, dtype=torch.float32).forward
    if case == "hidden without gradient": hidden = hidden.detach()
    with torch.set_grad_enabled(case != "no gradients"), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        loss, logits = head_loss(head, hidden, ids, chunk=5), head(hidden).float()
    assert loss.item() == pytest.approx(cross_entropy(logits, ids, reduction="sum").item(), rel=1e-5)
    assert loss.requires_grad == (case not in ("no gradients", "hidden without gradient"))
    if loss.requires_grad: loss.backward()
    assert [name for name, p in head.named_parameters() if p.grad is not None] == [name.split()[1] for name in [case] if "trained" in name] if isinstance(head, nn.Module) else True


@pytest.mark.parametrize("N", [0, 1, 190])
def test_no_hook_of_a_frozen_head_waits_for_the_backward_pass(N):
    head, fired = frozen(), []
    head.register_forward_pre_hook(lambda *_: fired.append("forward"))
    head.register_full_backward_pre_hook(lambda *_: fired.append("backward"))
    hidden, ids, _ = targets(N)
    loss = head_loss(head, hidden, ids, chunk=16)
    loss.backward()
    assert fired == ["forward"] and "forward" not in vars(head) and head.weight.grad is None and hidden.grad.shape == (N, 8)
    with pytest.raises((IndexError, RuntimeError)): head_loss(head, targets(3)[0], torch.full((3,), 50))
    assert "forward" not in vars(head)


def test_the_labels_entry_is_rounded_after_the_difference():
    """p = 0.998: rounded to bf16 before 1 is subtracted, the entry would be off by a third."""
    logits, at = torch.tensor([[6.25, 0.0]], dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int64)
    _, own = softmax_(logits, at, None, None)
    assert own.item() == pytest.approx(-1/(1 + math.exp(6.25)), rel=2**-8)


def no_worse_than_autograd(head, hidden, ids, weights, softcap, chunk):
    """Products and gradients are rounded to bf16's eight bits either way: ours must not end farther from fp64 than autograd's, give or take a fifth."""
    _, exact = by_formula(head, hidden, ids, weights, softcap)
    loss, ours = by_kit(head, hidden, ids, weights, chunk=chunk, softcap=softcap)
    general = sum_in_chunks(head, hidden, ids, weights, chunk=chunk, softcap=softcap)
    theirs, = torch.autograd.grad(SCALE*general, hidden)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(general.item(), rel=1e-6)
    assert (ours.double() - exact).norm() < 1.2*(theirs.double() - exact).norm() < 0.05*exact.norm()


@pytest.mark.parametrize("weighted, softcap", [(False, None), (True, None), (True, 0.7)])
def test_bf16_is_as_exact_as_autograd(weighted, softcap):
    hidden, ids, weights = targets(200, 500, 32, torch.bfloat16)
    no_worse_than_autograd(frozen(500, 32, dtype=torch.bfloat16), hidden, ids, weights if weighted else None, softcap, chunk=64)


class Made(TorchDispatchMode):
    "Shapes and dtypes of all results that have more than n numbers, but for views of what is known."
    def __init__(self, n, known): super().__init__(); self.n, self.seen, self.found = n, {known.untyped_storage()._cdata}, set()
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.numel() > self.n and x.untyped_storage()._cdata not in self.seen:
                self.found.add((tuple(x.shape), x.dtype))
        return out


def test_on_meta_only_what_a_card_would_allocate():
    head = nn.Linear(8, 500, bias=False, device="meta", dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.empty(64, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with Made(600, head.weight) as made: head_loss(head, hidden, torch.zeros(64, dtype=torch.int64, device="meta"), chunk=32).backward()
    assert made.found == {((32, 500), torch.bfloat16)} and hidden.grad.dtype == torch.bfloat16


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("weighted, softcap", [(False, None), (True, None), (True, 0.7)])
def test_on_a_card_compiled_and_without_a_copy_of_the_logits(weighted, softcap):
    """Numbers of targets change from batch to batch. Beside one chunk of bf16 logits there are only the gradient and vectors."""
    V, D, chunk, compiles = 32000, 256, 1024, torch._dynamo.utils.counters["stats"]
    head, first = frozen(V, D, dtype=torch.bfloat16, device="cuda"), compiles["unique_graphs"]
    for N in (1024, 1, 700, 2500, 333, 1025):
        hidden, ids, weights = targets(N, V, D, torch.bfloat16, "cuda")
        no_worse_than_autograd(head, hidden, ids, weights if weighted else None, softcap, chunk)
    before = compiles["unique_graphs"]
    for N in (2000, 17, 901, 1500):
        hidden, ids, weights = targets(N, V, D, torch.bfloat16, "cuda")
        torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        by_kit(head, hidden, ids, weights if weighted else None, chunk=chunk, softcap=softcap)
        assert torch.cuda.max_memory_allocated() - start < 1.1*min(N, chunk)*V*2 + 3*N*D*2 + 2**20
    assert compiles["unique_graphs"] == before and 0 < before - first < 12


def test_model_with_a_layer_before_its_head_is_refused():
    bert = BertLMHeadModel(BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, is_decoder=True))
    with pytest.raises(UserError, match="BertLMHeadModel with module cls"): LossModel(bert)


def test_loss_in_bf16_is_summed_in_fp32():
    hidden, labels = torch.randn(8, 400, 8, dtype=torch.bfloat16), torch.ones(8, 400, dtype=torch.int64)
    loss, n = target_loss(hidden, labels, nn.Linear(8, 50).bfloat16())
    assert loss.dtype == torch.float32 and n == 8 * 399


def rows(weights=(1, 1, 1, 1, 1), seed=2):
    g = torch.Generator().manual_seed(seed)
    return [Weighted(torch.randint(1, 128, (T,), generator=g).tolist(), [t >= T//2 for t in range(T)], weight=w) for T,w in zip((9, 4, 17, 6, 12), weights)]


@pytest.mark.parametrize("cut", ["padded", "packed", "one by one"])
def test_weights_are_the_formula_by_hand_in_fp64(cut):
    weighted = rows((1, 0.5, 3, 0.25, 2))
    model = llama().double()
    numerator = denominator = 0.0
    for e in weighted:  # from the logits of each row alone
        logp = model(torch.tensor([e.ids])).logits[0].log_softmax(-1)
        for t in range(1, len(e.ids)):
            if e.targets[t]: numerator, denominator = numerator - e.weight*logp[t-1, e.ids[t]].item(), denominator + e.weight
    parts = {"padded": [pad(weighted, 0)], "packed": [pack([weighted[:2], weighted[2:]], 0)], "one by one": [pad([e], 0) for e in weighted]}[cut]
    total = sum(LossModel(model, chunk=5)(**b).item() for b in parts)/sum(map(target_weight, parts))
    assert total == pytest.approx(numerator/denominator, rel=1e-12)
    assert total != pytest.approx(sum(LossModel(model)(**pad([e], 0)).item() for e in rows())/25, rel=1e-3)  # they matter


def test_each_label_brings_its_own_weight():
    model, batch = llama().double(), padded_batch()
    weights = torch.rand(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits, labels = model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]
    by_hand = sum(-weights[b, t]*logits[b, t-1].log_softmax(-1)[labels[b, t]] for b in range(6) for t in range(1, 20) if labels[b, t] != -100)
    assert LossModel(model, chunk=7)(**batch, weights=weights).item() == pytest.approx(by_hand.item(), rel=1e-12)


def test_equal_weights_change_no_bit_and_doubled_ones_nothing():
    model, plain = llama(), rows()
    batch = pad(plain, 0)
    assert "weights" not in batch and target_weight(batch) == 25
    ones = LossModel(model)(**batch, weights=torch.ones(5, 17)).item()
    assert ones == pytest.approx(LossModel(model)(**batch).item(), rel=1e-6)
    twice = pad(rows((2,)*5), 0)
    assert LossModel(model)(**twice).item()/target_weight(twice) == pytest.approx(ones/25, rel=1e-6)


@pytest.mark.parametrize("how", ["padded", "packed"])
def test_noise_is_uniform_and_as_large_as_the_rows_own_length_says(how):
    """2000 draws; the bound alpha/sqrt(L·D), variance bound²/3, neither correlated between tokens nor off centre, each within five standard errors."""
    plain, D, alpha = rows(), 32, 7.0
    batch = pad(plain, 0) if how == "padded" else pack([plain], 0)
    lengths = row_lengths(batch["input_ids"], batch.get("attention_mask"), batch.get("documents"))
    torch.manual_seed(0)
    draws = torch.stack([add_noise(torch.zeros(*lengths.shape, D), lengths, alpha) for _ in range(2000)])
    starts = [0, 9, 13, 30, 36]
    for i,e in enumerate(plain):
        L = len(e.ids)
        mine = draws[:, i, :L] if how == "padded" else draws[:, 0, starts[i]:starts[i]+L]
        bound, n = alpha/(L*D)**0.5, mine.numel()
        assert 0.99*bound < mine.abs().max() <= bound*(1 + 1e-6)
        assert abs(mine.mean()) < 5*bound/(3*n)**0.5 and mine.var().item() == pytest.approx(bound**2/3, rel=5*(0.8/n)**0.5)
        assert abs((mine[:, 0]*mine[:, 1]).mean()) < 5*bound**2/3/(2000*D)**0.5


def test_noise_of_one_row_is_transformers_hook():
    from transformers.integrations import neftune_post_forward_hook
    embedding, x = nn.Embedding(10, 16), torch.randn(1, 12, 16)
    embedding.neftune_noise_alpha = 5.0
    torch.manual_seed(3); theirs = neftune_post_forward_hook(embedding, None, x)
    torch.manual_seed(3); ours = add_noise(x, torch.full((1, 12), 12), 5.0)
    assert (ours - theirs).abs().max() < 1e-6 and (ours - x).abs().max() > 0.1


def test_noise_is_there_in_training_only_and_leaves_no_hook():
    model, batch = llama(), pad(rows(), 0)
    noisy, quiet = LossModel(model, neftune_alpha=5.0), LossModel(model)
    def at(seed): torch.manual_seed(seed); return noisy(**batch).item()
    noisy.train()
    assert at(1) == at(1) != at(2)
    assert not model.get_input_embeddings()._forward_hooks and quiet(**batch).item() != at(1)
    noisy.eval()
    assert at(1) == at(2) == quiet(**batch).item()
    with pytest.raises(IndexError): noisy.train()(input_ids=torch.full((1, 2), 500), labels=torch.zeros(1, 2, dtype=torch.int64))
    assert not model.get_input_embeddings()._forward_hooks


RANKS = """
import deepspeed, torch, torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from qlora_kit.data.batches import Feed
from qlora_kit.training.loss import LossModel
from qlora_kit.data.tokens import Example
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
head, fetches = model.model.get_output_embeddings(), []
coordinator = type(engine.optimizer.parameter_offload.get_param_coordinator())
fetch = coordinator.fetch_sub_module
coordinator.fetch_sub_module = lambda self, sub, forward: (fetches.append(forward) if sub is head else None, fetch(self, sub, forward))[1]
for step, counts in enumerate([(60, 0), (3, 50), (40, 60)]):
    rows, N = [row(n, 2*step+i) for i, n in enumerate(counts)], sum(counts)
    loss_sum = engine(**rows[dist.get_rank()])
    engine.backward(loss_sum * dist.get_world_size() / N); engine.step()
    total = loss_sum.detach().clone(); dist.all_reduce(total)
    reference = sum(alone(**r) for r in rows)
    (reference / N).backward(); optimizer.step(); optimizer.zero_grad()
    assert abs(total - reference) <= 1e-5 * reference, (step, total, reference)
assert fetches == [True]*3, fetches # gathered once a step, for the forward pass
rows = [Example(torch.randint(1, 128, (T,), generator=torch.Generator().manual_seed(T)).tolist(), [t >= T//2 for t in range(T)]) for T in range(3, 24)]
feed, one = Feed(rows, 0, 1, 3, 2, capacity=32), Feed(rows, 0, 6, capacity=32)  # nine sequences: the second step is short, and a rank gets a filler
for step in range(4):
    N, rank = sum(sum(rows[r].targets) for s in feed.step(step) for r in s), dist.get_rank()
    parts, total = list(feed.batches(step, rank)), torch.zeros(())
    for i, part in enumerate(parts):
        engine.set_gradient_accumulation_boundary(i == 2)
        loss_sum = engine(**part)
        engine.backward(loss_sum * dist.get_world_size() / N, scale_wrt_gas=False)
        total += loss_sum.detach()
    engine.step(); dist.all_reduce(total)
    reference = sum(alone(**b) for b in one.batches(step))
    (reference / N).backward(); optimizer.step(); optimizer.zero_grad()
    assert abs(total - reference) <= 1e-5 * reference, ("packed", step, total, reference)
print("ranks agree")
"""


@pytest.mark.ranks
def test_two_zero3_ranks_with_unequal_targets_equal_one_process(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "ranks.py"]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | dict(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
                         capture_output=True, text=True, timeout=300)
    assert run.stdout.count("ranks agree") == 2, run.stderr[-3000:]
