/** anywidget's way in: one store per model (`initialize`), any number of views (`render`). */

import type { AnyWidget } from "@anywidget/types";
import { renderPanel } from "./panel";
import { Store } from "./store";

interface Traits {
  snapshot: unknown;
}

/**
 * Saves the notebook, so that a reload finds the panel in it.
 *
 * A widget is not told about its notebook. The widget managers of JupyterLab and Notebook know it
 * as `context`; elsewhere there is none, and the front end's own autosave has to do.
 */
function saveNotebook(manager: object): void {
  const context: unknown = "context" in manager ? manager.context : undefined;
  if (typeof context !== "object" || context === null || !("save" in context)) return;
  const { save } = context;
  if (typeof save !== "function") return;
  Promise.resolve(save.call(context)).catch((error: unknown) => {
    console.warn("pantheraml: the notebook was not saved after display:", error);
  });
}

/** Not crypto.randomUUID: a hub on plain http has no secure context. */
function randomId(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const widget = (): ReturnType<Extract<AnyWidget<Traits>, () => unknown>> => {
  // A function, because what initialize makes is for the views of this model only.
  let store: Store | null = null;
  let fresh = false;
  return {
    initialize({ model, signal }) {
      const own = new Store(
        (message) => model.send(message),
        randomId,
      );
      store = own;
      model.on("change:snapshot", () => own.load(model.get("snapshot")));
      model.on("msg:custom", (message: unknown) => {
        if (own.receive(message) && !fresh) {
          fresh = true;
          // The output area adds the panel to the notebook right after it was rendered.
          setTimeout(() => saveNotebook(model.widget_manager), 500);
        }
      });
      // A restarted kernel does not close the comm, it just forgets it: ask whether it is there.
      model.on("comm_live_update", () => own.hello());
      signal.addEventListener("abort", () => own.destroy());
      own.load(model.get("snapshot"));
      own.hello();
    },
    render({ el, signal }) {
      if (store === null) throw new Error("render before initialize");
      renderPanel(el, store, signal);
    },
  };
};

export default widget;
