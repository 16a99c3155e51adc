// How things are shown. Kept in the browser, for this page's address only.

const STORE = "hrsam-view";
const DEFAULTS = { mode: "fill", fill: 0.45, outline: 1, cutout: 1, brightness: 1, theme: null, folded: null };
const dark = matchMedia("(prefers-color-scheme: dark)");

export class Settings extends EventTarget {
  constructor() {
    super();
    this.kept = { ...DEFAULTS, ...read() };
    this.hidden = false; // masks, while a key is held
    dark.addEventListener("change", () => this.apply());
    this.apply();
  }

  get mode() {
    return this.kept.mode;
  }

  // Of what the mode draws: 0 nothing to be seen of it, 1 nothing to be seen through it.
  get opacity() {
    return this.kept[this.mode];
  }

  set opacity(value) {
    this.set({ [this.mode]: value });
  }

  get brightness() {
    return this.kept.brightness;
  }

  get folded() {
    return this.kept.folded ?? innerWidth <= 720;
  }

  get dark() {
    return this.kept.theme ? this.kept.theme === "dark" : dark.matches;
  }

  set(change) {
    Object.assign(this.kept, change);
    try {
      localStorage.setItem(STORE, JSON.stringify(this.kept));
    } catch {
      // a browser that keeps nothing: as good as it gets
    }
    this.apply();
  }

  hide(hidden) {
    if (this.hidden === hidden) return;
    this.hidden = hidden;
    this.dispatchEvent(new Event("changed"));
  }

  apply() {
    if (this.kept.theme) document.documentElement.dataset.theme = this.kept.theme;
    else delete document.documentElement.dataset.theme;
    this.pattern = null;
    this.dispatchEvent(new Event("changed"));
  }

  // The squares that stand for "nothing here".
  squares(ctx) {
    if (this.pattern) return this.pattern;
    const side = 10;
    const canvas = new OffscreenCanvas(2 * side, 2 * side);
    const paint = canvas.getContext("2d");
    const [low, high] = this.dark ? ["#26282e", "#30333a"] : ["#e3e4e8", "#f6f6f8"];
    paint.fillStyle = low;
    paint.fillRect(0, 0, 2 * side, 2 * side);
    paint.fillStyle = high;
    paint.fillRect(0, 0, side, side);
    paint.fillRect(side, side, side, side);
    this.pattern = ctx.createPattern(canvas, "repeat");
    return this.pattern;
  }
}

function read() {
  try {
    return JSON.parse(localStorage.getItem(STORE)) ?? {};
  } catch {
    return {};
  }
}
