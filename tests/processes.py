"""What tests of several processes share."""

import multiprocessing
import time
from pathlib import Path


def begun(target, *args):
    """A process of its own that calls ``target(*args)``, a function of a module; what it imports is there already."""
    process = multiprocessing.get_context("forkserver").Process(target=target, args=args)
    process.start()
    return process


def exit_code(target, *args, seconds=300):
    """How ``target(*args)`` ends in a process of its own, within this time."""
    process = begun(target, *args)
    process.join(seconds)
    code = process.exitcode
    process.kill()
    process.join()
    assert code is not None
    return code


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
