// SPDX-License-Identifier: GPL-2.0-or-later
"use strict";

// Verdicts as rows of cells on one canvas, the newest run at the right. The cursor is moved by the
// arrow keys, the mouse or a finger; the line at the bottom describes its cell.
class Grid {
  static ROW = 18;
  static GAP = 6;
  static HINT = "Point at a cell, or move with the arrow keys.";
  // Browsers limit the area of a canvas.
  static PIXELS = 16e6;
  static SIDE = 8192;

  // describe(row, column) returns the children of the line below; open(row, column) an address.
  constructor(place, { label, describe, open }) {
    this.describe = describe;
    this.open = open;
    this.rows = [];
    this.columns = [];
    this.at = null;
    const { element } = paprscm;
    this.canvas = element("canvas", {
      tabindex: "0",
      role: "application",
      "aria-label": `${label}. Arrow keys, Home and End move; Enter opens.`,
    });
    this.cursor = element("div", { class: "cursor", hidden: "" });
    this.head = element("div", { class: "grid-head", "aria-hidden": "true" });
    this.names = element("div", { class: "grid-names" });
    const cells = element("div", { class: "grid-cells" }, this.canvas, this.cursor);
    this.corner = element("div", { class: "grid-corner" });
    const top = element("div", { class: "grid-top" }, this.corner, this.head);
    const body = element("div", { class: "grid-body" }, this.names, cells);
    this.line = element("p", { class: "grid-line", "aria-live": "polite" });
    this.box = element("div", { class: "grid" }, top, body, this.line);
    place.append(this.box);
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("focus", () => this.move(this.at ?? [0, this.columns.length - 1]));
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("click", (event) => this.point(event));
    this.canvas.addEventListener("dblclick", () => this.follow());
    paprscm.redraw(this.box, () => this.layout());
  }

  // rows: {name, href, title, cells: a letter for each run}; columns: {run, title, group}.
  show(rows, columns) {
    this.rows = rows;
    this.columns = columns;
    this.at = null;
    this.cursor.hidden = true;
    this.line.textContent = rows.length ? Grid.HINT : "";
    this.names.replaceChildren(
      ...rows.map(({ name, href, title }) => {
        const text = paprscm.element("bdi", { dir: "ltr" }, name);
        return href
          ? paprscm.element("a", { href, title }, text)
          : paprscm.element("span", { title }, text);
      }),
    );
    this.layout();
    this.box.scrollLeft = this.box.scrollWidth;
  }

  layout() {
    const { columns, rows, box } = this;
    const groups = columns.filter(({ group }, i) => i && group !== columns[i - 1].group).length;
    this.grouped = columns.some(({ group }) => group !== null);
    this.line.style.width = `${box.clientWidth}px`;
    this.corner.style.width = `${this.names.offsetWidth}px`;
    const room = box.clientWidth - this.names.offsetWidth - groups * Grid.GAP;
    this.width = Math.max(4, Math.min(18, Math.floor(room / Math.max(1, columns.length))));
    let x = 0;
    this.x = columns.map(({ group }, i) => {
      if (i && group !== columns[i - 1].group) x += Grid.GAP;
      x += this.width;
      return x - this.width;
    });
    const width = Math.max(1, x);
    const height = Math.max(1, rows.length * Grid.ROW);
    const scale = Math.min(
      devicePixelRatio,
      Math.sqrt(Grid.PIXELS / (width * height)),
      Grid.SIDE / Math.max(width, height),
    );
    this.canvas.width = Math.ceil(width * scale);
    this.canvas.height = Math.ceil(height * scale);
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    this.draw(scale);
    this.titles(width);
    if (this.at) this.place();
  }

  // Broken cells fill their row, others are lower: the picture can be read without its colours.
  draw(scale) {
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    const width = this.width - (this.width > 6 ? 2 : 1);
    for (const [letter, status] of Object.entries(paprscm.data.index.statuses)) {
      const height = { p: 8, w: 12, c: 4, s: 4 }[letter] ?? Grid.ROW - 2;
      const top = (Grid.ROW - height) / 2;
      context.fillStyle = paprscm.colour(status.toLowerCase());
      this.rows.forEach(({ cells }, row) => {
        this.columns.forEach(({ run }, column) => {
          if (cells[run] === letter) {
            context.fillRect(this.x[column], row * Grid.ROW + top, width, height);
          }
        });
      });
    }
  }

  // A title above the first column of those that have it, if there is room; that of a group is cut.
  titles(end) {
    // Its children have no place in the layout, and the corner is sticky only within its parent.
    this.head.style.width = `${end}px`;
    const titles = [];
    let free = 0;
    this.columns.forEach(({ title, group }, i) => {
      const before = this.columns[i - 1];
      if (this.x[i] < free || (before && before.title === title && before.group === group)) return;
      const next = this.columns.findIndex((column, j) => j > i && column.group !== group);
      const right = next < 0 ? end : this.x[next];
      const width = this.grouped ? right - this.x[i] - 4 : 40;
      if (width < 40 || this.x[i] + width > end) return;
      const span = paprscm.element("span", { title }, title);
      span.style.left = `${this.x[i]}px`;
      span.style.width = `${width}px`;
      titles.push(span);
      free = this.x[i] + width + 4;
    });
    this.head.replaceChildren(...titles);
  }

  key(event) {
    if (!this.at || event.ctrlKey || event.altKey || event.metaKey) return;
    const [row, column] = this.at;
    const steps = {
      ArrowUp: [row - 1, column],
      ArrowDown: [row + 1, column],
      ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1],
      PageUp: [row - 10, column],
      PageDown: [row + 10, column],
      Home: [row, 0],
      End: [row, this.columns.length - 1],
    };
    if (event.key === "Enter") this.follow();
    else if (steps[event.key]) this.move(steps[event.key]);
    else return;
    event.preventDefault();
  }

  point({ offsetX, offsetY }) {
    const column = this.x.findLastIndex((x) => x <= offsetX);
    const at = [Math.floor(offsetY / Grid.ROW), column];
    if (String(at) !== String(this.at)) this.move(at, false);
  }

  follow() {
    if (this.at) location.assign(this.open(this.rows[this.at[0]], this.columns[this.at[1]]));
  }

  move([row, column], scroll = true) {
    if (!this.rows.length || !this.columns.length) return;
    const within = (value, count) => Math.max(0, Math.min(count - 1, value));
    this.at = [within(row, this.rows.length), within(column, this.columns.length)];
    this.place();
    if (scroll) this.reveal();
    this.line.replaceChildren(...this.describe(this.rows[this.at[0]], this.columns[this.at[1]]));
  }

  place() {
    const { style } = this.cursor;
    style.left = `${this.x[this.at[1]] - 2}px`;
    style.top = `${this.at[0] * Grid.ROW - 1}px`;
    style.width = `${this.width + 3}px`;
    style.height = `${Grid.ROW + 2}px`;
    this.cursor.hidden = false;
  }

  // scrollIntoView() does not know of the names, titles and line that cover the edges.
  reveal() {
    const { box } = this;
    const [left, top] = [this.x[this.at[1]], this.at[0] * Grid.ROW];
    const width = box.clientWidth - this.names.offsetWidth - this.width;
    const covered = this.head.parentElement.offsetHeight + this.line.offsetHeight;
    const height = box.clientHeight - covered - Grid.ROW;
    box.scrollLeft = Math.max(left - width, Math.min(box.scrollLeft, left));
    box.scrollTop = Math.max(top - height, Math.min(box.scrollTop, top));
  }
}
