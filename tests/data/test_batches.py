"Batches: the promises that resume and several ranks rest on, over many sizes."
import itertools, json, random, shutil
from dataclasses import replace

import pytest
import torch

from qlora_kit.data import batches
from qlora_kit.data.batches import (
    attend_documents, best_fit, check_packing, count_targets, document_attention, document_mask,
    epoch_plan, Feed, global_batch, micro_batches, pack, pad, row_weights, shuffled, target_weight,
    whole_batches)
from qlora_kit.data.rows import Conversation
from qlora_kit.data.files import UserError
from qlora_kit.training.loss import LossModel, target_loss
from qlora_kit.data.tokens import Example

SIZES = list(itertools.product((1, 2, 3, 5), (1, 2, 3, 7), (1, 2, 3, 8)))  # batch_size, accumulation, ranks


def test_an_epoch_is_every_row_once_in_an_order_of_its_own():
    for n, size in itertools.product((1, 2, 7, 64, 65), (1, 3, 8, 64, 100)):
        per_epoch = -(-n // size)
        for epoch in range(3):
            got = [global_batch(n, size, epoch*per_epoch + i, seed=5) for i in range(per_epoch)]
            assert {e for e,_ in got} == {epoch} and all(len(rows) == size for _,rows in got[:-1])
            assert [r for _,rows in got for r in rows] == shuffled(n, 5, epoch)
            assert sorted(shuffled(n, 5, epoch)) == list(range(n))
    assert len({tuple(shuffled(64, s, e)) for s in range(6) for e in range(6)}) == 36


def test_the_order_is_the_same_in_every_release():
    assert shuffled(8, 0, 0) == [2, 4, 3, 6, 5, 0, 1, 7] and shuffled(8, 7, 3) == [3, 5, 0, 4, 2, 7, 1, 6]


def test_a_returned_order_is_the_callers_own():
    shuffled(5, 0, 0).clear()
    assert sorted(shuffled(5, 0, 0)) == list(range(5))


@pytest.mark.parametrize("B, k, W", SIZES)
def test_micro_batches_of_all_ranks_are_the_rows_each_once(B, k, W):
    rng = random.Random(f"{B}{k}{W}")
    lengths = [rng.randint(1, 400) for _ in range(1000)]
    for n in sorted({0, 1, min(W, B*k*W), B*k*W//2, B*k*W - 1, B*k*W}):
        rows = rng.sample(range(1000), n)
        ranks = [micro_batches(rows, lengths, B, k, rank=rank, ranks=W) for rank in range(W)]
        assert all(len(rank) == k for rank in ranks) and all(len(m) <= B for rank in ranks for m in rank)
        assert sorted(r for rank in ranks for m in rank for r in m) == sorted(rows)
        assert ranks == [micro_batches(rows[::-1], lengths, B, k, rank=rank, ranks=W) for rank in range(W)]
        rounds = -(-n // (B*W))  # no more passes than are needed, on any rank
        assert all(not m for rank in ranks for m in rank[rounds:])
        if n >= W: assert all(rank[0] for rank in ranks)


def test_one_row_too_many_and_a_rank_that_is_not_there():
    with pytest.raises(UserError, match="9 rows .*takes 8 rows.*accumulation"): micro_batches(list(range(9)), [1]*9, 2, 2, ranks=2)
    with pytest.raises(UserError, match="rank 2.*ranks 0 to 1"): micro_batches([0], [1], 2, 2, rank=2, ranks=2)
    with pytest.raises(UserError, match="size=0"): global_batch(3, 0, 0, 0)


def test_sorting_pays_and_ranks_stay_level():
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(4.5, 0.7)) + 1 for _ in range(256)]
    ranks = [micro_batches(list(range(256)), lengths, 4, 8, rank=rank, ranks=8) for rank in range(8)]
    computed = sum(len(m)*max(lengths[r] for r in m) for rank in ranks for m in rank)
    assert 1 - sum(lengths)/computed < 0.08  # about 0.45 in shuffled order
    tokens = [sum(lengths[r] for m in rank for r in m) for rank in ranks]
    assert max(tokens) < 1.1*sum(tokens)/8  # the longest chunk is alone above an eighth only with a longer tail


def test_pad_keeps_ids_and_learns_targets_only():
    rng = random.Random(1)
    for B in (1, 2, 5):
        rows = [Example([rng.randint(0, 9) for _ in range(T)], [i > 0 and rng.random() < 0.5 for i in range(T)], "")
                for T in (rng.randint(1, 12) for _ in range(B))]
        batch = pad(rows, pad_id=3)
        T = max(len(e.ids) for e in rows)
        assert all(t.shape == (B, T) and t.dtype == torch.int64 for t in batch.values())
        for b,e in enumerate(rows):
            t = len(e.ids)
            assert batch["input_ids"][b].tolist() == e.ids + [3]*(T-t)
            assert batch["attention_mask"][b].tolist() == [1]*t + [0]*(T-t)
            assert batch["labels"][b].tolist() == [i if on else -100 for i,on in zip(e.ids, e.targets)] + [-100]*(T-t)
        assert count_targets(batch) == sum(sum(e.targets) for e in rows)


def test_filler_and_first_column_count_nothing():
    assert {k: v.tolist() for k,v in pad([], 7).items()} == dict(input_ids=[[7]], attention_mask=[[1]], labels=[[-100]])
    assert count_targets(pad([], 7)) == 0
    assert count_targets(pad([Example([1, 2], [True, True], "")], 0)) == 1
    with pytest.raises(UserError, match="pad_id=None"): pad([], None)


def examples(n, longest=40, seed=0):
    rng = random.Random(seed)
    return [Example([rng.randint(1, 63) for _ in range(T)], [i > 0 and rng.random() < 0.5 for i in range(T)], f"row {r}")
            for r,T in enumerate(rng.randint(2, longest) for _ in range(n))]


def test_best_fit_is_the_textbook_one_and_its_number_depends_on_lengths_alone():
    rng = random.Random(2)
    for n, capacity in itertools.product((1, 2, 40, 300), (40, 64, 100)):
        lengths = [rng.randint(1, 40) for _ in range(n)]
        got = best_fit(list(range(n)), lengths, capacity)
        rooms = []  # the textbook: look at every open sequence
        for length in sorted(lengths, reverse=True):
            fits = [i for i,room in enumerate(rooms) if room >= length]
            if not fits: rooms.append(capacity - length)
            else: rooms[min(fits, key=rooms.__getitem__)] -= length
        assert sorted(capacity - sum(lengths[r] for r in s) for s in got) == sorted(rooms)
        assert sorted(r for s in got for r in s) == list(range(n))
        assert len(best_fit(rng.sample(range(n), n), lengths, capacity)) == len(got)


@pytest.mark.parametrize("how", [{}, {"capacity": 64}, {"group_by_length": True}])
def test_a_plan_takes_every_row_once_in_an_order_of_its_epoch(how):
    lengths = [len(e.ids) for e in examples(203)]
    plans = [epoch_plan(lengths, 4, 3, epoch=epoch, **how) for epoch in range(4)]
    for plan in plans:
        assert sorted(r for batch in plan for s in batch for r in s) == list(range(203)) and len(plan) == len(plans[0])
        assert sorted(map(len, plan))[1:] == [4]*(len(plan)-1)  # one batch may be short
        assert all(sum(lengths[r] for r in s) <= 64 for batch in plan for s in batch)
    assert len({str(plan) for plan in plans}) == 4 and plans[2] == epoch_plan(lengths, 4, 3, epoch=2, **how)
    assert str(epoch_plan(lengths, 4, 4, epoch=0, **how)) != str(plans[0])


def test_the_plans_are_the_same_in_every_release():
    lengths = [5, 9, 3, 7, 2, 8]
    assert epoch_plan(lengths, 2, 0, epoch=0, capacity=12) == [[[5, 4], [3, 0]], [[1, 2]]]  # 8+2, 7+5, 9+3 tokens
    assert epoch_plan(lengths, 2, 0, epoch=1, group_by_length=True) == [[[3], [0]], [[1], [5]], [[2], [4]]]


@pytest.mark.parametrize("B, k, W", [(4, 1, 1), (2, 3, 2), (3, 2, 3)])
def test_padded_feed_is_global_batch_dealt_and_padded(B, k, W):
    rows = examples(50)
    feed, lengths = Feed(rows, 9, B, k, W, seed=5), [len(e.ids) for e in rows]
    for step, rank in itertools.product(range(2*feed.per_epoch), range(W)):
        taken = global_batch(50, B*k*W, step, 5)[1]
        expected = [pad([rows[r] for r in m], 9) for m in micro_batches(taken, lengths, B, k, rank=rank, ranks=W)]
        got = list(feed.batches(step, rank))
        assert len(got) == k and all(a.keys() == b.keys() and all(torch.equal(a[x], b[x]) for x in a) for a,b in zip(got, expected, strict=True))
        assert feed.count(step) == (len(taken), sum(lengths[r] for r in taken))


@pytest.mark.parametrize("B, k, W", [(6, 1, 1), (1, 6, 1), (1, 2, 3), (2, 3, 4)])
def test_packed_feed_gives_every_document_to_one_rank(B, k, W):
    rows = examples(60)
    feed = Feed(rows, 0, B, k, W, seed=1, capacity=64)
    seen = []
    for step in range(feed.per_epoch):
        parts = [list(feed.batches(step, rank)) for rank in range(W)]
        assert all(len(rank) == k for rank in parts)
        here = [b for rank in parts for b in rank]
        for b in here:
            assert "attention_mask" not in b and b["input_ids"].shape[1] <= 64 and b["input_ids"].shape[0] <= B
            ids, labels, starts = b["input_ids"].flatten().tolist(), b["labels"].flatten().tolist(), b["documents"].tolist()
            assert starts[-1] == len(ids) and b["position_ids"].flatten().tolist() == [t for a,z in zip(starts, starts[1:]) for t in range(z-a)]
            for a,z in zip(starts, starts[1:]):
                if any(ids[a:z]): seen.append((ids[a:z], [x != -100 for x in labels[a:z]]))  # pads are 0, and no row has one
                else: assert set(labels[a:z]) == {-100}
        assert sum(map(count_targets, here)) == sum(sum(rows[r].targets) for s in feed.step(step) for r in s)
    assert sorted(seen) == sorted((e.ids, e.targets) for e in rows)


def test_whole_is_all_rows_with_as_many_batches_on_every_rank():
    rows = examples(23)
    for capacity, W in itertools.product((None, 40), (1, 2, 5)):
        parts = [list(whole_batches(rows, 0, 3, rank=rank, ranks=W, capacity=capacity)) for rank in range(W)]
        assert len({len(rank) for rank in parts}) == 1
        assert sum(count_targets(b) for rank in parts for b in rank) == sum(sum(e.targets) for e in rows)


def test_rows_bring_their_weights_by_name():
    rows = examples(21)
    weights = {e.where: 1 + i % 3 for i,e in enumerate(rows)}
    for capacity, W in itertools.product((None, 60), (1, 2)):
        feed = Feed(rows, 0, 2, 3, W, capacity=capacity, weights=weights)
        got = [sum(target_weight(b) for rank in range(W) for b in feed.batches(step, rank)) for step in range(feed.per_epoch)]
        assert got == [sum(weights[rows[r].where]*sum(rows[r].targets) for s in feed.step(step) for r in s) for step in range(feed.per_epoch)]
    assert sum(target_weight(b) for b in whole_batches(rows, 0, 4, capacity=60, weights=weights)) == sum(weights[e.where]*sum(e.targets) for e in rows)


def test_pack_never_learns_the_first_token_of_a_document():
    two = pack([[Example([1, 2], [True, True]), Example([3, 4], [True, True])]], 0)
    assert two["labels"].tolist() == [[-100, 2, -100, 4]] and count_targets(two) == 2
    assert {k: v.tolist() for k,v in pack([], 7).items()} == dict(input_ids=[[7]], position_ids=[[0]], labels=[[-100]], documents=[0, 1])
    with pytest.raises(UserError, match="pad_id=None"): pack([], None)


def test_wishes_that_cannot_be_met():
    with pytest.raises(UserError, match="row 3 has 9 tokens.*holds 8.*max_length"): Feed([*examples(3, 8), Example([1]*9, [True]*9)], 0, capacity=8)
    with pytest.raises(UserError, match="n=0 rows"): Feed([], 0)
    talks = lambda *weights: [Conversation([], f"row {i}", {} if w is None else {"w": w}) for i,w in enumerate(weights)]
    assert row_weights(talks(2, None, 0.5), "w") == {"row 0": 2.0, "row 1": 1.0, "row 2": 0.5} == row_weights(talks("2", None, "0.5"), "w")  # a CSV's are text
    for bad in (0, -1, True, "two", "", float("nan"), float("inf")):
        with pytest.raises(UserError, match="row 1: w is .*above 0"): row_weights(talks(1, bad), "w")
    with pytest.raises(UserError, match="two rows are called 'row 0'"): row_weights(talks(1) + talks(2), "w")


def family(name, **changes):
    import transformers as t
    size = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                initializer_range=0.1, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    gpt2 = dict(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1, bos_token_id=1, eos_token_id=2)
    kinds = {"llama": (t.LlamaForCausalLM, t.LlamaConfig, size), "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config, size),
             "mistral, window of 5": (t.MistralForCausalLM, t.MistralConfig, size | dict(sliding_window=5)),
             "gemma2, eager, window of 5": (t.Gemma2ForCausalLM, t.Gemma2Config, size | dict(head_dim=16, sliding_window=5, attn_implementation="eager")),
             "gemma3, window of 5": (t.Gemma3ForCausalLM, t.Gemma3TextConfig, size | dict(head_dim=16, sliding_window=5)),
             "gpt2": (t.GPT2LMHeadModel, t.GPT2Config, gpt2), "gpt2, eager": (t.GPT2LMHeadModel, t.GPT2Config, gpt2 | dict(attn_implementation="eager")),
             "gpt-neox": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig, {k: v for k,v in size.items() if k != "num_key_value_heads"})}
    kind, config, values = kinds[name]
    torch.manual_seed(0)
    return kind(config(**values | changes)).eval()


FAMILIES = ["llama", "qwen2", "mistral, window of 5", "gemma2, eager, window of 5", "gemma3, window of 5", "gpt2", "gpt2, eager", "gpt-neox"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_each_document_alone(name, device):
    """Loss and gradients against transformers' own loss on single rows; 1e-5: fp32 through sums of a few hundred terms."""
    rows = examples(7, longest=14, seed=3)
    sequences = [rows[:3], rows[3:7]]
    model, there = family(name).to(device), lambda batch: {k: v.to(device) for k, v in batch.items()}
    total = 0.0
    for e in rows:
        n = count_targets(pad([e], 0))
        loss = model(**there(pad([e], 0)), use_cache=False).loss * n
        loss.backward()
        total += loss.item() if n else 0.0  # the mean over no targets is no number
    reference = {n: p.grad.clone() for n,p in model.named_parameters()}
    for by_documents in (False, True):
        if by_documents and not attend_documents(model): assert "eager" in name; continue
        model.zero_grad()
        loss = LossModel(model)(**there(pack(sequences, 0)))
        loss.backward()
        assert loss.item() == pytest.approx(total, rel=1e-5)
        worst = max(((p.grad - reference[n]).norm()/reference[n].norm()).item() for n,p in model.named_parameters())
        assert worst < 1e-5, (by_documents, worst)
        check_packing(lambda b: LossModel(model)(**there(b)), tolerance=0.0)


@pytest.mark.parametrize("name", ["llama", "mistral, window of 5", "gpt2"])
@pytest.mark.parametrize("weighted", [False, True])
def test_joined_rows_learn_what_padded_rows_learn(name, weighted):
    """Every micro-batch of two ranks, fillers too; 1e-5: fp32 through sums of a few hundred terms."""
    rows = examples(7, longest=14, seed=3)
    weights = {e.where: 1.0 + i % 3 for i, e in enumerate(rows)} if weighted else None
    padded = Feed(rows, 0, 2, 2, 2, weights=weights)
    joined, model = replace(padded, joined=True), family(name)
    assert attend_documents(model)
    for i in range(padded.per_epoch):
        for rank in range(2):
            for a, b in zip(padded.batches(i, rank), joined.batches(i, rank), strict=True):
                assert len(b["input_ids"]) == 1 and target_weight(a) == target_weight(b)
                loss = [LossModel(model)(**x) for x in (a, b)]
                grads = [torch.cat([g.flatten() for g in torch.autograd.grad(x, list(model.parameters()))]) for x in loss] if target_weight(a) else [torch.ones(1)]*2
                assert loss[1].item() == pytest.approx(loss[0].item(), rel=1e-5) and (grads[1] - grads[0]).norm() <= 1e-5*grads[0].norm()
    assert sum(b["input_ids"].numel() for i in range(joined.per_epoch) for rank in range(2) for b in joined.batches(i, rank)) <= sum(len(e.ids) for e in rows) + 8  # a filler is one token


def test_a_mask_of_ones_takes_the_walls_away():
    model = family("llama")
    def plain(b):
        hidden = model.model(input_ids=b["input_ids"], attention_mask=torch.ones_like(b["input_ids"]), position_ids=b["position_ids"])[0]
        return target_loss(hidden, b["labels"], model.lm_head)[0]
    with pytest.raises(UserError, match="looks across documents"): check_packing(plain)
    ours = LossModel(model)
    check_packing(lambda b: ours(b["input_ids"], torch.ones_like(b["input_ids"]), b["labels"], position_ids=b["position_ids"])) # hands no mask on


def loop(q, k, v, starts, starts_k, T, T_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    "What varlen_attn promises, document by document, with a softmax written out."
    assert torch.equal(starts, starts_k) and window_size[1] == 0 and q.shape[1] % k.shape[1] == 0
    k, v = (x.repeat_interleave(q.shape[1]//x.shape[1], 1) for x in (k, v))
    out = []
    for a,z in zip(starts.tolist(), starts.tolist()[1:]):
        ago = torch.arange(z-a)[:,None] - torch.arange(z-a)
        hidden = (ago < 0) | (ago > window_size[0] if window_size[0] >= 0 else False)
        scores = torch.einsum("thd,shd->hts", q[a:z], k[a:z])*(scale or q.shape[-1]**-0.5)
        out.append(torch.einsum("hts,shd->thd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v[a:z]))
    return torch.cat(out)


@pytest.mark.parametrize("name", ["llama", "mistral, window of 5", "gpt2"])
def test_the_kernel_is_handed_what_the_mask_means(name, monkeypatch):
    monkeypatch.setattr(batches, "_kernel_takes", lambda query, dropout: True)
    monkeypatch.setattr(batches, "varlen_attn", loop)
    model, rows = family(name), examples(7, longest=14, seed=3)
    batch = pack([rows[:3], rows[3:]], 0)
    by_positions = LossModel(model)(**batch).item()
    attend_documents(model)
    assert LossModel(model)(**batch).item() == pytest.approx(by_positions, rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral, window of 5", "gemma3, window of 5", "gpt2", "gpt-neox"])
def test_padded_rows_and_generation_do_not_notice_documents(name):
    """Where a window is narrower than a row, another mask says the same, and a sum may be taken in another order: 1e-6."""
    model, rows = family(name), examples(3, seed=4)
    left = pad(rows, 0)
    left = dict(input_ids=left["input_ids"].flip(1), attention_mask=left["attention_mask"].flip(1))
    ask = lambda: model.generate(**left, max_new_tokens=5, do_sample=False, pad_token_id=0)
    before = LossModel(model)(**pad(rows, 0)).item(), ask()
    assert attend_documents(model) and attend_documents(model)
    after = LossModel(model)(**pad(rows, 0)).item(), ask()
    assert before[0] == pytest.approx(after[0], rel=1e-6 if "window" in name else 0) and torch.equal(before[1], after[1])


@pytest.mark.parametrize("lengths", [(12, 12), (12, 7), (7, 12)])
@pytest.mark.parametrize("name", ["llama", "mistral, window of 5"])
def test_sequences_of_one_document_each_are_rows(name, lengths):
    """What a short sequence leaves free is a document too, so only full ones are taken for rows; 1e-6: fp32."""
    model, rows = family(name), [Example([5 + i + t % 7 for t in range(n)], [False] + [True]*(n-1)) for i, n in enumerate(lengths)]
    alone = LossModel(model)(**pad(rows, 0)).item()
    attend_documents(model)
    batch = pack([[e] for e in rows], 0)
    assert (len(batch["documents"]) == 3) == (lengths == (12, 12))
    assert LossModel(model)(**batch).item() == pytest.approx(alone, rel=1e-6)


class Read(torch.utils._python_dispatch.TorchDispatchMode):
    "Counts the tensors whose values Python asks for; on a card each is a wait."
    def __init__(self): super().__init__(); self.n = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_the_decoder_asks_for_no_value(name):
    """transformers looks at the positions of an unmasked batch, to find out whether documents share a sequence."""
    model, batch = family(name), pad(examples(3, seed=4), 0)
    def decode():
        starts = batches.document_starts(model, batch["input_ids"])
        with Read() as read: model.base_model(input_ids=batch["input_ids"], attention_mask=starts, use_cache=False)
        return read.n
    assert decode() > 0, "transformers reads nothing any more: page 02 need not say that it does"
    attend_documents(model)
    assert decode() == 0


def test_cudnn_is_allowed_where_a_length_comes_again(monkeypatch):
    seen, allowed = {}, torch.backends.cuda.cudnn_sdp_enabled
    monkeypatch.setattr(batches, "sdpa_attention_forward", lambda module, query, *args, **kwargs: seen.update({query.shape[2]: allowed()}))
    assert torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    with batches.cudnn_attention(False): assert not torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(True)
    lengths = [1, 128, 896, 1023, 1024, 1025, 1100, 2048, 8192]
    def ask():
        seen.clear()
        for T in lengths: document_attention(None, torch.empty(1, 1, T, 8), None, None, None)
        return [T for T in lengths if seen[T]]
    assert allowed() and ask() == [1024, 2048, 8192] and allowed()
    with batches.cudnn_attention(False):
        assert ask() == [] and not allowed()
        with batches.cudnn_attention(True): assert not allowed()
    with pytest.raises(KeyError), batches.cudnn_attention(False): {}["x"]
    assert allowed()


def test_a_packed_run_learns_and_resumes_to_the_last_bit(tiny_config):
    """Dropout, noise and weights on; two micro-batches in a step."""
    from qlora_kit.run.checkpoint import checkpoints, load_checkpoint
    from qlora_kit.run.config import load_config
    from qlora_kit.run.monitor import read_metrics
    from qlora_kit.run.train import train

    path = tiny_config("packed", data__packing="best_fit", data__weight_field="trust", training__neftune_alpha=1.0, training__batch_size=1,
                       training__max_length=128, training__num_epochs=3)
    rows = json.loads((path.parent/"rows.json").read_text())
    (path.parent/"rows.json").write_text(json.dumps([row | {"trust": 1 + i % 3} for i,row in enumerate(rows)]))
    full = train(load_config(path), path.stem, quiet=True, base=path.parent)
    log = read_metrics(full.run)
    assert log[-1]["loss"] < log[0]["loss"] - 0.3 and log[0]["samples_per_s"] > 0
    cut = path.parent/"runs/cut"
    shutil.copytree(full.run, cut)
    saved = checkpoints(cut)
    for checkpoint in saved:
        if load_checkpoint(checkpoint).step > 3: shutil.rmtree(checkpoint)
    train(load_config(path, [f"training.output_dir={cut}"]), path.stem, quiet=True, base=path.parent, resume=cut)
    assert [(r["loss"], r["grad_norm"], r.get("val_loss")) for r in read_metrics(cut)] == [(r["loss"], r["grad_norm"], r.get("val_loss")) for r in log]
    assert (cut/"adapter/adapter_model.safetensors").read_bytes() == (full.run/"adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [None, 20])
def test_varlen_kernel_equals_the_mask_on_a_card(window):
    """Both in bf16 against the mask in fp32; eight significant bits, so an error of 2e-2 of the largest value, and no more than SDPA's own by half."""
    torch.manual_seed(0)
    starts = torch.tensor([0, 70, 73, 128, 130, 256], dtype=torch.int32, device="cuda")
    full = [torch.randn(2, H, 128, 64, device="cuda") for H in (8, 2, 2)]
    layer = torch.nn.Module(); layer.num_key_value_groups, layer.is_causal = 4, True
    def run(dtype, mask):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in full)
        out, _ = document_attention(layer, q, k, v, mask, scaling=64**-0.5, sliding_window=window)
        out.float().square().sum().backward()
        return [x.float() for x in (out, q.grad, k.grad, v.grad)]
    mask = document_mask(starts, (2, 128), window)
    assert batches._kernel_takes(full[0].bfloat16(), 0.0)
    exact, kernel, sdpa = run(torch.float32, mask), run(torch.bfloat16, starts[None,None,None]), run(torch.bfloat16, mask)
    for e, k, s in zip(exact, kernel, sdpa):
        worst, allowed = (k - e).abs().max()/e.abs().max(), (s - e).abs().max()/e.abs().max()
        assert worst < 2e-2 and worst < 1.5*allowed + 2e-3, (worst.item(), allowed.item())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral, window of 5", "gpt2"])
def test_packed_is_each_document_alone_on_a_card(name):
    """bf16 against fp32 of the same model on a CPU: 2e-2 of the loss; and no document sees another, to the last bit."""
    rows, model = examples(7, longest=14, seed=3), family(name)
    reference = sum(LossModel(model)(**pad([e], 0)).item() for e in rows)
    model = model.to("cuda", torch.bfloat16)
    assert attend_documents(model)
    forward = lambda b: LossModel(model)(**{k: v.cuda() for k,v in b.items()})
    assert forward(pack([rows[:3], rows[3:]], 0)).item() == pytest.approx(reference, rel=2e-2)
    check_packing(forward, tolerance=0.0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_length_of_its_own_gets_no_plan():
    """A padded batch of 1000 tokens; by itself SDPA takes cuDNN for it on the cards that prefer it."""
    class Named(Read):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None): names.add(str(function)); return function(*args, **kwargs or {})
    model = family("llama", max_position_embeddings=1024).to("cuda", torch.bfloat16)
    assert attend_documents(model)
    for T in (1000, 1024):
        names, batch = set(), {k: v.cuda() for k, v in pad([Example([1]*T, [False]+[True]*(T-1))], 0).items()}
        with Named(): LossModel(model)(**batch)
        kernels = {n for n in names if "scaled_dot_product" in n}
        assert kernels and (T == 1024 or not any("cudnn" in n for n in kernels)), kernels
