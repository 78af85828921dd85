/** Puts the page together: the conversation, and what its parts tell each other. */

import { ApiError, endpoint, listModels } from "./api.js";
import { ask, newAnswer } from "./asking.js";
import { Composer } from "./composer.js";
import { load, requestBody, save } from "./conversation.js";
import { announce, byId, notify } from "./dom.js";
import { askForKey, showKeyButton, storedKey } from "./key.js";
import { showRequest } from "./request_dialog.js";
import { setUpSamples } from "./samples.js";
import { readSettings, setUpSettings, showModels } from "./settings.js";
import { snippets } from "./snippets.js";
import { AnswerView, followEnd, figures, questionView } from "./transcript.js";

const UNAUTHORIZED = 401;

let turns = load();
let views = []; // of each turn: its element
let running = null; // the AbortController of the answer under way
let edited = null; // the place of the question that is being changed

const toEnd = followEnd(byId("transcript"), byId("turns"));
const composer = new Composer({ send, stop });

function send({ text, pictures }) {
  const settings = readSettings();
  if (settings === null) return false;
  if (edited !== null) cutBefore(edited);
  stopEditing();
  add({ role: "user", text, pictures });
  answer(settings);
  return true;
}

/** Ask for an answer to the last question. */
async function answer(settings) {
  const turn = newAnswer(settings);
  const body = requestBody(turns, settings);
  const view = add(turn);
  const controller = new AbortController();
  running = controller;
  composer.isBusy = true;
  // Browsers break the connections of a page that is being left, which would look like a fault of the server.
  addEventListener("beforeunload", stop);
  announce("Answering");
  toEnd();
  try {
    await ask(turn, body, controller.signal, () => view.updateSoon());
  } finally {
    removeEventListener("beforeunload", stop);
    if (running === controller) running = null;
    composer.isBusy = running !== null;
    view.update();
    remember();
  }
  if (!turns.includes(turn)) return; // it has been cut off meanwhile
  announce(turn.state === "failed" ? "" : `${turn.text || "No text"}. ${figures(turn).join(", ")}`);
  if (turn.error?.status === UNAUTHORIZED && (await askForKey(turn.error.message))) {
    if (!byId("model").value) loadModels();
    if (turns.at(-1) === turn) again();
  }
}

function again() {
  const settings = readSettings();
  if (settings === null || running !== null) return;
  cutBefore(turns.length - 1);
  answer(settings);
  composer.focus();
}

function stop() {
  running?.abort();
}

function add(turn) {
  const index = turns.push(turn) - 1;
  const view = draw(turn, index);
  remember();
  return view;
}

function draw(turn, index) {
  byId("welcome").hidden = true;
  let view = null;
  let element;
  if (turn.role === "user") {
    element = questionView(turn, { edit: () => edit(index) });
  } else {
    view = new AnswerView(turn, { again, request: () => showSent(index) });
    element = view.element;
  }
  views[index] = element;
  byId("turns").append(element);
  return view;
}

function cutBefore(index) {
  turns.length = index;
  for (const element of views.splice(index)) element.remove();
}

function edit(index) {
  stop();
  edited = index;
  byId("editing").hidden = false;
  composer.fill(turns[index]);
}

function stopEditing() {
  edited = null;
  byId("editing").hidden = true;
}

function showSent(index) {
  const asked = turns.slice(0, index);
  const hasKey = storedKey() !== "";
  const body = requestBody(asked, turns[index].settings);
  showRequest(snippets(body, asked, { url: endpoint("chat/completions"), hasKey }), hasKey);
}

function remember() {
  if (!save(turns)) notify("This conversation has more pictures than a reload of the page can keep.");
}

function startAnew() {
  stop();
  stopEditing();
  turns = [];
  views = [];
  byId("turns").replaceChildren();
  byId("welcome").hidden = false;
  composer.clear();
  remember();
}

async function loadModels() {
  try {
    showModels(await listModels());
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status !== UNAUTHORIZED) notify(error.message);
    else if (await askForKey(error.message)) await loadModels();
  }
}

byId("new").addEventListener("click", startAnew);
byId("cancel-editing").addEventListener("click", () => {
  stopEditing();
  composer.clear();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
  if (running !== null) stop();
  else if (edited !== null) byId("cancel-editing").click();
});
addEventListener("pagehide", () => save(turns));

setUpSettings();
if (storedKey() !== "") showKeyButton();
turns.forEach(draw);
setUpSamples((picture, questions) => composer.attach(picture, questions));
loadModels();
