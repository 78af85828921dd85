/**
 * What was said, as plain data, and what of it goes to the server and into the tab's storage.
 *
 * A question is { role: "user", text, pictures }. An answer is { role: "assistant", text, state, settings, usage,
 * firstToken, rate, finish, error }: `state` is "streaming", "complete", "stopped" or "failed"; `settings` are what it
 * was asked with; `firstToken` is in seconds, `rate` in tokens a second. Questions and answers alternate.
 */

import { keep, recallValue } from "./storage.js";

const NAME = "conversation";
// Browsers give a page about five million characters in all.
const MAX_CHARACTERS = 4_500_000;

/** The request that answers the last of `turns`: the body of POST /v1/chat/completions, without how it is sent. */
export function requestBody(turns, { model, system, sampling }) {
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    if (turn.role === "user") messages.push({ role: "user", content: content(turn) });
    else if (turn.text) messages.push({ role: "assistant", content: turn.text });
  }
  return { ...(model ? { model } : {}), messages, ...sampling };
}

function content({ text, pictures }) {
  const parts = pictures.filter((picture) => picture.url !== null).map(part);
  if (parts.length === 0) return text;
  return text ? [...parts, { type: "text", text }] : parts;
}

function part({ url, detail }) {
  return { type: "image_url", image_url: detail === "auto" ? { url } : { url, detail } };
}

/** Whether all of it will survive a reload. Where there is no room for all pictures, the latest are kept. */
export function save(turns) {
  const { kept, isWhole } = fitted(turns);
  if (keep(NAME, JSON.stringify(kept))) return isWhole;
  keep(NAME, JSON.stringify(turns.map(withoutPictures)));
  return !turns.some((turn) => turn.pictures?.length);
}

/** What was saved. An answer that the reload cut off is a stopped one, and what was asked to wait has waited. */
export function load() {
  return recallValue(NAME, []).map((turn) => {
    if (turn.state === "streaming") return { ...turn, state: "stopped" };
    return turn.error ? { ...turn, error: { ...turn.error, retryAfter: null } } : turn;
  });
}

function fitted(turns) {
  let left = MAX_CHARACTERS - JSON.stringify(turns.map(withoutPictures)).length;
  const kept = turns.toReversed().map((turn) => {
    if (!turn.pictures) return turn;
    const pictures = turn.pictures.map((picture) => {
      left -= picture.url?.length ?? 0;
      return left < 0 ? { ...picture, url: null } : picture;
    });
    return { ...turn, pictures };
  });
  return { kept: kept.reverse(), isWhole: left >= 0 };
}

function withoutPictures(turn) {
  return turn.pictures ? { ...turn, pictures: turn.pictures.map((picture) => ({ ...picture, url: null })) } : turn;
}
