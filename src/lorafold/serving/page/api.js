// The server's API, asked with the key of this tab if there is one.

const KEPT = "lorafold-key";

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

/** The models that may be named. */
export async function models() {
  const response = await called("v1/models", { signal: AbortSignal.timeout(5000) });
  return (await response.json()).data;
}

/** Why the server computes nothing now, empty if it does. */
export async function unready() {
  const response = await fetch("readyz", { signal: AbortSignal.timeout(5000) });
  return response.ok ? "" : (await response.json()).status;
}

/** The chunks of a chat completion, as they come. */
export async function* chunks(asked, signal) {
  const response = await called("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
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
  throw new Error("the answer broke off");
}

async function called(path, options) {
  const headers = new Headers(options.headers);
  if (key.get()) headers.set("Authorization", `Bearer ${key.get()}`);
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  throw new Refusal(error ?? { message: `the server answered ${response.status}` }, response.status);
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
