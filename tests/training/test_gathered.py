"""Layers that are gathered in time: the ring against a search for the best order; two and three ranks against one process, to the last bit where sums have one order."""
import json
import time
from functools import lru_cache, partial

import pytest
import torch
from test_engine import answer, at_level, LEVELS, llama_folder, start, train_small  # noqa: F401

from qlora_kit.model.flat import DiskShare, FlatWeights
from qlora_kit.training import gathered
from qlora_kit.training.engine import LocalEngine, make_optimizer
from qlora_kit.training.gathered import Once, Ring, uses_until


def one_number(n, ranks=1):
    row = FlatWeights(0, ranks)
    place = row.add((1,), torch.float32)
    row.share = torch.zeros(row.part, dtype=torch.uint8)
    row.keep_part(place, torch.tensor([float(n)]))
    row.makers.append(partial(FlatWeights.view, segment=place))
    return row


def step(L): return [(k, False) for k in range(L)] + [(k, True) for k in reversed(range(L))]


@pytest.mark.parametrize("L", [2, 3, 5, 8])
def test_the_next_use_is_counted_right(L):
    uses = step(L)*2
    for at, (now, backward) in enumerate(uses[:2*L]):
        for layer in range(L):
            expected = next(i for i, (k, _) in enumerate(uses[at + 1:] + uses) if k == layer)
            assert uses_until(layer, now, L, backward=backward) == expected, (now, backward, layer)
    for now in range(L):
        order = [*range(now + 1, L), *range(L)]
        assert all(uses_until(k, now, L, returns=False) == order.index(k) for k in range(L))


def fewest(uses, buffers):
    """Fetches that any choice of what to give up needs at least, one use after the other, by trying all."""
    @lru_cache(None)
    def search(i, here):
        if i == len(uses): return 0
        if uses[i] in here: return search(i + 1, here)
        if len(here) < buffers: return 1 + search(i + 1, here | {uses[i]})
        return 1 + min(search(i + 1, here - {gone} | {uses[i]}) for gone in here)
    return search(0, frozenset())


@pytest.mark.parametrize("L,S", [(3, 2), (4, 2), (4, 3), (5, 2), (5, 3), (5, 4), (5, 5), (5, 9), (2, 2)])
def test_no_choice_of_what_to_give_up_needs_fewer_gathers(L, S):
    ring, uses = Ring([one_number(n) for n in range(L)], S), step(L)*3
    for layer, backward in uses:
        ring.fetch(layer, backward)
        assert ring.rows[layer].look_up(0).item() == layer and len(ring.place) <= len(ring.buffers) == min(S, L)
        assert sum(row.data is not None for row in ring.rows) <= S
    assert ring.gathers <= fewest(tuple(k for k, _ in uses), min(S, L)), "gathering ahead costs no fetch"


def test_what_was_given_up_has_no_numbers_and_what_was_not_used_is_waited_for():
    class Work:
        waited = 0
        def wait(self): Work.waited += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathered, "gather", lambda row, out, **_: out[:len(row.share)].copy_(row.share) is None or Work())
        ring = Ring([one_number(n) for n in range(4)], 2)
        ring.fetch(0)  # 1 is on its way
        ring.fetch(3, backward=True)  # another direction: one of the two has to go
        ring.fetch(2, backward=True)
    assert set(ring.place) == {2, 1} and ring.rows[3].data is None and ring.rows[0].data is None
    assert Work.waited == ring.gathers - 1, "all but the one that is still on its way"
    assert ring.rows[3].look_up(0).numel() == 0


def test_a_row_that_is_on_its_way_is_waited_for_by_whoever_reads_it():
    """A fingerprint or an export between two steps finds a layer that the ring has begun to gather."""
    class Late:
        def __init__(self, row, out): self.row, self.out = row, out
        def wait(self): self.out[:len(self.row.share)].copy_(self.row.share)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathered, "gather", lambda row, out, **_: Late(row, out.zero_()))
        ring = Ring([one_number(n + 1) for n in range(3)], 2)
        ring.fetch(0)
        with ring.rows[1].whole(): assert ring.rows[1].look_up(0).item() == 2
        ring.fetch(1)
        assert ring.rows[2].look_up(0).item() == 3, "by a single weight, too"


def test_a_gather_runs_beside_the_layer_before(monkeypatch):
    """Six layers of 30 ms and gathers of 30 ms: 210 ms if they overlap, 360 if not."""
    class Slow:
        def __init__(self): self.end = time.monotonic() + 0.03
        def wait(self): time.sleep(max(0, self.end - time.monotonic()))

    monkeypatch.setattr(gathered, "gather", lambda row, out, **_: Slow())
    ring, begin = Ring([one_number(n) for n in range(6)], 2), time.monotonic()
    for layer in range(6):
        ring.fetch(layer)
        time.sleep(0.03)
    assert time.monotonic() - begin < 0.34


def test_a_row_that_is_whole_for_a_call_goes_after_it():
    once = Once(one_number(5))
    once.start()
    with once: assert once.row.look_up(0).item() == 5
    assert once.row.data is None and once.row.look_up(0).numel() == 0


def test_a_share_on_disk_leaves_no_file(tmp_path):
    row = one_number(3)
    row.share = DiskShare(row.share, tmp_path/"new")
    assert not list((tmp_path/"new").iterdir()) and len(row.share) == row.part
    with row.whole(): assert row.look_up(0).item() == 3
    row.share.begin(); row.share.begin()
    with row.whole(): assert row.look_up(0).item() == 3


TRAIN = """
import json, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from qlora_kit.model.loader import packed_hash
from qlora_kit.training.engine import DeepSpeedEngine, join_ranks, leave, make_optimizer
from qlora_kit.training.zero import zero_config
from test_engine import answer, at_level, three_rows, train_small
place, said = join_ranks(several=True), {}

class Calls(TorchDispatchMode):
    n = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function.namespace == "c10d" and "gather" in str(function)
        return function(*args, **(kwargs or {}))

for name, folder, stage, level, buffers, load, choice in json.loads(sys.argv[1]):
    module = at_level(folder, level, **load)
    if "checkpointing" in choice: module.model.gradient_checkpointing_enable(dict(use_reentrant=choice.pop("checkpointing")))
    engine = DeepSpeedEngine(module, make_optimizer(module), zero_config(stage, accumulation=2, hidden_size=64, **choice), place, buffers)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad(): losses = [float(engine.forward(dict(input_ids=ids, labels=ids)))]
    if place.ranks == 3: losses += three_rows(engine, [place.rank])
    else: losses += train_small(engine, [place.rank], 3)
    before = engine.ring and engine.ring.gathers
    with Calls() as calls:
        if place.ranks == 2: losses += train_small(engine, [place.rank], 1)
    gathers = engine.ring and engine.ring.gathers - before
    said[name] = dict(losses=losses, answer=answer(module), hash=packed_hash(module.model), calls=calls.n, gathers=gathers)
    if engine.ring: assert len(engine.ring.place) <= len(engine.ring.buffers) == min(max(buffers, 2), len(engine.ring.rows))
    engine.ds.destroy()
if place.rank == 0: print(json.dumps(said))
leave()
"""


def train(cases, ranks=2): return start(TRAIN, json.dumps([[name, str(folder), *rest] for name, folder, *rest in cases]), ranks=ranks)


@pytest.mark.ranks
def test_stage_three_is_stage_one_to_the_last_bit_on_every_level(llama_folder):
    """Losses, a greedy answer and the hash of the packed weights: the same bits are gathered, and sums keep their order. Beside them one process, whose sums
    have another order (1e-5)."""
    folder, L, S = llama_folder(layers=5, vocab=320), 5, 3
    share = dict(sharded=True)
    cases = [["two", folder, 1, "none", 2, {}, {}], *[[level, folder, 3, level, 2, share, {}] for level in LEVELS],
             *[[f"{n} buffers", folder, 3, "none", n, share, {}] for n in (S, L, 9)],
             ["whole at first", folder, 3, "none", 2, {}, {}], ["host", folder, 3, "none", 2, share, dict(offload_param="cpu")],
             ["both", folder, 3, "none", 2, {}, dict(offload_param="cpu", offload_optimizer="cpu")],
             ["not reentrant", folder, 3, "none", 2, share, dict(checkpointing=False)], ["reentrant", folder, 3, "none", 2, share, dict(checkpointing=True)],
             ["reentrant, two", folder, 1, "none", 2, {}, dict(checkpointing=True)]]
    said = train(cases)
    assert said["reentrant"]["losses"] == said["reentrant, two"]["losses"]  # a reentrant backward pass adds in an order of its own
    for name, *_ in cases[:-2]:
        assert (said[name]["losses"], said[name]["answer"], said[name]["hash"]) == (said["two"]["losses"], said["two"]["answer"], said["two"]["hash"]), name
    for name, buffers in ((LEVELS[0], 2), (f"{S} buffers", S), (f"{L} buffers", L), ("9 buffers", L), ("not reentrant", 2)):
        assert said[name]["gathers"] == 2*2*(L - buffers), "two micro-batches, up and down, but for the turns"
        assert said[name]["calls"] == said["two"]["calls"] + said[name]["gathers"] + 2*2, "and embedding and head for each micro-batch"
    module = at_level(folder)
    local, ids = LocalEngine(module, make_optimizer(module)), torch.arange(3, 15)[None]
    with torch.no_grad(): alone = [float(local.forward(dict(input_ids=ids, labels=ids)))]
    alone += train_small(local, [0, 1], 3) + train_small(local, [0, 1], 1)
    assert said["two"]["losses"] == pytest.approx(alone, rel=1e-5) and said["two"]["answer"] == answer(module)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 3])
def test_families_and_updates_at_stage_three(tmp_path, ranks):
    """Rows that do not divide, a tied head, Conv1D with biases, 16-bit bases, DoRA, fp4 without double quantization, codes carried in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    llama = dict(vocab_size=320, hidden_size=60, intermediate_size=76, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    gpt2 = dict(vocab_size=320, n_embd=52, n_layer=3, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    cases = []
    for name, shape, kinds in (("llama", llama, [{}, dict(variant="dora"), dict(quant_type="none"), dict(quant_storage="float32")]),
                               ("gpt2", gpt2, [{}, dict(quant_type="none")]), ("qwen2", llama, [dict(quant_type="fp4", double_quant=False)])):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape, tie_word_embeddings=name != "qwen2")).save_pretrained(tmp_path / name)
        if name == "llama":  # an earlier adapter, plain and with DoRA's lengths
            for variant in ("lora", "dora"):
                at_level(tmp_path / name, variant=variant).model.save_pretrained(tmp_path / variant)
                kinds.append(dict(adapter=str(tmp_path / variant)))
        for kind in kinds:
            for level in ("none", "layer") if kind in ({}, dict(quant_type="none")) else ("none",):
                label = f"{name} {kind} {level}"
                cases += [[f"{label} 1", tmp_path / name, 1, level, 2, kind, {}], [f"{label} 3", tmp_path / name, 3, level, 2, kind | dict(sharded=True), {}]]
    said = train(cases, ranks)
    for name in {name[:-2] for name, *_ in cases}: assert said[f"{name} 1"]["losses"] == said[f"{name} 3"]["losses"] and said[f"{name} 1"]["answer"] == said[f"{name} 3"]["answer"], name
