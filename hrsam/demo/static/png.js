// Reads the one kind of PNG that tiles of masks come in: 1 bit a pixel, grey, not interlaced. Exacter than an <img>.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];

// -> {width, height, stride, bits}: rows of `stride` bytes, the leftmost pixel in the highest bit.
export async function readMask(buffer) {
  const bytes = new Uint8Array(buffer);
  const view = new DataView(buffer);
  if (SIGNATURE.some((value, i) => bytes[i] !== value)) throw new Error("the mask that came is not a PNG");
  const width = view.getUint32(16);
  const height = view.getUint32(20);
  if (bytes[24] !== 1 || bytes[25] !== 0 || bytes[28] !== 0) throw new Error("the mask that came is not 1-bit grey");
  const parts = [];
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    if (String.fromCharCode(...bytes.subarray(at + 4, at + 8)) === "IDAT") parts.push(bytes.subarray(at + 8, at + 8 + length));
    at += 12 + length;
  }
  const plain = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate"));
  const rows = new Uint8Array(await new Response(plain).arrayBuffer());
  const stride = (width + 7) >> 3;
  if (rows.length !== height * (stride + 1)) throw new Error("the mask that came is cut off");
  return { width, height, stride, bits: unfilter(rows, stride, height) };
}

function unfilter(rows, stride, height) {
  const out = new Uint8Array(stride * height);
  for (let y = 0; y < height; y++) {
    const filter = rows[y * (stride + 1)];
    const from = y * (stride + 1) + 1;
    const to = y * stride;
    for (let i = 0; i < stride; i++) {
      const left = i ? out[to + i - 1] : 0;
      const up = y ? out[to + i - stride] : 0;
      const corner = i && y ? out[to + i - stride - 1] : 0;
      out[to + i] = rows[from + i] + guess(filter, left, up, corner);
    }
  }
  return out;
}

function guess(filter, left, up, corner) {
  if (filter === 0) return 0;
  if (filter === 1) return left;
  if (filter === 2) return up;
  if (filter === 3) return (left + up) >> 1;
  const a = Math.abs(up - corner);
  const b = Math.abs(left - corner);
  const c = Math.abs(left + up - 2 * corner);
  return a <= b && a <= c ? left : b <= c ? up : corner;
}
