/** What was said, on the screen. Everything that a model or a person wrote is a text node. */

import { clone, copyFrom } from "./dom.js";
import { pictureView } from "./pictures.js";

const ALONE = { width: 320, height: 240 };
const WITH_OTHERS = { width: 200, height: 150 };
const NEARLY_AT_THE_END = 48;

const decimals = (number, digits) =>
  number.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

export function questionView(turn, { edit }) {
  const element = clone("question-template");
  const pictures = element.querySelector(".pictures");
  const size = turn.pictures.length > 1 ? WITH_OTHERS : ALONE;
  pictures.replaceChildren(...turn.pictures.map((picture) => pictureItem(picture, size)));
  pictures.hidden = turn.pictures.length === 0;
  element.querySelector(".text").textContent = turn.text;
  element.querySelector(".text").hidden = turn.text === "";
  element.querySelector(".edit").onclick = edit;
  return element;
}

function pictureItem(picture, { width, height }) {
  const item = document.createElement("li");
  item.append(pictureView(picture, width, height));
  if (picture.detail !== "auto") {
    const caption = document.createElement("span");
    caption.className = "caption";
    caption.textContent = `${picture.detail} detail`;
    item.append(caption);
  }
  return item;
}

/** An answer that grows: `element`, and `update` to call when the turn has changed. */
export class AnswerView {
  #turn;
  #text;
  #isScheduled = false;
  #countdown = null;

  constructor(turn, { again, request }) {
    this.#turn = turn;
    this.element = clone("answer-template");
    this.#text = document.createTextNode("");
    this.#part("text").append(this.#text);
    this.#part("speaker").textContent = turn.settings.model || "Answer";
    this.element.setAttribute("aria-label", "Answer");
    this.#part("again").onclick = again;
    this.#part("request").onclick = request;
    this.#part("copy").onclick = (event) => copyFrom(event.currentTarget, turn.text);
    this.update();
  }

  /** Pieces that come between two frames are drawn together. */
  updateSoon() {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    requestAnimationFrame(() => this.update());
  }

  update() {
    const turn = this.#turn;
    this.#isScheduled = false;
    if (turn.text.length < this.#text.length) this.#text.data = "";
    this.#text.appendData(turn.text.slice(this.#text.length));
    this.element.dataset.state = turn.state;
    this.element.ariaBusy = String(turn.state === "streaming");
    this.#part("figures").replaceChildren(...figures(turn).flatMap(figure));
    this.#part("copy").hidden = turn.text === "";
    this.#showFailure(turn.state === "failed" ? turn.error : null);
  }

  #showFailure(error) {
    clearInterval(this.#countdown);
    this.#part("failure").hidden = error === null;
    if (error === null) return;
    this.#part("message").textContent = error.message;
    this.#part("wait").hidden = error.retryAfter === null;
    if (error.retryAfter !== null) this.#countDown(error.retryAfter);
  }

  #countDown(seconds) {
    const end = performance.now() + seconds * 1000;
    const show = () => {
      const left = Math.ceil((end - performance.now()) / 1000);
      this.#part("wait").textContent =
        left > 0 ? `The server asks to wait ${seconds} s; ${left} s are left.` : "The server can be asked again.";
      if (left <= 0 || !this.element.isConnected) clearInterval(this.#countdown);
    };
    this.#countdown = setInterval(show, 1000);
    show();
  }

  #part(name) {
    return this.element.querySelector(`.${name}`);
  }
}

/** Lines break between figures and not within them. */
function figure(text, index) {
  const element = document.createElement("span");
  element.textContent = text;
  return index === 0 ? [element] : [" · ", element];
}

const ENDS = { length: "reached max tokens", tool_calls: "called a tool" };

/** What an answer has cost and how fast it came, each as a short text. */
export function figures({ state, usage, firstToken, rate, finish }) {
  const found = [];
  if (state === "streaming" && firstToken === null) return ["waiting for the first token"];
  if (usage) {
    const { cached_tokens: cached, image_tokens: image } = usage.prompt_tokens_details ?? {};
    const parts = [image ? `${decimals(image, 0)} of pictures` : "", cached ? `${decimals(cached, 0)} cached` : ""];
    const said = parts.filter(Boolean).join(", ");
    found.push(`${decimals(usage.prompt_tokens, 0)} tokens in${said && ` (${said})`}`);
    found.push(`${decimals(usage.completion_tokens, 0)} out`);
  }
  if (firstToken !== null) found.push(`first token ${decimals(firstToken, 2)} s`);
  if (rate !== null) found.push(`${decimals(rate, rate < 10 ? 1 : 0)} tokens/s`);
  if (state === "stopped") found.push("stopped");
  else if (finish in ENDS) found.push(ENDS[finish]);
  return found;
}

/** Keeps the end of `content` in view while it grows, unless its reader has gone elsewhere in it. */
export function followEnd(scroller, content) {
  let isFollowing = true;
  const toEnd = () => {
    isFollowing = true;
    scroller.scrollTop = scroller.scrollHeight;
  };
  scroller.addEventListener("scroll", () => {
    isFollowing = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEARLY_AT_THE_END;
  });
  const observer = new ResizeObserver(() => {
    if (isFollowing && content.childElementCount > 0) toEnd();
  });
  observer.observe(scroller);
  observer.observe(content);
  return toEnd;
}
