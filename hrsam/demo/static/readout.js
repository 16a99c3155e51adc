// The figures at the bottom: what the last answer took, part by part, and from the click to the mask on the screen.

import { speak } from "./notices.js";

const $ = (id) => document.getElementById(id);

export class Readout {
  constructor() {
    this.encode = null; // ms; 0 when the picture's embedding was at hand
    this.arriving = null; // the answer whose mask is not on the screen yet
  }

  encoded(ms) {
    this.encode = ms;
    show([["encode", ms]]);
  }

  answered({ command, object, ms, sent, transfer }) {
    if (!ms) return;
    if (ms.encode) this.encode = ms.encode;
    this.arriving = { object: object?.id, version: object?.version, sent, ms, transfer };
    if (object) {
      const words = object.iou === null ? "" : `, estimated IoU ${object.iou.toFixed(2)}`;
      speak(`${object.name}: ${command.do}, ${object.clicks.length} clicks${words}`);
    }
    if (!object?.area) this.tell();
  }

  // A mask is in the next frame.
  onScreen(object, version) {
    const { arriving } = this;
    if (arriving?.object !== object || arriving.version !== version) return;
    requestAnimationFrame(() => this.tell(performance.now() - arriving.sent));
  }

  tell(total) {
    if (!this.arriving) return;
    const { ms, transfer } = this.arriving;
    const pairs = [
      ["decode", ms.decode + ms.mask],
      ["transfer", transfer],
    ];
    if (this.encode !== null) pairs.unshift(["encode", this.encode]);
    if (ms.queue >= 1) pairs.push(["queue", ms.queue]);
    if (total) pairs.push(["on screen", total]);
    show(pairs);
    $("times").dataset.total = total ?? "";
    this.arriving = null;
  }
}

function time(ms) {
  if (ms === 0) return "cached";
  if (ms < 9.95) return `${ms.toFixed(1)} ms`;
  return ms < 9995 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

function show(pairs) {
  const parts = pairs.map(([name, ms]) => {
    const part = document.createElement("span");
    part.dataset.name = name;
    const value = document.createElement("b");
    value.textContent = time(ms);
    part.append(`${name} `, value);
    return part;
  });
  $("times").replaceChildren(...parts);
}
