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

/** What a panel sees of a notebook that shows panel "a", and what it makes of it. */
function lab() {
  const slots: ((sender: unknown, state: string) => void)[] = [];
  const metadata = new Map<string, unknown>();
  const data = { "application/vnd.jupyter.widget-view+json": { model_id: "a" } };
  const made = {
    saves: 0,
    live: { a: panel("la", 5) } as object,
    metadata,
    tell: (state: string) => slots.forEach((slot) => slot(null, state)),
    manager: {
      context: {
        isDisposed: false,
        save: async () => void made.saves++,
        saveState: { connect: (slot: (typeof slots)[0]) => void slots.push(slot) },
        model: {
          toJSON: () => ({ cells: [{ outputs: [{ data }] }] }),
          getMetadata: (key: string) => metadata.get(key),
          setMetadata: (key: string, value: unknown) => void metadata.set(key, value),
        },
      },
      get_state_sync: () => ({ state: made.live }),
    },
  };
  return made;
}

const KEPT = {
  "application/vnd.jupyter.widget-state+json": {
    version_major: 2,
    version_minor: 0,
    state: { a: panel("la", 5) },
  },
};

test("a kernel that restarts before it ever answered leaves the state that was shown", () => {
  const notebook = lab();
  keepInNotebook(notebook.manager, KIND)?.look();
  notebook.live = {};
  notebook.tell("started");
  assert.deepEqual(notebook.metadata.get("widgets"), KEPT);
});

test("each save writes the state first, also what a restarted kernel's manager forgot", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const notebook = lab();
  keepInNotebook(notebook.manager, KIND)?.save();
  notebook.live = {};
  assert.equal(notebook.saves, 0);
  t.mock.timers.tick(500);
  assert.equal(notebook.saves, 1);
  assert.equal(notebook.metadata.size, 0);
  notebook.tell("completed");
  assert.equal(notebook.metadata.size, 0);
  notebook.tell("started");
  assert.deepEqual(notebook.metadata.get("widgets"), KEPT);
});

test("two panels that are shown together are saved once", (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const notebook = lab();
  const first = keepInNotebook(notebook.manager, KIND);
  const second = keepInNotebook(notebook.manager, KIND);
  first?.save();
  t.mock.timers.tick(400);
  second?.save();
  t.mock.timers.tick(499);
  assert.equal(notebook.saves, 0);
  t.mock.timers.tick(1);
  assert.equal(notebook.saves, 1);
});

test("a panel's save waits for the end of one that is under way", (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  for (const end of ["completed", "failed"]) {
    const notebook = lab();
    keepInNotebook(notebook.manager, KIND)?.save();
    notebook.tell("started");
    t.mock.timers.tick(500);
    assert.equal(notebook.saves, 0);
    notebook.tell(end);
    assert.equal(notebook.saves, 0);
    t.mock.timers.tick(500);
    assert.equal(notebook.saves, 1);
    notebook.tell("started");
    notebook.tell("completed");
    t.mock.timers.tick(500);
    assert.equal(notebook.saves, 1);
  }
});

test("a notebook that was closed meanwhile is left alone", (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const notebook = lab();
  keepInNotebook(notebook.manager, KIND)?.save();
  notebook.manager.context.isDisposed = true;
  t.mock.timers.tick(500);
  assert.equal(notebook.saves, 0);
});
