/** Memory by cause: one stacked bar per device, a gauge against its capacity, one table. */

import { el, setText } from "./dom";
import { bytes, count } from "./format";
import { isObject, toNumber, toText, type JsonObject } from "./protocol";
import type { Store } from "./store";

export const CAUSES = [
  "weights",
  "adapters",
  "gradients",
  "optimizer",
  "activations",
  "workspace",
  "communication",
  "runtime",
] as const;

export interface DeviceMemory {
  device: string;
  /** Bytes, in the order of CAUSES. */
  byCause: number[];
  total: number;
  /** Bytes the run may use there; NaN when the plan does not say. */
  capacity: number;
  /** Bytes the operating system counts; NaN before the first measurement. */
  measured: number;
  /** What its driver says of a GPU, in words; "" where it is none. */
  gpu: string;
}

/** Seconds; where the driver answers a reading is one second old. */
const STALE = 5;

/** Load, temperature, power: what the driver says, and that it does not, in words. */
export function gpuWords(gpu: JsonObject): string {
  const words: string[] = [];
  const add = (name: string, say: (value: number) => string): void => {
    const value = toNumber(gpu[name]);
    if (Number.isFinite(value)) words.push(say(value));
  };
  add("utilisation", (share) => `${Math.round(100 * share)} % busy`);
  add("mfu", (share) => `MFU ${Math.round(100 * share)} %`);
  add("temperature", (degrees) => `${Math.round(degrees)} °C`);
  const limit = toNumber(gpu["power_limit"]);
  const of = Number.isFinite(limit) ? ` of ${Math.round(limit)}` : "";
  add("power", (watts) => `${Math.round(watts)}${of} W`);
  add("clock", (mhz) => `${count(mhz)} MHz`);
  const throttle = toText(gpu["throttle"]);
  if (throttle !== "") words.push(`slowed down by ${throttle}`);
  const others = toNumber(gpu["memory_others"]);
  if (others > 0) words.push(`other processes have ${bytes(others)}`);
  const age = toNumber(gpu["age"]);
  const trouble = toText(gpu["trouble"]);
  if (age > STALE) words.push(`as of ${Math.round(age)} s ago`);
  if (trouble !== "") words.push(trouble);
  else if (Number.isNaN(age)) words.push("its driver has not answered yet");
  return words.join(" · ");
}

/** What is known of each device: the measured split where there is one, else the plan's. */
export function deviceMemory(store: Pick<Store, "plan" | "memory" | "workers" | "gpus">): DeviceMemory[] {
  const { plan, memory, workers, gpus } = store;
  const planned = plan !== null && isObject(plan["by_cause"]) ? plan["by_cause"] : {};
  const capacity = toNumber(plan?.["available"]) || NaN;
  const rows = Math.max(workers.length, memory.length, plan === null ? 0 : 1);
  return Array.from({ length: rows }, (_, i) => {
    const now: JsonObject = memory[i] ?? {};
    const split = isObject(now["by_cause"]) ? now["by_cause"] : now;
    const source = CAUSES.some((cause) => cause in split) ? split : planned;
    const byCause = CAUSES.map((cause) => toNumber(source[cause]) || 0);
    const device = toText(workers[i]?.["device"]) || "device";
    const gpu = gpus.find((one) => toNumber(one["rank"]) === i);
    const twins = workers.filter((worker) => worker["device"] === device).length > 1;
    return {
      device: twins ? `${device} #${i}` : device,
      byCause,
      total: byCause.reduce((a, b) => a + b, 0),
      capacity,
      measured: toNumber(now["rss"]),
      gpu: gpu === undefined ? "" : gpuWords(gpu),
    };
  });
}

interface Row {
  node: HTMLElement;
  name: HTMLElement;
  value: HTMLElement;
  segments: HTMLElement[];
  gauge: HTMLElement;
  fill: HTMLElement;
  gpu: HTMLElement;
}

export class MemoryBars {
  readonly node: HTMLElement;
  private readonly list = el("div", { class: "pml-devices" });
  private readonly cells: HTMLElement[] = [];
  private readonly entries: HTMLElement[] = [];
  private rows: Row[] = [];

  constructor(private readonly store: Store) {
    const body = el("tbody");
    for (const cause of CAUSES) {
      const cell = el("td", { text: "0 B" });
      const head = el("th", { attrs: { scope: "row" } }, [
        el("span", { class: `pml-swatch pml-cause-${cause}` }),
        cause,
      ]);
      const entry = el("tr", {}, [head, cell]);
      this.cells.push(cell);
      this.entries.push(entry);
      body.append(entry);
    }
    const table = el("table", { class: "pml-causes", attrs: { "aria-label": "Memory by cause" } }, [
      body,
    ]);
    this.node = el("section", { class: "pml-memory", attrs: { "aria-label": "Memory" } }, [
      el("h3", { class: "pml-heading", text: "Memory" }),
      this.list,
      table,
    ]);
    this.setRows(1);
  }

  update(): void {
    const devices = deviceMemory(this.store);
    this.setRows(Math.max(1, devices.length));
    devices.forEach((device, i) => {
      const row = this.rows[i];
      if (row !== undefined) fill(row, device);
    });
    // Workers differ by little: the table shows the fullest one.
    const fullest = devices.reduce<DeviceMemory | null>(
      (most, device) => (most === null || device.total > most.total ? device : most),
      null,
    );
    CAUSES.forEach((_, i) => {
      const value = fullest?.byCause[i] ?? 0;
      const cell = this.cells[i];
      if (cell !== undefined) setText(cell, bytes(value));
      this.entries[i]?.classList.toggle("pml-none", value === 0);
    });
  }

  private setRows(wanted: number): void {
    if (wanted === this.rows.length) return;
    this.rows = Array.from({ length: wanted }, newRow);
    this.list.replaceChildren(...this.rows.map((row) => row.node));
  }
}

function newRow(): Row {
  const name = el("span", { class: "pml-device-name", text: "device" });
  const value = el("span", { class: "pml-device-value", text: "not planned yet" });
  const segments = CAUSES.map((cause) => el("span", { class: `pml-segment pml-cause-${cause}` }));
  const fillNode = el("span", { class: "pml-gauge-fill" });
  const gauge = el(
    "div",
    {
      class: "pml-gauge",
      attrs: {
        role: "meter",
        "aria-label": "share of the capacity in use",
        "aria-valuemin": "0",
        "aria-valuemax": "100",
        "aria-valuenow": "0",
      },
    },
    [fillNode],
  );
  const stack = el("div", { class: "pml-stack", attrs: { "aria-hidden": "true" } }, segments);
  const head = el("div", { class: "pml-device-head" }, [name, value]);
  const gpu = el("p", { class: "pml-device-gpu" });
  gpu.hidden = true;
  const node = el("div", { class: "pml-device" }, [head, stack, gauge, gpu]);
  return { node, name, value, segments, gauge, fill: fillNode, gpu };
}

function fill(row: Row, device: DeviceMemory): void {
  setText(row.name, device.device);
  const known = Number.isFinite(device.capacity);
  const share = known ? Math.min(1, device.total / device.capacity) : NaN;
  const of = known ? ` of ${bytes(device.capacity)}` : "";
  setText(row.value, `${bytes(device.total)}${of}`);
  row.value.title = Number.isFinite(device.measured)
    ? `resident now: ${bytes(device.measured)}`
    : "as planned";
  row.segments.forEach((segment, i) => {
    const value = device.byCause[i] ?? 0;
    segment.style.flexGrow = String(device.total > 0 ? value / device.total : 0);
    segment.style.display = value > 0 ? "" : "none";
    segment.title = `${CAUSES[i] ?? ""}: ${bytes(value)}`;
  });
  setText(row.gpu, device.gpu);
  row.gpu.hidden = device.gpu === "";
  const percent = known ? Math.round(share * 1000) / 10 : 0;
  row.gauge.style.visibility = known ? "visible" : "hidden";
  row.gauge.setAttribute("aria-valuenow", String(percent));
  row.gauge.setAttribute("aria-label", `share of ${device.device}'s capacity in use`);
  row.gauge.setAttribute("aria-valuetext", `${percent} %: ${bytes(device.total)}${of}`);
  row.fill.style.width = `${percent}%`;
}
