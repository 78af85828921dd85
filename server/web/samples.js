/**
 * Pictures to begin with: samples/index.json lists { file, title, alt, questions }, in the order in which they are
 * shown. It tells the answers too, for tests.
 */

import { byId, clone } from "./dom.js";
import { fromFile } from "./pictures.js";

/** `choose` gets the picture and its questions when a sample is clicked. A server without samples shows none. */
export async function setUpSamples(choose) {
  const answer = await fetch(new URL("samples/index.json", import.meta.url)).catch(() => null);
  const samples = answer?.ok ? await answer.json() : [];
  byId("samples").replaceChildren(...samples.map((sample) => card(sample, choose)));
}

function card({ file, title, alt, questions }, choose) {
  const element = clone("sample-template");
  const source = new URL(`samples/${file}`, import.meta.url).href;
  element.querySelector("img").src = source;
  element.querySelector("img").alt = alt;
  element.querySelector(".title").textContent = title;
  element.querySelector("button").onclick = async () => {
    const content = await (await fetch(source)).blob();
    choose({ ...(await fromFile(content, file)), alt }, questions);
  };
  return element;
}
