"""Norm, SwiGLU and rotary embedding: their formulas in fp64, the library's modules of six families, what is left alone, and how results are made again."""
import copy
import math
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Phi3Config, Qwen3Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.phi3 import modeling_phi3

from qlora_kit.model import kernels as pointwise
from qlora_kit.model.linear import fast_linears
from qlora_kit.model.loader import load_model
from qlora_kit.model.lora import add_lora, lora_parameters, recompute_layers
from qlora_kit.model.kernels import (
    any_rows, compiled, fast_pointwise, is_rotary, is_swiglu, norm_settings, on_card,
    plain_pointwise, RMSNorm, Rotary, SwiGLU)

SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=64, pad_token_id=0)
FAMILIES = {
    "llama": (LlamaConfig(**SMALL), dict(norm=5, mlp=2, rotary=1)),
    "qwen3": (Qwen3Config(**SMALL), dict(norm=9, mlp=2, rotary=1)),  # with norms on queries and keys
    "mistral": (MistralConfig(**SMALL), dict(norm=5, mlp=2, rotary=1)),
    "phi3": (Phi3Config(**SMALL), dict(norm=5, rotary=1)),  # gate and up are one linear
    "gemma2": (Gemma2Config(**SMALL), dict(norm=9, rotary=1)),  # 1 + w; tanh-GELU
    "gpt2": (GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0), {}),
}
IDS = torch.arange(48).reshape(3, 16) % 60
MASK = torch.ones_like(IDS); MASK[1, 9:] = 0
# some ten roundings; 16 bits: of results and gradients, 2⁻¹² or 2⁻⁹ each, some twice
EPS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def model_of(family, dtype=torch.float32):
    "Random weights, norms away from one; norms and embeddings frozen, the rest trained."
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family][0], attn_implementation="eager").float().train()
    for name, p in model.named_parameters():
        if "norm" in name or "ln_" in name: p.requires_grad_(False); nn.init.normal_(p, 0.5, 0.3)
    return model.to(dtype)


def step(model, ids=IDS, mask=MASK):
    model.zero_grad()
    out = model(input_ids=ids, attention_mask=mask, labels=ids)
    out.loss.backward()
    return out.loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(ours, theirs, rtol=1e-5):
    assert ours[0] == pytest.approx(theirs[0], rel=rtol) and ours[1].keys() == theirs[1].keys()
    for name, g in theirs[1].items(): assert (ours[1][name] - g).abs().max() <= rtol*g.abs().max(), name


def data(*shape, dtype=torch.float64, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def results(f, *inputs, seed=9):
    "Outputs, and gradients in the inputs, of f."
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = f(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    return *out, *torch.autograd.grad(out, leaves, [data(*y.shape, seed=seed + i, dtype=y.dtype, device=y.device) for i, y in enumerate(out)])


def near(ours, exact, rtol):
    "Every entry, measured by the largest of its tensor."
    for a, b in zip(ours, exact, strict=True): assert a.shape == b.shape and (a.double() - b).abs().max() <= rtol*b.abs().max(), (a.double() - b).abs().max()/b.abs().max()


def formulas(plus_one=False, eps=1e-5):
    def norm(h, w): return (w + plus_one)*h/(h.square().mean(-1, keepdim=True) + eps).sqrt()
    def gate(g, u): return g/(1 + (-g).exp())*u
    def rotary(q, k, c, s):
        half = q.shape[-1]//2
        turned = [x*c[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1)*s[:, None] for x in (q, k)]
        return tuple(turned)
    return norm, gate, rotary


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("shape", [(7, 64), (2, 3, 5, 16)])
@pytest.mark.parametrize("plus_one", [False, True])
def test_the_norm_is_its_formula(shape, plus_one, dtype):
    h, w = data(*shape, dtype=dtype), data(shape[-1], seed=1, dtype=dtype)
    norm = formulas(plus_one)[0]
    near(results(lambda h: RMSNorm.apply(h, w, 1e-5, plus_one), h), results(lambda h: norm(h, w.double()), h.double(), seed=9), EPS[dtype])


def test_small_rows_need_epsilon():
    h, w = data(4, 8)*1e-4, torch.ones(8, dtype=torch.float64)
    near(results(lambda h: RMSNorm.apply(h, w, 1e-2, False), h), results(lambda h: formulas(eps=1e-2)[0](h, w), h), 1e-13)


@pytest.mark.parametrize("dtype", EPS)
def test_swiglu_is_its_formula(dtype):
    g, u = 4*data(2, 5, 64, dtype=dtype), data(2, 5, 64, seed=1, dtype=dtype)
    near(results(SwiGLU.apply, g, u), results(formulas()[1], g.double(), u.double()), EPS[dtype])


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("order", ["by tokens", "by heads"])
def test_rotary_is_its_formula_and_leaves_rows(rows, order, dtype):
    "Halves of cos and sin may differ. Whatever order q and its gradient come in, results lie by tokens, as linears write and read them."
    def made(heads, seed): return data(2, 5, heads, 8, seed=seed, dtype=dtype).transpose(1, 2) if order == "by tokens" else data(2, heads, 5, 8, seed=seed, dtype=dtype)
    q, k, c, s = made(4, 0), made(2, 1), data(rows, 5, 8, seed=2, dtype=dtype), data(rows, 5, 8, seed=3, dtype=dtype)
    ours = results(lambda q, k: Rotary.apply(q, k, c, s), q, k)
    assert all(x.transpose(1, 2).is_contiguous() for x in ours)
    near(ours, results(lambda q, k: formulas()[2](q, k, c.double(), s.double()), q.double(), k.double()), EPS[dtype])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_family_keeps_its_loss_and_gradients(family, recompute):
    """fp32: a few roundings of 6e-8 in each of some dozen operations, hence 1e-5 of a tensor's size."""
    model = model_of(family)
    if recompute: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    theirs, names = step(model), list(model.state_dict())
    home = sys.modules[type(model).__module__]
    function = vars(home).get("apply_rotary_pos_emb")
    draw = torch.get_rng_state()
    assert fast_pointwise(model) == FAMILIES[family][1] == fast_pointwise(model)
    assert torch.equal(torch.get_rng_state(), draw) and list(model.state_dict()) == names
    ours = step(model)
    same(ours, theirs)
    assert family == "gpt2" or not all(torch.equal(ours[1][n], g) for n, g in theirs[1].items())  # something else did compute them
    assert plain_pointwise(model) == FAMILIES[family][1] and plain_pointwise(model) == {}
    assert not any("forward" in vars(m) for m in model.modules()) and vars(home).get("apply_rotary_pos_emb") is function
    again = step(model)
    assert again[0] == theirs[0] and all(torch.equal(again[1][n], g) for n, g in theirs[1].items())


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_bf16_is_no_farther_from_fp64_than_the_library(family):
    """Both round to eight bits all the way; the kit keeps fp32 for longer. A fifth for luck."""
    flat = lambda model: torch.cat([g.flatten().double() for g in step(model)[1].values()])
    truth, model = flat(model_of(family, torch.float64)), model_of(family, torch.bfloat16)
    theirs = flat(model)
    fast_pointwise(model)
    assert (flat(model) - truth).norm() < 1.2*(theirs - truth).norm() < 0.3*truth.norm()


def test_recomputed_layers_give_the_same_bits():
    model = model_of("llama")
    fast_pointwise(model)
    kept = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    again = step(model)
    assert again[0] == kept[0] and all(torch.equal(again[1][n], g) for n, g in kept[1].items())


def test_without_gradients_it_is_the_same_function_and_nothing_is_held():
    model = model_of("llama")
    fast_pointwise(model)
    logits, held = model(IDS, MASK).logits, []
    model.model.norm.register_forward_hook(lambda m, args, y: held.append(hasattr(y, "recipe")))
    with torch.no_grad(): assert torch.equal(model(IDS, MASK).logits, logits)
    model(IDS, MASK)
    assert held == [False, True]


class Shifted(LlamaRMSNorm):
    def forward(self, h): return super().forward(h) + 1


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, h, gate): return super().forward(h*silu(gate))


class Layer2RMSNorm(LlamaRMSNorm):
    def forward(self, h): return self.weight*torch.nn.functional.layer_norm(h, h.shape[-1:])


class Biased(LlamaRMSNorm):
    def __init__(self, *args): super().__init__(*args); self.bias = nn.Parameter(torch.zeros(64))


class ScaledRMSNorm(Shifted):
    pass


@pytest.mark.parametrize("kind", [ScaledRMSNorm, GatedRMSNorm, Layer2RMSNorm, type("BiasedRMSNorm", (Biased,), {}), type("Norm", (LlamaRMSNorm,), {})])
def test_a_norm_of_another_kind_is_left_alone(kind):
    model = nn.Sequential(kind(64, 1e-5).requires_grad_(False))
    assert norm_settings(model[0]) is None and fast_pointwise(model) == {}


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, partial(nn.RMSNorm)])
def test_norms_of_any_width_are_found_with_their_settings(kind):
    for width in (1, 16, 4096):
        module = kind(width, eps=3e-4).requires_grad_(False)
        assert norm_settings(module) == (3e-4, kind is Gemma2RMSNorm)
    assert norm_settings(nn.RMSNorm(8).requires_grad_(False)) is None  # torch's: ε depends on the dtype


def test_a_norm_that_is_trained_runs_its_own_forward():
    model = model_of("llama")
    model.model.norm.weight.requires_grad_()
    assert fast_pointwise(model)["norm"] == 4 and "forward" not in vars(model.model.norm)
    frozen = model.model.layers[0].input_layernorm
    frozen.weight.requires_grad_()  # later
    assert step(model)[1].keys() >= {"model.norm.weight", "model.layers.0.input_layernorm.weight"}


def mlp(act=None, **settings):
    module = LlamaMLP(LlamaConfig(**SMALL | settings)).requires_grad_(False)
    if act is not None: del module.act_fn; module.act_fn = act
    return module


class Scaled(LlamaMLP):
    def forward(self, x): return 1.1*super().forward(x)


def test_mlps_of_another_kind_are_left_alone():
    assert is_swiglu(mlp()) and is_swiglu(mlp(nn.SiLU())) and is_swiglu(mlp(silu))
    assert not is_swiglu(mlp(hidden_act="gelu")) and not is_swiglu(mlp(nn.GELU("tanh"))) and not is_swiglu(Scaled(LlamaConfig(**SMALL)))
    dropping = mlp()
    dropping.dropout = nn.Dropout(0.1)
    assert not is_swiglu(dropping) and not is_swiglu(nn.Linear(3, 3)) and not is_swiglu(nn.Module())


def test_rotary_embeddings_of_another_kind_are_left_alone():
    assert is_rotary(modeling_llama.apply_rotary_pos_emb) and is_rotary(modeling_phi3.apply_rotary_pos_emb)
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved
    from transformers.models.gemma3n.modeling_gemma3n import apply_rotary_pos_emb as one_at_a_time
    assert not is_rotary(interleaved) and not is_rotary(one_at_a_time) and not is_rotary(lambda q, k, cos, sin: 1/0)


def test_part_of_a_head_is_turned_by_the_library():
    c, s, q, k = data(1, 5, 4), data(1, 5, 4, seed=1), data(2, 4, 5, 8), data(2, 2, 5, 8)
    plain = modeling_phi3.apply_rotary_pos_emb
    assert fast_pointwise(model_of("phi3"))["rotary"] == 1
    fast = modeling_phi3.apply_rotary_pos_emb
    assert fast is not plain and all(map(torch.equal, fast(q, k, c, s), plain(q, k, c, s)))
    c, s, q, k = data(1, 5, 8), data(1, 5, 8, seed=1), data(2, 5, 4, 8), data(2, 5, 2, 8)
    assert all(map(torch.equal, fast(q, k, c, s, unsqueeze_dim=2), plain(q, k, c, s, unsqueeze_dim=2)))


def test_models_of_a_family_share_their_rotary_embedding():
    plain, one, two = modeling_llama.apply_rotary_pos_emb, model_of("llama"), model_of("llama")
    assert fast_pointwise(one)["rotary"] == fast_pointwise(two)["rotary"] == 1
    fast = modeling_llama.apply_rotary_pos_emb
    assert fast.args == (plain,)
    plain_pointwise(two)
    assert modeling_llama.apply_rotary_pos_emb is plain and all("forward" in vars(m) for m in one.modules() if isinstance(m, LlamaRMSNorm))


@pytest.mark.parametrize("device", ["cpu"])
def test_under_autocast_the_library_runs(device):
    model = model_of("llama")
    with torch.autocast(device, torch.bfloat16): theirs = step(model)
    fast_pointwise(model)
    with torch.autocast(device, torch.bfloat16): ours = step(model)
    assert ours[0] == theirs[0] and all(torch.equal(ours[1][n], g) for n, g in theirs[1].items())


def test_a_forward_that_somebody_else_replaced_stays():
    model = model_of("llama")
    mine = model.model.norm.forward = lambda h: h
    assert fast_pointwise(model)["norm"] == 4 and model.model.norm.forward is mine
    plain_pointwise(model)
    assert model.model.norm.forward is mine


def test_copies_are_models_of_their_own():
    model = model_of("llama")
    fast_pointwise(model)
    expected, twin = step(model), copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters(): p.zero_()
    again = step(twin)
    assert again[0] == expected[0] and all(torch.equal(again[1][n], g) for n, g in expected[1].items())


@pytest.fixture(scope="module")
def tuned(tiny_llama):
    def make(dtype=torch.float32):
        model = add_lora(load_model(tiny_llama, dtype=dtype), r=4, alpha=8, dropout=0.0, seed=0).train()
        for i, p in enumerate(lora_parameters(model).values()): nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(i))
        return model
    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recipes_repeat_to_the_last_bit(tuned, dtype):
    model, inputs = tuned(dtype), []
    assert fast_pointwise(model) == dict(norm=5, mlp=2, rotary=1)
    for name, m in model.named_modules():
        if isinstance(m, LlamaRMSNorm): m.register_forward_hook(lambda m, args, y: inputs.append(y))
        if name.endswith("mlp.down_proj"): m.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    step(model)
    assert len(inputs) == 7
    for x in inputs:
        assert isinstance(x.recipe.inputs, tuple) and all(isinstance(t, torch.Tensor) and t.grad_fn is None and not t.requires_grad for t in x.recipe.inputs)
        assert torch.equal(x.recipe.function(*x.recipe.inputs), x) and x.recipe.function(*x.recipe.inputs).shape == x.shape


def kept_by(model):
    "Bytes that wait for the backward pass, beside the weights."
    known = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *model.buffers()]}
    kept = {}
    def keep(x): kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(); return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x): model.get_base_model().model(input_ids=IDS)
    return sum(n for p, n in kept.items() if p not in known)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_linear_that_remakes_its_input_has_the_same_gradients_and_keeps_less(tuned, recompute):
    """Norm results (two of 64 numbers a layer) and SwiGLU's (one of 128) need not be kept: 4 bytes each in fp32. The first norm's input is the
    embedding, which nobody else keeps."""
    model = tuned()
    if recompute: recompute_layers(model)
    fast_linears(model), fast_pointwise(model)
    expected, before = step(model), kept_by(model)
    for m in model.modules():
        if isinstance(m, Linear4bit): m.remake = True
    ours = step(model)
    assert ours[0] == expected[0] and all(torch.equal(ours[1][n], g) for n, g in expected[1].items())
    if not recompute: assert before - kept_by(model) == (2*(2*64 + 128) - 64)*4*IDS.numel()


def test_lora_on_the_linears_of_an_mlp(tuned):
    "Before and after the linears are made fast, in either order."
    model = tuned()
    theirs = step(model)
    fast_pointwise(model); same(step(model), theirs)
    fast_linears(model); same(step(model), theirs)
    plain_pointwise(model); same(step(model), theirs)


def test_kernels_are_made_for_widths_and_serve_any_rows(monkeypatch):
    "By dynamo with a backend that only counts; one row alone is a case of its own."
    made = []
    def count(graph, inputs): made.append(1); return graph.forward
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    monkeypatch.setattr(pointwise, "kernel", pointwise.kernel.__wrapped__)
    torch._dynamo.reset()
    body = pointwise.kernel(pointwise.rms_norm.__wrapped__)
    for width, rows, expected in [(64, (5, 9, 300, 2), 1), (16, (4, 7, 300), 2), (64, (11, 4), 2), (64, (1, 1), 3), (32, (8, 3), 4)]:
        for M in rows:
            h, w = data(M, width, dtype=torch.float32).requires_grad_(M % 2 == 0), nn.Parameter(torch.ones(width))
            with torch.no_grad(): body(*map(any_rows, (h, w, 1e-5, False)))
        assert len(made) == expected, (width, rows)
    body = pointwise.kernel(pointwise.rotate.__wrapped__)
    made.clear()
    for B, T in [(2, 5), (3, 5), (2, 9), (4, 4)]:
        q, c = data(B, T, 4, 8), data(1, T, 8)
        with torch.no_grad(): body(*map(any_rows, (q, q, c, c)))
    assert len(made) == 1
    torch._dynamo.reset()


class OnCard:
    "Looks like a tensor on a card."
    is_cuda, is_meta = True, False
    def __init__(self, dtype=torch.bfloat16, card=0): self.dtype, self.device = dtype, card
    def get_device(self): return self.device


@pytest.fixture
def card(monkeypatch):
    "A machine that seems to have Triton and two cards; yields the card that is current."
    current = [0]
    @contextmanager
    def device(n):
        before, current[0] = current[0], n
        yield
        current[0] = before
    class Triton:
        class TritonError(Exception): pass
    monkeypatch.setattr(pointwise, "triton", Triton)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    pointwise._say_slow.cache_clear()
    yield current
    pointwise._say_slow.cache_clear()


def by_compiler(monkeypatch, fails):
    def broken(body, **_): return lambda *args: fails(torch._dynamo.exc.TorchDynamoException)
    monkeypatch.setattr(torch, "compile", broken)
    return compiled(lambda x, n: n)


def by_hand(monkeypatch, fails, kind=RuntimeError):
    function = on_card(lambda x, n: n)
    function.launch = lambda x, n: fails(kind)
    return function


@pytest.mark.parametrize("made", [by_compiler, by_hand, partial(by_hand, kind=OSError), partial(by_hand, kind=partial(subprocess.CalledProcessError, 1))])
def test_without_a_compiler_plain_operations_run_and_it_is_said_once(monkeypatch, card, made):
    calls = []
    def fails(kind): calls.append(1); raise kind("no C compiler\nat all")
    function = made(monkeypatch, fails)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [function(OnCard(), n) for n in (3, 4)] == [3, 4] and len(calls) == 1
        assert by_hand(monkeypatch, fails)(OnCard(), 5) == 5
    assert len(said) == len(calls) == 1 and "no C compiler" in str(said[0].message) and "at all" not in str(said[0].message)


def test_a_kernel_that_triton_refuses_and_no_triton_at_all_are_said_too(monkeypatch, card):
    for triton, word in [(pointwise.triton, "too large"), (None, "Triton is not installed")]:
        monkeypatch.setattr(pointwise, "triton", triton)
        pointwise._say_slow.cache_clear()
        def fails(_): raise triton.TritonError("too large")
        with pytest.warns(UserWarning, match=word): assert by_hand(monkeypatch, fails)(OnCard(), 3) == 3


def test_a_card_that_fails_is_not_a_machine_without_a_compiler(monkeypatch, card):
    for error in (torch.OutOfMemoryError, torch.AcceleratorError):
        def fails(_): raise error("the card's own")
        with pytest.raises(error): by_hand(monkeypatch, fails)(OnCard(), 3)
    def wrong(_): raise TypeError("a mistake")
    with pytest.raises(TypeError): by_hand(monkeypatch, wrong)(OnCard(), 3)
    assert not pointwise._say_slow.cache_info().currsize


def test_a_kernel_runs_on_its_tensors_card_and_where_it_fits(card):
    function = on_card(lambda x, n: ("formula", n))
    function.launch = launch = lambda x, n: ("kernel", card[0], n) if n else None
    assert launch(OnCard(), 1) == ("kernel", 0, 1) and function.__wrapped__(None, 2) == ("formula", 2)
    assert [function(OnCard(dtype), 1) for dtype in pointwise.KINDS] == [("kernel", 0, 1)]*3
    assert function(OnCard(card=1), 1) == ("kernel", 1, 1) and card == [0]
    assert function(OnCard(), 0) == ("formula", 0) and function(OnCard(torch.float64), 1) == function(torch.ones(1), 1) == ("formula", 1)
    copied = on_card(lambda x: x + 1)
    assert copied(torch.ones(2, device="meta", dtype=torch.bfloat16)).shape == (2,) and copied(torch.ones(2, device="meta")).shape == (2,)


def test_kernels_decline_what_they_were_not_written_for():
    "Before they allocate or start anything, so this needs no card."
    norm, gradient, gate, back, rotary = (f.launch for f in (pointwise.rms_norm, pointwise.rms_norm_gradient, pointwise.swiglu, pointwise.swiglu_gradient, pointwise.rotate))
    x, w, r = (data(*shape, dtype=torch.float32) for shape in [(3, 8), (8,), (3, 1)])
    for h, weight in [(x, w.double()), (x, w.bfloat16()), (x, w[:0]), (data(1, 16385), data(16385)), (x[:, :0], w[:0])]:
        assert norm(h, weight, 1e-5, False) is None and gradient(h, h, weight, r, False) is None
    assert gradient(x[:2], x, w, r, False) is gradient(x, x, w, r.double(), False) is gradient(x, x.double(), w.double(), r, False) is None
    assert gate(x, x[0]) is gate(x, x.double()) is back(x, x[:1], x) is back(x[:1], x, x) is back(x, x, x.double()) is None
    q, c = data(2, 5, 4, 8, dtype=torch.float32), data(1, 5, 8, dtype=torch.float32)
    wrong = [(q, q[:1], c, c), (q, q[..., :4], c, c), (q, q[:, :4], c, c), (q, q, c[:, :4], c[:, :4]), (q, q, c, c[:, :1]), (q, q, c.expand(3, 5, 8), c.expand(3, 5, 8)),
             (q, q, c[..., :4], c[..., :4]), (q[..., :7], q[..., :7], c[..., :7], c[..., :7]), (q, q.double(), c, c), (q, q, c.double(), c), (q, q, c, c.double())]
    assert all(rotary(*args) is None for args in wrong)


class Made(TorchDispatchMode):
    "Results with a storage of their own."
    def __init__(self): super().__init__(); self.found = []
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and not op.is_view: self.found.append((tuple(x.shape), x.dtype))
        return out


def test_on_meta_only_results_are_allocated():
    "bf16, forward and backward: y and r, then one gradient; the gate's result, then two; q and k, and both again."
    bf16, empty = torch.bfloat16, partial(torch.empty, dtype=torch.bfloat16, device="meta")
    def made(f, *shapes):
        leaves = [empty(*s).requires_grad_() for s in shapes]
        with Made() as m:
            out = f(*leaves)
            out = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(out, leaves, [empty(*y.shape) for y in out])
        return m.found
    w, c = empty(64), empty(1, 5, 8)
    gradient = 1  # the mode also sees the gradients that the test makes
    norm = made(lambda h: RMSNorm.apply(h, w, 1e-5, False), (2, 5, 64))
    assert sorted(map(str, norm)) == sorted(map(str, [((10, 64), bf16), ((10, 1), torch.float32), ((10, 64), bf16)] + gradient*[((2, 5, 64), bf16)]))
    assert made(SwiGLU.apply, (2, 5, 64), (2, 5, 64)) == [((2, 5, 64), bf16)]*(3 + gradient)
    rotary = made(lambda q, k: Rotary.apply(q, k, c, c), (2, 4, 5, 8), (2, 2, 5, 8))
    assert len(rotary) == 4 + 2*gradient and all(dtype == bf16 for _, dtype in rotary)


def test_a_sharded_norm_is_tried_with_other_weights():
    "As DeepSpeed leaves them: empty, the whole shape noted beside."
    model = model_of("llama")
    for m in model.modules():
        if isinstance(m, LlamaRMSNorm): m.weight.ds_shape, m.weight.data = m.weight.shape, torch.empty(0)
    assert fast_pointwise(model)["norm"] == 5 and all(m.weight.numel() == 0 for m in model.modules() if isinstance(m, LlamaRMSNorm))


RANKS = """
import deepspeed, torch, torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from qlora_kit.training.loss import LossModel
from qlora_kit.model.kernels import fast_pointwise
torch.set_num_threads(1)
deepspeed.init_distributed("gloo")
def build():
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2))
    for name, p in llama.named_parameters():
        if "norm" in name: torch.nn.init.normal_(p, 0.5, 0.3)
    return LossModel(get_peft_model(llama, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)), chunk=8)
alone, model = build(), build()
weights = lambda m: [p for p in m.parameters() if p.requires_grad]
config = dict(train_micro_batch_size_per_gpu=1, zero_optimization=dict(stage=3, stage3_param_persistence_threshold=0), zero_allow_untested_optimizer=True, gradient_clipping=0.0)
engine, *_ = deepspeed.initialize(model=model, model_parameters=weights(model), optimizer=torch.optim.SGD(weights(model), lr=0.5), config=config)
norm = model.model.get_base_model().model.norm
assert norm.weight.numel() == 0
optimizer = torch.optim.SGD(weights(alone), lr=0.5)
for step in range(4):
    if step == 1: assert fast_pointwise(model) == dict(norm=5, mlp=2, rotary=1) # sharded already; alone shares the rotary embedding
    if step == 3: model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    rows = [torch.randint(128, (1, 24), generator=torch.Generator().manual_seed(2*step + r)) for r in (0, 1)]
    loss = engine(input_ids=rows[dist.get_rank()], labels=rows[dist.get_rank()])
    engine.backward(loss * 2 / 46); engine.step()
    total = loss.detach().clone(); dist.all_reduce(total)
    reference = sum(alone(input_ids=r, labels=r) for r in rows)
    (reference / 46).backward(); optimizer.step(); optimizer.zero_grad()
    assert abs(total - reference) <= 1e-5 * reference, (step, total, reference)
    assert norm.weight.numel() == 0
print("ranks agree")
"""


@pytest.mark.ranks
def test_two_zero3_ranks_with_weights_that_come_and_go(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "ranks.py"]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | dict(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
                         capture_output=True, text=True, timeout=300)
    assert run.stdout.count("ranks agree") == 2, run.stderr[-3000:]


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def kernels():
    "How many kernels are there? And in the end: none was missed, none compiled by dynamo."
    jits = [pointwise._norm, pointwise._norm_gradient, pointwise._swiglu, pointwise._swiglu_gradient, pointwise._rotate]
    graphs = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    before = graphs()
    yield lambda: [len(jit.device_caches[torch.cuda.current_device()][0]) for jit in jits]
    assert graphs() == before and not pointwise._say_slow.cache_info().currsize


KINDS = [torch.float32, torch.float16, torch.bfloat16]


def as_formula(function, *args, rtol):
    "The kernel itself, so that it cannot have declined, and the plain operations; the kernel twice, to the same bits."
    ours, again, plain = (x if isinstance(x, tuple) else (x,) for x in (function.launch(*args), function.launch(*args), function.__wrapped__(*args)))
    assert all(a.dtype == b.dtype for a, b in zip(ours, plain, strict=True)) and all(map(torch.equal, ours, again))
    near(ours, [x.double() for x in plain], rtol)


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (300, 1), (5, 77), (77, 16), (1000, 128), (9, 2048), (33, 4096), (3, 5000), (2, 4097), (2, 16384)])
@pytest.mark.parametrize("plus_one", [False, True])
def test_the_norm_kernels_are_their_formulas(shape, plus_one, dtype, kernels):
    h, w, G = (data(*s, dtype=dtype, seed=i, device="cuda") for i, s in enumerate([shape, shape[-1:], shape]))
    eps = 1.0 if shape[-1] == 1 else 1e-5  # of a single number a norm leaves the sign, and of its gradient what epsilon leaves
    norm = formulas(plus_one, eps)[0]
    near(results(lambda h: RMSNorm.apply(h, w, eps, plus_one), h), results(lambda h: norm(h, w.double()), h.double()), EPS[dtype])
    r = pointwise.rms_norm.__wrapped__(h, w, eps, plus_one)[1]
    near([pointwise.rms_norm.launch(h, w, eps, plus_one)[1]], [r.double()], EPS[torch.float32])
    as_formula(pointwise.rms_norm, h, w, eps, plus_one, rtol=EPS[dtype])
    as_formula(pointwise.rms_norm_gradient, G, h, w, r, plus_one, rtol=EPS[dtype])


@pytest.mark.cuda
@cuda
def test_kernels_take_strides_and_memory_that_starts_anywhere(kernels):
    f32 = partial(data, dtype=torch.float32, device="cuda")
    h, w, G, r = f32(6, 200)[:, 51:101], f32(100)[::2], f32(1, 1).expand(6, 50), f32(6, 1).abs()
    as_formula(pointwise.rms_norm, h, w, 1e-5, False, rtol=EPS[torch.float32])
    as_formula(pointwise.rms_norm_gradient, G, h, w, r, False, rtol=EPS[torch.float32])
    g, u, G = f32(5, 7).T, f32(37)[2:].view(7, 5), f32(7, 10)[:, ::2]
    as_formula(pointwise.swiglu, g, u, rtol=EPS[torch.float32])
    as_formula(pointwise.swiglu_gradient, G, g, u, rtol=EPS[torch.float32])
    for empty in (f32(0, 64), f32(0, 1)): assert pointwise.rms_norm(empty, f32(empty.shape[1]), 1e-5, False)[0].shape == empty.shape
    assert pointwise.swiglu(f32(0, 8), f32(0, 8)).shape == (0, 8) and pointwise.rotate(*[f32(2, 0, 3, 8)]*2, *[f32(1, 0, 8)]*2)[0].shape == (2, 0, 3, 8)


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(1,), (1024,), (1025,), (2, 3, 333), (2, 5, 1024), (3, 14336)])
def test_the_swiglu_kernels_are_their_formulas(shape, dtype, kernels):
    g, u, G = 4*data(*shape, dtype=dtype, device="cuda"), data(*shape, dtype=dtype, seed=1, device="cuda"), data(*shape, dtype=dtype, seed=2, device="cuda")
    near(results(SwiGLU.apply, g, u), results(formulas()[1], g.double(), u.double()), EPS[dtype])
    as_formula(pointwise.swiglu, g, u, rtol=EPS[dtype])
    as_formula(pointwise.swiglu_gradient, G, g, u, rtol=EPS[dtype])


@pytest.mark.cuda
@cuda
def test_gates_far_out_stay_finite(kernels):
    "exp overflows below -88; the gate is closed there."
    g = torch.tensor([-3e38, -1e4, -200, -90, -88, -20, 0, 20, 90, 1e4], device="cuda")
    u = torch.ones_like(g)
    as_formula(pointwise.swiglu, g, u, rtol=EPS[torch.float32])
    as_formula(pointwise.swiglu_gradient, u, g, u, rtol=EPS[torch.float32])
    assert all(x.isfinite().all() for x in (pointwise.swiglu(g, u), *pointwise.swiglu_gradient(u, g, u)))


@pytest.mark.cuda
@cuda
def test_more_numbers_than_32_bits_count(kernels):
    "Only the last are looked at; the rest are zeros."
    if torch.cuda.mem_get_info()[0] < 16 << 30: pytest.skip("needs 16 GiB")
    n = 2**31 + 4096
    g, end = torch.zeros(n, dtype=torch.bfloat16, device="cuda"), data(1024, dtype=torch.bfloat16, device="cuda")
    g[-1024:] = end
    assert torch.equal(pointwise.swiglu(g, g)[-1024:], pointwise.swiglu(end, end))
    h, w = g.view(-1, 1024), torch.ones(1024, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(pointwise.rms_norm(h, w, 1e-5, False)[0][-1], pointwise.rms_norm(end[None], w, 1e-5, False)[0][0])


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("B, T, Hq, Hk, d", [(1, 1, 1, 1, 2), (2, 5, 4, 2, 8), (3, 7, 3, 1, 80), (1, 4, 32, 8, 128), (2, 3, 64, 8, 128), (2, 3, 40, 40, 96), (2, 1, 5, 6, 12), (1, 2, 2, 70, 256)])
@pytest.mark.parametrize("order", ["by tokens", "by heads", "packed", "by numbers"])
def test_the_rotary_kernel_has_the_bits_of_its_formula(B, T, Hq, Hk, d, order, dtype, kernels):
    "Products and sums in fp32, each rounded, then one rounding: the same on both sides. cos and sin in the model's dtype or in fp32, halves differ."
    made = partial(data, dtype=dtype, device="cuda")
    q, k = {"by tokens": lambda: (made(B, T, Hq, d), made(B, T, Hk, d, seed=1)),
            "by heads": lambda: (made(B, Hq, T, d).transpose(1, 2), made(B, Hk, T, d, seed=1).transpose(1, 2)),
            "packed": lambda: made(B, T, Hq + Hk, d).split((Hq, Hk), 2),
            "by numbers": lambda: (made(B, T, d, Hq).transpose(2, 3), made(B, T, Hk, 2*d)[..., ::2])}[order]()
    for rows in {1, B}:
        for c, s in [(made(rows, T, d, seed=2), made(rows, T, d, seed=3)), (data(rows, T, d, dtype=torch.float32, seed=2, device="cuda"), made(rows, T, 2*d, seed=3)[..., ::2])]:
            for function in (pointwise.rotate, pointwise.rotate_back):
                ours = function.launch(q, k, c, s)
                assert all(map(torch.equal, ours, function.__wrapped__(q, k, c, s))) and all(x.is_contiguous() for x in ours)


@pytest.mark.cuda
@cuda
def test_kernels_serve_any_rows_and_recipes_give_the_same_bits(kernels):
    """bf16 on the card against fp64, row counts changing, widths of a model and of a head: a kernel for each width and no more; a recipe gives the
    same bits whatever ran in between."""
    norm, gate, rotary = formulas()
    bf16, rtol, kept, counts = partial(data, dtype=torch.bfloat16, device="cuda"), EPS[torch.bfloat16], [], []
    for B, T in [(4, 128), (1, 77), (3, 200), (2, 9), (1, 1), (4, 128)]:
        for D in (512, 128):
            h, w = bf16(B, T, D), bf16(D, seed=1)
            y = results(lambda h: RMSNorm.apply(h, w, 1e-5, False), h)
            near(y, results(lambda h: norm(h, w.double()), h.double()), rtol)
            kept.append((partial(pointwise.normed, h, w, 1e-5, False), y[0]))
        g, u = bf16(B, T, 1024), bf16(B, T, 1024, seed=1)
        y = results(SwiGLU.apply, g, u)
        near(y, results(gate, g.double(), u.double()), rtol)
        kept.append((partial(pointwise.swiglu, g, u), y[0]))
        for rows in {1, B}:
            q, k, c, s = bf16(B, T, 8, 64).transpose(1, 2), bf16(B, T, 2, 64).transpose(1, 2), bf16(rows, T, 64, seed=2), bf16(rows, T, 64, seed=3)
            turned = results(lambda q, k: Rotary.apply(q, k, c, s), q, k)
            assert all(x.transpose(1, 2).is_contiguous() for x in turned)
            near(turned, results(lambda q, k: rotary(q, k, c.double(), s.double()), q.double(), k.double()), rtol)
        counts.append(kernels())
    assert all(torch.equal(make(), y) for make, y in kept)
    assert counts[0] == counts[-1] == kernels(), counts


@pytest.mark.cuda
@cuda
def test_fp64_on_the_card_runs_the_formulas(kernels):
    before, f64 = kernels(), partial(data, device="cuda")
    norm, gate, rotary = formulas()
    h, w, q, c = f64(3, 64), f64(64, seed=1), f64(2, 4, 5, 8), f64(1, 5, 8)
    near(results(lambda h: RMSNorm.apply(h, w, 1e-5, False), h), results(lambda h: norm(h, w), h), 1e-13)
    near(results(SwiGLU.apply, h, h), results(gate, h, h), 1e-13)
    near(results(lambda q, k: Rotary.apply(q, k, c, c), q, q), results(lambda q, k: rotary(q, k, c, c), q, q), 1e-13)
    assert kernels() == before


@pytest.mark.cuda
@cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one card")
def test_kernels_on_a_card_that_is_not_the_current_one(kernels):
    h, w = data(5, 128, dtype=torch.bfloat16, device="cuda:1"), data(128, dtype=torch.bfloat16, device="cuda:1")
    near(pointwise.rms_norm(h, w, 1e-5, False), [x.double() for x in pointwise.rms_norm.__wrapped__(h, w, 1e-5, False)], EPS[torch.bfloat16])
    assert torch.cuda.current_device() == 0


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_model_on_the_card(family):
    """fp32, TF32 off: another order of sums, hence 1e-4; then bf16, no farther from fp32 than the library."""
    flat = lambda r: torch.cat([g.flatten() for g in r[1].values()]).double()
    cards = (IDS.cuda(), MASK.cuda())
    model = model_of(family).cuda()
    theirs = step(model, *cards)
    fast_pointwise(model)
    same(step(model, *cards), theirs, 1e-4)
    plain_pointwise(model)
    half = model_of(family, torch.bfloat16).cuda()
    library = flat(step(half, *cards))
    fast_pointwise(half)
    assert (flat(step(half, *cards)) - flat(theirs)).norm() < 1.2*(library - flat(theirs)).norm()
    assert math.isfinite(step(half, IDS[:1, :7].cuda(), MASK[:1, :7].cuda())[0])
