/** The event list and the samples: two boxes of fixed height that scroll inside. */

import { el, setText } from "./dom";
import { clock, count } from "./format";
import type { Sample, Store } from "./store";

function box(title: string, empty: string): { node: HTMLElement; list: HTMLElement } {
  const list = el("div", {
    class: "pml-scroll",
    attrs: { tabindex: "0", role: "region", "aria-label": title },
  });
  list.append(el("p", { class: "pml-empty", text: empty }));
  const heading = el("h3", { class: "pml-heading", text: title });
  return { node: el("div", { class: "pml-box" }, [heading, list]), list };
}

export class EventList {
  readonly node: HTMLElement;
  private readonly list: HTMLElement;
  private readonly items = el("ol", { class: "pml-events" });
  private shown = "";

  constructor(private readonly store: Store) {
    ({ node: this.node, list: this.list } = box("Events", "Nothing has happened yet."));
  }

  /** Newest first, so that what is new needs no scrolling. */
  update(): void {
    const { log } = this.store;
    const last = log.at(-1);
    const mark = `${log.length}:${last?.seq ?? 0}`;
    if (mark === this.shown || last === undefined) return;
    this.shown = mark;
    this.items.replaceChildren(
      ...log.toReversed().map((line) =>
        el("li", { class: `pml-event pml-${line.level}` }, [
          el("time", { text: clock(line.time) }),
          el("span", { text: line.text }),
        ]),
      ),
    );
    this.list.replaceChildren(this.items);
  }
}

export class Samples {
  readonly node: HTMLElement;
  private readonly list: HTMLElement;
  private readonly empty: Element[]; // what stands there without samples
  private readonly items = new Map<string, Record<"node" | "head" | "text", HTMLElement>>();

  constructor(private readonly store: Store) {
    ({ node: this.node, list: this.list } = box("Samples", "run.sample(\"…\") writes here."));
    this.empty = [...this.list.children];
  }

  update(): void {
    const { samples } = this.store;
    for (const [key, item] of this.items) {
      if (!samples.some((sample) => sample.key === key)) {
        item.node.remove();
        this.items.delete(key);
      }
    }
    // A restart takes away what begins again.
    const nodes = samples.length > 0 ? samples.map((sample) => this.item(sample)) : this.empty;
    if (nodes.some((node, i) => this.list.children[i] !== node)) this.list.replaceChildren(...nodes);
  }

  private item(sample: Sample): HTMLElement {
    let item = this.items.get(sample.key);
    if (item === undefined) {
      const text = el("p", { class: "pml-sample-text" });
      const head = el("p", { class: "pml-sample-head" });
      item = { node: el("div", { class: "pml-sample" }, [head, text]), head, text };
      this.items.set(sample.key, item);
    }
    const several = this.store.samples.some((s) => s.command === sample.command && s.row > 0);
    const which = several ? `, prompt ${count(sample.row + 1)}` : "";
    setText(item.head, `step ${count(sample.step)}${which}`);
    setText(item.text, sample.done ? sample.text : `${sample.text} ▍`);
    return item.node;
  }
}
