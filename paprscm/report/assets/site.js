// SPDX-License-Identifier: GPL-2.0-or-later
"use strict";

// Common to all pages. Data arrive as scripts that call load(): a page that is read from a file may
// not fetch.
const paprscm = {
  data: {},

  load(name, data) {
    this.data[name] = data;
  },

  // The day of a run, or its time if all runs are of one day.
  moment(time) {
    this.isOneDay ??= new Set(this.data.index.runs.map(([, when]) => when.slice(0, 10))).size === 1;
    return this.isOneDay ? time.slice(11, 16) : time.slice(5, 10);
  },

  // An element with attributes and children; texts never become HTML.
  element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  },

  badge(letter, count) {
    const status = this.data.index.statuses[letter];
    const text = count === undefined ? status : `${status} ${count}`;
    return this.element("span", { class: `status ${status.toLowerCase()}` }, text);
  },

  // The page's state is in the hash, so that a link and the back button keep it.
  state() {
    return new URLSearchParams(location.hash.slice(1));
  },

  keep(state) {
    for (const [name, value] of [...state]) if (!value) state.delete(name);
    // replaceState() is refused in pages that are read from files; "#" alone scrolls to the top.
    location.replace(`#${String(state) || "all"}`);
  },

  // A select or input whose value is in the hash by its id.
  bind(control) {
    const read = () => {
      control.value = this.state().get(control.id) ?? "";
      // A value that is not an option, in a link to an older site.
      if (control.selectedIndex === -1) control.value = "";
    };
    read();
    addEventListener("hashchange", read);
    control.addEventListener("input", () => {
      const state = this.state();
      state.set(control.id, control.value);
      this.keep(state);
    });
  },

  options(select, texts) {
    for (const [value, text] of texts) select.append(this.element("option", { value }, text));
  },

  // Index in the order of the worst status first.
  rank(letter) {
    return "feiwpcs-".indexOf(letter);
  },

  isBroken(letter) {
    return "fei".includes(letter);
  },

  // Calls draw() now, and when the colours or the width of an element change.
  redraw(element, draw) {
    let width = 0;
    new ResizeObserver(() => {
      if (element.clientWidth !== width) {
        width = element.clientWidth;
        draw();
      }
    }).observe(element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  },

  colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  },
};
