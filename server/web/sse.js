/**
 * Server-sent events from pieces of a stream, by the rules of the HTML standard ("Interpreting an event stream").
 *
 * EventSource cannot send a body or a key, so fetch reads the stream and this reads what it gives. Pieces may end
 * anywhere: within a character, a line, or between the two characters that end one.
 */

export class EventParser {
  #line = "";
  #data = [];
  #type = "";
  #afterReturn = false;

  /** The events that end within `text`, each { type, data }. What has not ended yet is kept for the next piece. */
  push(text) {
    const events = [];
    let start = 0;
    if (this.#afterReturn && text !== "") {
      this.#afterReturn = false;
      if (text[0] === "\n") start = 1;
    }
    for (let end = start; end < text.length; end++) {
      const character = text[end];
      if (character !== "\n" && character !== "\r") continue;
      this.#take(this.#line + text.slice(start, end), events);
      this.#line = "";
      if (character === "\r") {
        if (end + 1 === text.length) this.#afterReturn = true;
        else if (text[end + 1] === "\n") end++;
      }
      start = end + 1;
    }
    this.#line += text.slice(start);
    return events;
  }

  #take(line, events) {
    if (line === "") {
      if (this.#data.length > 0) events.push({ type: this.#type || "message", data: this.#data.join("\n") });
      this.#data = [];
      this.#type = "";
      return;
    }
    const colon = line.indexOf(":");
    if (colon === 0) return; // a comment
    const field = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value.startsWith(" ")) value = value.slice(1);
    if (field === "data") this.#data.push(value);
    else if (field === "event") this.#type = value;
  }
}

/** All whole events of a ReadableStream of bytes. Leaving the loop early cancels the stream. */
export async function* readEvents(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  const parser = new EventParser();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
