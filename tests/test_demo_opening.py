"""``hrsam demo`` from the command to an answer, and what it says when it cannot."""

import re
import signal
import subprocess
import sys
import time

import pytest

from hrsam.bench.hostile_files import png
from hrsam.bench.page_client import Client
from hrsam.demo import opening
from hrsam.demo.opening import default_state, notes, open_page
from hrsam.weights import save
from tests.builders import photo, small_model


def test_the_command_serves_until_ctrl_c_and_its_work_is_there_the_next_time(tmp_path):
    model = save(small_model(), tmp_path / "small.safetensors", metadata={"licence": "Apache-2.0", "source": "a test"})
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(photo(60, 80)))
    command = [sys.executable, "-m", "hrsam", "demo", "pictures", "--model", model, "--side", "64", "--device", "cpu"]
    command += ["--no-browser", "--port", "0", "--state", "state"]
    process = subprocess.Popen(
        [str(part) for part in command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        client = Client(re.fullmatch(r"click page: (http://127\.0\.0\.1:\d+/\?token=\S+)\n", line)[1])
        assert client.json("GET", "/api/about")["model"] == "small.safetensors"
        tab = client.open(client.desk())
        assert tab.click(20, 20)[0]["revision"] == 1
        tab.close()
    finally:
        process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert "Traceback" not in errors
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["desks", "scratch", "secret", "uploads"]
    assert len(list((tmp_path / "state" / "desks").iterdir())) == 1
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(opening, "find_spec", lambda name: None if name == "uvicorn" else True)
    with pytest.raises(ValueError, match=r"the click page needs uvicorn; run: pip install 'hrsam\[demo\]'"):
        open_page(small_model(), "small")


def test_pictures_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*none; give picture files"):
        open_page(small_model(), "small", [tmp_path / "none"], state=tmp_path / "state", port=0)


def test_where_work_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_state() == tmp_path / "hrsam"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_state() == tmp_path / ".local" / "state" / "hrsam"


def test_the_page_is_told_what_a_person_should_know():
    assert len(notes(small_model(), "hrsam_pp_t.starter")) == 2
    assert len(notes(small_model(), "mine.safetensors")) == 1


def test_other_machines_are_let_in_with_a_warning(monkeypatch, tmp_path):
    from hrsam.demo import server

    said = []
    monkeypatch.setattr(server.Server, "run", lambda self, sockets: None)
    for host, lines in (("127.0.0.1", 1), ("0.0.0.0", 2)):
        said.clear()
        open_page(small_model(), "s", state=tmp_path / "state", host=host, port=0, browser=False, say=said.append)
        assert len(said) == lines
        assert said[-1].startswith("click page: http://127.0.0.1:")
    assert said[0].startswith("warning: other machines can reach this server")


def test_the_browser_is_opened_at_the_address(monkeypatch, tmp_path):
    from hrsam.demo import server

    opened, said = [], []
    monkeypatch.setattr(server.webbrowser, "open", opened.append)
    monkeypatch.setattr(server.Server, "run", lambda self, sockets: time.sleep(0.1))
    open_page(small_model(), "s", state=tmp_path / "state", port=0, say=said.append)
    assert opened == [said[0].removeprefix("click page: ")]
