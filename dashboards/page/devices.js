// Devices: memory by owner now and lately, and the replicas that share it.

import { Chart } from "./chart.js";
import { el, figure, fill, keyed, text } from "./dom.js";
import { bytes, count, replicaName, short } from "./format.js";

// [colour, name, key of `memory`]: these and no others sum to the budget.
const OWNERS = [
  ["used", "KV used", "kv_used_bytes"],
  ["cached", "KV cached", "kv_cached_bytes"],
  ["activations", "activations", "activation_bytes"],
  ["start", "starting", "start_bytes"],
  ["free", "free", "free_bytes"],
];
const BESIDE = [
  ["weights", "weights", "weights_bytes"],
  ["host", "host buffer", "host_buffer_bytes"],
];
export const LEVEL = { NORMAL: "good", ELEVATED: "warn", CRITICAL: "bad" };

export function showDevices(parent, status) {
  const devices = status.nodes.flatMap(({ node, devices }) => devices.map((device) => ({ node, ...device })));
  keyed(parent, devices, (device) => `${device.node} ${device.device}`, makeDevice, updateDevice);
}

function makeDevice(device) {
  const legend = el("ul", { class: "legend" });
  for (const [colour, name, key] of [...OWNERS, ...BESIDE]) {
    legend.append(el("li", {}, el("span", {}, el("i", { class: colour }), name), el("b", { "data-memory": key })));
  }
  const card = el("article", { class: "card", "data-device": `${device.node} ${device.device}`, "aria-label": `Device ${device.device}` },
    el("h3", {}, el("span", { class: "name" }), el("span", { class: "badge" }), el("small")),
    el("div", { class: "bar", role: "img" }), el("canvas", { role: "img", "aria-label": "Memory by owner over the last two minutes" }), legend, el("div", { class: "replicas" }));
  card.chart = new Chart(card.querySelector("canvas"));
  return card;
}

function updateDevice(card, device) {
  const { memory } = device;
  const total = Math.max(OWNERS.reduce((sum, [, , key]) => sum + memory[key], 0), 1);
  text(card.querySelector(".name"), `${device.device} on ${short(device.node)}`);
  level(card.querySelector(".badge"), device.pressure);
  text(card.querySelector("h3 small"), `${count(device.replicas.length, "replica")}, budget ${bytes(device.budget_bytes)}${device.dead_engines ? `, ${device.dead_engines} dead` : ""}`);
  const bar = card.querySelector(".bar");
  fill(bar, OWNERS.slice(0, -1).map(([colour, , key]) => [colour, memory[key] / total]));
  bar.setAttribute("aria-label", OWNERS.map(([, name, key]) => `${name} ${bytes(memory[key])}`).join(", "));
  for (const [, , key] of [...OWNERS, ...BESIDE]) figure(card.querySelector(`[data-memory=${key}]`), bytes(memory[key]), memory[key]);
  card.chart.add({ used: memory.kv_used_bytes, cached: memory.kv_cached_bytes, activations: memory.activation_bytes, start: memory.start_bytes, budget: device.budget_bytes });
  // Replicas are compared with each other: the longest bar is the largest lease.
  const scale = Math.max(1, ...device.replicas.map((one) => Math.max(one.limit_bytes, one.held_bytes_os)));
  keyed(card.querySelector(".replicas"), device.replicas, (one) => one.engine_id, makeReplica, (node, one) => updateReplica(node, one, scale));
}

function makeReplica(one) {
  return el("div", { class: "replica", "data-replica": one.engine_id },
    el("p", {}, el("span", { class: "name" }, el("b", {}, replicaName(one.engine_id)), ` ${one.model}`), el("span", { class: "level" })),
    el("div", { class: "bar", role: "img" }),
    el("p", {}, el("span", {}, el("b", { class: "held" }), " held of ", el("span", { class: "limit" }), " leased"),
      el("span", {}, el("b", { class: "running" }), " running, ", el("b", { class: "waiting" }), " waiting")));
}

function updateReplica(node, one, scale) {
  const held = Math.max(one.held_bytes_os, one.used_bytes);
  const state = one.state !== "LIVE" ? (one.limit_bytes < one.start_bytes ? "WAITING" : one.state) : one.pressure;
  const badge = node.querySelector(".level");
  level(badge, state);
  const bar = node.querySelector(".bar");
  fill(bar, [["used", one.used_bytes / scale], ["cached", (held - one.used_bytes) / scale], ["mark", (one.limit_bytes - held) / scale]]);
  bar.setAttribute("aria-label", `KV used ${bytes(one.used_bytes)}, held ${bytes(one.held_bytes_os)}, may hold ${bytes(one.limit_bytes)}`);
  figure(node.querySelector(".held"), bytes(one.held_bytes_os), one.held_bytes_os);
  figure(node.querySelector(".limit"), bytes(one.limit_bytes), one.limit_bytes);
  figure(node.querySelector(".running"), one.running, one.running);
  figure(node.querySelector(".waiting"), one.waiting, one.waiting);
  node.querySelector(".waiting").className = `waiting ${one.waiting ? "warn" : ""}`;
}

function level(node, name) {
  text(node, name);
  node.className = `${node.classList.contains("badge") ? "badge" : "level"} ${LEVEL[name] ?? "warn"}`;
}
