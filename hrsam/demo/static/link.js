// The way to the server: requests, and one WebSocket that comes back by itself.
// An answer is a little-endian length, a JSON header of that length, and a payload (the mask) that may be empty.

const FIRST_WAIT = 250; // ms before the connection is tried again, doubled up to
const LAST_WAIT = 2000;
// Close codes after which coming back is of no use: no such desk, another picture under its name.
const ENDS = { 4404: "gone", 4409: "replaced" };

export class Refused extends Error {
  constructor(text, status = 0) {
    super(text);
    this.status = status; // 0: no answer at all
  }
}

export async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, { credentials: "same-origin", ...options });
  } catch {
    throw new Refused("the server does not answer");
  }
  if (answer.ok) return answer.json();
  const said = await answer.json().catch(() => ({}));
  throw new Refused(said.error?.text ?? `the server refused (${answer.status})`, answer.status);
}

export const post = (path, value) =>
  ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(value) });

export class Live {
  // hears(header, payload) for every message; changed("online" | "offline" | "gone" | "replaced")
  constructor(desk, hears, changed) {
    Object.assign(this, { desk, hears, changed });
    this.wait = FIRST_WAIT;
    this.closed = false;
    this.soon = () => this.timer && this.connect();
    addEventListener("online", this.soon);
    document.addEventListener("visibilitychange", this.soon);
    this.connect();
  }

  connect() {
    clearTimeout(this.timer);
    this.timer = null;
    const secure = location.protocol === "https:" ? "wss" : "ws";
    const socket = new WebSocket(`${secure}://${location.host}/api/desks/${this.desk}/live?shows=1`);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onmessage = ({ data }) => {
      const length = new DataView(data).getUint32(0, true);
      const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
      if (header.state) {
        this.wait = FIRST_WAIT;
        this.changed("online");
      }
      this.hears(header, data.slice(4 + length));
    };
    socket.onclose = ({ code }) => {
      if (this.closed || this.socket !== socket) return;
      if (ENDS[code]) return this.changed(ENDS[code]);
      this.changed("offline");
      this.timer = setTimeout(() => this.connect(), this.wait);
      this.wait = Math.min(LAST_WAIT, this.wait * 2);
    };
  }

  send(message) {
    if (this.socket.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(message));
    return true;
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
    removeEventListener("online", this.soon);
    document.removeEventListener("visibilitychange", this.soon);
    const { socket } = this;
    // to close it before it is open is an error to browsers
    if (socket.readyState === WebSocket.CONNECTING) socket.onopen = () => socket.close();
    else socket.close();
  }
}
