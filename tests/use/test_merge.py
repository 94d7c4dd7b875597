import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from conftest import write_rows
from qlora_kit.use import merge as module
from qlora_kit.data.files import UserError
from qlora_kit.tools.commands import run_app
from qlora_kit.model.loader import load_model, Tensors
from qlora_kit.model.base import load_tokenizer
from qlora_kit.model.lora import (
    add_lora, load_adapter, lora_parameters, residual_base, save_adapter)
from qlora_kit.use.trained import find_trained, Trained, Unrecorded
from qlora_kit.use.merge import merge, read_adapter

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
        return model, save_adapter(model, load_tokenizer(base), tmp_path / name, base_model=str(base))

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
    with pytest.raises(UserError, match="lm_head shares its tensor with the input embedding"): merge(tmp_path / "adapter", tmp_path / "out", onto="original")


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
        m.setattr(module, "_check_hash", lambda *a: (_ for _ in ()).throw(error))
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


# ---- files that disagree: one check for all that read adapters

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def spoiled(number):
    def change(t):
        t[f"{Q}B.weight"][3, 1] = number
        return t
    return change


DAMAGED = {
    "r of another adapter": (lambda a: edit(a, r=8), "gives model.layers.0.mlp.down_proj the rank 8, its tensors have 4; take both files"),
    "a pattern of another adapter": (lambda a: edit(a, rank_pattern={"q_proj": 2}), "gives model.layers.0.self_attn.q_proj the rank 2, its tensors have 4"),
    "r in words": (lambda a: edit(a, r="4"), "r is '4'; allowed are whole numbers from 1"),
    "alpha nan": (lambda a: edit(a, lora_alpha=float("nan")), "lora_alpha is nan; allowed are finite numbers"),
    "alpha of a layer": (lambda a: edit(a, alpha_pattern={"q_proj": None}), "lora_alpha of q_proj is None; allowed are finite numbers"),
    "no pattern": (lambda a: edit(a, rank_pattern={"q_proj(": 4}), "'q_proj\\(' in the pattern of r is no regular expression"),
    "nan": (lambda a: tensors(a, spoiled(float("nan"))), f"{Q}B.weight holds 1 numbers that are infinite or none"),
    "infinite": (lambda a: tensors(a, spoiled(float("-inf"))), f"{Q}B.weight holds 1 numbers that are infinite or none"),
    "whole numbers": (lambda a: tensors(a, lambda t: t | {f"{Q}A.weight": t[f"{Q}A.weight"].to(torch.int8)}), f"{Q}A.weight is torch.int8; allowed are float32"),
    "a lone A": (lambda a: tensors(a, lambda t: {k: x for k, x in t.items() if k != f"{Q}B.weight"}), "model.layers.0.self_attn.q_proj lacks its lora_B"),
    "a lone B": (lambda a: tensors(a, lambda t: {k: x for k, x in t.items() if k != f"{Q}A.weight"}), "model.layers.0.self_attn.q_proj lacks its lora_A"),
    "B turned": (lambda a: tensors(a, lambda t: t | {f"{Q}B.weight": t[f"{Q}B.weight"].T.contiguous()}), "the rank 4, its tensors have 4 and 64"),
    "an empty shell": (lambda a: tensors(a, lambda t: t | {f"{Q}A.weight": torch.zeros(0)}), "has A \\[0\\], B \\[64, 4\\]; expected A \\[r, in\\]"),
    "a weight of the base": (lambda a: tensors(a, lambda t: t | {"base_model.model.model.norm.weight": torch.zeros(64)}), "model.norm.weight is no update, and adapter_config.json does not name it"),
    "dora without lengths": (lambda a: edit(a, use_dora=True), "lacks its lora_magnitude_vector"),
    "lengths without dora": (lambda a: tensors(a, lambda t: t | {f"{Q}magnitude_vector": torch.ones(64)}), "has DoRA's lengths, and adapter_config.json says that use_dora is false"),
    "another type": (lambda a: edit(a, peft_type="IA3"), "an adapter of type IA3; LORA"),
    "PiSSA in memory": (lambda a: edit(a, init_lora_weights="pissa_niter_4"), "started as pissa_niter_4"),
    "half a JSON": (lambda a: (a / "adapter_config.json").write_text('{"peft_type": "LORA", "r":'), "adapter_config.json is damaged"),
    "a list": (lambda a: (a / "adapter_config.json").write_text("[]"), "holds a list; expected a JSON object"),
    "a damaged record": (lambda a: (a / "qlora_kit.json").write_text("nf4"), "qlora_kit.json is damaged"),
    "a cut file": (lambda a: (a / "adapter_model.safetensors").write_bytes((a / "adapter_model.safetensors").read_bytes()[:-9]), "cannot be read as tensors"),
    "no tensors": (lambda a: (a / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "a pickle that runs": (lambda a: ((a / "adapter_model.safetensors").unlink(), torch.save({"x": pytest.raises}, a / "adapter_model.bin")), "adapter_model.bin: cannot be read as tensors"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_every_reader_refuses_a_damaged_adapter_with_the_same_line(tiny_llama, train, tmp_path, capsys, kind):
    _, adapter = train(tiny_llama)
    change, words = DAMAGED[kind]
    change(adapter)
    write_rows(tmp_path / "rows.json")
    for command in (["merge", str(adapter), str(tmp_path / "out")], ["generate", str(adapter), "hi"], ["chat", str(adapter)], ["evaluate", str(adapter), "--data", str(tmp_path / "rows.json")]):
        assert run_app(command) == 2
        err = capsys.readouterr().err
        assert re.search(words, err) and len(err.splitlines()) == 1, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "rows.json"]
    if kind == "a damaged record": return
    with pytest.raises(UserError, match=words): load_adapter(load_model(tiny_llama), adapter)


def test_a_run_does_not_start_from_a_damaged_adapter(tiny_config, tiny_llama, train, capsys):
    _, adapter = train(tiny_llama)
    edit(adapter, r=8)
    assert run_app(["train", str(tiny_config("r", model__start_adapter=str(adapter)))]) == 2
    assert "the rank 8, its tensors have 4" in capsys.readouterr().err.splitlines()[-1]


def test_an_update_that_is_not_in_the_file_or_has_no_place(tiny_llama, train, tmp_path):
    _, adapter = train(tiny_llama)
    whole = load_file(adapter / "adapter_model.safetensors")
    tensors(adapter, lambda t: {k: x for k, x in t.items() if "0.self_attn.q_proj" not in k})
    with pytest.raises(UserError, match="no update of model.layers.0.self_attn.q_proj, which adapter_config.json names"): merge(adapter, tmp_path / "out")
    with pytest.raises(UserError, match="does not fit this LlamaForCausalLM"): load_adapter(load_model(tiny_llama), adapter)
    tensors(adapter, lambda t: whole | {k.replace("layers.0", "layers.7"): x.clone() for k, x in whole.items() if "layers.0" in k})
    with pytest.raises(UserError, match="layers.7.* is no linear of this base"): merge(adapter, tmp_path / "out")
    with pytest.raises(UserError, match=r"no place for base_model.model.model.layers.7.\w+.\w+.lora_A.weight"): load_adapter(load_model(tiny_llama), adapter)


# ---- adapters that PEFT alone has written

FOREIGN = {
    "plain": {}, "patterns": dict(rank_pattern={"layers.1.*down_proj": 9, "q_proj": 2}, alpha_pattern={"q_proj": 2.5}), "rslora": dict(use_rslora=True, rank_pattern={"q_proj": 9}),
    "dora": dict(use_dora=True), "one layer": dict(layers_to_transform=[1]), "regex": dict(target_modules=r".*\.(q|down)_proj"), "all-linear": dict(target_modules="all-linear"),
    "without one": dict(target_modules="all-linear", exclude_modules=["up_proj"]), "head": dict(target_modules=["lm_head", "q_proj"]),
    "its own bias": dict(lora_bias=True), "a whole module": dict(modules_to_save=["norm"]), "embedding": dict(target_modules=["embed_tokens", "q_proj"])}


@pytest.fixture
def foreign(tmp_path):
    """An adapter by PEFT, on a plain base in fp32, and the model that it is on."""
    def make(base, safe=True, name="foreign", **settings):
        torch.manual_seed(2)
        settings = dict(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False) | settings
        with warnings.catch_warnings(action="ignore"):
            model = get_peft_model(plain(base), LoraConfig(**settings)).eval()
            with torch.no_grad():
                for key, p in model.named_parameters():
                    if p.requires_grad and "lora_" not in key: p += torch.randn_like(p) * 0.05
            model.save_pretrained(tmp_path / name, safe_serialization=safe)
        edit(tmp_path / name, base_model_name_or_path=str(base))
        return model, tmp_path / name

    return make


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_foreign_adapters_load_and_merge_as_peft_has_them(tiny_llama, foreign, tmp_path, kind, safe):
    model, adapter = foreign(tiny_llama, safe, **FOREIGN[kind])
    assert (adapter / "adapter_model.bin").exists() != safe
    with warnings.catch_warnings(action="ignore"): assert torch.equal(logits(load_adapter(load_model(tiny_llama, "none"), adapter)), logits(model))
    if kind in ("its own bias", "a whole module", "embedding", "head"): # more than updates: the head comes with its base weights
        with pytest.raises(UserError, match="no low-rank update of a linear"): merge(adapter, tmp_path / "out", onto="original")
        return
    merged = plain(merge(adapter, tmp_path / "out", onto="original", dtype="float32"))
    with warnings.catch_warnings(action="ignore"): peft = PeftModel.from_pretrained(plain(tiny_llama), adapter).merge_and_unload()
    for name, p in merged.named_parameters(): torch.testing.assert_close(p, peft.get_parameter(name), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


def test_foreign_gpt2_and_a_head_of_its_own_merge_as_peft_has_them(tiny_gpt2, tiny_llama, foreign, tmp_path):
    for base, settings in ((tiny_gpt2, dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)), (tiny_llama, dict(target_modules=["lm_head", "q_proj"]))):
        model, adapter = foreign(base, name=f"of {base.name}", **settings)
        if base == tiny_llama: tensors(adapter, lambda t: {k: x for k, x in t.items() if "lora_" in k})
        merged = plain(merge(adapter, tmp_path / f"out {base.name}", onto="original", dtype="float32"))
        with warnings.catch_warnings(action="ignore"): peft = model.merge_and_unload()
        for name, p in merged.named_parameters(): torch.testing.assert_close(p, peft.get_parameter(name), rtol=0, atol=1e-6)


def test_trained_biases_load_and_are_not_merged(tiny_gpt2, foreign, tmp_path):
    model, adapter = foreign(tiny_gpt2, target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    assert torch.equal(logits(load_adapter(load_model(tiny_gpt2, "none"), adapter)), logits(model))
    with pytest.raises(UserError, match="bias and .* more is no low-rank update of a linear"): merge(adapter, tmp_path / "out", onto="original")
    edit(adapter, bias="none")
    with pytest.raises(UserError, match="bias is no update, and adapter_config.json does not name it"): load_adapter(load_model(tiny_gpt2, "none"), adapter)


def test_without_a_record_the_base_has_to_be_chosen(tiny_llama, foreign, tmp_path, capsys, monkeypatch):
    model, adapter = foreign(tiny_llama)
    load_tokenizer(tiny_llama).save_pretrained(adapter)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run_app(["merge", "foreign", "out"]) == 2 and not (tmp_path / "out").exists()
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "--onto original if it was trained on the 16-bit checkpoint" in err and "--onto quantized if" in err
    for onto in ("original", "quantized"): assert run_app(["merge", "foreign", onto, "--onto", onto, "--dtype", "float32"]) == 0
    torch.testing.assert_close(logits(plain("original")), logits(model), rtol=1e-4, atol=1e-4)
    wide = PeftModel.from_pretrained(load_model(tiny_llama), adapter)
    torch.testing.assert_close(logits(plain("quantized")), logits(wide), rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert run_app(["generate", "foreign", "hi", "--max-new-tokens", "6"]) == 0
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and "used on the original weights" in said.err
    assert run_app(["generate", "foreign", "hi", "--max-new-tokens", "6", "--onto", "original"]) == 0
    again = capsys.readouterr()
    assert again.out == said.out and not again.err


def test_a_base_that_exists_in_4_bits_needs_no_choice(tiny_llama, foreign, tmp_path):
    load_model(tiny_llama, "fp4", False).save_pretrained(tmp_path / "packed")
    load_tokenizer(tiny_llama).save_pretrained(tmp_path / "packed")
    _, adapter = foreign(tiny_llama)
    edit(adapter, base_model_name_or_path=str(tmp_path / "packed"))
    assert find_trained(adapter) == find_trained(adapter, "quantized") == Trained(adapter, (tmp_path / "packed").resolve(), "fp4", False)
    with pytest.raises(UserError, match="4 bits only; use quantized"): find_trained(adapter, "original")


def test_a_config_beside_a_foreign_adapter_is_no_record(tiny_llama, foreign, tmp_path):
    _, adapter = foreign(tiny_llama)
    for text in ("model: llama\n", "- 1\n", "", "model: {name: x}\n"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(Unrecorded): find_trained(adapter)
    (tmp_path / "config.yaml").write_text("model: [")
    with pytest.raises(UserError, match="config.yaml is damaged"): find_trained(adapter)


# ---- what a run trained with goes where its adapter goes

@pytest.mark.parametrize("quant", ["nf4", "fp4", "none"])
def test_an_adapter_copied_away_is_the_same_model(tiny_config, tmp_path, capsys, quant, tiny_llama):
    path = tiny_config("r", model__quant_type=quant, model__double_quant=False, data__system_prompt="Be brief.", training__max_steps=3, training__learning_rate=0.05)
    assert run_app(["train", str(path)]) == 0
    run = tmp_path / "runs/r"
    away, out = shutil.copytree(run / "adapter", tmp_path / "far/away"), tmp_path / "out"
    known = json.loads((away / "qlora_kit.json").read_text())
    assert known["quant_type"] == quant and known["system_prompt"] == "Be brief." and known["dtype"] == "float32"
    here, there = find_trained(run), find_trained(away)
    assert (here.quant_type, here.double_quant if quant != "none" else False, here.system_prompt) == (quant, False, "Be brief.")
    assert replace(there, adapter=here.adapter) == here
    expected = logits(load_adapter(load_model(tiny_llama, quant, False), away))
    torch.testing.assert_close(logits(plain(merge(away, out, dtype="float32"))), expected, rtol=0, atol=1e-4)
    said = []
    for target in (run, away):
        capsys.readouterr()
        assert run_app(["generate", str(target), "hi", "--max-new-tokens", "8"]) == 0
        assert run_app(["evaluate", str(target), "--data", str(tmp_path / "rows.json"), "--json", "--loss-only"]) == 0
        lines = capsys.readouterr().out.splitlines()
        said.append((lines[:-1], json.loads(lines[-1])["loss"]))
    assert said[0] == said[1]


def test_an_older_run_has_its_record_in_its_own_folder(tiny_config, tmp_path):
    assert run_app(["train", str(tiny_config("r", model__quant_type="none", data__system_prompt="Be brief.", training__max_steps=2))]) == 0
    run = tmp_path / "runs/r"
    new = find_trained(run)
    (run / "adapter/qlora_kit.json").unlink()
    assert find_trained(run) == new and new.quant_type == "none"


def test_a_base_that_has_moved(tiny_llama, train, tmp_path, capsys):
    _, adapter = train(tiny_llama)
    for name in ("/nowhere/base", None):
        edit(adapter, base_model_name_or_path=name)
        for command in (["merge", str(adapter), str(tmp_path / "out")], ["generate", str(adapter), "hi"]):
            assert run_app(command) == 2
            err = capsys.readouterr().err
            assert len(err.splitlines()) == 1 and "name the base with --base" in err and (name or "names no base") in err
    assert run_app(["merge", str(adapter), str(tmp_path / "out"), "--base", str(tiny_llama)]) == 0
    assert run_app(["generate", str(adapter), "hi", "--base", str(tiny_llama), "--max-new-tokens", "4"]) == 0
    record = json.loads((adapter / "qlora_kit.json").read_text())
    (adapter / "qlora_kit.json").write_text(json.dumps(record | {"base_model": str(tiny_llama)})) # as the run's config named it
    assert find_trained(adapter).base == Path(tiny_llama).resolve()


def test_a_model_without_adapter_is_used_as_it_is_saved(tiny_llama, train, tmp_path, capsys):
    from qlora_kit.use.trained import load_trained

    _, adapter = train(tiny_llama)
    merged = merge(adapter, tmp_path / "merged")
    assert torch.equal(logits(load_trained(str(merged))[0]), logits(plain(merged)))
    assert torch.equal(logits(load_trained(str(merged), "quantized")[0]), logits(load_model(merged)))
    load_model(tiny_llama, "fp4", False).save_pretrained(tmp_path / "packed")
    load_tokenizer(tiny_llama).save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(load_trained(str(tmp_path / "packed"))[0]), logits(load_model(tiny_llama, "fp4", False)))
    assert run_app(["generate", str(merged), "hi", "--base", str(tiny_llama)]) == 2 and run_app(["generate", str(merged), "hi", "--onto", "nf4"]) == 2
    err = capsys.readouterr().err
    assert "leave --base out" in err and "allowed are quantized" in err


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
