import math
from io import StringIO

import pytest
import torch
from rich.console import Console

from qlora_kit.batches import pad
from qlora_kit.data import UserError
from qlora_kit.evaluate import before_after_table, evaluate_loss, exact_match, field_scores, perplexity, score_answers
from qlora_kit.tokens import Example

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
