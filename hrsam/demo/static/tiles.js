// The picture's tiles: fetched and decoded off the main path, nearest first; a coarser one stands in for one that is missing.

import { keyOf, parentOf } from "./view.js";

const AT_ONCE = 6; // requests under way
const KEPT = 220; // bitmaps; one of 512 x 512 takes 1 MB
const PATIENCE = 1500; // ms after which a tile that failed is asked for again

export class Tiles {
  constructor(grid, address, arrived) {
    Object.assign(this, { grid, address, arrived });
    this.kept = new Map(); // key -> bitmap, the one used last at the end
    this.coming = new Map(); // key -> AbortController
    this.failed = new Map(); // key -> time
    this.wanted = [];
    this.closed = false;
  }

  want(tiles) {
    const top = { level: this.grid.levels - 1, col: 0, row: 0 };
    this.wanted = [top, ...tiles].filter((tile) => !this.kept.has(keyOf(tile)));
    const keys = new Set(this.wanted.map(keyOf));
    for (const [key, abort] of this.coming) if (!keys.has(key)) abort.abort();
    this.next();
  }

  next() {
    for (const tile of this.wanted) {
      if (this.coming.size >= AT_ONCE || this.closed) return;
      const key = keyOf(tile);
      const tired = performance.now() < (this.failed.get(key) ?? -Infinity) + PATIENCE;
      if (tired || this.kept.has(key) || this.coming.has(key)) continue;
      this.fetch(tile, key);
    }
  }

  async fetch(tile, key) {
    const abort = new AbortController();
    this.coming.set(key, abort);
    try {
      const answer = await fetch(this.address(tile), { signal: abort.signal });
      if (!answer.ok) throw new Error(`${answer.status}`);
      const bitmap = await createImageBitmap(await answer.blob());
      if (this.closed) return bitmap.close();
      this.kept.set(key, bitmap);
      this.trim();
      this.arrived();
    } catch (error) {
      if (error.name !== "AbortError") {
        this.failed.set(key, performance.now());
        setTimeout(() => this.next(), PATIENCE + 50);
      }
    } finally {
      this.coming.delete(key);
      this.next();
    }
  }

  trim() {
    for (const [key, bitmap] of this.kept) {
      if (this.kept.size <= KEPT) return;
      if (key === keyOf({ level: this.grid.levels - 1, col: 0, row: 0 })) continue;
      this.kept.delete(key);
      bitmap.close();
    }
  }

  // The tile itself or the nearest coarser one that covers it: {tile, what}, or null.
  find(tile) {
    for (; tile.level < this.grid.levels; tile = parentOf(tile)) {
      const key = keyOf(tile);
      const what = this.kept.get(key);
      if (!what) continue;
      this.kept.delete(key);
      this.kept.set(key, what);
      return { tile, what };
    }
    return null;
  }

  get complete() {
    return this.wanted.every((tile) => this.kept.has(keyOf(tile)));
  }

  close() {
    this.closed = true;
    for (const abort of this.coming.values()) abort.abort();
    for (const bitmap of this.kept.values()) bitmap.close();
    this.kept.clear();
  }
}

// The device pixels that a box of the picture covers, on whole pixels so that neighbours share an edge and none shines through.
export function place(view, ratio, box) {
  const { scale, x, y } = view.at;
  const left = Math.round((box.x0 * scale + x) * ratio);
  const top = Math.round((box.y0 * scale + y) * ratio);
  return {
    left,
    top,
    width: Math.round((box.x1 * scale + x) * ratio) - left,
    height: Math.round((box.y1 * scale + y) * ratio) - top,
  };
}

// Draw the part `box` of the picture from a bitmap that shows `from` (its tile's rectangle) at `level`.
export function stamp(ctx, bitmap, from, level, box, to) {
  const size = 2 ** level;
  ctx.drawImage(
    bitmap,
    (box.x0 - from.x0) / size,
    (box.y0 - from.y0) / size,
    (box.x1 - box.x0) / size,
    (box.y1 - box.y0) / size,
    to.left,
    to.top,
    to.width,
    to.height,
  );
}
