// Files to keep. They are fetched here, so that a refusal is a sentence and not a broken file, and what cleaning up changed
// is told.

import { Refused } from "./link.js";

const $ = (id) => document.getElementById(id);
const count = new Intl.NumberFormat("en");
const NUMBERS = { fill: "fill-below", drop: "drop-below", tolerance: "tolerance" };

// Query of an address; what is as the server has it anyway is left out.
function options(name, object) {
  const query = new URLSearchParams();
  if (name.endsWith(".png")) query.set("object", object);
  if (name !== "log.json") {
    for (const [key, id] of Object.entries(NUMBERS)) {
      const value = Math.max(0, Number($(id).value) || 0);
      if (!value || (key === "tolerance" && name !== "coco.json")) continue;
      query.set(key, key === "tolerance" ? value : Math.round(value));
    }
  }
  if (name === "coco.json" && $("polygons").checked) query.set("polygons", "true");
  if (name === "cutout.png" && $("whole").checked) query.set("whole", "true");
  return query;
}

// -> what to tell
export async function save(desk, name) {
  const answer = await fetch(`/api/desks/${desk.id}/export/${name}?${options(name, desk.active)}`);
  if (!answer.ok) {
    const said = await answer.json().catch(() => ({}));
    throw new Refused(said.error?.text ?? `the server refused (${answer.status})`, answer.status);
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = fileName(desk, name);
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  const change = Number(answer.headers.get("X-Area-Change"));
  const told = change ? `; cleaning up ${change > 0 ? "added" : "took"} ${count.format(Math.abs(change))} pixels` : "";
  return `Saved ${link.download}${told}`;
}

// "cup.jpg", object "spoon", mask.png -> "cup spoon mask.png", of characters that every system takes
function fileName(desk, name) {
  const picture = desk.picture.name.replace(/\.[^.]*$/, "");
  const object = name.endsWith(".png") && desk.objects.size > 1 ? ` ${desk.object.name}` : "";
  return `${picture}${object} ${name}`.replace(/[^\p{L}\p{N} ._()-]+/gu, "_").replace(/^[ .]+/, "");
}
