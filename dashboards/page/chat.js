// A conversation with a model of the cluster, as any client has it.

import { el, keyed } from "./dom.js";
import { authorization, events } from "./feed.js";

const MOST_TOKENS = 512;

export function startChat(form) {
  const [talk, field, model, pace, send, clear] = ["talk", "chat-text", "chat-model", "chat-pace", "chat-send", "chat-clear"].map((id) => form.querySelector(`#${id}`));
  let messages = [], running = null;

  async function ask(content) {
    const mine = messages; // a conversation that is cleared meanwhile is another one
    mine.push({ role: "user", content });
    say("user", content);
    const answer = say("assistant", "…");
    const stop = (running = new AbortController());
    send.textContent = "Stop";
    const began = performance.now();
    let said = "", first = 0, tokens = 0;
    try {
      const response = await fetch("../v1/chat/completions", {
        method: "POST", signal: stop.signal, headers: { "Content-Type": "application/json", ...authorization() },
        body: JSON.stringify({ model: model.value, messages: mine, stream: true, max_tokens: MOST_TOKENS, stream_options: { include_usage: true } }),
      });
      if (!response.ok) throw new Error((await response.json()).error?.message ?? `status ${response.status}`);
      for await (const { data } of events(response)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        tokens = chunk.usage?.completion_tokens ?? tokens;
        const more = chunk.choices[0]?.delta?.content;
        if (!more) continue;
        first ||= performance.now();
        const follow = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
        answer.textContent = said += more;
        if (follow) talk.scrollTop = talk.scrollHeight;
      }
      const seconds = (performance.now() - first) / 1000;
      if (first) pace.textContent = `first token ${Math.round(first - began)} ms` + (tokens > 1 ? `, ${(tokens / seconds).toFixed(1)} tokens/s` : "");
    } catch (error) {
      if (stop.signal.aborted) answer.textContent = said ? `${said} [stopped]` : "[stopped]";
      else say("failed", error.message);
    } finally {
      if (!said && answer.textContent === "…") answer.remove();
      // Only what was said counts as said: the next message goes with it.
      if (said) mine.push({ role: "assistant", content: said });
      else mine.pop();
      running = null;
      send.textContent = "Send";
    }
  }

  function say(role, content) {
    const node = el("p", { class: role }, content);
    talk.append(node);
    talk.scrollTop = talk.scrollHeight;
    return node;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return running.abort();
    const content = field.value.trim();
    if (!content) return;
    field.value = "";
    ask(content);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) form.requestSubmit();
  });
  clear.addEventListener("click", () => {
    running?.abort();
    messages = [];
    talk.replaceChildren();
    pace.textContent = "";
    field.focus();
  });

  return {
    /** The names of the models there are. */
    models(names) {
      keyed(model, names, (name) => name, (name) => el("option", { value: name }, name), () => {});
    },
  };
}
