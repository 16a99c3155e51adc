"""Drills of the click page's server: many users at once, two hands on one piece of work, and kills in the middle of saving.

What a user gets is compared to the byte with the same commands applied one after the other by a :class:`Cutting` alone.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hrsam.bench.models import random_model
from hrsam.bench.page_client import Client, Tab, serving
from hrsam.cutting import Cutting
from hrsam.demo.journal import JournalError, read_journal
from hrsam.demo.limits import LIMITS
from hrsam.demo.messages import draw
from hrsam.demo.server import Server, listen
from hrsam.demo.site import Site
from hrsam.images import write_png
from hrsam.models.model import HRSAM
from hrsam.pyramid import open_pyramid
from hrsam.session import EncodedPicture, encode_picture

PRESET, SIDE, SEED = "hrsam_pp_t", 128, 0
HEIGHT, WIDTH = 192, 256
SPEED = replace(LIMITS, messages_per_second=1e6, new_desks_a_minute=10**6)  # a drill is quicker than a person
NAME = "drill"


def small_model() -> HRSAM:
    """A random one of 48 channels: what is drilled is the server."""
    return random_model(PRESET, torch.device("cpu"), quick=True)


def make_pictures(folder: Path, count: int) -> list[Path]:
    """``count`` different small pictures, blocks of colour on noise."""
    folder.mkdir(exist_ok=True)
    paths = []
    for index in range(count):
        rng = np.random.default_rng(index)
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        x, y = int(rng.integers(20, 120)), int(rng.integers(20, 80))
        pixels[y : y + 70, x : x + 90] = rng.integers(0, 256, 3)
        paths.append(folder / f"picture{index}.png")
        write_png(paths[-1], pixels)
    return paths


def some_clicks(seed: int, count: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    places = [(rng.uniform(0, WIDTH - 1), rng.uniform(0, HEIGHT - 1), rng.random() < 0.7) for _ in range(count)]
    return [{"do": "click", "object": 1, "x": x, "y": y, "positive": positive} for x, y, positive in places]


class Alone:
    """One user's work without a server: the masks of a list of commands, as the server sends them."""

    def __init__(self, model: HRSAM, path: Path):
        self.model, self.pyramid = model, open_pyramid(path)
        assert self.pyramid.pixels is not None
        self._encoded: EncodedPicture = encode_picture(model, self.pyramid.pixels, SIDE)

    def begin(self) -> Cutting:
        return Cutting(self.model, self.pyramid, SIDE, self._encoded)

    def masks(self, commands: Sequence[dict[str, Any]]) -> list[bytes]:
        """The mask after each command on object 1."""
        cutting = self.begin()
        return [drawn(cutting, cutting.apply(command)) for command in commands]


def drawn(cutting: Cutting, object: int) -> bytes:
    """An object's mask as it is sent, nothing for one that was removed."""
    thing = cutting.objects.get(object)
    return b"" if thing is None else draw(thing, 0, LIMITS.mask_side, LIMITS.mask_bytes)[1]


@dataclass
class Load:
    """Of :func:`load`.  Latencies in milliseconds; ``slope``: growth of the process in MB per 1,000 clicks."""

    clicks: int
    errors: int
    mismatches: int
    solo_median: float
    median: float
    p95: float
    p99: float
    clicks_per_second: float
    slope: float


def load(sessions: int, clicks: int, laps: int = 4) -> Load:
    """``sessions`` users at once, each clicks on a picture of their own, ``laps`` times over with new desks."""
    model = small_model()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = make_pictures(folder / "pictures", sessions)
        jobs = [some_clicks(seed, clicks) for seed in range(sessions)]
        wanted = [Alone(model, path).masks(job) for path, job in zip(paths, jobs)]
        limits = replace(SPEED, desks_awake=sessions, connections=10 * sessions)
        site = Site(model, NAME, [folder / "pictures"], folder / "state", side=SIDE, limits=limits)
        with serving(site) as url, ThreadPoolExecutor(sessions) as users:
            clients = [Client(url) for _ in paths]
            ids = [picture["id"] for picture in clients[0].json("GET", "/api/pictures")]
            solo = [s for s, _, _ in _user(clients[0], ids[0], jobs[0], wanted[0])]
            memory, results, seconds = [], [], 0.0
            for _ in range(laps):
                started = time.perf_counter()
                for answers in users.map(_user, clients, ids, jobs, wanted):
                    results += answers
                seconds += time.perf_counter() - started
                gc.collect()
                memory.append(resident())
    times = [s for s, _, _ in results]
    cut = statistics.quantiles(times, n=100)
    grown = np.polyfit(np.arange(laps - 1) * sessions * clicks / 1000, memory[1:], 1)[0] if laps > 2 else float("nan")
    return Load(
        clicks=len(results), errors=sum(e for _, e, _ in results), mismatches=sum(m for _, _, m in results),
        solo_median=statistics.median(solo), median=cut[49], p95=cut[94], p99=cut[98],
        clicks_per_second=len(results) / seconds, slope=float(grown),
    )  # fmt: skip


def _user(
    client: Client, picture: str, commands: Sequence[dict[str, Any]], wanted: Sequence[bytes]
) -> list[tuple[float, bool, bool]]:
    """Milliseconds of each click, whether it was an error, whether the mask was another one."""
    tab, results = client.open(client.desk(picture)), []
    for command, mask in zip(commands, wanted):
        started = time.perf_counter()
        header, code = tab.do(**command)
        seconds = time.perf_counter() - started
        results.append((1000 * seconds, "error" in header, code != mask))
    tab.close()
    return results


def resident() -> float:
    """Memory of this process in MB."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes there


@dataclass
class Races:
    """Of :func:`races`: how many trials had another end than one after the other, and what was accepted in all of them."""

    trials: int
    wrong: int
    accepted: int
    taken_back: int


def races(trials: int, commands: int = 4, seed: int = SEED) -> Races:
    """Two clients on one desk send clicks, undo, redo, clear and more, with random delays; a new desk for each trial."""
    model, rng = small_model(), random.Random(seed)
    found = Races(trials, 0, 0, 0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = make_pictures(folder / "pictures", 1)
        alone = Alone(model, paths[0])
        site = Site(model, NAME, [folder / "pictures"], folder / "state", side=SIDE, limits=SPEED)
        with serving(site) as url, ThreadPoolExecutor(2) as hands:
            client = Client(url)
            for _ in range(trials):
                desk = client.desk()
                tabs = [client.open(desk) for _ in range(2)]
                plans = [[(rng.choice((0, 0, 0.002, 0.01)), _any_command(rng)) for _ in range(commands)] for _ in tabs]
                answers = list(hands.map(_hand, tabs, plans))
                _, journal, _ = read_journal(site.desks.path(desk))
                end = client.open(desk)
                found.wrong += not one_after_the_other(alone, plans, answers, journal, end)
                found.accepted += len(journal)
                found.taken_back += sum(kind(header) == "superseded" for hand in answers for header, _ in hand)
                for tab in (*tabs, end):
                    tab.close()
    return found


def _any_command(rng: random.Random) -> dict[str, Any]:
    x, y = rng.uniform(0, WIDTH - 1), rng.uniform(0, HEIGHT - 1)
    choices: list[dict[str, Any]] = [
        {"do": "click", "object": 1, "x": x, "y": y, "positive": rng.random() < 0.7},
        {"do": "undo", "object": 1},
        {"do": "redo", "object": 1},
        {"do": "box", "object": 1, "x0": x / 2, "y0": y / 2, "x1": x / 2 + 60, "y1": y / 2 + 60},
        {"do": "clear", "object": 1},
        {"do": "add", "name": "another"},
        {"do": "describe", "object": 1, "name": f"name {rng.randrange(9)}"},
    ]
    return rng.choices(choices, (10, 4, 2, 2, 1, 1, 1))[0]


def _hand(tab: Tab, plan: Sequence[tuple[float, dict[str, Any]]]) -> list[tuple[dict[str, Any], bytes]]:
    numbers = []
    for delay, command in plan:
        time.sleep(delay)
        numbers.append(tab.send(**command))
    return [tab.answer(number) for number in numbers]


def kind(header: dict[str, Any]) -> str | None:
    return header["error"]["kind"] if "error" in header else None


def one_after_the_other(
    alone: Alone,
    plans: Sequence[Sequence[tuple[float, dict[str, Any]]]],
    answers: Sequence[Sequence[tuple[dict[str, Any], bytes]]],
    journal: Sequence[dict[str, Any]],
    end: Tab,
) -> bool:
    """Whether the answers, the journal and the state at the ``end`` are those of some serial order of what was accepted.

    The order is that of the revisions; each hand's own commands must be in it as they were sent.
    """
    accepted = []
    for plan, given in zip(plans, answers):
        own = [
            (header["revision"], header, code, command)
            for (_, command), (header, code) in zip(plan, given)
            if "error" not in header and "unchanged" not in header
        ]
        if [entry[0] for entry in own] != sorted({entry[0] for entry in own}):
            return False
        accepted += own
    accepted.sort(key=lambda entry: entry[0])
    if [entry[0] for entry in accepted] != list(range(1, len(journal) + 1)):
        return False
    cutting = alone.begin()
    for (_, header, code, command), written in zip(accepted, journal):
        if any(written.get(key) != value for key, value in command.items()):
            return False
        changed = cutting.apply(command)
        if header["object"]["id"] != changed or code != drawn(cutting, changed):
            return False
        if header["object"]["rounds"] != cutting.objects[changed].rounds:
            return False
    if end.state["revision"] != cutting.revision or len(end.state["objects"]) != len(cutting.objects):
        return False
    return all(
        shown["name"] == cutting.objects[shown["id"]].name
        and end.masks.get(shown["id"], ({}, b""))[1] == drawn(cutting, shown["id"])
        for shown in end.state["objects"]
    )


@dataclass
class Kills:
    """Of :func:`kills`.  ``lost``: acknowledged clicks that a restart did not find; ``while_saving``: kills after a click was
    written and before its answer arrived; ``unreadable``: journals that could not be read."""

    rounds: int
    acknowledged: int
    lost: int
    wrong_masks: int
    while_saving: int
    unreadable: int


def kills(rounds: int, seed: int = SEED) -> Kills:
    """Start a server, click as fast as it answers, kill -9 it at a random moment, start it again, look for every click."""
    from websockets.exceptions import ConnectionClosed

    rng, found = random.Random(seed), Kills(rounds, 0, 0, 0, 0, 0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        alone = Alone(small_model(), make_pictures(folder / "pictures", 1)[0])
        listening = listen("127.0.0.1", 0)
        port = listening.getsockname()[1]
        listening.close()
        client: Client | None = None
        desk, sent, acknowledged = "", [], 0
        for number in range(rounds + 1):
            with _victim(folder, port) as (process, url):
                client = client or Client(url)  # its cookie outlives the kill
                if desk:
                    _look(found, alone, client.open(desk), sent, acknowledged)
                    _read(found, folder, desk)
                if number == rounds:
                    break
                if number % 5 == 0:
                    desk, sent, acknowledged = client.desk(), [], 0
                tab = client.open(desk)
                sent = sent[: tab.revision]
                timer = threading.Timer(rng.uniform(0.0, 0.12), process.kill)
                timer.start()
                acknowledged = tab.revision
                for click in some_clicks(rng.randrange(1 << 30), 30):
                    sent.append(click)
                    try:
                        header, _ = tab.do(**click)
                    except (OSError, ConnectionClosed):  # killed
                        break
                    acknowledged = header["revision"]
                    found.acknowledged += 1
                timer.join()
    return found


class _victim:
    """A server in a process of its own, to be killed: ``with`` gives the process and the address."""

    def __init__(self, folder: Path, port: int):
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            context.set_forkserver_preload([__name__])
        self._here, there = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(there, folder, port), daemon=True)
        self._process.start()
        there.close()

    def __enter__(self) -> tuple[Any, str]:
        return self._process, self._here.recv()

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._here.close()


def _serve(out: Connection, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    listening = listen("127.0.0.1", port)
    site = Site(small_model(), NAME, [folder / "pictures"], folder / "state", side=SIDE, limits=SPEED)
    server = Server(site, "127.0.0.1", port)
    out.send(server.url)
    server.run(sockets=[listening])


def _look(found: Kills, alone: Alone, tab: Tab, sent: Sequence[dict[str, Any]], acknowledged: int) -> None:
    """Compare what a restarted server shows with what was sent and what was answered."""
    revision = tab.state["revision"]
    found.lost += max(0, acknowledged - revision)
    found.while_saving += revision > acknowledged
    if revision:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        wanted = alone.masks(sent[:revision])[-1]
        torch.set_num_threads(threads)
        found.wrong_masks += tab.masks[1][1] != wanted
    tab.close()


def _read(found: Kills, folder: Path, desk: str) -> None:
    try:
        read_journal(folder / "state" / "desks" / f"{desk}.journal")
    except (OSError, JournalError):
        found.unreadable += 1
