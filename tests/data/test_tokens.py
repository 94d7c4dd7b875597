"tokens: what no template, no script and no truncation may change about the targets."
import re
from pathlib import Path

import pytest
from rich.text import Text
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora_kit.data.rows import Conversation
from qlora_kit.data.files import UserError
from qlora_kit.data.tokens import (
    encode, encode_all, encode_stream, encode_turns, end_tokens, ensure_template, ExampleFile,
    prompt_ids, show_targets, target_text, TEMPLATES)

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA2 = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
          "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}")
PHI3 = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}")
OPEN = "{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
ANSWERS = ["Paris.", "法国的首都是巴黎。", '{"商品": "茶", "日": "2024-03-05"}', "👍🏽 is é\n\nand more", "   leading and trailing \n"]


def tokenizer(template=None, bos=False, trim_offsets=False, rstrip=False):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(["user assistant Paris."] * 3, trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.add_special_tokens([AddedToken(s, special=True, rstrip=rstrip and s == "<|im_end|>") for s in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")])
    t.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if bos: t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", t.token_to_id("<s>"))])
    return ensure_template(PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", chat_template=template))


def talk(*answers):
    return [m for a in answers for m in ({"role": "user", "content": "问 </ >?"}, {"role": "assistant", "content": a})]


def learned(tok, example):
    "Each run of targets, decoded."
    runs, previous = [], False
    for token, target in zip(example.ids, example.targets):
        if target: runs = runs[:-1] + [runs[-1] + [token]] if previous else runs + [[token]]
        previous = target
    return [tok.decode(run) for run in runs]


@pytest.mark.parametrize("template,end", [(None, "</s>"), (CHATML, "<|im_end|>"), (LLAMA2, "</s>"), (PHI3, "<|im_end|>"), (OPEN, "</s>")])
@pytest.mark.parametrize("options", [{}, {"trim_offsets": True}, {"bos": True}, {"rstrip": True}])
def test_targets_are_the_answers_with_their_end(template, end, options):
    tok = tokenizer(template, **options)
    runs = learned(tok, encode(tok, talk(*ANSWERS)))
    assert len(runs) == len(ANSWERS)
    for run, answer in zip(runs, ANSWERS):
        assert run.endswith(end) and run.count(end) == 1
        assert run.removesuffix(end).strip() == answer.strip()


@pytest.mark.parametrize("template", [None, CHATML, LLAMA2, PHI3, OPEN])
def test_prompt_begins_every_training_sequence(template):
    tok, messages = tokenizer(template, bos=True), talk("巴黎", "Rome", "x")
    ids = encode(tok, messages).ids
    for i in (1, 3, 5):
        prompt = prompt_ids(tok, messages[:i])
        assert ids[:len(prompt)] == prompt and not any(encode(tok, messages).targets[len(prompt)-1:len(prompt)])
        assert encode(tok, messages).targets[len(prompt)]


@pytest.mark.parametrize("template", [None, LLAMA2])
def test_one_bos(template):
    tok = tokenizer(template, bos=True)
    assert encode(tok, talk("x", "y")).ids.count(tok.bos_token_id) == 1


def test_template_that_appends_nothing_is_transformers_own_text():
    tok = tokenizer(CHATML)
    assert encode(tok, talk(*ANSWERS)).ids == tok.apply_chat_template(talk(*ANSWERS))["input_ids"]


def test_rows_cut_before_their_answer_are_named():
    tok = tokenizer()
    long = [{"role": "user", "content": "why " * 50}, {"role": "assistant", "content": "so"}]
    kept, dropped = encode_all(tok, [Conversation(long, "a row 1"), Conversation(talk("yes"), "a row 2")], max_length=60)
    assert [e.where for e in kept] == ["a row 2"] and dropped == ["a row 1"]
    assert all(len(e.ids) == len(e.targets) <= 60 for e in kept)
    with pytest.raises(UserError, match="max_length: received 5"): encode_all(tok, [Conversation(long, "a row 1")], max_length=5)


def test_rewriting_template_is_reported_by_name():
    tok = tokenizer("{% for m in messages %}{{ m.content if loop.last else m.content.split('</think>')[-1] }}{{ eos_token }}{% endfor %}")
    tok.name_or_path = "org/forgetful"
    with pytest.raises(UserError, match="here: tokenizer forgetful.*message 2 of 4"): encode(tok, talk("<think>x</think>y", "z"), where="here")


def test_views_show_every_character_once():
    tok = tokenizer(CHATML)
    example = encode(tok, talk("[bold]巴黎</b>\\", "👍🏽"))
    text = tok.decode(example.ids).replace("\n", "↵\n")
    assert Text.from_markup(target_text(tok, example)).plain == text
    html = show_targets(tok, example)
    assert "巴" in html and "👍" in html and "&lt;" in html and "</b" not in html and "\ufffd" not in html


# ---- templates of known families: rendered text and targets, literally

FILES = Path(__file__).parents[1]/"fixtures/templates"
SPECIAL = {"qwen2_5": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "mistral_nemo": ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
           "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"]}
SPECIAL |= {"gptoss": ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"], "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"],
            "glm4moe": ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"]}
SPECIAL |= {name: sorted(set(re.findall("<｜[^｜<>]+｜>", (FILES/f"{name}.jinja").read_text(encoding="utf-8"))) | {"<｜end▁of▁sentence｜>"})
            for name in ("deepseekv3", "deepseek_r1_distill")}
SPECIAL |= {"qwen3_5_think": SPECIAL["qwen2_5"], "qwen3_5_nothink": SPECIAL["qwen2_5"]}
SPECIAL |= {"qwen3": SPECIAL["qwen2_5"], "qwen2_5_training": SPECIAL["qwen2_5"], "chatml": SPECIAL["qwen2_5"]}
BOS = {"mistral_nemo": "<s>", "llama3": "<|begin_of_text|>", "gemma": "<bos>"}
EOS = {"mistral_nemo": "</s>", "llama3": "<|eot_id|>", "gemma": "</s>", "deepseekv3": "<｜end▁of▁sentence｜>", "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
       "gptoss": "<|return|>", "glm4moe": "<|endoftext|>", "phi3": "<|endoftext|>"}
SYSTEM = {"role": "system", "content": "Be brief."}
TWO = [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris."},
       {"role": "user", "content": "And Italy?"}, {"role": "assistant", "content": "Rome."}]


def family(name):
    "A byte-level tokenizer with the special tokens of a family, its template, and its BOS before every text."
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator([], trainers.BpeTrainer(vocab_size=256, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.add_special_tokens([AddedToken(x, special=True) for x in ("<s>", "</s>", *SPECIAL[name])])
    bos = BOS.get(name)
    if bos: t.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, t.token_to_id(bos))])
    tok = PreTrainedTokenizerFast(tokenizer_object=t, bos_token=bos, eos_token=EOS.get(name, "<|im_end|>"))
    return ensure_template(tok, name if name in TEMPLATES else str(FILES/f"{name}.jinja"))


RENDERED = {
    "qwen2_5": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\n«Paris.<|im_end|>»\n"
               "<|im_start|>user\nAnd Italy?<|im_end|>\n<|im_start|>assistant\n«Rome.<|im_end|>»\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nCapital of France?<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n«Paris.<|eot_id|>»<|start_header_id|>user<|end_header_id|>\n\nAnd Italy?<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n«Rome.<|eot_id|>»",
    "gemma": "<bos><start_of_turn>user\nBe brief.\n\nCapital of France?<end_of_turn>\n<start_of_turn>model\n«Paris.<end_of_turn>»\n"
             "<start_of_turn>user\nAnd Italy?<end_of_turn>\n<start_of_turn>model\n«Rome.<end_of_turn>»\n",
}
RENDERED["chatml"] = RENDERED["qwen2_5"]


def marked(tok, example):
    "The text of an example with its targets in « »."
    text, previous = "", False
    for i, t in [*zip(example.ids, example.targets), (None, False)]:
        text += ("«" if t and not previous else "»" if previous and not t else "") + (tok.decode([i]) if i is not None else "")
        previous = t
    return text


@pytest.mark.parametrize("name", RENDERED)
def test_family_is_rendered_and_marked_to_the_letter(name):
    tok = family(name)
    assert marked(tok, encode(tok, [SYSTEM, *TWO])) == RENDERED[name]
    last = RENDERED[name].rpartition("«")[0].replace("«", "").replace("»", "") + "«" + RENDERED[name].rpartition("«")[2]
    assert marked(tok, encode(tok, [SYSTEM, *TWO], loss_on="completion")).rstrip("\n") == last.rstrip("\n")
    everything = encode(tok, [SYSTEM, *TWO], loss_on="all")
    assert everything.targets == [False] + [True]*(len(everything.ids) - 1)


def test_mistral_moves_the_system_prompt_to_the_last_question():
    tok = family("mistral_nemo")
    assert marked(tok, encode(tok, TWO)) == "<s>[INST]Capital of France?[/INST]«Paris.</s>»[INST]And Italy?[/INST]«Rome.</s>»"
    first, second = encode_turns(tok, Conversation([SYSTEM, *TWO], "f.json row 3"))
    assert marked(tok, first) == "<s>[INST]Be brief.\n\nCapital of France?[/INST]«Paris.</s>»"
    assert marked(tok, second) == "<s>[INST]Capital of France?[/INST]Paris.</s>[INST]Be brief.\n\nAnd Italy?[/INST]«Rome.</s>»"
    assert first.where == second.where == "f.json row 3"
    for messages, example in ((TWO[:1], first), (TWO[:3], second)):
        prompt = prompt_ids(tok, [SYSTEM, *messages])
        assert example.ids[:len(prompt)] == prompt and example.targets == [False]*len(prompt) + [True]*(len(example.ids) - len(prompt))


def test_qwen3_keeps_every_thought_where_it_is_learned():
    tok = family("qwen3")
    thought = [TWO[0], {"role": "assistant", "content": "<think>Geography.</think>Paris."}, TWO[2], {"role": "assistant", "content": "Rome.", "reasoning_content": "Again."}]
    first, second = encode_turns(tok, Conversation(thought, "f"))
    assert marked(tok, first).rstrip() == ("<|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\n"
                                           "«<think>\nGeography.\n</think>\n\nParis.<|im_end|>»")
    assert marked(tok, second) == ("<|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>\n"
                                   "<|im_start|>user\nAnd Italy?<|im_end|>\n<|im_start|>assistant\n«<think>\nAgain.\n</think>\n\nRome.<|im_end|>»")
    for k, example in ((1, first), (3, second)):
        assert example.ids == tok.apply_chat_template(thought[:k+1])["input_ids"][:len(example.ids)]
        prompt = prompt_ids(tok, thought[:k])
        assert example.ids[:len(prompt)] == prompt and example.targets.index(True) == len(prompt)
    assert len(encode_turns(tok, Conversation(thought[:2], "f"))) == 1


SCHEMA = [{"type": "function", "function": {"name": "weather", "description": "Now", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]
USED = [{"role": "user", "content": "Rain in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]},
        {"role": "tool", "tool_call_id": "call00001", "content": "sun"}, {"role": "assistant", "content": "No, sun."}]


def test_tool_calls_are_learned_and_tool_answers_only_read():
    qwen, mistral = family("qwen2_5"), family("mistral_nemo")
    text = marked(qwen, encode(qwen, [SYSTEM, *USED], tools=SCHEMA))
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in text
    assert text.endswith('<|im_start|>user\nRain in Oslo?<|im_end|>\n<|im_start|>assistant\n«<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>»\n'
                         "<|im_start|>user\n<tool_response>\nsun\n</tool_response><|im_end|>\n<|im_start|>assistant\n«No, sun.<|im_end|>»\n")
    assert marked(mistral, encode(mistral, USED)) == (
        '<s>[INST]Rain in Oslo?[/INST]«[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}, "id": "call00001"}]</s>»'
        '[TOOL_RESULTS]{"content": sun, "call_id": "call00001"}[/TOOL_RESULTS]«No, sun.</s>»')


def test_qwen3_splits_a_tool_loop_that_it_renders_anew():
    tok = family("qwen3")
    call, answer = encode_turns(tok, Conversation(USED, "f", tools=SCHEMA))
    assert marked(tok, call).rstrip().endswith('assistant\n«<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>»')
    assert marked(tok, answer).endswith("<tool_response>\nsun\n</tool_response><|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nNo, sun.<|im_end|>»")


@pytest.mark.parametrize("messages, tools", [(TWO, None), ([SYSTEM, *TWO], None), ([SYSTEM, *USED], SCHEMA), (talk(*ANSWERS[:4]), None)])
def test_targets_are_transformers_own_assistant_mask(messages, tools):
    "trl's template marks what the assistant says; transformers makes a mask of it. It counts the template's line breaks on both sides of an answer, we don't."
    tok, marks = family("qwen2_5"), family("qwen2_5_training")
    reference = marks.apply_chat_template(messages, tools=tools, return_assistant_tokens_mask=True, return_dict=True)
    example, newline, end = encode(tok, messages, tools=tools), tok("\n")["input_ids"][0], tok.convert_tokens_to_ids("<|im_end|>")
    ids, mask = reference["input_ids"], [bool(m) for m in reference["assistant_masks"]]
    mask = [m and not (i == newline and (ids[k-1] == end or not mask[k-1])) for k, (m, i) in enumerate(zip(mask, ids))]
    assert (example.ids, example.targets) == (reference["input_ids"], mask)


@pytest.mark.parametrize("name, messages, told", [
    ("gemma_refuses", [SYSTEM, *TWO], "roles system, user, assistant, user, assistant: System role not supported"),
    ("mistral_nemo", [*TWO[:2], TWO[1]], "roles must alternate"),
    ("mistral_nemo", [USED[0], USED[1] | {"content": "I look."}], "does not write all that message 2 of 2 says"),
    ("chatml", USED, "refuses|does not write all that message 2 of 4 says"),
    ("deaf", [*TWO, {"role": "tool", "content": "sun"}], "leaves out message 5 of 5"),
    ("broken", TWO, "line 2 of its chat template is not valid Jinja")])
def test_what_a_template_cannot_say_is_refused_with_the_row(name, messages, told):
    tok = family("gemma" if name == "gemma_refuses" else name if name in SPECIAL else "chatml")
    if name == "gemma_refuses": tok.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + tok.chat_template
    if name == "deaf": tok.chat_template = CHATML.replace("for m in messages", "for m in messages if m.role != 'tool'")
    if name == "broken": tok.chat_template = "\n{% for m in %}"
    with pytest.raises(UserError, match=f"chat.json row 4: tokenizer .*({told})"): encode_all(tok, [Conversation(messages, "chat.json row 4")], 512)


def test_named_template_wants_its_tokens_and_ends_where_it_says(tmp_path):
    with pytest.raises(UserError, match="gemma writes the special tokens <end_of_turn>, <start_of_turn>"): ensure_template(tokenizer(CHATML), "gemma")
    with pytest.raises(UserError, match="received 'no/such.jinja'.*allowed: headings, plain"): ensure_template(tokenizer(CHATML), "no/such.jinja")
    assert tokenizer(CHATML).eos_token == "</s>" and ensure_template(tokenizer(OPEN), "chatml").eos_token == "<|im_end|>"
    (tmp_path/"mine.jinja").write_text(LLAMA2, encoding="utf-8")
    assert ensure_template(tokenizer(CHATML), str(tmp_path/"mine.jinja")).chat_template == LLAMA2
    plain = ensure_template(tokenizer(bos=True), "plain")
    assert marked(plain, encode(plain, [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}])) == "<s>2+2=«4</s>»"


def test_plain_text_is_divided_and_all_of_it_learned():
    tok, text = tokenizer(bos=True), "Ein Satz. 一句话。" * 30
    parts, = [encode_turns(tok, Conversation([{"role": "text", "content": text}], "a.txt paragraph 1"), 100)]
    ids = [i for part in parts for i in part.ids]
    assert ids == [*tok(text)["input_ids"], tok.eos_token_id] and ids[0] == tok.bos_token_id
    assert all(len(p.ids) <= 100 and p.targets == [False] + [True]*(len(p.ids)-1) for p in parts) and len(parts) == -(-len(ids)//100)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_end_of_a_text_that_fills_its_parts_is_learned(k):
    """k × max_length tokens and EOS: one token alone has nothing to be predicted from, so it gets the one before it."""
    tok = tokenizer()
    text = "ab" * 200
    size = len(tok(text)["input_ids"])
    size, text = 20, tok.decode(tok(text)["input_ids"][:20*k])
    assert len(tok(text)["input_ids"]) == size*k
    parts = encode_turns(tok, Conversation([{"role": "text", "content": text}], "a.txt"), size)
    taught = [i for part in parts for i, t in zip(part.ids, part.targets) if t]
    assert taught[-1] == tok.eos_token_id and all(any(p.targets) for p in parts) and len(parts[-1].ids) == 2


def test_examples_on_disk_are_the_examples_in_memory(tmp_path):
    tok = tokenizer(CHATML)
    rows = [Conversation(talk(*ANSWERS[i % 4:]), f"row {i}") for i in range(50)] + [Conversation([{"role": "user", "content": "w"*400}, TWO[1]], "long")]
    kept, dropped = encode_all(tok, rows, 200, "completion")
    stored, left = encode_stream(tok, iter(rows), 200, loss_on="completion", folder=tmp_path)
    assert list(stored) == kept and [stored[i] for i in range(len(stored))] == kept and left == dropped == [*dropped[:-1], "long"]
    assert stored[-1] == kept[-1] and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(IndexError): stored[len(kept)]
    del stored
    assert not list(tmp_path.iterdir()) and len(ExampleFile([])) == 0
    with pytest.raises(UserError, match="max_length: received 9"): encode_stream(tok, iter(rows), 9)


def test_a_prompt_that_opens_answers_in_its_own_way_is_the_one_learned_from():
    "The heading of the prompt, not that of the rendered answer, is what generation will see."
    tok = tokenizer(CHATML.replace("<|im_start|>assistant\n{%", "<|im_start|>reply   \n{%"))
    (one,) = encode_turns(tok, Conversation(TWO[:2], "f"))
    assert marked(tok, one) == "<|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>reply   \n«Paris.<|im_end|>»"
    assert one.ids[:one.targets.index(True)] == prompt_ids(tok, TWO[:1])


# ---- the token that ends an answer: the one learned is the one that stops

def last_learned(tok, messages, tools=None):
    example = encode_turns(tok, Conversation(messages, "f", tools=tools))[-1]
    return tok.convert_ids_to_tokens([i for i, t in zip(example.ids, example.targets) if t][-1])


@pytest.mark.parametrize("name, eos, words, call, all_ends", [
    ("qwen2_5", "<|endoftext|>", "<|im_end|>", "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]), # as Qwen's base models
    ("qwen2_5", "<|im_end|>", "<|im_end|>", "<|im_end|>", ["<|im_end|>"]),
    ("qwen3", "<|endoftext|>", "<|im_end|>", "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
    ("chatml", "<|endoftext|>", "<|im_end|>", None, ["<|im_end|>", "<|endoftext|>"]),
    ("llama3", "</s>", "<|eot_id|>", None, ["<|eot_id|>", "</s>"]),
    ("gemma", "</s>", "<end_of_turn>", None, ["<end_of_turn>", "</s>"]),
    ("mistral_nemo", "</s>", "</s>", "</s>", ["</s>"]),
    ("phi3", "<|endoftext|>", "<|end|>", None, ["<|end|>", "<|endoftext|>"]), # writes EOS behind everything as well
    ("gptoss", "<|return|>", "<|return|>", "<|call|>", ["<|return|>", "<|call|>"]), # <|end|> ends a thought, and earlier answers
    ("glm4moe", "<|endoftext|>", "<|endoftext|>", "<|endoftext|>", ["<|endoftext|>"])]) # leaves answers open
def test_what_is_learned_last_is_what_stops(name, eos, words, call, all_ends):
    tok = family(name)
    tok.eos_token = eos
    assert end_tokens(tok) == all_ends
    assert last_learned(tok, TWO) == last_learned(tok, TWO[:2]) == words
    if call: assert last_learned(tok, USED[:2], SCHEMA) == call


def test_gpt_oss_ends_earlier_answers_otherwise_and_each_is_learned_as_the_last():
    tok = family("gptoss")
    tok.eos_token = "<|return|>"
    first, second = encode_turns(tok, Conversation(TWO, "f"))
    assert marked(tok, first).endswith("<|start|>assistant«<|channel|>final<|message|>Paris.<|return|>»")
    assert "Paris.<|end|><|start|>user" in marked(tok, second) and marked(tok, second).endswith("<|start|>assistant«<|channel|>final<|message|>Rome.<|return|>»")
    assert second.ids[:second.targets.index(True)] == prompt_ids(tok, TWO[:3])


def test_a_call_is_learned_to_its_last_argument():
    for name, eos, whole in (("gptoss", "<|return|>", '« to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>»'),
                             ("glm4moe", "<|endoftext|>", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call><|endoftext|>»")):
        tok = family(name)
        tok.eos_token = eos
        assert whole in marked(tok, encode_turns(tok, Conversation(USED[:2], "f", tools=SCHEMA))[0])


def test_an_answer_whose_prompt_opens_a_thought_closes_it():
    thinks = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content or '' }}"
              "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}")
    tok = tokenizer(thinks)
    say, call = (encode_turns(tok, Conversation(m, "f"))[0] for m in (TWO[:2], USED[:2]))
    assert marked(tok, say).endswith("assistant\n<think>\n«</think>Paris.<|im_end|>»")
    assert marked(tok, call).endswith('assistant\n<think>\n«</think><tool_call>weather {"city": "Oslo"}</tool_call><|im_end|>»')


TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}END{% endfor %}"
@pytest.mark.parametrize("template, ends", [
    (TURN.replace("END", "\n") + "<|im_start|>assistant\n", []), # always opens the next turn
    ("{% for m in messages %}{{ '<|im_end|>' if m.role == 'assistant' else '<|im_start|>' }}{{ m.content }}\n{% endfor %}<|im_end|>", []),
    (TURN.replace("END", "\n### "), []), # plain text
    (TURN.replace("END", "###<|im_end|>\n"), ["<|im_end|>"]),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}", ["<|im_end|>"]), # the same end for questions, and no heading
    ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.reasoning_content ~ '<|im_end|>' if m.reasoning_content else '' }}{{ m.content }}<|im_end|>{% endfor %}", []), # ends thoughts, too
    (TURN.replace("END", "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}<|im_end|>{% endfor %}"), [])]) # stands between calls, too
def test_what_opens_a_turn_or_stands_within_an_answer_ends_none(template, ends):
    tok = tokenizer(template)
    assert end_tokens(tok) == [*ends, "</s>"]
    assert last_learned(tok, TWO) == [*ends, "</s>"][0]


def test_an_end_that_is_no_special_token_counts_where_it_follows_at_once():
    tok = tokenizer(CHATML.replace("<|im_end|>", "<stop>"))
    tok.add_tokens([AddedToken("<stop>", special=False)])
    assert end_tokens(tok) == ["<stop>", "</s>"] and last_learned(tok, TWO) == "<stop>"


def test_a_tokenizer_without_eos_takes_the_end_of_its_template_or_says_what_a_config_can_do():
    def without(template, tok=None):
        tok = tok or tokenizer(CHATML)
        tok.eos_token, tok.pad_token, tok.chat_template = None, None, template
        return tok
    own = ensure_template(without(CHATML))
    assert own.eos_token == own.pad_token == "<|im_end|>" and last_learned(own, TWO) == "<|im_end|>"
    assert ensure_template(without(None), "chatml").eos_token == "<|im_end|>"
    for template in (None, OPEN):
        with pytest.raises(UserError, match="received no EOS token.*set data.template to chatml$"): ensure_template(without(template))
    with pytest.raises(UserError, match="set data.template to chatml$"): ensure_template(without(CHATML), "headings")
    bare = Tokenizer(models.BPE())
    with pytest.raises(UserError, match='add "eos_token" to tokenizer_config.json'): ensure_template(PreTrainedTokenizerFast(tokenizer_object=bare))


REWRITES = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content | truncate(3, True, '') }}")


@pytest.mark.parametrize("template", [None, CHATML, OPEN, REWRITES])
def test_turns_that_say_so_are_read_and_not_learned(template):
    """An answer with `train: false` is in the text, and no token of it is a target; with a template that rewrites, it gets no example of its own."""
    tok, said = tokenizer(template), talk("one.", "two.", "three.")
    quiet = [m | dict(train=False) if m["content"] == "two." else m for m in said]
    runs = [run for e in encode_turns(tok, Conversation(quiet)) for run in learned(tok, e)]
    assert [run.strip()[:3] for run in runs] == ["one", "thr"]
    if template != REWRITES: assert encode(tok, quiet).ids == encode(tok, said).ids
    last = [*said[:-1], said[-1] | dict(train=False)]
    assert not any(encode(tok, last, loss_on="completion").targets)
    with pytest.raises(UserError, match="not to be learned"): encode(tok, last, loss_on="all")


def test_a_thought_that_the_template_drops_is_an_error():
    """Two families, two names of the field; a template that writes it teaches it."""
    said = [*talk("four")[:-1], dict(role="assistant", content="four", reasoning_content="2 and 2")]
    with pytest.raises(UserError, match="leaves out reasoning_content of message 2 of 2"): encode(tokenizer(CHATML), said)
    writes = CHATML.replace("{{ m.content }}", "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}")
    tok = tokenizer(writes)
    assert learned(tok, encode(tok, said)) == ["<think>2 and 2</think>four<|im_end|>"]


# ---- an oracle: every piece that the assistant says is a word of its own, and each of them is learned once, nothing else is, and an end follows

def _calls(*cities): return [dict(id=f"call0000{i}", type="function", function=dict(name="weather", arguments=dict(city=city))) for i, city in enumerate(cities, 1)]
def _asks(text): return dict(role="user", content=text)
def _says(text, **more): return dict(role="assistant", content=text) | more
def _hears(text): return dict(role="tool", content=text, tool_call_id="call00001", name="weather")


SAID = {"answer": [_asks("kq"), _says("ka")], "two": [_asks("kq"), _says("ka"), _asks("kq"), _says("kb")],
        "thought": [_asks("kq"), _says("ka", reasoning_content="kr", thinking="kr")],
        "call": [_asks("kq"), _says("", tool_calls=_calls("kc"))], "no content": [_asks("kq"), _says(None, tool_calls=_calls("kc"))],
        "words and call": [_asks("kq"), _says("ka", tool_calls=_calls("kc"))], "two calls": [_asks("kq"), _says("", tool_calls=_calls("kc", "kd"))],
        "loop": [_asks("kq"), _says("", tool_calls=_calls("kc")), _hears("kt"), _says("ka")],
        "thoughtful loop": [_asks("kq"), _says("", reasoning_content="kr", thinking="kr", tool_calls=_calls("kc")), _hears("kt"), _says("ka", reasoning_content="ks", thinking="ks")]}
ORACLE = ["qwen2_5", "qwen3", "qwen3_5_think", "qwen3_5_nothink", "gptoss", "glm4moe", "mistral_nemo", "phi3", "deepseekv3", "deepseek_r1_distill", "llama3", "gemma", "chatml"]
TAUGHT = {"answer", "two"}
TEACHES = {"qwen2_5": {"call", "no content", "words and call", "two calls", "loop"}, "qwen3": set(SAID), "qwen3_5_think": set(SAID), "gptoss": set(SAID) - {"two calls"}, "glm4moe": set(SAID),
           "qwen3_5_nothink": {"call", "no content", "words and call", "two calls", "loop"}, "mistral_nemo": {"call", "no content", "two calls", "loop"},
           "deepseekv3": {"call", "no content", "words and call", "two calls", "loop"}}


@pytest.mark.parametrize("name", ORACLE)
@pytest.mark.parametrize("kind", SAID)
def test_all_that_is_said_is_learned_once_with_its_end_or_refused(name, kind):
    tok, messages = family(name), SAID[kind]
    tools = SCHEMA if any(m.get("tool_calls") for m in messages) else None
    if kind not in TAUGHT | TEACHES.get(name, set()):
        with pytest.raises(UserError, match="leaves out|does not write all|refuses|closes the thought"): encode_turns(tok, Conversation(messages, "f", tools=tools))
        return
    runs = [run for e in encode_turns(tok, Conversation(messages, "f", tools=tools)) for run in learned(tok, e)]
    said = [word for m in messages if m["role"] == "assistant"
            for word in (m.get("reasoning_content"), m["content"], *(c["function"]["arguments"]["city"] for c in m.get("tool_calls", []))) if word]
    assert sorted(re.findall(r"k[a-z]\b", "".join(runs))) == sorted(said)
    ends = end_tokens(tok)
    assert all(run.rstrip().endswith(tuple(ends)) and sum(map(run.count, ends)) == 1 for run in runs), runs


@pytest.mark.parametrize("name", [*ORACLE, "vicuna", "two line breaks"])
def test_the_prompt_is_a_prefix_of_the_row_at_every_answer(name):
    """Merges across the border, as real tokenizers have them: space and word, two line breaks. Before: 110 of these and other templates' prompts were no prefix."""
    ends_open = {"vicuna": "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}",
                 "two line breaks": "{% for m in messages %}{{ m.role }}\n\n{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"}
    tok = family(name if name in ORACLE else "chatml")
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trained.train_from_iterator(["ASSISTANT: Paris\n\n Paris. Rome\n Rome.\n\nRome <think>\n\nParis"] * 30, trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    trained.add_special_tokens([AddedToken(x, special=True) for x in ("<s>", "</s>", *SPECIAL.get(name, SPECIAL["chatml"]))])
    tok = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token=tok.eos_token, chat_template=ends_open.get(name, tok.chat_template))
    ensure_template(tok)
    for answer in ("Paris.", " Paris.", "\nParis."):
        said = [m | dict(content=answer) if m["role"] == "assistant" else m for m in TWO]
        examples = encode_turns(tok, Conversation(said, "f"))  # one for both answers, or one each
        for example, i in zip(examples*2 if len(examples) == 1 else examples, (1, 3)):
            prompt = prompt_ids(tok, said[:i])
            assert example.ids[:len(prompt)] == prompt and example.targets[len(prompt)] and not example.targets[len(prompt)-1]


def test_the_day_of_a_template_is_fixed_and_transformers_prints_the_same(monkeypatch):
    """gpt-oss prints today's date; the reference is transformers' own rendering on that day."""
    import datetime

    import transformers.utils.chat_template_utils as theirs

    from qlora_kit.data import tokens

    tok = family("gptoss")
    today = encode_turns(tok, Conversation(TWO, "f"))
    assert f"Current date: {datetime.date.today().isoformat()}" in marked(tok, today[0])
    tokens.set_date(tok, "2024-02-29")
    (first, _), prompt = encode_turns(tok, Conversation(TWO, "f")), prompt_ids(tok, TWO[:1])
    assert "Current date: 2024-02-29" in marked(tok, first) and first.ids[:len(prompt)] == prompt
    monkeypatch.setattr(theirs, "datetime", type("", (), dict(now=staticmethod(lambda: datetime.datetime(2024, 2, 29)))))
    theirs._compile_jinja_template.cache_clear()
    assert tok.apply_chat_template(TWO[:1], add_generation_prompt=True)["input_ids"] == prompt
    theirs._compile_jinja_template.cache_clear()
    with pytest.raises(UserError, match="received '29 Feb'"): tokens.set_date(tok, "29 Feb")
