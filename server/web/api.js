/** The public API, as any other client sees it. */

import { storedKey } from "./key.js";
import { readEvents } from "./sse.js";

/** Something the server said no to, or did not say. `retryAfter` is in seconds, null where it was not told. */
export class ApiError extends Error {
  constructor(message, { status = 0, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** Relative to the page, so that a proxy may put a path before both. */
export const endpoint = (path) => new URL(`v1/${path}`, document.baseURI).href;

/** The names of the model. Throws ApiError. */
export async function listModels() {
  const answer = await request("models", {});
  const list = await answer.json().catch(() => null);
  if (!Array.isArray(list?.data)) throw new ApiError("The server's list of models cannot be read.");
  return list.data.map((model) => model.id);
}

/**
 * The chunks of a streamed answer. Throws ApiError, also for an error that the server tells within the stream and for
 * a stream that ends before it is complete; AbortError when `signal` says so.
 */
export async function* streamChat(body, signal) {
  const content = { ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  const answer = await request("chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(content),
    signal,
  });
  if (!answer.headers.get("content-type")?.startsWith("text/event-stream")) {
    await answer.body?.cancel();
    throw new ApiError("The server's answer is not a stream of events.", { status: answer.status });
  }
  try {
    for await (const { data } of readEvents(answer.body)) {
      if (data === "[DONE]") return;
      const chunk = parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message ?? "The server ended the answer and did not say why.");
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("The connection broke before the answer was complete.");
  }
  throw new ApiError("The connection ended before the answer was complete.");
}

function parse(data) {
  try {
    const chunk = JSON.parse(data);
    if (chunk !== null && typeof chunk === "object") return chunk;
  } catch {
    // Said below.
  }
  throw new ApiError("The server sent an event that is not a JSON object.");
}

async function request(path, options) {
  const key = storedKey();
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(endpoint(path), { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

/** What a proxy between may have answered has no error object, and is only told by its status. */
async function refusal(answer) {
  const body = await answer.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered ${answer.status} and did not say why.`;
  return new ApiError(message, { status: answer.status, retryAfter: seconds(answer.headers.get("retry-after")) });
}

/** Retry-After holds seconds or a date (RFC 9110, section 10.2.3). */
function seconds(value) {
  if (value === null) return null;
  const found = /^\d+$/.test(value) ? Number(value) : Math.ceil((Date.parse(value) - Date.now()) / 1000);
  return Number.isFinite(found) && found > 0 ? found : null;
}
