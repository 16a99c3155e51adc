"""The loop of every training of ours: steps of parts, checkpoints, exact resume, and each way in which a run ends.

What a part of a step computes is a function of the settings, the seed, the step and the part's number, and of the weights;
all else is in the checkpoint.  So a run that was killed goes on as if nothing had happened, on a CPU to the last bit, and
parts may be shared among processes or follow one another (``accumulate``).
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hrsam.checkpoint import checkpoints, load_state, newest_checkpoint, save_checkpoint, sweep
from hrsam.data.workers import WorkerError
from hrsam.optim import Average, Gradients, Phase, Watch, build_optimizer, move
from hrsam.progress import LOG, Meter, Reports, used_memory
from hrsam.run import DISK, NOT_FINITE, WORKER, RunFailed, RunSettings, Signals, difference

log = logging.getLogger("hrsam")

FOLDER = "checkpoints"
CLOCK_EVERY = 10  # steps between two questions that all processes must answer alike


@dataclass(frozen=True, eq=False)
class Part:
    """One forward and backward pass.  ``step`` from 0; ``index`` of the part in its step, over all processes, of ``count``.

    Random numbers come from ``generator``, on the device, and torch's own, which is seeded alike; from ``plan`` what must be
    the same in all parts of a step.  ``backward`` adds the gradient of a piece of the part's loss at once, for parts that would
    not fit into memory as a whole.
    """

    step: int
    index: int
    count: int
    phase: Phase
    generator: torch.Generator
    plan: random.Random
    backward: Callable[[Tensor], None]


@dataclass(frozen=True, eq=False)
class Outcome:
    """Of a part: its ``loss``, a scalar; ``curves`` to average and ``counts`` to add up for the log, the same in all parts.

    The loop goes backward from a loss that has a gradient; one without has been through :attr:`Part.backward` in pieces.
    """

    loss: Tensor
    curves: Mapping[str, Tensor]
    counts: Mapping[str, int]


class Task(Protocol):
    """What a kind of training adds to the loop.  ``waited``: seconds that it stood still for its data so far."""

    @property
    def waited(self) -> float: ...

    def enter(self, phase: Phase) -> None:
        """Get ready for a phase, before its first step in this process."""
        ...

    def part(self, part: Part) -> Outcome:
        """Compute a part's loss, under autocast on CUDA; the loop goes backward."""
        ...

    def picture(self) -> np.ndarray | None:
        """What the last part looked like, (H, W, 3) uint8 RGB, to be shown beside the curves."""
        ...


def accelerator() -> Any:
    """Device, precision (bf16 on CUDA) and processes, from ``torchrun`` or ``accelerate launch``.

    Raises ``ValueError`` for FSDP and the like: their checkpoints are shards that fit one number of processes, and their
    gradients have no place for exact averages, so nothing here could promise an exact resume.
    """
    from accelerate import Accelerator

    cuda = torch.cuda.is_available()
    made = Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no")
    kind = made.distributed_type.value
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise ValueError(
            f"{kind} is not supported, each device holds the whole model; start with torchrun, and save memory with "
            "recompute=true and accumulate"
        )
    return made


def recompute(modules: Iterable[nn.Module]) -> None:
    """Let ``modules`` keep their inputs only, and compute what lies between again in the backward pass."""
    for module in modules:
        vars(module)["forward"] = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)


def seed_of(*place: int) -> int:
    """A 64-bit seed for a place such as (seed, step, part); those of neighbours have nothing in common."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])


class Loop:
    """One run in ``settings.out``, from its last checkpoint or from the beginning.

    ``model``: on its device, in training mode; parameters that ask for no gradient stay as they are.  ``began``: when the run
    began by ``time.monotonic()``; ``stop_after``: seconds after which it saves and returns.  ``content``: what the data are,
    in few letters: a run on other data is another run.  ``live``: a bar on stderr.

    Raises ``ValueError`` for a folder that holds another run or lost its checkpoints, :class:`RunFailed` when the folder
    cannot be written.
    """

    def __init__(
        self,
        settings: RunSettings,
        model: nn.Module,
        task: Task,
        accelerator: Any,
        *,
        content: str,
        began: float | None = None,
        stop_after: float = math.inf,
        live: bool = False,
    ):
        self.settings, self.model, self.task, self.accelerator = settings, model, task, accelerator
        self.began = time.monotonic() if began is None else began
        self.content, self.stop_after = content, stop_after
        self.device, self.processes = accelerator.device, accelerator.num_processes
        self.parts = self.processes * settings.accumulate
        self.out = Path(settings.out)
        self.step, self.spent, self.saved = 0, 0.0, -1
        self._since = time.monotonic(), task.waited  # the last line of the log
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.gradients, self.watch, self.meter = Gradients(self.weights), Watch(self.device), Meter()
        self.optimizer = build_optimizer(model, settings)
        self.average = Average(model, settings.ema)
        self.generator = torch.Generator(self.device)
        if (path := self._found()) is not None:
            self._load(load_state(path))
        self.reports: Reports | None = None
        if accelerator.is_main_process:
            with self._disk():
                self.reports = Reports(self.out, self.step, settings.steps, live)

    def run(self) -> Path:
        """Go on to the end, or until somebody asks to stop; returns the last checkpoint.

        Raises :class:`RunFailed` when a checkpoint or the log cannot be written, a loss or gradient is not finite, or a
        process that loads data is dead.
        """
        settings = self.settings
        with self._reporting(), Signals() as signals:
            if self.saved < 0:
                self._save()  # a disk that does not take it shows now
            phase, place, rate, norm = None, self._place(None), 0.0, torch.zeros(())
            while place < settings.steps and not self._asked(signals):
                if phase is not (phase := settings.phase_at(place)):
                    self.task.enter(phase)
                rate = settings.lr_at(self.step, place)
                norm = self._make_step(phase, rate)
                place = self._place(place)
                if self.device.type == "cpu":  # elsewhere looking waits for the device
                    self._look()
                if self.step % settings.log_every == 0:
                    self._report(phase, rate, norm)
                if self.reports is not None:
                    self.reports.advance(place)
                if self.step % settings.save_every == 0:
                    self._save()
            if phase is not None and place >= settings.steps and self.meter.steps:
                self._report(phase, rate, norm)  # what came after the last line
            if self.saved != self.step:
                self._save()
            if signals.got is not None and place < settings.steps:
                log.warning(
                    "%s: stopped after step %d, which is saved; the same command goes on", signals.got, self.step
                )
        self.accelerator.wait_for_everyone()
        return checkpoints(self.out / FOLDER)[-1]

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Reports are closed in any case; that they cannot be is no news when something else has failed."""
        try:
            yield
        except BaseException:
            if self.reports is not None:
                with suppress(OSError):
                    self.reports.close()
            raise
        if self.reports is not None:
            with self._disk():
                self.reports.close()

    # ---------------------------------------------------------------- a step

    def _make_step(self, phase: Phase, rate: float) -> Tensor:
        """All parts, their mean gradient, one move of the weights; returns the gradient's norm."""
        self.gradients.flat.zero_()
        curves: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for number in range(self.settings.accumulate):
            outcome = self._make_part(phase, self.accelerator.process_index * self.settings.accumulate + number)
            for name, value in (("loss", outcome.loss.detach()), *outcome.curves.items()):
                share = value.double() / self.parts
                curves[name] = curves[name] + share if number else share
            for name, count in outcome.counts.items():
                counts[name] = counts.get(name, 0) + count
        totals = [torch.full_like(curves["loss"], count) for count in counts.values()]  # no copy, which would wait
        measured = torch.stack([*curves.values(), *totals])
        if self.processes > 1:
            torch.distributed.all_reduce(self.gradients.flat)
            torch.distributed.all_reduce(measured)
            self.gradients.flat.div_(self.processes)
        norm = self.gradients.clip(self.settings.clip)
        self.step += 1
        self.watch.see(self.step, measured[0], norm)
        move(self.optimizer, rate, self.watch.found_inf)
        self.average.update(self.step - 1)
        values = dict(zip((*curves, *counts), measured))
        self.meter.add({n: values[n] for n in curves}, {n: values[n] for n in counts})
        return norm

    def _make_part(self, phase: Phase, index: int) -> Outcome:
        seed = seed_of(self.settings.seed, self.step, 1 + index)
        torch.manual_seed(seed)
        plan = random.Random(seed_of(self.settings.seed, self.step, 0))
        part = Part(self.step, index, self.parts, phase, self.generator.manual_seed(seed), plan, self._backward)
        try:
            with self.accelerator.autocast():
                outcome = self.task.part(part)
        except WorkerError as err:
            raise RunFailed(WORKER, f"{err}; {self._kept()}") from err
        if outcome.loss.requires_grad:
            self._backward(outcome.loss)
        return outcome

    def _backward(self, loss: Tensor) -> None:
        with torch.autocast(self.device.type, enabled=False):
            (loss / self.settings.accumulate).backward()

    def _place(self, before: float | None) -> float:
        """Where the run is, in steps of the phases; by time, the first process's clock counts and is asked now and then."""
        if self.settings.budget is None:
            return self.step
        if before is not None and self.step % CLOCK_EVERY:
            return before
        share = torch.tensor(self._seconds() / self.settings.budget, dtype=torch.float64, device=self.device)
        if self.processes > 1:
            torch.distributed.broadcast(share, 0)
        return share.item() * self.settings.steps

    def _asked(self, signals: Signals) -> bool:
        """Whether a process was asked to stop; all answer alike, so several find out every ``CLOCK_EVERY`` steps."""
        asked = signals.got is not None or time.monotonic() - self.began >= self.stop_after
        if self.processes == 1:
            return asked
        if self.step % CLOCK_EVERY:
            return False
        votes = torch.tensor(float(asked), device=self.device)
        torch.distributed.all_reduce(votes)
        return votes.item() > 0

    def _look(self) -> None:
        if (bad := self.watch.look()) is not None:
            step, loss, norm = bad
            raise RunFailed(
                NOT_FINITE,
                f"in step {step} the loss is {loss:g} and the gradient norm {norm:g}, so the weights were left as before it; "
                f"{self._kept()}, but from there the same step comes again: start anew with another lr, clip or seed",
            )

    def _report(self, phase: Phase, rate: float, norm: Tensor) -> None:
        self._look()
        line = {"step": self.step, "side": phase.side, **self.meter.line(), "grad_norm": round(norm.item(), 3)}
        line |= {"lr": round(rate, 9), "memory_gib": round(used_memory(self.device), 2)}
        now = time.monotonic(), self.task.waited
        line["waiting"] = round((now[1] - self._since[1]) / max(1e-9, now[0] - self._since[0]), 3)
        self._since = now
        line["seconds"] = round(self._seconds(), 1)
        if self.reports is not None:
            with self._disk():
                self.reports.write(line)

    def _seconds(self) -> float:
        return self.spent + time.monotonic() - self.began

    # ---------------------------------------------------------------- checkpoints

    def _save(self) -> None:
        self._look()
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.weights]))
        if not norms.isfinite().all():
            raise RunFailed(
                NOT_FINITE,
                f"after step {self.step} a weight is not finite; {self._kept()}: start anew with a lower lr or another seed",
            )
        if self.reports is not None:
            with self._disk():
                if self.step > 0 and (picture := self.task.picture()) is not None:
                    self.reports.picture(picture, self.step)
                self.reports.flush()
                save_checkpoint(self._state(), self.out / FOLDER, self.step, self.settings.keep)
        self.saved = self.step

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "meter": self.meter.state(),
            "step": self.step,
            "spent": self._seconds(),
            "settings": self.settings.model_dump(mode="json"),
            "parts": self.parts,
            "content": self.content,
        }

    def _found(self) -> Path | None:
        """The checkpoint to go on from, the same for all processes, which see one file system."""
        path = None
        if self.accelerator.is_main_process:
            with self._disk():
                (self.out / FOLDER).mkdir(parents=True, exist_ok=True)
                for folder in (self.out, self.out / FOLDER):
                    sweep(folder)
                path = newest_checkpoint(self.out / FOLDER)
            if path is None and (self.out / LOG).exists():
                raise ValueError(
                    f"{self.out} holds the log of a run but no checkpoint; bring back its {FOLDER}, or give another out"
                )
        if self.processes > 1:
            from accelerate.utils import broadcast_object_list

            (path,) = broadcast_object_list([path])
        return path

    def _load(self, state: dict[str, Any]) -> None:
        then = type(self.settings).model_validate(state["settings"])
        marks = {
            "accumulate × processes": (state["parts"], self.parts),
            "the data's content": (state["content"], self.content),
        }
        if (other := difference(then, self.settings, marks)) is not None:
            raise ValueError(f"{self.out} holds a run with {other}; go on with that, or give another out")
        self.model.load_state_dict(state["model"])
        self.average.load(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.meter.load(state["meter"])
        self.step = self.saved = state["step"]
        self.spent = state["spent"]

    def _kept(self) -> str:
        return f"the checkpoint of step {self.saved} is kept" if self.saved >= 0 else "nothing is saved yet"

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            raise RunFailed(
                DISK, f"cannot write in {self.out}: {err}; {self._kept()}: make room and run the same command again"
            ) from err
