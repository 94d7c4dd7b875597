"""The sample data keep what the pages claim of them. Read from the two JSON files alone."""
import json
import re
from collections import Counter
from importlib.resources import files

DATA = files("qlora_kit") / "assets" / "data"
FIELDS = ["name", "item", "quantity", "unit", "date"]


def rows(name):
    return json.loads((DATA / name).read_text(encoding="utf-8"))


TRAIN, HELDOUT = rows("sample_data.json"), rows("heldout_data.json")
ORDERS = [r for r in TRAIN if r["task"] == "order"]


def records(some):
    return [json.loads(r["output"]) for r in some]


def share(some, lang):
    return sum(r["lang"] == lang for r in some) / len(some)


def test_shape_and_size():
    assert len(TRAIN) >= 400 and len(HELDOUT) >= 60
    assert all({"instruction", "input", "output"} <= r.keys() and r["instruction"] and r["output"] for r in TRAIN + HELDOUT)
    assert all(list(o) == FIELDS for o in records(ORDERS) + records(HELDOUT))
    assert share(HELDOUT, "zh") >= 1 / 3 and share(ORDERS, "zh") > 0.3


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
    for field in ("name", "item"):
        assert len({o[field] for o in records(ORDERS)}) > 200
        for value in {o[field] for o in records(HELDOUT)}:
            found = re.search(rf"\b{re.escape(value)}\b", text) if value.isascii() else value in text
            assert not found, f"held-out {field} {value!r} occurs in training"


def test_copied_fields_stand_in_the_sentence():
    for r in ORDERS + HELDOUT:
        record = json.loads(r["output"])
        assert record["name"] in r["input"] and record["item"] in r["input"]


def test_combinations_are_new_and_closed_vocabularies_shared():
    train, heldout = records(ORDERS), records(HELDOUT)
    for pair in (lambda o: o["date"], lambda o: (o["quantity"], o["unit"])):
        assert not {pair(o) for o in train} & {pair(o) for o in heldout}
    for part in (lambda o: o["date"][:2], lambda o: o["date"][3:], lambda o: o["quantity"], lambda o: o["unit"]):
        assert {part(o) for o in heldout} <= {part(o) for o in train}


def test_phrasings():
    for lang in ("en", "zh"):
        train = {r["phrasing"] for r in ORDERS if r["lang"] == lang}
        heldout = Counter(r["phrasing"] for r in HELDOUT if r["lang"] == lang)
        assert len(heldout) >= 5 and len(heldout.keys() - train) >= 2 and min(heldout.values()) >= 3
