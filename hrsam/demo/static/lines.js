// Straight pieces of an outline joined into lines, so that little is left to draw.

// pieces: x0, y0, x1, y1 each, halves of pixels from -0.5 to the tile's width or height + 0.5; loose: how far a line may pass
// from the ends of pieces that it leaves out. -> {points: x, y each, ends: of each line, in points}; closed lines end where they
// begin.
export function joined(pieces, width, height, loose) {
  const count = pieces.length / 4;
  const wide = 2 * width + 3;
  const at = (end) => (2 * pieces[2 * end + 1] + 1) * wide + 2 * pieces[2 * end] + 1; // end 2i and 2i + 1: of piece i
  const first = new Int32Array(wide * (2 * height + 3)).fill(-1); // an end at each place
  const other = new Int32Array(2 * count); // the next end there
  for (let end = 0; end < 2 * count; end++) {
    other[end] = first[at(end)];
    first[at(end)] = end;
  }
  const used = new Uint8Array(count);
  const walk = (from) => {
    const line = [pieces[2 * from], pieces[2 * from + 1]];
    for (let end = from; end >= 0; ) {
      end = first[at(end)];
      while (end >= 0 && used[end >> 1]) end = other[end];
      if (end < 0) break;
      used[end >> 1] = 1;
      end ^= 1;
      line.push(pieces[2 * end], pieces[2 * end + 1]);
    }
    return line;
  };
  const points = [];
  const ends = [];
  for (let piece = 0; piece < count; piece++) {
    if (used[piece]) continue;
    used[piece] = 1;
    const back = walk(2 * piece);
    const line = [];
    for (let i = back.length - 2; i >= 0; i -= 2) line.push(back[i], back[i + 1]);
    line.push(...walk(2 * piece + 1));
    thin(line, loose, points);
    ends.push(points.length / 2);
  }
  return { points: Float32Array.from(points), ends: Int32Array.from(ends) };
}

// Adds to `points` those of `line` that are needed: each left out lies within `loose` of the straight way past it.
function thin(line, loose, points) {
  const far = line.length - 2;
  points.push(line[0], line[1]);
  for (let from = 0; from < far; ) {
    let to = from + 2;
    while (to < far && to - from < 2 * MOST && straight(line, from, to + 2, loose)) to += 2;
    points.push(line[to], line[to + 1]);
    from = to;
  }
}

const MOST = 24; // points left out in a row

function straight(line, from, to, loose) {
  const [x, y] = [line[from], line[from + 1]];
  const [dx, dy] = [line[to] - x, line[to + 1] - y];
  const length = dx * dx + dy * dy;
  for (let i = from + 2; i < to; i += 2) {
    const [px, py] = [line[i] - x, line[i + 1] - y];
    const along = length ? Math.min(1, Math.max(0, (px * dx + py * dy) / length)) : 0;
    if ((px - along * dx) ** 2 + (py - along * dy) ** 2 > loose * loose) return false;
  }
  return true;
}
