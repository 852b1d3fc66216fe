// The live page: draws the monitor's state (api/state, pushed through api/events) and posts acknowledgements. It decides nothing.
"use strict";

const $ = (selector, from = document) => from.querySelector(selector);
const SVG = "http://www.w3.org/2000/svg";

const TITLES = {
  healthy: "Healthy",
  warming_up: "Warming up",
  demand_shift: "Healthy, but asked for other classes",
  mode_dropping: "Modes are being dropped",
  off_manifold: "Samples unlike the real data",
  within_mode_collapse: "Collapse within modes",
  memorisation: "Training data come back",
  latent_fault: "Wrong or repeating latents",
  quality_outside_tolerance: "Quality outside tolerance",
  world_moved: "The data have moved",
  drift: "Drift",
  wrong_model: "Not the certified model",
};
const QUIET = ["healthy", "warming_up", "demand_shift"]; // no alarms
const SHAPES = { // told apart without colour
  good: '<circle cx="24" cy="24" r="20" fill="none" stroke="currentColor" stroke-width="4"/><path d="m15 25 6.500 6.500L33.500 18" fill="none" stroke="currentColor" stroke-width="4.500" stroke-linecap="round" stroke-linejoin="round"/>',
  wait: '<circle cx="24" cy="24" r="20" fill="none" stroke="currentColor" stroke-width="4" stroke-dasharray="5.500 7"/><path d="M24 13v11l7 5" fill="none" stroke="currentColor" stroke-width="4" stroke-linecap="round" stroke-linejoin="round"/>',
  alarm: '<path d="M24 4.500 45 42H3Z" fill="currentColor" stroke="currentColor" stroke-width="4" stroke-linejoin="round"/><path d="M24 17v12.500" stroke="var(--card)" stroke-width="4.500" stroke-linecap="round"/><circle cx="24" cy="36.500" r="2.700" fill="var(--card)"/>',
  stale: '<rect x="5" y="5" width="38" height="38" rx="9" fill="none" stroke="currentColor" stroke-width="4"/><path d="M18 17v14M30 17v14" stroke="currentColor" stroke-width="4.500" stroke-linecap="round"/>',
};
const GAUGES = {
  js: ["Jensen-Shannon", "distance of the mode shares, 0 to log 2"],
  forward_kl: ["Forward KL", "rises when real modes are missing"],
  reverse_kl: ["Reverse KL", "rises with samples no real data looks like"],
  chi_squared: ["χ²", "rises with any change of the mode shares"],
  tv: ["Total variation", "share of samples that would have to move"],
  mode_coverage: ["Mode coverage", "modes that come at a quarter of their real share or more"],
  off_manifold: ["Off-manifold", "samples unlike any real data"],
  frechet: ["Fréchet distance", "of the features' means and covariances"],
  mmd: ["MMD", "random-feature kernel, sees any change of the features"],
  kid: ["KID", "polynomial kernel, unbiased; may be negative"],
  sliced_wasserstein: ["Sliced Wasserstein", "how far the features must move, on average"],
  precision: ["Precision", "samples within reach of real data"],
  recall: ["Recall", "real data within reach of samples"],
  density: ["Density", "real neighbourhoods a sample lies in; 1 is right"],
  coverage: ["Coverage", "real data with a sample nearby; 1 is right"],
  intrinsic_dimension: ["Intrinsic dimension", "directions in which samples vary"],
};
const MORE = ["mmd", "kid", "sliced_wasserstein", "precision", "recall", "density", "coverage", "intrinsic_dimension"]; // shown when asked for
const RATIOS = ["mode_coverage", "off_manifold", "tv", "precision", "recall"];
const INTERVALS = {
  exact: "The interval is exact: it holds in finite samples, at every moment of its block at once.",
  asymptotic: "The interval holds at every moment at once, for large numbers of samples.",
  pointwise: "The interval holds at any one moment, not at all of them at once.",
  none: "Nobody has derived an interval for this figure, or too few samples have come for one.",
};
const SPANS = { "5 min": 300, "15 min": 900, "1 h": 3600 };
const HISTORY = 3600;

let state = null, chosen = null, span = 900, pointed = null, histories = {}, charts = {}, tabsKey = "", incidentsKey = "";

// ---- words and numbers

const count = n => Math.round(n).toLocaleString("en-US");
const clock = t => new Date(t * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
const percent = x => x == null ? "–" : `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)} %`;
const number = x => x == null ? "–" : x === 0 ? "0" : Math.abs(x) >= 1e4 || Math.abs(x) < 1e-4 ? x.toExponential(1) : String(+x.toPrecision(3));
const big = new Intl.NumberFormat("en-US", { notation: "compact", compactDisplay: "long", maximumFractionDigits: 1 });
const ago = seconds => seconds < 1.5 ? "now" : seconds < 90 ? `${Math.round(seconds)} s ago` : seconds < 5400 ? `${Math.round(seconds / 60)} min ago` : `${Math.round(seconds / 3600)} h ago`;
const title = (id, modes) => {
  const named = modes.length > 6 ? `${modes.slice(0, 5).join(", ")} and ${modes.length - 5} more` : [modes.slice(0, -1).join(", "), modes.at(-1)].filter(Boolean).join(" and ");
  if (id === "mode_dropping" && named) return `${modes.length === 1 ? "Mode" : "Modes"} ${named} ${modes.length === 1 ? "is" : "are"} being dropped`;
  return (TITLES[id] || id.replaceAll("_", " ")) + (named ? `: ${named}` : "");
};
const replayed = ({ checked, mismatched, suspect }) => !checked ? "" : suspect && mismatched ? `certified samples come back different: ${count(mismatched)} of ${count(checked)}`
  : `certified samples come back as certified, ${count(checked)} compared` + (mismatched ? `; ${count(mismatched)} once differed` : "");
const rerun = ({ checked, mismatched, latents, latents_wrong: wrong }) => [
  checked && `${mismatched ? `${count(mismatched)} of ${count(checked)}` : `none of ${count(checked)}`} served samples came out different on the certified generator`,
  latents && `${wrong ? `${count(wrong)} of ${count(latents)}` : `none of ${count(latents)}`} latents were not those of their seed`,
].filter(Boolean).join("; ");
const pace = rate => rate < 99.5 ? number(rate) : count(rate);
const howLong = seconds => { // in the largest unit of which there are two or more
  const [name, size] = [["years", 31536000], ["months", 2592000], ["days", 86400], ["hours", 3600], ["minutes", 60]].find(([, size]) => seconds >= 2 * size) ?? ["seconds", 1];
  const n = seconds / size;
  return `${n < 9.95 ? +n.toFixed(1) : big.format(Math.round(n))} ${name}`;
};
const falseAlarms = ({ tested_rate: rate, false_alarm_seconds: seconds, untested, snapshot: { arl, slack } }) => [
  slack == null ? `at most one in ${big.format(arl)} fresh samples, on average` : `about one in ${big.format(arl)} fresh samples, as simulated runs of this version show`,
  state.budget.seconds != null && `that is in ${howLong(state.budget.seconds)}, as at most ${pace(state.budget.test_rate)} a second are tested`,
  seconds != null && `at the last hour's ${pace(rate)} a second, in ${howLong(seconds)}`,
  untested > 0 && `${count(untested)} were beyond what is tested`,
  "those of the replay audit come besides",
].filter(Boolean).join("; ");
const budget = ({ version, budget_share: share, other_versions: others, snapshot: { budget: { families } } }) =>
  [`${percent(share)} for ${version}`, ...others.map(other => `${percent(other.budget_share)} for ${other.version}`)].join(", ")
  + `; of that ${Object.entries(families).map(([name, { null: hypothesis, weight }]) => `${percent(weight)} ${name}${hypothesis === "B" ? " (null B)" : ""}`).join(", ")}`;
const covered = ({ real, covered, certainly_covered: sure, certainly_dropped: gone, unwatched }) =>
  `${count(covered)} of ${count(real)} covered: ${count(sure)} certainly, ${count(gone)} certainly dropped` + (unwatched ? `; ${count(unwatched)} unwatched, their loss would hardly be seen` : "");
const code = words => words.split("`").map((part, i) => i % 2 ? element("code", {}, part) : part);
const tone = model => {
  const id = model.snapshot.verdict.id;
  if (!QUIET.includes(id)) return "alarm";
  return model.stale ? "stale" : id === "warming_up" ? "wait" : "good";
};
const shape = name => `<svg viewBox="0 0 48 48" role="img">${SHAPES[name]}</svg>`; // constant markup; everything from outside goes in as text

function element(name, attributes = {}, ...children) {
  const node = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value != null) node.setAttribute(key, value);
  node.append(...children.filter(child => child != null));
  return node;
}

// Text is set only where it changes, so that nothing is read aloud, or loses its tooltip, once a second.
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// ---- the stream

function listen() {
  const events = new EventSource("api/events");
  events.addEventListener("state", event => { connected(true); take(JSON.parse(event.data)); });
  events.onerror = () => {
    connected(false);
    if (events.readyState === EventSource.CLOSED) setTimeout(listen, 2000); // the browser gives up on an answer that is no stream
  };
}

function connected(yes) {
  $("#lost").hidden = yes || !state;
  document.body.classList.toggle("lost", !yes);
  $("#link span").textContent = yes ? "live" : "not connected";
  if (!yes && state) $("#lost b").textContent = clock(state.now);
}

// The first event carries the whole history, every later one only its new points.
function take(next) {
  if (state && next.now < state.now - 1) histories = {}; // the clock was set back
  for (const [name, model] of Object.entries(next.models)) {
    const kept = histories[name] ||= { t: [], js: [], js_low: [], js_high: [], log10_e: [] };
    const from = model.history.t.findIndex(t => !kept.t.length || t > kept.t.at(-1));
    if (from >= 0) for (const column of Object.keys(kept)) kept[column].push(...model.history[column].slice(from));
    for (const column of Object.keys(kept)) kept[column].splice(0, kept[column].length - HISTORY);
  }
  state = next;
  draw();
}

// ---- drawing

function draw() {
  const names = Object.keys(state.models);
  if (!names.includes(chosen)) chosen = names.includes(decodeURIComponent(location.hash.slice(1))) ? decodeURIComponent(location.hash.slice(1)) : names[0] ?? null;
  const list = $("#errors");
  list.hidden = !state.errors.length;
  list.replaceChildren(...state.errors.map(words => element("li", {}, words)));
  const { replicas, last_heartbeat_at: heard, received, dropped, skipped } = state.tap;
  $("#traffic").textContent = heard == null ? "no replica has reported yet"
    : `${count(replicas)} ${replicas === 1 ? "replica" : "replicas"} · heard ${ago(state.now - heard)} · ${count(received)} samples received` + (dropped ? ` · ${count(dropped)} lost by the tap` : "") + (skipped ? ` · ${count(skipped)} beyond the tap's budget` : "");
  drawTabs(names);
  $("#watch").hidden = chosen === null;
  $("#empty").hidden = chosen !== null;
  if (chosen === null) return drawEmpty();
  const model = state.models[chosen];
  drawVerdict(model);
  drawGauges(model.snapshot);
  refreshIncidents();
  if (!$("#watch").clientWidth) return; // a window on its way to another size: the resize draws again
  drawCharts(model);
  drawModes(model.snapshot);
}

function drawTabs(names) {
  const key = JSON.stringify([chosen, names.map(name => [name, tone(state.models[name])])]);
  if (key === tabsKey) return;
  tabsKey = key;
  $("#models").replaceChildren(...(names.length < 2 ? [] : names.map(name => {
    const tab = element("button", { role: "tab", "aria-selected": name === chosen });
    const kind = tone(state.models[name]);
    if (kind !== "good") { tab.innerHTML = shape(kind); tab.firstChild.style.color = { alarm: "var(--red)", stale: "var(--amber)", wait: "var(--grey)" }[kind]; }
    tab.append(name);
    tab.onclick = () => { chosen = name; location.hash = encodeURIComponent(name); incidentsKey = ""; pointed = null; showSamples(); draw(); };
    return tab;
  })));
}

function drawEmpty() {
  $("#empty h2").textContent = "No model to watch yet";
  $("#empty p").textContent = state.errors.length ? "The registry names a version that could not be loaded; the reason stands above."
    : "The monitor is running and follows the registry. As soon as a version is promoted, its verdict appears here.";
  $("#empty pre").textContent = "ganwatch promote VERSION --model MODEL\nganwatch sample --model MODEL";
  document.title = "ganwatch";
}

function drawVerdict(model) {
  const { verdict, monitored, detectable } = model.snapshot, kind = tone(model), banner = $("#verdict");
  banner.className = kind;
  banner.dataset.verdict = verdict.id;
  banner.dataset.stale = model.stale;
  if (banner.dataset.shape !== kind) { $(".shape").innerHTML = shape(kind); banner.dataset.shape = kind; }
  const silent = model.stale ? (model.last_fresh_at == null ? "no independent sample has arrived yet" : `no independent sample since ${clock(model.last_fresh_at)}`) : "";
  const since = kind === "alarm" && verdict.since != null ? `since ${clock(verdict.since)}` : "";
  $(".kind", banner).textContent = [{ good: "No alarm", wait: "No alarm yet", alarm: "Alarm", stale: "Stale" }[kind], since, silent].filter(Boolean).join(" · ");
  say($("h2", banner), title(verdict.id, verdict.modes));
  say($(".words", banner), verdict.words);
  const advice = kind === "stale" ? "No independent sample reaches the monitor. Check that serving answers, that its tap points here and that probes are on; the last verdict stands until samples come."
    : verdict.advice;
  $(".advice", banner).replaceChildren(...(advice ? [element("b", {}, "What to do: "), ...code(advice)] : []));
  const button = $("#acknowledge");
  button.hidden = kind !== "alarm";
  button.onclick = () => acknowledge(chosen, button);
  const card = model.card, facts = [
    ["Model", [chosen]],
    ["Version", [`${model.version} `, element("span", { class: "chip" }, model.alias), card.fault ? " " : null, card.fault ? element("span", { class: "chip fault" }, `injected: ${card.fault}`) : null]],
    ["Monitored", [`${count(monitored)} fresh samples`]],
    ["Sensitivity", [detectable]],
    ["Replay audit", [replayed(model.snapshot.replay)]],
    ["Run again", [rerun(model.snapshot.rerun)]],
    ["Rejected", [Object.entries(model.snapshot.rejected).filter(([, n]) => n).map(([reason, n]) => `${count(n)} samples: ${reason}`).join(", ")]],
    ["False alarms", [falseAlarms(model)]],
    ["Budget", [budget(model)]],
    ["Modes", [covered(model.snapshot.coverage)]],
    ...model.other_versions.flatMap(other => [[other.alias, [`${other.version}: ${title(other.verdict.id, other.verdict.modes)}, ${count(other.monitored)} samples`]],
      [`${other.alias} compared`, [other.comparison?.words]]]),
  ];
  if (card.forced) facts.push(["Forced", [card.forced]]);
  if (model.forced_promotion) facts.push(["Promoted by force", [model.forced_promotion]]);
  $(".facts").replaceChildren(...facts.filter(([, value]) => value[0]).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, ...value)]));
  document.title = `${kind === "alarm" ? "▲ " : ""}${title(verdict.id, verdict.modes)} · ${chosen} · ganwatch`;
  const color = getComputedStyle(banner).getPropertyValue("--tone").trim();
  const icon = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 48 48">${SHAPES[kind].replaceAll("currentColor", color).replaceAll("var(--card)", "#fff")}</svg>`;
  $("#icon").href = `data:image/svg+xml,${encodeURIComponent(icon)}`;
  const vectors = model.sample_shape.length === 1;
  $("#samples img").className = vectors ? "smooth" : "";
  $("#samples .hint").textContent = model.last_sample_at == null ? "No sample has been served yet."
    : `${vectors ? "The newest samples, in the plane" : "The newest 64 samples, newest first"}, ${ago(state.now - model.last_sample_at)}.`;
}

// ---- charts

function drawCharts(model) {
  const kept = histories[chosen], threshold = model.history.threshold, limit = model.history.log10_threshold;
  const certified = model.snapshot.tolerance?.js?.certified ?? null;
  const start = Math.max(state.now - span, Math.min(kept.t[0] ?? state.now, state.now - 60));
  const first = kept.t.findIndex(t => t >= start), cut = column => first < 0 ? [] : kept[column].slice(first);
  const flat = value => cut("t").map(() => value ?? null);
  const context = { start, end: state.now, marks: model.marks.filter(mark => mark.t >= start) };
  const js = cut("js"), most = Math.max(threshold ?? 0, ...js), top = Math.max(1.5 * (threshold ?? 0), 1.3 * most, Math.min(1.05 * Math.max(...cut("js_high"), 0), 1.8 * most), 1e-3);
  chart("divergence", { ...context, low: 0, top, data: [cut("t"), js, cut("js_low"), cut("js_high"), flat(certified), flat(threshold)] });
  const e = cut("log10_e"), peak = Math.max(limit ?? 1, ...e);
  chart("evidence", { ...context, low: Math.min(0, Math.max(-3, Math.min(...e.filter(v => v != null), 0))), top: 1.18 * Math.min(peak, 2 * (limit ?? peak)), data: [cut("t"), e, flat(limit)] });
}

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const LINES = {
  divergence: () => [
    { label: "now", stroke: css("--blue"), width: 2, legend: "", at: true },
    { label: "low", width: 0, stroke: "transparent" },
    { label: "high", width: 0, stroke: "transparent" },
    { label: "certified", stroke: css("--green"), width: 1.5, dash: [2, 4], legend: "dot", at: true },
    { label: "tolerated", stroke: css("--red"), width: 1.5, dash: [7, 5], legend: "dash", at: true },
  ],
  evidence: () => [
    { label: "log₁₀ e", stroke: css("--blue"), width: 2, legend: "", at: true, fill: css("--band") },
    { label: "alarm at", stroke: css("--red"), width: 1.5, dash: [7, 5], legend: "dash", at: true },
  ],
};

function chart(id, view) {
  const place = $(`#${id} .plot`), known = charts[id];
  if (known && known.plot.width === place.clientWidth && known.plot.height === place.clientHeight) {
    known.view = view;
    known.plot.setData(view.data, false);
    known.plot.batch(() => { known.plot.setScale("x", { min: view.start, max: view.end }); known.plot.setScale("y", { min: view.low, max: view.top }); });
    return legend(id, known.plot.cursor.idx);
  }
  known?.plot.destroy();
  const entry = charts[id] = { view }, lines = LINES[id]();
  const axis = { stroke: css("--soft"), font: `12px ${getComputedStyle(document.body).fontFamily}`, ticks: { show: false } };
  entry.plot = new uPlot({
    width: place.clientWidth, height: place.clientHeight, legend: { show: false }, padding: [10, 24, 0, 0],
    cursor: { y: false, points: { size: 7 }, drag: { x: false, y: false }, sync: { key: "time" } },
    scales: { x: { time: true, range: () => [entry.view.start, entry.view.end] }, y: { range: () => [entry.view.low, entry.view.top] } },
    axes: [
      { ...axis, grid: { show: false }, space: 90, size: 28, values: (_, ticks, __, ___, step) => ticks.map(t => step >= 60 ? clock(t).slice(0, 5) : clock(t)) },
      { ...axis, grid: { stroke: css("--grid"), width: 1 }, size: 54, space: 34, values: (_, ticks) => ticks.map(number) },
    ],
    series: [{}, ...lines.map(line => ({ ...line, points: { show: false }, spanGaps: false }))],
    bands: id === "divergence" ? [{ series: [3, 2], fill: css("--band") }] : [],
    hooks: { draw: [plot => annotate(plot, entry.view, id)], setCursor: [plot => legend(id, plot.cursor.idx)] },
  }, view.data, place);
  legend(id, null);
}

// The values under the cursor, or the newest.
function legend(id, index) {
  const { plot, view } = charts[id] ?? {};
  if (!plot) return;
  const i = index ?? view.data[0].length - 1;
  $(`#${id} .legend`).replaceChildren(...LINES[id]().flatMap((line, k) => {
    if (!line.at) return [];
    const value = view.data[k + 1][i], swatch = element("i", { class: line.legend, style: `border-color: ${line.stroke}` });
    const label = k === 0 && index != null ? clock(view.data[0][i]) : line.label;
    const interval = id === "divergence" && k === 0 && view.data[2][i] != null && view.data[3][i] != null ? ` (${number(view.data[2][i])} to ${number(view.data[3][i])})` : "";
    return [element("span", {}, swatch, `${label} `, element("b", {}, number(value)), interval)];
  }));
}

function annotate(plot, view, id) {
  const { ctx, bbox } = plot, ratio = devicePixelRatio;
  ctx.save();
  ctx.font = `${12 * ratio}px ${getComputedStyle(document.body).fontFamily}`;
  ctx.textBaseline = "top";
  ctx.textAlign = "left";
  for (const mark of view.marks) {
    const x = Math.round(plot.valToPos(mark.t, "x", true)), alarm = mark.kind === "alarm";
    ctx.strokeStyle = css(alarm ? "--red" : "--soft");
    ctx.lineWidth = ratio;
    ctx.setLineDash(alarm ? [] : [3 * ratio, 3 * ratio]);
    ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
  }
  const taken = []; // labels that would overlap are left out, an alarm's last; the line stays
  for (const mark of [...view.marks].sort((a, b) => (b.kind === "alarm") - (a.kind === "alarm") || b.t - a.t)) {
    const alarm = mark.kind === "alarm", words = alarm ? "▲ alarm" : mark.text.replace(/^\w+: /, "").replace(" (forced)", " by force").replace(/ \(.*/, "");
    const x = plot.valToPos(mark.t, "x", true), width = ctx.measureText(words).width, gap = 5 * ratio;
    const crowded = left => left < bbox.left || left + width > bbox.left + bbox.width || taken.some(([a, b]) => left < b + gap && left + width > a - gap);
    const left = [x + gap, x - gap - width].find(place => !crowded(place));
    if (left === undefined) continue;
    taken.push([left, left + width]);
    ctx.fillStyle = css("--card");
    ctx.fillRect(left - 2 * ratio, bbox.top, width + 4 * ratio, 16 * ratio);
    ctx.fillStyle = css(alarm ? "--red" : "--soft");
    ctx.fillText(words, left, bbox.top + 2 * ratio);
  }
  if (id === "evidence" && view.data[2].length) {
    const y = plot.valToPos(view.data[2].at(-1), "y", true);
    ctx.fillStyle = css("--red");
    ctx.fillText("alarm when it reaches here", bbox.left + 6 * ratio, y + 5 * ratio);
  }
  ctx.restore();
}

// ---- modes

function drawModes(snapshot) {
  const place = $("#modes .bars"), width = place.clientWidth, cells = snapshot.modes, alarmed = cells.filter(cell => cell.status === "alarmed");
  $("#modes .legend").replaceChildren(
    element("span", {}, element("i", { class: "box", style: "background: var(--blue)" }), "served, with interval"),
    element("span", {}, element("i", { style: "border-color: var(--ink)" }), "real data"),
    ...(alarmed.length ? [element("span", {}, element("i", { class: "box", style: "background: var(--red)" }), "▲ named by the alarm")] : []),
  );
  const coverage = snapshot.gauges.fresh.mode_coverage;
  $("#modes .hint").textContent = cells[pointed] ? describe(cells[pointed]) : coverage.value == null ? "Bars appear with the first fresh samples."
    : `${percent(coverage.value)} of the modes come at a quarter of their real share or more, ${percent(coverage.low)} certainly. The last bar counts samples unlike any real data.`;
  const left = 44, top = 18, bar = 160, gap = 14, slot = Math.max(width - left - gap, 0) / cells.length; // a window on its way to another size can be narrower than the axis
  const highest = Math.max(...cells.flatMap(cell => [cell.reference, cell.served ?? 0, Math.min(cell.high ?? 0, 1.6 * Math.max(cell.reference, cell.served ?? 0))]), 1e-6);
  const step = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1].find(s => highest / s <= 4) ?? 1;
  const y = value => top + bar * (1 - Math.min(value / highest, 1));
  const label = cell => cell === cells.at(-1) && 7 * cell.name.length > slot + gap ? "off" : cell.name;
  const longest = Math.max(...cells.slice(0, -1).map(cell => cell.name.length)) * 7, tilt = longest > slot - 4, every = Math.ceil((tilt ? 15 : 0) / slot) || 1;
  const height = top + bar + (tilt ? Math.min(longest, 90) * 0.75 + 18 : 24);
  const node = (name, attributes, ...children) => element(`svg:${name}`, attributes, ...children);
  const picture = node("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "Share of each mode, served against the real data" });
  for (let value = 0; value <= highest * 1.001; value += step) picture.append(
    node("line", { class: "grid", x1: left, x2: width, y1: y(value), y2: y(value) }),
    node("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, step < 0.01 ? `${(100 * value).toFixed(1)}%` : `${Math.round(100 * value)}%`));
  cells.forEach((cell, i) => {
    const off = i === cells.length - 1, middle = left + slot * (i + 0.5) + (off ? gap : 0), half = Math.min(slot * 0.34, 30);
    const group = node("g", { class: `${cell.status} ${off ? "off" : ""} ${i === pointed ? "pointed" : ""}` });
    if (cell.served != null) group.append(node("rect", { class: "served", x: middle - half, width: 2 * half, y: y(cell.served), height: Math.max(top + bar - y(cell.served), 0.5), rx: 2 }));
    if (cell.low != null && cell.high != null) group.append(node("path", { class: "whisker",
      d: `M${middle} ${y(cell.low)}V${y(cell.high)}M${middle - 4} ${y(cell.low)}h8M${middle - 4} ${y(cell.high)}h8` }));
    group.append(node("line", { class: "real", x1: middle - half - 4, x2: middle + half + 4, y1: y(cell.reference), y2: y(cell.reference) }));
    if (cell.status === "alarmed") group.append(node("path", { class: "flag", d: `M${middle} ${top - 13}l6.500 11h-13Z` }));
    if (i % every === 0 || off || cell.status === "alarmed") group.append(node("text", tilt
      ? { x: 0, y: 0, transform: `translate(${middle + 4} ${top + bar + 14}) rotate(-40)`, "text-anchor": "end" }
      : { x: middle, y: top + bar + 18, "text-anchor": "middle" }, label(cell)));
    picture.append(group);
  });
  place.replaceChildren(picture);
  place.onpointermove = event => point(Math.floor((event.clientX - place.getBoundingClientRect().left - left) / slot));
  place.onpointerleave = () => point(null);
}

function point(cell) {
  if (cell === pointed) return;
  pointed = cell;
  if (state.models[chosen]) drawModes(state.models[chosen].snapshot);
}

const describe = cell => `${cell.name}: served ${percent(cell.served)}${cell.low == null ? "" : ` (${percent(cell.low)} to ${percent(cell.high)})`}, `
  + `real data ${percent(cell.reference)}, certified ${percent(cell.certified)}; ${cell.status}`;

// ---- gauges, incidents, samples

function drawGauges(snapshot) {
  const { fresh, recent, served } = snapshot.gauges, body = $("#gauges tbody"), names = Object.keys(GAUGES).filter(name => fresh[name]);
  if (body.children.length !== names.length) body.replaceChildren(...names.map(name => element("tr", { id: `gauge-${name}` },
    element("td", {}, GAUGES[name][0], element("small", {}, GAUGES[name][1])),
    element("td", {}, element("span"), element("small", { title: "What as many samples of the real data itself would read" })),
    element("td", { class: "soft" }, element("span"), element("small", {}, element("abbr", { title: "" }))),
    ...Array.from({ length: 4 }, () => element("td", { class: "wide soft" })))));
  for (const name of names) {
    const gauge = fresh[name], limits = snapshot.tolerance[name] ?? {}, show = RATIOS.includes(name) ? percent : number;
    const row = $(`#gauge-${name}`), [, value, interval, now, certified, tolerated, asServed] = row.children, ci = $("abbr", row);
    row.className = (gauge.value != null && limits.threshold != null && gauge.value > limits.threshold ? "over" : "") + (MORE.includes(name) ? " more" : "");
    say(value.firstChild, show(gauge.value));
    say(value.lastChild, gauge.floor == null ? "" : `real data ${show(gauge.floor)}`);
    say(now, show(recent[name]?.value));
    now.title = recent[name]?.low == null ? "" : `${show(recent[name].low)} to ${recent[name].high == null ? "∞" : show(recent[name].high)}, ${recent[name].ci}`;
    say(interval.firstChild, gauge.low == null && gauge.high == null ? "–" : `${show(gauge.low)} to ${gauge.high == null ? "∞" : show(gauge.high)}`);
    say(ci, gauge.ci === "none" ? "no interval" : gauge.ci);
    ci.title = gauge.value == null ? "No fresh sample has been seen yet." : INTERVALS[gauge.ci];
    say(certified, show(limits.certified));
    say(tolerated, show(limits.threshold));
    say(asServed, show(served[name]?.value));
  }
  const n = population => count(snapshot.gauges[population].js.n);
  say($("#gauges .hint"), `${n("fresh")} fresh samples, ${n("served")} as served`);
}

$("#gauges button").onclick = ({ target }) => {
  const all = $("#gauges table").classList.toggle("all");
  target.setAttribute("aria-expanded", all);
  target.textContent = all ? "Fewer gauges" : "More gauges";
};

async function refreshIncidents() {
  const key = JSON.stringify(Object.values(state.models).map(model => [model.version, model.snapshot.verdict.id, model.snapshot.verdict.modes, model.marks.length]));
  if (key === incidentsKey) return;
  incidentsKey = key;
  try {
    const { incidents } = await (await fetch("api/incidents")).json();
    const mine = incidents.filter(incident => incident.model === chosen);
    $("#incidents ol").replaceChildren(...(mine.length ? mine.map(incident) : [element("li", { class: "none" }, "No alarm has been raised for this model.")]));
  } catch { incidentsKey = ""; } // the stream will say when the monitor is back
}

function incident(record) {
  const open = record.closed_at == null, date = new Date(record.opened_at * 1000).toLocaleDateString("en-CA");
  const item = element("li", { class: open ? "open" : "closed" }), what = element("div", { class: "what" });
  what.innerHTML = shape(open ? "alarm" : "good");
  what.append(title(record.verdict, record.modes));
  const end = open ? "still open" : `${{ acknowledged: "acknowledged", "version change": "ended by a change of version" }[record.closed_by]} ${clock(record.closed_at)}`;
  if (record.evidence.action) what.append(element("span", { class: "chip" }, `acted: ${record.evidence.action}`));
  item.append(what, element("div", { class: "when" }, `${record.version} · ${date} ${clock(record.opened_at)} · at sample ${count(record.first_alarm)} · ${end}`));
  if (open) {
    const button = element("button", {}, "Acknowledge");
    button.onclick = () => acknowledge(record.model, button);
    item.append(button);
  }
  return item;
}

async function acknowledge(model, button) {
  button.disabled = true;
  try {
    const answer = await fetch("api/ack", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ model }) });
    if (!answer.ok) alert((await answer.json()).error.message);
  } finally {
    button.disabled = false;
    incidentsKey = "";
  }
}

let pictured = null;
function showSamples() {
  const model = state?.models[chosen], image = $("#samples img");
  if (!model || model.last_sample_at == null) { image.removeAttribute("src"); pictured = null; return; }
  const key = `${encodeURIComponent(chosen)}.png?version=${encodeURIComponent(model.version)}&t=${model.last_sample_at}`;
  if (key === pictured || document.hidden) return;
  pictured = key;
  const next = new Image(); // swapped in when complete, so that nothing flickers
  next.onload = () => { if (pictured === key) image.src = next.src; };
  next.src = `api/samples/${key}`;
}

$(".spans").append(...Object.entries(SPANS).map(([label, seconds]) => {
  const button = element("button", { "aria-pressed": seconds === span }, label);
  button.onclick = () => {
    span = seconds;
    for (const other of $(".spans").children) other.setAttribute("aria-pressed", other === button);
    draw();
  };
  return button;
}));

const redraw = () => {
  for (const { plot } of Object.values(charts)) plot.destroy();
  charts = {};
  if (state) draw();
};
addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
setInterval(showSamples, 1000);
listen();
