// SPDX-License-Identifier: GPL-2.0-or-later
"use strict";

(() => {
  const { index } = paprscm.data;
  const control = (id) => document.getElementById(id);
  const broken = new Set(index.broken);
  const tests = index.tests.map(([name, key, subject], position) => ({
    position,
    title: name,
    name: name.replace(/^(.+)\/test_(.+)\.py:(.+)\.test_/, "$1/$2:$3."),
    href: `tests/${key}.html`,
    subject,
    cells: index.cells[position],
  }));
  const runs = index.runs.map(([key, time, track, versions], run) => ({
    run,
    key,
    time,
    track,
    versions,
  }));

  // The columns of a view: by environment, the one with the newest run at the right; or by time.
  function columns(state) {
    const track = state.get("track") ?? "";
    const chosen = track === "" ? runs : runs.filter((run) => String(run.track) === track);
    if (state.get("runs") === "time") {
      return chosen.map((run) => ({ ...run, group: null, title: paprscm.moment(run.time) }));
    }
    return chosen
      .map((run) => ({ ...run, group: run.track, title: index.tracks[run.track] }))
      .sort((a, b) => b.track - a.track || a.run - b.run);
  }

  // Per test and track: the runs in which the status differs from that of the run before.
  function changes(test, shown) {
    const last = {};
    const found = [];
    for (const { run, track } of shown) {
      const letter = test.cells[run];
      if ("-cs".includes(letter)) continue;
      if (last[track] && last[track] !== letter) found.push(run);
      last[track] = letter;
    }
    return found;
  }

  // The worst of the newest results of each track, then the number of broken runs.
  function badness(test, shown) {
    const last = {};
    let count = 0;
    for (const { run, track } of shown) {
      const letter = test.cells[run];
      if (letter === "-") continue;
      last[track] = letter;
      count += paprscm.isBroken(letter);
    }
    const ranks = Object.values(last).map((letter) => paprscm.rank(letter));
    return Math.min(9, ...ranks) * 1e6 - count;
  }

  function rows(state, shown) {
    const words = (state.get("q") ?? "").toLowerCase().split(/\s+/);
    const subject = state.get("subject") ?? "";
    const show = state.get("show") ?? "";
    const wanted = {
      "": () => true,
      broken: (test) => broken.has(test.position),
      changed: (test) => changes(test, shown).length > 0,
      warn: (test) => shown.some(({ run }) => test.cells[run] === "w"),
    }[show];
    const found = tests.filter(
      (test) =>
        words.every((word) => test.title.toLowerCase().includes(word)) &&
        (!subject || test.subject === subject) &&
        (wanted?.(test) ?? true) &&
        shown.some(({ run }) => test.cells[run] !== "-"),
    );
    const value = {
      "": (test) => badness(test, shown),
      changed: (test) => -Math.max(-1, ...changes(test, shown)),
      unsteady: (test) => -changes(test, shown).length,
    }[state.get("sort") ?? ""];
    if (!value) return found;
    const keyed = found.map((test) => [value(test), test]);
    return keyed.sort((a, b) => a[0] - b[0] || a[1].position - b[1].position).map(([, t]) => t);
  }

  function describe(test, { run, key, time, versions }) {
    const letter = test.cells[run];
    const { element } = paprscm;
    return [
      letter === "-" ? "no result" : paprscm.badge(letter),
      " ",
      element("a", { class: "name", href: test.href }, test.title),
      " in the run of ",
      element("a", { href: `runs/${key}.html` }, time),
      `, ${versions}`,
    ];
  }

  const grid = new Grid(control("grid"), {
    label: "Verdicts: a row for each test, a column for each run",
    describe,
    open: (test) => test.href,
  });

  function show() {
    const state = paprscm.state();
    const shown = columns(state);
    const found = rows(state, shown);
    control("count").textContent =
      `${found.length} of ${tests.length} tests, ${shown.length} of ${runs.length} runs`;
    grid.show(found, shown);
  }

  const subjects = [...new Set(tests.map(({ subject }) => subject))];
  paprscm.options(control("subject"), subjects.map((subject) => [subject, subject]));
  paprscm.options(control("track"), index.tracks.map((track, i) => [i, track]));
  control("filters").hidden = false;
  for (const id of ["q", "subject", "track", "show", "sort", "runs"]) paprscm.bind(control(id));
  addEventListener("hashchange", show);
  show();
  // A link to a view leads to it.
  const reveal = () => control("verdicts").scrollIntoView();
  if (location.hash.includes("=")) reveal();
  for (const link of document.querySelectorAll('a[href^="#"][href*="="]')) {
    link.addEventListener("click", reveal);
  }
})();
