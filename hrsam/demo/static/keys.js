// The keys, in one table that the page obeys and the help shows.

const $ = (id) => document.getElementById(id);

// [group, what it does, keys as shown, test(event), name of the action]
const plain = (...keys) => (event) => keys.includes(event.key) && !event.ctrlKey && !event.metaKey && !event.altKey;
const letter = (key) => (event) => event.key.toLowerCase() === key && !event.shiftKey && plain(event.key)(event);
const command = (key, shift) => (event) =>
  event.key.toLowerCase() === key && (event.ctrlKey || event.metaKey) && event.shiftKey === shift && !event.altKey;

const TABLE = [
  ["Clicks", "A click adds", "A", letter("a"), "add"],
  ["Clicks", "A click takes away", "S", letter("s"), "take"],
  ["Clicks", "Draw a box", "B", letter("b"), "box"],
  ["Clicks", "Click under the cross", "Enter", null, null],
  ["Clicks", "Take away under the cross", "Shift Enter", null, null],
  ["Clicks", "Undo", "Ctrl Z", (e) => command("z", false)(e) || letter("z")(e), "undo"],
  ["Clicks", "Redo", "Ctrl Shift Z", (e) => command("z", true)(e) || command("y", false)(e) || letter("y")(e), "redo"],
  ["Clicks", "Clear the object", "C", letter("c"), "clear"],
  ["Clicks", "Refine the outline", "R", letter("r"), "refine"],
  ["Clicks", "Stop refining", "Esc", plain("Escape"), "stop"],
  ["Objects", "New object", "N", letter("n"), "new"],
  ["Objects", "Choose an object", "Q  W", (e) => letter("q")(e) || letter("w")(e), "choose"],
  ["Objects", "Start from a mask", "M", letter("m"), "given"],
  ["View", "Zoom", "+  −", plain("+", "=", "-", "_"), "zoom"],
  ["View", "Whole picture", "0", plain("0"), "fit"],
  ["View", "Pixel for pixel", "1", plain("1"), "pixels"],
  ["View", "The object", "F", letter("f"), "focus"],
  ["View", "Move", "Arrow keys", plain("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"), "move"],
  ["View", "Fill, outline, cut-out", "V", letter("v"), "mode"],
  ["View", "Hide masks while held", "H", letter("h"), "hide"],
  ["View", "Opacity", "[  ]", plain("[", "]"), "opacity"],
  ["View", "Brightness", ",  .", plain(",", "."), "brightness"],
  ["Page", "Open pictures", "O", letter("o"), "open"],
  ["Page", "Picture before, next", "Page Up  Page Down", plain("PageUp", "PageDown"), "picture"],
  ["Page", "Save the mask", "Ctrl S", command("s", false), "save"],
  ["Page", "Panel", "P", letter("p"), "fold"],
  ["Page", "Light or dark", "T", letter("t"), "theme"],
  ["Page", "This help", "?", plain("?"), "help"],
];
const HAND = [
  ["Mouse and touch", "Add", "Click  Tap"],
  ["Mouse and touch", "Take away", "Right click  Shift click  Long press"],
  ["Mouse and touch", "Box", "Ctrl drag"],
  ["Mouse and touch", "Move", "Drag"],
  ["Mouse and touch", "Zoom", "Wheel  Pinch"],
];

export function listenForKeys(act) {
  addEventListener("keydown", (event) => {
    const { target } = event;
    const typing = target.matches("input:not([type=range], [type=checkbox]), select");
    if (typing || document.querySelector("dialog[open]")) return;
    if (target.matches("input[type=range]") && event.key.startsWith("Arrow")) return;
    const row = TABLE.find(([, , , test]) => test?.(event));
    if (!row || (event.repeat && !["undo", "redo", "zoom", "move", "opacity", "brightness"].includes(row[4]))) return;
    event.preventDefault();
    act(row[4], event);
  });
  addEventListener("keyup", (event) => event.key.toLowerCase() === "h" && act("unhide", event));
}

export function showKeys() {
  if (!$("keys-list").children.length) {
    for (const group of new Set([...HAND, ...TABLE].map(([name]) => name))) {
      const section = document.createElement("section");
      const title = document.createElement("h3");
      title.textContent = group;
      section.append(title, ...[...HAND, ...TABLE].filter(([name]) => name === group).map(line));
      $("keys-list").append(section);
    }
    $("keys-close").onclick = () => $("keys").close();
  }
  $("keys").showModal();
}

function line([, what, keys]) {
  const row = document.createElement("p");
  const words = document.createElement("span");
  words.textContent = what;
  const caps = document.createElement("span");
  for (const key of keys.split("  ")) {
    const cap = document.createElement("kbd");
    cap.textContent = key;
    caps.append(cap, " ");
  }
  row.append(words, caps);
  return row;
}
