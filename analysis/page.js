"use strict";
// Draws the charts of a page from the JSON in #data. Plain SVG, no library, no request.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const points = data.points;
  const BLUES = ["#ffffff", "#eaf2fa", "#d3e4f3", "#b3d3e8", "#89bedc", "#5ba3cf", "#3585bf", "#1763a6", "#08468b"];
  const RED = "#d55e00";
  const listeners = [];
  let chosen = null;

  // ---- elements ----
  function element(name, attributes = {}, ...children) {
    const svg = ["svg", "g", "path", "line", "circle", "rect", "text", "title"].includes(name);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(key, value);
    made.append(...children.filter((child) => child !== null));
    return made;
  }
  const text = (x, y, words, more = {}) => element("text", { x, y, ...more }, words);

  // ---- numbers ----
  const digits = (value, count = 3) => Number(value.toPrecision(count)).toString();
  const percent = (share, places = 2) => `${(100 * share).toFixed(places)} %`;
  function bytes(size) {
    const power = size >= 2 ** 30 ? 3 : size >= 2 ** 20 ? 2 : 1;
    return size < 1024 ? `${size} B` : `${(size / 1024 ** power).toFixed(1)} ${"KMG"[power - 1]}iB`;
  }
  function count(value) {
    const power = Math.max(0, Math.min(Math.floor(Math.log10(Math.max(value, 1)) / 3), 4));
    return power ? `${(value / 1000 ** power).toPrecision(3)} ${"kMGT"[power - 1]}` : `${value}`;
  }
  const UNITS = { // of an axis: what a value is divided by, and what stands behind the numbers
    percent: () => [0.01, "%"], plain: () => [1, ""],
    bytes: (top) => (top >= 2 ** 30 ? [2 ** 30, "GiB"] : top >= 2 ** 20 ? [2 ** 20, "MiB"] : [1024, "KiB"]),
  };
  const bitColor = (bits) => (bits > 16 ? "#03142b" : bits > 8 ? "#052a5c" : BLUES[bits]);
  const onColor = (bits) => (bits >= 5 ? "#fff" : "#26313f");

  // ---- axes ----
  function nice(low, high, most) {
    const raw = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high * (1 + 1e-9) + 1e-12; at++) found.push(Number((at * step).toPrecision(12)));
    return found;
  }
  function logarithmic(low, high, most) {
    if (high / low < 4) return nice(low, high, most);
    for (const factors of [[1, 1.5, 2, 3, 4, 5, 6, 8], [1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
        for (const factor of factors) {
          const tick = Number((factor * 10 ** power).toPrecision(3));
          if (tick >= low * 0.999 && tick <= high * 1.001) found.push(tick);
        }
      if (found.length <= most) return found;
    }
    return nice(low, high, most);
  }
  function axis(spec, low, high, from, to) {
    const [unit, name] = UNITS[spec.unit || "plain"](high);
    const change = spec.log ? Math.log : (value) => value;
    const [a, b] = [change(low), change(high)];
    const place = (value) => from + ((change(value) - a) / (b - a || 1)) * (to - from);
    const most = Math.max(3, Math.floor(Math.abs(to - from) / (spec.vertical ? 42 : 62)));
    const ticks = (spec.log ? logarithmic : nice)(low / unit, high / unit, most)
      .filter((tick) => !spec.whole || Number.isInteger(tick))
      .map((tick) => [tick * unit, tick]);
    const places = Math.max(...ticks.map(([, tick]) => (String(tick).split(".")[1] || "").length), 0);
    for (const tick of ticks) tick[1] = spec.log ? digits(tick[1], 6) : tick[1].toFixed(places);
    return { place, ticks, low, high, title: spec.label + (name ? ` (${name})` : "") };
  }
  function limits(values, log, pad) {
    const shown = values.filter((value) => Number.isFinite(value) && (!log || value > 0));
    if (!shown.length) return log ? [1, 10] : [0, 1];
    let [low, high] = [Math.min(...shown), Math.max(...shown)];
    if (log) {
      const room = Math.max((high / low) ** pad, 1.06);
      return [low / room, high * room];
    }
    const room = (high - low) * pad || Math.abs(high) * 0.02 || 1;
    return [low - room, high + room];
  }
  function board(figure, xs, ys, height, label) {
    const width = Math.max(280, figure.clientWidth), box = { left: 58, right: width - 14, top: 12, bottom: height - 46 };
    const svg = element("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    const x = axis(xs, xs.low, xs.high, box.left, box.right);
    const y = axis({ ...ys, vertical: true }, ys.low, ys.high, box.bottom, box.top);
    for (const [value, words] of y.ticks) {
      svg.append(element("line", { class: "grid", x1: box.left, x2: box.right, y1: y.place(value), y2: y.place(value) }));
      svg.append(text(box.left - 8, y.place(value) + 4, words, { "text-anchor": "end" }));
    }
    for (const [value, words] of x.ticks) {
      svg.append(element("line", { class: "grid", x1: x.place(value), x2: x.place(value), y1: box.top, y2: box.bottom }));
      svg.append(text(x.place(value), box.bottom + 18, words, { "text-anchor": "middle" }));
    }
    svg.append(element("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
    svg.append(text((box.left + box.right) / 2, height - 8, x.title, { class: "title", "text-anchor": "middle" }));
    const middle = (box.top + box.bottom) / 2;
    svg.append(text(13, middle, y.title, { class: "title", "text-anchor": "middle", transform: `rotate(-90 13 ${middle})` }));
    figure.replaceChildren(svg);
    return { svg, x, y, box };
  }
  function steps(pairs, x, y, right) {
    let path = "";
    for (const [index, [at, value]] of pairs.entries())
      path += index ? `H${x.place(at).toFixed(1)}V${y.place(value).toFixed(1)}` : `M${x.place(at).toFixed(1)},${y.place(value).toFixed(1)}`;
    return path + (right === undefined ? "" : `H${right.toFixed(1)}`);
  }

  // ---- points: what is said of one ----
  function widths(index, cell) {
    const bits = points.bits[index], layers = data.networks[points.network[index]];
    if (!bits) return element("p", { class: "note" }, "not quantized");
    const grid = element("div", { class: "widths", style: `--cell: ${cell}px` });
    layers.forEach((layer, at) => {
      const [weight, activation] = [bits[2 * at], bits[2 * at + 1]];
      const column = element("div", { title: `${layer}: weights ${weight} bits, activations ${activation} bits` });
      if (cell > 40) column.append(element("i", {}, layer));
      for (const width of [weight, activation])
        column.append(element("b", { style: `background:${bitColor(width)};color:${onColor(width)}` }, String(width)));
      grid.append(column);
    });
    return grid;
  }
  function facts(index) {
    const rows = [["validation accuracy", percent(points.accuracy[index])]];
    if (points.test[index]) rows.push(["test accuracy", points.test[index]]);
    rows.push(["relative BOPs", `${digits(100 * points.relative_bops[index])} %`], ["BOPs", count(points.bops[index])]);
    rows.push(["size", bytes(points.size_bytes[index])]);
    for (const [name, values] of Object.entries(points.own)) rows.push([name, values[index] === null ? "–" : digits(values[index], 4)]);
    return element("dl", { class: "facts" }, ...rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  }
  function heading(index) {
    const label = points.label[index], marks = data.marks[index];
    const series = data.series.length > 1 ? ` · ${data.series[points.series[index]].name}` : "";
    return element("h3", {}, `trial ${points.trial[index]}${label ? ` · ${label}` : ""}${series}${marks ? ` · ${marks.join(", ")}` : ""}`);
  }
  const legend = "Each column is a layer: bits of its weights above, of the activations that it reads below.";

  const tip = element("div", { id: "tip", role: "status" });
  document.body.append(tip);
  function show(event, ...content) {
    tip.replaceChildren(...content);
    const { width, height } = tip.getBoundingClientRect();
    const x = event.clientX + 16 + width > innerWidth ? event.clientX - width - 12 : event.clientX + 16;
    const y = Math.min(event.clientY + 12, innerHeight - height - 8);
    tip.style.cssText = `visibility:visible;left:${Math.max(4, x)}px;top:${Math.max(4, y)}px`;
  }
  const hide = () => { tip.style.visibility = "hidden"; };

  function choose(index) {
    chosen = index;
    const home = document.getElementById("chosen");
    if (home && index !== null) {
      const run = data.runs[points.run[index]], trial = points.trial[index], label = points.label[index];
      const named = label ? ` --point ${label}` : "";
      const commands = points.kept[index]
        ? [`raysearch layers ${run} ${trial}${named}`, `raysearch export ${run} ${trial}${named} -o net.onnx`].join("\n")
        : "its checkpoint was not kept: it was never on the front, or left it";
      home.replaceChildren(
        heading(index),
        element("div", { class: "columns" }, facts(index),
          element("div", {}, element("p", { class: "note" }, legend), widths(index, data.networks[points.network[index]].length > 12 ? 26 : 64))),
        element("pre", {}, element("code", {}, commands)));
    }
    document.querySelectorAll("tr[data-point]").forEach((row) => row.classList.toggle("chosen", Number(row.dataset.point) === index));
    listeners.forEach((listener) => listener());
  }

  // ---- charts ----
  function stairs(indices, cost, less) { // those that are the most accurate at no more than their cost, by rising cost
    const kept = [];
    let best = -1;
    for (const index of [...indices].sort((a, b) => (less ? cost[a] - cost[b] : cost[b] - cost[a]) || points.accuracy[b] - points.accuracy[a]))
      if (points.accuracy[index] > best) { kept.push(index); best = points.accuracy[index]; }
    return kept;
  }
  const charts = {
    front(figure, chart) {
      const cost = points[chart.cost] || points.own[chart.cost], log = chart.x.log, all = figure.closest("section").querySelector("input.all");
      const every = [...points.trial.keys()].filter((index) => cost[index] !== null && (!log || cost[index] > 0));
      const front = every.filter((index) => points.front[index]);
      const near = limits(front.map((index) => points.accuracy[index]), false, 0.35);
      const inside = all.checked ? every : every.filter((index) => points.front[index] || points.accuracy[index] >= near[0]);
      const budget = chart.budget;
      const seen = inside.map((index) => cost[index]);
      const [left, right] = limits(budget ? [...seen, budget] : seen, log, 0.05);
      let [low, high] = limits(inside.map((index) => points.accuracy[index]), false, 0.07);
      high = Math.min(high, Math.max(1, ...front.map((index) => points.accuracy[index])) + (high - low) * 0.03);
      const { svg, x, y, box } = board(figure, { ...chart.x, low: left, high: right },
        { label: "validation accuracy", unit: "percent", low, high }, 360, chart.label);
      if (budget) {
        const at = x.place(budget), end = at > box.right - 120;
        svg.append(element("line", { x1: at, x2: at, y1: box.top, y2: box.bottom, stroke: "#7b4a8b", "stroke-width": 1.5, "stroke-dasharray": "5 4" }));
        svg.append(text(at + (end ? -6 : 6), box.bottom - 8, `budget ${chart.budget_words}`, { class: "budget", "text-anchor": end ? "end" : "start" }));
      }
      const dots = new Map();
      const taken = new Set(); // of faint dots that cover each other the first is drawn: more would look like a full one
      const dot = (index, more) => {
        const spot = `${Math.round(x.place(cost[index]))} ${Math.round(y.place(points.accuracy[index]))}`;
        if (more.class === "dominated" && taken.has(spot)) return;
        taken.add(spot);
        const circle = element("circle", { cx: x.place(cost[index]).toFixed(1), cy: y.place(points.accuracy[index]).toFixed(1), ...more });
        dots.set(index, circle);
        svg.append(circle);
      };
      for (const index of inside) if (!points.front[index])
        dot(index, { r: 3, fill: data.series[points.series[index]].color, "fill-opacity": 0.2, class: "dominated" });
      data.series.forEach((series, number) => {
        const mine = front.filter((index) => points.series[index] === number), on = stairs(mine, cost, chart.less);
        if (on.length) {
          const path = steps(on.map((index) => [cost[index], points.accuracy[index]]), x, y, chart.less ? box.right : box.left);
          svg.append(element("path", { d: path, fill: "none", stroke: series.color, "stroke-width": 1.6, class: "stairs" }));
        }
        const full = new Set(on);
        for (const index of mine) dot(index, {
          r: 4.5, fill: full.has(index) ? series.color : "#fff", stroke: series.color, "stroke-width": 1.6, class: "member" });
      });
      for (const index of front) if ((data.marks[index] || []).includes("knee")) {
        const [cx, cy] = [x.place(cost[index]), y.place(points.accuracy[index])], end = cx > box.right - 60;
        const crowded = budget && cy + 17 > box.bottom - 24 && Math.abs(cx - x.place(budget)) < 170;
        svg.append(element("circle", { cx, cy, r: 9, fill: "none", stroke: RED, "stroke-width": 2, class: "knee" }));
        svg.append(text(cx + (end ? -13 : 13), cy + (crowded ? -13 : 17), "knee", { class: "mark", "text-anchor": end ? "end" : "start" }));
      }
      const ring = element("circle", { r: 7.5, fill: "none", stroke: "#1b2430", "stroke-width": 2, visibility: "hidden" });
      svg.append(ring);
      const light = () => {
        const circle = dots.get(chosen);
        if (!circle) return ring.setAttribute("visibility", "hidden");
        for (const [key, from] of [["cx", "cx"], ["cy", "cy"]]) ring.setAttribute(key, circle.getAttribute(from));
        ring.setAttribute("visibility", "visible");
      };
      listeners.push(light);
      light();
      const nearest = (event) => {
        const place = svg.getBoundingClientRect(), ratio = svg.viewBox.baseVal.width / place.width;
        let found = null, least = 18 ** 2;
        for (const [index, circle] of dots) {
          const dx = circle.cx.baseVal.value - (event.clientX - place.left) * ratio;
          const dy = circle.cy.baseVal.value - (event.clientY - place.top) * ratio;
          const far = (dx * dx + dy * dy) * (points.front[index] ? 0.5 : 1);
          if (far < least) [found, least] = [index, far];
        }
        return found;
      };
      svg.addEventListener("mousemove", (event) => {
        const index = nearest(event);
        svg.style.cursor = index === null ? "" : "pointer";
        if (index === null) hide();
        else show(event, heading(index), facts(index), widths(index, data.networks[points.network[index]].length > 8 ? 24 : 56));
      });
      svg.addEventListener("mouseleave", hide);
      svg.addEventListener("click", (event) => { const index = nearest(event); if (index !== null) choose(index); });
      const note = figure.closest("section").querySelector(".below"), hidden = every.length - inside.length;
      if (note) note.textContent = hidden ? `${hidden} less accurate point${hidden > 1 ? "s" : ""} below the picture` : "";
    },

    curves(figure, chart) {
      const xs = chart.curves.flatMap((curve) => curve.x), ys = chart.curves.flatMap((curve) => [...curve.y, ...(curve.low || []), ...(curve.high || [])]);
      const [left, right] = chart.x.log ? limits(xs, true, 0.02) : limits(xs, false, 0.02);
      const [low, high] = limits(ys.filter((value) => value !== null), false, 0.06);
      const { svg, x, y, box } = board(figure, { ...chart.x, low: left, high: right }, { ...chart.y, low, high }, 300, chart.label);
      for (const curve of chart.curves) {
        const known = [...curve.x.keys()].filter((at) => curve.y[at] !== null);
        if (curve.low) {
          const there = [...curve.x.keys()].filter((at) => curve.low[at] !== null && curve.high[at] !== null);
          const lower = there.map((at) => [curve.x[at], curve.low[at]]), upper = there.map((at) => [curve.x[at], curve.high[at]]);
          if (there.length) {
            const end = x.place(upper.at(-1)[0]);
            let back = `L${end.toFixed(1)},${y.place(lower.at(-1)[1]).toFixed(1)}`;
            for (let at = lower.length - 1; at > 0; at--)
              back += `H${x.place(lower[at][0]).toFixed(1)}V${y.place(lower[at - 1][1]).toFixed(1)}`;
            back += `H${x.place(lower[0][0]).toFixed(1)}Z`;
            svg.append(element("path", { d: steps(upper, x, y) + back, fill: curve.color, "fill-opacity": 0.16, class: "band" }));
          }
        }
        const path = steps(known.map((at) => [curve.x[at], curve.y[at]]), x, y);
        svg.append(element("path", { d: path, fill: "none", stroke: curve.color, "stroke-width": 1.9, "stroke-dasharray": curve.dash || null, class: "curve" }));
      }
      svg.addEventListener("mousemove", (event) => {
        const place = svg.getBoundingClientRect(), at = event.clientX - place.left;
        if (at < box.left || at > box.right) return hide();
        let when = null;
        const rows = chart.curves.flatMap((curve) => {
          let index = -1;
          curve.x.forEach((value, number) => { if (x.place(value) <= at + 4) index = number; });
          if (index < 0 || curve.y[index] === null) return [];
          when = Math.max(when ?? -Infinity, curve.x[index]);
          const value = chart.y.unit === "percent" ? percent(curve.y[index]) : digits(curve.y[index], 4);
          return [element("dt", {}, curve.name || chart.y.label), element("dd", {}, value)];
        });
        if (when === null) return hide();
        const words = { percent: (v) => `${digits(100 * v)} %`, bytes, plain: (v) => digits(v, 4) }[chart.x.unit || "plain"](when);
        show(event, element("h3", {}, `${chart.x.label}: ${words}`), element("dl", { class: "facts" }, ...rows));
      });
      svg.addEventListener("mouseleave", hide);
    },

    bits(figure, chart) {
      const layers = data.networks[chart.network], columns = chart.points;
      const left = 14 + Math.min(170, Math.max(...layers.map((layer) => layer.length)) * 6.6);
      const width = Math.max(280, figure.clientWidth), cell = Math.min(46, (width - left - 14) / columns.length);
      const one = columns.length > 1 && columns.every((index) => points.run[index] === points.run[columns[0]] && points.trial[index] === points.trial[columns[0]]);
      const row = layers.length > 24 ? 15 : 22, top = 24, height = top + row * layers.length + 58;
      const svg = element("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": chart.label });
      svg.append(text(left, 14, chart.role ? "activations (bits)" : "weights (bits)", { class: "title" }));
      layers.forEach((layer, at) => {
        const cut = layer.length > 25 ? `…${layer.slice(-24)}` : layer;
        svg.append(text(left - 8, top + row * (at + 0.5) + 4, cut, { "text-anchor": "end", "font-size": row < 20 ? 10.5 : 12 }));
      });
      columns.forEach((index, column) => {
        const x = left + column * cell;
        layers.forEach((layer, at) => {
          const width = points.bits[index][2 * at + chart.role], y = top + row * at;
          const rect = element("rect", { x: x + 0.5, y: y + 0.5, width: Math.max(cell - 1, 0.6), height: row - 1, rx: cell > 14 ? 2 : 0, fill: bitColor(width), stroke: width < 2 ? "#d5dbe2" : "none", class: "cell" });
          rect.addEventListener("mousemove", (event) => show(event, heading(index),
            element("p", { style: "margin:0 0 6px" }, `${layer}: ${width} bits ${chart.role ? "of what it reads" : "of its weights"}`), facts(index)));
          rect.addEventListener("mouseleave", hide);
          rect.addEventListener("click", () => choose(index));
          svg.append(rect);
          if (cell >= 15 && row >= 15) svg.append(text(x + cell / 2, y + row / 2 + 4, String(width),
            { "text-anchor": "middle", style: `fill:${onColor(width)};pointer-events:none`, "font-size": row < 20 ? 10 : 11.5 }));
        });
        const below = top + row * layers.length, knee = (data.marks[index] || []).includes("knee");
        if (knee) svg.append(element("path", { d: `M${x + cell / 2},${below + 3}l4.5,7h-9z`, fill: RED, class: "knee" }));
        if (cell >= 15) svg.append(text(x + cell / 2, below + 22, one ? points.label[index].replace("-bit", "") : String(points.trial[index]),
          { "text-anchor": "middle", "font-size": 10.5, class: knee ? "mark" : "" }));
      });
      const words = cell >= 15 ? `${one ? `point of trial ${points.trial[columns[0]]}` : "trial"}, by rising BOPs` : `${columns.length} points, by rising BOPs`;
      svg.append(text(left, height - 16, words, { class: "title" }));
      const frame = element("rect", { fill: "none", stroke: "#1b2430", "stroke-width": 2, rx: 3, visibility: "hidden", y: top - 1, height: row * layers.length + 2, width: cell + 1 });
      svg.append(frame);
      listeners.push(() => {
        const column = columns.indexOf(chosen);
        frame.setAttribute("visibility", column < 0 ? "hidden" : "visible");
        frame.setAttribute("x", left + column * cell - 0.5);
      });
      figure.replaceChildren(svg);
    },

    bars(figure, chart) {
      const width = Math.max(280, figure.clientWidth), row = 22, left = 14 + Math.min(width * 0.55, Math.max(...chart.names.map((name) => name.length)) * 6.7);
      const height = 22 + row * chart.names.length, most = Math.max(...chart.values, 1e-9);
      const svg = element("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": chart.label });
      svg.append(text(0, 13, chart.title, { class: "title" }));
      chart.names.forEach((name, at) => {
        const y = 22 + row * at, size = ((width - left - 56) * chart.values[at]) / most;
        svg.append(text(left - 8, y + 15, name, { "text-anchor": "end" }));
        svg.append(element("rect", { x: left, y: y + 3, width: Math.max(size, 1), height: row - 7, rx: 2, fill: chart.color, class: "bar" }));
        svg.append(text(left + Math.max(size, 1) + 6, y + 15, `${(100 * chart.values[at]).toFixed(0)} %`));
      });
      figure.replaceChildren(svg);
    },
  };

  // ---- page ----
  function sortable(table) {
    table.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const compare = (a, b) => (isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b));
      const rows = [...table.tBodies[0].rows].sort((a, b) => (rising ? 1 : -1) * compare(a, b));
      table.tBodies[0].append(...rows);
    }));
  }
  function draw() {
    listeners.length = 0;
    document.querySelectorAll("figure[data-chart]").forEach((figure) => {
      const chart = data.charts[Number(figure.dataset.chart)];
      charts[chart.kind](figure, chart);
    });
    listeners.forEach((listener) => listener());
    document.documentElement.dataset.ready = "true";
  }
  document.querySelectorAll("table.sortable").forEach(sortable);
  document.querySelectorAll("input.all").forEach((box) => box.addEventListener("change", draw));
  document.querySelectorAll("[data-point]").forEach((each) => each.addEventListener("click", () => choose(Number(each.dataset.point))));
  let width = 0;
  new ResizeObserver(() => {
    if (document.body.clientWidth !== width) { width = document.body.clientWidth; draw(); }
  }).observe(document.body);
  const knee = Object.entries(data.marks).find(([, marks]) => marks.includes("knee"));
  choose(knee ? Number(knee[0]) : null);
})();
