"""What the README says, runs."""

import re
import subprocess
import sys
from pathlib import Path

from hrsam.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["mask"].shape == (400, 600)
    assert names["mask"].any()


def test_the_commands_exist():
    known = {command.callback.__name__ for command in app.registered_commands}
    used = set(re.findall(r"^hrsam (\w+)", README, re.M))
    assert used
    assert used <= known


def test_the_files_named_exist():
    for path in re.findall(r"`((?:configs|tools|weights|hrsam)/[\w/.-]+)`", README):
        assert (ROOT / path).exists(), path


def test_the_tables_are_those_of_the_reports():
    check = [sys.executable, str(ROOT / "tools" / "readme_tables.py"), "--check"]
    assert subprocess.run(check, check=False).returncode == 0
