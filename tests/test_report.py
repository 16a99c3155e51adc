"""The report of an evaluation: Markdown, the page, its figures and its pictures."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from hrsam.clicks import Click
from hrsam.metrics import failures, noc
from hrsam.report import Case, compare, draw_case, markdown, page, table, worst
from hrsam.report import figures as fig
from hrsam.report.cases import EXTRA, MISSED
from hrsam.report.values import clicks_to, duration, iou_table, percent, shown
from tests.reports import HOSTILE, SHA, Elements, build, cells, jpeg, played, sample, without_numbers


@pytest.fixture
def report():
    return build(played())


def test_numbers_are_rounded_and_missing_ones_are_a_dash():
    assert [shown(1234.567, 2), shown(None), shown(float("nan"), 2), shown(-0.004, 2), shown(-1.5, 1)] == [
        "1,234.57", "–", "–", "0.00", "−1.5",
    ]  # fmt: skip
    assert [percent(0.8126), percent(None), percent(1)] == ["81.3", "–", "100.0"]
    assert [duration(s) for s in (1.2345, 0.0312, 0.0042, None)] == ["1.23 s", "31 ms", "4.2 ms", "–"]


def test_clicks_to_agrees_with_noc():
    ious = iou_table(played(n=40))
    for threshold in (80, 85, 90, 95):
        needed = clicks_to(ious, threshold)
        assert np.where(np.isinf(needed), 20, needed).mean() == noc(ious, threshold / 100)
        assert np.isinf(needed).sum() == failures(ious, threshold / 100)["never_reached"]
    assert np.isnan(clicks_to(np.array([[0.9, np.nan]]), 80)).all()


# Markdown and the table of the command line


def test_markdown_says_result_protocol_sources_and_problems(report):
    text = markdown(report)
    part = report["summary"]["all"]
    assert text.startswith("# hrsam_pp_t.starter on hqseg44k\n\n**")
    assert f"{part['noc']['90']:.2f} clicks on average" in text
    assert "12 of the 1,537 samples" in text
    assert "- The deepest error is clicked." in text
    for word in (SHA, "cd" * 32, "ef" * 32, "torch 2.13.0", "1.23 s", "31 ms", "x.png: no mask"):
        assert word in text
    row = next(line for line in text.splitlines() if line.startswith("| all |")).split(" | ")
    assert row[1:6] == ["12", *(f"{part['noc'][t]:.2f}" for t in ("80", "85", "90", "95"))]
    assert [int(n.strip(" |")) for n in row[6:]] == list(part["never_reached"].values())
    assert "| B | " in text
    assert "| 8.00 | 8.25 | 8.50 |" in text


def test_the_whole_data_set_needs_no_warning(report):
    report["data"].update(expected=12, problems=[])
    text = markdown(report)
    assert "> " not in text
    assert text.endswith("## Problems of the data set\n\nNone.\n")


def test_table_fits_100_columns(report):
    report["method"]["name"] = "m" * 150
    report["summary"]["groups"]["a very long name of a group"] = report["summary"]["all"]
    text = table(report)
    assert max(map(len, text.splitlines())) <= 100
    lines = [line.split() for line in text.splitlines()]
    header = next(line for line in lines if "NoC@90" in line)
    row = next(line for line in lines if line[:2] == ["all", "12"])
    part = report["summary"]["all"]
    got = dict(zip(header, row[1:]))
    assert got["NoC@90"] == f"{part['noc']['90']:.2f}"
    assert got["IoU@5"] == f"{100 * part['iou'][4]:.1f}"
    assert (got["bIoU@5"], got["thin@5"]) == ("63.4", "–")


# The page


def test_page_is_one_file_without_scripts(report):
    text = page(report, [Case("the worst", worst(report)[0], jpeg())])
    elements = Elements(text)
    assert elements.named("meta")[1] == {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    }
    assert {tag for tag, _ in elements.found}.isdisjoint({"script", "link", "iframe", "object", "a", "form"})
    assert [image["src"][:23] for image in elements.named("img")] == ["data:image/jpeg;base64,"]
    assert not re.search("https?:|url\\(|@import", text)
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    assert sum("aria-label" in a for a in elements.named("svg")) == 3


def test_numbers_in_the_page_are_those_of_the_report(report):
    text = page(report, [])
    columns = [report["summary"]["all"], *report["summary"]["groups"].values()]
    for threshold in ("80", "85", "90", "95"):
        assert cells(f"NoC@{threshold}", text) == [f"{part['noc'][threshold]:.2f}" for part in columns]
        assert cells(f"never@{threshold}", text) == [str(part["never_reached"][threshold]) for part in columns]
    for k in (1, 3, 5, 10, 20):
        assert cells(f"IoU@{k}", text) == [f"{100 * part['iou'][k - 1]:.1f}" for part in columns]
    assert f"<b>{columns[0]['noc']['95']:.2f}</b>" in text
    s = report["samples"][4]
    assert cells(s["name"], text)[:3] == [s["group"], "60 × 40", "10.0"]
    assert cells(s["name"], text)[3:7] == [
        f"{100 * v:.1f}" for v in (np.mean(s["ious"]), *np.take(s["ious"], (0, 4, 19)))
    ]


def test_the_curve_goes_through_the_means_and_bars_count_samples(report):
    text = page(report, [])
    main = re.findall(r'class="line main" points="(.*?)"', text)[0]
    ticks = re.findall(r'class="tick end" x="37.0" y="(.*?)">(\d+)<', text)
    (y0, v0), (y1, v1) = [(float(y) - 4.5, float(v)) for y, v in (ticks[0], ticks[1])]
    drawn = [float(p.split(",")[1]) for p in main.split()]
    back = [v0 + (y - y0) / (y1 - y0) * (v1 - v0) for y in drawn]
    assert np.allclose(back, 100 * np.array(report["summary"]["all"]["iou"]), atol=0.05)
    bars = dict(re.findall(r'class="bar (\w+)".*?height="(.*?)"', text))
    assert (float(bars["bad"]) > 0) == (report["summary"]["all"]["never_reached"]["90"] > 0)
    assert text.count('class="bar good"') == len(set(clicks_to(iou_table(report["samples"]), 90)) - {np.inf})


def test_solved_shares_and_bars_of_rows_made_by_hand():
    text = page(
        build([sample("a", [0.1, 0.92, 0.5]), sample("b", [0.1, 0.1, 0.9]), sample("c", [0.8] * 3)], clicks=3), []
    )
    axes = fig.Axes((1, 3), (0, 100))
    shares = [axes.at_y(v) for v in (0, 100 / 3, 200 / 3)]
    drawn = re.findall(r'class="line t2" points="(.*?)"', text)[0]  # at 90 %
    assert [float(p.split(",")[1]) for p in drawn.split()] == pytest.approx(shares, abs=0.06)
    figure = text[text.index("Clicks needed to IoU 90 %") :]
    ticks = {int(n): float(x) for x, n in re.findall(r'class="tick middle" x="(.*?)" y="274.0">(\d+)<', figure)}
    bars = re.findall(r'class="bar (\w+)" x="(.*?)" y=".*?" width="(.*?)"', figure)
    middles = [(kind, float(x) + float(w) / 2) for kind, x, w in bars]
    assert [kind for kind, _ in middles] == ["good", "good", "bad"]
    assert [x for _, x in middles[:2]] == pytest.approx([ticks[2], ticks[3]], abs=0.1)
    assert middles[2][1] > ticks[3] + 10


def test_samples_are_listed_worst_first(report):
    text = page(report, [])
    names = re.findall(r'<tr><th scope="row">(\w/\d+)</th>', text)
    means = {s["name"]: np.mean(s["ious"]) for s in report["samples"]}
    assert names == sorted(means, key=lambda name: means[name])
    assert [s["name"] for s in worst(report, 3)] == names[:3]


def test_hostile_text_is_shown_and_not_run(report):
    for holder, key in [
        (report, "made"), (report, "command"), (report["method"], "name"), (report["method"], "preset"),
        (report["method"], "weights_sha256"), (report["protocol"], "name"), (report["data"], "name"),
        (report["data"], "note"), (report["machine"], "device"), (report["samples"][0], "name"),
        (report["samples"][0], "group"), (report["data"]["problems"][0], "text"), (report["data"]["problems"][0], "where"),
    ]:  # fmt: skip
        holder[key] = HOSTILE
    report["protocol"]["text"][0] = HOSTILE
    report["seconds"][HOSTILE] = 1.0
    report["machine"]["versions"][HOSTILE] = HOSTILE
    report["summary"]["groups"][HOSTILE] = report["summary"]["groups"].pop("A")
    case = Case(HOSTILE, report["samples"][0], jpeg())
    md, html = compare([report, report])
    for text in (page(report, [case]), html):
        elements = Elements(text)
        assert {tag for tag, _ in elements.found}.isdisjoint({"script", "a"})
        assert "<script>alert(1)</script>" in "".join(elements.text)
        assert len(elements.named("meta")) == 3
        text.encode("utf-8")
    for text in (markdown(report), md):
        assert "\\<script\\>" in text
        assert not re.search(r"(?<!\\)<|(?<!\\)\[|(?<!\\)`", text)
        for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
        text.encode("utf-8")
    assert "\x00" not in table(report)
    table(report).encode("utf-8")


@pytest.mark.parametrize("clicks", [1, 3, 20, 50])
def test_a_single_sample_of_any_length(clicks):
    single = build([sample("only", np.linspace(0.2, 0.96, clicks).tolist())], clicks=clicks)
    assert "1 sample" in markdown(single)
    Elements(page(single, [Case("only", single["samples"][0], jpeg())]))
    assert max(map(len, table(single).splitlines())) <= 100
    md, html = compare([single, single])
    assert "one sample allows no conclusion" in md
    Elements(html)


def test_a_report_without_numbers_shows_dashes(report):
    empty = without_numbers(report)
    for text in (markdown(empty), table(empty), page(empty, []), *compare([empty, empty], strict=False)):
        assert "–" in text
        assert not re.search(r"\bnan\b|\bNone\b(?!\.)|\binf\b", text)
    elements = Elements(page(empty, []))
    assert "no IoU in this report" in elements.text
    assert not elements.named("polyline")
    assert [s["name"] for s in worst(empty)] == sorted(s["name"] for s in empty["samples"])


def test_no_samples_at_all(report):
    report["samples"] = []
    Elements(page(report, []))


def test_more_groups_than_colours_are_rows(report):
    part = report["summary"]["all"]
    report["summary"]["groups"] = {f"g{i}": part for i in range(30)}
    text = page(report, [])
    Elements(text)
    assert cells("g29", text)[0] == "12"
    assert text.count('class="line many"') == 30


# Figures


def test_lines_break_where_a_number_is_missing():
    axes = fig.Axes((1, 5), (0, 1))
    nan = float("nan")
    drawn = fig.line(axes, range(1, 6), [0.1, 0.2, nan, 0.4, nan], "c0")
    assert drawn.count("<polyline") == 1
    assert drawn.count("<circle") == 1
    assert "nan" not in drawn


def test_end_labels_keep_apart_and_inside():
    axes = fig.Axes((0, 1), (0, 1))
    drawn = fig.end_labels(axes, [(0.001 * i, f"n{i}", "c0") for i in range(6)])
    places = sorted(float(y) for y in re.findall(r' y="([\d.]+)"', drawn))
    assert min(np.diff(places)) >= 14.9
    assert places[-1] <= axes.height - axes.bottom + 5


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 100), (40, 100), (-7, 7), (0, 3), (0, 1537)])
def test_ticks_are_round_and_few(low, high):
    ticks = fig.ticks(low, high)
    assert 3 <= len(ticks) <= 12
    assert low <= ticks[0] <= ticks[-1] <= high
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


# Pictures of cases


def decoded(raw):
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).astype(int)


def near(pixel, colour, tolerance=70):
    return np.abs(pixel - np.array(colour)).max() <= tolerance


def test_a_case_tints_both_kinds_of_error():
    pixels = np.full((120, 240, 3), 128, np.uint8)
    truth, mask = np.zeros((2, 120, 240), bool)
    truth[20:100, 20:120] = True
    mask[20:100, 80:220] = True
    got = decoded(draw_case(pixels, truth, mask, []))
    assert got.shape == (240, 480, 3)
    assert near(got[120, 90], MISSED)
    assert near(got[120, 360], EXTRA)
    assert near(got[120, 200], (128, 128, 128), 12)  # found
    assert near(got[10, 10], (128, 128, 128), 12)
    ignore = np.zeros((120, 240), bool)
    ignore[:, 120:] = True
    assert near(decoded(draw_case(pixels, truth, mask, [], ignore=ignore))[120, 360], (128, 128, 128), 12)


def test_thin_errors_stay_visible_when_shrunk():
    pixels = np.full((2000, 2000, 3), 128, np.uint8)
    truth, mask = np.zeros((2, 2000, 2000), bool)
    mask[:, 1000:1003] = True
    got = decoded(draw_case(pixels, truth, mask, []))
    red, blue = got[100:140, 235:246, 0].mean(0), got[100:140, 235:246, 2].mean(0)
    assert (red - blue).max() > 60


def test_clicks_are_drawn_where_they_are_in_both_forms():
    pixels = np.full((480, 480, 3), 128, np.uint8)
    truth = np.zeros((480, 480), bool)
    as_objects = draw_case(pixels, truth, truth, [Click(100, 200), Click(300, 50, positive=False)])
    assert draw_case(pixels, truth, truth, [[100, 200, 1], [300, 50, 0]]) == as_objects
    got = decoded(as_objects)
    assert got[200, 100].max() < 80  # the plus
    assert got[196, 96].min() > 190  # on white
    assert got[50, 300].min() > 170  # the minus
    assert got[45, 300].max() < 80  # on black
    changed = np.abs(got - 128).max(2) > 20
    changed[170:216, 85:140] = changed[20:66, 285:340] = False
    assert not changed.any()
    numbers_skip = draw_case(pixels, truth, truth, [None, [100, 200, 1]])
    assert numbers_skip != draw_case(pixels, truth, truth, [[100, 200, 1]])  # number 2 and not 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 1), (33, 7)])
def test_cases_of_any_shape(shape):
    mask = np.ones(shape, bool)
    got = decoded(
        draw_case(np.zeros((*shape, 3), np.uint8), mask, ~mask, [[0, 0, 1], [shape[1] - 1, shape[0] - 1, 0]], 64)
    )
    assert max(got.shape) == 64


def test_a_case_refuses_what_does_not_belong_together():
    mask = np.zeros((4, 5), bool)
    with pytest.raises(ValueError, match=r"got mask bool \(5, 5\); give bool \(4, 5\)"):
        draw_case(np.zeros((4, 5, 3), np.uint8), mask, np.zeros((5, 5), bool), [])
    with pytest.raises(ValueError, match="got pixels float64"):
        draw_case(np.zeros((4, 5, 3)), mask, mask, [])
