"Data: what a person's file can hold, beyond the cases that the page shows."
import json, os, subprocess, sys
from pathlib import Path

import pytest

from qlora_kit.data import UserError, alpaca, load_conversations, load_rows, split

ROW = dict(instruction="请解释什么是机器学习", input="", output="从数据中总结规律")


def write(folder, name, text):
    path = folder/name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows(n): return [alpaca(dict(instruction=f"q{i}", output=f"a{i}")) for i in range(n)]


@pytest.mark.parametrize("name", ["rows.json", "rows.JSONL"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_survives_every_spelling_of_a_file(tmp_path, name, bom, end):
    data = [ROW | dict(output=o) for o in ("2026-05-04", "007", "true", "a\n\u2028b\r\nc", " 'x' ")]
    lines = [json.dumps(r, ensure_ascii=False) for r in data]
    text = end.join(lines) + end if name.endswith("L") else f"[{end}" + f",{end}".join(lines) + f"{end}]"
    got = load_conversations(write(tmp_path, name, bom + text.encode()))
    assert [c.messages[-1]["content"] for c in got] == [r["output"] for r in data]
    assert {c.messages[0]["content"] for c in got} == {ROW["instruction"]}
    assert all(c.meta == {} for c in got)


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    text = "\n".join([json.dumps(ROW), "", json.dumps(ROW | dict(output=None)), "  ", json.dumps(ROW)])
    path = write(tmp_path, "gaps.jsonl", text)
    assert [r["_where"] for r in load_rows(path)] == [f"gaps.jsonl line {i}" for i in (1, 3, 5)]
    with pytest.raises(UserError, match=r"gaps.jsonl: 1 of 3 rows .*line 3: no 'output'"): load_conversations(path)


@pytest.mark.parametrize("text, at", [('[{"a": 1},\n {"b" 2}]', "line 2, column 7"), ('[\n\n', "line 3, column 1"), ('\ufeff[}', "line 1, column 2")])
def test_position_of_broken_json(tmp_path, text, at):
    with pytest.raises(UserError, match=f"broken.json {at}: not JSON"): load_rows(write(tmp_path, "broken.json", text))


@pytest.mark.parametrize("value", [3, 2.5, True, ["a"], {"a": 1}, None, "", " \n"])
@pytest.mark.parametrize("name", ["instruction", "output"])
def test_only_text_is_an_answer_or_a_question(name, value):
    with pytest.raises(UserError, match=f"f.json row 9: .*'{name}'"): alpaca(ROW | {name: value}, where="f.json row 9")


def test_all_bad_rows_are_counted_and_the_message_is_one_line(tmp_path):
    data = [ROW | dict(output="") if i % 2 else ROW for i in range(20)]
    with pytest.raises(UserError) as e: load_conversations(write(tmp_path, "half.json", json.dumps(data)))
    assert "10 of 20 rows" in str(e.value) and "row 6" in str(e.value) and "7 more" in str(e.value)
    assert "row 8" not in str(e.value) and "\n" not in str(e.value)


def test_extra_fields_go_to_meta_whatever_they_hold(tmp_path):
    extras = [dict(lang="zh", n=1, tags=["a"], _where="mine"), dict(n="one", tags={"b": None}), {}]
    got = load_conversations(write(tmp_path, "meta.json", json.dumps([ROW | e for e in extras])), system_prompt="s")
    assert [c.meta for c in got] == [dict(lang="zh", n=1, tags=["a"]), dict(n="one", tags={"b": None}), {}]
    assert [m["role"] for m in got[2].messages] == ["system", "user", "assistant"] and got[2].where == "meta.json row 3"


def test_a_number_among_texts_is_found_in_a_large_file(tmp_path):
    data = [ROW]*2999 + [ROW | dict(output=0)]
    with pytest.raises(UserError, match="1 of 3000 rows .*row 3000: 'output' is 0"): load_conversations(write(tmp_path, "big.json", json.dumps(data)))


def test_no_home_no_cache_no_output(tmp_path):
    path = write(tmp_path, "rows.json", json.dumps([ROW]))
    env = {k: v for k,v in os.environ.items() if not k.startswith(("HF_", "XDG_"))} | dict(HOME="/dev/null/none", HF_HOME="/dev/null/none")
    code = f"from qlora_kit.data import load_conversations; assert len(load_conversations({str(path)!r})) == 1"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("n", [2, 3, 10, 37])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_split_is_a_partition_with_both_parts(n, share):
    data = rows(n)
    for seed in range(5):
        train, held = split(data, share, seed)
        assert len(held) == min(max(1, round(share*n)), n-1)
        assert sorted(c.messages[0]["content"] for c in train+held) == sorted(c.messages[0]["content"] for c in data)
        assert split(data, share, seed) == (train, held)
    assert len({str(split(rows(37), 0.1, s)[1]) for s in range(5)}) == 5


def test_copies_stay_together_even_when_they_are_most_of_the_file():
    for data in (rows(1)*98 + rows(3), rows(2)*5, rows(40) + rows(40)):
        for seed in range(10):
            train, held = split(data, 0.1, seed)
            assert train and held and not {str(c.messages) for c in train} & {str(c.messages) for c in held}


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan")])
def test_split_refuses_what_is_no_share(share):
    with pytest.raises(UserError, match="validation_split"): split(rows(5), share, 0)
