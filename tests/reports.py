"""Reports of evaluations, and reading the pages made from them, for the tests of the report."""

import copy
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from hrsam.metrics import failures, noc

HOSTILE = "<script>alert(1)</script>\"'&|`[x](javascript:1)\n# \x00\ud800\u202e"
SHA = "ab" * 32


def summary(samples):
    ious = np.array([s["ious"] for s in samples])
    most = ious.shape[1]
    lost = {str(t): failures(ious, t / 100, most) for t in (80, 85, 90, 95)}
    return {
        "samples": len(samples),
        "iou": ious.mean(0).tolist(),
        "noc": {t: noc(ious, int(t) / 100, most) for t in lost},
        "never_reached": {t: f["never_reached"] for t, f in lost.items()},
        "equals_max": {t: f["equals_max"] for t, f in lost.items()},
        "boundary_iou": {"1": 0.412, "5": 0.634},
        "thin_recall": {"1": 0.4, "5": None},
    }


def sample(name, ious, group="one"):
    clicks = [[3, 4, 1], None, [5.5, 2, 0]]
    return {
        "name": name, "group": group, "size": [40, 60], "object": 240, "clicks": clicks[: len(ious)], "ious": list(ious),
        "boundary_ious": {"1": 0.5}, "thin_recall": {"1": None},
    }  # fmt: skip


def build(samples, name="hrsam_pp_t.starter", clicks=20):
    groups = {}
    for s in samples:
        groups.setdefault(s["group"], []).append(s)
    return {
        "format": 1, "made": "2026-11-25T21:30:00Z", "command": "hrsam evaluate …",
        "method": {"name": name, "kind": "model", "preset": "hrsam_pp_t", "weights_sha256": "cd" * 32, "side": 1024},
        "protocol": {"name": "frozen", "rule": "frozen", "clicks": clicks, "threshold": 0.5, "ties": "first", "seed": 0,
                     "text": ["The deepest error is clicked.", "Never stopped early."]},
        "data": {"name": "hqseg44k", "samples": len(samples), "expected": 1537, "note": "Above 0 is object.",
                 "sha256": SHA, "problems": [{"where": "x.png", "text": "no mask"}]},
        "machine": {"device": "cpu", "device_name": "a processor", "dtype": "float32", "processes": 2, "threads": 1,
                    "versions": {"torch": "2.13.0"}},
        "summary": {"all": summary(samples), "groups": {name: summary(part) for name, part in groups.items()}},
        "seconds": {"encode": 1.2345, "decode": 0.0312, "user": 0.0104, "metric": 0.0042, "click": None},
        "tie_spread": {"seeds": [0, 1], "noc": {"90": [8.0, 8.5]}, "iou@5": [0.8, 0.81]},
        "trace_sha256": "ef" * 32, "samples": samples,
    }  # fmt: skip


def played(seed=0, n=12, lift=0.0):
    rng, noise = np.random.default_rng(1), np.random.default_rng(seed)
    samples = []
    for i in range(n):
        final, start = rng.uniform(0.7, 0.99), rng.uniform(0.1, 0.6)
        curve = final - (final - start) * np.exp(-np.arange(20) / rng.uniform(1, 6))
        ious = np.clip(curve + lift + noise.normal(0, 0.005, 20), 0, 1).round(4).tolist()
        samples.append(sample(f"{'ABC'[i % 3]}/{i}", ious, "ABC"[i % 3]))
    return samples


def without_numbers(report):
    """The report with None in place of everything that may be missing."""
    report = copy.deepcopy(report)
    for part in (report["summary"]["all"], *report["summary"]["groups"].values()):
        part.update(iou=[None] * 20, equals_max=None, boundary_iou=None, thin_recall={"5": float("nan")})
        part.update(noc=dict.fromkeys(part["noc"]), never_reached=dict.fromkeys(part["never_reached"], None))
    for s in report["samples"]:
        s.update(ious=[None] * 20, object=None, group=None, clicks=[None] * 20, boundary_ious=None, thin_recall=None)
    report["seconds"] = dict.fromkeys(report["seconds"])
    for name in ("kind", "preset", "weights_sha256", "side"):
        report["method"][name] = None
    report["data"].update(expected=None, note=None, sha256=None, problems=None)
    report["machine"].update(device_name=None, dtype=None, processes=None, threads=None, versions=None)
    report.update(command=None, tie_spread=None, trace_sha256=None)
    return report


class Elements(HTMLParser):
    """Every element of a page with its attributes, and its text; refuses tags that do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def cells(row_name, text):
    """Cells of the first row of an HTML table whose name is ``row_name``."""
    row = re.search(rf'<tr><th scope="row">{re.escape(row_name)}</th>(.*?)</tr>', text)
    assert row, row_name
    return re.findall("<td>(.*?)</td>", row[1])


def jpeg():
    file = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(file, "JPEG")
    return file.getvalue()
