"""One thread for the model: turns, limits, what is taken back, and memory that runs out."""

import threading
import time
import weakref

import pytest
import torch

from hrsam.demo.engine import Engine, Refusal, Work, apart, is_exhaustion


@pytest.fixture
def engine():
    """Each desk may have 3 waiting, all together 5; it begins on ``open`` and its work is noted in ``done``."""
    made = Engine(3, 5)
    made.open, made.done = threading.Event(), []
    began = threading.Event()

    def hold():
        began.set()
        made.open.wait(10)

    made.submit("first", Work(hold))
    assert began.wait(10)
    yield made
    made.open.set()
    made.stop()


def note(engine, name, **options):
    return Work(lambda: engine.done.append(name) or name, **options)


def refusal(future):
    with pytest.raises(Refusal) as caught:
        future.result(10)
    return caught.value.kind


def test_desks_take_turns_and_each_keeps_its_order(engine):
    futures = [engine.submit(name[0], note(engine, name)) for name in ("a1", "a2", "a3", "b1", "c1")]
    engine.open.set()
    assert [future.result(10) for future in futures] == ["a1", "a2", "a3", "b1", "c1"]
    assert engine.done == ["a1", "b1", "c1", "a2", "a3"]


def test_too_much_of_one_desk_and_of_all_is_busy(engine):
    for number in range(3):
        engine.submit("a", note(engine, number))
    with pytest.raises(Refusal, match="3 commands are waiting") as caught:
        engine.submit("a", note(engine, 9))
    assert caught.value.kind == "busy"
    engine.submit("b", note(engine, 3))
    last = engine.submit("b", note(engine, 4))
    with pytest.raises(Refusal, match="too much to do"):
        engine.submit("c", note(engine, 9))
    engine.open.set()
    last.result(10)
    assert sorted(engine.done) == [0, 1, 2, 3, 4]
    assert engine.submit("c", note(engine, 5)).result(10) == 5


def test_only_the_newest_round_of_that_object_is_taken_back(engine):
    old = engine.submit("a", note(engine, "old", about=1, round=True))
    new = engine.submit("a", note(engine, "new", about=1, round=True))
    other = engine.submit("a", note(engine, "other", about=2, round=True))
    elsewhere = engine.submit("b", note(engine, "elsewhere", about=1, round=True))
    assert engine.drop("a", 1, newest=True) == 1
    assert refusal(new) == "superseded"
    engine.open.set()
    assert [f.result(10) for f in (old, other, elsewhere)] == ["old", "other", "elsewhere"]


def test_a_command_that_came_after_the_round_keeps_it(engine):
    engine.submit("a", note(engine, "click", about=1, round=True))
    engine.submit("a", note(engine, "redo", about=1))
    assert engine.drop("a", 1, newest=True) == 0
    assert engine.drop("a", 2, newest=True) == 0
    assert engine.drop("z", 1, newest=True) == 0


def test_all_rounds_of_an_object_are_taken_back(engine):
    futures = [engine.submit("a", note(engine, n, about=1, round=n != 1)) for n in range(3)]
    assert engine.drop("a", 1, newest=False) == 2
    assert [refusal(futures[0]), refusal(futures[2])] == ["superseded"] * 2
    for name in "aabb":  # their places are free again
        engine.submit(name, note(engine, name))
    engine.open.set()
    futures[1].result(10)
    engine.stop()
    assert engine.done[0] == 1


def test_what_is_begun_cannot_be_taken_back(engine):
    assert engine.drop("first", None, newest=False) == 0


def test_an_error_goes_to_who_asked_and_the_next_is_done(engine):
    def fail():
        raise ValueError("mine")

    future = engine.submit("a", Work(fail))
    after = engine.submit("a", note(engine, "after"))
    engine.open.set()
    with pytest.raises(ValueError, match="mine"):
        future.result(10)
    assert after.result(10) == "after"


def test_stop_refuses_what_waits_and_what_comes(engine):
    waiting = engine.submit("a", note(engine, "a"))
    engine.open.set()
    engine.stop()
    if not waiting.exception(10):
        assert engine.done == ["a"]
    with pytest.raises(Refusal, match="stopping"):
        engine.submit("a", note(engine, "b"))


class Arrays:
    """Stands for what fills the memory."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
@pytest.mark.parametrize("times", [1, 2])
def test_memory_that_runs_out_is_made_free_and_tried_once_more(error, times):
    calls, kept, dropped = [], [], []
    engine = Engine(9, 9, [lambda: dropped.append([ref() for ref in kept])], lambda: "use a smaller side")

    def run():
        calls.append(1)
        big = Arrays()
        kept.append(weakref.ref(big))
        if len(calls) <= times:
            raise error.with_traceback(None)
        return "done"

    try:
        future = engine.submit("a", Work(run))
        if times == 1:
            assert future.result(10) == "done"
        else:
            assert refusal(future) == "memory"
            assert str(future.exception()) == "there is not enough memory for this; use a smaller side"
        assert len(calls) == 2
        assert len(dropped) == times
        assert engine.submit("a", Work(lambda: "next")).result(10) == "next"
    finally:
        engine.stop()


def test_frames_of_the_failed_try_are_gone_before_the_next():
    alive = []
    engine = Engine(9, 9)

    def run():
        alive.append([ref() for ref in references])
        big = Arrays()
        references.append(weakref.ref(big))
        if len(references) == 1:
            raise MemoryError
        return True

    references = []
    assert engine.submit("a", Work(run)).result(10)
    engine.stop()
    assert alive == [[], [None]]


def test_other_errors_are_no_exhaustion():
    assert not is_exhaustion(RuntimeError("shapes differ"))
    assert not is_exhaustion(ValueError("can't"))


def test_the_engine_computes_with_as_many_threads_as_its_maker():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        engine = Engine(1, 1)
        assert engine.submit("a", Work(torch.get_num_threads)).result(10) == 3
        engine.stop()
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- long work, in pieces


def long(engine, name, count, **options):
    """Work in ``count`` pieces, each noted, and the result."""

    def run():
        for number in range(count):
            engine.done.append(f"{name}{number}")
            yield number
        return name

    return Work(run, about=1, round=True, long=True, **options)


def test_others_come_between_the_pieces_of_long_work(engine):
    told = []
    work = engine.submit("a", long(engine, "a", 3, tell=told.append))
    after = engine.submit("a", note(engine, "after", about=2))
    others = [engine.submit(name[0], note(engine, name)) for name in ("b0", "c0", "b1")]
    engine.open.set()
    assert [work.result(10), after.result(10)] == ["a", "after"]
    assert all(other.result(10) for other in others)
    assert engine.done == ["a0", "b0", "c0", "a1", "b1", "a2", "after"]
    assert told == [0, 1, 2]


def test_what_may_go_ahead_does_not_wait_for_long_work_of_its_desk(engine):
    work = engine.submit("a", long(engine, "a", 2))
    engine.submit("a", note(engine, "add"))
    engine.submit("a", note(engine, "wake", ahead=True))
    engine.open.set()
    assert work.result(10) == "a"
    engine.submit("a", note(engine, "end")).result(10)
    assert engine.done == ["a0", "wake", "a1", "add", "end"]


class Stepwise:
    """Long work that waits in each piece for ``go`` and says when it is there; ``ended``: how it was ended."""

    def __init__(self, engine):
        self.engine, self.ended, self.settled = engine, [], None
        self.there, self.go = threading.Event(), threading.Event()
        self.work = Work(self.run, about=1, round=True, long=True)

    def run(self):
        try:
            for _ in range(2):
                self.pause()
                yield
            self.settled = self.engine.settle()
            self.pause()
            return "result"
        finally:
            self.ended.append(True)

    def pause(self):
        self.there.set()
        assert self.go.wait(10)
        self.go.clear()

    def next_piece(self):
        self.there.clear()
        self.go.set()
        assert self.there.wait(10)


@pytest.mark.parametrize("how", ["newest", "all", "long"])
def test_long_work_is_taken_back_in_the_middle(engine, how):
    steps = Stepwise(engine)
    future = engine.submit("a", steps.work)
    engine.open.set()
    assert steps.there.wait(10)
    if how == "long":
        assert engine.drop_long("a", 2) == engine.drop_long("b", 1) == 0
        assert engine.drop_long("a", 1) == 1
    else:
        assert engine.drop("a", 1, newest=how == "newest") == 1
    assert refusal(future) == "superseded"
    after = engine.submit("a", note(engine, "after", about=1))
    steps.go.set()
    assert after.result(10) == "after"
    assert (steps.ended, steps.settled) == ([True], None)  # its second piece was not begun
    assert steps.work.pieces is None


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_long_work_is_taken_back_between_two_pieces(engine):
    steps, other = Stepwise(engine), threading.Event()
    future = engine.submit("a", steps.work)
    engine.submit("b", Work(lambda: other.wait(10)))
    engine.open.set()
    assert steps.there.wait(10)
    steps.go.set()  # now the other's turn is
    until(lambda: steps.work in engine._waiting.get("a", ()))
    assert engine.drop_long("a", 1) == 1
    other.set()
    assert refusal(future) == "superseded"
    assert engine.submit("a", note(engine, "after", about=1)).result(10) == "after"
    assert engine._count == 0


def test_settled_work_cannot_be_taken_back(engine):
    steps = Stepwise(engine)
    future = engine.submit("a", steps.work)
    engine.open.set()
    assert steps.there.wait(10)
    steps.next_piece()
    steps.next_piece()
    assert steps.settled
    assert engine.drop_long("a", 1) == engine.drop("a", 1, newest=True) == 0
    steps.go.set()
    assert future.result(10) == "result"


def test_a_stop_in_the_middle_of_long_work_is_told(engine):
    steps = Stepwise(engine)
    future = engine.submit("a", steps.work)
    engine.open.set()
    assert steps.there.wait(10)
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    until(lambda: engine._stopped)
    steps.go.set()
    stopping.join(10)
    assert refusal(future) == "gone"


@pytest.mark.parametrize("fails", [1, 2])
def test_long_work_that_runs_out_of_memory_is_begun_anew_once(fails):
    engine, tries, failed = Engine(9, 9), [], []

    def run():
        tries.append(1)
        yield 0
        if len(failed) < fails:
            failed.append(1)
            raise MemoryError
        return "done"

    future = engine.submit("a", Work(run, long=True))
    if fails == 1:
        assert future.result(10) == "done"
    else:
        assert refusal(future) == "memory"
    assert len(tries) == 2
    engine.stop()


def test_what_is_done_apart_leaves_no_thread():
    before = threading.enumerate()
    assert apart(threading.current_thread) not in threading.enumerate()
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 // 0)
    assert threading.enumerate() == before
