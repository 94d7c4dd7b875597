"tokens: what no template, no script and no truncation may change about the targets."
import pytest
from rich.text import Text
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora_kit.data import Conversation, UserError
from qlora_kit.tokens import encode, encode_all, ensure_template, prompt_ids, show_targets, target_text

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
    with pytest.raises(UserError, match="tokenizer forgetful.*message 2 of 4"): encode(tok, talk("<think>x</think>y", "z"))


def test_views_show_every_character_once():
    tok = tokenizer(CHATML)
    example = encode(tok, talk("[bold]巴黎</b>\\", "👍🏽"))
    text = tok.decode(example.ids).replace("\n", "↵\n")
    assert Text.from_markup(target_text(tok, example)).plain == text
    html = show_targets(tok, example)
    assert "巴" in html and "👍" in html and "&lt;" in html and "</b" not in html and "\ufffd" not in html
