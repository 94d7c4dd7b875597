"""The NF4 + LoRA linear: PEFT's values and gradients for four families, and what falls back."""
import warnings

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import (AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, Phi3Config, Qwen2Config)

from qlora_kit.model import linear
from qlora_kit.model import nf4
from qlora_kit.use.generate import dequantized
from qlora_kit.model.linear import (
    bench_linears, decoded, fast_linears, four_bit_linears, FourBitLinears, LoraLinear, plain_linears,
    shared_inputs)
from qlora_kit.model.loader import load_model, packed_hash
from qlora_kit.model.lora import add_lora, lora_parameters, recompute_layers

IDS = torch.arange(48).reshape(3, 16) % 60
SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64, pad_token_id=0)
CONFIGS = {"llama": LlamaConfig(**SHAPE), "qwen2": Qwen2Config(**SHAPE), "phi3": Phi3Config(**SHAPE), "gemma": GemmaConfig(**SHAPE, head_dim=16),
           "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)}
GROUPS = {"llama": 4, "qwen2": 4, "phi3": 0, "gemma": 4, "gpt2": 0} # Phi-3 and GPT-2 compute q, k, v as one
LINEARS = {"llama": 14, "qwen2": 14, "phi3": 8, "gemma": 14, "gpt2": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for key, p in model.named_parameters():
            if key.endswith("bias"): nn.init.normal_(p, std=0.1) # a bias of zero would hide a lost bias
        made[name] = tmp_path_factory.mktemp(name)
        config.save_pretrained(made[name])
        head = "lm_head.weight" if config.tie_word_embeddings else None
        save_file({k: v for k, v in model.state_dict().items() if k != head}, made[name]/"model.safetensors", {"format": "pt"})
    return made


def tuned(folder, dropout=0.0, dtype=torch.float32, **lora):
    model = add_lora(load_model(folder, dtype=dtype), r=4, alpha=12, dropout=dropout, seed=0, **lora).train()
    for i, (name, p) in enumerate(lora_parameters(model).items()):
        if ".lora_B." in name: nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(i))
    return model


def step(model, ids=IDS):
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def same(ours, theirs, rtol):
    assert ours[0] == pytest.approx(theirs[0], rel=rtol) and ours[1].keys() == theirs[1].keys()
    for name, g in theirs[1].items(): assert (ours[1][name] - g).abs().max() <= rtol*g.abs().max(), name


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dropout, recompute", [(0.0, False), (0.1, True)])
def test_a_family_keeps_its_loss_and_gradients(folders, family, dropout, recompute):
    """fp32: some twenty products on a path, each off by a few roundings of 6e-8, hence 1e-5 of a tensor's size."""
    model = tuned(folders[family], dropout)
    if recompute: recompute_layers(model)
    before = packed_hash(model)
    theirs = step(model)
    assert len(shared_inputs(model)) == GROUPS[family] and fast_linears(model) == LINEARS[family]
    assert type(calls(model)).__name__ == "list"
    same(step(model), theirs, 1e-5)
    assert plain_linears(model) == LINEARS[family] and not any("forward" in m.__dict__ for m in model.modules())
    again = step(model)
    assert again[0] == theirs[0] and all(torch.equal(again[1][n], g) for n, g in theirs[1].items()) and packed_hash(model) == before


def calls(model):
    """Sizes of the groups that a step computes in one call each."""
    sizes, apply = [], FourBitLinears.apply
    with pytest.MonkeyPatch.context() as m:
        m.setattr(FourBitLinears, "apply", lambda x, note, parts, *rest: sizes.append(len(parts)) or apply(x, note, parts, *rest))
        step(model)
    return sizes


def test_siblings_are_computed_together_and_each_once(folders):
    model = tuned(folders["llama"])
    fast_linears(model)
    assert calls(model) == [3, 1, 2, 1]*2
    recompute_layers(model)
    assert calls(model) == [3, 1, 2, 1]*2 + [3, 1, 2]*2 # recomputing ends where nothing is kept any more


def test_an_unexpected_input_is_computed_alone(folders):
    """A group that is called with unequal tensors, out of order, or with a tensor that was changed in between."""
    model = tuned(folders["llama"])
    mlp = model.base_model.model.model.layers[0].mlp
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    plain = {name: getattr(mlp, name)(x) for name in ("gate_proj", "up_proj")} | {"changed": mlp.up_proj(x + 1)}
    fast_linears(model)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5) # sums of 64 terms of size 1
    close(mlp.up_proj(x), plain["up_proj"])
    close(mlp.gate_proj(x.clone()), plain["gate_proj"]); close(mlp.up_proj(x), plain["up_proj"])
    y = x.clone()
    close(mlp.gate_proj(y), plain["gate_proj"]); y.add_(1); close(mlp.up_proj(y), plain["changed"])


def test_partly_adapted_and_unadapted_models(folders):
    """q and v with LoRA, the rest frozen 4-bit layers; then no LoRA at all, with the gradient of the input."""
    model = tuned(folders["qwen2"], target_modules=["q_proj", "v_proj"])
    theirs = step(model)
    fast_linears(model)
    same(step(model), theirs, 1e-5)
    assert calls(model) == [3, 1, 2, 1, 3, 1, 2, 1][:8]
    bare = load_model(folders["qwen2"]).train()
    x = torch.randn(1, 4, 64, requires_grad=True)
    def gradient():
        x.grad = None
        bare(inputs_embeds=x).logits.square().sum().backward()
        return x.grad.clone()
    theirs = gradient()
    assert fast_linears(bare) == 14
    torch.testing.assert_close(gradient(), theirs, rtol=1e-4, atol=1e-4*theirs.abs().max().item())


def test_fp32_masters_in_a_bf16_model(folders):
    """bf16 keeps eight significant bits. Both paths round everywhere; ours must not end farther from fp32 than PEFT's, within a fifth."""
    flat = lambda model: torch.cat([g.flatten() for g in step(model)[1].values()])
    truth, model = flat(tuned(folders["llama"])), tuned(folders["llama"], dtype=torch.bfloat16)
    theirs = flat(model)
    fast_linears(model)
    ours = flat(model)
    assert ours.dtype == torch.float32 and (ours - truth).norm() < 1.2*(theirs - truth).norm() < 0.2*truth.norm()


@pytest.mark.parametrize("width", (32, 64, 96, 102))
def test_rows_of_any_width_decode_with_their_own_scales(width):
    """The packed bytes are one run of blocks of 64; a row may end inside of one."""
    layer = Linear4bit(width, 48)
    W = torch.randn(48, width, generator=torch.manual_seed(0))
    layer.weight = Params4bit(W, requires_grad=False, quant_type="nf4", compress_statistics=False).to("cpu")
    assert torch.equal(decoded(layer, torch.float32), nf4.dequantize(nf4.quantize(W)))


class CountedLinear(Linear4bit):
    "Counts how often its weight is read."
    reads = 0
    @property
    def weight(self):
        self.reads += 1
        return self._parameters["weight"]


def test_to_decode_reads_the_weight_once():
    "A weight may be a property that costs time; once beside what bitsandbytes' own check reads."
    layer = Linear4bit(64, 4, bias=False).to("cpu")
    layer.__class__ = CountedLinear
    def reads(run):
        layer.reads = 0
        run(layer)
        return layer.reads
    assert reads(lambda m: decoded(m, torch.float32)) == reads(linear.fix_4bit_weight_quant_state_from_module) + 1


def test_no_copy_of_an_input_is_kept(folders):
    """What autograd saves for one MLP: x once for gate and up, the input of down, A, B and thin P."""
    model = tuned(folders["llama"], dtype=torch.bfloat16)
    fast_linears(model)
    mlp, x, saved = model.base_model.model.model.layers[0].mlp, torch.randn(256, 64, dtype=torch.bfloat16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = four_bit_linears(x, None, *_group(mlp.gate_proj, mlp.up_proj))
    assert {t.untyped_storage().data_ptr() for t in saved if t.shape[0] == 256} == {x.untyped_storage().data_ptr()}
    assert all(t.dtype != torch.uint8 and t.numel() < 4096 for t in saved if t is not x and t.shape[0] != 256) and len(y) == 2


def _group(*modules):
    parts, A, B = zip(*map(linear.update_of, modules))
    return parts, A, B


def test_generation_evaluation_and_switched_off_adapters(folders):
    model = tuned(folders["llama"], dropout=0.1)
    token = IDS[:1, :1]
    with torch.no_grad(): plain = [model.eval()(t).logits for t in (IDS, token)]
    fast_linears(model)
    with torch.no_grad():
        assert all(torch.equal(model(t).logits, p) for t, p in zip((IDS, token), plain))
        with dequantized(model): torch.testing.assert_close(model(IDS).logits, plain[0])
    torch.testing.assert_close(model(token).logits, plain[1]) # with gradients, in eval mode
    base = load_model(folders["llama"])(IDS).logits
    with model.disable_adapter(): torch.testing.assert_close(model.train()(IDS).logits, base)
    with model.disable_adapter(), torch.no_grad(): torch.testing.assert_close(model(IDS).logits, base)
    with warnings.catch_warnings(action="ignore"): model.eval().merge_adapter()
    merged = model(IDS).logits # PEFT quantizes the sum again: W alone has to be used now
    plain_linears(model)
    torch.testing.assert_close(merged, model(IDS).logits)


@pytest.mark.parametrize("case", ["dora", "two adapters", "rslora and two ranks"])
def test_what_is_not_plain_lora_is_peft_s_and_said_once(folders, case):
    linear._say_plain.cache_clear()
    settings = dict(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj", "down_proj"], init_lora_weights=False)
    if case == "dora": settings["use_dora"] = True
    if case == "rslora and two ranks": settings |= dict(use_rslora=True, rank_pattern={"q_proj": 8}, alpha_pattern={"up_proj": 3})
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        model = get_peft_model(load_model(folders["llama"]), LoraConfig(**settings)).train()
        if case == "two adapters":
            model.add_adapter("other", LoraConfig(**settings))
            model.base_model.set_adapter(["default", "other"])
        theirs = step(model)
    fast_linears(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        same(step(model), theirs, 1e-5)
        step(model)
    said = [str(w.message) for w in said if "linear:" in str(w.message)]
    assert len(said) == (0 if "rslora" in case else 1) and all("own forward" in s for s in said)


def test_a_foreign_module_is_left_alone():
    assert fast_linears(nn.Sequential(nn.Linear(3, 3))) == 0
    assert shared_inputs(nn.Sequential(nn.Linear(3, 3))) == []


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layers_of_a_group_against_fp64(folders, dropout):
    """Two linears of other widths on one input. n terms in fp32 are off by at most n·2⁻²⁴ of the sum of their magnitudes (Higham, section 3.1)."""
    mlp = tuned(folders["llama"]).base_model.model.model.layers[0].mlp
    layers = [mlp.gate_proj.base_layer, mlp.up_proj.base_layer]
    g = torch.Generator().manual_seed(0)
    X, G = torch.randn(32, 64, generator=g), [torch.randn(32, 128, generator=g) for _ in layers]
    A, B, s = [torch.randn(r, 64, generator=g) for r in (4, 6)], [torch.randn(128, r, generator=g) for r in (4, 6)], (0.5, 3.0)
    leaves = [t.clone().requires_grad_() for t in (X, *A, *B)]
    torch.manual_seed(0)
    parts = [LoraLinear(layer, r, scale, dropout) for layer, r, scale in zip(layers, (4, 6), s)]
    Y = four_bit_linears(leaves[0], None, parts, leaves[1:3], leaves[3:])
    torch.autograd.backward(Y, G)
    torch.manual_seed(0)
    masks = [torch.nn.functional.dropout(torch.ones_like(X), dropout) for _ in layers]

    def formulas(f):
        Ws = [f(decoded(layer, torch.float32).double()) for layer in layers]
        x, gs, a, b = f(X.double()), *([f(t.double()) for t in ts] for ts in (G, A, B))
        d = [x*m.double() for m in masks]
        Y = [x @ W.T + k*(di @ ai.T @ bi.T) for W, k, di, ai, bi in zip(Ws, s, d, a, b)]
        dX = sum(gi @ W + k*m.double()*(gi @ bi @ ai) for W, gi, k, m, ai, bi in zip(Ws, gs, s, masks, a, b))
        return [*Y, dX, *(k*(gi @ bi).T @ di for k, gi, bi, di in zip(s, gs, b, d)), *(k*gi.T @ (di @ ai.T) for k, gi, di, ai in zip(s, gs, d, a))]

    for ours, exact, size in zip([*Y, *(t.grad for t in leaves)], formulas(lambda t: t), formulas(torch.abs)):
        assert ((ours - exact).abs() <= 2**-24*(2*128 + 10 + 6)*size).all()


def test_the_benchmark_runs_on_a_cpu():
    row = bench_linears(D=64, D_kv=32, D_mlp=128, tokens=16, r=4, dropout=0.1, device="cpu", rounds=1)
    assert row["ours_ms"] > 0 and row["ratio"] == pytest.approx(row["peft_ms"]/row["ours_ms"]) and row["ours_gb"] == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_card_it_is_peft_s_result_and_faster(folders):
    """fp32 on the card, TF32 off: the order of sums differs, hence 1e-4; then the speed of a layer of 8B shape."""
    model = add_lora(load_model(folders["llama"], device="cuda"), r=4, alpha=8, seed=0).train()
    for p in lora_parameters(model).values(): nn.init.normal_(p, std=0.05)
    theirs = step(model, IDS.cuda())
    fast_linears(model)
    same(step(model, IDS.cuda()), theirs, 1e-4)
    row = bench_linears(rounds=5)
    assert row["ratio"] > 1.1 and row["ours_gb"] <= row["peft_gb"], row


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(100, 192), (33, 64), (1024, 4096)])
def test_the_kernel_decodes_as_bitsandbytes_and_adds_the_update(shape, quant_type, double):
    """Without an update bit for bit; with one against fp64, within the rounding of the result and, in 16 bits, of A and B."""
    torch.manual_seed(0)
    packed, state = quantize_4bit(torch.randn(shape, device="cuda"), quant_type=quant_type, compress_statistics=double)
    state.dtype = torch.float32
    W = dequantize_4bit(packed, state).double()
    for dtype, most in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-22)):
        state.dtype = dtype
        assert torch.equal(linear.decode(packed, state, state.dtype), dequantize_4bit(packed, state))
        for r in (1, 16, 40):
            A, B = torch.randn(r, shape[1], device="cuda"), torch.randn(shape[0], r, device="cuda")*0.05
            expected = W + 2*B.double() @ A.double()
            assert (linear.decode(packed, state, state.dtype, A=A, B=B, s=2.0).double() - expected).norm() <= most*expected.norm()
