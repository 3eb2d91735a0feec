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
      .map((run) => ({ ...run, group: null, title: run.time.slice(5, 10) }));
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
    const first = own.runs[0];
    const last = own.runs.at(-1);
    const level = (i) => runs.map((run) => (own.band && run >= first && run <= last ? own.band[i] : null));
    const data = [
      runs.map((_, i) => i),
      runs.map((run) => others.get(run) ?? null),
      level(0),
      level(2),
      level(1),
      runs.map((run) => value.get(run) ?? null),
    ];
    const [accent, quiet, line] = ["accent", "quiet", "line"].map((name) => paprscm.colour(name));
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
          values: (_, ticks) => ticks.map((i) => label(i).slice(5, 10)),
        },
        { ...axis, size: 62 },
      ],
      series: [
        {},
        { ...bare, paths: () => null, points: points(4, line) },
        { ...bare, width: 0 },
        { ...bare, width: 0 },
        { ...bare, stroke: quiet, width: 1, dash: [4, 4] },
        { stroke: accent, width: 1.5, spanGaps: true, points: points(5, accent) },
      ],
      bands: [{ series: [3, 2], fill: `${accent}22` }],
      hooks: {
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
    const box = element("div", { role: "img", "aria-label": `${metric.label}: ${summary}` });
    figure.replaceChildren(caption, box);
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
