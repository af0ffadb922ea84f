// Requests to the server's API, with this tab's key if it has one.

const KEPT = "lorafold-key";
const JSON_SENT = { "Content-Type": "application/json" };

export const key = {
  get: () => sessionStorage.getItem(KEPT) ?? "",
  keep: (value) => sessionStorage.setItem(KEPT, value),
  forget: () => sessionStorage.removeItem(KEPT),
};

/** What the server refuses, in its own words. */
export class Refusal extends Error {
  constructor({ message, code }, status) {
    super(message);
    this.code = code;
    this.status = status;
  }
}

/** The list of models, then what changes of it. `heard` is called for whatever comes. */
export async function* watched(signal, heard) {
  const response = await called("v1/models/events", { signal });
  for await (const line of lines(response.body)) {
    heard();
    if (line.startsWith("data: ")) yield JSON.parse(line.slice("data: ".length));
  }
}

/** Raises Refusal for a key that is not the administrator's. */
export async function checkAdministrator(value) {
  const response = await called("admin/adapters", {}, value);
  await response.body.cancel();
}

/** Have the administrator's server do something. */
export async function order(method, path, body) {
  const sent = body && { headers: JSON_SENT, body: JSON.stringify(body) };
  await (await called(path, { method, ...sent })).json();
}

/** The chunks of a chat completion, as they come. */
export async function* chunks(asked, signal) {
  const response = await called("v1/chat/completions", {
    method: "POST",
    headers: JSON_SENT,
    body: JSON.stringify({ ...asked, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const line of lines(response.body)) {
    if (!line.startsWith("data: ")) continue; // a comment keeps the connection open
    const data = line.slice("data: ".length);
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(chunk.error);
    yield chunk;
  }
  throw new Error("the stream ended early");
}

async function called(path, options, sent = key.get()) {
  const headers = new Headers(options.headers);
  if (sent) headers.set("Authorization", `Bearer ${sent}`);
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const told = error ?? { message: `the server answered ${response.status}` };
  throw new Refusal(told, response.status);
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n/);
    rest = parts.pop();
    yield* parts;
  }
}
