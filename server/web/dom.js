/** The little that every part of the page needs of the document. */

export const byId = (id) => document.getElementById(id);

/** The one element of a template, anew. */
export function clone(templateId) {
  return byId(templateId).content.firstElementChild.cloneNode(true);
}

/** Tell readers of the screen. */
export function announce(text) {
  byId("announcer").textContent = text;
}

/** One line above the composer; an empty one takes it away. */
export function notify(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = text === "";
}

/** Put a text on the clipboard and say so on the button for a moment. */
export async function copyFrom(button, text) {
  const label = button.dataset.label ?? button.textContent;
  button.dataset.label = label;
  button.textContent = (await toClipboard(text)) ? "Copied" : "Not copied";
  announce(button.textContent);
  setTimeout(() => (button.textContent = label), 1500);
}

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

/** Browsers have a clipboard only for pages that came over TLS or from this machine. */
function copyBySelection(text) {
  const holder = document.createElement("textarea");
  holder.value = text;
  holder.className = "unseen";
  const focused = document.activeElement;
  (focused?.closest("dialog") ?? document.body).append(holder);
  holder.select();
  const copied = document.execCommand("copy");
  holder.remove();
  focused?.focus();
  return copied;
}
