// Draws: the picture on one canvas, masks and marks on another above it, each only when it changed.

import { meet } from "./view.js";
import { place, stamp } from "./tiles.js";

const SHARP = 4; // device pixels a picture pixel from which pixels are shown as squares
const GRID = 18; // CSS pixels a picture pixel from which lines separate them
const MARK = 7; // radius of a click's mark in CSS pixels

export class Stage {
  constructor(under, over, view, settings) {
    Object.assign(this, { under, over, view, settings });
    this.pictureContext = under.getContext("2d");
    this.markContext = over.getContext("2d");
    this.scene = null; // {grid, tiles, masks, desk}
    this.hover = null; // the pixel under the mouse
    this.band = null; // a box that is being drawn, in pixels of the picture
    this.aim = false; // the cross of the keyboard
    this.dirty = { picture: true, marks: true };
    this.last = 0;
    this.asked = false;
    this.frame = this.frame.bind(this);
    this.before = () => {}; // something is to be drawn
    this.after = () => {}; // it was
  }

  resize() {
    this.ratio = Math.min(2, window.devicePixelRatio || 1);
    const { width, height } = this.view.screen;
    const size = { width: Math.round(width * this.ratio), height: Math.round(height * this.ratio) };
    for (const canvas of [this.under, this.over]) {
      if (canvas.width !== size.width || canvas.height !== size.height) Object.assign(canvas, size); // empties it
    }
    this.redraw();
  }

  redraw(what = "both") {
    if (what !== "marks") this.dirty.picture = true;
    this.dirty.marks = true;
    this.before();
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(this.frame);
  }

  frame(now) {
    this.asked = false;
    const moving = this.view.step(Math.min(50, now - this.last || 16));
    this.last = now;
    if (moving) this.dirty.picture = this.dirty.marks = true;
    if (this.dirty.picture) this.drawPicture();
    if (this.dirty.marks) this.drawMarks();
    this.dirty.picture = this.dirty.marks = false;
    if (this.view.goal) this.redraw();
    else this.last = 0;
    this.after();
  }

  get level() {
    return this.scene.grid.level(this.view.at.scale * this.ratio);
  }

  drawPicture() {
    const ctx = this.pictureContext;
    const { width, height } = this.under;
    ctx.clearRect(0, 0, width, height);
    if (!this.scene) return;
    const { grid, tiles } = this.scene;
    const box = meet(this.view.seen(), { x0: 0, y0: 0, x1: grid.width, y1: grid.height });
    if (!box) return;
    ctx.imageSmoothingEnabled = this.view.at.scale * this.ratio < SHARP;
    const seen = grid.within(this.level, box);
    for (const tile of seen) {
      const found = tiles.find(tile);
      if (!found) continue;
      const part = grid.rect(tile.level, tile.col, tile.row);
      const from = grid.rect(found.tile.level, found.tile.col, found.tile.row);
      stamp(ctx, found.what, from, found.tile.level, part, place(this.view, this.ratio, part));
    }
    tiles.want(this.view.goal ? seen : grid.within(this.level, box, 1));
    if (this.view.at.scale >= GRID) this.drawGrid(ctx, box);
  }

  drawGrid(ctx, box) {
    const whole = place(this.view, this.ratio, box);
    ctx.fillStyle = "rgba(127,127,127,.28)";
    const at = (value, offset) => Math.round((value * this.view.at.scale + offset) * this.ratio);
    for (let x = Math.ceil(box.x0); x <= box.x1; x++) ctx.fillRect(at(x, this.view.at.x), whole.top, 1, whole.height);
    for (let y = Math.ceil(box.y0); y <= box.y1; y++) ctx.fillRect(whole.left, at(y, this.view.at.y), whole.width, 1);
  }

  drawMarks() {
    const ctx = this.markContext;
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    ctx.clearRect(0, 0, this.over.width, this.over.height);
    if (!this.scene) return;
    const { masks, desk } = this.scene;
    const seen = this.view.seen();
    masks.want(this.level, seen);
    ctx.imageSmoothingEnabled = this.view.at.scale * this.ratio < SHARP;
    if (!this.settings.hidden) {
      const objects = desk.drawn().map(({ id }) => ({ id, parts: masks.seen(id, this.level, seen) }));
      if (this.settings.mode === "cutout") this.cutOut(ctx, objects);
      const { mode, opacity } = this.settings;
      for (const { id, parts } of objects) {
        if (mode === "fill") this.fill(ctx, parts, opacity * (id === desk.active ? 1 : 0.7));
        if (mode !== "cutout") this.outline(ctx, parts, id === desk.active);
      }
    }
    this.drawPrompt(ctx);
    if (this.aim) this.drawAim(ctx);
  }

  fill(ctx, parts, alpha) {
    ctx.globalAlpha = alpha;
    for (const { box, from, tile, painted, colour } of parts) {
      const to = place(this.view, this.ratio, box);
      ctx.fillStyle = colour;
      if (painted.bitmap) stamp(ctx, painted.bitmap, from, tile.level, box, to);
      else ctx.fillRect(to.left, to.top, to.width, to.height);
    }
    ctx.globalAlpha = 1;
  }

  // Everything but the objects disappears behind squares.
  cutOut(ctx, objects) {
    const whole = place(this.view, this.ratio, { x0: 0, y0: 0, x1: this.scene.grid.width, y1: this.scene.grid.height });
    ctx.globalAlpha = this.settings.opacity;
    ctx.fillStyle = this.settings.squares(ctx);
    ctx.fillRect(whole.left, whole.top, whole.width, whole.height);
    ctx.globalAlpha = 1;
    ctx.globalCompositeOperation = "destination-out";
    for (const { parts } of objects) this.fill(ctx, parts, 1);
    ctx.globalCompositeOperation = "source-over";
  }

  // A light line in the object's colour with a dark rim: seen on any picture.
  outline(ctx, parts, active) {
    const thick = (active ? 2 : 1.5) * this.ratio;
    const lines = [
      [thick + 2 * this.ratio, () => "rgba(0,0,0,.5)"],
      [thick, (colour) => colour],
    ];
    const sharp = this.view.at.scale * this.ratio >= SHARP;
    ctx.lineCap = sharp ? "square" : "round"; // where the lines of two tiles meet
    ctx.lineJoin = sharp ? "miter" : "bevel";
    ctx.globalAlpha = this.settings.mode === "outline" ? this.settings.opacity : 1;
    for (const [width, stroke] of lines) {
      for (const { box, from, tile, painted, colour } of parts) {
        if (!painted.outline) continue;
        const to = place(this.view, this.ratio, box);
        const size = 2 ** tile.level;
        const scale = to.width / ((box.x1 - box.x0) / size);
        const high = to.height / ((box.y1 - box.y0) / size);
        const left = to.left - ((box.x0 - from.x0) / size) * scale;
        const top = to.top - ((box.y0 - from.y0) / size) * high;
        ctx.save();
        if (from.x1 - from.x0 > box.x1 - box.x0 || from.y1 - from.y0 > box.y1 - box.y0) {
          ctx.beginPath(); // a coarser tile, of which a part is wanted
          ctx.rect(to.left, to.top, to.width, to.height);
          ctx.clip();
        }
        ctx.setTransform(scale, 0, 0, high, left, top);
        ctx.lineWidth = width / scale;
        ctx.strokeStyle = stroke(colour);
        ctx.stroke(sharp ? painted.outline.steps : painted.outline.lines);
        ctx.restore();
      }
    }
    ctx.globalAlpha = 1;
    const noise = parts.filter(({ painted }) => painted.dense);
    if (noise.length && this.settings.mode === "outline") this.fill(ctx, noise, 0.3);
  }

  drawPrompt(ctx) {
    ctx.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    const { desk } = this.scene;
    const { clicks, box } = desk.prompt();
    if (box) this.drawBox(ctx, box, desk.colour);
    if (this.band) this.drawBox(ctx, this.band, desk.colour);
    if (this.hover && this.view.at.scale >= 8) {
      const a = this.view.toScreen(this.hover.x, this.hover.y);
      ctx.lineWidth = 1.5;
      ctx.strokeStyle = "#fff";
      ctx.strokeRect(a.x, a.y, this.view.at.scale, this.view.at.scale);
    }
    for (const click of clicks) this.drawClick(ctx, click);
  }

  drawBox(ctx, { x0, y0, x1, y1 }, colour) {
    const a = this.view.toScreen(Math.min(x0, x1), Math.min(y0, y1));
    const b = this.view.toScreen(Math.max(x0, x1) + 1, Math.max(y0, y1) + 1);
    ctx.lineWidth = 3;
    ctx.strokeStyle = "rgba(0,0,0,.5)";
    ctx.setLineDash([]);
    ctx.strokeRect(a.x, a.y, b.x - a.x, b.y - a.y);
    ctx.lineWidth = 1.5;
    ctx.setLineDash([6, 4]);
    ctx.strokeStyle = colour;
    ctx.strokeRect(a.x, a.y, b.x - a.x, b.y - a.y);
    ctx.setLineDash([]);
  }

  // White with a plus, black with a minus: told apart without colours. One that waits for its answer has an open ring.
  drawClick(ctx, { x, y, positive, waits }) {
    const at = this.view.toScreen(x + 0.5, y + 0.5);
    ctx.beginPath();
    ctx.arc(at.x, at.y, MARK, 0, 2 * Math.PI);
    ctx.fillStyle = positive ? "#fff" : "#16181c";
    ctx.fill();
    ctx.lineWidth = 1.5;
    ctx.strokeStyle = positive ? "#16181c" : "#fff";
    ctx.stroke();
    ctx.beginPath();
    ctx.moveTo(at.x - 3.5, at.y);
    ctx.lineTo(at.x + 3.5, at.y);
    if (positive) {
      ctx.moveTo(at.x, at.y - 3.5);
      ctx.lineTo(at.x, at.y + 3.5);
    }
    ctx.stroke();
    if (!waits) return;
    ctx.beginPath();
    ctx.arc(at.x, at.y, MARK + 4, 0, 1.5 * Math.PI);
    ctx.strokeStyle = "#fff";
    ctx.stroke();
  }

  drawAim(ctx) {
    const { width, height } = this.view.screen;
    ctx.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    for (const [thick, colour] of [
      [3, "rgba(0,0,0,.55)"],
      [1, "#fff"],
    ]) {
      ctx.lineWidth = thick;
      ctx.strokeStyle = colour;
      ctx.beginPath();
      for (const [dx, dy] of [
        [1, 0],
        [-1, 0],
        [0, 1],
        [0, -1],
      ]) {
        ctx.moveTo(width / 2 + 4 * dx, height / 2 + 4 * dy);
        ctx.lineTo(width / 2 + 16 * dx, height / 2 + 16 * dy);
      }
      ctx.stroke();
    }
  }
}
