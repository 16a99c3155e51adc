"""Click traces: what is written comes back, what is damaged is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from hrsam import rle
from hrsam.clicks import Click
from hrsam.traces import Trace, in_order, mask_hash, read_traces, traces_hash, write_traces

MASK = np.eye(4, dtype=bool)
ONE = Trace(
    "a", "g", (4, 4), 4, ((1.0, 2.0, 1), None), (0.5, 1.0), ("x", "y"), {"1": 0.5}, {"1": None}, rle.encode(MASK),
    {"encode": 1.0},
)  # fmt: skip
HEAD = {"protocol": {"name": "frozen"}, "data": {"sha256": "0"}}


def test_round_trip(tmp_path):
    two = replace(ONE, name="b")
    write_traces(tmp_path / "t.jsonl", HEAD, [ONE, two])
    head, traces = read_traces(tmp_path / "t.jsonl")
    assert head == HEAD
    assert traces == [ONE, two]
    assert traces_hash(traces) == traces_hash([two, ONE])
    assert traces[0].click_at(0) == Click(1, 2)
    assert traces[0].click_at(1) is None
    assert in_order(traces, ["b", "missing", "a"]) == [two, ONE]


def test_the_hash_is_of_clicks_and_answers_not_of_time():
    assert traces_hash([ONE]) == traces_hash([replace(ONE, seconds={"encode": 9.0})])
    for change in ({"clicks": ((1.0, 3.0, 1), None)}, {"ious": (0.5, 0.9)}, {"masks": ("x", "z")}, {"name": "c"}):
        assert traces_hash([ONE]) != traces_hash([replace(ONE, **change)])


def test_mask_hash_knows_the_shape():
    assert mask_hash(MASK) != mask_hash(~MASK)
    assert mask_hash(np.zeros((2, 8), bool)) != mask_hash(np.zeros((4, 4), bool))


def test_a_torn_line_is_dropped_only_when_asked(tmp_path):
    path = tmp_path / "t.jsonl"
    write_traces(path, HEAD, [ONE, replace(ONE, name="b")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="line 3 is not a trace"):
        read_traces(path)
    assert read_traces(path, torn=True) == (HEAD, [ONE])
    path.write_bytes(whole[:5])
    assert read_traces(path, torn=True) == ({}, [])


@pytest.mark.parametrize(
    "change",
    [
        {"clicks": [[1, 2], None]},
        {"clicks": [[1, 2, float("nan")], None]},
        {"ious": [0.5]},
        {"ious": [0.5, 2.0]},
        {"size": [0, 4]},
        {"name": 3},
        {"masks": "xy"},
        {"final": {"size": [4, 4], "counts": "zz"}},
        {"final": {"size": [4_000_000, 4_000_000], "counts": [16]}},
        {"extra": 1},
    ],
)
def test_damaged_lines_are_refused_in_one_sentence(tmp_path, change):
    path = tmp_path / "t.jsonl"
    write_traces(path, HEAD, [ONE])
    lines = path.read_text().splitlines()
    path.write_text(lines[0] + "\n" + json.dumps({**json.loads(lines[1]), **change}) + "\n")
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2 is not a trace") as caught:
        read_traces(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_trace_file(tmp_path):
    path = tmp_path / "t.jsonl"
    with pytest.raises(ValueError, match="there is no file"):
        read_traces(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        read_traces(path)
    for text in (b"[]\n", b'{"format": 99}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="line 1 is not a trace"):
            read_traces(path)
    write_traces(path, HEAD, [ONE, ONE])
    with pytest.raises(ValueError, match="holds a sample twice"):
        read_traces(path)
