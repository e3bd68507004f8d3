// Saved runs in the browser's IndexedDB: an entry for the list, and the content, which has all tokens.

const MAX_SAVED = 200; // the oldest ones are deleted

const result = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** An entry is {id, name, time, tokens, model}; a content is any value that can be cloned. */
export class Store {
  constructor() {
    this.database = null; // a promise, after the first use
  }

  /** Entries, newest first. */
  async list() {
    const { entries } = await this.#stores("readonly");
    return (await result(entries.getAll())).sort((a, b) => b.time - a.time);
  }

  /** {entry, content}; undefined for an id that is not there. */
  async get(id) {
    const { entries, contents } = await this.#stores("readonly");
    const [entry, content] = await Promise.all([entries.get(id), contents.get(id)].map(result));
    return entry && { entry, content };
  }

  /** Saves a run. The name of one that is saved already stays. */
  async put(entry, content) {
    const { entries, contents } = await this.#stores("readwrite");
    const known = await result(entries.get(entry.id));
    entries.put({ ...entry, name: known?.name ?? entry.name });
    contents.put(content, entry.id);
    const all = await result(entries.getAll());
    for (const { id } of all.sort((a, b) => b.time - a.time).slice(MAX_SAVED)) {
      entries.delete(id);
      contents.delete(id);
    }
    await new Promise((resolve, reject) => {
      entries.transaction.oncomplete = resolve;
      entries.transaction.onabort = () => reject(entries.transaction.error);
    });
  }

  async rename(id, name) {
    const { entries } = await this.#stores("readwrite");
    const entry = await result(entries.get(id));
    if (entry) await result(entries.put({ ...entry, name }));
  }

  async delete(id) {
    const { entries, contents } = await this.#stores("readwrite");
    await Promise.all([entries.delete(id), contents.delete(id)].map(result));
  }

  async #stores(mode) {
    this.database ??= open();
    const transaction = (await this.database).transaction(["entries", "contents"], mode);
    return { entries: transaction.objectStore("entries"), contents: transaction.objectStore("contents") };
  }
}

async function open() {
  const request = indexedDB.open("logprobd-inspector", 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("entries", { keyPath: "id" });
    request.result.createObjectStore("contents");
  };
  return await result(request);
}
