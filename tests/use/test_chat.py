import io
import sys

import pytest
import torch

from qlora_kit.use.chat import answer_both, base_only, SideBySide, talk
from qlora_kit.data.files import UserError
from qlora_kit.use.generate import generate
from qlora_kit.tools.commands import run_app
from qlora_kit.model.loader import load_model, packed_hash
from qlora_kit.model.base import load_tokenizer
from qlora_kit.model.lora import add_lora, lora_parameters, save_adapter


@pytest.fixture(scope="module")
def tuned(tiny_llama):
    model = add_lora(load_model(tiny_llama), r=4, alpha=8, seed=0).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in lora_parameters(model).items(): p += torch.randn_like(p)*0.3*("lora_B" in name)
    return model, load_tokenizer(tiny_llama)


def ask(text): return [dict(role="user", content=text)]


def test_both_sides_say_what_they_say_alone(tuned, tiny_llama):
    model, tokenizer = tuned
    steps = list(answer_both(model, tokenizer, ask("hello"), max_new_tokens=10))
    assert len(steps) > 3 and set(steps[-1]) == {"base", "adapter"}
    assert all(b[k].startswith(a[k]) for a, b in zip(steps, steps[1:]) for k in a)
    assert steps[-1]["adapter"] == generate(model, tokenizer, [ask("hello")], max_new_tokens=10)[0]
    assert steps[-1]["base"] == generate(load_model(tiny_llama), tokenizer, [ask("hello")], max_new_tokens=10)[0] != steps[-1]["adapter"]
    drawn = [list(answer_both(model, tokenizer, ask("hello"), max_new_tokens=10, temperature=1.5, top_p=0.9, seed=s))[-1] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("trainable", [True, False])
def test_the_switch_leaves_no_trace(tuned, trainable):
    model, tokenizer = tuned
    for p in lora_parameters(model).values(): p.requires_grad_(trainable)
    model.train()
    weights, packed, ids = {n: p.clone() for n, p in lora_parameters(model).items()}, packed_hash(model), torch.arange(10)[None]
    with torch.no_grad(): before = model(ids).logits
    forwards = {n: m.__dict__.get("forward") for n, m in model.named_modules()}
    for _ in answer_both(model, tokenizer, ask("hello"), max_new_tokens=6): pass
    stopped = answer_both(model, tokenizer, ask("hello"), max_new_tokens=6)
    next(stopped); next(stopped); stopped.close()
    with pytest.raises(KeyboardInterrupt), base_only(model): raise KeyboardInterrupt
    assert all(p.requires_grad is trainable for p in lora_parameters(model).values()) and model.training
    with torch.no_grad(): assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(p, weights[n]) for n, p in lora_parameters(model).items()) and packed_hash(model) == packed
    assert {n: m.__dict__.get("forward") for n, m in model.named_modules()} == forwards
    model.eval()


def test_without_an_adapter_there_is_nothing_to_compare(tiny_llama):
    with pytest.raises(UserError, match="has no adapter; put one on it"): next(answer_both(load_model(tiny_llama), load_tokenizer(tiny_llama), ask("hi")))


def test_text_is_text(tuned):
    comparison = SideBySide(*tuned, system="<script>alert(1)</script>")
    comparison.rows.append(("<img src=x onerror=alert(1)>", "<b>", '"</td><script>'))
    html = comparison.static()
    assert "<script" not in html and "<img" not in html and "<b>" not in html and "&lt;img src=x" in html
    list(comparison.ask("<i>", max_new_tokens=4))
    assert len(comparison.rows) == 2 and "question: <i>" in repr(comparison)


def test_a_table_where_widgets_are_not_installed(tuned, monkeypatch):
    comparison = SideBySide(*tuned)
    assert "application/vnd.jupyter.widget-view+json" in comparison._repr_mimebundle_()
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert "<table" in comparison._repr_mimebundle_()["text/html"]
    with pytest.raises(UserError, match="pip install"): comparison.widget()


def parts(widget, kind): return [w for w in every(widget) if type(w).__name__ == kind]


def every(widget):
    yield widget
    for child in getattr(widget, "children", ()): yield from every(child)


def wait(condition):
    import time

    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_widget_answers_stops_and_reports(tuned):
    comparison = SideBySide(*tuned)
    widget = comparison.widget()
    (question,), (state,), (answers,), (begin, stop) = (parts(widget, k) for k in ("Textarea", "Label", "HTML", "Button"))
    tokens = next(s for s in parts(widget, "IntSlider") if s.description == "max tokens")
    begin.click()
    assert "write a question first" in state.value and not begin.disabled
    question.value, tokens.value = "hello <b>", 6
    begin.click(); wait(lambda: not begin.disabled)
    assert state.value == "done" and stop.disabled and "hello &lt;b&gt;" in answers.value and len(comparison.rows) == 1
    tokens.value = 400
    begin.click(); wait(lambda: not stop.disabled); stop.click(); wait(lambda: not begin.disabled)
    assert state.value in ("stopped", "done") and len(comparison.rows) == 2
    tokens.value = 512
    begin.click(); wait(lambda: not begin.disabled)
    assert "lower max_new_tokens" in state.value and len(comparison.rows) == 2


def test_a_talk_remembers_until_it_is_told_to_forget(tuned):
    model, tokenizer = tuned
    said = []
    messages = talk(model, tokenizer, iter(["a\n", "\n", "b\n", "/reset\n", "c\n", "/exit\n", "d\n"]), said.append, system="s", max_new_tokens=5)
    system = dict(role="system", content="s")
    assert [m["content"] for m in messages][:2] == ["s", "c"] and len(messages) == 3
    answers = "".join(said).split("\n")
    first = generate(model, tokenizer, [[system, *ask("a")]], max_new_tokens=5)[0]
    assert answers == [first, generate(model, tokenizer, [[system, *ask("a"), dict(role="assistant", content=first), *ask("b")]], max_new_tokens=5)[0],
                       generate(model, tokenizer, [[system, *ask("c")]], max_new_tokens=5)[0], ""]


def test_a_turn_that_cannot_be_answered_is_forgotten_or_ends_the_talk(tuned):
    model, tokenizer = tuned
    errors, lines = [], ["x "*600, "hi"]
    messages = talk(model, tokenizer, lines, lambda p: None, forgive=errors.append, max_new_tokens=4)
    assert [m["content"] for m in messages][0] == "hi" and "shorten the prompt" in str(errors[0])
    with pytest.raises(UserError, match="shorten the prompt"): talk(model, tokenizer, lines, lambda p: None, max_new_tokens=4)


def test_ctrl_c_ends_an_answer_and_not_the_talk(tuned):
    model, tokenizer = tuned
    said = []
    def write(piece):
        said.append(piece)
        if len(said) == 2: raise KeyboardInterrupt
    messages = talk(model, tokenizer, ["a", "b"], write, max_new_tokens=6)
    assert len(messages) == 4 and messages[1]["content"] == "".join(said[:2])


def test_the_command_reads_lines_from_a_pipe(tuned, tmp_path, monkeypatch, capsys, tiny_llama):
    model, tokenizer = tuned
    adapter = save_adapter(model, tokenizer, tmp_path/"adapter", base_model=str(tiny_llama))
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n/reset\na\n"))
    assert run_app(["chat", str(adapter), "--max-new-tokens", "6"]) == 0
    answer = generate(model, tokenizer, [ask("a")], max_new_tokens=6)[0]
    out = capsys.readouterr()
    assert out.out == f"{answer}\n{answer}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n"))
    assert run_app(["chat", str(adapter), "--top-p", "0"]) == 2
    assert "top_p: received 0" in capsys.readouterr().err
