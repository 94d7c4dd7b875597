"Every family that the loader, LoRA and the loss name, on tiny random checkpoints, against transformers and PEFT."
import contextlib, io

import pytest, torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers import (AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, LlamaForCausalLM,
                          MistralConfig, MixtralConfig, Phi3Config, Qwen2Config, Qwen3Config, Qwen3MoeConfig)

from qlora_kit.model import loader
from qlora_kit.model import sharded
from qlora_kit.data.files import UserError
from qlora_kit.model.loader import (
    file_names, load_model, packed_hash, quantization_config, skeleton, slots, Tensors)
from qlora_kit.model.lora import add_lora
from qlora_kit.training.loss import LossModel
from test_loader import contents, edit, theirs

SIZE = dict(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED = SIZE | dict(num_key_value_heads=2)
STREAMED = {
    "llama": LlamaConfig(**GROUPED), "mistral": MistralConfig(**GROUPED, sliding_window=8), "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16), "phi3": Phi3Config(**GROUPED), "gpt_neox": GPTNeoXConfig(**SIZE),
    "gemma2": Gemma2Config(**GROUPED, head_dim=16, sliding_window=8, final_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=8),
    "gpt2": GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)}
WHOLE = {"mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
         "qwen3_moe": Qwen3MoeConfig(**GROUPED, head_dim=16, num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2)}
IDS = torch.arange(40).view(2, 20)*7 % 297 + 3


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    "save(name, dtype) -> folder of a checkpoint in several files, made once."
    root, made = tmp_path_factory.mktemp("families"), {}
    def save(name, dtype=torch.bfloat16, shard="60KB"):
        if (key := (name, dtype, shard)) not in made:
            torch.manual_seed(0)
            made[key] = root/f"{name}-{str(dtype)[6:]}-{shard}"
            with contextlib.redirect_stdout(io.StringIO()):
                AutoModelForCausalLM.from_config((STREAMED | WHOLE)[name], dtype=dtype).save_pretrained(made[key], max_shard_size=shard)
        return made[key]
    return save


def same(ours, reference):
    assert contents(ours) == contents(reference)
    assert ours.config.to_dict() == reference.config.to_dict()
    with torch.no_grad(): assert torch.equal(ours(IDS[:, :12]).logits, reference(IDS[:, :12]).logits)


@pytest.mark.parametrize("dtype,settings", [
    (torch.bfloat16, [{}, {"double_quant": False, "dtype": torch.bfloat16}, {"quant_type": "fp4"}, {"quant_type": "none", "dtype": torch.bfloat16}]),
    (torch.float32, [{"dtype": torch.float16}, {"quant_type": "none"}])])
@pytest.mark.parametrize("name", STREAMED)
def test_streamed_equals_transformers(families, name, dtype, settings, monkeypatch):
    monkeypatch.setattr(loader, "load_whole", None)  # nothing may fall back
    folder = families(name, dtype)
    assert len(list(folder.glob("*.safetensors"))) > 3
    for args in settings: same(load_model(folder, **args), theirs(folder, **args))


def test_what_makes_families_differ_is_really_there(families):
    assert "embed_out.weight" in Tensors(families("gpt_neox"))
    assert "lm_head.weight" not in Tensors(families("gemma2")) and load_model(families("gemma2")).config.tie_word_embeddings


@pytest.mark.parametrize("name", STREAMED)
def test_names_that_need_no_rule_are_what_the_rules_make_of_them(families, name):
    model, names = skeleton(families(name), None, torch.float32, "cpu"), list(Tensors(families(name)))
    with_rules = file_names(model, [*names, "a.stranger"])  # which has to be looked up
    assert file_names(model, names) == {new: old for new, old in with_rules.items() if old != "a.stranger"}


def test_the_table_of_rules_is_left_alone_where_it_says_nothing(families, monkeypatch):
    asked = []
    monkeypatch.setattr(loader, "get_model_conversion_mapping", lambda model: asked.append(model.config.model_type) or [])
    for name in ("llama", "gpt_neox"): file_names(skeleton(families(name), None, torch.float32, "cpu"), list(Tensors(families(name))))
    model = skeleton(families("mixtral"), None, torch.float32, "cpu")
    file_names(model, list(model.state_dict()))  # stacked experts under their present names
    assert asked == ["gpt_neox", "mixtral"]


def test_only_rules_for_stacked_matrices_keep_a_name():
    rules = [rule for rules in _build_checkpoint_conversion_mapping().values() for rule in rules if isinstance(rule, WeightConverter)]
    kept = [name for rule in rules for name in rule.source_patterns if name in rule.target_patterns]
    assert len(rules) > 50 and kept and all(".experts." in name for name in kept), kept


def test_a_family_that_renames_saves_4_bit_and_comes_back(families, tmp_path):
    theirs(families("gpt_neox")).save_pretrained(tmp_path/"packed")
    same(load_model(tmp_path/"packed"), theirs(tmp_path/"packed"))


@pytest.mark.parametrize("attribute,dtype", [("_keep_in_fp32_modules_strict", torch.bfloat16), ("_keep_in_fp32_modules", torch.float16)])
def test_modules_that_a_family_keeps_in_fp32(families, monkeypatch, attribute, dtype):
    monkeypatch.setattr(LlamaForCausalLM, attribute, ["post_attention_layernorm", "layers.0.mlp.*_proj"])
    ours = load_model(families("llama"), dtype=dtype)
    assert contents(ours) == contents(theirs(families("llama"), dtype=dtype))
    assert ours.model.layers[1].post_attention_layernorm.weight.dtype == torch.float32 and ours.model.norm.weight.dtype == dtype


@pytest.mark.parametrize("args", [{}, {"quant_type": "none", "dtype": torch.bfloat16}, {"quant_storage": "bfloat16", "dtype": torch.bfloat16}])
@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_streamed_is_left_to_transformers(families, name, args, capfd, monkeypatch):
    folder = families(name)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)  # bitsandbytes asks when it makes a linear
    capfd.readouterr()  # of saving
    ours = load_model(folder, **args)
    out, err = capfd.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith(f"{name}: ") and "experts" in err and "loads the model whole" in err
    assert ("stay in" in err) == (args.get("quant_type") != "none")
    monkeypatch.setenv("RANK", "1")
    load_model(folder, **args)
    assert not capfd.readouterr().err  # one rank says it for all
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in ours.modules())
    monkeypatch.undo()
    same(ours, theirs(families(name), **args))


@pytest.mark.parametrize("name", WHOLE)
def test_ranks_that_would_each_read_a_share_are_refused(families, name):
    empty = skeleton(families(name), quantization_config("nf4", True, "uint8", torch.float32), torch.float32, "cpu")
    with pytest.raises(UserError, match="use deepspeed.stage 2 or lower"):
        sharded.find_tensors(empty, Tensors(families(name)), rank=0, ranks=2)


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


@pytest.mark.parametrize("args", [{}, {"quant_type": "none"}])
@pytest.mark.parametrize("change,config,says", [
    (lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}, {}, "missing: model.norm.weight"),
    (lambda t: t | {"model.extra": torch.ones(2)}, {}, "unexpected: model.extra"),
    (lambda t: {k: v for k, v in t.items() if k != EXPERT}, {}, r"model\.layers\.1\.mlp\.experts\.down_proj"),
    (lambda t: t | {EXPERT: t[EXPERT][:, :-1].clone()}, {}, "cannot make the model from its tensors"),
    (lambda t: t, {"num_key_value_heads": 4}, r"self_attn\.k_proj")])
def test_a_whole_load_leaves_nothing_random(families, tmp_path, args, change, config, says):
    folder = edit(families("mixtral", shard="1GB"), tmp_path/"bad", change, **config)
    with pytest.raises(UserError, match=says): load_model(folder, **args)


def test_a_quantized_mixture_of_experts_comes_back(families, tmp_path):
    theirs(families("mixtral")).save_pretrained(tmp_path/"packed")
    same(load_model(tmp_path/"packed"), theirs(tmp_path/"packed"))
    with pytest.raises(UserError, match="received fp4"): load_model(tmp_path/"packed", quant_type="fp4")


@pytest.mark.parametrize("name", [*STREAMED, *WHOLE])
def test_loss_is_the_models_own(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(STREAMED.get(name) or WHOLE[name], dtype=torch.float32).eval()
    labels = IDS.masked_fill(torch.rand(IDS.shape) < 0.4, -100)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 40  # logits large enough for a cap to bite
        mean = model(input_ids=IDS, labels=labels).loss
        ours = LossModel(model, chunk=7)(IDS, torch.ones_like(IDS), labels)
    count = (labels[:, 1:] != -100).sum()
    assert torch.isclose(ours, mean*count, rtol=1e-6, atol=0)  # fp32, summed in another order


def adapted(model): return {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("name", STREAMED)
def test_lora_sits_on_every_linear(families, name):
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2")
    theirs, ours = get_peft_model(load_model(families(name)), settings), add_lora(load_model(families(name)), r=4)
    assert adapted(ours) == adapted(theirs) and len(adapted(ours)) >= 8


@pytest.mark.parametrize("name", [*STREAMED, *WHOLE])
def test_one_step_lowers_the_loss(families, name):
    model = load_model(families(name))
    before, model = packed_hash(model), add_lora(model, r=4, seed=0)
    assert name in STREAMED or {n.rpartition(".")[2] for n in adapted(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}  # experts and router stay as they are
    loss = LossModel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    first = loss(IDS, None, IDS)
    first.backward(); optimizer.step()
    assert loss(IDS, None, IDS) < first - 0.5 and packed_hash(model) == before
