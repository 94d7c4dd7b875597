import json
import math
from io import StringIO

import pytest
import torch
from rich.console import Console

from qlora_kit.data.batches import pad
from qlora_kit.data.rows import Conversation
from qlora_kit.data.files import UserError
from qlora_kit.use.evaluate import (
    before_after_table, evaluate, evaluate_loss, exact_match, field_scores, perplexity,
    score_answers)
from qlora_kit.tools.commands import run_app
from qlora_kit.model.loader import load_model
from qlora_kit.model.base import load_tokenizer
from qlora_kit.data.tokens import Example

RECORD = '{"item": "茶", "amount": {"value": 2, "unit": "kg"}, "tags": ["a", "b"]}'


def batch(*targets):
    "One row per number: that many targets after one prompt token."
    return pad([Example([1]*(n + 1), [False] + [True]*n, "") for n in targets], 0)


def test_every_target_weighs_the_same_over_batches_and_ranks():
    per_target = {3: 1.0, 20: 5.0}
    forward = lambda b: torch.tensor(sum(n*per_target[n] for n in (b["labels"] != -100).sum(1).tolist()), requires_grad=True)
    assert evaluate_loss(forward, [batch(3), batch(20, 20)]) == (pytest.approx((3 + 200)/43), 43)
    assert evaluate_loss(forward, iter([batch(3)]), total=lambda x: 2*x) == (1.0, 6)
    with pytest.raises(UserError, match="no target"): evaluate_loss(lambda b: 0.0, [])


def test_evaluation_builds_no_graph():
    weight, seen = torch.ones(1, requires_grad=True), []
    evaluate_loss(lambda b: seen.append((weight*2).requires_grad) or 1.0, [batch(3)])
    assert seen == [False]


def test_perplexity():
    assert perplexity(0) == 1 and perplexity(math.log(7)) == pytest.approx(7) and perplexity(1e4) == math.inf


@pytest.mark.parametrize("answer, right", [
    (RECORD, True), (' {"tags":["a","b"],"amount":{"unit":"kg","value":2.0},"item":"\\u8336"}\n', True),
    (RECORD.replace("2", "3"), False), (RECORD.replace("2", '"2"'), False), (RECORD.replace("2", "true"), False), (RECORD.replace("kg", "g"), False),
    (RECORD.replace('"a", "b"', '"b", "a"'), False), (RECORD.replace('"item": "茶"', '"item": "茶", "item": "茶"'), False),
    (RECORD.replace('"value": 2', '"value": 2, "value": 2'), False),
    (RECORD + ".", False), ("Answer: " + RECORD, False), (f"```json\n{RECORD}\n```", False), (RECORD[:-1], False), ("", False), ("[[["*5000, False), (RECORD + RECORD, False)])
def test_exact_match_of_records(answer, right): assert exact_match(answer, RECORD) is right


@pytest.mark.parametrize("answer, reference, right", [
    (" Paris.\n", "Paris.", True), ("Paris", "Paris.", False), ("1", "true", False), ("false", "0", False), ("NaN", "NaN", True), ("[1]", "[true]", False), ("42.0", "42", True)])
def test_exact_match_of_text(answer, reference, right): assert exact_match(answer, reference) is right


@pytest.mark.parametrize("answer, reference, right", [
    ("<think>\n\n</think>\n\n4", "4", True), ("\n</think>\n\n4", "4", True), ("<think>2 and 2</think>5", "4", False), ("<think>4", "4", False),
    ('</think>{"a": 1}', '{"a": 1}', True), ("<think>x</think>4", "<think>x</think>4", True), ("4", "<think>x</think>4", False)])
def test_a_thought_before_the_answer_is_not_compared(answer, reference, right): assert exact_match(answer, reference) is right


def test_fields_and_groups():
    references = ['{"a": 1, "b": "x"}', '{"a": 2, "b": "y"}', '{"a": 3, "b": "z"}', "plain"]
    answers = ['{"b": "x", "a": 1}', '{"a": 2, "b": "?", "c": 0}', "no idea", "plain "]
    table = field_scores(answers, references, ["en", "en", "zh", "zh"])
    assert table.columns.tolist() == ["en", "zh", "all", "rows"] and table.index.tolist() == ["is a record", "a", "b", "exact match"]
    assert table.loc["a"].tolist() == [1, 0, pytest.approx(2/3), 3]
    assert table.loc["b", "en"] == 0.5 and table.loc["exact match"].tolist() == [0.5, 0.5, 0.5, 4]
    assert table.loc["exact match", "all"] == score_answers(answers, references)
    assert field_scores(answers, references).columns.tolist() == ["all", "rows"]


@pytest.mark.parametrize("call", [lambda: score_answers(["a"], []), lambda: score_answers([], []), lambda: field_scores(["a"], ["a"], ["x", "y"]),
                                  lambda: before_after_table(["p"], ["b"], [], ["r"])])
def test_lists_must_belong_together(call):
    with pytest.raises(UserError, match="received"): call()


def test_table_shows_answers_word_for_word():
    out = StringIO()
    Console(file=out, width=100).print(before_after_table(["[red]hi[/red]"], ["[/b]"], ["4"], ["4"]))
    assert all(x in out.getvalue() for x in ("[red]hi[/red]", "✗ [/b]", "✓ 4"))


def row(question, answer, **more): return Conversation([dict(role="user", content=question), dict(role="assistant", content=answer)], question, **more)


def test_a_model_is_scored_like_a_plain_forward_pass(tiny_llama):
    model, tokenizer = load_model(tiny_llama), load_tokenizer(tiny_llama)
    model.train()
    rows = [row(f"{i} "*i, "1 2 3 "*i) for i in range(1, 8)] + [Conversation([dict(role="text", content="only words")], "text")]
    reports = [evaluate(model, tokenizer, rows, batch_size=b, ask=False) for b in (1, 3)]
    assert model.training and reports[0].loss == pytest.approx(reports[1].loss, rel=1e-6) and reports[0].questions == 0 and reports[0].exact_match is None
    model.eval()
    losses, targets = [], 0
    with torch.no_grad():
        for c in rows[:-1]:
            text = tokenizer.apply_chat_template(c.messages, tokenize=False)
            start = len(tokenizer(text[:text.index(c.messages[1]["content"])], add_special_tokens=False).input_ids)
            ids = tokenizer(text.rstrip("\n"), add_special_tokens=False, return_tensors="pt").input_ids
            losses.append(torch.nn.functional.cross_entropy(model(ids).logits[0, start - 1:-1], ids[0, start:], reduction="sum").item()); targets += ids.shape[1] - start
        ids = torch.tensor([tokenizer("only words").input_ids + [tokenizer.eos_token_id]])
        losses.append(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()); targets += ids.shape[1] - 1
    assert reports[0].targets == targets and reports[0].loss == pytest.approx(sum(losses)/targets, rel=1e-5)
    assert reports[0].perplexity == pytest.approx(math.exp(reports[0].loss))


def test_answers_are_asked_for_where_a_row_ends_in_words(tiny_llama):
    from qlora_kit.use.generate import generate

    model, tokenizer = load_model(tiny_llama), load_tokenizer(tiny_llama)
    said = generate(model, tokenizer, [[dict(role="user", content="a")]], max_new_tokens=19)[0]
    tool = row("c", "using it", tools=[{"type": "function", "function": {"name": "f"}}])
    report = evaluate(model, tokenizer, [row("a", said), row("b", "no"), tool, Conversation([dict(role="text", content="words")], "t")])
    assert (report.rows, report.questions, len(report.answers)) == (4, 2, 2) and report.answers[0].startswith(said)
    assert report.exact_match == sum(a.strip() == r.strip() for a, r in zip(report.answers, (said, "no")))/2


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama):
    """A run of a few steps with held-out rows."""
    import yaml

    from conftest import write_rows

    folder = tmp_path_factory.mktemp("evaluated")
    write_rows(folder/"rows.json"); write_rows(folder/"more.json", 5)
    (folder/"c.yaml").write_text(yaml.safe_dump({
        "model": {"base_model": str(tiny_llama), "lora_r": 4}, "data": {"train_file": "rows.json", "validation_split": 0.2},
        "training": {"max_steps": 6, "batch_size": 4, "learning_rate": 0.01, "max_length": 96, "output_dir": str(folder/"run")}}))
    assert run_app(["train", str(folder/"c.yaml")]) == 0
    return folder


def test_the_command_gives_the_validation_loss_of_the_run(run, capsys):
    assert run_app(["evaluate", str(run/"run"), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["loss"] == pytest.approx(json.loads((run/"run/summary.json").read_text())["best_val_loss"], rel=1e-5)
    assert out["questions"] == out["rows"] == len(out["answers"]) > 0 and out["exact_match"] is not None
    assert run_app(["evaluate", str(run/"run"), "--data", str(run/"more.json"), "--loss-only"]) == 0
    assert "of 5 rows\n" in capsys.readouterr().out


def test_other_rows_for_adapters_and_bases(run, tiny_llama, capsys):
    more = str(run/"more.json")
    for target in (run/"run/adapter", tiny_llama):
        assert run_app(["evaluate", str(target), "--data", more, "--json", "--loss-only"]) == 0
    assert run_app(["evaluate", str(tiny_llama)]) == 2 and run_app(["evaluate", str(run/"run"), "--data", "nowhere.json"]) == 2
    err = capsys.readouterr().err
    assert "no held-out rows; give some with --data" in err and "nowhere.json" in err and "Traceback" not in err


def test_an_answer_stops_where_its_template_ends_it(run_like_qwen, capsys):
    """The base's EOS is another token; training, evaluate, generate and chat stop at the one learned, also where no tokenizer lies beside the adapter."""
    import shutil

    run, rows = run_like_qwen/"run", str(run_like_qwen/"rows.json")
    assert json.loads((run/"summary.json").read_text())["score_after"] == 1
    foreign = run_like_qwen/"foreign"
    shutil.copytree(run/"adapter", foreign)
    for file in [*foreign.glob("*token*"), *foreign.glob("*.jinja"), foreign/"generation_config.json"]: file.unlink()
    for target in (run, run/"adapter", foreign):
        assert run_app(["evaluate", str(target), "--data", rows, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["exact_match"], report["answers"]) == (1, ["yes", "no", "12", "so"])
        assert run_app(["generate", str(target), "c?"]) == 0 and capsys.readouterr().out == "12\n"


def test_a_talk_stops_where_the_template_ends_an_answer(run_like_qwen, capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "stdin", StringIO("a?\n/reset\nb?\n"))
    assert run_app(["chat", str(run_like_qwen/"run"), "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out == "yes\nno\n"


def test_a_function_that_read_the_rows_reads_them_again_when_it_is_trusted(run, capsys, monkeypatch):
    """A run does not keep the function; the project where one works has it."""
    (run/"utils_of_evaluation.py").write_text("from qlora_kit.data.rows import load_rows\ndef read(path):\n    for row in load_rows(path): yield {'instruction': row['instruction'].upper(), 'output': row['output']}\n")
    monkeypatch.chdir(run)
    assert run_app(["train", "c.yaml", "data.load_dataset=utils_of_evaluation.read", "training.output_dir=hooked"]) == 0
    expected = json.loads((run/"hooked/summary.json").read_text())["best_val_loss"]
    capsys.readouterr()
    assert run_app(["evaluate", "hooked"]) == 2
    err = capsys.readouterr().err
    assert "config.yaml names data.load_dataset: utils_of_evaluation.read" in err and f"--trust-hooks runs read of {run/'utils_of_evaluation.py'}" in err
    assert run_app(["evaluate", "hooked", "--trust-hooks", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["loss"] == pytest.approx(expected, rel=1e-5) and "--trust-hooks: data.load_dataset runs read of utils_of_evaluation.py" in err
    losses = []
    for words in ([], ["--trust-hooks"]):  # other rows: by the kit, or by the function
        assert run_app(["evaluate", "hooked", "--data", "more.json", "--loss-only", "--json", *words]) == 0
        out, err = capsys.readouterr()
        losses.append(json.loads(out)["loss"])
        assert ("read without utils_of_evaluation.read" in err) == (not words)
    assert losses[0] != losses[1]
    monkeypatch.chdir("/")
    assert run_app(["evaluate", str(run/"hooked"), "--trust-hooks"]) == 2
    assert "there is no utils_of_evaluation.py in /" in capsys.readouterr().err


def test_an_adapter_that_nothing_tells_of_is_evaluated_as_any_other(tiny_llama, tiny_config, tmp_path, capsys):
    """PEFT's own adapters come without a record and without a run."""
    from qlora_kit.model.loader import load_model
    from qlora_kit.model.lora import add_lora, save_adapter

    save_adapter(add_lora(load_model(tiny_llama, "none"), r=2, alpha=4, seed=0), load_tokenizer(tiny_llama), tmp_path / "alone", base_model=str(tiny_llama))
    (tmp_path / "alone/qlora_kit.json").unlink()
    tiny_config()  # writes rows.json
    assert run_app(["evaluate", str(tmp_path / "alone"), "--data", str(tmp_path / "rows.json"), "--onto", "original", "--loss-only"]) == 0
    assert "perplexity" in capsys.readouterr().out
