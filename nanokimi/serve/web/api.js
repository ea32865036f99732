import { readEvents } from "./sse.js";

const TOO_LONG = /^the prompt has (\d+) tokens and the model's context holds/;

/** What the server, or the way to it, answered instead of a result; `tokens`: of a prompt that was too long. */
export class ServerError extends Error {
  constructor(message, { status = 0, retryAfter = null, tokens = 0 } = {}) {
    super(message);
    Object.assign(this, { status, retryAfter, tokens });
  }
}

/** @returns {Promise<{id: string, max_model_len: number, chat: boolean}>} the model that is served */
export async function servedModel() {
  const response = await send("/v1/models");
  const { data } = await reached(() => response.json());
  return data[0];
}

/** What the model expected at each token and where it sent it. */
export async function inspect(model, ids, signal) {
  const response = await send("/v1/inspect", { model, tokens: ids, start: 0, top: 5 }, signal);
  const { tokens } = await reached(() => response.json());
  return tokens;
}

/**
 * The chunks of a streamed completion as they come.
 * @throws {ServerError} refused, failed in mid-stream, or broken off
 * @throws {DOMException} AbortError, once `signal` says so
 */
export async function* streamChunks(path, body, signal) {
  const response = await send(path, { ...body, stream: true }, signal);
  const events = readEvents(response.body);
  for (;;) {
    const { done, value } = await reached(() => events.next());
    if (done) throw new ServerError("the answer broke off");
    if (value === "[DONE]") return;
    const chunk = JSON.parse(value);
    if (chunk.error) throw new ServerError(chunk.error.message, { status: 500 });
    yield chunk;
  }
}

async function send(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const options = body ? { method: "POST", body: JSON.stringify(body), headers, signal } : {};
  const response = await reached(() => fetch(path, options));
  if (!response.ok) throw await refusal(response);
  return response;
}

async function reached(call) {
  try {
    return await call();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("the connection is gone");
  }
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `the server answered ${response.status}`;
  const tokens = Number(TOO_LONG.exec(message)?.[1] ?? 0);
  return new ServerError(message, { status: response.status, retryAfter: response.headers.get("Retry-After"), tokens });
}

/** One plain line: what happened and what to do. */
export function explain(error) {
  if (!(error instanceof ServerError)) return `The page itself failed (${error.message}): reload it.`;
  const message = error.message.replace(/[.\s]+$/, "");
  if (error.status === 0) {
    return `The server is out of reach: ${message}. See whether nanokimi serve still runs, then try again.`;
  }
  if (error.status === 401) return "The server wants its key: reload the page and give it as the password.";
  if (error.status === 429) return `The server is busy: try again in ${error.retryAfter ?? "a few"} seconds.`;
  if (error.status >= 500) return `It did not work: ${message}. Try again.`;
  return `The server refused this: ${message}.`;
}
