// What is not a device: the glance, service levels, models, decisions.

import { el, figure, fill, keyed, text } from "./dom.js";
import { ago, bytes, count, percent, replicaName, short } from "./format.js";

const GOOD = 0.99, FAIR = 0.9;
const ENDINGS = [["rejected", "refused"], ["failed", "failed"], ["timed_out", "timed out"], ["cancelled", "cancelled"]];
const grade = (share) => (share == null ? "" : share >= GOOD ? "good" : share >= FAIR ? "warn" : "bad");

export function showTiles(parent, { status, recent }) {
  const devices = status.nodes.flatMap((node) => node.devices);
  const sum = (of) => devices.reduce((total, device) => total + of(device), 0);
  const budget = sum((d) => d.budget_bytes), taken = sum((d) => d.budget_bytes - d.memory.free_bytes), used = sum((d) => d.memory.kv_used_bytes);
  const running = sum((d) => d.running), waiting = sum((d) => d.waiting), replicas = sum((d) => d.replicas.length), dead = sum((d) => d.dead_engines);
  const tallies = Object.values(recent.classes);
  const ended = tallies.reduce((n, one) => n + one.requests, 0), kept = tallies.reduce((n, one) => n + one.kept, 0);
  const share = ended ? kept / ended : null;
  const tiles = [
    ["taken", percent(budget ? taken / budget : null), `of ${bytes(budget)} budget taken, ${bytes(used)} by requests`, "", taken],
    ["running", String(running), `running, ${waiting} waiting in the replicas`, waiting ? "warn" : "", running],
    ["share", percent(share), ended ? `of ${count(ended, "request")} kept every target lately` : "no request has ended lately", grade(share), share],
    ["replicas", String(replicas), `${replicas === 1 ? "replica" : "replicas"} on ${count(devices.length, "device")}, ${dead} died`, "", replicas],
  ];
  keyed(parent, tiles, ([key]) => key, ([key]) => el("div", { "data-tile": key }, el("b"), el("span")), (node, [, value, what, look, exact]) => {
    figure(node.firstChild, value, exact);
    node.firstChild.className = look;
    text(node.lastChild, what);
  });
}

export function showAlerts(node, status) {
  const lines = status.absent_devices.map((one) => `${one.device} on ${short(one.node)}: no report for ${Math.floor(one.report_age_s)} s, counted as absent`);
  if (!status.nodes.length) lines.push("No memory agent has reported within 3 s.");
  if (!status.models) lines.push("The model registry is away; models are served without it.");
  for (const one of status.nodes.flatMap((n) => n.devices).flatMap((d) => d.replicas)) {
    if (one.conservation_failures) lines.push(`${replicaName(one.engine_id)}: its books and its memory differ (${one.conservation_failures})`);
  }
  text(node, lines.join("\n"));
  node.hidden = !lines.length;
}

export function showSlo(parent, heading, { status, recent }) {
  const classes = Object.entries(status.slo.classes);
  text(heading, classes.length ? `by class, last ${Math.round(recent.window_s)} s` : "");
  const rows = classes.length ? classes.map(([name, since]) => ({ name, since, now: recent.classes[name] })) : [null];
  keyed(parent, rows, (row) => row?.name ?? "", (row) => row ? makeClass(row.name) : el("p", { class: "nothing" }, "No request has ended yet."), (node, row) => row && updateClass(node, row));
}

function makeClass(name) {
  return el("div", { "data-class": name },
    el("span", { class: "share" }), el("span", { class: "name" }, el("b", {}, name), el("span")),
    el("div", { class: "bar" }), el("span", { class: "more" }));
}

function updateClass(node, { since, now }) {
  const share = node.querySelector(".share");
  figure(share, percent(now.attainment), since.kept);
  share.className = `share ${grade(now.attainment)}`;
  text(node.querySelector(".name span"), now.requests ? `${now.kept} of ${now.requests} kept every target` : "none ended lately");
  fill(node.querySelector(".bar"), now.requests ? [["keep", now.kept / now.requests], ["miss", 1 - now.kept / now.requests]] : []);
  const ends = ENDINGS.filter(([key]) => now[key]).map(([key, word]) => `${now[key]} ${word}`);
  text(node.querySelector(".more"), [...ends, `since the start ${percent(since.attainment)} of ${since.requests}`, `goodput ${(since.goodput_requests_per_s ?? 0).toFixed(2)}/s`].join(" · "));
  node.dataset.requests = since.requests;
}

export function showModels(parent, models) {
  if (!parent.firstChild) {
    const heads = ["model", "phase", "replicas", "held", "limit", "running", "waiting"].map((name) => el("th", { scope: "col" }, name));
    parent.append(el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody")));
  }
  keyed(parent.querySelector("tbody"), models ?? [], (one) => one.name, (one) => el("tr", { "data-model": one.name }, ...Array.from({ length: 7 }, () => el("td"))), (row, one) => {
    const sizes = one.elastic ? [bytes(one.held_bytes), bytes(one.limit_bytes), one.running, one.waiting] : ["static", "", "", ""];
    const cells = [one.name, one.phase, one.replicas ?? "", ...("replicas" in one ? sizes : ["", "", "", ""])];
    cells.forEach((value, at) => text(row.children[at], value));
    row.children[1].className = one.phase === "serving" ? "good" : "warn";
    row.title = one.error ?? one.progress ?? "";
  });
}

export function showDecisions(parent, decisions) {
  const now = Date.now() / 1000;
  // A decision has no number: when it was made, to a second, and what it says tell it apart.
  const key = (one) => `${one.kind} ${one.subject} ${one.action} ${one.reason} ${JSON.stringify(one.inputs)}`;
  const seen = new Set();
  const told = decisions.filter((one) => !seen.has(key(one)) && seen.add(key(one)));
  const rows = told.length ? told : [null];
  keyed(parent, rows, (one) => (one ? key(one) : ""), (one) => (one ? makeDecision(one) : el("li", {}, "The controller has decided nothing yet.")), (node, one) => {
    if (!one) return;
    const time = node.querySelector("time");
    text(time, ago(one.age_s));
    time.dateTime ||= new Date((now - one.age_s) * 1000).toISOString();
  });
}

function makeDecision(one) {
  const inputs = Object.entries(one.inputs).map(([name, value]) => `${name} ${typeof value === "number" ? Number(value.toPrecision(4)) : value}`);
  const item = el("li", { "data-kind": one.kind },
    el("div", { class: "head" }, el("span", { class: "badge" }, one.kind), el("b", {}, replicaName(one.subject)), el("time")),
    el("div", {}, one.action), el("div", { class: "why" }, `because ${one.reason}`));
  if (inputs.length) item.append(el("details", {}, el("summary", {}, "what it saw"), inputs.join(", ")));
  return item;
}
