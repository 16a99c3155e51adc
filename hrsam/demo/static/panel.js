// The side panel: objects with names and colours, what can be saved, what picture this is.

import { icon } from "./notices.js";

const $ = (id) => document.getElementById(id);
const count = new Intl.NumberFormat("en");

export function button(name, label, act) {
  const made = document.createElement("button");
  made.className = "icon";
  made.setAttribute("aria-label", label);
  made.title = label;
  made.append(icon(name));
  made.onclick = (event) => {
    event.stopPropagation();
    act();
  };
  return made;
}

// One row an object, kept while the object is, so that typing and focus survive an answer.
const rows = new Map();

export function showObjects(desk, changed) {
  for (const [id, row] of rows) {
    if (desk?.objects.has(id) && row.desk === desk) continue;
    row.line.remove();
    rows.delete(id);
  }
  for (const object of desk?.objects.values() ?? []) {
    const row = rows.get(object.id) ?? newRow(desk, object.id, changed);
    fill(row, desk, object);
  }
  figures(desk);
}

function newRow(desk, id, changed) {
  const line = document.createElement("li");
  const colour = document.createElement("input");
  colour.type = "color";
  colour.onchange = () => desk.describe(id, { colour: colour.value });
  const name = document.createElement("input");
  name.type = "text";
  name.maxLength = 100;
  name.autocomplete = "off";
  name.spellcheck = false;
  name.onfocus = () => desk.choose(id);
  name.onchange = () => {
    const typed = name.value.trim();
    if (typed) desk.describe(id, { name: typed });
    else name.value = desk.objects.get(id).name;
  };
  name.onkeydown = ({ key }) => ["Enter", "Escape"].includes(key) && name.blur();
  const iou = document.createElement("span");
  iou.className = "iou";
  iou.title = "The model's own estimate of the overlap with the true mask";
  const eye = button("eye", "Hide", () => {
    if (!desk.hiddenObjects.delete(id)) desk.hiddenObjects.add(id);
    changed();
  });
  const remove = button("close", "Remove", () => desk.remove(id));
  line.append(colour, name, iou, eye, remove);
  line.onclick = (event) => event.target === colour || desk.choose(id);
  $("objects").append(line);
  const row = { desk, line, colour, name, iou, eye, remove };
  rows.set(id, row);
  return row;
}

function fill(row, desk, object) {
  const { line, colour, name, iou, eye, remove } = row;
  const active = object.id === desk.active;
  line.classList.toggle("active", active);
  if (active) line.setAttribute("aria-current", "true");
  else line.removeAttribute("aria-current");
  if (document.activeElement !== name) name.value = object.name;
  if (document.activeElement !== colour) colour.value = object.colour;
  name.setAttribute("aria-label", `Name of ${object.name}`);
  colour.setAttribute("aria-label", `Colour of ${object.name}`);
  iou.textContent = object.iou === null ? "" : object.iou.toFixed(2);
  const hidden = desk.hiddenObjects.has(object.id);
  eye.replaceChildren(icon(hidden ? "hidden" : "eye"));
  eye.setAttribute("aria-label", `${hidden ? "Show" : "Hide"} ${object.name}`);
  eye.title = hidden ? "Show" : "Hide";
  remove.setAttribute("aria-label", `Remove ${object.name}`);
  remove.hidden = desk.objects.size < 2;
}

function figures(desk) {
  const object = desk?.object;
  if (!object) return show("figures", []);
  const { clicks, box } = desk.prompt();
  const on = clicks.filter(({ positive }) => positive).length;
  const pairs = [];
  if (clicks.length) pairs.push(["Clicks", `${on} on, ${clicks.length - on} beside`]);
  if (box) pairs.push(["Box", `${box.x1 - box.x0} × ${box.y1 - box.y0}`]);
  if (object.area) pairs.push(["Area", `${count.format(object.area)} pixels`]);
  if (object.iou !== null) pairs.push(["Estimated IoU", object.iou.toFixed(3)]);
  show("figures", pairs);
}

export function showActions(desk) {
  const object = desk?.object;
  $("undo").disabled = !desk?.canUndo;
  $("redo").disabled = !desk?.canRedo;
  $("clear").disabled = !desk?.canUndo;
  $("refine").disabled = !desk?.canRefine || !desk.ready;
  $("given").disabled = !object || !desk.ready;
  $("new").disabled = !desk?.ready;
  const any = [...(desk?.objects.values() ?? [])].some(({ area }) => area > 0);
  $("save-mask").disabled = $("save-cutout").disabled = !object?.area;
  $("save-coco").disabled = ![...(desk?.objects.values() ?? [])].some(({ area }) => area > 0);
  $("save-log").disabled = !desk?.revision;
}

// A list of terms and what they are.
export function show(list, pairs) {
  const lines = pairs.flatMap(([term, text]) => {
    const dt = document.createElement("dt");
    const dd = document.createElement("dd");
    dt.textContent = term;
    dd.textContent = text;
    return [dt, dd];
  });
  $(list).replaceChildren(...lines);
}

export const size = ({ width, height }) => `${count.format(width)} × ${count.format(height)}`;
