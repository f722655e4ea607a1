// The cluster's state as it changes: server-sent events, read with fetch because EventSource can send no key.

const KEY = "ellm-key";
const QUIET_MS = 4000; // what is shown is old
const SILENT_MS = 20_000; // longer than the server waits for the controller and the registry before it says so
const AGAIN_MS = 1000;

export const saveKey = (key) => sessionStorage.setItem(KEY, key);

/** The headers of a request: the key, where one was typed in. */
export function authorization() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** The events of a response's stream: {name, data}. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n");
      const find = (field) => lines.find((line) => line.startsWith(`${field}: `))?.slice(field.length + 2);
      if (find("data") !== undefined) yield { name: find("event") ?? "message", data: find("data") };
    }
  }
}

/**
 * Follow the cluster while the page is visible.
 * on.state(state), on.away(reason), on.refused(reason): the last where a key is wanted; then it waits for `again`.
 */
export function follow(on) {
  let stream = null, timer = 0;

  async function run() {
    stream?.abort();
    clearTimeout(timer);
    const mine = (stream = new AbortController());
    let quiet = 0, watchdog = 0;
    const heard = () => {
      clearTimeout(quiet);
      clearTimeout(watchdog);
      quiet = setTimeout(() => on.away("nothing was heard for a while"), QUIET_MS);
      watchdog = setTimeout(() => mine.abort(new Error("nothing was heard for a while")), SILENT_MS);
    };
    let wait = AGAIN_MS;
    try {
      heard();
      const response = await fetch("../ellm/live", { headers: authorization(), signal: mine.signal });
      if (response.status === 401 || response.status === 403) {
        stream = null;
        on.refused(response.status === 401 ? "needs an API key" : "needs a key with the scope admin");
        return;
      }
      if (!response.ok) throw new Error((await response.json()).error.message);
      for await (const event of events(response)) {
        heard();
        if (event.name === "state") on.state(JSON.parse(event.data));
        else if (event.name === "away") on.away(JSON.parse(event.data).reason);
      }
      wait = 0; // the stream's life is over: ask again
    } catch (error) {
      if (mine === stream && !document.hidden) on.away(error.message);
    } finally {
      clearTimeout(quiet);
      clearTimeout(watchdog);
    }
    if (mine === stream && !document.hidden) timer = setTimeout(run, wait);
  }

  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) return run();
    clearTimeout(timer);
    stream?.abort();
  });
  if (!document.hidden) run();
  return { again: run };
}
