"Batches: the promises that resume and several ranks rest on, over many sizes."
import itertools, random

import pytest
import torch

from qlora_kit.batches import count_targets, global_batch, micro_batches, pad, shuffled
from qlora_kit.data import UserError
from qlora_kit.tokens import Example

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
        ranks = [micro_batches(rows, lengths, B, k, rank, W) for rank in range(W)]
        assert all(len(rank) == k for rank in ranks) and all(len(m) <= B for rank in ranks for m in rank)
        assert sorted(r for rank in ranks for m in rank for r in m) == sorted(rows)
        assert ranks == [micro_batches(rows[::-1], lengths, B, k, rank, W) for rank in range(W)]
        rounds = -(-n // (B*W))  # no more passes than are needed, on any rank
        assert all(not m for rank in ranks for m in rank[rounds:])
        if n >= W: assert all(rank[0] for rank in ranks)


def test_one_row_too_many_and_a_rank_that_is_not_there():
    with pytest.raises(UserError, match="9 rows .*takes 8 rows.*accumulation"): micro_batches(list(range(9)), [1]*9, 2, 2, 0, 2)
    with pytest.raises(UserError, match="rank 2.*ranks 0 to 1"): micro_batches([0], [1], 2, 2, 2, 2)
    with pytest.raises(UserError, match="size=0"): global_batch(3, 0, 0, 0)


def test_sorting_pays_and_ranks_stay_level():
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(4.5, 0.7)) + 1 for _ in range(256)]
    ranks = [micro_batches(list(range(256)), lengths, 4, 8, rank, 8) for rank in range(8)]
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
