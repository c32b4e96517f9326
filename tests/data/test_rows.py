import pytest

from gist_ray.config import DataConfig, SourceConfig
from gist_ray.data.sources import Reject, Triplet, parse_row

NAN = float("nan")


def parsed(row, *instructions: str, **options):
    data = DataConfig(sources=(SourceConfig(path="x", **options),), max_chars=99, instructions=frozenset(instructions))
    return parse_row(row, data.sources[0], data)


def test_instructions_are_dropped_or_prefixed_by_role():
    row = {"query": "q", "pos": "p", "neg": ["n", "m"], "query_instruct": "Find:", "pos_instruct": "", "task_type": 3}
    assert parsed(row) == Triplet("q", "p", ("n", "m"), "3")
    assert parsed(row, "query", "pos", "neg") == Triplet("Find: q", "p", ("n", "m"), "3")
    assert parsed(row, "pos") == Triplet("q", "p", ("n", "m"), "3")
    assert parsed({**row, "i": "Ask:"}, "query", columns={"query_instruct": "i"}).query == "Ask: q"
    medi = {"query": ["Find:", "q"], "pos": ["Doc:", " p "], "neg": ["Doc:", "n"], "task_id": 7}
    assert parsed(medi) == Triplet("q", "p", ("n",), "7")
    assert parsed(medi, "pos") == Triplet("q", "Doc: p", ("n",), "7")
    assert parsed({**medi, "neg": [["Doc:", "n"], ["", "m"]]}, "neg").negatives == ("Doc: n", "m")
    assert parsed({**row, "query": " "}, "query").reason == "query is empty", "an instruction alone is no text"
    assert parsed({**row, "query_instruct": NAN}, "query").reason == "query_instruct is not a string (float)"
    assert parsed({**row, "query_instruct": "x" * 98}, "query").reason == "query has more than 99 characters"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"query": 3, "pos": "p"}, "query is not a string (int)"),
        ({"query": "q", "pos": NAN}, "pos is not a string (float)"),
        ({"query": "q", "pos": None}, "pos is missing"),
        ({"query": "q"}, "pos is missing"),
        ({"query": " ", "pos": "p"}, "query is empty"),
        ({"query": "q", "pos": "p", "neg": " "}, "neg is empty"),
        ({"query": "q", "pos": "p", "neg": {"a": 1}}, "neg is not a string (dict)"),
        ({"query": "q", "pos": "p", "neg": ["n", None]}, "neg is not a string (NoneType)"),
        ({"query": "q", "pos": "p", "neg": ["n", ""]}, "neg is empty"),
        ({"query": ["i", ["t"]], "pos": ["i", "t"]}, "query is not a string (list)"),
        ({"query": "q", "pos": "q"}, "pos equals query"),
        ({"query": "q", "pos": "p", "neg": "q"}, "neg equals query"),
        ({"query": "q", "pos": "p", "neg": ["n", "p"]}, "neg equals pos"),
        ({"query": "q" * 100, "pos": "p"}, "query has more than 99 characters"),
        ({"query": "\ud800", "pos": "p"}, "query is not valid Unicode"),
        ({"query": "q", "pos": "p\0"}, "pos contains a NUL character"),
        ({"query": "q", "pos": "p", "task_name": "caf\udce9"}, "task_name is not valid Unicode"),
        ({"query": "q", "pos": "p", "task_name": ["t"]}, "task_name is not a string (list)"),
        ({"query": "q", "pos": "p", "task_type": NAN}, "task_type is not a string (float)"),
        (["q", "p"], "row is a list, not an object"),
    ],
)
def test_bad_rows_are_rejected_with_their_reason(row, reason: str):
    found = parsed(row)
    assert (found.reason, found.row) == (reason, row)
    assert found.task == ("default" if isinstance(row, dict) and not {"task_name", "task_type"} & set(row) else None)
    assert parsed(row, task_name="mine").task == "mine"


def test_the_label_of_a_triplet():
    row = {"query": "q", "pos": "p", "neg": "n"}
    assert parsed(row).label is None and parsed({**row, "query_label": " "}).label is None
    assert parsed({**row, "label": "x"}).label is None  # which in a file of triplets may say anything
    assert parsed({**row, "query_label": 7}) == Triplet("q", "p", ("n",), "default", "7")
    assert parsed({**row, "query_label": "x"}, "neg").label == "x"
    assert parsed({**row, "intent": "y"}, columns={"query_label": "intent"}).label == "y"
    assert parsed({**row, "query_label": 0.5}).reason == "query_label is neither a string nor a whole number (float)"
    assert parsed({**row, "query_label": "a\0"}).reason == "query_label contains a NUL character"
    assert parsed({**row, "pos": "q", "query_label": "x"}).reason == "pos equals query"


def test_what_a_reader_rejected_keeps_its_reason():
    unread = Reject("line is not valid JSON", "{")
    assert parsed(unread) == unread and parsed(unread, tasks="^t") == unread
    assert parsed(unread, task_name="mine") == Reject(unread.reason, unread.row, "mine")
    assert parsed(unread, task_name="mine", tasks="^t") is None


def test_the_task_is_found_under_its_aliases():
    row = {"query": "q", "pos": "p"}
    assert parsed(row).task == "default"
    assert parsed({**row, "task_id": 7, "task_type": "", "task_name": None}).task == "7"
    assert parsed({**row, "task_name": "a", "task_type": "b"}).task == "a"
    assert parsed({**row, "task_name": "a", "set": "c"}, columns={"task_name": "set"}).task == "c"
    assert parsed({**row, "task_id": 4.0}).task == "4"
    assert parsed({**row, "task_name": {}}, task_name="mine").task == "mine"
