/** One answer from the request to its end, whichever that is, with what can be measured on the way. */

import { ApiError, streamChat } from "./api.js";

/** An answer that has not begun. */
export function newAnswer(settings) {
  return { role: "assistant", text: "", settings, ...nothingYet() };
}

const nothingYet = () => ({
  state: "streaming",
  usage: null,
  firstToken: null,
  rate: null,
  finish: null,
  error: null,
});

/** Fill `turn` with the answer to `body`, calling `changed` at each piece. What came before a stop or an error stays. */
export async function ask(turn, body, signal, changed) {
  Object.assign(turn, nothingYet(), { text: "" });
  const pace = new Pace();
  try {
    for await (const chunk of streamChat(body, signal)) {
      const choice = chunk.choices?.[0];
      turn.usage = chunk.usage ?? turn.usage;
      turn.finish = choice?.finish_reason ?? turn.finish;
      if (choice?.delta?.content) {
        turn.text += choice.delta.content;
        pace.record(turn.usage?.completion_tokens ?? null);
        turn.firstToken = pace.firstToken;
        turn.rate = pace.rate;
      }
      changed();
    }
    turn.state = "complete";
  } catch (error) {
    if (error.name === "AbortError") {
      turn.state = "stopped";
    } else if (error instanceof ApiError) {
      turn.state = "failed";
      turn.error = { message: error.message, status: error.status, retryAfter: error.retryAfter };
    } else {
      turn.state = "failed";
      turn.error = { message: "This page made a mistake; its console says more.", status: 0, retryAfter: null };
      throw error;
    }
  }
}

/** When tokens came. The first one's time is the prompt's, so the rate is that of those behind it. */
class Pace {
  #asked = performance.now();
  #first = null;
  #last = null;

  record(tokens) {
    this.#last = { tokens, at: performance.now() };
    this.#first ??= this.#last;
  }

  /** Seconds from the request. */
  get firstToken() {
    return this.#first && (this.#first.at - this.#asked) / 1000;
  }

  /** Tokens a second; null while there are not two points in time. */
  get rate() {
    const tokens = this.#last.tokens - this.#first.tokens;
    const seconds = (this.#last.at - this.#first.at) / 1000;
    return tokens > 0 && seconds > 0 ? tokens / seconds : null;
  }
}
