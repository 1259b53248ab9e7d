/**
 * The panel's place in the notebook file.
 *
 * A page that is reloaded finds the panel again only if the notebook with it was saved, and a
 * trusted notebook without its kernel shows "model not found" in its place, not the static record
 * beside it, unless the widget's state is in the file too. JupyterLab and Notebook put it there
 * only where a setting says so. A widget is not told about its notebook, but their widget managers
 * know it as `context`; elsewhere there is none, and the front end's own ways have to do.
 */

import { isObject, type Json, type JsonObject } from "./protocol";

const STATE = "application/vnd.jupyter.widget-state+json";
const VIEW = "application/vnd.jupyter.widget-view+json";
const REFERENCE = "IPY_MODEL_";
const SAVER = Symbol.for("pantheraml.saver");

interface LabContext {
  isDisposed?: boolean;
  save(): Promise<void>;
  saveState: { connect(slot: (sender: unknown, state: string) => void): void };
  model: {
    toJSON(): unknown;
    getMetadata(key: string): unknown;
    setMetadata(key: string, value: unknown): void;
  };
  [SAVER]?: () => void;
}

interface LabManager {
  context: LabContext;
  get_state_sync(options: { drop_defaults: boolean }): unknown;
}

function has(value: unknown, ...methods: string[]): boolean {
  if (typeof value !== "object" || value === null) return false;
  const known: Record<string, unknown> = Object.fromEntries(
    methods.map((name) => [name, (value as Record<string, unknown>)[name]]),
  );
  return methods.every((name) => typeof known[name] === "function");
}

function isLab(manager: object): manager is LabManager {
  if (!has(manager, "get_state_sync") || !("context" in manager)) return false;
  const { context } = manager;
  if (!has(context, "save")) return false;
  const { saveState, model } = context as Partial<LabContext>;
  return has(saveState, "connect") && has(model, "toJSON", "getMetadata", "setMetadata");
}

/** Ids of the widgets that a notebook's outputs show. */
export function shownIn(notebook: unknown): Set<string> {
  const shown = new Set<string>();
  const cells = isObject(notebook) && Array.isArray(notebook["cells"]) ? notebook["cells"] : [];
  for (const cell of cells.filter(isObject)) {
    const outputs = Array.isArray(cell["outputs"]) ? cell["outputs"] : [];
    for (const output of outputs.filter(isObject)) {
      const data = isObject(output["data"]) ? output["data"] : {};
      const view = data[VIEW];
      if (isObject(view) && typeof view["model_id"] === "string") shown.add(view["model_id"]);
    }
  }
  return shown;
}

function models(saved: unknown): JsonObject {
  return isObject(saved) && isObject(saved["state"]) ? saved["state"] : {};
}

function isPanel(model: Json | undefined, kind: string): model is JsonObject {
  return isObject(model) && isObject(model["state"]) && model["state"]["_anywidget_id"] === kind;
}

/**
 * The widget state for the file: what is there of other widgets, and of the panels (`kind`) those
 * that an output shows, from the live state or else as they were saved. Panels of cells that ran
 * again since go, so the file does not grow with each run.
 */
export function mergeState(
  live: unknown,
  saved: unknown,
  shown: Set<string>,
  kind: string,
): JsonObject {
  const known: JsonObject = { ...models(saved), ...models(live) };
  const merged: JsonObject = { ...models(saved) };
  for (const [id, model] of Object.entries(known)) {
    if (!isPanel(model, kind)) continue;
    const own = isObject(model["state"]) ? model["state"] : {};
    const layout = String(own["layout"] ?? "").replace(REFERENCE, "");
    for (const each of [id, layout]) {
      const state = known[each];
      if (shown.has(id) && state !== undefined) merged[each] = state;
      else delete merged[each];
    }
  }
  return { version_major: 2, version_minor: 0, state: merged };
}

/**
 * What saves a notebook soon: one for all of its panels, and not beside a save that it saw begin.
 * Lab does not keep its own saves apart, and takes the one for a change that somebody else has made
 * on disk: it asks whether to overwrite it. It is kept at the context, since each panel has a copy
 * of this module for itself.
 */
function saverOf(context: LabContext): () => void {
  const known = context[SAVER];
  if (known !== undefined) return known;
  let timer: ReturnType<typeof setTimeout> | undefined;
  let saving = false;
  let due = false;
  const save = (): void => {
    due = saving;
    if (due || context.isDisposed) return;
    context.save().catch((error: unknown) => {
      console.warn("pantheraml: the notebook was not saved after display:", error);
    });
  };
  const soon = (): void => {
    clearTimeout(timer);
    // The output area adds the panel to the notebook right after it was rendered; and after a save
    // Lab asks for its copy of the file.
    timer = setTimeout(save, 500);
  };
  // One that was cancelled in a dialog does not end; the next one that does ends both.
  context.saveState.connect((_, state) => {
    saving = state === "started";
    if (!due || saving) return;
    due = false;
    soon();
  });
  context[SAVER] = soon;
  return soon;
}

/**
 * Keeps the state of the panels in the notebook. Returns null where there is no such notebook, else
 * what remembers the state as it is now, what saves the notebook soon, and what writes the state
 * into the unsaved notebook.
 */
export function keepInNotebook(
  manager: object,
  kind: string,
): { look(): void; save(): void; mark(): void } | null {
  if (!isLab(manager)) return null;
  const { context } = manager;
  // The manager forgets its models when the kernel restarts; a save after that still needs them.
  let seen: JsonObject = {};
  const look = (): JsonObject => {
    seen = { ...seen, ...models(manager.get_state_sync({ drop_defaults: true })) };
    return { state: seen };
  };
  const mark = (): void => {
    const { model } = context;
    const widgets = model.getMetadata("widgets");
    const saved = isObject(widgets) ? widgets[STATE] : undefined;
    const state = mergeState(look(), saved, shownIn(model.toJSON()), kind);
    const kept = models(state);
    seen = Object.fromEntries(Object.entries(seen).filter(([id]) => id in kept));
    model.setMetadata("widgets", { ...(isObject(widgets) ? widgets : {}), [STATE]: state });
  };
  context.saveState.connect((_, state) => {
    if (state === "started") mark();
  });
  const soon = saverOf(context);
  const save = (): void => {
    look();
    soon();
  };
  return { look: () => void look(), save, mark };
}
