// Tabs of the page. Arrow keys move between them.

export class Tabs {
  /** `list` contains buttons with role=tab; `onSelect(name)` gets the id of the panel that is shown. */
  constructor(list, onSelect) {
    this.tabs = [...list.querySelectorAll("[role=tab]")];
    this.onSelect = onSelect;
    for (const tab of this.tabs) tab.addEventListener("click", () => this.select(panelOf(tab)));
    list.addEventListener("keydown", (event) => this.#key(event));
  }

  /** The id of the panel that is shown. */
  get current() {
    return panelOf(this.tabs.find((tab) => tab.ariaSelected === "true"));
  }

  /** Shows the panel with this id, or the first panel for an unknown id. */
  select(name) {
    const chosen = this.tabs.find((tab) => panelOf(tab) === name) ?? this.tabs[0];
    for (const tab of this.tabs) {
      Object.assign(tab, { ariaSelected: String(tab === chosen), tabIndex: tab === chosen ? 0 : -1 });
      document.getElementById(panelOf(tab)).hidden = tab !== chosen;
    }
    this.onSelect(panelOf(chosen));
    return chosen;
  }

  #key(event) {
    const { length } = this.tabs;
    const index = this.tabs.indexOf(event.target);
    const moves = { ArrowRight: index + 1, ArrowLeft: index - 1 + length, Home: 0, End: length - 1 };
    if (!(event.key in moves)) return;
    this.select(panelOf(this.tabs[moves[event.key] % length])).focus();
    event.preventDefault();
  }
}

const panelOf = (tab) => tab.getAttribute("aria-controls");
