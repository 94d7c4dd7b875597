"""The sample data keep what the pages claim of them. Read from the two JSON files alone."""
import json
import re
from collections import Counter
from importlib.resources import files

DATA = files("qlora_kit") / "assets" / "scaffold" / "data"
FIELDS = ["name", "sum", "date"]


def rows(name):
    return json.loads((DATA / name).read_text(encoding="utf-8"))


TRAIN, HELDOUT = rows("sample_data.json"), rows("heldout_data.json")
PAYMENTS = [r for r in TRAIN if r["task"] == "payment"]


def records(some):
    return [json.loads(r["output"]) for r in some]


def share(some, lang):
    return sum(r["lang"] == lang for r in some) / len(some)


def parts(record):
    """(amount, currency, month, day) of a record, as text"""
    return (*record["sum"].split(" "), *record["date"].split("-"))


def test_shape_and_size():
    assert len(TRAIN) >= 400 and len(HELDOUT) >= 60
    assert all({"instruction", "input", "output"} <= r.keys() and r["instruction"] and r["output"] for r in TRAIN + HELDOUT)
    assert all(list(o) == FIELDS and len(parts(o)) == 4 for o in records(PAYMENTS) + records(HELDOUT))
    assert share(HELDOUT, "zh") >= 1 / 3 and share(PAYMENTS, "zh") > 0.3


def test_general_questions():
    questions = {r["instruction"]: r["output"] for r in TRAIN if r["task"] == "question"}
    assert len(questions) >= 30 and "规律" in questions["请解释什么是机器学习"]


def test_a_row_stands_on_one_line():
    for name in ("sample_data.json", "heldout_data.json"):
        text = (DATA / name).read_text(encoding="utf-8")
        lines = [line.rstrip(",") for line in text.splitlines()[1:-1]]
        assert [json.loads(line) for line in lines] == rows(name) and "\\u" not in text


def test_open_values_are_many_and_heldout_ones_are_new():
    text = "\n".join(r["instruction"] + r["input"] + r["output"] for r in TRAIN)
    assert len({r["name"] for r in records(PAYMENTS)}) > 200
    assert len({json.loads(r["output"])["name"] for r in PAYMENTS if r["lang"] == "en"}) > 200
    for value in {o["name"] for o in records(HELDOUT)}:
        found = re.search(rf"\b{re.escape(value)}\b", text) if value.isascii() else value in text
        assert not found, f"held-out name {value!r} occurs in training"


def test_copied_values_stand_in_the_sentence_and_derived_ones_do_not():
    for r in PAYMENTS + HELDOUT:
        record = json.loads(r["output"])
        amount, currency, month, day = parts(record)
        assert record["name"] in r["input"]
        assert {amount, day} <= set(re.findall(r"\d+", r["input"])) and currency not in r["input"] and record["date"] not in r["input"]


def test_combinations_are_new_and_closed_vocabularies_shared():
    train, heldout = records(PAYMENTS), records(HELDOUT)
    for pair in (lambda o: o["date"], lambda o: o["sum"]):
        assert not {pair(o) for o in train} & {pair(o) for o in heldout}
    for i in (1, 2, 3):                                 # currency, month, day
        for lang in ("en", "zh"):
            seen, asked = ({parts(json.loads(r["output"]))[i] for r in some if r["lang"] == lang} for some in (PAYMENTS, HELDOUT))
            assert asked <= seen


def test_phrasings():
    for lang in ("en", "zh"):
        train = {r["phrasing"] for r in PAYMENTS if r["lang"] == lang}
        heldout = Counter(r["phrasing"] for r in HELDOUT if r["lang"] == lang)
        assert len(train) >= 8 and len(heldout) >= 5 and len(heldout.keys() - train) >= 2 and min(heldout.values()) >= 3
