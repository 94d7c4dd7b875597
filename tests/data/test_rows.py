"Data: what a person's file can hold, beyond the cases that the page shows."
import json, os, subprocess, sys
from pathlib import Path

import pytest

from qlora_kit.data import rows as data
from qlora_kit.data.rows import (
    Conversation, conversation, find_format, given_conversations, held_out, hub_name,
    load_conversations, load_rows, split, stream_conversations)
from qlora_kit.data.files import UserError

ROW = dict(instruction="请解释什么是机器学习", input="", output="从数据中总结规律")


def write(folder, name, text):
    path = folder/name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows(n): return [conversation(dict(instruction=f"q{i}", output=f"a{i}")) for i in range(n)]


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
    with pytest.raises(UserError, match=f"f.json row 9: .*'{name}'"): conversation(ROW | {name: value}, where="f.json row 9")


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
    code = f"from qlora_kit.data.rows import load_conversations; assert len(load_conversations({str(path)!r})) == 1"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])
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


# ---- the kinds of source

GSM8K = Path(__file__).parents[1]/"fixtures/gsm8k"
QA = dict(prompt="question", completion="answer")


def test_gsm8k_is_prompts_and_completions_by_mapping():
    told = []
    train = load_conversations(GSM8K/"train.jsonl", fields=QA, say=told.append)
    source = [json.loads(line) for line in (GSM8K/"train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [[m["content"] for m in c.messages] for c in train] == [[r["question"], r["answer"]] for r in source] and len(train) == 32
    assert told == ["train.jsonl: rows read as prompt_completion, for the columns question, answer"]
    assert train[4].where == "train.jsonl line 5" and train[4].meta == {} and "####" in train[4].messages[1]["content"]
    assert len(load_conversations(GSM8K, fields=QA)) == 40 == len(list(stream_conversations(GSM8K, fields=QA)))
    with pytest.raises(UserError, match=r"train.jsonl: received the columns \['question', 'answer'\], which fit no format.*data.fields"): load_conversations(GSM8K/"train.jsonl")


def test_every_kind_of_file_holds_the_same_rows_as_datasets_reads_them(tmp_path):
    "`datasets`' own readers are the reference, on rows that they do not reinterpret."
    from datasets import Dataset, load_dataset

    data = [dict(instruction=f"q{i}, \"{i}\"\nand", output=f"a{i}\n法", lang="zh") for i in range(5)]
    made = Dataset.from_list(data)
    for suffix, save in (("json", made.to_json), ("csv", made.to_csv), ("parquet", made.to_parquet)):
        path = tmp_path/f"rows.{'jsonl' if suffix == 'json' else suffix}"
        save(path)
        theirs = load_dataset(suffix, data_files=str(path), split="train", cache_dir=str(tmp_path/"cache")).to_list()
        ours = load_rows(path).remove_columns("_where").to_list()
        assert ours == theirs == data
    (tmp_path/"rows.json").write_text(json.dumps(data))
    assert load_rows(tmp_path/"rows.json").remove_columns("_where").to_list() == data
    os.rename(tmp_path/"cache", tmp_path/".cache")
    everything = load_rows(tmp_path)
    assert len(everything) == 20 and everything["_where"][0] == "rows.csv line 2" and everything["_where"][-1] == "rows.parquet row 5"


def test_cells_are_text_and_places_are_lines(tmp_path):
    path = write(tmp_path, "t.csv", b"\xef\xbb\xbfinstruction,output\r\n\"two\nlines\",007\r\n\r\nNA,2026-05-04\r\n")
    got = load_rows(path)
    assert got["output"][:] == ["007", "2026-05-04"] and got["instruction"][:] == ["two\nlines", "NA"]
    assert got["_where"][:] == ["t.csv line 2", "t.csv line 5"]
    assert [c.messages[0]["content"] for c in load_conversations(write(tmp_path, "p.txt", "Ein\nSatz.\n\n\n一句话。\n"))] == ["Ein\nSatz.", "一句话。"]


@pytest.mark.parametrize("name, text, told", [
    ("a.csv", "instruction,output\na,b\nc\n", "a.csv line 3: received 1 values for the 2 columns instruction, output"),
    ("a.csv", "instruction,output\n\"a\"b,c\n", "a.csv line 2: not CSV"),
    ("a.csv", "instruction,output\na,机器\n".encode("gbk"), "a.csv line 2, column 3: byte 0xbb is not UTF-8"),
    ("a.csv", "instruction,output\n,b\n", "a.csv: 1 of 1 rows .*line 2: 'instruction' is empty"),
    ("a.parquet", "PK", "a.parquet: not a parquet file"), ("a.txt", b"\xff", "a.txt line 1, column 1: byte 0xff"),
    ("a.tsv", "a\tb", "received suffix '.tsv'; allowed: .json"), ("a.csv", "", "received no rows"), ("a.csv", "instruction,output\n", "received no rows")])
def test_a_bad_table_is_named_by_file_and_line(tmp_path, name, text, told):
    with pytest.raises(UserError, match=told): load_conversations(write(tmp_path, name, text))
    with pytest.raises(UserError, match=told.replace(": 1 of 1 rows .*line 2:", " line 2:")): list(stream_conversations(tmp_path/name))


def test_a_folder_says_which_file(tmp_path):
    (tmp_path/"more").mkdir()
    write(tmp_path, "a.jsonl", json.dumps(ROW)); write(tmp_path, "LICENSE", "free"); write(tmp_path, ".hidden.json", "[")
    write(tmp_path/"more", "b.json", json.dumps([ROW, ROW | dict(output=3)]))
    with pytest.raises(UserError, match=r"1 of 3 rows cannot be used: more/b.json row 2: 'output' is 3"): load_conversations(tmp_path)


def test_hub_names_reach_datasets_and_a_missing_one_is_told(tmp_path, monkeypatch):
    assert hub_name("openai/gsm8k:main:test") == dict(kind="openai/gsm8k", name="main", split="test")
    assert hub_name("a/b") == dict(kind="a/b", name=None, split="train") and hub_name("a/b:dev")["split"] == "dev"
    assert not any(map(hub_name, ("rows.json", "data/rows.jsonl", "./a/b", "a/b/c", "/a/b", str(tmp_path))))
    with pytest.raises(UserError, match="nobody/nothing: no such file or folder here, and the hub did not give its split 'dev'"): load_rows("nobody/nothing:dev")
    # a folder laid out like a data set of the hub goes through the same code of `datasets`
    for split_ in ("train", "test"): write(tmp_path, f"{split_}.jsonl", json.dumps(ROW | dict(lang=split_)))
    import qlora_kit.data.rows as data
    monkeypatch.setattr(data, "load_dataset", lambda kind, _load=data.load_dataset, **options: _load({"me/rows": str(tmp_path)}[kind], **options))
    (c,) = load_conversations("me/rows:test")
    assert c.meta == dict(lang="test") and c.where == "me/rows row 1" and c.messages[1]["content"] == ROW["output"]


# ---- formats

def turns(*pairs, a="role", b="content"): return [{a: x, b: y} for x, y in pairs]


@pytest.mark.parametrize("row, format", [
    (dict(messages=turns(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))), "messages"),
    (dict(conversations=turns(("system", "s"), ("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "b"), a="from", b="value")), "sharegpt"),
    (dict(conversations=turns(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")), system="s"), "sharegpt")])
def test_many_turns_in_two_dialects(tmp_path, row, format):
    (c,) = load_conversations(write(tmp_path, "r.json", json.dumps([row | dict(lang="de")])), system_prompt="not used")
    assert c.messages == turns(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")) and c.meta == dict(lang="de")
    assert find_format(row) == format


def test_names_inside_turns_are_mapped_too():
    row = dict(dialogue=[dict(speaker="human", text="q"), dict(speaker="gpt", text="a")])
    c = conversation(row, "sharegpt", fields={"conversations": "dialogue", "from": "speaker", "value": "text"})
    assert c.messages == turns(("user", "q"), ("assistant", "a"))


CALL = dict(id="1", type="function", function=dict(name="f", arguments='{"x": [1, null]}'))


def test_tool_messages_keep_every_field(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    said = [dict(role="user", content="q"), dict(role="assistant", content=None, tool_calls=[CALL]), dict(role="tool", content="3", tool_call_id="1", name="f"),
            dict(role="assistant", content="a", reasoning_content="r")]
    row = dict(messages=said, tools=[dict(type="function", function=dict(name="f"))])
    (c,) = load_conversations(write(tmp_path, "r.json", json.dumps([row])))
    assert c.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": [1, None]}
    assert [c.messages[0], *c.messages[2:]] == [said[0], *said[2:]] and c.messages[1]["content"] is None and c.tools == row["tools"]
    pq.write_table(pa.Table.from_pylist([row | dict(tools=json.dumps(row["tools"]))]), tmp_path/"r.parquet")
    (d,) = load_conversations(tmp_path/"r.parquet")
    assert (d.messages, d.tools) == (c.messages, c.tools)


@pytest.mark.parametrize("row, told", [
    (dict(messages=[]), r"'messages' is \[\], not a list of turns"), (dict(messages="q"), "'messages' is \"q\", not a list"),
    (dict(messages=turns(("user", "q"))), "'messages' has no turn of the assistant"),
    (dict(messages=turns(("user", "q"), ("bot", "a"))), "'messages' turn 2 has \"bot\" as 'role'; allowed: system"),
    (dict(messages=turns(("user", "q"), ("assistant", None))), "turn 2 .*has null as 'content', not text"),
    (dict(messages=turns(("user", "q"), ("assistant", " "))), "turn 2 .*has an empty 'content'"),
    (dict(messages=["q", "a"]), "turn 1 is \"q\", not an object"),
    (dict(conversations=turns(("human", 3), ("gpt", "a"), a="from", b="value")), "'conversations' turn 1 .*has 3 as 'value'"),
    (dict(messages=turns(("user", "q"), ("assistant", "a")), tools="none"), "'tools' is \"none\", not a list of JSON schemas"),
    (dict(prompt="q", completion=["a"]), r"""'completion' is \["a"\], not text"""), (dict(text=""), "'text' is empty")])
def test_a_bad_turn_is_named_by_row_and_field(tmp_path, row, told):
    path = write(tmp_path, "bad.json", json.dumps([row]))
    with pytest.raises(UserError, match=f"bad.json: 1 of 1 rows cannot be used: row 1: .*{told}"): load_conversations(path)
    with pytest.raises(UserError, match=f"bad.json row 1: .*{told}"): list(stream_conversations(path))


ASK, SAY = dict(role="user", content="q"), dict(role="assistant", content="a")
SCHEMA = dict(name="f", description="d", parameters=dict(type="object", properties={}))
USED = [ASK, dict(role="assistant", content=None, tool_calls=[dict(type="function", function=dict(name="f", arguments=dict(x=1)))]), dict(role="tool", content="42"), SAY]


@pytest.mark.parametrize("row, messages", [
    # OpenAI's fine-tuning files, Axolotl's, ms-swift's: turns that are not learned
    *[(dict(messages=[ASK, SAY | flag, ASK, SAY]), [ASK, SAY | dict(train=False), ASK, SAY]) for flag in (dict(weight=0), dict(train=False), dict(training=False), dict(loss=False))],
    (dict(messages=[ASK | dict(weight=0), SAY | dict(weight=1)]), [ASK, SAY]),
    # LLaMA-Factory's and glaive's ShareGPT
    (dict(conversations=turns(("human", "q"), ("function_call", '{"name": "f", "arguments": {"x": 1}}'), ("observation", "42"), ("gpt", "a"), a="from", b="value"), tools=json.dumps([SCHEMA])), USED),
    (dict(conversations=turns(("gpt", "a"), ("human", "q"), ("chatgpt", "a"), a="from", b="value")), [SAY, ASK, SAY]),
    # OpenAI before tool_calls, and exports whose calls are JSON in quotes
    (dict(messages=[ASK, dict(role="assistant", content=None, function_call=dict(name="f", arguments='{"x": 1}')), dict(role="function", content="42"), SAY], functions=[SCHEMA]), USED),
    (dict(messages=[ASK, USED[1] | dict(tool_calls=json.dumps(USED[1]["tool_calls"])), USED[2], SAY], tools=[dict(type="function", function=SCHEMA)]), USED),
    # content in parts; TRL's prompt and completion, whose earlier answers are read
    (dict(messages=[ASK | dict(content=[dict(type="text", text="q")]), SAY | dict(content=["a"])]), [ASK, SAY]),
    (dict(prompt=[ASK, SAY, ASK], completion=[SAY]), [ASK, SAY | dict(train=False), ASK, SAY]),
    (dict(prompt=[ASK], completion=USED[1:], tools=[SCHEMA]), USED), (dict(prompt=[ASK], completion="a"), [ASK, SAY]),
    (dict(instruction="r", input="", output="b", history=[["q", "a"]]), [ASK, SAY, *turns(("user", "r"), ("assistant", "b"))])])
def test_what_other_tools_write_is_read(tmp_path, row, messages):
    (c,) = load_conversations(write(tmp_path, "r.json", json.dumps([row])))
    assert c.messages == messages and c.meta == {}
    if messages is USED: assert c.tools == [dict(type="function", function=SCHEMA)]


@pytest.mark.parametrize("row, told", [
    (dict(messages=[ASK, SAY | dict(weight=0.5)]), "turn 2 has 0.5 as 'weight'; allowed: 0 or false"), (dict(messages=[ASK, SAY | dict(weight=1, train=False)]), "contradict each other"),
    (dict(messages=[ASK | dict(train=True), SAY]), "only the assistant's turns are learned"), (dict(prompt="q", completion="a", label=False), "people disliked"),
    *[(dict(messages=[ASK, SAY], **{media: ["x"]}), f"'{media}' is .*text model") for media in ("images", "audios", "videos")],
    (dict(messages=[ASK | dict(content=[dict(type="image"), dict(type="text", text="q")]), SAY]), 'has .{2}"type": "image".*not text'),
    (dict(messages=[ASK, SAY | dict(tool_calls=[dict(function=dict(arguments="{}"))])]), "calls a function without a name"), (dict(messages=[ASK, SAY | dict(tool_calls="f()")]), "not a call"),
    (dict(prompt=[ASK, SAY], completion="a"), "'prompt' ends with a turn of the assistant"), (dict(instruction="q", output="a", history=["q"]), "not a list of pairs")])
def test_what_a_row_says_and_cannot_be_honoured_is_named(tmp_path, row, told):
    with pytest.raises(UserError, match=f"row 1: .*{told}"): load_conversations(write(tmp_path, "bad.json", json.dumps([row])))


@pytest.mark.parametrize("row", [dict(prompt="q", chosen="a", rejected="b"), dict(chosen=[ASK, SAY], rejected=[ASK, SAY]), dict(prompt="q", completion="a", rejected="b")])
def test_of_two_answers_one_is_chosen_by_name(tmp_path, row):
    path = write(tmp_path, "dpo.json", json.dumps([row]))
    with pytest.raises(UserError, match="preference data"): load_conversations(path)
    if "chosen" in row:
        named = dict(messages="chosen") if "prompt" not in row else dict(completion="chosen")
        assert load_conversations(path, fields=named)[0].messages == [ASK, SAY]


def test_fields_that_parquet_added_are_not_learned(tmp_path):
    """Two tools of one parameter each: Arrow's struct has both, and fills in nulls; in JSON a null is what somebody wrote."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    calls = [[dict(type="function", function=dict(name=name, arguments=arguments))] for name, arguments in (("f", dict(day="Monday")), ("g", dict(city="Oslo")))]
    rows = [dict(messages=[ASK, dict(role="assistant", content="", tool_calls=call)]) for call in calls]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path/"r.parquet")
    assert pq.read_table(tmp_path/"r.parquet").to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == dict(city=None, day="Monday")
    assert [c.messages[1]["tool_calls"] for c in load_conversations(tmp_path/"r.parquet")] == calls
    calls[0][0]["function"]["arguments"]["city"] = None
    assert load_conversations(write(tmp_path, "r.json", json.dumps(rows)))[0].messages[1]["tool_calls"] == calls[0]


def test_files_of_old_spreadsheets_and_packers(tmp_path):
    import gzip

    rows = [dict(instruction="q" * 200_000, output="a"), dict(instruction="r", output="b\rc")]
    table = 'instruction,output\r"{}",a\rr,"b\rc"\r'.format(rows[0]["instruction"])
    (tmp_path/"mac.csv").write_bytes(table.encode())
    (tmp_path/"rows.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    expected = [conversation(row).messages for row in rows]
    for name in ("mac.csv", "rows.jsonl.gz"):
        assert [c.messages for c in load_conversations(tmp_path/name)] == expected == [c.messages for c in stream_conversations(tmp_path/name)]
    (tmp_path/"torn.jsonl.gz").write_bytes((tmp_path/"rows.jsonl.gz").read_bytes()[:-9])
    (tmp_path/"twice.csv").write_text("output,instruction,output\na,q,b\n")
    for name, told in (("torn.jsonl.gz", "not a whole gzip file"), ("twice.csv", "the column 'output' 2 times")):
        with pytest.raises(UserError, match=told): load_conversations(tmp_path/name)


def test_nan_costs_a_row_only_where_it_is_used(tmp_path):
    row = dict(instruction="q", output="a", score=float("nan"), more=dict(x=float("inf")))
    (c,) = load_conversations(write(tmp_path, "r.json", json.dumps([row])))
    assert c.messages == [ASK, SAY] and c.meta == dict(score="nan", more="{'x': inf}")
    path = write(tmp_path, "bad.json", json.dumps([row | dict(output=float("nan"))]))
    for read in (load_conversations, lambda path: list(stream_conversations(path))):
        with pytest.raises(UserError, match='"output" holds NaN'): read(path)
    path = write(tmp_path, "mapped.json", json.dumps([dict(question="q", answer=float("nan"))]))
    with pytest.raises(UserError, match='"answer" holds NaN'): load_conversations(path, fields=QA)


def test_mappings_and_formats_are_checked():
    for args, told in (((["a"], "csv"), "data.format: received 'csv'; allowed: auto, messages"), ((["question"], "auto", dict(promt="question")), "received the name 'promt'"),
                       ((["a"], "auto", QA), "prompt is mapped to 'question', which is not among"), ((["prompt"], "alpaca"), "allowed: alpaca: instruction, output")):
        with pytest.raises(UserError, match=told): find_format(*args)


# ---- streams and functions of the user's

def test_a_stream_holds_one_row_at_a_time(tmp_path):
    path = write(tmp_path, "rows.jsonl", "\n".join(json.dumps(ROW | dict(output=str(i))) for i in range(500)) + "\n{")
    stream = stream_conversations(path, system_prompt="s")
    first = [next(stream) for _ in range(500)]
    assert first == [conversation(ROW | dict(output=str(i)), where=f"rows.jsonl line {i+1}", system_prompt="s") for i in range(500)]
    with pytest.raises(UserError, match="rows.jsonl line 501, column 2: not JSON"): next(stream)


def test_held_out_rows_of_a_stream_follow_their_text():
    data = rows(2000)
    held = [c for c in data if held_out(c, 0.1, 3)]
    assert 150 < len(held) < 250 and held == [c for c in reversed(data) if held_out(c, 0.1, 3)][::-1]
    assert set(map(str, held)) != {str(c) for c in data if held_out(c, 0.1, 4)}
    assert {str(c) for c in held} <= {str(c) for c in data if held_out(c, 0.2, 3)} and not any(held_out(c, 0, 3) for c in data)


@pytest.mark.parametrize("given, told", [(None, "returned None"), ([], "received no rows"), ([ROW, 3], "row 2: a int, not an object"),
                                         ([Conversation(turns(("user", "q"), ("assistant", "a"))), ROW], "item 2 is a dict, the first was a Conversation")])
def test_what_a_function_may_not_return(given, told):
    with pytest.raises(UserError, match=f"mine.*{told}"): list(given_conversations(given, "mine"))


def test_streamed_examples_are_the_others(tiny_config, monkeypatch, tmp_path):
    "Through the config: GSM8K with a mapping, a validation file, and a function of the user's that is a generator."
    from qlora_kit.run.config import load_config
    from qlora_kit.model.base import load_tokenizer
    from qlora_kit.data.tokens import ensure_template
    from qlora_kit.run.assemble import load_examples

    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path/"cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path/"my_rows.py").write_text("from qlora_kit.data.rows import load_rows\ndef read(path): yield from load_rows(path)")
    changes = dict(data__train_file=str(GSM8K/"train.jsonl"), data__validation_file=str(GSM8K/"validation.jsonl"), data__fields=QA, training__max_length=512)
    def examples(**more):
        cfg = load_config(tiny_config(**changes, **more))
        return load_examples(cfg, ensure_template(load_tokenizer(cfg.model.base_model), cfg.data.template), tmp_path)
    train, val, notes = examples()
    assert len(train) + len(val) + sum("left out" in n for n in notes) >= 38 and "read as prompt_completion" in notes[0]
    for more in (dict(data__streaming=True), dict(data__load_dataset="my_rows.read"), dict(data__streaming=True, data__load_dataset="my_rows.read")):
        t, v, n = examples(**more)
        assert [(e.ids, e.targets) for e in t] == [(e.ids, e.targets) for e in train] and [(e.ids, e.targets) for e in v] == [(e.ids, e.targets) for e in val]
    everything = examples(data__loss_on="all", data__template="plain")[0]
    assert all(e.targets == [False] + [True]*(len(e.ids)-1) for e in everything) and not any(e.ids[:3] == train[0].ids[:3] for e in everything)
    changes |= dict(data__validation_file=None, data__validation_split=0.25)
    t, v, _ = examples(data__streaming=True)
    assert len(t) + len(v) == len(train) and v and not {str(e.ids) for e in v} & {str(e.ids) for e in t}


def test_a_streamed_run_is_the_other_run_and_create_model_gets_what_it_names(tiny_config, monkeypatch, tmp_path):
    from qlora_kit.run.config import load_config
    from qlora_kit.run.monitor import read_metrics
    from qlora_kit.run.train import train

    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path/"cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path/"my_model.py").write_text(
        "from qlora_kit.model.lora import add_lora\nfrom qlora_kit.model.loader import load_model\n"
        "def create_model(base_model_name, lora_config, *, folder, dtype, device, quant_type):\n"
        "    assert str(folder) == base_model_name\n"
        "    return add_lora(load_model(folder, quant_type, dtype=dtype, device=device), lora_config.r, lora_config.lora_alpha, dropout=lora_config.lora_dropout, seed=0)\n"
        "def wrong(base_model_name, lora_config): return None\n")
    losses = []
    for name, more in (("a", {}), ("b", dict(data__streaming=True, model__create_model="my_model.create_model"))):
        cfg = load_config(tiny_config(name, training__max_steps=3, data__validation_split=0, **more))
        losses.append([r["loss"] for r in read_metrics(train(cfg, name, quiet=True, base=tmp_path).run)])
    assert losses[0] == losses[1] and len(losses[0]) == 3
    with pytest.raises(UserError, match="my_model.wrong returned a NoneType; return the PEFT model"):
        train(load_config(tiny_config("c", model__create_model="my_model.wrong")), "c", quiet=True, base=tmp_path)
