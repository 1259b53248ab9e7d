import assert from "node:assert/strict";
import { test } from "node:test";
import { keepInNotebook, mergeState, shownIn } from "../../widgets/js/src/notebook";

const KIND = "pantheraml_widgets.run_panel.RunPanel";

function panel(layout: string, seq: number): object {
  return { model_name: "AnyModel", state: { _anywidget_id: KIND, layout: `IPY_MODEL_${layout}`, seq } };
}

test("the file keeps the panels that it shows, live before saved, and others' widgets as they are", () => {
  const other = { model_name: "SliderModel", state: {} };
  const layout = { model_name: "LayoutModel", state: {} };
  const saved = {
    state: { slider: other, a: panel("la", 1), la: layout, old: panel("lold", 1), lold: layout },
  };
  const live = { state: { a: panel("la", 2), la: layout, c: panel("lc", 2), lc: layout, x: other } };
  const merged = mergeState(live, saved, new Set(["a", "slider"]), KIND);
  assert.deepEqual(merged["state"], { slider: other, a: panel("la", 2), la: layout });
  const offline = mergeState({ state: {} }, saved, new Set(["a"]), KIND);
  assert.deepEqual(offline["state"], { slider: other, a: panel("la", 1), la: layout });
});

test("shown are the widgets of outputs", () => {
  const data = { "application/vnd.jupyter.widget-view+json": { model_id: "a" } };
  const notebook = { cells: [{ outputs: [{ data }, { text: "x" }] }, { source: "" }, null] };
  assert.deepEqual([...shownIn(notebook)], ["a"]);
  assert.deepEqual([...shownIn(null)], []);
});

test("a manager without a notebook is left alone", () => {
  assert.equal(keepInNotebook({}, KIND), null);
  assert.equal(keepInNotebook({ context: null, get_state_sync: () => ({}) }, KIND), null);
  assert.equal(keepInNotebook({ context: { save: async () => {} } }, KIND), null);
});

test("a kernel that restarts before it ever answered leaves the state that was shown", () => {
  const slots: ((sender: unknown, state: string) => void)[] = [];
  const metadata = new Map<string, unknown>();
  const data = { "application/vnd.jupyter.widget-view+json": { model_id: "a" } };
  const context = {
    save: async () => {},
    saveState: { connect: (slot: (typeof slots)[0]) => void slots.push(slot) },
    model: {
      toJSON: () => ({ cells: [{ outputs: [{ data }] }] }),
      getMetadata: (key: string) => metadata.get(key),
      setMetadata: (key: string, value: unknown) => void metadata.set(key, value),
    },
  };
  let live: object = { a: panel("la", 5) };
  keepInNotebook({ context, get_state_sync: () => ({ state: live }) }, KIND)?.look();
  live = {};
  slots[0]?.(null, "started");
  assert.deepEqual(metadata.get("widgets"), {
    "application/vnd.jupyter.widget-state+json": {
      version_major: 2,
      version_minor: 0,
      state: { a: panel("la", 5) },
    },
  });
});

test("each save writes the state first, also what a restarted kernel's manager forgot", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const slots: ((sender: unknown, state: string) => void)[] = [];
  const metadata = new Map<string, unknown>();
  let saves = 0;
  const data = { "application/vnd.jupyter.widget-view+json": { model_id: "a" } };
  const context = {
    save: async () => void saves++,
    saveState: { connect: (slot: (typeof slots)[0]) => void slots.push(slot) },
    model: {
      toJSON: () => ({ cells: [{ outputs: [{ data }] }] }),
      getMetadata: (key: string) => metadata.get(key),
      setMetadata: (key: string, value: unknown) => void metadata.set(key, value),
    },
  };
  let live: object = { a: panel("la", 5) };
  const manager = { context, get_state_sync: () => ({ state: live }) };
  keepInNotebook(manager, KIND)?.save();
  live = {};
  assert.equal(saves, 0);
  t.mock.timers.tick(500);
  assert.equal(saves, 1);
  assert.equal(metadata.size, 0);
  slots[0]?.(null, "completed");
  assert.equal(metadata.size, 0);
  slots[0]?.(null, "started");
  assert.deepEqual(metadata.get("widgets"), {
    "application/vnd.jupyter.widget-state+json": {
      version_major: 2,
      version_minor: 0,
      state: { a: panel("la", 5) },
    },
  });
});
