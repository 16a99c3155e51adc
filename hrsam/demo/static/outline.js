// Reads a mask from its outline: where each column is crossed, as steps from the column before. The code's numbers and their
// order are told in hrsam/demo/outline.py, whose decode this is.

// -> {width, height, stride, bits}: rows of `stride` bytes, the leftmost pixel in the highest bit, as of a PNG.
export async function readOutline(code, { width, height }) {
  const plain = new Blob([code]).stream().pipeThrough(new DecompressionStream("deflate"));
  const next = numbers(new Uint8Array(await new Response(plain).arrayBuffer()));
  const take = (count) => Array.from({ length: count }, next);
  const ends = take(width);
  const begins = take(width);
  const ended = ends.map(take);
  const begun = begins.map((count) => take(3 * count));
  const stride = (width + 7) >> 3;
  const bits = new Uint8Array(stride * (height + 1)); // first: what a row's pixels differ in from those above
  let crossings = [];
  for (let x = 0; x < width; x++) {
    if (ends[x]) crossings = without(crossings, ended[x]);
    for (let i = 0; i < crossings.length; i++) {
      const number = next();
      crossings[i] += number & 1 ? -(number + 1) / 2 : number / 2;
    }
    if (begins[x]) insert(crossings, begun[x]);
    const bit = 128 >> (x & 7);
    for (const y of crossings) bits[y * stride + (x >> 3)] ^= bit;
  }
  for (let at = stride; at < stride * height; at++) bits[at] ^= bits[at - stride];
  return { width, height, stride, bits: bits.subarray(0, stride * height) };
}

function numbers(bytes) {
  let at = 0;
  return () => {
    for (let value = 0, unit = 1; at < bytes.length; unit *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * unit;
      if (byte < 128) return value;
    }
    throw new Error("the mask that came is cut off");
  };
}

// The crossings that stay, of those of the column before.
function without(crossings, gaps) {
  const left = [];
  let from = 0;
  let place = 0;
  for (const gap of gaps) {
    place += gap;
    for (; from < place; from++) left.push(crossings[from]);
    from += 2;
  }
  for (; from < crossings.length; from++) left.push(crossings[from]);
  return left;
}

function insert(crossings, news) {
  let place = 0;
  for (let i = 0; i < news.length; i += 3) {
    place += news[i];
    const y = (place ? crossings[place - 1] : 0) + news[i + 1];
    crossings.splice(place, 0, y, y + news[i + 2] + 1);
  }
}
