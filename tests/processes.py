"""What tests of several processes share."""

import time
from pathlib import Path


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_gone(pids, seconds=30):
    """These processes are gone, or go within this time."""
    pids, until = list(pids), time.monotonic() + seconds
    while any(map(alive, pids)):
        assert time.monotonic() < until, f"processes {[pid for pid in pids if alive(pid)]} are still there"
        time.sleep(0.01)
