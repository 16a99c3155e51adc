"""Reading a report from a file that may be anything."""

import copy
import json

import numpy as np
import pytest

from hrsam.report import compare, markdown, page, read_report, table
from tests.reports import build, played, without_numbers


@pytest.fixture
def report():
    return build(played())


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def test_reading_gives_back_what_was_written(tmp_path, report):
    report["extra"] = {"kept": True}
    assert read_report(write(tmp_path / "r.json", report)) == report


def test_reading_fills_in_what_may_be_missing(tmp_path, report):
    expected = without_numbers(report)
    for part in (expected["summary"]["all"], *expected["summary"]["groups"].values()):
        part["thin_recall"] = {"5": None}

    def pruned(value):
        if isinstance(value, dict):
            return {
                k: pruned(v) for k, v in value.items() if v is not None or k.isdigit() or value is expected["seconds"]
            }
        return [pruned(v) for v in value] if isinstance(value, list) else value

    got = read_report(write(tmp_path / "r.json", pruned(expected)))
    assert got == expected
    page(got, [])
    assert read_report(write(tmp_path / "nan.json", json.dumps(without_numbers(report)))) == expected  # NaN in the file


def damaged(change):
    report = build(played(n=3))
    change(report)
    return report


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(format=2), "has format 2, this version reads format 1"),
        (lambda r: r.update(format=True), "has format True"),
        (lambda r: r.pop("format"), "has format None"),
        (lambda r: r.pop("samples"), "has no 'samples'"),
        (lambda r: r["protocol"].pop("rule"), "protocol has no 'rule'"),
        (lambda r: r.update(method=[]), "method is a list, expected a table"),
        (lambda r: r.update(made=5), "made is 5, expected text"),
        (lambda r: r["protocol"].update(clicks=0), "protocol.clicks is 0"),
        (lambda r: r["protocol"].update(clicks=True), "protocol.clicks is True"),
        (lambda r: r["protocol"].update(clicks=10**9), "protocol.clicks is 1000000000"),
        (lambda r: r["protocol"].update(seed=10**400), "protocol.seed is a huge number"),
        (lambda r: r["protocol"].update(clicks=19), "summary.all.iou has 20 means for 19 clicks"),
        (lambda r: r["summary"]["all"].update(samples=4), "counts 4 samples, 3 are listed"),
        (lambda r: r["summary"]["all"]["noc"].update({"<b>": 1}), "summary.all.noc has the name '<b>'"),
        (lambda r: r["summary"]["groups"].update(x=3), "summary.groups.x is 3"),
        (lambda r: r["seconds"].update(encode="1"), "seconds.encode is '1', expected a number"),
        (lambda r: r["seconds"].update(encode=-1), "seconds.encode is -1"),
        (lambda r: r["samples"][1]["ious"].pop(), r"samples\[1\] has 19 IoUs"),
        (lambda r: r["samples"][1]["ious"].__setitem__(0, 1.5), r"samples\[1\].ious\[0\] is 1.5"),
        (lambda r: r["samples"][1].update(clicks=[[1, 2, 1]] * 21), "21 clicks for a protocol of 20"),
        (lambda r: r["samples"][1].update(clicks=[[1, 2]]), r"a click of samples\[1\]"),
        (lambda r: r["samples"][1].update(clicks=[[1, 2, 3]]), r"a click of samples\[1\]"),
        (lambda r: r["samples"][1].update(size=[3]), r"samples\[1\].size"),
        (lambda r: r["samples"][1].update(name=r["samples"][0]["name"]), "two samples have the same name"),
        (lambda r: r["data"].update(problems=["x"]), r"data.problems\[0\] is 'x'"),
        (lambda r: r["machine"].update(versions={"torch": 2}), "machine.versions.torch is 2, expected text"),
    ],
)
def test_damaged_reports_are_refused_in_one_sentence(tmp_path, change, said):
    path = write(tmp_path / "report.json", damaged(change))
    with pytest.raises(ValueError, match=said) as refused:
        read_report(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert len(str(refused.value)) < len(str(path)) + 300
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"[]", "holds a list, expected a report"),
        (b"\xff\xfe\x00", "not JSON"),
        (b'{"format": 1', "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"format": ' + b"9" * 6000 + b"}", "not JSON|has format a huge number"),
        (b'{"format": 1e999}', "has format inf"),
        (b'{"format": "' + b"x" * 5000 + b'"}', "has format 'xxx"),
    ],
)
def test_files_that_are_no_report(tmp_path, content, said):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as refused:
        read_report(path)
    assert len(str(refused.value)) < len(str(path)) + 300


def test_sizes_and_places_are_bounded(tmp_path, report):
    path = write(tmp_path / "report.json", report)
    with pytest.raises(ValueError, match="larger than 1000 bytes"):
        read_report(path, max_bytes=1000)
    for missing in (tmp_path, tmp_path / "nothing.json"):
        with pytest.raises(ValueError, match="there is no such file"):
            read_report(missing)


@pytest.mark.parametrize("seed", range(4))
def test_any_retyped_value_is_refused_or_shown(tmp_path, seed):
    """Each place of a report in turn holds something else: one sentence, or pages that can be made."""
    rng = np.random.default_rng(seed)
    base = build(played(n=2))
    strange = [None, True, -1, 1e300, "x", [], {}, [[]], "\ud800<b>", 0.5, 10**30]

    def places(value, way=()):
        if way:
            yield way
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield from places(value[key], (*way, key))

    ways = list(places(base))
    sentences = []
    for index in rng.choice(len(ways), 150, replace=False):
        report = copy.deepcopy(base)
        holder = report
        for key in ways[index][:-1]:
            holder = holder[key]
        holder[ways[index][-1]] = strange[int(rng.integers(len(strange)))]
        path = write(tmp_path / "report.json", report)
        try:
            report = read_report(path)
        except ValueError as error:
            sentences.append(str(error))
            continue
        for text in (page(report, []), markdown(report), table(report), *compare([report, report], strict=False)):
            text.encode("utf-8")
    assert 0 < len(sentences) < 150
    assert not any("\n" in sentence for sentence in sentences)
