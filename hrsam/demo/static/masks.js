// The masks on the screen, one layer an object. A new version takes the place of the old one when all that is seen of it is
// there, so that nothing flickers.

import { keyOf, meet, parentOf } from "./view.js";

const SLOW = 400; // ms after which a new version is shown as far as it is there
const KEPT = 120; // tiles a layer
const MUCH = 20000; // points of outline in one tile above which it is noise: its fill is drawn instead

// One version of one object's mask.
class Version {
  constructor(place, colour) {
    Object.assign(this, { ...place, colour, tiles: new Map(), asked: new Set(), since: performance.now() });
    this.box = place.width
      ? {
          x0: place.x,
          y0: place.y,
          x1: place.x + place.width * place.step,
          y1: place.y + place.height * place.step,
        }
      : null;
  }

  close() {
    for (const tile of this.tiles.values()) tile.bitmap?.close();
    this.tiles.clear();
  }
}

export class Masks {
  // changed(object, version): a version is on the screen from the next frame on.
  constructor(redraw, changed, failed) {
    Object.assign(this, { redraw, changed, failed });
    this.layers = new Map(); // object -> {now, next}
    this.worker = new Worker(new URL("./maskwork.js", import.meta.url), { type: "module" });
    this.worker.onmessage = ({ data }) => this.receive(data);
  }

  reset(grid, address) {
    for (const object of [...this.layers.keys()]) this.forget(object);
    this.worker.postMessage({ do: "forget" });
    Object.assign(this, { grid, address });
  }

  forget(object) {
    const layer = this.layers.get(object);
    layer?.now?.close();
    layer?.next?.close();
    this.layers.delete(object);
    this.worker.postMessage({ do: "drop", object, below: Infinity });
    this.redraw();
  }

  accept(place, code, colour) {
    const layer = this.layers.get(place.object) ?? { now: null, next: null };
    this.layers.set(place.object, layer);
    if ([layer.now, layer.next].some((one) => one?.version === place.version)) return; // sent again after a reconnect
    layer.next?.close();
    layer.next = new Version(place, colour);
    if (place.width) {
      this.worker.postMessage({ do: "keep", place, code }, [code]);
    }
    this.redraw();
  }

  // Ask for what is seen; called once a frame with the level of the picture's tiles.
  want(level, seen) {
    for (const [object, layer] of this.layers) {
      const { next } = layer;
      if (layer.now) this.ask(layer.now, level, seen);
      if (!next) continue;
      const missing = this.ask(next, level, seen).some((tile) => !next.tiles.has(keyOf(tile)));
      if (missing && performance.now() - next.since < SLOW) continue;
      layer.now?.close();
      layer.now = next;
      layer.next = null;
      this.worker.postMessage({ do: "drop", object, below: next.version });
      this.changed(object, next.version);
    }
  }

  ask(version, level, seen) {
    const box = version.box && meet(version.box, seen);
    if (!box) return [];
    const top = { level: this.grid.levels - 1, col: 0, row: 0 };
    const tiles = this.grid.within(level, box);
    for (const tile of [...tiles, top]) {
      const key = keyOf(tile);
      if (version.asked.has(key)) continue;
      version.asked.add(key);
      const { object, version: number, colour, step } = version;
      const fine = 2 ** tile.level < step; // finer than what was sent
      this.worker.postMessage({
        do: "paint",
        object,
        version: number,
        tile,
        grid: { width: this.grid.width, height: this.grid.height, tile: this.grid.tile },
        colour: rgb(colour),
        address: fine ? this.address(object, number, tile) : null,
      });
    }
    return tiles;
  }

  receive({ object, version: number, tile, failed, ...painted }) {
    const layer = this.layers.get(object);
    const version = [layer?.now, layer?.next].find((one) => one?.version === number);
    if (failed) this.failed(failed);
    if (!version || failed) return painted.bitmap?.close();
    if (painted.lines) {
      painted.dense = painted.lines.points.length / 2 > MUCH;
      const lines = painted.dense ? null : outline(painted.lines);
      painted.outline = lines && { lines, steps: painted.steps ? outline(painted.steps) : lines };
    }
    const key = keyOf(tile);
    version.tiles.get(key)?.bitmap?.close();
    version.tiles.delete(key);
    version.tiles.set(key, painted);
    this.trim(version);
    this.redraw();
  }

  trim(version) {
    const top = keyOf({ level: this.grid.levels - 1, col: 0, row: 0 });
    for (const [key, painted] of version.tiles) {
      if (version.tiles.size <= KEPT) return;
      if (key === top) continue;
      painted.bitmap?.close();
      version.tiles.delete(key);
      version.asked.delete(key);
    }
  }

  // What to draw of an object: [{box, from, tile, painted}], coarser tiles where the right one is not there yet.
  seen(object, level, seen) {
    const version = this.layers.get(object)?.now;
    const box = version?.box && meet(version.box, seen);
    if (!box) return [];
    const found = [];
    for (const want of this.grid.within(level, box)) {
      for (let tile = want; tile.level < this.grid.levels; tile = parentOf(tile)) {
        const painted = version.tiles.get(keyOf(tile));
        if (!painted) continue;
        if (painted.kind !== "empty") {
          const from = this.grid.rect(tile.level, tile.col, tile.row);
          found.push({ box: this.grid.rect(want.level, want.col, want.row), from, tile, painted, colour: version.colour });
        }
        break;
      }
    }
    return found;
  }

  get complete() {
    const whole = (version) => [...(version?.asked ?? [])].every((key) => version.tiles.has(key));
    return [...this.layers.values()].every(({ now, next }) => !next && whole(now));
  }
}

function outline({ points, ends }) {
  const path = new Path2D();
  let point = 0;
  for (const end of ends) {
    path.moveTo(points[2 * point], points[2 * point + 1]);
    while (++point < end) path.lineTo(points[2 * point], points[2 * point + 1]);
  }
  return path;
}

export const rgb = (colour) => [1, 3, 5].map((at) => Number.parseInt(colour.slice(at, at + 2), 16));
