/** What was just sent, to be run elsewhere. */

import { byId, copyFrom } from "./dom.js";
import { blobOf } from "./pictures.js";

const LANGUAGES = ["curl", "python"];

/** `shown` is what `snippets` gives. */
export function showRequest(shown, hasKey) {
  const dialog = byId("request-dialog");
  const links = shown.files.map(downloadLink);
  const select = (language) => {
    for (const name of LANGUAGES) {
      const tab = byId(`tab-${name}`);
      tab.setAttribute("aria-selected", String(name === language));
      tab.tabIndex = name === language ? 0 : -1;
    }
    byId("request-code").setAttribute("aria-labelledby", `tab-${language}`);
    byId("request-code").textContent = shown[language];
    byId("request-copy").onclick = (event) => copyFrom(event.currentTarget, shown[language]);
  };
  for (const [index, name] of LANGUAGES.entries()) {
    byId(`tab-${name}`).onclick = () => select(name);
    byId(`tab-${name}`).onkeydown = (event) => {
      if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
      const other = LANGUAGES[(index + 1) % LANGUAGES.length];
      select(other);
      byId(`tab-${other}`).focus();
    };
  }
  byId("request-key").hidden = !hasKey;
  byId("request-files").hidden = links.length === 0;
  byId("request-links").replaceChildren(...links.flatMap((link, index) => (index > 0 ? [", ", link] : [link])));
  byId("request-close").onclick = () => dialog.close();
  dialog.onclose = () => links.forEach((link) => URL.revokeObjectURL(link.href));
  select("curl");
  dialog.showModal();
}

/** Pasted pictures are no files yet, and samples are not here. */
function downloadLink(picture) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blobOf(picture.url));
  link.download = picture.file;
  link.textContent = picture.file;
  return link;
}
