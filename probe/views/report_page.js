"use strict";
// The wiring of the page: controls to charts. Plotly draws; this file unpacks data and says what to draw.

const byId = (id) => document.getElementById(id);
const run = JSON.parse(byId("run").textContent);
const TRACE_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"];
const FATE_COLOURS = { 1: "rgba(255,255,255,0)", 2: "rgba(226,226,230,.88)", 3: "rgba(86,180,233,.8)",
  4: "rgba(230,159,0,.8)", 5: "rgba(204,121,167,.8)", 6: "rgba(240,228,66,.6)",
  7: "rgba(213,94,0,.6)" };
const SEGMENT_COLOURS = { system: "#999999", visual: "#0072b2", newline: "#56b4e9", question: "#e69f00", answer: "#009e73" };
const CONFIG = { displayModeBar: false, responsive: true, showTips: false };
const FONT = { family: getComputedStyle(document.body).fontFamily, size: 13, color: "#22222a" };
const RECORDS = { visual_importance: "recipes/record/visual_importance.yaml",
  attention_mass: "recipes/record/attention_mass.yaml", confidence: "recipes/record/confidence.yaml" };

const shown = { index: 0, step: 0, layer: 0, sample: null, looked: false, frame: 0 };
const unpacked = new Map();

// ------------------------------------------------------------------ data

/** Plotly reads labels as a small markup of its own; texts of users must stay texts. */
const literal = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const number = (value) => (value === null || Number.isNaN(value) ? "–" : String(Number(Number(value).toPrecision(4))));
const last = (side) => Math.min(shown.step, side.steps - 1);
const lastLayer = (side) => Math.min(shown.layer, side.layers - 1);

async function unpack(i) {
  if (unpacked.has(i)) return unpacked.get(i);
  const packed = Uint8Array.from(atob(byId(`payload-${i}`).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const text = new TextDecoder();
  const size = Number(text.decode(bytes.subarray(0, 8)));
  const sample = JSON.parse(text.decode(bytes.subarray(8, 8 + size)));
  const blob = bytes.subarray(8 + size);
  const array = (a) => ({ shape: a.shape, values: values(blob, a) });
  for (const side of sample.sides) {
    if (!side) continue;
    for (const name of ["token", "commit_step", "visual_kept"]) if (side[name]) side[name] = array(side[name]);
    for (const panel of ["importance", "slots", "maps"])
      for (const name in side[panel]) side[panel][name] = array(side[panel][name]);
    for (const grid of side.grids) grid.cell = array(grid.cell);
  }
  unpacked.set(i, sample);
  return sample;
}

function values(blob, { kind, at, shape }) {
  const n = shape.reduce((a, b) => a * b, 1);
  if (kind === "u1") return blob.slice(at, at + n);
  const whole = new Uint8Array(4 * n);
  for (let k = 0; k < 4; k++) for (let i = 0; i < n; i++) whole[4 * i + k] = blob[at + k * n + i];
  return kind === "f4" ? new Float32Array(whole.buffer) : new Int32Array(whole.buffer);
}

/** Row `[i]` or `[i][j]` of an array, as a plain list in which NaN is null, as Plotly wants it. */
function row(array, ...at) {
  const size = array.shape.slice(at.length).reduce((a, b) => a * b, 1);
  let start = 0;
  at.forEach((place, d) => { start += place * array.shape.slice(d + 1).reduce((a, b) => a * b, 1); });
  return Array.from(array.values.subarray(start, start + size), (v) => (Number.isNaN(v) ? null : v));
}

/** Largest value of several arrays, optionally at one layer of (step, layer, ...); the share `part` of them is below. */
function largest(arrays, layer = null, part = 1) {
  const found = [];
  for (const { shape, values: all } of arrays) {
    const inner = shape.slice(2).reduce((a, b) => a * b, 1);
    for (let i = 0; i < all.length; i++)
      if (!Number.isNaN(all[i]) && (layer === null || Math.floor(i / inner) % shape[1] === layer)) found.push(all[i]);
  }
  if (part === 1) return found.reduce((a, b) => Math.max(a, b), -Infinity);
  found.sort((a, b) => a - b);
  return found.length ? found[Math.min(found.length - 1, Math.floor(part * found.length))] : -Infinity;
}

// ------------------------------------------------------------------ small parts

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function absent(chart, why, recipe) {
  Plotly.purge(chart);
  chart.style.height = "";
  chart.removeAttribute("role");
  chart.removeAttribute("aria-label");
  const said = element("p", "absent", why);
  if (recipe) said.append(" To record it: ", element("code", "", `probe run ${recipe}`));
  chart.replaceChildren(said);
}

function draw(chart, traces, layout, about) {
  if (chart.querySelector(".absent")) chart.replaceChildren();
  chart.style.height = `${layout.height}px`; // Plotly does not stretch what it draws into
  chart.setAttribute("role", "img");
  chart.setAttribute("aria-label", about);
  const base = { font: FONT, margin: { l: 52, r: 12, t: 8, b: 46 }, paper_bgcolor: "#fff", plot_bgcolor: "#fff",
    hoverlabel: { font: FONT, bgcolor: "#fff", bordercolor: "#8d8e99" }, dragmode: false };
  Plotly.react(chart, traces, { ...base, ...layout }, CONFIG);
}

const axis = (title, more = {}) => ({ title: { text: title, standoff: 8 }, fixedrange: true, zeroline: false,
  gridcolor: "#e8e8ee", ticks: "outside", tickcolor: "#8d8e99", ...more });
/** An axis that counts: whole numbers only, and no more ticks than can be read. */
const counting = (title, n, more = {}) => axis(title, { tick0: 0, dtick: Math.max(1, Math.ceil(n / 8)),
  range: [-0.5, n - 0.5], showgrid: false, ...more });
const bar = (title) => ({ title: { text: title, side: "right", font: { size: 12 } }, thickness: 12, outlinewidth: 0, nticks: 5, tickfont: { size: 12 } });
const sides = () => shown.sample.sides;

// ------------------------------------------------------------------ panels

function said() {
  const info = run.samples[shown.index];
  byId("question").textContent = info.question || "(no question)";
  byId("right").textContent = info.references.length ? `right: ${info.references.join("  or  ")}` : "";
  run.traces.forEach((trace, k) => {
    const lane = byId(`said-${k}`), side = sides()[k];
    lane.replaceChildren();
    if (!side) return lane.append(element("p", "who", `${trace.label}: not in this trace`));
    if (side.failed) return lane.append(element("p", "failed", `${trace.label} failed: ${side.failed}`));
    const who = element("div", "who", `${trace.label} answers`);
    if (side.score !== null)
      who.append(", score ", element("span", `score ${side.score >= 0.995 ? "good" : "bad"}`, number(side.score)));
    lane.append(who, element("p", "said", side.prediction || "(nothing)"));
  });
}

function fateLegend() {
  const present = new Set();
  for (const side of sides()) if (side && side.visual_kept) side.visual_kept.values.forEach((v) => present.add(v));
  byId("fates").replaceChildren(...run.fates.filter((f) => present.has(f.code))
    .map((fate) => legendItem(FATE_COLOURS[fate.code], `${fate.name}: ${fate.about}`)));
}

function legendItem(colour, text) {
  const item = element("li"), swatch = element("span", "swatch");
  swatch.style.background = colour;
  item.append(swatch, text);
  return item;
}

function gridChoice() {
  const labels = [...new Set(sides().flatMap((s) => (s ? s.grids.map((g) => g.label) : [])))];
  const holder = byId("grid").querySelector("span");
  const before = chosen("grid");
  byId("grid").hidden = labels.length < 2;
  holder.replaceChildren(...labels.map((label) => {
    const line = element("label"), input = element("input");
    Object.assign(input, { type: "radio", name: "grid", value: label, checked: label === before });
    input.addEventListener("change", () => pictures());
    line.append(input, label);
    return line;
  }));
  const inputs = [...holder.querySelectorAll("input")];
  if (inputs.length && !inputs.some((i) => i.checked)) (inputs.find((i) => i.value === "tiles") || inputs[0]).checked = true;
}

const chosen = (name) => (document.querySelector(`input[name=${name}]:checked`) || {}).value;

function pictures() {
  sides().forEach((side, k) => {
    const chart = byId(`picture-${k}`), below = byId(`picture-after-${k}`);
    below.textContent = "";
    if (!side || side.failed) return absent(chart, side ? "The sample failed here." : "Not in this trace.");
    const grid = side.grids.find((g) => g.label === chosen("grid")) || side.grids[0];
    if (!grid) return absent(chart, "This sample has no picture.");
    picture(chart, below, side, grid);
  });
}

function picture(chart, below, side, grid) {
  const step = last(side), layer = lastLayer(side), paint = chosen("paint");
  const image = grid.own ? shown.sample.picture : null;
  const { width, height } = image || { width: 1, height: 1 };
  const fates = side.visual_kept ? row(side.visual_kept, step, layer) : [];
  const name = run.importance.find((n) => side.importance[n]);
  const worth = name ? row(side.importance[name], step, layer) : null;
  const words = Object.fromEntries(run.fates.map((f) => [f.code, f.name]));
  const cells = grid.y.slice(1).map((_, i) => row(grid.cell, i));
  const place = { x: grid.x.map((v) => v * width), y: grid.y.map((v) => v * height), type: "heatmap", xgap: 1, ygap: 1 };
  const of = (list) => cells.map((line) => line.map((token) => (token < 0 || !list ? null : list[token] ?? null)));
  const hover = cells.map((line) => line.map((token) => (token < 0 ? "" : `visual token ${token}<br>${words[fates[token]] || "fate not recorded"}`
    + (worth && worth[token] !== null ? `<br>${literal(name)} ${number(worth[token])}` : ""))));
  const traces = [];
  if (paint === "both" && worth) {
    const most = largest(sides().filter((s) => s && s.importance[name]).map((s) => s.importance[name]), layer, 0.99);
    traces.push({ ...place, z: of(worth), zmin: 0, zmax: most > 0 ? most : 1, colorscale: "Viridis", opacity: 0.65, hoverinfo: "skip",
      colorbar: bar("importance") });
  }
  const scale = [];
  for (let code = 0; code <= 7; code++)
    scale.push([code / 8, FATE_COLOURS[code] || "rgba(0,0,0,0)"], [(code + 1) / 8, FATE_COLOURS[code] || "rgba(0,0,0,0)"]);
  traces.push({ ...place, z: of(fates).map((line) => line.map((v) => (paint === "none" ? 1 : v ?? 0))), zmin: -0.5, zmax: 7.5, colorscale: scale,
    showscale: false, text: hover, hovertemplate: "%{text}<extra></extra>" });
  const images = image ? [{ source: image.uri, xref: "x", yref: "y", x: 0, y: 0, sizex: width, sizey: height,
    sizing: "stretch", layer: "below", yanchor: "top" }] : [];
  const plain = { visible: false, fixedrange: true };
  const count = (code) => fates.filter((v) => v === code).length;
  const told = run.fates.filter((f) => count(f.code)).map((f) => `${count(f.code)} ${f.name}`).join(" · ");
  draw(chart, traces, { images, height: Math.min(440, Math.max(240, chart.clientWidth * 0.82)), margin: { l: 2, r: 2, t: 2, b: 2 },
    plot_bgcolor: "#f5f6f8", xaxis: { ...plain, range: [0, width], constrain: "domain" },
    yaxis: { ...plain, range: [height, 0], scaleanchor: "x", constrain: "domain" } }, `the picture with its visual tokens: ${told}`);
  const lines = [told ? `${told}, of all ${fates.length} visual tokens at step ${step}, layer ${layer}.` : "The fate of tokens was not recorded."];
  if (!grid.own) lines.push("The trace keeps the first picture only.");
  else if (!image) lines.push("The trace keeps no picture; tokens are shown where they lie.");
  below.textContent = lines.join(" ");
  if (paint === "both" && !worth) {
    below.append(" Importance was not recorded; to record it: ");
    below.append(element("code", "", `probe run ${RECORDS.visual_importance}`));
  }
}

function answers() {
  sides().forEach((side, k) => {
    const holder = byId(`answer-before-${k}`), chart = byId(`answer-${k}`), below = byId(`answer-after-${k}`);
    holder.replaceChildren();
    below.textContent = "";
    if (!side || side.failed || !side.token || !side.steps) return absent(chart, "No answer tokens in this trace.");
    const step = last(side), { words, open } = run.traces[k], sure = side.slots.confidence;
    const [steps, positions] = side.token.shape;
    const at = (s, p) => side.token.values[s * positions + p];
    const word = (id) => (id === open ? "·" : (words[id] ?? `#${id}`));
    const slots = element("div", "slots");
    for (let p = 0; p < positions; p++) {
      const id = at(step, p);
      if (id < 0) continue;
      let when = side.commit_step ? side.commit_step.values[p] : -1;
      if (when < 0 || when > step) for (when = step; when > 0 && at(when - 1, p) === id; when--);
      const isOpen = id === open;
      const special = /^\s*<\|(.*)\|>$/.exec(word(id));
      const slot = element("span", "slot", special ? special[1] : word(id).replace(/\n/g, "↵") || "␣");
      const confidence = sure && !isOpen ? sure.values[when * positions + p] : NaN;
      slot.classList.toggle("open", isOpen);
      slot.classList.toggle("new", !isOpen && when === step);
      slot.classList.toggle("special", special !== null);
      slot.title = isOpen ? `slot ${p}: open` : `slot ${p}: token ${id}, written at step ${when}, confidence ${number(confidence)}`;
      if (!Number.isNaN(confidence)) {
        const fill = element("i");
        fill.style.width = `${100 * confidence}%`;
        slot.append(fill);
      }
      slots.append(slot);
    }
    holder.append(slots);
    if (step < shown.step) below.textContent = `This run ended at step ${step}.`;
    if (!sure) return absent(chart, "Confidence was not recorded.", RECORDS.confidence);
    const z = [], text = [];
    for (let s = 0; s < steps; s++) {
      z.push(row(sure, s));
      text.push(Array.from({ length: positions }, (_, p) => literal(word(at(s, p)).replace(/\n/g, "↵"))));
    }
    draw(chart, [{ type: "heatmap", z, text, zmin: 0, zmax: 1, colorscale: "Viridis", xgap: positions < 60 ? 1 : 0, ygap: steps < 40 ? 1 : 0,
      colorbar: bar("confidence"), hovertemplate: "slot %{x}, step %{y}<br>after it: %{text}<br>confidence %{z:.4~g}<extra></extra>" }],
    { height: Math.min(340, 110 + 22 * steps), xaxis: counting("slot of the answer", positions),
      yaxis: counting("step", steps, { range: [steps - 0.5, -0.5] }), shapes: [across(step, positions)] },
    "confidence by step and slot of the answer");
  });
}

const across = (step, width) => ({ type: "rect", x0: -0.5, x1: width - 0.5, y0: step - 0.5, y1: step + 0.5, line: { color: "#d55e00", width: 2 } });

function curves() {
  const names = run.slots.filter((n) => sides().some((s) => s && s.slots[n]));
  const holder = byId("curves");
  while (holder.children.length < names.length) holder.append(element("div", "chart"));
  while (holder.children.length > Math.max(1, names.length)) { Plotly.purge(holder.lastChild); holder.lastChild.remove(); }
  if (!holder.children.length) holder.append(element("div", "chart"));
  if (!names.length) return absent(holder.firstChild, "Neither confidence nor entropy was recorded.", RECORDS.confidence);
  names.forEach((name, i) => {
    const { units, about } = run.variables[name];
    const traces = [];
    let most = 0, longest = 1;
    sides().forEach((side, k) => {
      if (!side || !side.slots[name]) return;
      const y = Array.from({ length: side.slots[name].shape[0] }, (_, s) => {
        const known = row(side.slots[name], s).filter((v) => v !== null);
        return known.length ? known.reduce((a, b) => a + b) / known.length : null;
      });
      most = Math.max(most, ...y);
      longest = Math.max(longest, y.length);
      traces.push({ y, x: y.map((_, s) => s), type: "scatter", mode: "lines+markers", name: literal(run.traces[k].label),
        line: { color: TRACE_COLOURS[k % TRACE_COLOURS.length], width: 2, dash: ["solid", "dot", "dash", "dashdot"][k % 4] }, marker: { size: 5 },
        hovertemplate: `step %{x}<br>mean ${literal(name)} %{y:.4~g}` });
    });
    draw(holder.children[i], traces, { height: 250, showlegend: traces.length > 1,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 12 } }, margin: { l: 58, r: 8, t: 34, b: 42 },
      xaxis: counting("step", longest, { range: [-0.3, Math.max(1, longest - 1) + 0.3] }),
      yaxis: axis(units && units !== "1" ? `${name} (${units})` : name, { range: [0, Math.max(most * 1.08, 1e-6)] }),
      shapes: [{ type: "line", x0: shown.step, x1: shown.step, yref: "paper", y0: 0, y1: 1, line: { color: "#22222a", width: 1.5, dash: "dot" } }] },
    `mean ${name} by step: ${about}`);
  });
}

function maps() {
  const option = run.maps[byId("signal").selectedIndex];
  const { units, about } = option ? run.variables[option.variable] : { units: "", about: "" };
  byId("signal-about").textContent = about ? `${about[0].toUpperCase()}${about.slice(1)}. The frame is the step and layer chosen above.` : "";
  const present = option ? sides().filter((s) => s && s.maps[option.variable]).map((s) => s.maps[option.variable]) : [];
  const slice = ({ shape, values: all }) => ({ shape: shape.slice(0, 2), values: all.filter((_, i) => i % shape[2] === option.place) });
  const most = largest(present.map(slice)), share = option && /mass/.test(option.variable) && most <= 1.001;
  sides().forEach((side, k) => {
    const chart = byId(`map-${k}`), held = side && option && side.maps[option.variable];
    if (!held || !held.values.length) return absent(chart, "Nothing was recorded here.", RECORDS.attention_mass);
    const cut = slice(held), [steps, layers] = cut.shape;
    const z = Array.from({ length: layers }, (_, l) => Array.from({ length: steps }, (_, s) => row(cut, s)[l]));
    const step = last(side), layer = lastLayer(side);
    draw(chart, [{ type: "heatmap", z, zmin: 0, zmax: share ? 1 : most > 0 ? most : 1, colorscale: "Viridis", xgap: 1, ygap: 1,
      colorbar: bar(units && units !== "1" ? units : ""), hovertemplate: "step %{x}, layer %{y}<br>%{z:.4~g}<extra></extra>" }],
    { height: Math.min(420, 90 + 24 * layers), xaxis: counting("step", steps), yaxis: counting("layer", layers, { range: [layers - 0.5, -0.5] }),
      shapes: [{ type: "rect", x0: step - 0.5, x1: step + 0.5, y0: layer - 0.5, y1: layer + 0.5, line: { color: "#d55e00", width: 3 } }] },
    `${option.label} by step and layer`);
  });
}

/** Stacked bars of an attention mass: the key segments of the same queries as the map above, else of the first ones. */
function mass() {
  const option = run.maps[byId("signal").selectedIndex];
  const all = run.maps.filter((m) => /→/.test(m.name));
  const like = option && /→/.test(option.name) ? option : all[0];
  const queries = like && like.name.split(" → ").slice(0, -1).join(" → ");
  const parts = like ? all.filter((m) => m.variable === like.variable && m.name.startsWith(`${queries} → `)) : [];
  byId("mass-legend").replaceChildren(...parts.map((part) => {
    const name = part.name.split(" → ").pop();
    return legendItem(SEGMENT_COLOURS[name] || "#cc79a7", name);
  }));
  byId("mass-about").textContent = like ? `How ${like.variable} of the ${queries} rows divides, layer by layer.` : "";
  sides().forEach((side, k) => {
    const chart = byId(`mass-${k}`), held = side && like && side.maps[like.variable];
    if (!held || !held.values.length) return absent(chart, "Attention by segment was not recorded.", RECORDS.attention_mass);
    const step = last(side), [, layers, places] = held.shape, now = row(held, step);
    const traces = parts.map((part) => {
      const name = part.name.split(" → ").pop();
      const x = Array.from({ length: layers }, (_, l) => now[l * places + part.place]);
      return { type: "bar", orientation: "h", x, y: x.map((_, l) => l), name: literal(name), marker: { color: SEGMENT_COLOURS[name] || "#cc79a7" },
        hovertemplate: `layer %{y}<br>${literal(name)} %{x:.4~g}<extra></extra>` };
    });
    draw(chart, traces, { barmode: "stack", bargap: 0.2, height: Math.min(460, 80 + 26 * layers), margin: { l: 52, r: 24, t: 8, b: 46 }, showlegend: false,
      xaxis: axis("share of the attention", { range: [0, 1.001], dtick: 0.25, tickformat: ".0%" }),
      yaxis: counting("layer", layers, { range: [layers - 0.5, -0.5] }),
      shapes: [{ type: "rect", xref: "paper", x0: 0, x1: 1, y0: lastLayer(side) - 0.5, y1: lastLayer(side) + 0.5, line: { color: "#22222a", width: 1.5, dash: "dot" } }] },
    `share of attention by layer at step ${step}`);
  });
}

function tokens() {
  const name = run.importance.find((n) => sides().some((s) => s && s.importance[n]));
  byId("tokens-about").textContent = name ? `${name}: ${run.variables[name].about}. White: the token is gone.` : "";
  const present = sides().filter((s) => s && s.importance[name]).map((s) => s.importance[name]);
  const most = largest(present, null, 0.99);
  sides().forEach((side, k) => {
    const chart = byId(`tokens-${k}`), held = side && side.importance[name];
    if (!held || !held.values.length) return absent(chart, "Importance of visual tokens was not recorded.", RECORDS.visual_importance);
    const step = last(side), [, layers, n] = held.shape;
    const z = Array.from({ length: layers }, (_, l) => row(held, step, l));
    draw(chart, [{ type: "heatmap", z, zmin: 0, zmax: most > 0 ? most : 1, colorscale: "Viridis", ygap: 1, colorbar: bar(""),
      hovertemplate: "visual token %{x}, layer %{y}<br>%{z:.4~g}<extra></extra>" }],
    { height: Math.min(420, 90 + 24 * layers), xaxis: counting("visual token", n), yaxis: counting("layer", layers, { range: [layers - 0.5, -0.5] }),
      shapes: [across(lastLayer(side), n)] }, `importance of visual tokens by layer at step ${step}`);
  });
}

// ------------------------------------------------------------------ controls

const PANELS = [["picture-0", pictures], ["answer-0", answers], ["curves", curves], ["map-0", maps], ["mass-0", mass], ["tokens-0", tokens]];

function moved() {
  const steps = Number(byId("step").max), layers = Number(byId("layer").max);
  shown.step = Number(byId("step").value);
  shown.layer = Number(byId("layer").value);
  byId("step-said").textContent = `${shown.step} of 0–${steps}`;
  byId("layer-said").textContent = `${shown.layer} of 0–${layers}`;
  // a slider moves faster than charts are drawn: one panel per frame, those in sight first, and a later move starts anew
  const inSight = ([id]) => { const { top, bottom } = byId(id).getBoundingClientRect(); return bottom > 0 && top < innerHeight; };
  const queue = [...PANELS.filter(inSight), ...PANELS.filter((panel) => !inSight(panel))];
  const next = () => {
    queue.shift()[1]();
    if (queue.length) shown.frame = requestAnimationFrame(next);
    else document.body.dataset.drawn = `${shown.index} ${shown.step} ${shown.layer}`;
  };
  cancelAnimationFrame(shown.frame);
  shown.frame = requestAnimationFrame(next);
}

async function choose(i) {
  shown.index = i;
  byId("sample").selectedIndex = i;
  const sample = await unpack(i);
  if (shown.index !== i) return;
  shown.sample = sample;
  byId("previous").disabled = i === 0;
  byId("next").disabled = i === run.samples.length - 1;
  document.querySelectorAll("#samples tbody tr").forEach((line) => line.classList.toggle("chosen", Number(line.dataset.sample) === i));
  const ran = sample.sides.filter((s) => s && !s.failed && s.steps);
  byId("signals").hidden = !ran.length;
  // the first look is at the end of an answer and halfway up; whoever is at the end stays there
  const atEnd = !shown.looked || byId("step").value === byId("step").max;
  const before = { step: Number(byId("step").value), layer: Number(byId("layer").value) };
  byId("step").max = Math.max(0, ...ran.map((s) => s.steps - 1));
  byId("layer").max = Math.max(0, ...ran.map((s) => s.layers - 1));
  byId("step").disabled = byId("layer").disabled = !ran.length;
  byId("step").value = atEnd ? byId("step").max : before.step;
  byId("layer").value = shown.looked ? before.layer : Math.floor(byId("layer").max / 2);
  if (ran.length) shown.looked = true;
  said();
  if (ran.length) { fateLegend(); gridChoice(); moved(); }
  else {
    cancelAnimationFrame(shown.frame);
    byId("step-said").textContent = byId("layer-said").textContent = "–";
    document.body.dataset.drawn = `${i} failed`;
  }
}

function sort(heading) {
  const column = Number(heading.dataset.column), body = byId("samples").tBodies[0];
  const down = heading.getAttribute("aria-sort") === "ascending";
  document.querySelectorAll("#samples th").forEach((other) => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = ({ children: { [column]: cell } }) => {
    if (cell.dataset.value === undefined) return cell.textContent;
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  const lines = [...body.rows].map((tr) => [key(tr), tr]);
  // lines without a value stay at the end, whichever way the others go
  lines.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : down ? -compare(a, b) : compare(a, b)));
  body.append(...lines.map(([, tr]) => tr));
}

byId("signal").append(...run.maps.map((m) => element("option", "", m.label)));
byId("signal").selectedIndex = Math.max(run.maps.length ? 0 : -1, run.maps.findIndex((m) => /visual$/.test(m.name)));
if (run.traces.length === 1) document.querySelectorAll(".lanes").forEach((lanes) => lanes.classList.add("alone"));
byId("sample").addEventListener("change", (event) => choose(event.target.selectedIndex));
byId("previous").addEventListener("click", () => choose(shown.index - 1));
byId("next").addEventListener("click", () => choose(shown.index + 1));
for (const id of ["step", "layer"]) byId(id).addEventListener("input", moved);
byId("paint").addEventListener("change", pictures);
byId("signal").addEventListener("change", () => { maps(); mass(); });
byId("controls").addEventListener("submit", (event) => event.preventDefault());
document.querySelectorAll(".sort").forEach((button) => button.addEventListener("click", () => sort(button.closest("th"))));
document.querySelectorAll(".choose").forEach((button) => button.addEventListener("click", () => {
  choose(Number(button.dataset.sample));
  byId("controls").scrollIntoView();
}));
const first = run.samples.findIndex((s) => !s.failed);
if (run.samples.length) choose(Math.max(0, first));
