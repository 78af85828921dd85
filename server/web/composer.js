/** Where a question is put together: its text, its pictures, and the ways in which pictures come. */

import { byId, clone, notify } from "./dom.js";
import { PictureError, fromAddress, fromFile, pictureView } from "./pictures.js";

const THUMBNAIL = 56;

export class Composer {
  #pictures = [];
  #questions = []; // suggested ones
  #isBusy = false;
  #send;
  #stop;

  /** `send` is called with { text, pictures } and says whether they were taken; `stop` while an answer is under way. */
  constructor({ send, stop }) {
    this.#send = send;
    this.#stop = stop;
    this.#listenToForm();
    this.#listenToPictures();
    this.#listenToAddress();
  }

  /** Show a question to be changed. */
  fill({ text, pictures }) {
    byId("text").value = text;
    this.#pictures = pictures.filter((picture) => picture.url !== null);
    this.#suggest([]);
    this.#show();
    this.focus();
  }

  clear() {
    this.fill({ text: "", pictures: [] });
    notify("");
  }

  focus() {
    byId("text").focus();
  }

  /** One picture more, with questions that may be asked about it. */
  attach(picture, questions = []) {
    this.#pictures.push(picture);
    this.#suggest(questions);
    this.#show();
    this.focus();
  }

  /** While an answer is under way the button stops it. */
  set isBusy(isBusy) {
    this.#isBusy = isBusy;
    byId("send").textContent = isBusy ? "Stop" : "Send";
    byId("send").classList.toggle("strong", !isBusy);
    for (const chip of byId("suggestions").children) chip.disabled = isBusy;
  }

  #listenToForm() {
    const text = byId("text");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#isBusy) this.#stop();
      else this.#submit();
    });
    text.addEventListener("keydown", (event) => {
      // An Enter that ends the choice of a character in an input method is not meant for the page.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.#isBusy) this.#submit();
    });
    text.addEventListener("input", () => notify(""));
  }

  #submit() {
    const text = byId("text").value.trim();
    if (text === "" && this.#pictures.length === 0) return this.focus();
    if (!this.#send({ text, pictures: this.#pictures })) return;
    const others = this.#questions.filter((question) => question !== text);
    this.clear();
    this.#suggest(others); // what follows may be about the same picture
  }

  #listenToPictures() {
    byId("pick").addEventListener("click", () => byId("file").click());
    byId("file").addEventListener("change", (event) => {
      this.#attachFiles([...event.target.files]);
      event.target.value = ""; // so that the same file can be picked again
    });
    document.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      if (files.length === 0) return;
      event.preventDefault();
      this.#attachFiles(files);
    });
    document.addEventListener("dragover", (event) => {
      if (!carriesPictures(event.dataTransfer)) return;
      event.preventDefault();
      document.body.classList.add("dragging");
    });
    document.addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) document.body.classList.remove("dragging");
    });
    document.addEventListener("drop", (event) => this.#drop(event));
  }

  #drop(event) {
    document.body.classList.remove("dragging");
    if (!carriesPictures(event.dataTransfer)) return;
    event.preventDefault();
    const files = [...event.dataTransfer.files];
    if (files.length > 0) return this.#attachFiles(files);
    const address = event.dataTransfer.getData("text/uri-list").split(/\r?\n/).find((line) => line && line[0] !== "#");
    this.#attachAll([fromAddress(address ?? "")]);
  }

  #attachFiles(files) {
    return this.#attachAll(files.map((file) => fromFile(file)));
  }

  /** In the order in which they came; of those that are none, the last one's reason is told. */
  async #attachAll(promises) {
    notify("");
    for (const outcome of await Promise.allSettled(promises)) {
      if (outcome.status === "fulfilled") this.attach(outcome.value);
      else if (outcome.reason instanceof PictureError) notify(outcome.reason.message);
      else throw outcome.reason;
    }
  }

  #listenToAddress() {
    const dialog = byId("address-dialog");
    const input = byId("address-value");
    const complain = (text) => {
      byId("address-problem").textContent = text;
      byId("address-problem").hidden = text === "";
    };
    byId("address").addEventListener("click", () => {
      input.value = "";
      complain("");
      dialog.showModal();
      input.focus();
    });
    byId("address-cancel").addEventListener("click", () => dialog.close());
    dialog.querySelector("form").addEventListener("submit", async (event) => {
      event.preventDefault();
      try {
        const picture = await fromAddress(input.value);
        dialog.close();
        this.attach(picture);
      } catch (error) {
        if (!(error instanceof PictureError)) throw error;
        complain(error.message);
      }
    });
  }

  #show() {
    const list = byId("attachments");
    list.replaceChildren(...this.#pictures.map((picture) => this.#attachment(picture)));
    list.hidden = this.#pictures.length === 0;
    if (list.hidden) this.#suggest([]);
  }

  #attachment(picture) {
    const element = clone("attachment-template");
    if (picture.kind) element.querySelector(".preview").append(pictureView(picture, THUMBNAIL, THUMBNAIL));
    else element.querySelector(".preview").remove();
    element.querySelector(".name").textContent = picture.kind ? picture.name : picture.url;
    const detail = element.querySelector(".detail");
    detail.value = picture.detail;
    detail.setAttribute("aria-label", `Detail of ${picture.name}`);
    detail.onchange = () => {
      // Not in place: an earlier question that is being changed shares its pictures.
      const changed = { ...picture, detail: detail.value };
      this.#pictures = this.#pictures.map((other) => (other === picture ? changed : other));
      picture = changed;
    };
    const remove = element.querySelector(".remove");
    remove.setAttribute("aria-label", `Remove ${picture.name}`);
    remove.onclick = () => {
      this.#pictures = this.#pictures.filter((other) => other !== picture);
      this.#show();
      this.focus();
    };
    return element;
  }

  #suggest(questions) {
    this.#questions = questions;
    const chips = questions.map((question) => {
      const chip = document.createElement("button");
      chip.type = "button";
      chip.className = "chip";
      chip.textContent = question;
      chip.disabled = this.#isBusy;
      chip.onclick = () => {
        byId("text").value = question;
        this.#submit();
      };
      return chip;
    });
    byId("suggestions").replaceChildren(...chips);
    byId("suggestions").hidden = chips.length === 0;
  }
}

/** A picture's address is dropped as a link; text that is dropped belongs to the field under it. */
function carriesPictures(transfer) {
  return transfer.types.includes("Files") || transfer.types.includes("text/uri-list");
}
