// The work on one picture as the page knows it: what the server said, and commands that wait for their answer.

import { Live, post } from "./link.js";

const MANY = 7; // commands sent and not answered; the rest wait here

// Events: changed, answered {object, ms, transfer}, refused {kind, text}, mask {place, code}, encoding, encoded {ms},
// online, offline, gone, lost {count}.
export class Desk extends EventTarget {
  constructor(picture) {
    super();
    this.picture = picture;
    this.objects = new Map();
    this.active = 1;
    this.revision = 0;
    this.waiting = []; // {seq, command, sent}
    this.seq = 0;
    this.encoded = false;
    this.ready = false; // the state came and the connection stands
    this.shown = false; // the picture is on the screen, and
    this.told = false; // the server knows it: it may use the cores for the encode
    this.hiddenObjects = new Set();
  }

  async open() {
    const key = `desk:${this.picture.id}`;
    this.id = sessionStorage.getItem(key);
    if (!this.id) {
      this.id = (await post("/api/desks", { picture: this.picture.id })).desk;
      sessionStorage.setItem(key, this.id);
    }
    this.live = new Live(this.id, (header, payload) => this.hear(header, payload), (how) => this.connection(how));
  }

  close() {
    this.live?.close();
  }

  forget() {
    sessionStorage.removeItem(`desk:${this.picture.id}`);
    this.close();
  }

  say(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  connection(how) {
    if (how !== "online") this.ready = this.encoded = this.told = false; // another process may answer next
    this.say(how);
  }

  show() {
    this.shown = true;
    if (this.ready && !this.told) this.told = this.live.send({ event: "shown" });
  }

  // The command shows at once and is sent as soon as the connection takes it.
  command(command) {
    this.waiting.push({ seq: ++this.seq, command, sent: 0 });
    this.flush();
    this.say("changed");
  }

  flush() {
    if (!this.ready) return;
    for (const one of this.waiting.slice(0, MANY)) {
      if (one.sent) continue;
      const { seq, command } = one;
      if (!this.live.send({ seq, revision: this.revision, command })) return;
      one.sent = performance.now();
    }
  }

  hear(header, payload) {
    if (header.state) return this.begin(header.state);
    if (header.event === "encoding") return this.say("encoding");
    if (header.event === "refining") return this.progress(header);
    if (header.event === "encoded") {
      this.encoded = true;
      this.say("encoded", { ms: header.ms });
      return this.say("changed");
    }
    const at = this.waiting.findIndex(({ seq }) => seq === header.seq);
    const [done] = at >= 0 ? this.waiting.splice(at, 1) : [];
    if (header.error) {
      this.say("refused", { ...header.error, command: done?.command });
    } else {
      this.learn(header, payload, done);
    }
    this.flush();
    this.say("changed");
  }

  progress({ command: seq, done, of }) {
    const one = this.waiting.find((each) => each.seq === seq);
    if (one) one.regions = { done, of };
    if (one) this.say("changed");
  }

  learn({ revision, object, removed, mask, ms }, payload, done) {
    if (revision < this.revision) return; // older than what is known
    this.revision = revision;
    if (removed !== undefined) {
      this.objects.delete(removed);
      this.say("removed", { object: removed });
      if (this.active === removed) this.active = [...this.objects.keys()].at(-1);
    }
    if (object) this.objects.set(object.id, object);
    if (object && done?.command.do === "add") this.active = object.id;
    if (mask) this.say("mask", { place: mask, code: payload });
    if (!done) return;
    const spent = ms ? ms.queue + ms.encode + ms.decode + ms.mask : 0;
    const trip = performance.now() - done.sent;
    this.say("answered", { command: done.command, object, ms, sent: done.sent, transfer: Math.max(0, trip - spent) });
  }

  // The connection stands (again). Commands on their way when it broke either all arrived or none, else nobody knows which.
  begin({ revision, objects }) {
    const flying = this.waiting.filter(({ sent }) => sent);
    const applied = revision - this.revision;
    if (flying.length && applied !== 0) {
      this.waiting = this.waiting.filter(({ sent }) => !sent);
      if (applied !== flying.length) this.say("lost", { count: flying.length - applied });
    }
    for (const one of this.waiting) one.sent = 0;
    this.revision = revision;
    const ids = new Set(objects.map(({ id }) => id));
    for (const id of this.objects.keys()) if (!ids.has(id)) this.say("removed", { object: id });
    this.objects = new Map(objects.map((object) => [object.id, object]));
    if (!ids.has(this.active)) this.active = objects.at(-1)?.id;
    for (const { id, bbox, version } of objects) {
      if (!bbox) this.say("mask", { place: { object: id, version, width: 0 } });
    }
    this.ready = true;
    if (this.shown) this.show();
    this.flush();
    this.say("changed");
  }

  // From here on: the active object, as it looks with what waits.

  get object() {
    return this.objects.get(this.active);
  }

  get colour() {
    return this.object?.colour ?? "#ffffff";
  }

  // What is drawn, small objects above large ones.
  drawn() {
    return [...this.objects.values()].filter(({ id }) => !this.hiddenObjects.has(id)).sort((a, b) => b.area - a.area);
  }

  pending(id = this.active) {
    return this.waiting.filter(({ command }) => command.object === id);
  }

  prompt() {
    const object = this.object;
    let clicks = (object?.clicks ?? []).map(([x, y, positive]) => ({ x, y, positive, waits: false }));
    let box = object?.box ? { x0: object.box[0], y0: object.box[1], x1: object.box[2], y1: object.box[3] } : null;
    let before = null;
    for (const { command } of this.pending()) {
      if (command.do === "undo" && before === "refine") continue; // takes back that, and no click
      before = command.do;
      if (command.do === "click") clicks.push({ ...command, waits: true });
      else if (command.do === "box") box = command;
      else if (command.do === "undo") clicks = clicks.slice(0, -1);
      else if (command.do === "clear") [clicks, box] = [[], null];
    }
    return { clicks, box };
  }

  get canUndo() {
    return Boolean(this.object?.can_undo) || this.pending().some(({ command }) => ["click", "box", "refine"].includes(command.do));
  }

  get canRedo() {
    return Boolean(this.object?.can_redo) && this.pending().every(({ command }) => ["undo", "redo"].includes(command.do));
  }

  get canRefine() {
    return Boolean(this.object?.area) && !this.pending().some(({ command }) => command.do === "refine");
  }

  // The refine that waits or is being done, of whatever object.
  get refining() {
    const at = this.waiting.findLastIndex(({ command }) => command.do === "refine");
    const stopped = this.waiting.slice(at + 1).some(({ command }) => command.object === this.waiting[at]?.command.object);
    return at >= 0 && !stopped ? this.waiting[at] : null;
  }

  stop() {
    if (this.refining) this.command({ do: "undo", object: this.refining.command.object });
  }

  click({ x, y }, positive) {
    if (this.object) this.command({ do: "click", object: this.active, x, y, positive });
  }

  box({ x0, y0, x1, y1 }) {
    if (this.object) this.command({ do: "box", object: this.active, x0, y0, x1, y1 });
  }

  act(name) {
    const may = { undo: this.canUndo, redo: this.canRedo, clear: this.canUndo, refine: this.canRefine };
    if (may[name]) this.command({ do: name, object: this.active });
  }

  add() {
    this.command({ do: "add" });
  }

  describe(id, change) {
    this.command({ do: "describe", object: id, ...change });
  }

  remove(id) {
    this.command({ do: "remove", object: id });
  }

  choose(id) {
    if (!this.objects.has(id) || id === this.active) return;
    this.active = id;
    this.say("changed");
  }
}
