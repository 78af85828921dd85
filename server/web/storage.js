/** What a reload of this tab keeps. Where the browser allows no storage, things are kept until the page is left. */

const PREFIX = "idefics2.";
const inMemory = new Map();

/** The text under a name, or null. */
export function recall(name) {
  try {
    return sessionStorage.getItem(PREFIX + name) ?? inMemory.get(name) ?? null;
  } catch {
    return inMemory.get(name) ?? null;
  }
}

/** The value under a name, or `otherwise` where there is none that can be read. */
export function recallValue(name, otherwise) {
  try {
    return JSON.parse(recall(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Whether there was room to keep it over a reload. */
export function keep(name, text) {
  try {
    sessionStorage.setItem(PREFIX + name, text);
    inMemory.delete(name);
    return true;
  } catch {
    inMemory.set(name, text);
    return false;
  }
}

export function forget(name) {
  inMemory.delete(name);
  try {
    sessionStorage.removeItem(PREFIX + name);
  } catch {
    // Then nothing was kept there either.
  }
}
