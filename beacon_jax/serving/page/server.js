// What the page says to the server: requests with the key, refusals in words, and streams.

const KEY = "beacon-jax-key";

// A browser may forbid the storage; the key then lasts as long as the page.
const kept = (() => {
  try {
    return sessionStorage;
  } catch {
    return {};
  }
})();

export const keepKey = (key) => (kept[KEY] = key);

const refused = (message, status) => Object.assign(new Error(message), { status });

/** For `catch`: words instead of a browser's own, but for a request that was stopped. */
const unlessStopped = (message) => (error) => {
  throw error.name === "AbortError" ? error : refused(message);
};

/** Fetches; an error has words for the reader, and `status` where the server refused. */
export async function request(path, { headers, ...options } = {}) {
  const sent = { ...headers };
  if (kept[KEY]) sent.Authorization = `Bearer ${kept[KEY]}`;
  const answer = await fetch(path, { ...options, headers: sent }).catch(
    unlessStopped("The server does not answer. Does it still run?"),
  );
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  const status = `${answer.status} ${answer.statusText}`.trim();
  let message = body?.error?.message ?? `The server refused this: ${status}.`;
  const after = answer.headers.get("Retry-After");
  const wait = Number(after) || Math.ceil((Date.parse(after) - Date.now()) / 1000);
  if (wait > 0) {
    const at = new Date(Date.now() + wait * 1000).toLocaleTimeString();
    message += ` Try again in ${wait} ${wait === 1 ? "second" : "seconds"}, at ${at}.`;
  }
  throw refused(message, answer.status);
}

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

/** Yields the objects of a stream of server-sent events, each one line of `data:`. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader
      .read()
      .catch(unlessStopped("The connection to the server broke."));
    if (done) throw refused("The connection ended before all was there.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const text = line.slice(5).trim();
      if (text === "[DONE]") return;
      const event = JSON.parse(text);
      if (event.error) throw refused(event.error.message);
      yield event;
    }
  }
}

/** Compresses a document, {name, text} or {name, file}; `seen` gets events of progress. */
export async function compress(source, settings, signal, seen) {
  const fields = { stream: true, name: source.name, ...settings };
  let answer;
  if (source.file) {
    const form = new FormData();
    for (const [name, value] of Object.entries(fields)) form.append(name, value);
    form.append("file", source.file, source.name);
    answer = await request("v1/memories", { method: "POST", body: form, signal });
  } else {
    answer = await post("v1/memories", { ...fields, text: source.text }, signal);
  }
  for await (const event of events(answer)) {
    if (event.object === "memory") return event;
    if (event.object === "memory.progress") seen(event);
  }
  throw refused("The server sent no memory.");
}

/**
 * Streams an answer; `seen` gets each piece, and the text with it. Returns the text, how it
 * ended, what the server counted, and the page's own clock in milliseconds.
 */
export async function complete({ chat, messages, ...options }, signal, seen) {
  const prompt = messages.map((message) => message.content).join("");
  const body = { ...options, ...(chat ? { messages } : { prompt }), store: true, stream: true };
  body.stream_options = { include_usage: true };
  const result = { text: "", pieces: 0, started: performance.now() };
  const answer = await post(chat ? "v1/chat/completions" : "v1/completions", body, signal);
  for await (const event of events(answer)) {
    const choice = event.choices?.[0];
    result.finish = choice?.finish_reason ?? result.finish;
    for (const name of ["usage", "timings", "memory"]) result[name] = event[name] ?? result[name];
    const piece = choice?.delta?.content ?? choice?.text;
    if (!piece) continue;
    if (!result.pieces++) result.first = performance.now();
    result.text += piece;
    seen(piece, result.text);
  }
  result.ended = performance.now();
  return result;
}
