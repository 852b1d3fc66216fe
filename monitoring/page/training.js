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
const nats = x => `${number(x)} nats`, dimensions = x => `${number(x)} dimensions`;
const FIGURES = { // of a run -> its name, what it tells, how it is written
  critic_loss: ["Critic's loss", "without the penalty", number],
  generator_loss: ["Generator's loss", "of the last batch", number],
  penalty: ["Penalty", "what the critic pays for its slope", number],
  divergence: ["Divergence", CURVES.divergence[1], number],
  saturation: ["Saturation", "the divergence as a share of its largest value; where it has none, of log 2, the JS that the logits mean", percent],
  accuracy: ["Held-out accuracy", CURVES.accuracy[1], percent],
  overfitting: ["Critic's overfitting", "what that accuracy gains on training data", percent],
  mode_coverage: ["Modes covered", CURVES.mode_coverage[1], percent],
  missing_modes: ["Modes missing", "too seldom for chance to have left them out", count],
  modes: ["Modes of the data", "as diagnostics tell them apart", count],
  forward_kl: ["Forward KL", "of real from generated shares of the modes: rises when modes are dropped", nats],
  reverse_kl: ["Reverse KL", "of generated from real shares of the modes", nats],
  weight: ["Weight of a logit", "mean size of the derivative of the generator's loss by a logit; near 0 the gradient vanishes", number],
  gradient_norm: ["Gradient norm", "of the generator's loss by its weights", number],
  pull: ["Pull", "mean size of the derivative of the generator's loss by a sample", number],
  tail_index: ["Tail index", "Hill's, of those pulls: below 2 they have no variance, below 1 no mean; left out where they have no tail", number],
  signal_to_noise: ["Signal to noise", "squared mean of the pulls over its variance: below 1 a step is mostly chance", number],
  precision: ["Precision", "samples that lie among held-out data", percent],
  real_precision: ["Precision of real data", "what training data reach of that", percent],
  dimension: ["Samples fill", "intrinsic dimension of the generator's samples", dimensions],
  data_dimension: ["Data fill", "intrinsic dimension of the data", dimensions],
  latent_dimension: ["Latent's normals", "coordinates that fill a dimension each; signs fill none", count],
};
const unfolded = new Set(); // runs whose figures are shown, as the list is drawn anew each second

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

function figures(run) {
  const told = Object.keys(FIGURES).filter(name => name in run.figures);
  if (!told.length) return null;
  const fold = element("details", { open: unfolded.has(run.run) ? "" : null }, element("summary", {}, "All figures"), element("dl", {}, ...told.flatMap(name => {
    const [label, meaning, show] = FIGURES[name];
    return element("div", {}, element("dt", { title: meaning }, label), element("dd", {}, show(run.figures[name])));
  })));
  fold.ontoggle = () => fold.open ? unfolded.add(run.run) : unfolded.delete(run.run);
  return fold;
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
  item.append(figures(run) ?? "", element("div", { class: "when" }, `${run.dataset}, ${run.run}`));
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
    const focused = document.activeElement.closest("#training summary")?.closest("li").dataset.run;
    $("#training ol").replaceChildren(...runs.map(run => runItem(run, now)));
    if (focused) $(`#training [data-run="${CSS.escape(focused)}"] summary`)?.focus({ preventScroll: true });
  } catch { trained = ""; } // the stream says that the monitor is gone, and when it is back
}
setInterval(showTraining, 2000);
showTraining();
