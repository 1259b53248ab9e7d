import assert from "node:assert/strict";
import { test } from "node:test";
import { logTicks } from "../../widgets/js/src/chart";
import { outcome, parseRate } from "../../widgets/js/src/controls";
import { Curve, emptyColumns } from "../../widgets/js/src/curve";
import * as format from "../../widgets/js/src/format";
import { deviceMemory, gpuWords } from "../../widgets/js/src/memory";
import { COLUMNS, toNumber, type Columns } from "../../widgets/js/src/protocol";

function rows(loss: number[], steps = loss.map((_, i) => i + 1)): Columns {
  const columns = emptyColumns();
  for (const name of COLUMNS) columns[name].push(...loss);
  columns.step.splice(0, loss.length, ...steps);
  return columns;
}

test("the smoothed loss is an unbiased exponential mean", () => {
  const curve = new Curve();
  curve.setSmoothing(0.5);
  curve.append(rows([4, 2, 6]));
  // (4·¼ + 2·½ + 6·1) / (¼ + ½ + 1), by hand.
  assert.equal(curve.smooth[0], 4);
  assert.ok(Math.abs((curve.smooth[1] ?? 0) - 4 / 1.5) < 1e-12);
  assert.ok(Math.abs((curve.smooth[2] ?? 0) - 8 / 1.75) < 1e-12);
  curve.setSmoothing(0);
  assert.deepEqual(curve.smooth, [4, 2, 6]);
});

test("a gap of k steps forgets as k steps do, and NaN is passed over", () => {
  const gap = new Curve();
  gap.setSmoothing(0.5);
  gap.append(rows([1, 3], [1, 3]));
  assert.ok(Math.abs((gap.smooth[1] ?? 0) - (0.25 * 0.5 * 1 + 0.75 * 3) / (0.25 * 0.5 + 0.75)) < 1e-12);
  const hole = new Curve();
  hole.append(rows([2, NaN]));
  assert.deepEqual(hole.smooth, [2, 2]);
});

test("nearest finds the row next to a step", () => {
  const curve = new Curve();
  assert.equal(curve.nearest(3), -1);
  curve.append(rows([1, 1, 1], [10, 20, 40]));
  assert.deepEqual([1, 10, 14, 15, 29, 31, 99].map((s) => curve.nearest(s)), [0, 0, 0, 1, 1, 2, 2]);
});

test("numbers as text", () => {
  assert.equal(format.decimal(2.30258), "2.3026");
  assert.equal(format.decimal(123.456), "123.46");
  assert.equal(format.decimal(NaN), format.NONE);
  assert.equal(format.decimal(NaN, true), "NaN");
  assert.equal(format.lossScale({ value: 2048, skipped: 0 }), "2048");
  assert.equal(format.lossScale({ value: 512, skipped: 1200 }), "512 · 1,200 skipped");
  assert.equal(format.lossScale(null), format.NONE);
  assert.equal(format.decimal(-Infinity, true), "−∞");
  assert.equal(format.rate(0.000183), "1.83e-4");
  assert.equal(format.shortRate(1e-4), "1e-4");
  assert.equal(format.shortRate(0.00018334), "1.833e-4");
  assert.equal(format.shortRate(0.05), "0.05");
  assert.equal(format.count(12345.6), "12,346");
  assert.equal(format.bytes(0), "0 B");
  assert.equal(format.bytes(1023), "1.00 KiB");
  assert.equal(format.bytes(318 * 2 ** 20), "318 MiB");
  assert.equal(format.duration(7.4), "0:07");
  assert.equal(format.duration(3600 * 3 + 249), "3:04:09");
  assert.equal(format.duration(86400 * 2 + 3600), "2 d 1 h");
  assert.equal(toNumber("-Infinity"), -Infinity);
  assert.ok(Number.isNaN(toNumber("NaN")));
});

test("events as lines", () => {
  const at = { seq: 1, time: 1 };
  const applied = { ...at, type: "applied", verb: "set", args: { learning_rate: 1e-4 }, step: 12 };
  assert.equal(format.describe(applied)?.text, "learning rate 1e-4: applied at step 12");
  const failed = format.describe({ ...at, type: "state", state: "failed", step: 3, reason: "disk" });
  assert.deepEqual(failed, { text: "failed at step 3: disk", level: "error" });
  assert.equal(format.describe({ ...at, type: "workers" }), null);
  const restart = { type: "restart", cause: "died", attempt: 2, most: 3, delay: 0.5, step: 40 };
  assert.deepEqual(format.describe({ ...at, ...restart, from: "snapshot", reason: "killed" }), {
    text: "restart 2 of 3: goes on by itself in 0.5 s, from the snapshot of step 40",
    level: "warning",
  });
});

test("the learning-rate field takes what people type and says what it does not take", () => {
  assert.deepEqual(parseRate(" 1e-4 "), { rate: 1e-4 });
  assert.deepEqual(parseRate("0,0002"), { rate: 2e-4 });
  for (const wrong of ["", "abc", "-1", "1e-4 2", "NaN", "Infinity"]) {
    assert.ok("error" in parseRate(wrong), wrong);
  }
});

test("the fate of a command in words", () => {
  const request = {
    id: "1",
    verb: "set" as const,
    args: { learning_rate: 1e-4 },
    number: 1,
    after: 0,
    step: 412,
    workers: 2,
    reason: "too large",
  };
  assert.equal(
    outcome({ ...request, status: "applied" }, 2),
    "learning rate 1e-4: applied at step 412 on 2/2 workers",
  );
  assert.equal(outcome({ ...request, status: "refused" }, 2), "learning rate 1e-4: refused. too large");
});

test("memory comes from the workers where they measured it, else from the plan", () => {
  const plan = { by_cause: { weights: 100, runtime: 10 }, available: 1000 };
  const workers = [{ device: "cpu" }, { device: "cpu" }];
  const planned = deviceMemory({ plan, memory: [], workers, gpus: [] });
  assert.deepEqual(planned.map((d) => [d.device, d.total, d.capacity]), [
    ["cpu #0", 110, 1000],
    ["cpu #1", 110, 1000],
  ]);
  const memory = [{ weights: 90, optimizer: 5, rss: 400 }, {}];
  const measured = deviceMemory({ plan, memory, workers, gpus: [{ rank: 1, age: 0, power: 70 }] });
  assert.deepEqual(measured.map((d) => d.total), [95, 110]);
  assert.equal(measured[0]?.measured, 400);
  assert.deepEqual(measured.map((d) => d.gpu), ["", "70 W"]);
  assert.deepEqual(deviceMemory({ plan: null, memory: [], workers: [], gpus: [] }), []);
});

test("what a GPU's driver says, and what it does not", () => {
  const all = {
    rank: 0, age: 0.4, utilisation: 0.97, mfu: 0.412, temperature: 64, power: 690.4, power_limit: 700,
    clock: 1755, throttle: "power cap", memory_others: 2 * 2 ** 30,
  };
  assert.equal(
    gpuWords(all),
    "97 % busy · MFU 41 % · 64 °C · 690 of 700 W · 1,755 MHz · slowed down by power cap · " +
      "other processes have 2.00 GiB",
  );
  assert.equal(gpuWords({ age: 60, temperature: 40, throttle: "" }), "40 °C · as of 60 s ago");
  assert.equal(gpuWords({ mfu: 0.4 }), "MFU 40 % · its driver has not answered yet");
  assert.equal(gpuWords({ trouble: "no NVML" }), "no NVML");
});

test("ticks of a logarithmic axis", () => {
  assert.deepEqual(logTicks(0.09, 11), [0.1, 0.2, 0.5, 1, 2, 5, 10]);
  assert.deepEqual(logTicks(2.05, 2.95), [2.2, 2.4, 2.6, 2.8]);
});
