// Mouse, touch and pen on the picture, as the few things they can mean: click, box, pan, zoom.
// Left or a tap adds, right, Shift or a long press takes away; a drag pans, with the box tool, Ctrl or Alt it draws a box.

const STILL = 5; // CSS pixels a pointer may tremble within a click
const LONG = 450; // ms of a long press
const WHEEL = 0.0016; // how much a wheel's unit zooms, as an exponent

export function listen(stage, view, says) {
  const down = new Map(); // pointerId -> {x, y}
  let act = null; // {kind, start, button, shift, since}
  let pinch = null;
  let space = false;

  const at = (event) => {
    const { left, top } = stage.getBoundingClientRect();
    return { x: event.clientX - left, y: event.clientY - top };
  };
  const spread = () => {
    const [a, b] = [...down.values()];
    return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, wide: Math.max(10, Math.hypot(a.x - b.x, a.y - b.y)) };
  };

  stage.addEventListener("pointerdown", (event) => {
    if (!says.ready() || event.target.closest("button, a, input")) return;
    const start = at(event);
    down.set(event.pointerId, start);
    stage.setPointerCapture(event.pointerId);
    if (down.size === 2) {
      act = null;
      says.band(null);
      pinch = spread();
      return;
    }
    if (down.size > 2) return;
    const boxing = event.button === 0 && !space && (says.tool() === "box" || event.ctrlKey || event.altKey);
    act = {
      kind: event.button === 1 || (event.button === 0 && space) ? "pan" : boxing ? "box" : "click",
      start,
      last: start,
      away: event.button === 2,
      shift: event.shiftKey,
      touch: event.pointerType === "touch",
      since: performance.now(),
    };
  });

  stage.addEventListener("pointermove", (event) => {
    const now = at(event);
    if (event.pointerType !== "touch") says.hover(view.pixel(now.x, now.y));
    if (!down.has(event.pointerId)) return;
    down.set(event.pointerId, now);
    if (pinch && down.size === 2) {
      const next = spread();
      view.zoomAt(next.wide / pinch.wide, pinch.x, pinch.y, false);
      view.panBy(next.x - pinch.x, next.y - pinch.y);
      pinch = next;
      says.moved();
      return;
    }
    if (!act) return;
    if (act.kind === "click" && Math.hypot(now.x - act.start.x, now.y - act.start.y) > STILL) act.kind = "pan";
    if (act.kind === "pan") {
      stage.classList.add("panning");
      view.panBy(now.x - act.last.x, now.y - act.last.y);
      act.last = now;
      says.moved();
    }
    if (act.kind === "box") says.band(box(act.start, now));
  });

  const up = (event) => {
    if (!down.delete(event.pointerId)) return;
    stage.classList.remove("panning");
    if (pinch) {
      if (down.size === 0) pinch = null;
      return;
    }
    const done = act;
    act = null;
    if (!done || event.type === "pointercancel") return says.band(null);
    const now = at(event);
    if (done.kind === "box") {
      says.band(null);
      const drawn = box(done.start, now);
      if (Math.hypot(now.x - done.start.x, now.y - done.start.y) > STILL && drawn) says.box(drawn);
    }
    if (done.kind === "click") {
      const pixel = view.pixel(done.start.x, done.start.y);
      const long = done.touch && performance.now() - done.since > LONG;
      const away = done.away || long || (says.tool() === "remove") !== done.shift;
      if (pixel) says.click(pixel, !away);
    }
  };
  stage.addEventListener("pointerup", up);
  stage.addEventListener("pointercancel", up);
  stage.addEventListener("pointerleave", () => says.hover(null));
  stage.addEventListener("contextmenu", (event) => event.preventDefault());
  stage.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      if (!says.ready()) return;
      const { x, y } = at(event);
      const unit = event.deltaMode === 1 ? 18 : event.deltaMode === 2 ? 300 : 1;
      if (event.shiftKey) view.panBy(-(event.deltaX + event.deltaY) * unit, 0, true);
      else view.zoomAt(Math.exp(-event.deltaY * unit * WHEEL * (event.ctrlKey ? 6 : 1)), x, y);
      says.moved();
    },
    { passive: false },
  );
  addEventListener("keydown", (event) => {
    if (event.code === "Space" && document.activeElement === stage) space = true;
  });
  addEventListener("keyup", (event) => {
    if (event.code === "Space") space = false;
  });
  addEventListener("blur", () => (space = false));

  // The pixels from corner to corner, cut to the picture; null when it lies beside it.
  function box(a, b) {
    const { width, height } = view.picture;
    const from = view.toPicture(Math.min(a.x, b.x), Math.min(a.y, b.y));
    const to = view.toPicture(Math.max(a.x, b.x), Math.max(a.y, b.y));
    const x0 = Math.max(0, Math.floor(from.x));
    const y0 = Math.max(0, Math.floor(from.y));
    const x1 = Math.min(width - 1, Math.floor(to.x));
    const y1 = Math.min(height - 1, Math.floor(to.y));
    return x0 < x1 && y0 < y1 ? { x0, y0, x1, y1 } : null;
  }
}
