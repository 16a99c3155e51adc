"""Index tables against plain definitions that go slot by slot, over random layouts; and their way to a device."""

import random
import weakref
from itertools import groupby, pairwise

import numpy as np
import pytest
import torch

from hrsam.kernels import has_triton
from hrsam.layout import Layout, boundaries_on, token_images
from hrsam.ops.attend import NOBODY, PADDING, lists_of, make_plan
from hrsam.ops.cross import PART, part_plan
from hrsam.ops.full import full_plan
from hrsam.ops.window import tile_plan
from hrsam.tables import as_table, cached, forget, holding, pieces, pointers, ranges, row_of, to_device

CPU = torch.device("cpu")
TILES = [(64, 64), (128, 64), (64, 32), (32, 64), (32, 32), (16, 16)]


# ---------------------------------------------------------------- definitions


def plain_csr(rows):
    return [sum(map(len, rows[:i])) for i in range(len(rows) + 1)], [entry for row in rows for entry in row]


def plain_groups(reads, key_tiles):
    """Rows of (first query tile, how many, first key tile): neighbours that read the same few key tiles in a row."""
    size = len(reads[0])
    if not 1 <= size <= 4 or any(sorted(r) != [*range(min(r, default=0), min(r, default=0) + size)] for r in reads):
        return [], 0
    groups = []
    for key, members in groupby(range(len(reads)), key=lambda tile: min(reads[tile])):
        members = list(members)
        groups.append([members[0], len(members), key])
    together = [key for *_, key in groups] == list(range(0, key_tiles, size))  # every key tile in just one group
    return (groups, size) if together else ([], 0)


def plain_plan(q, k, full, partial, tiles, tokens, runs):
    """All tables of a plan as lists.  ``q``, ``k``: for each tile its rows of tokens (or first and count), places, labels."""
    order = sorted(range(len(q)), key=lambda tile: -len(full[tile]) - len(partial[tile]))
    q, full, partial = ([rows[tile] for tile in order] for rows in (q, full, partial))
    sides = []
    for side in (q, k):
        held = [token for tile in side for token in tile[0]]
        if runs:
            held = [first + i if i < count else NOBODY for (first, count), *_ in side for i in range(tiles[side is k])]
        sides.append(held)
    groups, group_keys = ([], 0) if runs else plain_groups([a + b for a, b in zip(full, partial)], len(k))
    turned = (
        [[row for row, keys in enumerate(part) if key in keys] for key in range(len(k))] for part in (full, partial)
    )
    found = {
        "tile_q": tiles[0], "tile_k": tiles[1], "tokens": tokens, "runs": runs, "group_keys": group_keys, "groups": groups,
        "covers": all(sorted(t for t in held if t >= 0) == list(range(tokens)) for held in sides),
        "padded": PADDING in sides[1], "gaps": NOBODY in sides[1],
        "lists": [*plain_csr(full), *plain_csr(partial)], "transposed": [t for part in turned for t in plain_csr(part)],
    }  # fmt: skip
    for at, name in enumerate(("tokens", "places", "labels")):
        for letter, side in (("q", q), ("k", k)):
            found[f"{letter}_{name}"] = [tile[at] for tile in side] if side[0][at] is not None else [0]
    return found


def cut(rows, tile, fill):
    """Tiles of ``tile`` rows, the last filled up."""
    rows = rows + [fill] * (-len(rows) % tile)
    return [rows[first : first + tile] for first in range(0, len(rows), tile)]


def plain_window_plan(grids, window, shift, tiles, padded):
    sub = 8 if window % 8 == 0 else window
    order = [
        (y + dy, x + dx)
        for y in range(0, window, sub)
        for x in range(0, window, sub)
        for dy in range(sub)
        for dx in range(sub)
    ]
    before, bundle = (window - shift) % window, max(1, min(tiles) // window**2)
    q, k, full, partial, start = [], [], [], [], 0
    for rows, cols in grids:
        corners = [(y, x) for y in range(-before, rows, window) for x in range(-before, cols, window)]
        for first in range(0, len(corners), bundle):
            slots = []
            for label, (top, left) in enumerate(corners[first : first + bundle]):
                for y, x in order:
                    inside = 0 <= top + y < rows and 0 <= left + x < cols
                    token = start + (top + y) * cols + left + x if inside else PADDING
                    slots.append((token, y * window + x, label))
            if bundle == 1:
                slots.sort(key=lambda slot: slot[0] == PADDING)
            asking = [slot for slot in slots if slot[0] != PADDING]
            new_q, new_k = (
                cut(asking, tiles[0], (NOBODY, 0, 0)),
                cut(slots if padded else asking, tiles[1], (NOBODY, 0, 0)),
            )
            whole = [bundle == 1 and all(slot[0] >= 0 for slot in tile) for tile in new_k]
            full += [[len(k) + i for i, w in enumerate(whole) if w]] * len(new_q)
            partial += [[len(k) + i for i, w in enumerate(whole) if not w]] * len(new_q)
            q, k = q + new_q, k + new_k
        start += rows * cols

    def columns(side):
        return [[list(column) if bundle > 1 or i < 2 else None for i, column in enumerate(zip(*tile))] for tile in side]

    return plain_plan(columns(q), columns(k), full, partial, tiles, start, runs=False)


def plain_runs(bounds, tile):
    """(first, count) of each tile, and its sequence."""
    rows = [
        ([first, min(tile, end - first)], sequence)
        for sequence, (start, end) in enumerate(pairwise(bounds))
        for first in range(start, end, tile)
    ]
    return [run for run, _ in rows], [sequence for _, sequence in rows]


def plain_full_plan(layout, tiles):
    width = max(cols for _, cols in layout.grids)
    place = [y * width + x for rows, cols in layout.grids for y in range(rows) for x in range(cols)]
    sides = []
    for tile in tiles:
        runs, owners = plain_runs(layout.image_starts, tile)
        at = [[place[min(first + i, layout.tokens - 1)] for i in range(tile)] for first, _ in runs]
        sides.append(([(run, places, None) for run, places in zip(runs, at)], owners))
    (q, asking), (k, read) = sides
    full, partial = (
        [
            [t for t, other in enumerate(read) if other == image and (k[t][0][1] == tiles[1]) is whole]
            for image in asking
        ]
        for whole in (True, False)
    )
    return plain_plan(q, k, full, partial, tiles, layout.tokens, runs=True)


def plain_part_plan(images, queries, keys, tiles):
    parts, per_image = max(1, keys // PART), -(-keys // tiles[1])
    q, owners = plain_runs(range(0, parts * images * queries + 1, queries), tiles[0])
    k, _ = plain_runs(range(0, images * keys + 1, keys), tiles[1])
    reads = []
    for owner in owners:
        part, image = divmod(owner, images)
        first, end = (p * per_image // parts for p in (part, part + 1))
        reads.append(range(image * per_image + first, image * per_image + end))
    full, partial = (
        [[t for t in tiles_read if (k[t][1] == tiles[1]) is whole] for tiles_read in reads] for whole in (True, False)
    )
    q, k = ([(run, None, None) for run in side] for side in (q, k))
    return plain_plan(q, k, full, partial, tiles, images * keys, runs=True)


# ---------------------------------------------------------------- comparisons


def tensors_of(plan):
    return [*(value for value in vars(plan).values() if torch.is_tensor(value)), *plan.lists, *plan.transposed]


def assert_equals(plan, want):
    for name, value in want.items():
        got = getattr(plan, name)
        if isinstance(got, tuple):
            assert [t.tolist() for t in got] == value, name
        else:
            assert (got.tolist() if torch.is_tensor(got) else got) == value, name
    assert plan.groups.shape == (len(want["groups"]), 3)
    assert plan.labelled == (plan.q_labels.shape == plan.q_tokens.shape)
    found = tensors_of(plan)
    assert len(found) == 15
    assert all(t.dtype == torch.int32 and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in found)
    assert len({t.untyped_storage().data_ptr() for t in found}) == 1  # one buffer, one copy


def random_grids(rng):
    longest = rng.choice([1, 3, 9, 20, 40])
    return [(rng.randint(1, longest), rng.randint(1, longest)) for _ in range(rng.randint(1, 5))]


def window_numbers(grids, window, shift):
    return (window, shift, *(side for grid in grids for side in grid))


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7, 8, 12, 16, 24])
def test_window_plans_equal_their_definition(window):
    rng = random.Random(window)
    seen = set()
    for _ in range(12):
        grids, shift = random_grids(rng), rng.choice([0, window // 2, rng.randrange(window)])
        tiles, padded = rng.choice(TILES), rng.random() < 0.5
        plan = tile_plan.__wrapped__(window_numbers(grids, window, shift), tiles, padded, CPU)
        assert_equals(plan, plain_window_plan(grids, window, shift, tiles, padded))
        seen |= {("bundled", plan.labelled), ("grouped", plan.group_keys > 0), ("covers", plan.covers)}
    assert ("covers", True) in seen
    assert ("bundled", window <= 4) in seen  # windows of up to 4x4 always share a tile, of 12x12 and more never
    assert ("grouped", True) in seen


@pytest.mark.parametrize(
    ("grids", "shift"),
    [
        ([(1, 1)], 0),
        ([(1, 1)], 8),
        ([(16, 16)], 0),
        ([(16, 16)], 8),
        ([(1, 40), (40, 1), (8, 8)], 8),
        ([(64, 48), (32, 32), (43, 80), (32, 32)], 0),
        ([(64, 48), (32, 32), (43, 80), (32, 32)], 8),
    ],
)
@pytest.mark.parametrize("padded", [True, False])
def test_window_plans_of_models_equal_their_definition(grids, shift, padded):
    plan = tile_plan.__wrapped__(window_numbers(grids, 16, shift), (64, 64), padded, CPU)
    assert_equals(plan, plain_window_plan(grids, 16, shift, (64, 64), padded))


def test_full_plans_equal_their_definition():
    rng = random.Random(0)
    for _ in range(40):
        grids, images = random_grids(rng), [0]
        while len(images) < len(grids):
            images.append(images[-1] + rng.randint(0, 1))
        layout, tiles = Layout(tuple(grids), tuple(images)), rng.choice(TILES)
        numbers = tuple(n for grid, image in zip(grids, images) for n in (*grid, image))
        assert_equals(full_plan.__wrapped__(numbers, tiles, False, CPU), plain_full_plan(layout, tiles))


def test_plans_of_parts_equal_their_definition():
    rng = random.Random(0)
    for keys in (1, 127, 128, 1024, 2048, 2500, 4096):
        sizes = rng.randint(1, 3), rng.choice([1, 7, 64, 90]), keys, (rng.choice([16, 64]), 128)
        assert_equals(part_plan.__wrapped__(*sizes, CPU), plain_part_plan(*sizes))


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
@pytest.mark.parametrize("chunk", [None, 8, 3])
def test_scan_tables_equal_their_definition(chunk):
    from hrsam.kernels.cycle_scan import chunk_length, scan_tables

    rng = random.Random(0)
    for _ in range(30):
        bounds = [0]
        for _ in range(rng.randint(1, 6)):
            bounds.append(bounds[-1] + rng.randint(1, rng.choice([1, 20, 300, 5000])))
        rows, first = [], [0]
        for sequence, (start, end) in enumerate(pairwise(bounds)):
            length = chunk or chunk_length(end - start)
            rows += [[token, min(token + length, end), sequence] for token in range(start, end, length)]
            first.append(len(rows))
        chunks, first_chunk = scan_tables.__wrapped__(tuple(bounds), chunk, CPU)
        assert chunks.tolist() == rows
        assert first_chunk.tolist() == first
        assert chunks.dtype == first_chunk.dtype == torch.int32
        assert chunks.data_ptr() % 16 == first_chunk.data_ptr() % 16 == 0


def test_lists_in_any_order():
    """Lists of one's own: entries unsorted, tiles nobody reads, longer lists behind shorter ones, blocks of query tiles."""
    rng = random.Random(0)
    for _ in range(30):
        heights = [rng.randint(1, 3) for _ in range(rng.randint(1, 6))]  # query tiles of each block
        key_tiles, partial, full = rng.randint(1, 6), [], []
        for _ in heights:
            some = rng.sample(range(key_tiles), rng.randint(0, key_tiles))
            half = rng.randint(0, len(some))
            full, partial = [*full, some[:half]], [*partial, some[half:]]
        tiles = sum(heights)
        q, k = ([(list(range(2 * t, 2 * t + 2)), None, None) for t in range(n)] for n in (tiles, key_tiles))
        each = [[rows for rows, height in zip(lists, heights) for _ in range(height)] for lists in (full, partial)]
        plan = make_plan(
            np.arange(2 * tiles).reshape(-1, 2), np.arange(2 * key_tiles).reshape(-1, 2), lists_of(full), lists_of(partial),
            tiles=(2, 2), tokens=2 * key_tiles, device=CPU, blocks=pointers(as_table(heights)),
        )  # fmt: skip
        assert_equals(plan, plain_plan(q, k, *each, (2, 2), 2 * key_tiles, runs=False))


def test_rows_of_different_lengths():
    ptr, entries = ranges(as_table([5, 0, 7]), as_table([2, 0, 3]))
    assert ptr.tolist() == [0, 2, 2, 5]
    assert entries.tolist() == [5, 6, 7, 8, 9]
    assert row_of(ptr).tolist() == [0, 0, 2, 2, 2]
    first, end, sequence, ptr = pieces(as_table([0, 5]), as_table([5, 6]), as_table([2, 4]))
    assert list(zip(first.tolist(), end.tolist(), sequence.tolist())) == [(0, 2, 0), (2, 4, 0), (4, 5, 0), (5, 6, 1)]
    assert ptr.tolist() == [0, 3, 4]


# ---------------------------------------------------------------- to a device


def test_tables_share_a_buffer_and_begin_at_16_bytes():
    tables = [
        np.arange(n, dtype=kind).reshape(-1, w)
        for n, w, kind in ((3, 1, "i8"), (0, 3, "i4"), (6, 3, "i4"), (4, 2, "i8"))
    ]
    found = to_device(tables, CPU)
    for got, want in zip(found, tables):
        assert got.dtype == torch.int32
        assert got.shape == want.shape
        assert got.tolist() == want.tolist()
        assert got.data_ptr() % 16 == 0
    assert len({t.untyped_storage().data_ptr() for t in found}) == 1
    found[0].fill_(9)
    assert found[2].tolist() == tables[2].tolist()
    assert tables[0].tolist() == [[0], [1], [2]]


def test_no_tables_inside_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        to_device([as_table([1])], torch.device("cuda"))
    assert to_device([as_table([1])], CPU)[0].tolist() == [1]


def test_a_table_lives_as_long_as_whoever_holds_it():
    @cached(1)
    def build(number):
        """Numbers."""
        return np.full(3, number)

    with holding() as outer:
        first = build(1)
        assert build(1) is first
        with holding() as inner:
            second = build(2)  # which takes the place of the first
    assert build(2) is second
    forget()
    assert build(2) is not second
    assert [id(table) for table in outer] == [id(first), id(first), id(second)]
    assert [id(table) for table in inner] == [id(second)]
    gone = weakref.ref(first)
    del first
    assert gone() is not None
    outer.clear()
    assert gone() is None
    assert build.__doc__ == "Numbers."
    with pytest.raises(ZeroDivisionError), holding() as inner:
        build(3 // 0)
    build(3)
    assert not inner


@pytest.mark.gpu
def test_the_host_waits_for_no_table():
    from hrsam.kernels.cycle_scan import scan_tables

    layout = Layout(((37, 50), (32, 32), (64, 90), (32, 32)), (0, 0, 1, 1))
    numbers = window_numbers(layout.grids, 16, 8)
    of_images = tuple(n for grid, image in zip(layout.grids, layout.images) for n in (*grid, image))

    def build(device):
        return [
            *tensors_of(tile_plan.__wrapped__(numbers, (64, 64), True, device)),
            *tensors_of(tile_plan.__wrapped__((4, 2, *numbers[2:]), (64, 64), False, device)),
            *tensors_of(full_plan.__wrapped__(of_images, (128, 64), False, device)),
            *tensors_of(part_plan.__wrapped__(2, 20, 4096, (64, 128), device)),
            *(t for chunk in (None, 8) for t in scan_tables.__wrapped__(layout.starts, chunk, device)),
            token_images.__wrapped__(layout, device),
            *(boundaries_on.__wrapped__(layout, across, device) for across in (False, True)),
        ]

    cuda = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = build(cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, want in zip(there, build(CPU), strict=True):
        assert got.device == cuda
        assert torch.equal(got.cpu(), want)
        assert got.data_ptr() % 16 == 0
