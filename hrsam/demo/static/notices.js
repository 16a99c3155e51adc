// What the page says: short-lived messages, lasting notes, what is going on.

const $ = (id) => document.getElementById(id);
const SHOWN = 3500; // ms a message stays, and
const A_LETTER = 50; // ms more for each of its letters

export function toast(text) {
  const last = [...$("toasts").children].at(-1);
  if (last?.textContent === text) last.remove();
  const line = document.createElement("div");
  line.className = "toast";
  line.textContent = text;
  $("toasts").append(line);
  while ($("toasts").children.length > 3) $("toasts").firstChild.remove();
  setTimeout(() => line.remove(), SHOWN + A_LETTER * text.length);
}

// For those who listen: not shown.
export function speak(text) {
  $("spoken").textContent = text;
}

// What to know before judging masks. It makes way for the first click and comes back with a click on the device's name.
export function note(texts) {
  if (!texts.length) return;
  const box = document.createElement("div");
  box.className = "note";
  box.setAttribute("role", "note");
  const words = document.createElement("div");
  for (const text of texts) {
    const line = document.createElement("p");
    line.textContent = text;
    words.append(line);
  }
  const close = document.createElement("button");
  close.className = "icon";
  close.setAttribute("aria-label", "Dismiss");
  close.append(icon("close"));
  close.onclick = () => showNotes(false);
  box.append(words, close);
  $("notes").append(box);
}

export function showNotes(shown) {
  $("notes").hidden = !shown;
  $("device").ariaExpanded = String(shown);
}

// `stoppable`: with a button that ends what is going on.
export function status(text, stoppable = false) {
  const same = !$("status").hidden && $("status-text").textContent === text;
  $("status").hidden = !text;
  $("stop").hidden = !stoppable;
  if (!text || same) return;
  $("status-text").textContent = text;
  speak(text);
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}
