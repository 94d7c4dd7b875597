import io
import logging
import sys

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_kit.data.files import UserError
from qlora_kit.use.generate import dequantized, draw_token, generate, stop_ids, stream
from qlora_kit.model.loader import load_model, packed_hash
from qlora_kit.model.lora import add_lora, lora_parameters
from qlora_kit.data.files import progress

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["</s>", "<pad>", "?", "a:", *WORDS])}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>",
                                   chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}a:{% endif %}")


def make(family):
    torch.manual_seed(3)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=40, vocab_size=64, bos_token_id=0, eos_token_id=0, initializer_range=0.3)).eval()
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                        vocab_size=64, max_position_embeddings=40, initializer_range=0.3)).eval()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("llama"), make("llama")
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder/"model.safetensors", {"format": "pt"})
    return lambda **k: load_model(folder, **k)


def ask(*lengths): return [[dict(role="user", content=" ".join(WORDS[(7*n + i) % 60] for i in range(n)))] for n in lengths]


@torch.no_grad()
def alone(model, tokenizer, messages, n):
    "Greedy, one prompt, no cache, no batch: the plainest loop."
    ids = tokenizer(messages[0]["content"] + " a:", return_tensors="pt").input_ids
    T = ids.shape[1]
    while ids.shape[1] < T + n and ids[0, -1] not in stop_ids(model, tokenizer): ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    said = ids[0, T:-1] if ids[0, -1] in stop_ids(model, tokenizer) else ids[0, T:]
    return tokenizer.decode(said, skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_batch_answers_like_single_prompts_in_the_order_asked(tokenizer, family):
    model, conversations = make(family), ask(3, 11, 1, 7, 20, 2)
    model.train()
    answers = generate(model, tokenizer, conversations, max_new_tokens=12, batch_size=4)
    assert model.training
    model.eval()
    assert answers == [alone(model, tokenizer, c, 12) for c in conversations]
    assert len(set(answers)) > 1 and all(answers)


def test_stops_at_declared_end_tokens(tokenizer):
    model, conversations = make("llama"), ask(3, 9)
    plain = generate(model, tokenizer, conversations, max_new_tokens=8)
    end = plain[0].split()[2]
    model.generation_config.eos_token_id = [0, tokenizer.convert_tokens_to_ids(end)]
    assert generate(model, tokenizer, conversations, max_new_tokens=8)[0].split() == plain[0].split()[:plain[0].split().index(end)]
    assert "".join(stream(model, tokenizer, conversations[0], max_new_tokens=8)).split() == plain[0].split()[:plain[0].split().index(end)]


def test_stops_at_the_end_that_the_template_writes(tokenizer):
    """EOS is another token, and the model declares none: an answer ends with what ends answers in training."""
    from copy import deepcopy

    model, conversations = make("llama"), ask(3, 9)
    model.generation_config.eos_token_id = None
    plain = generate(model, tokenizer, conversations, max_new_tokens=8)
    own, end = deepcopy(tokenizer), plain[0].split()[2]
    own.add_special_tokens({"additional_special_tokens": [end]})
    own.chat_template = "{% for m in messages %}{{ m['content'] }} {{ '" + end + " ' if m['role'] == 'assistant' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    assert stop_ids(model, own) == [0, tokenizer.convert_tokens_to_ids(end)] and stop_ids(model, tokenizer) == [0]
    said = plain[0].split()[:plain[0].split().index(end)]
    assert generate(model, own, conversations, max_new_tokens=8)[0].split() == "".join(stream(model, own, conversations[0], max_new_tokens=8)).split() == said


def test_the_models_own_settings_do_not_leak_in(tokenizer, caplog, recwarn):
    model, conversations = make("llama"), ask(3, 9)
    plain = generate(model, tokenizer, conversations, max_new_tokens=8)
    for name, value in dict(do_sample=True, temperature=0.1, top_p=0.5, top_k=3, repetition_penalty=5.0).items(): setattr(model.generation_config, name, value)
    logging.getLogger("transformers").propagate = True
    assert generate(model, tokenizer, conversations, max_new_tokens=8) == plain
    drawn = {generate(model, tokenizer, ask(3), max_new_tokens=8, temperature=5.0, seed=s)[0] for s in range(5)}
    assert len(drawn) == 5
    assert not caplog.records and not [w for w in recwarn if "generation" in str(w.message)]


def test_a_seed_decides_the_draw_and_leaves_the_callers_generator(tokenizer):
    model = make("llama")
    torch.manual_seed(5); before = torch.get_rng_state()
    first = generate(model, tokenizer, ask(3, 4), max_new_tokens=8, temperature=2.0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(10)
    assert generate(model, tokenizer, ask(3, 4), max_new_tokens=8, temperature=2.0, seed=1) == first != generate(model, tokenizer, ask(3, 4), max_new_tokens=8, temperature=2.0, seed=2)


@pytest.mark.parametrize("settings, words", [(dict(max_new_tokens=20), "prompt 2 has 31 tokens.*lower max_new_tokens to 9"), (dict(max_new_tokens=0), "max_new_tokens"),
                                             (dict(batch_size=0), "batch_size"), (dict(temperature=-1), "temperature")])
def test_refusals(tokenizer, settings, words):
    with pytest.raises(UserError, match=words): generate(make("llama"), tokenizer, ask(3, 30), **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_dequantized_is_equal_to_the_bit_and_leaves_no_trace(packed, dtype, double_quant):
    model = add_lora(packed(dtype=dtype, double_quant=double_quant), r=4, seed=0).eval()
    with torch.no_grad():
        for p in lora_parameters(model).values(): p += 0.02
        ids, before = torch.arange(20).reshape(2, 10), packed_hash(model)
        expected = model(ids).logits
        methods = {name: m.__dict__.get("forward") for name, m in model.named_modules()}
        with pytest.raises(KeyboardInterrupt), dequantized(model):
            assert torch.equal(model(ids).logits, expected)
            raise KeyboardInterrupt
        assert torch.equal(model(ids).logits, expected)
    assert packed_hash(model) == before and {name: m.__dict__.get("forward") for name, m in model.named_modules()} == methods


def test_dequantized_computes_in_the_layers_own_dtype(packed):
    model = packed(dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.down_proj
    layer.compute_dtype = torch.float32
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        expected = layer(x)
        with dequantized(model): assert torch.equal(layer(x), expected)


def test_dequantized_decodes_once(packed, monkeypatch):
    import qlora_kit.model.linear as module
    calls = []
    monkeypatch.setattr(module, "dequantize_4bit", lambda *a, f=module.dequantize_4bit: calls.append(1) or f(*a))
    model = packed()
    with torch.no_grad(), dequantized(model):
        for _ in range(3): model(torch.arange(10)[None])
    assert len(calls) == 14


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_stream_says_what_generate_says(tokenizer, family):
    model = make(family)
    for c in ask(3, 11, 20):
        assert "".join(stream(model, tokenizer, c, max_new_tokens=12)) == generate(model, tokenizer, [c], max_new_tokens=12)[0] == alone(model, tokenizer, c[:1], 12)


def test_a_stream_computes_one_token_a_step_and_leaves_the_model_as_it_was(tokenizer, caplog):
    model, widths = make("llama").train(), []
    logging.getLogger("transformers").propagate = True
    model.register_forward_pre_hook(lambda m, a, k: widths.append(k["input_ids"].shape[1]), with_kwargs=True)
    pieces = stream(model, tokenizer, ask(5)[0], max_new_tokens=4)
    next(pieces)
    assert not model.training and torch.is_grad_enabled()
    pieces.close()
    assert model.training
    list(stream(model, tokenizer, ask(5)[0], max_new_tokens=4))
    assert widths == [6, 6, 1, 1, 1] and not caplog.records


def test_a_streams_seed_is_its_own(tokenizer):
    model, before = make("llama"), torch.get_rng_state()
    said = lambda seed, **k: "".join(stream(model, tokenizer, ask(3)[0], max_new_tokens=8, temperature=2.0, seed=seed, **k))
    assert said(1) == said(1) != said(2) and said(None) != said(None) and said(1, top_p=1e-6) == "".join(stream(model, tokenizer, ask(3)[0], max_new_tokens=8))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_draw_follows_temperature_and_nucleus():
    generator, p = torch.Generator().manual_seed(0), torch.tensor([0.1, 0.6, 0.3])
    share = lambda t, top_p: torch.bincount(torch.tensor([draw_token(p.log(), t, top_p, generator) for _ in range(4000)]), minlength=3) / 4000
    torch.testing.assert_close(share(1.0, 1.0), p, rtol=0, atol=0.04) # four standard deviations of 4000 draws
    torch.testing.assert_close(share(1.0, 0.9), torch.tensor([0, 2/3, 1/3]), rtol=0, atol=0.04)
    torch.testing.assert_close(share(2.0, 1.0), p.sqrt()/p.sqrt().sum(), rtol=0, atol=0.04)
    assert share(1.0, 0.6)[1] == 1 and draw_token(p.log(), 0, 1.0, generator) == 1


def test_half_a_character_is_never_shown(tiny_llama):
    from qlora_kit.model.base import load_tokenizer

    tokenizer = load_tokenizer(tiny_llama) # a token for each byte
    ids = iter(tokenizer("x茶€!", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id])

    class Says(torch.nn.Module):
        config, device, generation_config = LlamaConfig(max_position_embeddings=100), torch.device("cpu"), make("llama").generation_config
        def get_input_embeddings(self): return None
        def forward(self, input_ids, **_):
            from transformers.modeling_outputs import CausalLMOutputWithPast
            return CausalLMOutputWithPast(logits=torch.nn.functional.one_hot(torch.tensor([[next(ids)]]), len(tokenizer)).float())

    assert [p for p in stream(Says(), tokenizer, ask(1)[0], max_new_tokens=20) if p] == ["x", "茶", "€", "!"]


@pytest.mark.parametrize("settings, words", [(dict(top_p=0), "top_p: received 0"), (dict(top_p=1.1), "top_p"), (dict(max_new_tokens=20), "lower max_new_tokens to 9"), (dict(temperature=-1), "temperature")])
def test_a_stream_refuses_what_generate_refuses(tokenizer, settings, words):
    with pytest.raises(UserError, match=words): next(stream(make("llama"), tokenizer, ask(30)[0], **settings))


class Screen(io.StringIO):
    def __init__(self, terminal): super().__init__(); self.terminal = terminal
    def isatty(self): return self.terminal


@pytest.mark.parametrize("terminal, quiet, rank, shown", [(True, False, "0", True), (False, False, "0", False), (True, True, "0", False), (True, False, "1", False)])
def test_a_bar_is_drawn_only_where_somebody_watches(monkeypatch, terminal, quiet, rank, shown):
    import time

    monkeypatch.setattr(sys, "stderr", Screen(terminal))
    monkeypatch.setenv("RANK", rank)
    assert list(progress(range(3), "quick", quiet)) == [0, 1, 2] and sys.stderr.getvalue() == ""
    for _ in progress(range(14), "slow work", quiet): time.sleep(0.1)
    assert ("slow work" in sys.stderr.getvalue()) == shown and (sys.stderr.getvalue() == "") != shown


def test_answers_are_written_without_cudnn(tokenizer, monkeypatch):
    """It would make a plan for each new token (page 02); whoever calls finds the setting as it was, between two pieces too."""
    model, seen, allowed = make("llama"), [], torch.backends.cuda.cudnn_sdp_enabled
    forward = model.forward

    def watch(*args, **kwargs):
        seen.append(allowed())
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", watch)
    generate(model, tokenizer, ask(3), max_new_tokens=3, quiet=True)
    n = len(seen)
    for _ in stream(model, tokenizer, ask(3)[0], max_new_tokens=3):
        assert allowed()
    assert n >= 1 and len(seen) > n and not any(seen) and allowed()
