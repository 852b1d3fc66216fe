// Training runs on the live page: where each stands, its curves, and what its diagnostics say (api/training, asked for every two seconds).
"use strict";

const RUN = { // state -> its shape, its colour, what it is called
  running: ["wait", "--blue", "training"],
  silent: ["stale", "--amber", "says nothing any more"],
  published: ["good", "--green", "published"],
  failed: ["alarm", "--red", "not published"],
  interrupted: ["stale", "--grey", "interrupted"],
};
const STAGES = { begin: "starts", ray: "reads its data", train: "trains", finish: "makes its last steps, without a critic", certify: "counts samples to certify" };
const CURVES = { // of a run's history -> its name, what it tells, its highest value (null: whatever is largest), how it is written
  divergence: ["Divergence", "what the critic's loss on held-out data says; for most objectives JS in nats, log 2 at most", null, number],
  accuracy: ["Held-out accuracy", "pairs of a real and a generated sample that the critic puts in order; half is chance", 1, percent],
  mode_coverage: ["Modes covered", "modes of the data that come at a quarter of their real share or more", 1, percent],
};

const lasting = seconds => seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;

function where(run, now) {
  if (run.state === "published") return `${run.version}, ${ago(now - run.at)}${run.forced ? ", by force" : ""}`;
  if (run.state !== "running") return `${run.state === "silent" ? "last heard" : "ended"} ${ago(now - run.at)}, at step ${count(run.step)}${run.steps ? ` of ${count(run.steps)}` : ""}`;
  if (run.stage !== "train" || !run.step || run.step === run.steps) return STAGES[run.stage] ?? run.stage;
  return `step ${count(run.step)} of ${count(run.steps)}` + (run.seconds_left == null ? "" : `, ${lasting(run.seconds_left)} left`);
}

function curve(run, name) {
  const [label, meaning, ceiling, show] = CURVES[name], values = run.history[name], steps = run.history.step;
  const finite = values.filter(v => v != null), low = Math.min(0, ...finite), top = ceiling ?? Math.max(...finite, 1e-9);
  const x = step => 200 * step / (run.steps || steps.at(-1)), y = value => 44 - 40 * (value - low) / (top - low);
  const points = steps.flatMap((step, i) => values[i] == null ? [] : [`${x(step).toFixed(1)},${y(values[i]).toFixed(1)}`]).join(" ");
  return element("figure", { title: meaning }, element("figcaption", {}, `${label} `, element("b", {}, show(values.at(-1)))),
    element("svg:svg", { viewBox: "0 0 200 48", preserveAspectRatio: "none", role: "img", "aria-label": label },
      element("svg:path", { class: "grid", d: "M0 44H200M0 4H200" }), element("svg:polyline", { points })));
}

function runItem(run, now) {
  const [kind, colour, words] = RUN[run.state], item = element("li", { class: run.state, "data-run": run.run });
  const what = element("div", { class: "what" });
  what.innerHTML = shape(kind);
  what.firstChild.style.color = `var(${colour})`;
  what.append(run.model || run.run, element("span", { class: "chip" }, words), element("span", { class: "soft" }, where(run, now)));
  item.append(what, element("progress", { max: 1, value: run.progress, "aria-label": "Steps done" }));
  const found = run.state === "failed" ? [run.reason ?? "no reason was given"] : run.forced ? [run.forced] : Object.values(run.alarms);
  if (found.length) item.append(element("ul", { class: "found" }, ...found.flatMap(text => text.split("\n")).map(text => element("li", {}, text))));
  if (run.history.step.length > 1 && run.state !== "published") item.append(element("div", { class: "curves" }, ...Object.keys(CURVES).map(name => curve(run, name))));
  item.append(element("div", { class: "when" }, `${run.dataset}, ${run.run}`));
  return item;
}

let trained = "";
async function showTraining() {
  if (document.hidden) return;
  try {
    const { now, runs } = await (await fetch("api/training")).json();
    const key = JSON.stringify([runs, Math.round(now / (runs.some(run => run.state === "running") ? 1 : 30))]);
    if (key === trained) return;
    trained = key;
    $("#training").hidden = !runs.length;
    $("#training ol").replaceChildren(...runs.map(run => runItem(run, now)));
  } catch { trained = ""; } // the stream says that the monitor is gone, and when it is back
}
setInterval(showTraining, 2000);
showTraining();
