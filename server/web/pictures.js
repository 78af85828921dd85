/**
 * Pictures as the page holds them: { name, url, kind, width, height, detail }.
 *
 * `url` is a data URL, or an http(s) address that the server will fetch and this page never does; then `kind`, `width`
 * and `height` are missing. A picture that a reload could not keep has the url null.
 */

const KINDS = { "image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/gif": "gif" };
// Base64 makes a third more of it, and the server has limits of its own, which it tells.
const MAX_BYTES = 64 * 2 ** 20;
const MAX_ADDRESS = 8192;

/** Why something is no picture to send; the message is for the reader. */
export class PictureError extends Error {}

/** A File or Blob → a picture. Throws PictureError. */
export async function fromFile(file, name = file.name) {
  const shown = name || "The picture";
  if (!(file.type in KINDS)) {
    throw new PictureError(`${shown} is ${file.type || "of an unknown type"}; pictures are JPEG, PNG, WebP or GIF.`);
  }
  if (file.size > MAX_BYTES) {
    const size = Math.ceil(file.size / 2 ** 20);
    throw new PictureError(`${shown} has ${size} MiB; at most ${MAX_BYTES / 2 ** 20} MiB can be sent.`);
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new PictureError(`${shown} is not a picture that can be read.`);
  }
  const { width, height } = bitmap;
  bitmap.close();
  const url = await dataUrl(file);
  return { name: name || `picture.${KINDS[file.type]}`, url, kind: file.type, width, height, detail: "auto" };
}

/** What was typed or dropped as an address → a picture. Throws PictureError. */
export async function fromAddress(text) {
  const trimmed = text.trim();
  if (trimmed.startsWith("data:")) return fromFile(blobOf(trimmed), "");
  const address = URL.canParse(trimmed) ? new URL(trimmed) : null;
  if (address === null || !["http:", "https:"].includes(address.protocol) || trimmed.length > MAX_ADDRESS) {
    throw new PictureError("An address begins with https:// or http:// and names a picture.");
  }
  return { name: address.pathname.split("/").pop() || address.host, url: trimmed, detail: "auto" };
}

export const isEmbedded = (picture) => picture.url?.startsWith("data:") ?? false;

/** The bytes of a data URL in base64, as a Blob. Throws PictureError. */
export function blobOf(url) {
  const found = /^data:([a-z]+\/[a-z0-9.+-]+);base64,([A-Za-z0-9+/=\s]*)$/i.exec(url);
  try {
    const bytes = Uint8Array.from(atob(found[2]), (character) => character.charCodeAt(0));
    return new Blob([bytes], { type: found[1].toLowerCase() });
  } catch {
    throw new PictureError("This data URL is not a picture in base64.");
  }
}

/** What shows a picture in at most `maxWidth` × `maxHeight` CSS pixels, in a box that loading does not change. */
export function pictureView(picture, maxWidth, maxHeight) {
  if (!isEmbedded(picture)) {
    const chip = document.createElement("span");
    chip.className = "address";
    chip.textContent = picture.url ?? `${picture.name} was too large to keep and is no longer sent`;
    chip.title = picture.url ?? "";
    return chip;
  }
  const image = document.createElement("img");
  const scale = Math.min(1, maxWidth / picture.width, maxHeight / picture.height);
  image.width = Math.max(1, Math.round(picture.width * scale));
  image.height = Math.max(1, Math.round(picture.height * scale));
  image.alt = picture.alt ?? picture.name;
  image.src = picture.url;
  return image;
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new PictureError(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}
