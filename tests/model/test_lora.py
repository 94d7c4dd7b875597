import json
import warnings

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig,
                          LlamaForCausalLM, PreTrainedTokenizerFast)

from qlora_kit.data.files import UserError
from qlora_kit.model.loader import load_model, packed_hash
from qlora_kit.model.lora import (
    add_lora, combine_adapters, load_adapter, lora_parameters, principal, residual_base,
    save_adapter, trainable_table)

IDS = torch.arange(20).reshape(2, 10)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                              num_key_value_heads=2, vocab_size=64)),
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=0))}
    made = {}
    for name, model in models.items():
        made[name] = tmp_path_factory.mktemp(name)
        model.config.save_pretrained(made[name])
        tensors = {k: v for k, v in model.state_dict().items() if name == "llama" or k != "lm_head.weight"}
        save_file(tensors, made[name]/"model.safetensors", {"format": "pt"})
    return made


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models
    inner = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", chat_template="{{ messages[0]['content'] }}")


def shake(model):
    "Move every adapter tensor off its start."
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in lora_parameters(model).values(): p.add_(torch.randn(p.shape, generator=generator)*0.05)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quant_type", ["nf4", "none"])
def test_injection_changes_nothing_and_warns_of_nothing(folders, family, quant_type):
    model = load_model(folders[family], quant_type)
    before, packed = model(IDS).logits, packed_hash(model)
    with warnings.catch_warnings(action="error"): tuned = add_lora(model, r=4, seed=0)
    assert torch.equal(tuned.eval()(IDS).logits, before) and packed_hash(tuned) == packed
    assert len(lora_parameters(tuned)) == 2*(14 if family == "llama" else 8)
    assert not any("lm_head" in name for name in lora_parameters(tuned))
    shake(tuned)
    assert not torch.equal(tuned(IDS).logits, before)


def test_the_start_depends_on_the_seed_alone(folders):
    starts = []
    for noise, seed, storage in ((0, 1, "uint8"), (99, 1, "bfloat16"), (0, 2, "uint8")):
        model = load_model(folders["llama"], quant_storage=storage, dtype=torch.bfloat16)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        model = add_lora(model, r=4, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        starts.append(torch.cat([p.detach().flatten() for p in lora_parameters(model).values()]))
    assert starts[0].dtype == torch.float32
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("change, words", [
    (dict(target_modules=["q_proj", "v_porj"]), "did you mean 'v_proj'"), (dict(target_modules=["lm_head"]), "no linear layer"),
    (dict(target_modules=[]), "empty list"), (dict(r=0), "lora_r"), (dict(alpha=0), "lora_alpha"), (dict(dropout=1.0), "lora_dropout")])
def test_wrong_settings_are_refused_before_the_model_is_touched(folders, change, words):
    model = load_model(folders["llama"])
    with pytest.raises(UserError, match=words): add_lora(model, **change)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_only_named_layers(folders):
    model = add_lora(load_model(folders["gpt2"], "none"), target_modules=["c_attn"])
    assert {name.split(".")[-4] for name in lora_parameters(model)} == {"c_attn"}
    table = trainable_table(model)
    assert table.loc["c_attn", "trained"] == 2*16*(64 + 192) and table.loc["total", "frozen"] == 64*64 + 1024*64 + 2*49984 + 2*64
    with pytest.raises(UserError, match="already"): add_lora(model)


def test_adapter_folder_works_with_plain_peft(folders, tokenizer, tmp_path, same_arithmetic):
    tuned = shake(add_lora(load_model(folders["llama"]), r=4, seed=0))
    doubled = {name: 2*p.detach() for name, p in lora_parameters(tuned).items()}
    save_adapter(tuned, tokenizer, tmp_path/"adapter", base_model="acme/base", revision="abc", state=doubled)
    save_adapter(tuned, tokenizer, tmp_path/"adapter", base_model="acme/base", revision="abc")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    config = json.loads((tmp_path/"adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"], config["target_modules"]) == ("acme/base", "abc", sorted(config["target_modules"]))
    base = AutoModelForCausalLM.from_pretrained(folders["llama"], quantization_config=load_model(folders["llama"]).config.quantization_config)
    with warnings.catch_warnings(action="error"):
        warnings.filterwarnings("ignore", category=FutureWarning)
        plain = PeftModel.from_pretrained(base, tmp_path/"adapter")
    assert torch.equal(plain.eval()(IDS).logits, tuned(IDS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path/"adapter").chat_template == tokenizer.chat_template


def test_state_is_what_is_written(folders, tokenizer, tmp_path):
    tuned = shake(add_lora(load_model(folders["llama"]), r=4, seed=0))
    state = {name: torch.full_like(p, 3.0) for name, p in lora_parameters(tuned).items()}
    save_adapter(tuned, tokenizer, tmp_path/"a", base_model="base", state=state)
    assert all((t == 3).all() for t in load_file(tmp_path/"a/adapter_model.safetensors").values())
    state.popitem()
    with pytest.raises(ValueError, match="lacks 1"): save_adapter(tuned, tokenizer, tmp_path/"a", base_model="base", state=state)
    assert load_file(tmp_path/"a/adapter_model.safetensors")


def test_a_failed_save_leaves_the_earlier_adapter(folders, tmp_path, tokenizer):
    class Full:
        def save_pretrained(self, folder): raise OSError(28, "No space left on device")
    tuned = shake(add_lora(load_model(folders["llama"]), r=4, seed=0))
    save_adapter(tuned, tokenizer, tmp_path/"a", base_model="base")
    before = (tmp_path/"a/adapter_model.safetensors").read_bytes()
    shake(tuned)
    with pytest.raises(OSError): save_adapter(tuned, Full(), tmp_path/"a", base_model="base")
    assert (tmp_path/"a/adapter_model.safetensors").read_bytes() == before and (tmp_path/"a/tokenizer.json").exists()


def test_adapter_of_another_base_is_refused(folders, tokenizer, tmp_path):
    save_adapter(add_lora(load_model(folders["llama"]), r=4), tokenizer, tmp_path/"a", base_model="acme/llama")
    with pytest.raises(UserError, match="acme/llama"): load_adapter(load_model(folders["gpt2"]), tmp_path/"a")
    with pytest.raises(UserError, match="adapter_config.json"): load_adapter(load_model(folders["gpt2"]), tmp_path)


# ---- variants: each against its formula in fp64, or against PEFT's own

def dense(layer):
    """What a LoRA layer's base multiplies with, in fp64."""
    weight = layer.base_layer.weight
    return (dequantize_4bit(weight.data, weight.quant_state) if hasattr(weight, "quant_state") else weight).detach().double()


@pytest.mark.parametrize("variant, r, alpha", [("lora", 4, 8), ("rslora", 16, 8), ("dora", 4, 8), ("rslora+dora", 16, 4)])
def test_a_variant_computes_its_formula(folders, variant, r, alpha):
    tuned = shake(add_lora(load_model(folders["llama"]), r=r, alpha=alpha, variant=variant, seed=0))
    layer = tuned.base_model.model.model.layers[1].mlp.down_proj
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(0))
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    W = dense(layer) + (alpha/r**0.5 if "rslora" in variant else alpha/r) * B @ A
    if "dora" in variant: W = layer.lora_magnitude_vector["default"].weight.double()[:, None] * W/W.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(x).double(), x.double() @ W.T, rtol=1e-5, atol=1e-5) # sums of 128 products in fp32, 6e-8 each


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_changes_nothing_at_the_start(folders, family, dtype):
    model = load_model(folders[family], dtype=dtype)
    before, packed = model(IDS).logits, packed_hash(model)
    tuned = add_lora(model, r=4, variant="dora", seed=0).eval()
    assert torch.equal(tuned(IDS).logits, before) and packed_hash(tuned) == packed
    lengths = {n: p for n, p in lora_parameters(tuned).items() if "magnitude" in n}
    assert len(lengths) == (14 if family == "llama" else 8) and all(p.requires_grad and p.dtype == torch.float32 for p in lengths.values())
    assert list(lora_parameters(tuned)) == [n for n, p in tuned.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_a_variant_survives_saving_and_merging(folders, tokenizer, tmp_path, variant):
    tuned = shake(add_lora(load_model(folders["llama"], "none"), r=4, alpha=8, variant=variant, rank_pattern={"down_proj": 8}, seed=0))
    save_adapter(tuned, tokenizer, tmp_path/"a", base_model="base")
    expected = tuned(IDS).logits
    plain = PeftModel.from_pretrained(load_model(folders["llama"], "none"), tmp_path/"a").eval()
    assert torch.equal(plain(IDS).logits, expected) and torch.equal(load_adapter(load_model(folders["llama"], "none"), tmp_path/"a")(IDS).logits, expected)
    torch.testing.assert_close(plain.merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-5) # fp32, two layers


def test_patterns_give_layers_their_own_rank_and_alpha(folders):
    tuned = add_lora(load_model(folders["llama"]), r=4, alpha=8, rank_pattern={"layers.0.mlp.down_proj": 8, "[qk]_proj": 2}, alpha_pattern={"v_proj": 16}, seed=0)
    layers = tuned.base_model.model.model.layers
    found = [(l.r["default"], l.scaling["default"]) for l in (layers[0].mlp.down_proj, layers[1].mlp.down_proj, layers[1].self_attn.q_proj, layers[0].self_attn.v_proj)]
    assert found == [(8, 1.0), (4, 2.0), (2, 4.0), (4, 4.0)]
    assert trainable_table(tuned).loc["q_proj", "trained"] == 2*2*(64 + 64)


@pytest.mark.parametrize("change, words", [
    (dict(rank_pattern={"down_prj": 8}), "did you mean 'down_proj'"), (dict(rank_pattern={"*": 8}), "fits no layer"), (dict(rank_pattern={"q_proj": 0}), "whole numbers"),
    (dict(rank_pattern={"q_proj": 8}, target_modules=["v_proj"]), "fits no layer"), (dict(alpha_pattern={"q_proj": -1.0}), "numbers above 0"),
    (dict(variant="vera"), "lora_variant"), (dict(init="zeros"), "kaiming and gaussian"), (dict(init="pissa_niter_4"), "residual_base"),
    (dict(init="olora"), "residual_base"), (dict(init="loftq"), "residual_base")])
def test_wrong_variants_are_refused_before_the_model_is_touched(folders, change, words):
    model = load_model(folders["llama"])
    with pytest.raises(UserError, match=words): add_lora(model, **change)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_a_gaussian_start_has_the_deviation_it_says(folders):
    A = torch.cat([p.flatten() for n, p in lora_parameters(add_lora(load_model(folders["llama"]), r=8, init="gaussian", seed=0)).items() if "lora_A" in n])
    assert A.std().item() == pytest.approx(1/8, rel=0.02) and A.abs().max() > 3/8 # 8192 draws: the deviation is known to 1/√16384


# ---- several adapters

@pytest.fixture(scope="module")
def three(folders, tokenizer, tmp_path_factory):
    """Adapters of unequal ranks and scales: LoRA, LoRA with another rank, rsLoRA."""
    home = tmp_path_factory.mktemp("adapters")
    for i, settings in enumerate((dict(r=4, alpha=8), dict(r=2, alpha=8, rank_pattern={"up_proj": 3}), dict(r=9, alpha=6, variant="rslora"), dict(r=4, variant="dora"))):
        tuned = shake(add_lora(load_model(folders["llama"]), seed=i, **settings))
        save_adapter(tuned, tokenizer, home/str(i), base_model="base")
    return home


def test_adapters_switch_and_go(folders, three):
    alone = [load_adapter(load_model(folders["llama"]), three/str(i)).eval()(IDS).logits for i in (0, 1)]
    model = load_adapter(load_adapter(load_model(folders["llama"]), three/"0", name="a"), three/"1", name="b").eval()
    assert torch.equal(model(IDS).logits, alone[1])
    model.set_adapter("a", inference_mode=True)
    assert torch.equal(model(IDS).logits, alone[0]) and set(lora_parameters(model, "b")).isdisjoint(lora_parameters(model))
    assert not any(p.requires_grad for p in model.parameters())
    with model.disable_adapter(): assert torch.equal(model(IDS).logits, load_model(folders["llama"])(IDS).logits)
    with pytest.raises(UserError, match="already"): load_adapter(model, three/"0", name="a")


@pytest.mark.parametrize("pair", [("0", "1"), ("2", "0")])
def test_a_sum_is_the_sum(folders, three, tokenizer, tmp_path, pair):
    model = load_adapter(load_adapter(load_model(folders["llama"]), three/pair[0], name="a"), three/pair[1], name="b")
    combine_adapters(model, {"a": 0.7, "b": -0.4})
    for layer in (m for m in model.modules() if hasattr(m, "get_delta_weight")):
        expected = sum(w*layer.scaling[n]*layer.lora_B[n].weight.double() @ layer.lora_A[n].weight.double() for n, w in (("a", 0.7), ("b", -0.4)))
        torch.testing.assert_close(layer.get_delta_weight("combined").double(), expected, rtol=1e-4, atol=1e-6) # fp32 products of rank 13
    save_adapter(model, tokenizer, tmp_path/"sum", base_model="base", adapter="combined")
    assert torch.equal(load_adapter(load_model(folders["llama"]), tmp_path/"sum").eval()(IDS).logits, model.eval()(IDS).logits)


def test_sums_that_mean_nothing_are_refused(folders, three):
    model = load_adapter(load_adapter(load_model(folders["llama"]), three/"0", name="a"), three/"3", name="d")
    with pytest.raises(UserError, match="lengths"): combine_adapters(model, {"a": 1, "d": 1})
    with pytest.raises(UserError, match="this model has a, d"): combine_adapters(model, {"x": 1})


# ---- PiSSA

@pytest.mark.parametrize("r", [2, 8])
def test_principal_is_pefts_pissa(r):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"line": torch.nn.Linear(24, 40)})
    W = model["line"].weight.detach().clone()
    layer = get_peft_model(model, LoraConfig(r=r, lora_alpha=3*r, target_modules=["line"], init_lora_weights="pissa")).base_model.model["line"]
    A, B = principal(W, r, 3.0)
    torch.testing.assert_close(B @ A, layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    torch.testing.assert_close(W - 3*B @ A, layer.base_layer.weight)
    fast = principal(W, r, 3.0, niter=20)
    torch.testing.assert_close(fast[1] @ fast[0], B @ A, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family, loading", [("llama", dict()), ("gpt2", dict(quant_type="fp4", double_quant=False, quant_storage="bfloat16", dtype=torch.bfloat16))])
def test_a_residual_base_and_its_adapter_are_a_plain_pair(folders, tokenizer, tmp_path, same_arithmetic, family, loading):
    tokenizer.save_pretrained(folders[family])
    pair = residual_base(folders[family], tmp_path/"pair", r=4, alpha=8, **loading)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pair"]
    tuned = load_adapter(load_model(pair/"base", **loading), pair/"adapter", trainable=True).eval()
    base = AutoModelForCausalLM.from_pretrained(pair/"base", dtype=loading.get("dtype", torch.float32))
    assert torch.equal(PeftModel.from_pretrained(base, pair/"adapter").eval()(IDS).logits, tuned(IDS).logits)
    with pytest.raises(UserError, match="belongs to a base whose packed weights"): load_adapter(load_model(folders[family], **loading), pair/"adapter")
    wide, plain = (load_model(folders[family], x, dtype=torch.float32) for x in ("none", "nf4"))
    name = "model.layers.0.mlp.up_proj" if family == "llama" else "transformer.h.0.mlp.c_fc"
    layer, W = tuned.base_model.model.get_submodule(name), wide.get_submodule(name).weight.detach().double()
    W = W.T if family == "gpt2" else W
    scale, parts = layer.scaling["default"], (layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double())
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(scale*parts[0] @ parts[1], (U[:, :4]*S[:4]) @ V[:4], rtol=1e-3, atol=1e-4) # fp32 SVD, and bf16 weights in one case
    rest = W - scale*parts[0] @ parts[1]
    assert (dense(layer) - rest).norm() < 0.14*rest.norm() # what 4 bits cost: 9 % with NF4, 12 % with FP4
    save_adapter(shake(tuned), tokenizer, tmp_path/"later", base_model=str(pair/"base"))
    with pytest.raises(UserError, match="belongs to a base"): load_adapter(load_model(folders[family], **loading), tmp_path/"later")


def test_residual_base_says_what_it_cannot_do(folders, tokenizer, tmp_path):
    tokenizer.save_pretrained(folders["llama"])
    with pytest.raises(UserError, match="not in 4 bits"): residual_base(folders["llama"], tmp_path/"x", r=4, quant_type="none")
    with pytest.raises(UserError, match="k_proj: received r=33.*ranks up to 32"): residual_base(folders["llama"], tmp_path/"x", r=33)
    assert not list(tmp_path.iterdir())
    pair = residual_base(folders["llama"], tmp_path/"pair", r=4, target_modules=["q_proj"])
    with pytest.raises(UserError, match="exists"): residual_base(folders["llama"], pair, r=4)
    with pytest.raises(UserError, match="no plain weight"): residual_base(pair/"base", tmp_path/"again", r=4)


def test_a_run_goes_on_from_a_residual_base(tiny_config, tiny_llama, tmp_path):
    from qlora_kit.run.config import load_config
    from qlora_kit.run.train import train
    pair = residual_base(tiny_llama, tmp_path/"pair", r=4, alpha=8)
    path = tiny_config("pissa", model__base_model=str(pair/"base"), model__start_adapter="pair/adapter", training__max_steps=3)
    result = train(load_config(path), path.stem, quiet=True, base=path.parent)
    config = json.loads((result.run/"adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(pair/"base") and (config["r"], config["lora_alpha"]) == (4, 8)
    assert (result.run/"adapter/base.json").read_text() == (pair/"adapter/base.json").read_text()
    assert load_file(result.run/"adapter/adapter_model.safetensors").keys() == load_file(pair/"adapter/adapter_model.safetensors").keys()
    with pytest.raises(UserError, match="belongs to a base"): load_adapter(load_model(tiny_llama), result.run/"adapter")
