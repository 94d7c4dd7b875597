"""Faults are found where they were planted and nowhere else; what the widget shows is what the functions compute, and data stays text."""
import json
import sys

import pytest
import torch

from qlora_kit.data.batches import Feed, pack, pad, Weighted
from qlora_kit.data.rows import Conversation
from qlora_kit.data.files import UserError
from qlora_kit.data.inspector import (
    batch_text, FAULTS, find_faults, findings_report, inspect_rows, Inspector, length_bars,
    padding_share, row_text, sequences_of)
from qlora_kit.data.tokens import (
    encode, encode_text, encode_turns, ensure_template, Example, LOSS_ON, TEMPLATES)

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from conftest import save_tokenizer
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def talk(answer="Paris.", question="Capital?", where=""):
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], where)


def rows_of(found):
    return {f.name: f.rows for f in found.faults if f.count}


@pytest.mark.parametrize("loss_on", LOSS_ON)
@pytest.mark.parametrize("template", ["headings", "chatml", "plain"])
def test_good_rows_have_no_faults(tmp_path, template, loss_on):
    from conftest import save_tokenizer
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    own = ensure_template(AutoTokenizer.from_pretrained(tmp_path), template)
    talks = [talk(a, q) for a, q in (("Paris.", "Capital?"), ("One\n\ntwo\n", "Count"), ("法国", "用中文"))]
    talks.append(Conversation(talks[0].messages + talks[1].messages, ""))
    examples = [e for c in talks for e in encode_turns(own, c, 500, loss_on)]
    assert rows_of(find_faults(own, examples, 500)) == {}
    exact = max(len(e.ids) for e in examples)
    assert rows_of(find_faults(own, examples, exact)) == {}, "a row that just fits is not cut"


def test_each_fault_is_found_and_counted_once(tokenizer):
    good = encode(tokenizer, talk().messages)
    other = encode(tokenizer, talk("Lima.").messages)
    bos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.bos_token = "<|endoftext|>"
    try:
        rows = [good, other, Example(good.ids, good.targets), Example(good.ids[:-2], good.targets[:-2]), Example([bos, bos, *other.ids], [False] * 2 + other.targets),
                Example(good.ids + [7], [False] * (len(good.ids) + 1)), Example(good.ids[:-3], good.targets[:-3], "cut")]
        limit = len(rows[-1].ids)
        assert rows_of(find_faults(tokenizer, rows)) == {"no targets": [5], "answer without end": [3, 6], "two BOS": [4], "duplicate": [2]}
        assert rows_of(find_faults(tokenizer, rows[-1:], limit)) == {"cut at max_length": [0]}
    finally:
        tokenizer.bos_token = None
    assert find_faults(tokenizer, rows)["two BOS"].count == 0, "a tokenizer without BOS cannot have two"


def test_an_open_answer_before_the_cut_is_still_reported(tokenizer):
    e = Example([20, 21, 22, 23, 24, 25], [False, True, True, False, True, True])
    found = find_faults(tokenizer, [e], 6)
    assert rows_of(found) == {"cut at max_length": [0], "answer without end": [0]}


def test_divided_text_is_not_cut_but_its_last_part_may_lack_an_end(tokenizer):
    parts = encode_text(tokenizer, "word " * 40, 16, "book.txt row 1")
    assert len(parts) > 3 and len(parts[0].ids) == 16
    assert not {"cut at max_length", "answer without end"} & set(rows_of(find_faults(tokenizer, parts, 16)))
    parts[-1] = Example(parts[-1].ids[:-1], parts[-1].targets[:-1], parts[-1].where)
    assert rows_of(find_faults(tokenizer, parts, 16))["answer without end"] == [len(parts) - 1]


def test_a_generator_is_read_once_and_an_empty_set_is_described(tokenizer):
    good = encode(tokenizer, talk().messages)
    found = find_faults(tokenizer, (good for _ in range(3)))
    assert found["duplicate"].rows == [1, 2] and found["duplicate"].names == ["example 2", "example 3"] and len(found.lengths) == 3
    assert found.targets == 3 * sum(good.targets) and found["duplicate"].some(1) == "example 2 and 1 more"
    assert "examples            0" in repr(find_faults(tokenizer, []))
    assert set(f.name for f in found.faults) == set(FAULTS)


def test_bars_count_every_row():
    lengths = [0, 1, 5, 5, 5, 99]
    counts = [int(line.split()[-1]) for line in length_bars(lengths, bins=7)]
    assert sum(counts) == 6 and len(counts) <= 7 and counts[0] == 5 and counts[-1] == 1
    assert "█" in length_bars([3] * 10000 + [90])[-1], "a lone row is seen"
    assert length_bars([0]) and len(length_bars([5], bins=1)) == 1


def examples(n=23):
    torch.manual_seed(0)
    return [Example([5] * k, [False] + [True] * (k - 1)) for k in torch.randint(3, 40, (n,)).tolist()]


@pytest.mark.parametrize("settings", [dict(), dict(capacity=40), dict(group_by_length=True), dict(accumulation=3), dict(accumulation=2, ranks=2), dict(capacity=64, ranks=3)])
def test_share_of_padding_is_that_of_the_batches(settings):
    feed = Feed(examples(), 0, batch_size=3, **settings)
    batches = [b for s in range(feed.per_epoch) for r in range(feed.ranks) for b in feed.batches(s, r)]
    positions = sum(b["input_ids"].numel() for b in batches)
    assert padding_share(feed) == pytest.approx(1 - sum(feed.lengths) / positions)


def test_a_batch_comes_apart_into_what_went_in():
    rows = [Example([5, 6, 7], [False, True, True]), Example([8, 9], [False, True]), Example([5], [False]), Weighted([9, 9, 9, 9], [False, False, True, True], "", 2.0)]
    for batch, shape in ((pad(rows, 0), [1, 1, 1, 1]), (pack([rows[:2], rows[2:]], 0), [2, 2]), (pack([rows, rows[:1]], 0), [4, 1])):
        found = sequences_of(batch, 0)
        assert [len(s.documents) for s in found] == shape
        assert [(d.ids, d.targets) for s in found for d in s.documents][:4] == [(e.ids, e.targets) for e in rows]
        assert [sum(len(d.ids) for d in s.documents) + s.free for s in found] == [batch["input_ids"].shape[1]] * len(found)
    for filler in (pad([], 0), pack([], 0)):
        assert [(s.documents, s.free) for s in sequences_of(filler, 0)] == [([], 1)]


def test_a_pad_token_that_ends_answers_is_not_taken_for_a_free_position():
    row = Example([5, 2], [False, True])  # the pad id is the end token
    assert [(len(s.documents), s.free) for s in sequences_of(pack([[row, row], [row]], 2), 2)] == [(2, 0), (1, 2)]
    only = Example([2, 2], [False, True])
    assert [(len(s.documents), s.free) for s in sequences_of(pack([[row, only], [row]], 2), 2)] == [(2, 0), (1, 2)]


@pytest.fixture
def hostile(tokenizer):
    talks = [talk(HOSTILE, HOSTILE, HOSTILE), talk("Lima.", where="[red]b.json[/red] row 2"), talk(HOSTILE, "again", HOSTILE)]
    return inspect_rows(tokenizer, talks, max_length=400, batch_size=2)


def html_of(inspector):
    return inspector.static() + "".join(map(inspector.example, range(len(inspector.examples)))) + "".join(map(inspector.step, range(inspector.feed.per_epoch)))


def test_data_and_names_of_rows_stay_text(hostile):
    from bs4 import BeautifulSoup

    faulty = Inspector(hostile.tokenizer, hostile.examples * 2, hostile.feed, find_faults(hostile.tokenizer, hostile.examples * 2))
    for inspector in (hostile, faulty):
        page = BeautifulSoup(html_of(inspector), "html.parser")
        assert not page.find_all(["script", "img"]) and HOSTILE in page.get_text()
        assert not [tag for tag in page.find_all(True) for name in tag.attrs if name.startswith("on")]


def test_the_widget_shows_what_the_inspector_says(hostile):
    pytest.importorskip("ipywidgets")
    (views, which), (back, slider, on), page, findings = [w.children if hasattr(w, "children") else w for w in hostile.widget().children]
    assert page.value == hostile.example(0) and findings.value == hostile.findings._repr_html_() and back.disabled
    on.click(); on.click(); on.click()
    assert slider.value == 3 and on.disabled and page.value == hostile.example(2)
    views.value = "batches"
    assert page.value == hostile.step(0) and slider.max == hostile.feed.per_epoch == 2 and which.disabled
    slider.value = 2
    assert page.value == hostile.step(1)


def test_rows_are_chosen_by_what_is_wrong_with_them(tokenizer):
    pytest.importorskip("ipywidgets")
    inspector = inspect_rows(tokenizer, [talk(), talk("Lima."), talk(), talk("x", "y" * 90), talk()], max_length=60)
    (_, which), (_, slider, _), page, _ = [w.children if hasattr(w, "children") else w for w in inspector.widget().children]
    which.value = "duplicate (2)"
    assert slider.max == 2 and page.value == inspector.example(2)
    slider.value = 2
    assert page.value == inspector.example(4)
    which.value = "no targets (1)"
    assert slider.value == 1 and page.value == inspector.example(3) and "⚠ no targets, cut at max_length" in page.value


def test_without_ipywidgets_everything_but_the_widget_is_there(hostile, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    bundle = hostile._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"} and "duplicate" in bundle["text/plain"]
    with pytest.raises(UserError, match="pip install ipywidgets"):
        hostile.widget()


def test_with_ipywidgets_the_plain_text_is_the_table(hostile):
    pytest.importorskip("ipywidgets")
    bundle = hostile._repr_mimebundle_()
    assert any("widget-view" in kind for kind in bundle) and bundle["text/plain"] == repr(hostile.findings)


def test_a_set_of_which_nothing_is_learned_can_be_looked_at(tokenizer):
    inspector = inspect_rows(tokenizer, [talk("x", "y" * 90)], max_length=20)
    assert inspector.feed is None and inspector.findings["no targets"].count == 1 and inspector._repr_mimebundle_()


def test_a_tokenizer_without_a_pad_token_is_refused_with_the_remedy(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    with pytest.raises(UserError, match="ensure_template"):
        inspect_rows(bare, [talk()])


def test_a_terminal_gets_no_control_characters_and_no_markup_from_data(tokenizer):
    from io import StringIO

    from rich.console import Console

    e = encode(tokenizer, talk("[bold]not bold[/bold] \x1b[2J").messages)
    console = Console(file=StringIO(), width=200, force_terminal=False, force_jupyter=False)
    console.print(row_text(tokenizer, e)), console.print(batch_text(tokenizer, pack([[e]], 0)))
    console.print(findings_report({"training": find_faults(tokenizer, [Example(e.ids, e.targets, "[red]x[/red]")] * 2)}))
    text = console.file.getvalue()
    assert "1: [red]x[/red]" in text
    assert text.count("[bold]not bold[/bold] ␛[2J") == 2 and "\x1b" not in text


@pytest.mark.parametrize("streaming", [False, True])
def test_the_command_shows_findings_and_packed_documents(tiny_config, tmp_path, capsys, streaming, monkeypatch, tokenizer):
    from qlora_kit.run.config import load_config
    from qlora_kit.tools.commands import look_at, run_app

    monkeypatch.setenv("COLUMNS", "140")
    row = lambda question, answer: {"instruction": question, "input": "", "output": answer}
    rows = [row(f"{HOSTILE} {i}", "Yes.") for i in range(8)] + [row("Count.", "1 2")] * 2 + [row("y" * 200, "no"), row("Go on.", "on " * 60)]
    (tmp_path / "faulty.json").write_text(json.dumps(rows), encoding="utf-8")
    config = tiny_config(data__train_file="faulty.json", data__validation_split=0.0, training__max_length=160, data__streaming=streaming)
    assert run_app(["inspect", str(config), "--rows", "2", "--packed"]) == 0
    out = capsys.readouterr().out
    line = lambda name: next(l for l in out.splitlines() if name in l)
    assert "faulty.json row 11" in line("no targets") and "faulty.json row 12" in line("│ cut at max_length") and "faulty.json row 10" in line("duplicate")
    assert "┌─ document 1" in out and "sequence 2" in out and "sequence 3" not in out and HOSTILE in out and "raise training.max_length" in out
    assert run_app(["inspect", str(config), "--rows", "1"]) == 0
    assert "document 1" not in capsys.readouterr().out
    parts, feed, _ = look_at(load_config(config, []), tokenizer, tmp_path)
    assert len(parts["training"][0]) == len(rows) and len(feed.examples) == len(rows) - 1 and all(any(e.targets) for e in feed.examples)
