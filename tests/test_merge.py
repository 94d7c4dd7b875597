import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from qlora_kit import merge as module
from qlora_kit.data import UserError
from qlora_kit.launch import run_app
from qlora_kit.loader import Tensors, load_model, load_tokenizer
from qlora_kit.lora import add_lora, load_adapter, lora_parameters, residual_base, save_adapter
from qlora_kit.merge import Trained, find_trained, merge, read_adapter

IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory):
    """Linears turned in the file, and an output head that is the embedding."""
    from conftest import save_tokenizer

    folder = tmp_path_factory.mktemp("gpt2")
    vocab = save_tokenizer(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=vocab, n_positions=64, bos_token_id=2, eos_token_id=2, initializer_range=0.1)).save_pretrained(folder)
    return folder


@pytest.fixture
def train(tmp_path):
    """An adapter whose B is not zero, and the model it is on."""
    def make(base, name="adapter", quant=("nf4", True), dtype=torch.float32, **settings):
        model = add_lora(load_model(base, *quant, dtype=dtype), r=4, alpha=8, seed=0, **settings).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for key, p in lora_parameters(model).items():
                p += torch.randn_like(p) * 0.05 if "lora_B" in key else torch.rand_like(p) * 0.3 if "magnitude" in key else 0
        return model, save_adapter(model, load_tokenizer(base), tmp_path / name, str(base))

    return make


def plain(folder, dtype=torch.float32): return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model): return model(IDS).logits.float()


def decoded(base, model):
    """The base of a 4-bit PEFT model as an ordinary model in fp32, by bitsandbytes alone."""
    from bitsandbytes.functional import dequantize_4bit

    wide = plain(base)
    for name, m in model.base_model.model.named_modules():
        layer = getattr(m, "base_layer", m)
        if state := getattr(layer, "quant_state", None):
            W = dequantize_4bit(layer.weight.data, state).float()
            target = wide.get_submodule(name.removesuffix(".base_layer"))
            target.weight.data = (W.T if type(target).__name__ == "Conv1D" else W).contiguous()
    return wide


SETTINGS = [{}, dict(variant="rslora"), dict(variant="dora"), dict(variant="rslora+dora"), dict(rank_pattern={".*_proj": 2, "c_fc": 8}, alpha_pattern={"down_proj": 3, "c_attn": 5})]


@pytest.mark.parametrize("settings", SETTINGS, ids=["lora", "rslora", "dora", "both", "patterns"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_is_unmerged_and_what_peft_merges(tiny_llama, tiny_gpt2, train, tmp_path, family, settings):
    base = tiny_llama if family == "llama" else tiny_gpt2
    if "rank_pattern" in settings: settings = {k: {n: x for n, x in p.items() if (n.startswith("c_")) == (family == "gpt2")} for k, p in settings.items()}
    model, adapter = train(base, **settings)
    merged = plain(merge(adapter, tmp_path / "out", dtype="float32"))
    expected = logits(model)
    assert (expected - logits(load_model(base))).abs().max() > 0.01
    # fp32 keeps 24 bits: a sum of at most 128 products in another order is off by less than 128 · 2⁻²⁴ of its size, over four layers of sums
    torch.testing.assert_close(logits(merged), expected, rtol=4 * 128 * 2**-24, atol=1e-4)
    peft = PeftModel.from_pretrained(decoded(base, model), adapter).merge_and_unload()
    for name, p in merged.named_parameters():
        torch.testing.assert_close(p, peft.get_parameter(name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_weight_is_rounded_once(tiny_llama, train, tmp_path, dtype):
    model, adapter = train(tiny_llama)
    peft = PeftModel.from_pretrained(decoded(tiny_llama, model), adapter).merge_and_unload()
    merged = plain(merge(adapter, tmp_path / "out", dtype=dtype), None)
    assert merged.dtype == getattr(torch, dtype) and json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
    u = torch.finfo(merged.dtype).eps / 2
    for name, p in merged.named_parameters():
        W = peft.get_parameter(name)
        assert ((p.float() - W).abs() <= u * W.abs() + 1e-7).all(), name


def test_linears_without_an_update_are_the_quantized_ones_too(tiny_llama, train, tmp_path):
    model, adapter = train(tiny_llama, target_modules=["q_proj"])
    merged = plain(merge(adapter, tmp_path / "out", dtype="float32"))
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-4)
    original = plain(tiny_llama)
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(merged.lm_head.weight, original.lm_head.weight) and torch.equal(merged.model.norm.weight, original.model.norm.weight)


def test_onto_the_original_is_what_peft_merges_there_and_another_model(tiny_llama, train, tmp_path):
    model, adapter = train(tiny_llama)
    merged = plain(merge(adapter, tmp_path / "out", onto="original", dtype="float32"))
    peft = PeftModel.from_pretrained(plain(tiny_llama), adapter).merge_and_unload()
    for name, p in merged.named_parameters(): torch.testing.assert_close(p, peft.get_parameter(name), rtol=0, atol=1e-7)
    assert (logits(merged) - logits(model)).abs().max() > 0.01


@pytest.mark.parametrize("quant, dtype", [(("nf4", False), "float32"), (("fp4", True), "float32"), (("none", True), "float32"), (("nf4", True), "bfloat16")])
def test_the_base_is_quantized_as_the_run_says(tiny_llama, train, tmp_path, quant, dtype):
    import yaml

    model, adapter = train(tiny_llama, "run/adapter", quant, getattr(torch, dtype))
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({"model": {"base_model": str(tiny_llama), "quant_type": quant[0], "double_quant": quant[1]}, "training": {"dtype": "auto"}}))
    (tmp_path / "run/environment.json").write_text(json.dumps({"card": "some card" if dtype == "bfloat16" else None}))
    assert find_trained(tmp_path / "run") == find_trained(adapter) == Trained(tmp_path / "run/adapter", Path(tiny_llama).resolve(), *quant, getattr(torch, dtype))
    merged = plain(merge(tmp_path / "run", tmp_path / "out", dtype="float32"))
    wide = PeftModel.from_pretrained(decoded(tiny_llama, model), adapter).merge_and_unload()
    for name, p in merged.named_parameters():
        if "_proj" in name: torch.testing.assert_close(p, wide.get_parameter(name), rtol=0, atol=1e-6)


def test_files_are_limited_and_written_one_after_the_other(tiny_llama, train, tmp_path, monkeypatch):
    _, adapter = train(tiny_llama)
    whole, sizes = merge(adapter, tmp_path / "whole", dtype="float32"), []
    monkeypatch.setattr(module, "save_file", lambda part, *a, f=module.save_file: (sizes.append(sum(t.nbytes for t in part.values())), f(part, *a)))
    parts = merge(adapter, tmp_path / "parts", dtype="float32", limit=80_000)
    assert len(sizes) > 3 and max(sizes) <= 80_000 and not list(parts.glob("*.part"))
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) and set(index["weight_map"].values()) == {p.name for p in parts.glob("*.safetensors")}
    a, b = plain(whole).state_dict(), plain(parts).state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert set(load_file(whole / "model.safetensors")) == set(Tensors(tiny_llama))


def test_a_tied_tensor_is_written_once_and_stays_tied(tiny_gpt2, train, tmp_path):
    _, adapter = train(tiny_gpt2)
    merged = merge(adapter, tmp_path / "out")
    model = plain(merged)
    assert model.lm_head.weight is model.transformer.wte.weight and "lm_head.weight" not in load_file(merged / "model.safetensors")


def test_tokenizer_template_and_end_come_from_the_adapter(tiny_llama, train, tmp_path):
    _, adapter = train(tiny_llama)
    tokenizer = load_tokenizer(adapter)
    tokenizer.chat_template, tokenizer.eos_token = "{{ messages[0].content }}!", "<|im_start|>"
    tokenizer.save_pretrained(adapter)
    out = merge(adapter, tmp_path / "out")
    again = AutoTokenizer.from_pretrained(out)
    assert again.chat_template == "{{ messages[0].content }}!" and again.eos_token == "<|im_start|>"
    assert set(plain(out).generation_config.eos_token_id) == {1, 2}


def test_pissas_base_merges_and_no_other(tiny_llama, tmp_path):
    pair = residual_base(tiny_llama, tmp_path / "pair", r=4, alpha=8)
    expected = logits(load_adapter(load_model(pair / "base"), pair / "adapter"))
    merged = merge(pair / "adapter", tmp_path / "out", dtype="float32")
    torch.testing.assert_close(logits(plain(merged)), expected, rtol=0, atol=1e-4)
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    with pytest.raises(UserError, match="4 bits only; use quantized"): merge(pair / "adapter", tmp_path / "x", onto="original")
    edit(pair / "adapter", base_model_name_or_path=str(tiny_llama))
    with pytest.raises(UserError, match="belongs to a base whose packed weights have the hash"): merge(pair / "adapter", tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "pair"]


def edit(adapter, **settings):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def tensors(adapter, change):
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


REFUSED = {
    "another type": (lambda a: edit(a, peft_type="IA3"), "type IA3; LORA"),
    "PiSSA in memory": (lambda a: edit(a, init_lora_weights="pissa_niter_4"), "started as pissa_niter_4"),
    "one-time": (lambda a: edit(a, alora_invocation_tokens=[1]), "alora_invocation_tokens is set"),
    "a saved module": (lambda a: tensors(a, lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(3)}), "base_model.model.lm_head.weight is no low-rank update"),
    "a bias": (lambda a: tensors(a, lambda t: t | {f"{k.removesuffix('weight')}bias": torch.zeros(3) for k in t if "lora_B" in k}), "and 13 more is no low-rank update"),
    "no such linear": (lambda a: tensors(a, lambda t: {k.replace("layers.1", "layers.7"): x for k, x in t.items()}), "layers.7.* is no linear of this base"),
    "another width": (lambda a: tensors(a, lambda t: {k: x[..., :32].contiguous() if "lora_A" in k else x for k, x in t.items()}), "× 32, this base has"),
    "no tensors": (lambda a: (a / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(tiny_llama, train, tmp_path, kind):
    _, adapter = train(tiny_llama)
    change, words = REFUSED[kind]
    change(adapter)
    with pytest.raises(UserError, match=words): merge(adapter, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_an_update_of_a_tied_head_is_refused(tiny_gpt2, tmp_path):
    model = get_peft_model(plain(tiny_gpt2), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"]))
    model.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", base_model_name_or_path=str(tiny_gpt2))
    tensors(tmp_path / "adapter", lambda t: {k: x for k, x in t.items() if "lora_" in k})
    with pytest.raises(UserError, match="lm_head shares its tensor with the input embedding"): merge(tmp_path / "adapter", tmp_path / "out")


def test_choices_out_of_range(tiny_llama, train, tmp_path):
    _, adapter = train(tiny_llama)
    with pytest.raises(UserError, match="onto: received 'both'"): merge(adapter, tmp_path / "out", onto="both")
    with pytest.raises(UserError, match="dtype: received 'int8'"): merge(adapter, tmp_path / "out", dtype="int8")
    with pytest.raises(UserError, match="has no adapter"): merge(tiny_llama, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists; name a folder"): merge(adapter, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interrupted_merge_leaves_nothing(tiny_llama, train, tmp_path, monkeypatch, error):
    _, adapter = train(tiny_llama)
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part/of an earlier kill").touch()
    with monkeypatch.context() as m:
        m.setattr(module, "check_hash", lambda *a: (_ for _ in ()).throw(error))
        with pytest.raises(error if isinstance(error, type) else type(error)): merge(adapter, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    merge(adapter, tmp_path / "out")
    assert plain(tmp_path / "out")


def test_a_disk_that_is_too_small_says_so_first(tiny_llama, train, tmp_path, monkeypatch):
    _, adapter = train(tiny_llama)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(module, "merged_tensors", lambda *a: pytest.fail("began"))
    with pytest.raises(UserError, match="0.0 are free; make room"): merge(adapter, tmp_path / "out")


def test_updates_of_foreign_adapters_follow_pefts_scale(tiny_llama, tmp_path):
    model = get_peft_model(plain(tiny_llama), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=True, init_lora_weights=False,
                                                       rank_pattern={"layers.1.*down_proj": 9}, alpha_pattern={"q_proj": 2.5}))
    model.save_pretrained(tmp_path / "adapter")
    updates = read_adapter(tmp_path / "adapter")
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert updates.keys() == layers.keys() and len({u.scale for u in updates.values()}) == 3
    for name, update in updates.items():
        torch.testing.assert_close(update.add(torch.zeros(layers[name].out_features, layers[name].in_features)), layers[name].get_delta_weight("default"))


def test_the_command_writes_what_transformers_alone_answers_with(tiny_llama, train, tmp_path, monkeypatch, capsys):
    model, adapter = train(tiny_llama)
    monkeypatch.chdir(tmp_path)
    assert run_app(["merge", "adapter", "merged/one", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == "merged/one\n"
    assert run_app(["merge", "adapter", "merged/one"]) == 2 and run_app(["merge", "adapter", "merged/two", "--onto", "none"]) == 2 and run_app(["merge", str(tiny_llama), "merged/two"]) == 2
    err = capsys.readouterr().err
    assert "exists; name a folder" in err and "allowed are quantized" in err and "has no adapter" in err and "Traceback" not in err
    script = """
import sys; sys.modules["qlora_kit"] = sys.modules["peft"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
m, t = AutoModelForCausalLM.from_pretrained("merged/one"), AutoTokenizer.from_pretrained("merged/one")
prompt = t.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(m.generate(**prompt, max_new_tokens=6, do_sample=False)[0].tolist())
"""
    r = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    tokenizer = load_tokenizer(adapter)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert json.loads(r.stdout.splitlines()[-1]) == model.generate(**prompt, max_new_tokens=6, do_sample=False)[0].tolist()


def test_a_merged_model_stops_where_its_template_ends_an_answer(run_like_qwen, tmp_path):
    """The base waits for <|endoftext|>, the rows ended in <|im_end|>: transformers alone stops there, and PEFT alone with the settings beside the adapter."""
    from transformers import GenerationConfig

    run, merged = run_like_qwen/"run", merge(run_like_qwen/"run", tmp_path/"out", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads((merged/"generation_config.json").read_text())["eos_token_id"] == [0, end] and tokenizer.eos_token_id == 0
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "a?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = lambda model: tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1]:])
    assert answer(plain(merged)) == "yes<|im_end|>"
    for model in (PeftModel.from_pretrained(plain(run_like_qwen/"base"), run/"adapter"), plain(run/"adapter")):
        assert answer(model).startswith("yes<|im_end|>") and len(answer(model)) > len("yes<|im_end|>")
        model.generation_config = GenerationConfig.from_pretrained(run/"adapter")
        assert answer(model) == "yes<|im_end|>"
