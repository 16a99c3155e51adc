// The worker that turns masks into tiles: decodes, paints the fill and follows the outline, away from the page's thread.
// keep: a new mask came. paint: a tile is wanted. drop: versions below this one are not needed any more.

import { joined } from "./lines.js";
import { readOutline } from "./outline.js";
import { readMask } from "./png.js";

const LOOSE = 0.4; // pixels of a tile by which a line seen from afar may miss the outline

const held = new Map(); // object -> Map(version -> promise of {x, y, step, width, height, stride, bits})

onmessage = ({ data }) => {
  if (data.do === "keep") keep(data);
  else if (data.do === "paint") paint(data);
  else if (data.do === "drop") drop(data);
  else if (data.do === "forget") held.clear();
};

function keep({ place, code }) {
  const { object, version } = place;
  const versions = held.get(object) ?? new Map();
  held.set(object, versions);
  const mask = readOutline(code, place).then((read) => ({ ...place, ...read }));
  mask.catch((error) => postMessage({ object, version, failed: error.message }));
  versions.set(version, mask);
}

function drop({ object, below }) {
  for (const version of held.get(object)?.keys() ?? []) if (version < below) held.get(object).delete(version);
}

async function paint({ object, version, tile, grid, colour, address }) {
  const answer = { object, version, tile };
  try {
    const mask = await (address ? remote(address, tile, grid) : held.get(object)?.get(version));
    if (!mask) return;
    const { width, height, inside, covered, count } = sample(mask, tile, grid);
    if (count === 0) return postMessage({ ...answer, kind: "empty" });
    const lines = joined(contour(inside, width, height), width, height, LOOSE);
    const steps = tile.level === 0 ? joined(edges(inside, width, height), width, height, 0) : null;
    const whole = count === 4 * width * height;
    const bitmap = whole ? null : await createImageBitmap(tint(covered, width, height, colour));
    postMessage({ ...answer, kind: whole ? "full" : "some", bitmap, lines, steps }, bitmap ? [bitmap] : []);
  } catch (error) {
    postMessage({ ...answer, failed: error.message });
  }
}

// A tile of a mask too large to send whole, at the tile's own level. What lies around it is not known: taken as going on.
async function remote(address, { level, col, row }, grid) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`a tile of the mask did not come (${answer.status})`);
  const read = await readMask(await answer.arrayBuffer());
  const step = 2 ** level;
  return { x: col * grid.tile * step, y: row * grid.tile * step, step, alone: true, ...read };
}

// Looks the mask up for every pixel of a tile and for a rim of one around it, at four places of each pixel.
// covered: 0..4 of the places are inside; inside: at least two are, with the rim.
function sample(mask, { level, col, row }, grid) {
  const size = 2 ** level;
  const left = col * grid.tile;
  const top = row * grid.tile;
  const width = Math.min(grid.tile, Math.ceil(grid.width / size) - left);
  const height = Math.min(grid.tile, Math.ceil(grid.height / size) - top);
  const offsets = size === 1 ? [0, 0] : [size >> 2, size - 1 - (size >> 2)];
  const lookup = (first, count, start, end) =>
    offsets.map((offset) =>
      Int32Array.from({ length: count + 2 }, (_, i) => {
        const at = Math.floor(((first + i - 1) * size + offset - start) / mask.step);
        if (mask.alone) return Math.min(end - 1, Math.max(0, at));
        return at >= 0 && at < end ? at : -1;
      }),
    );
  const columns = lookup(left, width, mask.x, mask.width);
  const rows = lookup(top, height, mask.y, mask.height);
  const [first, last] = [columns[1].findIndex((at) => at >= 0), columns[0].findLastIndex((at) => at >= 0)];
  const { bits, stride } = mask;
  const covered = new Uint8Array(width * height);
  const inside = new Uint8Array((width + 2) * (height + 2));
  let count = 0;
  for (let y = 0; y < height + 2 && first >= 0; y++) {
    const [upper, lower] = [rows[0][y], rows[1][y]];
    if (upper < 0 && lower < 0) continue;
    const [a, b] = [upper * stride, lower * stride];
    const inTile = y > 0 && y <= height;
    for (let x = first; x <= last; x++) {
      let sum = 0;
      for (let i = 0; i < 2; i++) {
        const at = columns[i][x];
        if (at < 0) continue;
        const shift = 7 - (at & 7);
        if (upper >= 0) sum += (bits[a + (at >> 3)] >> shift) & 1;
        if (lower >= 0) sum += (bits[b + (at >> 3)] >> shift) & 1;
      }
      if (sum === 0) continue;
      if (sum >= 2) inside[y * (width + 2) + x] = 1;
      if (inTile && x > 0 && x <= width) {
        covered[(y - 1) * width + x - 1] = sum;
        count += sum;
      }
    }
  }
  return { width, height, inside, covered, count };
}

function tint(covered, width, height, [r, g, b]) {
  const image = new ImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const shades = [0, 64, 128, 191, 255].map((alpha) => (alpha ? ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0 : 0));
  for (let i = 0; i < covered.length; i++) pixels[i] = shades[covered[i]];
  return image;
}

// The outline as straight pieces x0, y0, x1, y1 in pixels of the tile, as it looks when pixels are squares: along their edges.
function edges(inside, width, height) {
  const wide = width + 2;
  const found = [];
  const differ = (at, by) => inside[at] !== inside[at - by];
  for (let y = 0; y <= height; y++) {
    for (let x = 0, row = (y + 1) * wide + 1; x < width; x++) {
      const start = x;
      while (x < width && differ(row + x, wide)) x++;
      if (x > start) found.push(start, y, x, y);
    }
  }
  for (let x = 0; x <= width; x++) {
    for (let y = 0; y < height; y++) {
      const start = y;
      while (y < height && differ((y + 1) * wide + x + 1, 1)) y++;
      if (y > start) found.push(x, start, x, y);
    }
  }
  return Float32Array.from(found);
}

// The same as it looks from afar: between the middles of pixels inside and outside, corners cut (marching squares).
function contour(inside, width, height) {
  const wide = width + 2;
  const found = [];
  const open = new Int32Array(width + 1).fill(-1); // where a piece that runs down began
  for (let y = 0; y <= height; y++) {
    let run = -1; // where a piece that runs right began
    for (let x = 0; x <= width; x++) {
      const at = y * wide + x;
      const a = inside[at];
      const b = inside[at + 1];
      const c = inside[at + wide + 1];
      const d = inside[at + wide];
      const right = a === b && c === d && a !== d;
      const down = a === d && b === c && a !== b;
      if (run >= 0 && !right) {
        found.push(run - 0.5, y, x - 0.5, y);
        run = -1;
      }
      if (open[x] >= 0 && !down) {
        found.push(x, open[x] - 0.5, x, y - 0.5);
        open[x] = -1;
      }
      if (right && run < 0) run = x;
      if (down && open[x] < 0) open[x] = y;
      if (right || down) continue;
      if (a !== b && a !== d) found.push(x - 0.5, y, x, y - 0.5);
      if (c !== b && c !== d) found.push(x + 0.5, y, x, y + 0.5);
      if (b !== a && b !== c && a === d) found.push(x, y - 0.5, x + 0.5, y);
      if (d !== a && d !== c && a === b) found.push(x - 0.5, y, x, y + 0.5);
    }
    if (run >= 0) found.push(run - 0.5, y, width + 0.5, y);
  }
  open.forEach((from, x) => from >= 0 && found.push(x, from - 0.5, x, height + 0.5));
  return Float32Array.from(found);
}
