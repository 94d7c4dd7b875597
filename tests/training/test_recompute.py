"""The levels: same numbers on each, less memory from one to the next."""
import gc

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from qlora_kit.training import recompute
from qlora_kit.model import linear
from qlora_kit.training.recompute import (
    Away, set_levels, decoder_layers, HOST_DESCENT, HostMemory, levels_in_words, LEVELS, DESCENT)
from qlora_kit.model.linear import fast_linears
from qlora_kit.model.loader import load_model
from qlora_kit.model.lora import add_lora, lora_parameters
from qlora_kit.model.kernels import fast_pointwise

IDS = torch.randint(4, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def tuned(folder, dropout=0.0, device="cpu", dtype=torch.float32):
    model = add_lora(load_model(folder, device=device, dtype=dtype), r=4, alpha=8, dropout=dropout, seed=0).train()
    for name, p in lora_parameters(model).items():
        if ".lora_B." in name:
            p.data.copy_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    fast_linears(model)
    fast_pointwise(model)
    return model


def step(model):
    model.zero_grad()
    torch.manual_seed(0)
    ids = IDS.to(next(model.parameters()).device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in lora_parameters(model).values())]


def kept(model):
    """Bytes that autograd keeps beside the weights."""
    known, found = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *model.buffers()]}, {}

    def keep(x):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        model.get_base_model().model(input_ids=IDS)
    return sum(n for place, n in found.items() if place not in known)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_every_level_gives_the_same_bits(tiny_llama, dropout):
    model = tuned(tiny_llama, dropout)
    expected = step(model)
    for levels in (*LEVELS, recompute.mixed_levels(len(decoder_layers(model)), 3 * len(decoder_layers(model)) - 1)):
        set_levels(model, levels)
        assert all(map(torch.equal, step(model), expected)), levels
    assert all("forward" not in vars(m) for m in decoder_layers(model)) or levels_in_words(levels) != "none"


def test_each_level_keeps_less(tiny_llama):
    model, sizes = tuned(tiny_llama), []
    for level in DESCENT[1:5]:
        set_levels(model, level)
        sizes.append(kept(model))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_an_mlp_that_is_recomputed_keeps_no_normed_input(tiny_llama):
    """Its norm's input is kept already: a layer on `mlp` keeps five tensors as wide as q, k and v at most, and none twice."""
    model = tuned(tiny_llama)
    set_levels(model, "mlp")
    config, tokens = model.config, IDS.numel()
    head = config.hidden_size // config.num_attention_heads
    wide = 4 * config.hidden_size + 2 * config.num_key_value_heads * head  # both norms' inputs, q, attention's result; k and v
    small = 2 + config.num_attention_heads  # 1/rms of both norms, and attention's scale of each head
    ends = 2 * config.hidden_size + 1  # the last norm, and its result
    assert kept(model) <= 4 * tokens * (len(decoder_layers(model)) * (wide + small) + ends + 2 * head)


def test_going_back_up_leaves_nothing(tiny_llama):
    model = tuned(tiny_llama)
    before = {name: vars(m).get("forward") for name, m in model.named_modules()}
    for level in ("dense", "mlp", "mlp_host", "layer", "host", "none"):
        set_levels(model, level)
    assert {name: vars(m).get("forward") for name, m in model.named_modules()} == before
    assert not any(m.remake or m.dense for m in model.modules() if isinstance(m, Linear4bit))


def test_a_dense_level_decodes_once_and_keeps_it(tiny_llama, monkeypatch):
    model, decoded = tuned(tiny_llama), []
    monkeypatch.setattr("qlora_kit.model.linear.unpack", lambda packed, state, own=linear.unpack: decoded.append(packed) or own(packed, state))
    linears = sum(isinstance(m, Linear4bit) for m in model.modules())
    for level, times in (("dense", linears), ("none", 2*linears - 3)):  # nobody wants the gradient of the first layer's input
        set_levels(model, level)
        decoded.clear()
        step(model)
        assert len(decoded) == times


def test_levels_go_down_layer_by_layer():
    steps_down = [recompute.mixed_levels(3, n) for n in range(16)]
    assert steps_down[0] == ("dense",) * 3 and steps_down[4] == ("pointwise", "none", "none") and steps_down[15] == ("host",) * 3
    for a, b in zip(steps_down, steps_down[1:]):
        assert sum(DESCENT.index(y) - DESCENT.index(x) for x, y in zip(a, b)) == 1
        assert [DESCENT.index(r) for r in b] == sorted((DESCENT.index(r) for r in b), reverse=True)
    assert recompute.mixed_levels(3, 10, HOST_DESCENT) == ("mlp_host", "mlp", "mlp") and recompute.mixed_levels(3, 99, HOST_DESCENT) == ("mlp_host",) * 3
    assert {*DESCENT, *HOST_DESCENT} == {*LEVELS}
    assert levels_in_words(steps_down[4]) == "2 none, 1 pointwise"


def test_wrong_levels_are_refused(tiny_llama):
    with pytest.raises(ValueError):
        set_levels(tuned(tiny_llama), ["none"])


def played(monkeypatch, note):
    """On a CPU the way to the host is played: sending copies. Returns what `note` says of each tensor sent."""
    sent = []

    class Played(HostMemory):
        def send(self, x):
            sent.append(note(x))
            return Away(x.clone(), x.device, None)

        def fetch(self, away):
            return away.host

        def takes(self, x):
            return True

    monkeypatch.setattr(recompute, "HostMemory", Played)
    return sent


@pytest.mark.parametrize("level, each", [("host", 1), ("mlp_host", 6)])
def test_what_was_sent_away_is_held_by_nobody(tiny_llama, monkeypatch, level, each):
    """The storage of what was sent must be gone when the forward pass ends."""
    sent = played(monkeypatch, lambda x: StorageWeakRef(x.untyped_storage()))
    model = tuned(tiny_llama)
    expected = step(model)
    set_levels(model, level)
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    gc.collect()
    assert len(sent) == each * len(decoder_layers(model)) and all(ref.expired() for ref in sent)  # six: both norms' inputs, q, k, v, attention's result
    loss.backward()
    assert all(map(torch.equal, [loss.detach(), *(p.grad for p in lora_parameters(model).values())], expected))


@pytest.mark.parametrize("level", ["host", "mlp_host"])
def test_masks_positions_and_weights_stay(tiny_llama, monkeypatch, level):
    """A padded batch has a mask of B x 1 x T x T; a model that is not quantized has weights larger than its hidden states."""
    places = played(monkeypatch, torch.Tensor.data_ptr)
    model = add_lora(load_model(tiny_llama, quant_type="none"), r=4, alpha=8, seed=0).train()
    set_levels(model, level)
    masks, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, attn_mask=None, **k: (masks.append(attn_mask.data_ptr()), attend(*a, attn_mask=attn_mask, **k))[1])
    full = torch.ones_like(IDS)
    full[1, 9:] = 0
    model(input_ids=IDS, labels=IDS, attention_mask=full, use_cache=False).loss.backward()
    assert places and masks and not {*masks, *(p.data_ptr() for p in model.parameters())} & {*places}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_levels_on_a_card(tiny_llama):
    """The same bits on every level, host memory included, several steps in a row."""
    model = tuned(tiny_llama, device="cuda", dtype=torch.bfloat16)
    expected = step(model)
    for level in LEVELS:
        set_levels(model, level)
        for _ in range(3):
            torch.testing.assert_close(step(model), expected, rtol=2e-2, atol=1e-3)  # atomic sums of the loss come in any order
