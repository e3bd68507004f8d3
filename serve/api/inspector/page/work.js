// The requests of a pane: one piece of work at a time. A new one aborts the one before it.

export class Work {
  /** `view` has showError(error or null) and showBusy(busy). */
  constructor(page, view) {
    this.page = page;
    this.view = view;
    this.abort = null; // AbortController of the current work
  }

  get running() {
    return this.abort !== null;
  }

  stop() {
    this.abort?.abort();
  }

  /** Aborts the current work, does `task(signal)` and shows its error. */
  async run(task) {
    this.stop();
    const abort = new AbortController();
    this.abort = abort;
    this.view.showError(null);
    this.view.showBusy(true);
    try {
      await this.page.card();
      await task(abort.signal);
    } catch (error) {
      if (error.name !== "AbortError") {
        this.view.showError(error);
        this.page.onError(error);
      }
    } finally {
      if (this.abort === abort) {
        this.abort = null;
        this.view.showBusy(false);
      }
    }
  }
}
