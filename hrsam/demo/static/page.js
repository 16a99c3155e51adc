// The page: opens a picture, and wires what people do to what is shown and to the server.

import { Desk } from "./desk.js";
import { Gallery } from "./gallery.js";
import { listen } from "./gestures.js";
import { listenForKeys, showKeys } from "./keys.js";
import { ask } from "./link.js";
import { Masks } from "./masks.js";
import { icon, note, showNotes, speak, status, toast } from "./notices.js";
import { show, showActions, showObjects, size } from "./panel.js";
import { Readout } from "./readout.js";
import { save } from "./saving.js";
import { Settings } from "./settings.js";
import { Stage } from "./stage.js";
import { Tiles } from "./tiles.js";
import { Grid, View } from "./view.js";

const $ = (id) => document.getElementById(id);
const MODES = ["fill", "outline", "cutout"];
const STEP = 80; // CSS pixels an arrow key moves

const settings = new Settings();
const view = new View();
const stage = new Stage($("under"), $("over"), view, settings);
const readout = new Readout();
const masks = new Masks(() => stage.redraw("marks"), (...which) => readout.onScreen(...which), toast);
const gallery = new Gallery(openPicture, toast);
gallery.busy = status;
let about = null;
let picture = null;
let desk = null;
let tool = "add";
let clicked = sessionStorage.getItem("clicked") !== null;

// ---- pictures

async function openPicture({ id, name }) {
  $("empty").hidden = true;
  desk?.close();
  stage.scene?.tiles.close();
  stage.scene = desk = picture = null;
  stage.band = null;
  refresh();
  stage.redraw();
  try {
    const found = await ask(`/api/pictures/${id}`);
    if (gallery.list[gallery.at]?.id !== id) return; // another one was asked for meanwhile
    picture = found;
  } catch (error) {
    return toast(`${name}: ${error.message}`);
  }
  document.title = `${picture.name} – hrsam`;
  $("stage").setAttribute("aria-label", `Picture ${picture.name}, ${picture.width} by ${picture.height} pixels`);
  const grid = new Grid(picture);
  const address = ({ level, col, row }) => `/api/pictures/${id}/tiles/${level}/${col}/${row}`;
  const tiles = new Tiles(grid, address, () => stage.redraw());
  view.show(picture);
  await openDesk(grid, tiles);
}

async function openDesk(grid, tiles) {
  const mine = new Desk(picture);
  desk = mine;
  masks.reset(grid, (object, version, { level, col, row }) =>
    `/api/desks/${mine.id}/masks/${object}/${version}/${level}/${col}/${row}`,
  );
  stage.scene = { grid, tiles, masks, desk };
  listenToDesk(mine);
  stage.redraw();
  try {
    await mine.open();
  } catch (error) {
    if (desk === mine) toast(error.message);
  }
  if (desk !== mine) mine.close();
  refresh();
}

function listenToDesk(mine) {
  const on = (type, hear) => mine.addEventListener(type, ({ detail }) => desk === mine && hear(detail));
  on("changed", refresh);
  on("mask", ({ place, code }) => masks.accept(place, code, mine.objects.get(place.object).colour));
  on("removed", ({ object }) => masks.forget(object));
  const patiently = slow() ? " on the CPU; this takes some seconds" : "";
  const reading = () => mine.encoded || status(`The model reads the picture${patiently}`);
  on("encoding", reading);
  on("online", () => {
    status(null);
    setTimeout(() => desk === mine && mine.ready && reading(), 200);
  });
  on("encoded", ({ ms }) => {
    readout.encoded(ms);
    speak("Ready");
  });
  on("answered", (answer) => readout.answered(answer));
  on("refused", ({ kind, text }) => kind !== "superseded" && toast(text));
  on("offline", () => {
    status("Not connected; trying again");
    refresh();
  });
  on("gone", () => {
    mine.forget();
    toast("The server does not know this work any more; starting anew.");
    openDesk(stage.scene.grid, stage.scene.tiles);
  });
  on("replaced", () => {
    mine.forget();
    toast("The file of this picture has changed; it is opened again.");
    openPicture(gallery.list[gallery.at]);
  });
  on("lost", () => toast("The connection broke during the last clicks; some of them may be missing."));
}

// ---- what is shown

let patience = 0;

function refresh() {
  clearTimeout(patience);
  if (desk?.ready && desk.encoded) {
    const { regions } = desk.refining ?? {};
    if (regions) status(`Refining, ${regions.done} of ${regions.of}`, true);
    else if (desk.waiting.length) patience = setTimeout(status, 800, "The model is at work");
    else status(null);
  }
  if (desk) stage.redraw("marks");
  showObjects(desk, refresh);
  showActions(desk);
  $("stage").classList.toggle("vacant", !picture);
  $("hint").hidden = clicked || !desk?.ready || !desk.object || desk.object.rounds > 0 || desk.pending().length > 0;
  showDevice();
  if (picture) {
    show("facts", [
      ["Name", picture.name],
      ["Size", size(picture)],
      ...picture.notes.map((text) => ["Read as", text]),
      ...(about ? [["Model", about.model], ["Model side", `${about.side} pixels`]] : []),
    ]);
  }
  // for tests and scripts
  Object.assign($("stage").dataset, {
    ready: Boolean(desk?.ready && desk.encoded),
    revision: desk?.revision ?? -1,
    waiting: desk?.waiting.length ?? 0,
    desk: desk?.id ?? "",
  });
}

const slow = () => about?.device === "cpu";

function showDevice() {
  const online = !desk || desk.ready;
  $("device").className = online ? (slow() ? "slow" : "") : "off";
  $("device").textContent = online ? (about ? (slow() ? "on CPU" : "on GPU") : "") : "offline";
  $("device").title = about ? `${about.model} on ${about.device}` : "";
}

stage.before = () => ($("stage").dataset.drawn = false);
stage.after = () => {
  const scale = view.at.scale * 100;
  $("zoom-value").textContent = `${scale < 9.95 ? scale.toFixed(1) : Math.round(scale)}%`;
  const { scale: s, x, y } = view.at;
  const { tiles, desk: mine } = stage.scene ?? {};
  if (tiles?.complete && !mine.told) requestAnimationFrame(() => mine.show()); // this frame is on the screen then
  const drawn = tiles ? tiles.complete && masks.complete && !view.goal : false;
  Object.assign($("stage").dataset, { scale: s, x, y, drawn });
};

function applySettings() {
  $("opacity").value = Math.round(settings.opacity * 100);
  $("opacity-value").textContent = `${$("opacity").value}%`;
  $("brightness").value = Math.round(settings.brightness * 100);
  $("brightness-value").textContent = `${$("brightness").value}%`;
  $("under").style.filter = settings.brightness === 1 ? "" : `brightness(${settings.brightness})`;
  for (const one of document.querySelectorAll("[data-mode]")) one.ariaPressed = String(one.dataset.mode === settings.mode);
  $("theme").replaceChildren(icon(settings.dark ? "sun" : "moon"));
  document.body.classList.toggle("folded", settings.folded);
  $("fold").ariaExpanded = String(!settings.folded);
  stage.redraw();
}

function resize() {
  const { clientWidth, clientHeight } = $("stage");
  const sheet = innerWidth <= 720; // the panel lies below, not beside
  const { offsetWidth, offsetHeight } = $("panel"); // 0 when it is folded
  const right = sheet || !offsetWidth ? 0 : offsetWidth + 12;
  view.resize(clientWidth, clientHeight, { top: 0, right, bottom: sheet ? Math.max(44, offsetHeight) : 44, left: 0 });
  stage.resize();
}

function choose(name) {
  tool = name;
  for (const one of document.querySelectorAll("[data-tool]")) one.ariaPressed = String(one.dataset.tool === name);
}

// ---- what people do

const says = {
  ready: () => Boolean(desk),
  tool: () => tool,
  click(pixel, positive) {
    if (!clicked) showNotes(false);
    clicked = true;
    sessionStorage.setItem("clicked", "1");
    desk.click(pixel, positive);
  },
  box(box) {
    desk.box(box);
    choose("add");
  },
  band(box) {
    stage.band = box;
    stage.redraw("marks");
  },
  hover(pixel) {
    stage.hover = pixel;
    $("cursor").textContent = pixel ? `${pixel.x}, ${pixel.y}` : "";
    if (view.at.scale >= 8) stage.redraw("marks");
  },
  moved: () => stage.redraw(),
};
listen($("stage"), view, says);

function move(change) {
  change();
  stage.redraw();
}

const middle = () => [view.screen.width / 2, view.screen.height / 2];
const zoom = (factor) => move(() => view.zoomAt(factor, ...middle()));
const pixels = () => zoom(1 / stage.ratio / (view.goal ?? view.at).scale);

function aimed(positive) {
  const at = view.pixel(...middle());
  if (at && desk) says.click(at, positive);
}

function nextObject(by) {
  const ids = [...(desk?.objects.keys() ?? [])];
  desk?.choose(ids[(ids.indexOf(desk.active) + by + ids.length) % ids.length]);
}

function focusObject() {
  const box = desk?.object?.bbox;
  if (box) move(() => view.showBox({ x0: box[0], y0: box[1], x1: box[2], y1: box[3] }));
}

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

const acts = {
  add: () => choose("add"),
  take: () => choose("remove"),
  box: () => choose("box"),
  undo: () => desk?.act("undo"),
  redo: () => desk?.act("redo"),
  clear: () => desk?.act("clear"),
  refine: () => desk?.act("refine"),
  stop: () => desk?.stop(),
  new: () => desk?.ready && desk.add(),
  choose: ({ key }) => nextObject(key.toLowerCase() === "q" ? -1 : 1),
  given: () => !$("given").disabled && $("mask-file").click(),
  zoom: ({ key }) => zoom("+=".includes(key) ? 1.5 : 1 / 1.5),
  fit: () => move(() => view.fit()),
  pixels,
  focus: focusObject,
  move({ key }) {
    const [dx, dy] = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[key];
    move(() => view.panBy(dx * STEP, dy * STEP, true));
  },
  mode: () => settings.set({ mode: MODES[(MODES.indexOf(settings.mode) + 1) % MODES.length] }),
  hide: () => settings.hide(true),
  unhide: () => settings.hide(false),
  opacity({ key }) {
    settings.opacity = clamp(settings.opacity + (key === "]" ? 0.1 : -0.1), 0, 1);
  },
  brightness: ({ key }) => settings.set({ brightness: clamp(settings.brightness + (key === "." ? 0.2 : -0.2), 0.4, 3) }),
  open: () => $("files").click(),
  picture: ({ key }) => gallery.go(gallery.at + (key === "PageUp" ? -1 : 1)),
  save: () => $("save-mask").click(),
  fold() {
    settings.set({ folded: !settings.folded });
    resize();
  },
  theme: () => settings.set({ theme: settings.dark ? "light" : "dark" }),
  help: showKeys,
};
listenForKeys((name, event) => acts[name](event));
for (const name of ["undo", "redo", "clear", "refine", "stop", "new", "fold", "theme", "help", "given", "fit"]) {
  $(name).onclick = acts[name];
}
for (const one of document.querySelectorAll("[data-tool]")) one.onclick = () => choose(one.dataset.tool);
for (const one of document.querySelectorAll("[data-mode]")) one.onclick = () => settings.set({ mode: one.dataset.mode });
for (const [id, name] of [
  ["save-mask", "mask.png"],
  ["save-cutout", "cutout.png"],
  ["save-coco", "coco.json"],
  ["save-log", "log.json"],
]) {
  $(id).onclick = () => save(desk, name).then(toast, (error) => toast(error.message));
}
$("device").onclick = () => showNotes($("notes").hidden);
$("zoom-in").onclick = () => zoom(1.5);
$("zoom-out").onclick = () => zoom(1 / 1.5);
$("zoom-value").onclick = pixels;
$("opacity").oninput = ({ target }) => (settings.opacity = target.value / 100);
$("brightness").oninput = ({ target }) => settings.set({ brightness: target.value / 100 });
$("stage").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  aimed(!event.shiftKey);
});
// The cross shows to those who aim with keys.
function aim(on) {
  stage.aim = on;
  $("stage").classList.toggle("aiming", on);
  stage.redraw("marks");
}
$("stage").addEventListener("keyup", ({ key }) => (key === "Tab" || key === "Enter" || key.startsWith("Arrow")) && aim(true));
for (const type of ["blur", "pointerdown"]) $("stage").addEventListener(type, () => stage.aim && aim(false));
$("mask-file").onchange = async ({ target }) => {
  const [file] = target.files;
  if (file && desk) {
    try {
      status(`Reading ${file.name}`);
      const path = `/api/desks/${desk.id}/given?object=${desk.active}`;
      await ask(path, { method: "POST", headers: { "Content-Type": "image/png" }, body: file });
    } catch (error) {
      toast(`${file.name}: ${error.message}`);
    } finally {
      status(null);
    }
  }
  target.value = "";
};

settings.addEventListener("changed", applySettings);
for (const one of ["stage", "panel"]) new ResizeObserver(resize).observe($(one));

async function learn() {
  about = await ask("/api/about");
  gallery.limit = about.limits.upload_bytes;
  note(about.notes);
  showNotes(!clicked);
  refresh();
}

async function begin() {
  applySettings();
  resize();
  choose("add");
  refresh();
  try {
    const [count] = await Promise.all([gallery.load(), learn()]);
    if (!count) $("empty").hidden = false;
  } catch (error) {
    note([error.message]);
  }
}

begin();
