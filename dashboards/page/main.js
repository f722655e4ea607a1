// Draws what the feed says. Reads only; the chat is a client like any other.

import { startChat } from "./chat.js";
import { showDevices } from "./devices.js";
import { text } from "./dom.js";
import { follow, saveKey } from "./feed.js";
import { showAlerts, showDecisions, showModels, showSlo, showTiles } from "./panels.js";

const at = (id) => document.getElementById(id);
const link = at("link"), key = at("key");
const chat = startChat(at("chat"));

function say(state, words) {
  link.dataset.state = state;
  text(link.lastElementChild, words);
}

const feed = follow({
  state(state) {
    const { status, decisions } = state;
    key.hidden = true;
    say("live", "live");
    showTiles(at("tiles"), state);
    showAlerts(at("alerts"), status);
    showDevices(at("devices"), status);
    showSlo(at("slo"), at("slo-window"), state);
    showModels(at("models"), status.models);
    showDecisions(at("decisions"), decisions);
    if (status.models) chat.models(status.models.filter((one) => one.phase === "serving").map((one) => one.name));
    document.body.dataset.takenAt = status.taken_at_s;
  },
  away: (reason) => say("away", `not live: ${reason}`),
  refused(reason) {
    say("away", reason);
    key.hidden = false;
    at("key-value").focus();
  },
});

key.addEventListener("submit", (event) => {
  event.preventDefault();
  saveKey(at("key-value").value);
  at("key-value").value = "";
  feed.again();
});
