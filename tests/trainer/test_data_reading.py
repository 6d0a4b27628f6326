"""Rows out of files: every bad one is named by file and line, and no good one is changed."""

from __future__ import annotations

import copy
import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_trainer.data.conversation import conversation
from aim_trainer.data.examples import Completion, Conversation, Example, Labelled, content_hash
from aim_trainer.data.problems import Problems, RowProblem
from aim_trainer.data.read import Reader, Seen
from aim_trainer.errors import DataError
from aim_trainer.job.dataset import Source
from aim_trainer.job.job import Spec
from rclone_servers import http_server

ASK = {"role": "user", "content": "Where is Ada?"}
SAY = {"role": "assistant", "content": "In Paris."}
GOOD = {"messages": [ASK, SAY]}


def spec(**changes: Any) -> Spec:
    """A job's spec, whose source is never looked at: tests give their own."""
    dataset = {"source": "none", **changes.pop("dataset", {})}
    return Spec.model_validate({"baseModel": {"modelId": "none"}, "dataset": dataset, **changes})


def read(file: Path | str, job: Spec | None = None, **source: Any) -> tuple[list[Example], Seen]:
    """What a source says. Raises DataError as a person sees it, without the directory's name."""
    problems, seen = Problems(), Seen(str(file))
    wanted = Source.model_validate({"uri": str(file), **source})
    examples = [located.example for located in Reader(job or spec()).examples(wanted, problems, seen)]
    problems.refuse()
    return examples, seen


def refusal(file: Path, job: Spec | None = None, **source: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(file, job, **source)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(file.parent) + "/", "")


def written(tmp_path: Path, *rows: Any, name: str = "chat.jsonl") -> Path:
    file = tmp_path / name
    file.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return file


def turns(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def called(arguments: Any, name: str = "move") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}


BAD_LINES: dict[str, tuple[Any, str]] = {
    "role": (turns({**ASK, "role": "bot"}, SAY), "messages[0].role: Input should be 'system', 'developer', 'user',"),
    "no JSON": (b"{messages: []}", "no JSON: "),
    "cut off": (b'{"messages": [', "no JSON: "),
    "no object": (b'["messages"]', "an object is expected, not ['messages']"),
    "not a number": (b'{"messages": [], "x": NaN}', "no JSON: "),
    "half a surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "no JSON: no low surrogate"),
    "bad UTF-8": (b'{"messages": "\xff"}', "no JSON: str is not valid UTF-8"),
    "too deep": (b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}", "nested too deeply: 250 levels at most"),
    "too deep, in the long way": (b'{"messages" : ' + b"[" * 995 + b"]" * 995 + b"}", "nested too deeply: 250 levels"),
    "arguments too deep for JSON": (
        b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": '
        + (b"[" * 400 + b"]" * 400 + b"}}}]}]}"),
        "nested too deeply: 250 levels at most",
    ),
    "much too deep": (b'{"messages": ' + b"[" * 9999 + b"]" * 9999 + b"}", "no JSON: depth limit exceeded"),
    "a key twice": (b'{"messages": [], "messages": []}', "the key 'messages' is there twice"),
    "a key twice, with spaces": (b'{"messages" : [], "messages": []}', "the key 'messages' is there twice"),
    "a key twice, with a carriage return": (b'{"a"\r:1, "a":2}', "the key 'a' is there twice"),
    "a key twice, and a colon in disguise": (b'{"x": "\\u003A", "a": 1, "a": 2}', "the key 'a' is there twice"),
    "a key twice, and a value like a key": (b'{"a" : ":x", "a": 1}', "the key 'a' is there twice"),
    "no messages": ({"message": []}, "messages: Field required"),
    "none": (turns(), "messages: List should have at least 1 item"),
    "a text": ({"messages": 3}, "messages: Input should be a valid list (got 3)"),
    "no role": (turns({"content": "x"}, SAY), "messages[0].role: Field required"),
    "an unknown key": (turns({**ASK, "contents": "x"}, SAY), "messages[0].contents: Extra inputs are not permitted"),
    "content a number": (turns({**ASK, "content": 3}, SAY), "messages[0].content: Input should be a valid string or"),
    "a picture": (
        turns({**ASK, "content": [{"type": "image_url", "image_url": "x"}]}, SAY),
        "messages[0].content[0].type: Input should be 'text'",
    ),
    "no answer": (turns(ASK), "messages: no assistant turn to train on"),
    "an empty answer": (turns(ASK, {**SAY, "content": " \n"}), "messages[1].content: the assistant's answer is empty"),
    "no content": (turns(ASK, {"role": "assistant"}), "messages[1].content: the assistant's answer is empty"),
    "all of weight 0": (turns(ASK, {**SAY, "weight": 0}), "messages: every assistant turn has weight 0"),
    "a weight of half": (turns(ASK, {**SAY, "weight": 0.5}), "messages[1].weight: Input should be 0 or 1 (got 0.5)"),
    "a weight of a question": (turns({**ASK, "weight": 0}, SAY), "messages[0].weight: is of assistant messages"),
    "a user calls": (
        turns({**called({}), "role": "user", "content": "x"}, SAY),
        "messages[0].tool_calls: only an assist",
    ),
    "arguments no JSON": (turns(ASK, called("{x: 1}")), "messages[1].tool_calls[0].function.arguments: no JSON: "),
    "arguments NaN": (turns(ASK, called('{"x": NaN}')), "messages[1].tool_calls[0].function.arguments: no JSON: "),
    "arguments half a surrogate": (
        turns(ASK, called('{"x": "\\ud800"}')),
        "messages[1].tool_calls[0].function.arguments: no JSON: no low surrogate",
    ),
    "arguments too deep": (
        turns(ASK, called('{"x":' * 300 + "1" + "}" * 300)),
        "messages[1].tool_calls[0].function.arguments: nested too deeply",
    ),
    "arguments a list": (
        turns(ASK, called("[1]")),
        "messages[1].tool_calls[0].function.arguments: an object is expected",
    ),
    "arguments twice": (
        turns(ASK, called('{"x": 1, "x": 2}')),
        "messages[1].tool_calls[0].function.arguments: the key 'x' is there twice",
    ),
    "a nameless tool": (
        turns(ASK, called({}, name="")),
        "messages[1].tool_calls[0].function.name: String should have at",
    ),
    "a tool without a function": (turns(ASK, SAY, tools=[{"type": "function"}]), "tools[0].function: Field required"),
    "tools no JSON": (turns(ASK, SAY, tools="[}"), "tools: no JSON: "),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_by_file_line_and_field(tmp_path: Path, line: Any, message: str) -> None:
    told = refusal(written(tmp_path, GOOD, line, GOOD), format="conversation")
    assert told.startswith(f"chat.jsonl:2: {message}")
    assert "\n" not in told


def test_all_bad_lines_are_told_of_at_once_twenty_shown_and_the_others_counted(tmp_path: Path) -> None:
    told = refusal(written(tmp_path, GOOD, *[turns(ASK)] * 30)).splitlines()
    assert len(told) == 21
    assert told[0].startswith("chat.jsonl:2: ")
    assert told[19].startswith("chat.jsonl:21: ")
    assert told[20] == "… and 10 more: 30 problems in all"


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", "has no rows"),
    "white space": ("a.jsonl", b" \n\n\t\n", "has no rows"),
    "byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "begins with a UTF-8 byte order mark"),
    "UTF-16": ("a.jsonl", json.dumps(GOOD).encode("utf-16"), "is UTF-16; save it as UTF-8 (iconv"),
    "UTF-16 without a mark": ("a.jsonl", json.dumps(GOOD).encode("utf-16-le"), "is no text: it has NUL bytes"),
    "an array": ("a.json", json.dumps([GOOD]).encode(), "is a JSON array; write an object to a line (jq"),
    "torn gzip": (
        "a.jsonl.gz",
        gzip.compress(b"x" * 999 + json.dumps(GOOD).encode() * 99)[:-9],
        "is a damaged gzip file",
    ),
    "unknown ending": ("a.txt", json.dumps(GOOD).encode(), "its name ends in none of .jsonl"),
    "unknown keys": (
        "a.jsonl",
        b'{"q": 1, "a": 2}',
        "its format cannot be told by its keys (q, a): conversation by mess",
    ),
    "keys that would write on the terminal": ("a.jsonl", b'{"a\\u001b[2J\\n": 1}', r"by its keys ('a\x1b[2J\n'): "),
    "very many keys": (
        "a.jsonl",
        json.dumps({f"k{n}": n for n in range(99)}).encode(),
        "k18, k19, …): ",
    ),
    "history of a text": ("a.jsonl", b'{"instruction": "a", "output": "b", "history": ["xy"]}', "not 'xy'"),
    "history without an answer": (
        "a.jsonl",
        b'{"instruction": "a", "output": "b", "history": [["x", " "]]}',
        "a.jsonl:1: history[0][1]: the assistant's answer is empty",
    ),
    "no Parquet": ("a.parquet", b"PAR1 or not PAR1", "is no Parquet file that can be read: "),
    "empty Parquet": ("a.parquet", b"", "is no Parquet file that can be read: "),
    "CSV: fields": ("a.csv", b"prompt,completion\na,b\na,b,c\n", "a.csv:3: 3 fields, the header has 2"),
    "CSV: open quote": ("a.csv", b'prompt,completion\na,"b\n', "is no CSV from line 2 on: unexpected end of data"),
    "CSV: column twice": ("a.csv", b"prompt,prompt\na,b\n", "has the column 'prompt' twice in its header"),
    "CSV: semicolons": ("a.csv", b"prompt;completion\na;b\n", "is separated by semicolons"),
    "CSV: Latin-1": ("a.csv", b"prompt,completion\na,\xe9t\xe9\n", "line 2 is no UTF-8"),
    "CSV: byte order mark": ("a.csv", b"\xef\xbb\xbfprompt,completion\na,b\n", "begins with a UTF-8 byte order mark"),
    "CSV: header alone": ("a.csv", b"prompt,completion\n", "has no rows"),
    "CSV: empty answer": ("a.csv", b"prompt,completion\na,\n", "a.csv:2: completion: is empty"),
}


@pytest.mark.parametrize(("name", "data", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    assert message in refusal(file).splitlines()[-1]


def test_a_pipe_and_a_device_are_refused_before_they_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "device.jsonl").symlink_to("/dev/urandom")
    for name in ("pipe.jsonl", "device.jsonl"):
        assert refusal(tmp_path / name) == f"{name}: is a pipe or a device: rows are read twice, so save them to a file"


@pytest.mark.parametrize("value", ["date", "duration", "zone"])
def test_values_of_parquet_that_python_has_not_are_named(tmp_path: Path, value: str) -> None:
    kind = {"date": pa.timestamp("s"), "duration": pa.duration("s"), "zone": pa.timestamp("us", "No/Where")}[value]
    odd = pa.array([0 if value == "zone" else 2**52], kind)
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"], "when": odd}), tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet").startswith("a.parquet: has a value in rows 1 to 1 that cannot be read: ")


def test_parquet_damaged_anywhere_is_bad_input(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"] * 99, "completion": ["b"] * 99}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for at in range(4, len(whole) - 8, 7):
        (tmp_path / "a.parquet").write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with suppress(DataError):  # of anything else a person would see a stack trace
            read(tmp_path / "a.parquet")


def test_fields_that_nobody_reads_are_not_kept_without_bound(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", f"extra{number:05}": 1} for number in range(2000)]
    assert len(read(written(tmp_path, *rows))[1].ignored) == 100


def test_a_wide_csv_takes_time_in_line_with_its_width(tmp_path: Path) -> None:
    """30,000 columns: counting each name in all of them would be a billion comparisons."""
    names = [f"c{number}" for number in range(30_000)]
    (tmp_path / "a.csv").write_text(",".join(names) + "\n" + ",".join(names) + "\n")
    assert "its format cannot be told by its keys (c0, c1" in refusal(tmp_path / "a.csv")


def test_a_file_that_is_not_there_a_directory_and_one_that_may_not_be_read(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.jsonl") == "no.jsonl: there is no such file"
    (tmp_path / "dir.jsonl").mkdir()
    assert "dir.jsonl: is a directory, and none that datasets' save_to_disk wrote" in refusal(tmp_path / "dir.jsonl")
    closed = written(tmp_path, GOOD, name="closed.jsonl")
    closed.chmod(0)
    code = (
        "import os\nfrom aim_trainer.data.sources import records\nfrom aim_trainer.job.dataset import Source\n"
        "os.geteuid() or os.seteuid(65534)\n"
        f"list(records(Source(uri={str(closed)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert "may not be read: permission denied" in done.stderr


def test_a_row_of_a_hundred_megabytes_is_passed_over_in_little_memory(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    with file.open("ab") as out:
        out.write(b'{"messages": "')
        for _ in range(100):
            out.write(b"x" * 1_000_000)
        out.write(b'"}\n' + json.dumps(turns(ASK)).encode())
    tracemalloc.start()
    told = refusal(file).splitlines()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert told == [
        "chat.jsonl:2: longer than 16 MiB; cut it into several rows",
        "chat.jsonl:3: messages: no assistant turn to train on",
    ]
    assert peak < 60_000_000


def test_memory_stays_flat_over_a_hundred_thousand_rows(tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    file.write_bytes((json.dumps(GOOD).encode() + b"\n") * 100_000)
    problems, seen = Problems(), Seen("many")
    rows = Reader(spec()).examples(Source(uri=str(file)), problems, seen)
    for _ in range(1000):
        next(rows)
    before = psutil.Process().memory_info().rss
    assert sum(1 for _ in rows) == 99_000
    assert psutil.Process().memory_info().rss - before < 4_000_000


SAID = Conversation([ASK, SAY])
READ: dict[str, tuple[dict[str, Any], Example]] = {
    "conversation": (GOOD, SAID),
    "prompt-completion": ({"prompt": "Where is Ada?", "completion": "In Paris."}, SAID),
    "two lists": ({"prompt": [ASK, SAY, ASK], "completion": [SAY]}, Conversation([ASK, SAY, ASK, SAY], None, (1,))),
    "alpaca": ({"instruction": "Where is Ada?", "input": "", "output": "In Paris."}, SAID),
    "alpaca, with input": (
        {"instruction": "Where is", "input": "Ada?", "output": "In Paris."},
        Conversation([{**ASK, "content": "Where is\nAda?"}, SAY]),
    ),
    "alpaca, with history": (
        {"instruction": "Where is Ada?", "output": "In Paris.", "system": "Be brief.", "history": [["Hi", "Hello"]]},
        Conversation(
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                ASK,
                SAY,
            ]
        ),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Where is Ada?"}, {"from": "gpt", "value": "In Paris."}]},
        SAID,
    ),
    "parts": (
        turns({**ASK, "content": [{"type": "text", "text": "Where"}, {"type": "text", "text": "is Ada?"}]}, SAY),
        Conversation([{**ASK, "content": "Where\nis Ada?"}, SAY]),
    ),
    "weights": (
        turns(ASK, {**SAY, "weight": 0}, ASK, {**SAY, "weight": 1}),
        Conversation([ASK, SAY, ASK, SAY], None, (1,)),
    ),
    "nulls of a message": (turns({**ASK, "name": None, "tool_calls": None}, {**SAY, "weight": None}), SAID),
}


@pytest.mark.parametrize(("row", "example"), READ.values(), ids=READ)
def test_each_format_is_known_by_its_keys_and_read(tmp_path: Path, row: dict[str, Any], example: Example) -> None:
    assert read(written(tmp_path, row))[0] == [example]


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "tool", "bot", None, 1, ["user"]]),
            "content": st.sampled_from(["a", "", " ", None, 3, [], [{"type": "text", "text": "a"}]]),
        },
        optional={"name": st.sampled_from(["x", None]), "weight": st.sampled_from([0, 1, None])},
    )
    | st.sampled_from([None, "a", {}, {"role": "assistant"}]),
    max_size=3,
)


def told(record: dict[str, Any]) -> Conversation | str:
    try:
        return conversation(copy.deepcopy(record))
    except RowProblem as problem:
        return str(problem)


@settings(max_examples=300, deadline=None)
@given(MESSAGES)
def test_the_short_way_for_plain_conversations_tells_what_the_long_one_does(messages: list[Any]) -> None:
    assert told({"messages": messages}) == told({"messages": messages, "tools": []})


def test_the_signature_of_a_web_address_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"no row\n")
    with http_server(tmp_path) as port:
        address = f"http://127.0.0.1:{port}/a.jsonl"
        with pytest.raises(DataError) as caught:
            read(f"{address}?X-Amz-Signature=secret")
    assert str(caught.value).startswith(f"{address}?…:1: no JSON")
    assert Source(uri="http://h/a.csv?sig=secret").shown == "http://h/a.csv?…"
    assert Source(uri="/a?b.csv").shown == "/a?b.csv"


def test_fields_that_nobody_reads_are_told(tmp_path: Path) -> None:
    seen = read(written(tmp_path, GOOD, {**GOOD, "id": 7, "source": "x"}))[1]
    assert (seen.rows, seen.format, seen.ignored) == (2, "conversation", {"id", "source"})


def test_gzip_is_read_by_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    assert read(file)[0] == [SAID]


def test_columns_name_the_fields(tmp_path: Path) -> None:
    file = tmp_path / "faq.csv"
    file.write_text('question,answer,id\n"Where\nis Ada?",In Paris.,1\nWho?,,2\n')
    assert refusal(file, columns={"prompt": "question", "completion": "answer"}).startswith(
        "faq.csv:4: completion: is emp"
    )
    file.write_text('question,answer,id\n"Where is Ada?",In Paris.,1\n')
    examples, seen = read(file, columns={"prompt": "question", "completion": "answer"})
    assert examples == [SAID]
    assert seen.ignored == {"id"}
    told = refusal(file, format="prompt-completion", columns={"prompt": "question", "completion": "answr"})
    assert told == "faq.csv: columns.completion: there is no column 'answr'; other columns are: answer, id, prompt"
    told = refusal(file, format="prompt-completion", columns={"promt": "question"})
    assert told == "faq.csv: columns.promt: the format has no such field; it has: prompt, completion, tools"


def test_templates_take_the_rows_they_are_of(tmp_path: Path) -> None:
    pair = written(tmp_path, {"prompt": "def f(", "completion": "x): ..."})
    assert read(pair, spec(template="code"))[0] == [Completion("def f(", "x): ...")]
    (summary,) = read(pair, spec(template="summarization"))[0]
    assert isinstance(summary, Conversation)
    assert summary.messages[0]["content"] == "Summarize the following text.\n\ndef f("
    chat = written(tmp_path, GOOD, name="b.jsonl")
    assert "template code is of {prompt, completion}" in refusal(chat, spec(template="code"))
    assert "template classification is of {text, label}" in refusal(
        chat, spec(template="classification", dataset=LABELS)
    )
    (prompted,) = read(chat, spec(dataset={"systemPrompt": "Be brief."}))[0]
    assert prompted == Conversation([{"role": "system", "content": "Be brief."}, ASK, SAY])


LABELS = {"labels": ["ham", "spam"]}


def test_a_label_is_one_of_the_jobs(tmp_path: Path) -> None:
    job = spec(template="classification", dataset=LABELS)
    good = written(tmp_path, {"text": "Buy!", "label": "spam"}, {"text": "Hi", "label": 0})
    assert read(good, job)[0] == [Labelled("Buy!", 1), Labelled("Hi", 0)]
    bad = [{"text": "x", "label": label} for label in ("Spam", 2, True, None, ["ham"], 0.0)]
    told = refusal(
        written(tmp_path, *bad, {"text": " ", "label": "ham"}, {"label": "ham"}), job, format="classification"
    )
    expected = [f"label: one of dataset.labels (ham, spam) is expected, not {row['label']!r}" for row in bad]
    expected += ["text: is empty", "text: is missing"]
    assert told.splitlines() == [f"chat.jsonl:{line}: {message}" for line, message in enumerate(expected, 1)]


def test_each_tool_keeps_its_own_fields_and_the_nulls_a_person_wrote(tmp_path: Path) -> None:
    rows = [
        turns(ASK, called({"x": 2**70, "y": None}, "move"), tools=[{"type": "function", "function": {"name": "move"}}]),
        turns(ASK, called('{"text": "hi"}', "say"), tools=[{"type": "function", "function": {"name": "say"}}]),
    ]
    examples = read(written(tmp_path, *rows))[0]
    asked = [e.messages[1]["tool_calls"][0]["function"]["arguments"] for e in examples if isinstance(e, Conversation)]
    assert asked == [{"x": 2**70, "y": None}, {"text": "hi"}]
    assert len({content_hash(example) for example in examples}) == 2
    as_text = [{name: json.dumps(value) for name, value in row.items()} for row in rows]
    pq.write_table(pa.Table.from_pylist(as_text), tmp_path / "tools.parquet")
    assert read(tmp_path / "tools.parquet")[0] == examples


def test_arguments_that_arrow_has_mixed_are_refused_with_the_remedy(tmp_path: Path) -> None:
    rows = [turns(ASK, called({"x": 1}, "move")), turns(ASK, called({"text": "hi"}, "say"))]
    file = tmp_path / "tools.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    told = refusal(file).splitlines()
    assert len(told) == 2
    assert told[0].startswith(
        "tools.parquet:1: messages[1].tool_calls[0].function.arguments: Arrow has mixed the fields"
    )
    pq.write_table(pa.Table.from_pylist(rows[:1]), file)
    assert len(read(file)[0]) == 1


def test_a_parquet_column_of_the_wrong_kind_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "completion": [3]}), file)
    assert refusal(file) == "a.parquet:1: completion: text is expected, not 3"


def test_saved_datasets_are_read_with_their_classes_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["spam", "ham"])}
    )
    saved = datasets.Dataset.from_dict({"text": ["Buy!", "Hi"], "label": [0, 1]}, features=features)
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "saved"))
    job = spec(template="classification", dataset=LABELS)
    assert read(tmp_path / "saved", job)[0] == [Labelled("Buy!", 1), Labelled("Hi", 0)]
    told = refusal(tmp_path / "saved", job, split="tset")
    assert told == "saved: has no split tset; there are: train (dataset.sources[].split)"


def test_what_rows_say_is_equal_however_they_were_written() -> None:
    assert content_hash(Conversation([ASK, SAY])) == content_hash(Conversation([dict(ASK), dict(SAY)], None, ()))
    assert content_hash(Conversation([ASK, SAY])) != content_hash(Conversation([SAY, ASK]))


def test_reading_imports_neither_torch_nor_ray_nor_transformers(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    pq.write_table(pa.Table.from_pylist([GOOD]), tmp_path / "a.parquet")
    datasets.Dataset.from_list([GOOD]).save_to_disk(str(tmp_path / "saved"))
    sources = [str(file), str(tmp_path / "a.parquet"), str(tmp_path / "saved")]
    code = (
        "import sys\nfrom aim_trainer.data.sources import records\nfrom aim_trainer.data.read import Reader\n"
        "from aim_trainer.job.dataset import Source\n"
        f"for uri in {sources}: assert len(list(records(Source(uri=uri)))) == 1\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
