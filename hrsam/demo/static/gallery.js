// The pictures: those of the opened folder and those dropped or picked here.

import { ask } from "./link.js";

const $ = (id) => document.getElementById(id);

export class Gallery {
  // open(picture) shows one; tell(text) says what went wrong.
  constructor(open, tell) {
    Object.assign(this, { open, tell });
    this.list = [];
    this.at = -1;
    $("pictures").onchange = ({ target }) => this.go(target.selectedIndex);
    $("before").onclick = () => this.go(this.at - 1);
    $("after").onclick = () => this.go(this.at + 1);
    $("open").onclick = $("open-first").onclick = () => $("files").click();
    $("files").onchange = async ({ target }) => {
      await this.take([...target.files]);
      target.value = "";
    };
    this.listenForDrops();
  }

  async load() {
    this.list = await ask("/api/pictures");
    this.show();
    const last = sessionStorage.getItem("picture");
    const at = this.list.findIndex(({ id }) => id === last);
    if (this.list.length) this.go(Math.max(0, at));
    return this.list.length;
  }

  go(at) {
    if (at < 0 || at >= this.list.length || at === this.at) return;
    this.at = at;
    sessionStorage.setItem("picture", this.list[at].id);
    this.show();
    this.open(this.list[at]);
  }

  show() {
    const options = this.list.map(({ name }, i) => new Option(`${i + 1}/${this.list.length}  ${name}`, i));
    $("pictures").replaceChildren(...options);
    $("pictures").selectedIndex = this.at;
    $("pictures").parentElement.hidden = this.list.length === 0;
    $("before").disabled = this.at <= 0;
    $("after").disabled = this.at >= this.list.length - 1;
  }

  async take(files) {
    const limit = this.limit ?? Infinity;
    let first = null;
    for (const file of files) {
      if (file.size > limit) {
        this.tell(`${file.name} has ${Math.round(file.size / 1e6)} MB; at most ${Math.round(limit / 1e6)} can be opened here.`);
        continue;
      }
      try {
        this.busy(`Opening ${file.name}`);
        const added = await ask(`/api/pictures?name=${encodeURIComponent(file.name)}`, {
          method: "POST",
          headers: { "Content-Type": "application/octet-stream" },
          body: file,
        });
        const known = this.list.findIndex(({ id }) => id === added.id);
        if (known < 0) this.list.push(added);
        first ??= known < 0 ? this.list.length - 1 : known;
      } catch (error) {
        this.tell(`${file.name}: ${error.message}`);
      } finally {
        this.busy(null);
      }
    }
    this.show();
    if (first !== null) this.go(first);
  }

  busy() {}

  listenForDrops() {
    const files = (event) => [...event.dataTransfer.types].includes("Files");
    let inside = 0;
    const over = (by) => (event) => {
      if (!files(event)) return;
      event.preventDefault();
      inside = Math.max(0, inside + by);
      $("drop").hidden = inside === 0;
    };
    addEventListener("dragenter", over(1));
    addEventListener("dragleave", over(-1));
    addEventListener("dragover", over(0));
    addEventListener("drop", (event) => {
      if (!files(event)) return;
      event.preventDefault();
      inside = 0;
      $("drop").hidden = true;
      this.take([...event.dataTransfer.files]);
    });
  }
}
