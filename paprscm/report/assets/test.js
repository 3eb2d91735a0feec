// SPDX-License-Identifier: GPL-2.0-or-later
"use strict";

(() => {
  const { index } = paprscm.data;
  const { metrics, places } = paprscm.data.metrics;
  const { element } = paprscm;

  // A row for each environment, a column for each run that has the test.
  function verdicts(place) {
    const cells = index.cells[Number(place.dataset.test)];
    const columns = index.runs
      .map(([key, time, track, versions], run) => ({ run, key, time, track, versions }))
      .filter(({ run }) => cells[run] !== "-")
      .map((run) => ({ ...run, group: null, title: paprscm.moment(run.time) }));
    const tracks = [...new Set(columns.map(({ track }) => track))].sort((a, b) => a - b);
    const rows = tracks.map((track) => ({
      name: index.tracks[track],
      title: index.tracks[track],
      cells: [...cells].map((letter, run) => (index.runs[run][2] === track ? letter : "-")),
    }));
    const grid = new Grid(place, {
      label: "Verdicts: a row for each environment, a column for each run",
      describe: (row, { run, key, time, versions }) => [
        row.cells[run] === "-" ? "another environment: " : paprscm.badge(row.cells[run]),
        " ",
        element("a", { href: `../runs/${key}.html` }, time),
        `, ${versions}`,
      ],
      open: (_row, { key }) => `../runs/${key}.html`,
    });
    grid.show(rows, columns);
  }

  // All runs of a metric as points; those of the chosen place with their line and band.
  function plot(figure, metric, place) {
    const own = metric.series.find((one) => one.place === place);
    const runs = [...new Set(metric.series.flatMap((one) => one.runs))].sort((a, b) => a - b);
    const value = new Map(own.runs.map((run, i) => [run, own.values[i]]));
    const others = new Map();
    for (const one of metric.series) {
      if (one !== own) one.runs.forEach((run, i) => others.set(run, one.values[i]));
    }
    const changes = own.changes ?? [];
    // The band is that of the runs since the last change; without a change, of all.
    const levels = own.levels ?? [[own.runs[0], own.runs.at(-1), own.band?.[1]]];
    const [first, last] = levels.at(-1);
    const level = (i) => runs.map((run) => (own.band && run >= first && run <= last ? own.band[i] : null));
    const data = [
      runs.map((_, i) => i),
      runs.map((run) => others.get(run) ?? null),
      level(0),
      level(2),
      runs.map((run) => value.get(run) ?? null),
    ];
    const [accent, quiet, line, mark] = ["accent", "quiet", "line", "mark"].map((name) => paprscm.colour(name));
    const at = (run) => runs.indexOf(run);
    // The runs between which a change lies.
    const interval = (u, from, to) => {
      const [x, end] = [from, to].map((i) => u.valToPos(i, "x", true));
      u.ctx.save();
      u.ctx.fillStyle = `${mark}55`;
      u.ctx.fillRect(x, u.bbox.top, end - x, u.bbox.height);
      u.ctx.restore();
    };
    const dashes = (u, from, to, value) => {
      const [left, right] = [from, to].map((i) => u.valToPos(i, "x", true));
      const y = u.valToPos(value, "y", true);
      const scale = devicePixelRatio;
      u.ctx.save();
      u.ctx.strokeStyle = changes.length ? mark : quiet;
      u.ctx.lineWidth = (changes.length ? 2 : 1) * scale;
      u.ctx.setLineDash([5 * scale, 4 * scale]);
      u.ctx.beginPath();
      u.ctx.moveTo(Math.max(left, u.bbox.left), y);
      u.ctx.lineTo(Math.min(right, u.bbox.left + u.bbox.width), y);
      u.ctx.stroke();
      u.ctx.restore();
    };
    const label = (i) => (Number.isInteger(i) && runs[i] !== undefined ? index.runs[runs[i]][1] : "");
    const axis = { stroke: quiet, grid: { stroke: line, width: 1 }, ticks: { stroke: line } };
    const unit = metric.unit === "1" ? "" : ` ${metric.unit}`;
    const text = (number) => (number == null ? "–" : `${Number(number.toPrecision(4))}${unit}`);
    const points = (size, fill) => ({ show: true, size, fill, stroke: fill, width: 0 });
    const bare = { points: { show: false } };
    const options = {
      width: Math.max(200, figure.clientWidth),
      height: 180,
      cursor: { drag: { x: false, y: false } },
      legend: { show: false },
      scales: { x: { time: false, range: [-0.5, runs.length - 0.5] } },
      axes: [
        {
          ...axis,
          incrs: [1, 2, 5, 10, 20, 50, 100],
          space: 80,
          values: (_, ticks) => ticks.map((i) => paprscm.moment(label(i))),
        },
        { ...axis, size: 62 },
      ],
      series: [
        {},
        { ...bare, paths: () => null, points: points(4, line) },
        { ...bare, width: 0 },
        { ...bare, width: 0 },
        { stroke: accent, width: 1.5, spanGaps: true, points: points(5, accent) },
      ],
      bands: [{ series: [3, 2], fill: `${accent}22` }],
      hooks: {
        drawAxes: [(u) => changes.forEach(([before, after]) => interval(u, at(before), at(after)))],
        draw: [
          (u) => {
            if (own.band || changes.length) {
              for (const [from, to, median] of levels) dashes(u, at(from) - 0.5, at(to) + 0.5, median);
            }
          },
        ],
        setCursor: [
          ({ cursor }) => {
            const i = cursor.idx;
            note.textContent =
              i == null ? summary : `${text(value.get(runs[i]) ?? others.get(runs[i]))}, run of ${label(i)}`;
          },
        ],
      },
    };
    const newest = text(own.values.at(-1));
    const summary = own.band
      ? `newest ${newest}, usual ${text(own.band[0])} to ${text(own.band[2])}`
      : `newest ${newest}, too few runs for a range`;
    const [low, , high] = own.band ?? [-Infinity, 0, Infinity];
    const unusual = own.values.at(-1) < low || own.values.at(-1) > high;
    const note = element("div", { class: unusual ? "bad" : "note" }, summary);
    const caption = element("figcaption", {}, element("b", {}, metric.label), note);
    const texts = changes.map(([, , sentence]) => sentence);
    const box = element("div", { role: "img", "aria-label": [`${metric.label}: ${summary}`, ...texts].join("; ") });
    const below = texts.map((sentence) => element("p", { class: "note" }, element("span", { class: "mark" }), sentence));
    figure.replaceChildren(caption, box, ...below);
    new uPlot(options, data, box);
  }

  function plots(box) {
    const select = document.getElementById("place");
    paprscm.options(select, places.map((place, i) => [i || "", place]));
    document.getElementById("metric-filter").hidden = places.length < 2;
    paprscm.bind(select);
    const figures = metrics.map(() => element("figure"));
    box.append(...figures);
    const draw = () => {
      metrics.forEach((metric, i) => {
        figures[i].hidden = !metric.series.some((one) => one.place === Number(select.value));
        if (!figures[i].hidden) plot(figures[i], metric, Number(select.value));
      });
    };
    addEventListener("hashchange", draw);
    paprscm.redraw(box, draw);
  }

  verdicts(document.getElementById("grid"));
  if (metrics.length) plots(document.getElementById("plots"));
})();
