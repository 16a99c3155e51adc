// Where the picture lies on the screen, and which tiles of it are seen.
// Screen = scale * picture + offset, both axes alike; screen in CSS pixels, picture in pixels with edges at whole numbers,
// so that pixel (x, y) covers x..x+1 and its centre is x + 0.5.

const MAX_SCALE = 64; // screen pixels a picture pixel
const EASE = 55; // ms in which a movement comes nearer its goal by 1 - 1/e
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class View {
  constructor() {
    this.screen = { width: 1, height: 1 };
    this.inset = { top: 0, right: 0, bottom: 0, left: 0 }; // covered by panels: fit leaves it free
    this.picture = { width: 1, height: 1 };
    this.at = { scale: 1, x: 0, y: 0 };
    this.goal = null;
    this.fitted = true;
  }

  show(picture) {
    this.picture = picture;
    this.goal = null;
    this.at = this.fitting();
    this.fitted = true;
  }

  resize(width, height, inset) {
    const old = this.screen;
    this.screen = { width, height };
    this.inset = inset;
    if (this.fitted) {
      this.goal = null;
      this.at = this.fitting();
    } else if (width !== old.width || height !== old.height) {
      this.panBy((width - old.width) / 2, (height - old.height) / 2);
    }
  }

  fitting({ x0, y0, x1, y1 } = { x0: 0, y0: 0, x1: this.picture.width, y1: this.picture.height }, margin = 20) {
    const { top, right, bottom, left } = this.inset;
    const width = Math.max(40, this.screen.width - left - right - 2 * margin);
    const height = Math.max(40, this.screen.height - top - bottom - 2 * margin);
    const scale = this.clampScale(Math.min(width / (x1 - x0), height / (y1 - y0)));
    return {
      scale,
      x: left + margin + width / 2 - (scale * (x0 + x1)) / 2,
      y: top + margin + height / 2 - (scale * (y0 + y1)) / 2,
    };
  }

  clampScale(scale) {
    const whole = Math.min(this.screen.width / this.picture.width, this.screen.height / this.picture.height);
    return Math.min(MAX_SCALE, Math.max(Math.min(1, whole) / 4, scale));
  }

  // The middle of the screen stays over the picture, so that it cannot be lost.
  keep({ scale, x, y }) {
    const { width, height } = this.screen;
    return {
      scale,
      x: Math.min(width / 2, Math.max(width / 2 - scale * this.picture.width, x)),
      y: Math.min(height / 2, Math.max(height / 2 - scale * this.picture.height, y)),
    };
  }

  zoomed(from, factor, sx, sy) {
    const scale = this.clampScale(from.scale * factor);
    const by = scale / from.scale;
    return this.keep({ scale, x: sx - (sx - from.x) * by, y: sy - (sy - from.y) * by });
  }

  zoomAt(factor, sx, sy, smooth = true) {
    this.go(this.zoomed((smooth && this.goal) || this.at, factor, sx, sy), smooth);
  }

  panBy(dx, dy, smooth = false) {
    const from = (smooth && this.goal) || this.at;
    this.go(this.keep({ scale: from.scale, x: from.x + dx, y: from.y + dy }), smooth);
  }

  fit() {
    this.go(this.fitting());
    this.fitted = true;
  }

  showBox(box) {
    this.go(this.keep(this.fitting(box, 60)));
  }

  go(goal, smooth = true) {
    this.fitted = false;
    if (smooth && !calm.matches) {
      this.goal = goal;
    } else {
      this.at = goal;
      this.goal = null;
    }
  }

  // One frame of a movement; true while it goes on.
  step(ms) {
    if (!this.goal) return false;
    const { at, goal } = this;
    const part = 1 - Math.exp(-ms / EASE);
    const scale = at.scale * (goal.scale / at.scale) ** part;
    const same = Math.abs(Math.log(goal.scale / at.scale)) < 1e-4;
    const moved = same ? part : (scale - at.scale) / (goal.scale - at.scale); // the fixed point of a zoom stays fixed
    this.at = { scale, x: at.x + (goal.x - at.x) * moved, y: at.y + (goal.y - at.y) * moved };
    const far = Math.max(
      Math.abs(this.at.x - goal.x),
      Math.abs(this.at.y - goal.y),
      Math.abs(scale - goal.scale) * Math.max(this.picture.width, this.picture.height),
    );
    if (far < 0.3) {
      this.at = goal;
      this.goal = null;
    }
    return true;
  }

  toPicture(sx, sy) {
    return { x: (sx - this.at.x) / this.at.scale, y: (sy - this.at.y) / this.at.scale };
  }

  toScreen(x, y) {
    return { x: x * this.at.scale + this.at.x, y: y * this.at.scale + this.at.y };
  }

  // The pixel under a place of the screen, or null beside the picture.
  pixel(sx, sy) {
    const { x, y } = this.toPicture(sx, sy);
    const inside = x >= 0 && y >= 0 && x < this.picture.width && y < this.picture.height;
    return inside ? { x: Math.floor(x), y: Math.floor(y) } : null;
  }

  seen() {
    const a = this.toPicture(0, 0);
    const b = this.toPicture(this.screen.width, this.screen.height);
    return { x0: a.x, y0: a.y, x1: b.x, y1: b.y };
  }
}

// The tiles of a picture: level k shows it at 1 / 2^k.
export class Grid {
  constructor({ width, height, tile, levels }) {
    Object.assign(this, { width, height, tile, levels });
  }

  // The level whose pixels are about as large as the screen's; `density` device pixels a picture pixel.
  level(density) {
    return Math.min(this.levels - 1, Math.max(0, Math.floor(Math.log2(1 / density) + 0.3)));
  }

  rect(level, col, row) {
    const side = this.tile * 2 ** level;
    return {
      x0: col * side,
      y0: row * side,
      x1: Math.min(this.width, (col + 1) * side),
      y1: Math.min(this.height, (row + 1) * side),
    };
  }

  // Tiles of a level that meet a box, nearest to its middle first.
  within(level, box, ring = 0) {
    const side = this.tile * 2 ** level;
    const first = (low) => Math.max(0, Math.floor(low / side) - ring);
    const last = (high, end) => Math.min(Math.ceil(end / side), Math.ceil(high / side) + ring);
    const found = [];
    for (let row = first(box.y0); row < last(box.y1, this.height); row++) {
      for (let col = first(box.x0); col < last(box.x1, this.width); col++) found.push({ level, col, row });
    }
    const middle = { x: (box.x0 + box.x1) / 2 / side - 0.5, y: (box.y0 + box.y1) / 2 / side - 0.5 };
    const far = ({ col, row }) => (col - middle.x) ** 2 + (row - middle.y) ** 2;
    return found.sort((a, b) => far(a) - far(b));
  }
}

export const keyOf = ({ level, col, row }) => `${level}/${col}/${row}`;

export const parentOf = ({ level, col, row }) => ({ level: level + 1, col: col >> 1, row: row >> 1 });

export const meet = (a, b) => {
  const cut = {
    x0: Math.max(a.x0, b.x0),
    y0: Math.max(a.y0, b.y0),
    x1: Math.min(a.x1, b.x1),
    y1: Math.min(a.y1, b.y1),
  };
  return cut.x0 < cut.x1 && cut.y0 < cut.y1 ? cut : null;
};
