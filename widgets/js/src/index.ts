/** anywidget's way in: one store per model (`initialize`), any number of views (`render`). */

import type { AnyModel, AnyWidget } from "@anywidget/types";
import { keepInNotebook } from "./notebook";
import { renderPanel } from "./panel";
import type { Outgoing } from "./protocol";
import { Store } from "./store";

interface Traits {
  snapshot: unknown;
  _anywidget_id: string;
}

/** Returns false where the kernel that had the other half is gone: its comm then throws. */
function sendTo(model: AnyModel<Traits>, message: Outgoing): boolean {
  try {
    model.send(message);
    return true;
  } catch (error) {
    console.info("pantheraml: the panel is not connected:", error);
    return false;
  }
}

/** Not crypto.randomUUID: a hub on plain http has no secure context. */
function randomId(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const widget = (): ReturnType<Extract<AnyWidget<Traits>, () => unknown>> => {
  // A function, because what initialize makes is for the views of this model only.
  let store: Store | null = null;
  let file: ReturnType<typeof keepInNotebook> = null;
  return {
    initialize({ model, signal }) {
      const own = new Store((message) => sendTo(model, message), randomId);
      store = own;
      file = keepInNotebook(model.widget_manager, model.get("_anywidget_id"));
      model.on("change:snapshot", () => {
        own.load(model.get("snapshot"));
        // Nothing more will come: what the file has now is what it should keep.
        if (!own.active) file?.mark();
      });
      model.on("msg:custom", (message: unknown) => {
        if (own.receive(message)) file?.save();
      });
      // A kernel that was restarted has forgotten us, one that was found again has not: ask.
      model.on("comm_live_update", () => own.hello());
      signal.addEventListener("abort", () => own.destroy());
      own.load(model.get("snapshot"));
      own.hello();
    },
    render({ el, signal }) {
      if (store === null) throw new Error("render before initialize");
      renderPanel(el, store, signal);
      // Now, not at the kernel's first answer: one that is restarted before it never gives it.
      file?.look();
    },
  };
};

export default widget;
