// SPDX-License-Identifier: GPL-2.0-or-later
"use strict";

(() => {
  const { index } = paprscm.data;
  const { element } = paprscm;
  const sides = ["a", "b"];
  const control = (id) => document.getElementById(id);
  const position = new Map(index.runs.map(([key], run) => [key, run]));

  // The chosen runs of a side. By default the newest run is compared with the one before it in its
  // environment.
  function chosen(side) {
    const keys = paprscm.state().get(side);
    if (keys) return keys.split(",").map((key) => position.get(key)).filter((run) => run !== undefined);
    const last = index.runs.length - 1;
    if (side === "b") return [last];
    const before = index.runs.findLastIndex((run, i) => i < last && run[2] === index.runs[last][2]);
    return [Math.max(before, 0)];
  }

  // Number of runs by letter, the worst status first.
  function counts(cells, runs) {
    const found = {};
    for (const run of runs) if (cells[run] !== "-") found[cells[run]] = (found[cells[run]] ?? 0) + 1;
    return Object.entries(found).sort((a, b) => paprscm.rank(a[0]) - paprscm.rank(b[0]));
  }

  function size(runs) {
    return `${runs.length} run${runs.length === 1 ? "" : "s"}`;
  }

  function share(found) {
    const total = found.reduce((sum, [, count]) => sum + count, 0);
    return found.reduce((sum, [letter, count]) => sum + paprscm.isBroken(letter) * count, 0) / total;
  }

  function kind(a, b) {
    if (!a.length && !b.length) return null;
    if (!a.length) return "new";
    if (!b.length) return "missing";
    if (share(b) > share(a)) return "worse";
    if (share(b) < share(a)) return "better";
    const letters = (found) => found.map(([letter]) => letter).join("");
    return letters(a) === letters(b) ? null : "other";
  }

  function badges(found, total) {
    const cell = element("td");
    for (const [letter, count] of found) {
      cell.append(paprscm.badge(letter, total > 1 ? count : undefined), " ");
    }
    return cell;
  }

  // A permutation test of sets of these sizes can reach 5 %, as in paprscm/history/statistics.py.
  function enough(a, b) {
    let ways = 1;
    for (let i = 1; i <= Math.min(a, b); i++) ways *= (Math.max(a, b) + i) / i;
    return 2 / ways <= 0.05;
  }

  // The command for the metrics of the chosen sets, whose statistics are not computed here.
  function metrics(before, after) {
    const ids = [before, after].map((runs) => runs.map((run) => index.runs[run][4]).join(" "));
    if (before.some((run) => after.includes(run))) return ["Metrics: a run is in both sets."];
    if (!enough(before.length, after.length)) {
      return ["Metrics: not comparable, at least 4 + 4, 3 + 5 or 2 + 8 runs are needed."];
    }
    return ["Metrics, of runs in the history: ", element("code", {}, `paprscm compare ${ids[0]} -- ${ids[1]}`)];
  }

  const titles = {
    worse: "Worse",
    better: "Better",
    other: "Other changes",
    new: "Only after",
    missing: "Only before",
  };

  function show() {
    const [before, after] = sides.map(chosen);
    const groups = { worse: [], better: [], other: [], new: [], missing: [] };
    let both = 0;
    index.tests.forEach(([name, key], test) => {
      const [a, b] = [before, after].map((runs) => counts(index.cells[test], runs));
      both += a.length > 0 && b.length > 0;
      groups[kind(a, b)]?.push({ name, key, a, b });
    });
    const changed = Object.entries(groups).filter(([, tests]) => tests.length);
    control("count").textContent =
      `${size(before)} against ${size(after)}, ${both} tests in both: ${groups.worse.length} worse, ${groups.better.length} better, ` +
      `${groups.other.length} changed otherwise`;
    control("metrics-of-sets").replaceChildren(...metrics(before, after));
    control("result").replaceChildren(
      ...changed.map(([name, tests]) => {
        const head = ["Test", "Before", "After"].map((text) => element("th", { scope: "col" }, text));
        const rows = tests.map((test) => {
          const cells = [badges(test.a, before.length), badges(test.b, after.length)];
          cells[0].dataset.label = "Before";
          cells[1].dataset.label = "After";
          const link = element("a", { class: "name", href: `tests/${test.key}.html` }, test.name);
          return element("tr", {}, element("th", { scope: "row" }, link), ...cells);
        });
        const table = element(
          "table",
          {},
          element("thead", {}, element("tr", {}, ...head)),
          element("tbody", {}, ...rows),
        );
        const folded = element("details", {}, element("summary", {}, `${titles[name]}: ${tests.length}`), table);
        folded.open = name !== "new" && name !== "missing";
        return folded;
      }),
    );
  }

  // The options of a side: the runs of its environment, the newest first.
  function fill(side) {
    const track = control(`track-${side}`).value;
    const selected = new Set(chosen(side));
    const shown = index.runs
      .map(([key, time, number, versions], run) => ({ key, time, number, versions, run }))
      .filter(({ run, number }) => selected.has(run) || track === "" || String(number) === track)
      .reverse();
    control(side).replaceChildren(
      ...shown.map(({ key, time, versions, run }) => {
        const option = element("option", { value: key }, `${time}  ${versions}`);
        option.selected = selected.has(run);
        return option;
      }),
    );
  }

  for (const side of sides) {
    paprscm.options(control(`track-${side}`), index.tracks.map((track, i) => [i, track]));
    control(`track-${side}`).addEventListener("input", () => fill(side));
    control(side).addEventListener("input", () => {
      const state = paprscm.state();
      const keys = [...control(side).selectedOptions].map(({ value }) => value);
      state.set(side, keys.join(","));
      paprscm.keep(state);
    });
    fill(side);
  }
  addEventListener("hashchange", () => sides.forEach(fill));
  addEventListener("hashchange", show);
  control("sides").hidden = false;
  show();
})();
