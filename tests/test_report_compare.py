"""Reports side by side."""

import copy
import re

import numpy as np
import pytest

from hrsam.report import compare
from hrsam.report.comparison import paired_difference
from hrsam.report.values import shown
from tests.reports import Elements, build, cells, played, sample


@pytest.fixture
def report():
    return build(played())


def test_compare_pairs_samples_by_name():
    before, after = build(played()), build(played(lift=0.02)[::-1], name="better")
    md, html = compare([before, after])
    assert md.startswith("# A · hrsam_pp_t.starter against B · better\n")
    Elements(html)
    deltas = {s["name"]: np.mean(s["ious"]) for s in after["samples"]}
    deltas = {s["name"]: 100 * (deltas[s["name"]] - np.mean(s["ious"])) for s in before["samples"]}
    gains = re.findall(r"\| (\w/\d+) \| [\d.]+ \| [\d.]+ \| \+([\d.]+) \|", md)
    assert gains == [(name, f"{deltas[name]:.1f}") for name in sorted(deltas, key=lambda n: -deltas[n])]
    assert cells("NoC@90", html) == [f"{r['summary']['all']['noc']['90']:.2f}" for r in (before, after)]
    mean = after["summary"]["all"]["noc"]["90"] - before["summary"]["all"]["noc"]["90"]
    assert cells("B − A, NoC@90", html)[0] == shown(mean, 2)
    assert (md, html) == compare([before, after])


def test_compare_finds_nothing_between_equal_reports():
    md, _ = compare([build(played()), build(played()), build(played())])
    assert md.count("includes zero, so this is no clear difference") == 4
    assert "Largest" not in md


def test_the_verdict_says_which_way_and_how_sure():
    slow = build([sample(str(i), [0.5, 0.6, 0.92, 0.95, 0.95]) for i in range(9)], clicks=5)
    quick = build([sample(str(i), [0.92, 0.95, 0.95, 0.95, 0.96]) for i in range(9)], clicks=5)
    lines = compare([slow, quick])[0].splitlines()[2:4]
    assert lines == [
        "- B against A, clicks to IoU 90 %: 2.00 fewer (95 % interval −2.00 to −2.00).",
        "- B against A, IoU after 5 clicks: 1.0 points higher (95 % interval +1.0 to +1.0).",
    ]
    assert "2.00 more (95 % interval +2.00 to +2.00)" in compare([quick, slow])[0]


def test_paired_interval():
    rng = np.random.default_rng(3)
    first = rng.normal(0, 5, 400)
    deltas = rng.normal(1, 2, 400)
    got = paired_difference(first, first + deltas)
    error = 1.96 * deltas.std() / 20
    assert got.mean == pytest.approx(deltas.mean())
    assert (got.low, got.high) == pytest.approx((deltas.mean() - error, deltas.mean() + error), abs=0.03)
    assert got == paired_difference(first, first + deltas)
    assert got.clear
    holes = np.where(np.arange(400) < 399, np.nan, first)
    assert paired_difference(holes, first).samples == 1
    assert np.isnan(paired_difference(holes, first).low)


@pytest.mark.parametrize(
    ("place", "key", "value", "said"),
    [
        ("protocol", "rule", "ritm", "the protocols differ, A has rule 'frozen' and B has 'ritm'"),
        ("protocol", "seed", 7, "A has seed 0 and B has 7"),
        ("data", "sha256", "12" * 32, "the data differ, A has sha256 abababababab… and B has 121212121212…"),
    ],
)
def test_compare_refuses_other_protocols_and_data(report, place, key, value, said):
    other = copy.deepcopy(report)
    other[place][key] = value
    with pytest.raises(ValueError) as refused:
        compare([report, other])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    md, html = compare([report, other], strict=False)
    assert "Not a fair comparison" in md.split("##")[0]
    assert html.index("Not a fair comparison") < html.index("<svg")


def test_compare_refuses_other_samples_and_pairs_the_common_ones(report):
    fewer = build(played()[:5])
    with pytest.raises(ValueError, match="the samples differ, A has 12 and B has 5"):
        compare([report, fewer])
    md, _ = compare([report, fewer], strict=False)
    assert "Differences are 5 samples paired by name" in md
    strangers = build([sample("nobody", [0.5] * 20)])
    md, html = compare([report, strangers], strict=False)
    assert "have no sample with clicks to IoU 90 % in common" in md
    Elements(html)


def test_other_words_for_the_same_protocol_compare(report):
    other = copy.deepcopy(report)
    other["protocol"]["text"] = ["Said otherwise."]
    compare([report, other])


@pytest.mark.parametrize("count", [0, 1, 7])
def test_compare_needs_two_to_six_reports(report, count):
    with pytest.raises(ValueError, match="give 2 to 6"):
        compare([report] * count)


def test_sessions_of_different_length_side_by_side():
    short = build([sample("A/0", [0.5, 0.92])], clicks=2)
    _, html = compare([build(played()), short], strict=False)
    Elements(html)
