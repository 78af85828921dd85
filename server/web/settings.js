/** Which model is asked, and how: the form beside the conversation. */

import { byId } from "./dom.js";
import { keep, recallValue } from "./storage.js";

const NAME = "settings";
const NUMBERS = [
  "temperature",
  "top_p",
  "top_k",
  "max_tokens",
  "seed",
  "repetition_penalty",
  "frequency_penalty",
  "presence_penalty",
];

/** Show what this tab was set to before, and keep what is changed. */
export function setUpSettings() {
  const form = byId("settings-form");
  for (const [name, value] of Object.entries(recallValue(NAME, {}))) {
    if (form.elements[name]) form.elements[name].value = value;
  }
  form.addEventListener("input", remember);
  form.addEventListener("reset", () => setTimeout(remember));
  form.addEventListener("submit", (event) => event.preventDefault());
  byId("model").addEventListener("change", remember);
  byId("settings-toggle").addEventListener("click", () => open(byId("settings").hidden));
  open(matchMedia("(min-width: 64rem)").matches);
}

/** The names of the model; the one that was chosen before stays chosen. */
export function showModels(names) {
  const select = byId("model");
  const chosen = select.value || recallValue(NAME, {}).model;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes(chosen)) select.value = chosen;
  select.disabled = names.length === 0;
}

/** { model, system, sampling }, or null where a field holds what it may not; then the field says so. */
export function readSettings() {
  const form = byId("settings-form");
  if (!form.checkValidity()) {
    open(true);
    form.reportValidity();
    return null;
  }
  const given = NUMBERS.map((name) => [name, form.elements[name].valueAsNumber]);
  const sampling = Object.fromEntries(given.filter(([, value]) => !Number.isNaN(value)));
  return { model: byId("model").value, system: form.elements.system.value.trim(), sampling };
}

function remember() {
  const values = Object.fromEntries(new FormData(byId("settings-form")));
  keep(NAME, JSON.stringify({ ...values, model: byId("model").value }));
}

function open(isOpen) {
  byId("settings").hidden = !isOpen;
  byId("settings-toggle").setAttribute("aria-expanded", String(isOpen));
}
