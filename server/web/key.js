/** The API key: asked for when the server wants one, kept in this tab only. */

import { byId } from "./dom.js";
import { forget, keep, recall } from "./storage.js";

const NAME = "key";
// What may stand in a header without quoting.
const POSSIBLE = /^[\x21-\x7e]+$/;

export const storedKey = () => recall(NAME) ?? "";

let asked = null;

/** Ask for the key, saying why. Resolves to whether there is a new one; two that ask at once share one dialog. */
export function askForKey(message) {
  asked ??= ask(message).finally(() => (asked = null));
  return asked;
}

/** The button in the bar appears once a key has been of use. */
export function showKeyButton() {
  const button = byId("key");
  button.hidden = false;
  button.onclick = () => askForKey("Requests of this page carry this key.");
}

function ask(message) {
  const dialog = byId("key-dialog");
  const input = byId("key-value");
  showKeyButton();
  byId("key-message").textContent = message;
  byId("key-forget").hidden = storedKey() === "";
  input.value = storedKey();
  input.setCustomValidity("");
  input.oninput = () => input.setCustomValidity("");
  return new Promise((resolve) => {
    let given = false;
    byId("key-cancel").onclick = () => dialog.close();
    byId("key-forget").onclick = () => {
      forget(NAME);
      dialog.close();
    };
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      const key = input.value.trim();
      if (!POSSIBLE.test(key)) {
        input.setCustomValidity("A key has no spaces and only letters, digits and signs of ASCII.");
        input.reportValidity();
        return;
      }
      keep(NAME, key);
      given = true;
      dialog.close();
    };
    dialog.onclose = () => {
      input.value = "";
      resolve(given);
    };
    dialog.showModal();
    input.focus();
  });
}
