import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig,
                          LlamaForCausalLM, PreTrainedTokenizerFast)

from qlora_kit.data import UserError
from qlora_kit.loader import load_model, packed_hash
from qlora_kit.lora import add_lora, load_adapter, lora_parameters, save_adapter, trainable_table

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
        torch.manual_seed(noise)
        model = add_lora(load_model(folders["llama"], quant_storage=storage, dtype=torch.bfloat16), r=4, seed=seed)
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


def test_adapter_folder_works_with_plain_peft(folders, tokenizer, tmp_path):
    tuned = shake(add_lora(load_model(folders["llama"]), r=4, seed=0))
    doubled = {name: 2*p.detach() for name, p in lora_parameters(tuned).items()}
    save_adapter(tuned, tokenizer, tmp_path/"adapter", "acme/base", revision="abc", state=doubled)
    save_adapter(tuned, tokenizer, tmp_path/"adapter", "acme/base", revision="abc")
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
    save_adapter(tuned, tokenizer, tmp_path/"a", "base", state=state)
    assert all((t == 3).all() for t in load_file(tmp_path/"a/adapter_model.safetensors").values())
    state.popitem()
    with pytest.raises(ValueError, match="lacks 1"): save_adapter(tuned, tokenizer, tmp_path/"a", "base", state=state)
    assert load_file(tmp_path/"a/adapter_model.safetensors")


def test_a_failed_save_leaves_the_earlier_adapter(folders, tmp_path, tokenizer):
    class Full:
        def save_pretrained(self, folder): raise OSError(28, "No space left on device")
    tuned = shake(add_lora(load_model(folders["llama"]), r=4, seed=0))
    save_adapter(tuned, tokenizer, tmp_path/"a", "base")
    before = (tmp_path/"a/adapter_model.safetensors").read_bytes()
    shake(tuned)
    with pytest.raises(OSError): save_adapter(tuned, Full(), tmp_path/"a", "base")
    assert (tmp_path/"a/adapter_model.safetensors").read_bytes() == before and (tmp_path/"a/tokenizer.json").exists()


def test_adapter_of_another_base_is_refused(folders, tokenizer, tmp_path):
    save_adapter(add_lora(load_model(folders["llama"]), r=4), tokenizer, tmp_path/"a", "acme/llama")
    with pytest.raises(UserError, match="acme/llama"): load_adapter(load_model(folders["gpt2"]), tmp_path/"a")
    with pytest.raises(UserError, match="adapter_config.json"): load_adapter(load_model(folders["gpt2"]), tmp_path)
