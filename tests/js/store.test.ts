import assert from "node:assert/strict";
import { test } from "node:test";
import { emptyColumns } from "../../widgets/js/src/curve";
import type { Columns, Outgoing } from "../../widgets/js/src/protocol";
import { Store } from "../../widgets/js/src/store";

function rows(steps: number[], loss: (step: number) => number | string = (s) => 10 / s): Columns {
  const columns = emptyColumns();
  for (const step of steps) {
    columns.step.push(step);
    columns.loss.push(loss(step) as number);
    columns.learning_rate.push(1e-4);
    columns.grad_norm.push(1);
    columns.tokens_per_second.push(5000);
    columns.seconds.push(0.5);
  }
  return columns;
}

function range(from: number, to: number): number[] {
  return Array.from({ length: to - from + 1 }, (_, i) => from + i);
}

function snapshot(seq: number, steps: number[], events: object[] = []): object {
  return { seq, name: "run", max_steps: 100, columns: rows(steps), events, memory: [] };
}

function tick(after: number, seq: number, steps: number[], events: object[] = []): object {
  return { kind: "tick", after, seq, columns: rows(steps), events, memory: null };
}

function make(t: { after(fn: () => void): void }): { store: Store; sent: Outgoing[] } {
  const sent: Outgoing[] = [];
  let ids = 0;
  const store = new Store(
    (message) => sent.push(message) > 0,
    () => `id-${++ids}`,
  );
  t.after(() => store.destroy());
  return { store, sent };
}

test("a snapshot and contiguous ticks make the curve", (t) => {
  const { store, sent } = make(t);
  store.load(snapshot(10, range(1, 8)));
  store.receive(tick(10, 12, [9, 10]));
  assert.deepEqual(store.curve.columns.step, range(1, 10));
  assert.equal(store.step, 10);
  assert.equal(sent.length, 0);
});

test("what a run says of itself without an event is shown, and goes when it no longer holds", (t) => {
  const { store } = make(t);
  const paused = { seq: 9, time: 1, type: "state", state: "paused", step: 8, reason: "NaN" };
  store.load(snapshot(10, range(1, 8), [paused]));
  assert.equal(store.reason, "NaN"); // of a notebook that was saved before panels said it
  store.load({ ...snapshot(10, range(1, 8), [paused]), reason: "the disk is full" });
  assert.equal(store.reason, "the disk is full");
  store.receive(tick(10, 11, [9]));
  assert.equal(store.reason, "the disk is full");
  store.receive({ ...tick(11, 11, []), reason: "" });
  assert.equal(store.reason, "");
  assert.equal(store.phase, "paused");
});

test("readings of GPUs come live, without a step", (t) => {
  const { store, sent } = make(t);
  store.load(snapshot(10, range(1, 8)));
  assert.deepEqual(store.gpus, []);
  store.receive({ ...tick(10, 10, []), gpus: [{ rank: 0, power: 690 }] });
  store.receive(tick(10, 11, [9]));
  assert.deepEqual(store.gpus, [{ rank: 0, power: 690 }]);
  assert.equal(store.step, 9);
  assert.equal(sent.length, 0);
});

test("a gap asks for the whole and adds nothing", (t) => {
  const { store, sent } = make(t);
  store.load(snapshot(10, range(1, 8)));
  store.receive(tick(11, 12, [10]));
  assert.deepEqual(store.curve.columns.step, range(1, 8));
  assert.deepEqual(sent, [{ kind: "hello" }]);
  store.load(snapshot(12, range(1, 10)));
  assert.deepEqual(store.curve.columns.step, range(1, 10));
});

test("a tick or a snapshot from the past changes nothing", (t) => {
  const { store, sent } = make(t);
  store.load(snapshot(10, range(1, 8)));
  store.receive(tick(4, 9, [7]));
  store.load(snapshot(9, range(1, 7)));
  assert.deepEqual(store.curve.columns.step, range(1, 8));
  assert.equal(sent.length, 0);
});

test("a new timeline replaces what it repeats", (t) => {
  const { store } = make(t);
  store.load(snapshot(10, range(1, 8)));
  store.receive(tick(10, 13, [5, 6]));
  assert.deepEqual(store.curve.columns.step, range(1, 6));
  assert.equal(store.curve.smooth.length, 6);
});

test("a command goes from sent over accepted to applied", (t) => {
  const { store, sent } = make(t);
  const args = { learning_rate: 1e-4 };
  // The same command was there before, from another page: it is not this one.
  const old = { type: "applied", seq: 9, time: 1, command: 3, verb: "set", step: 4, workers: [0], args };
  store.load(snapshot(10, range(1, 8), [old]));
  store.command("set", args);
  assert.deepEqual(sent, [{ kind: "command", id: "id-1", verb: "set", args }]);
  assert.equal(store.lastRequest("set")?.status, "sent");
  store.load(snapshot(10, range(1, 8), [old]));
  assert.equal(store.lastRequest("set")?.status, "sent");
  store.receive({ kind: "reply", id: "id-1", error: null });
  assert.equal(store.lastRequest("set")?.status, "accepted");
  const common = { time: 2, command: 4, verb: "set", args };
  store.receive(tick(10, 11, [], [{ ...common, type: "command", seq: 11 }]));
  assert.equal(store.lastRequest("set")?.number, 4);
  const applied = { ...common, type: "applied", seq: 12, step: 9, workers: [0, 1] };
  store.receive(tick(11, 13, [9], [applied]));
  const request = store.lastRequest("set");
  assert.equal(request?.status, "applied");
  assert.equal(request?.step, 9);
  assert.equal(request?.workers, 2);
  assert.deepEqual(
    store.markers.map((m) => m.step),
    [4, 9],
  );
});

test("another page's command with other arguments is not taken for ours", (t) => {
  const { store } = make(t);
  store.load(snapshot(10, range(1, 8)));
  store.command("set", { learning_rate: 1e-4 });
  const other = { type: "applied", seq: 11, time: 1, command: 1, verb: "set", step: 9, workers: [0] };
  store.receive(tick(10, 11, [], [{ ...other, args: { learning_rate: 2e-4 } }]));
  assert.equal(store.lastRequest("set")?.status, "sent");
});

test("an error and a refusal both end a command with their reason", (t) => {
  const { store } = make(t);
  store.load(snapshot(10, [1]));
  store.command("pause");
  store.receive({ kind: "reply", id: "id-1", error: "no coordinator" });
  assert.equal(store.lastRequest("pause")?.status, "refused");
  assert.equal(store.lastRequest("pause")?.reason, "no coordinator");
  store.command("checkpoint");
  const refused = { type: "refused", seq: 11, time: 1, command: 2, verb: "checkpoint", reason: "disk" };
  store.receive(tick(10, 11, [], [refused]));
  assert.equal(store.lastRequest("checkpoint")?.reason, "disk");
});

test("samples grow in place and text stays text", (t) => {
  const { store } = make(t);
  store.load(snapshot(1, [1]));
  const part = { type: "sample", time: 1, command: 7, step: 1 };
  store.receive(tick(1, 2, [], [{ ...part, seq: 2, text: "<b>", done: false }]));
  store.receive(tick(2, 3, [], [{ ...part, seq: 3, text: "<b>x", done: true }]));
  const sample = { key: "7", command: "7", row: 0, step: 1, text: "<b>x", done: true, ended: false };
  assert.deepEqual(store.samples, [sample]);
  // Several prompts of one command are answered beside each other.
  store.receive(tick(3, 4, [], [{ ...part, seq: 4, row: 1, text: "y", done: false }]));
  assert.deepEqual(store.samples.map((sample) => sample.key), ["7.1", "7"]);
});

test("states, plan, evaluations and the time left", (t) => {
  const { store } = make(t);
  store.load(snapshot(10, range(1, 50), [{ type: "state", seq: 1, time: 1, state: "running" }]));
  assert.equal(store.phase, "running");
  assert.equal(store.eta, 25);
  const events = [
    { type: "eval", seq: 11, time: 1, step: 50, loss: 0.5 },
    { type: "plan", seq: 12, time: 1, by_cause: {}, total: 5, available: 10, text: "plan of m" },
    { type: "state", seq: 13, time: 1, state: "failed", reason: "out of luck" },
  ];
  store.receive(tick(10, 13, [], events));
  assert.deepEqual(store.evals, [{ step: 50, loss: 0.5 }]);
  assert.equal(store.plan?.["available"], 10);
  assert.equal(store.plan?.["text"], "plan of m");
  assert.ok(!store.log.some((line) => line.text.includes("plan"))); // it has a place of its own
  assert.equal(store.active, false);
  assert.equal(store.reason, "out of luck");
  assert.ok(Number.isNaN(store.eta));
});

test("nobody answers: offline; a welcome: live again", (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const { store } = make(t);
  store.load(snapshot(10, [1]));
  store.hello();
  t.mock.timers.tick(3999);
  assert.equal(store.connection, "waiting");
  t.mock.timers.tick(2);
  assert.equal(store.connection, "offline");
  assert.equal(store.receive({ kind: "welcome", fresh: true }), true);
  assert.equal(store.connection, "live");
});

test("a hello without an answer is said again, less and less often, and not for ever", (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const { store, sent } = make(t);
  store.load(snapshot(10, [1]));
  store.hello();
  store.receive({ kind: "reply", id: "1", error: "refused" }); // not how the run stands
  t.mock.timers.tick(4001);
  assert.equal(sent.length, 2);
  t.mock.timers.tick(7998);
  assert.equal(sent.length, 2);
  t.mock.timers.tick(2);
  assert.deepEqual(sent, Array(3).fill({ kind: "hello" }));
  store.receive({ kind: "welcome", fresh: false });
  t.mock.timers.tick(1e6);
  assert.equal(sent.length, 3);
  store.hello();
  for (let i = 0; i < 20; i++) t.mock.timers.tick(1e6);
  assert.equal(sent.length, 3 + 7);
  assert.equal(store.connection, "offline");
});

test("nobody to send to: offline at once, and the command says so", (t) => {
  const store = new Store(
    () => false,
    () => "id",
  );
  t.after(() => store.destroy());
  store.load(snapshot(10, [1]));
  store.command("pause");
  assert.equal(store.lastRequest("pause")?.reason, "not connected");
  assert.equal(store.connection, "offline");
});

test("a restart from a checkpoint forgets what came after it", (t) => {
  const { store } = make(t);
  const before = { type: "state", seq: 1, time: 1, state: "starting", step: 0 };
  const evals = [4, 8].map((step) => ({ type: "eval", seq: step, time: 1, step, loss: 1 }));
  store.load(snapshot(10, range(1, 8), [before, ...evals]));
  assert.equal(store.curve.length, 8);
  const again = { type: "state", seq: 11, time: 1, state: "starting", step: 6 };
  store.receive(tick(10, 12, [7], [again]));
  assert.deepEqual(store.curve.columns.step, range(1, 7));
  assert.deepEqual(store.evals, [{ step: 4, loss: 1 }]);
});

test("a late view has the whole held-out curve, beside the newest events", (t) => {
  const { store } = make(t);
  const events = [
    { type: "state", seq: 5, time: 1, state: "starting", step: 0 },
    { type: "state", seq: 6, time: 1, state: "running", step: 0 },
    { type: "eval", seq: 900, time: 1, step: 8, loss: 1 },
  ];
  store.load({ ...snapshot(901, range(1, 8), events), evals: { step: [4, 8], loss: ["NaN", 1] } });
  assert.deepEqual(store.evals, [{ step: 4, loss: NaN }, { step: 8, loss: 1 }]);
  assert.equal(store.phase, "running");
  store.load(snapshot(902, range(1, 8), events)); // of a notebook that was saved before
  assert.deepEqual(store.evals, [{ step: 8, loss: 1 }]);
});

test("settings stay marked after a crash, and go where somebody goes back", (t) => {
  const { store } = make(t);
  const set = { type: "applied", verb: "set", seq: 9, time: 1, command: 1, step: 12, workers: [0] };
  const start = { type: "state", time: 2, state: "starting", step: 11 };
  store.load(snapshot(10, range(1, 15), [set]));
  store.receive(tick(10, 11, [], [{ ...start, seq: 11 }]));
  assert.deepEqual(store.markers, [{ step: 12, kind: "set" }]);
  store.receive(tick(11, 12, [], [{ ...start, seq: 12, rewound: true }]));
  assert.deepEqual(store.markers, []);
});

test("a save that a crash broke off is under way no more", (t) => {
  const { store } = make(t);
  const saving = { type: "progress", seq: 2, time: 1, what: "saving", fraction: 0.5 };
  store.load(snapshot(2, [1], [{ type: "state", seq: 1, time: 1, state: "running", step: 1 }, saving]));
  assert.equal(store.progress?.what, "saving");
  const start = { type: "state", time: 1, state: "starting", step: 1 };
  store.receive(tick(2, 3, [], [{ ...start, seq: 3 }]));
  assert.deepEqual({ progress: store.progress }, { progress: null });
  const loading = { ...saving, seq: 4, what: "loading" };
  store.receive(tick(3, 5, [], [loading, { ...start, seq: 5 }]));
  assert.equal(store.progress?.what, "loading");
});

test("an answer that begins again takes the place of what it had", (t) => {
  const { store } = make(t);
  const sample = { type: "sample", time: 1, step: 5 };
  const events = [
    { ...sample, seq: 2, command: 1, text: "kept", done: true, ended: true },
    { ...sample, seq: 3, command: 2, text: "kept too", done: true },
    { type: "applied", seq: 4, time: 1, verb: "sample", command: 2, step: 5, workers: [0] },
    { ...sample, seq: 5, command: 3, text: "Once", done: false },
    { ...sample, seq: 6, command: 3, row: 1, text: "The end", done: true },
  ];
  store.load(snapshot(6, [5], events));
  store.receive(tick(6, 7, [], [{ type: "state", seq: 7, time: 1, state: "starting", step: 4 }]));
  assert.deepEqual(store.samples.map((s) => s.text), ["kept too", "kept"]);
});

test("an answer that a stop breaks off is written on no more", (t) => {
  const { store } = make(t);
  const sample = { type: "sample", time: 1, command: 1, step: 5, done: false };
  store.load(snapshot(3, [5], [{ ...sample, seq: 2, text: "a" }, { ...sample, seq: 3, row: 1, text: "b" }]));
  const end = { time: 1, verb: "sample", step: 5, reason: "the run is stopped" };
  store.receive(tick(3, 4, [], [{ ...end, type: "refused", seq: 4, command: 2 }]));
  assert.deepEqual(store.samples.map((s) => s.done), [false, false]);
  store.receive(tick(4, 5, [], [{ ...end, type: "refused", seq: 5, command: 1 }]));
  assert.deepEqual(store.samples.map((s) => s.done), [true, true]);
});

test("a command that went with its coordinator is refused", (t) => {
  const { store } = make(t);
  store.load(snapshot(10, [1]));
  store.command("checkpoint");
  store.receive({ kind: "reply", id: "id-1", error: null });
  const logged = { type: "command", seq: 11, time: 1, command: 1, verb: "checkpoint", args: {} };
  store.receive(tick(10, 11, [], [logged]));
  store.command("pause");
  store.receive({ kind: "reply", id: "id-2", error: null });
  const restart = { type: "restart", time: 2, attempt: 1, most: 3, delay: 1, from: "snapshot", step: 1 };
  store.receive(tick(11, 12, [], [{ ...restart, seq: 12, cause: "died" }]));
  assert.equal(store.lastRequest("pause")?.status, "accepted");
  const again = { ...restart, seq: 13, cause: "coordinator" };
  store.receive(tick(12, 13, [], [again]));
  assert.equal(store.lastRequest("pause")?.status, "refused");
  assert.match(store.lastRequest("pause")?.reason ?? "", /died before it was in the log; send it again/);
  assert.equal(store.lastRequest("checkpoint")?.status, "accepted"); // the next coordinator has it
  // One of before the command has nothing to do with it.
  store.command("pause");
  store.receive({ kind: "reply", id: "id-3", error: null });
  store.load(snapshot(14, [1], [again]));
  assert.equal(store.lastRequest("pause")?.status, "accepted");
});

test("what is not ours is ignored", (t) => {
  const { store } = make(t);
  store.load({});
  store.load(null);
  store.load({ seq: 1, columns: { step: [1] } });
  for (const message of [null, 3, "tick", [], {}, { kind: "tick" }, { kind: "anywidget-command" }]) {
    assert.equal(store.receive(message), false);
  }
  assert.equal(store.curve.length, 0);
  assert.equal(store.connection, "waiting");
});

test("the loss scale and skipped steps of float16 come with their steps", (t) => {
  const { store } = make(t);
  store.load(snapshot(10, range(1, 8)));
  assert.equal(store.scale, null);
  store.receive({ ...tick(10, 11, [9]), scale: { value: 256, skipped: 1 } });
  store.receive(tick(11, 12, [10]));
  assert.deepEqual(store.scale, { value: 256, skipped: 1 });
  store.load({ ...snapshot(13, range(1, 11)), scale: { value: 512, skipped: 1 } });
  assert.deepEqual(store.scale, { value: 512, skipped: 1 });
});
