"""The report of one benchmark: rows, errors, what was skipped and why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from hrsam.bench.gate import Gate
from hrsam.bench.timing import Times, ceilings, compare, machine

logger = logging.getLogger("hrsam")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dtype_of(name: str) -> torch.dtype:
    """A type named by a person; ``ValueError`` for another."""
    if name not in DTYPES:
        raise ValueError(f"there is no precision {name!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


class Record:
    """Collects measurements; :meth:`done` is the report, plain values for JSON.

    ``seconds``: of each timed function.  A quick record measures no ceilings.
    """

    def __init__(self, bench: str, device: torch.device, *, quick: bool, seconds: float):
        self.bench, self.device, self.quick = bench, device, quick
        self.seconds = min(seconds, 0.02) if quick else seconds
        self.gate = Gate()
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.notes: list[str] = []
        self.ceilings = ceilings(torch.device("cpu") if quick else device)

    def skip(self, name: str, why: str) -> None:
        """Say why a baseline has no row; once is enough."""
        entry = {"name": name, "why": why}
        if entry not in self.skipped:
            self.skipped.append(entry)

    def time(
        self,
        labels: Mapping[str, Any],
        functions: Mapping[str, Callable[[], Any]],
        *,
        check: Callable[[dict[str, Any]], None] | None,
        baselines: Sequence[str] = (),
        optional: Collection[str] = (),
        flops: float | None = None,
        dtype: torch.dtype = torch.bfloat16,
        kernels: bool = False,
    ) -> None:
        """Check and time ``functions`` in turn and add a row for each.

        ``labels``: what they do, the first columns of the rows.  ``baselines``: the first of them that ran has ratio 1, and a
        row's ratio says how many times as fast it is.  ``flops``: operations of one call.  ``kernels``: of single operations,
        which a model runs one after the other, the time on the device alone: CUDA graphs on cold caches.
        """
        name = " ".join(str(value) for value in labels.values())
        logger.info("%s: %s", self.bench, name)
        skipped: dict[str, str] = {}
        times = compare(
            functions, seconds=self.seconds, device=self.device, flush=kernels, graphs=kernels, check=check,
            optional=optional, skipped=skipped,
        )  # fmt: skip
        for function, why in skipped.items():
            self.skip(f"{function} ({name})", why)
        self.add(labels, times, baselines=baselines, flops=flops, dtype=dtype)

    def add(
        self,
        labels: Mapping[str, Any],
        times: Mapping[str, Times],
        *,
        baselines: Sequence[str] = (),
        flops: float | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Add a row for each of ``times``, which were measured elsewhere; arguments as in :meth:`time`."""
        baseline = next((name for name in baselines if name in times), None)
        ceiling = self.ceilings["bf16_tflops"] if dtype != torch.float32 else None
        for function, t in times.items():
            speed = None if flops is None else flops / t.median_ms / 1e9
            row = {
                **labels,
                "name": function,
                "median_ms": _short(t.median_ms),
                "quantiles_20_80": [_short(t.low_ms), _short(t.high_ms)],
                "repeats": t.repeats,
                "peak_gib": _short(t.peak_gib),
                "tflops": _short(speed),
                "of_ceiling": None if ceiling is None or speed is None else _short(speed / ceiling),
                "ratio": None if baseline is None else _short(times[baseline].median_ms / t.median_ms),
                "ratio_to": baseline,
            }
            self.rows.append(row)

    def done(self, **settings: Any) -> dict[str, Any]:
        """The report; ``settings``: what else was chosen."""
        return {
            "bench": self.bench,
            **machine(self.device),
            "quick": self.quick,
            **settings,
            "ceilings": self.ceilings,
            "rows": self.rows,
            "errors": self.gate.errors,
            "skipped": self.skipped,
            "notes": self.notes,
        }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
