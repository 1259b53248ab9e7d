/** What crosses between the panel's Python half and its views (docs/protocol.md has the events). */

export type Json = null | boolean | number | string | Json[] | JsonObject;
export interface JsonObject {
  [key: string]: Json;
}

/** One entry of the run's event log; `type` decides which further fields there are. */
export interface RunEvent extends JsonObject {
  type: string;
  seq: number;
  time: number;
}

/** Columns of the curve. All have the same length; non-finite values travel as strings. */
export const COLUMNS = [
  "step",
  "loss",
  "learning_rate",
  "grad_norm",
  "tokens_per_second",
  "seconds",
] as const;
export type Column = (typeof COLUMNS)[number];
export type Columns = Record<Column, number[]>;

/** float16's loss scale, and how many steps were skipped for it. */
export interface Scale {
  value: number;
  skipped: number;
}

/** The held-out curve: as Columns, but a row for each evaluation. */
export interface Evals {
  step: number[];
  loss: number[];
}

/** The whole run as one object: a (possibly thinned) curve and the events that still matter. */
export interface Snapshot {
  seq: number;
  name: string;
  max_steps: number;
  columns: Columns;
  /** null: as its events say (a notebook that was saved before panels had this). */
  evals: Evals | null;
  events: RunEvent[];
  memory: JsonObject[];
  /** What drivers say of the workers' GPUs (record gpu of docs/messages.md). */
  gpus: JsonObject[];
  /** null: the run is not in float16. */
  scale: Scale | null;
  /** Why it stands as it does; null: as its events say. */
  reason: string | null;
}

/** What is new since `after`, the sequence number up to which the receiver knows everything. */
export interface Tick {
  after: number;
  seq: number;
  columns: Columns;
  events: RunEvent[];
  memory: JsonObject[] | null;
  gpus: JsonObject[] | null;
  scale: Scale | null;
  reason: string | null;
}

export type Verb = "pause" | "resume" | "checkpoint" | "stop" | "set";

/** From a view to Python. */
export type Outgoing =
  | { kind: "hello" }
  | { kind: "command"; id: string; verb: Verb; args: { learning_rate?: number } };

/** From Python to the views. */
export type Incoming =
  | { kind: "welcome"; fresh: boolean }
  | { kind: "tick"; tick: Tick }
  | { kind: "reply"; id: string; error: string | null };

export function isObject(value: unknown): value is JsonObject {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** A number of a message: JSON has no NaN and no infinity, so those are strings. */
export function toNumber(value: unknown): number {
  if (typeof value === "number") return value;
  if (value === "Infinity") return Infinity;
  if (value === "-Infinity") return -Infinity;
  return NaN;
}

export function toText(value: unknown): string {
  return typeof value === "string" ? value : "";
}

function toColumns(value: unknown): Columns | null {
  if (!isObject(value)) return null;
  const columns: Partial<Columns> = {};
  let length = -1;
  for (const name of COLUMNS) {
    const column = value[name];
    if (!Array.isArray(column)) return null;
    if (length >= 0 && column.length !== length) return null;
    length = column.length;
    columns[name] = column.map(toNumber);
  }
  return columns as Columns;
}

function toEvals(value: unknown): Evals | null {
  if (!isObject(value)) return null;
  const { step, loss } = value;
  if (!Array.isArray(step) || !Array.isArray(loss) || step.length !== loss.length) return null;
  return { step: step.map(toNumber), loss: loss.map(toNumber) };
}

function toEvents(value: unknown): RunEvent[] {
  if (!Array.isArray(value)) return [];
  return value.filter(
    (event): event is RunEvent =>
      isObject(event) &&
      typeof event["type"] === "string" &&
      typeof event["seq"] === "number" &&
      typeof event["time"] === "number",
  );
}

function toObjects(value: unknown): JsonObject[] {
  return Array.isArray(value) ? value.filter(isObject) : [];
}

function toReason(value: unknown): string | null {
  return typeof value === "string" ? value : null;
}

function toScale(value: unknown): Scale | null {
  if (!isObject(value)) return null;
  return { value: toNumber(value["value"]), skipped: toNumber(value["skipped"]) };
}

/** Returns null for anything that is not a snapshot (an empty trait, a newer format). */
export function parseSnapshot(value: unknown): Snapshot | null {
  if (!isObject(value) || typeof value["seq"] !== "number") return null;
  const columns = toColumns(value["columns"]);
  if (columns === null) return null;
  return {
    seq: value["seq"],
    name: toText(value["name"]),
    max_steps: toNumber(value["max_steps"]) || 0,
    columns,
    evals: toEvals(value["evals"]),
    events: toEvents(value["events"]),
    memory: toObjects(value["memory"]),
    gpus: toObjects(value["gpus"]),
    scale: toScale(value["scale"]),
    reason: toReason(value["reason"]),
  };
}

/** Returns null for a message that is not for us: other code may talk over the same comm. */
export function parseIncoming(value: unknown): Incoming | null {
  if (!isObject(value)) return null;
  switch (value["kind"]) {
    case "welcome":
      return { kind: "welcome", fresh: value["fresh"] === true };
    case "reply": {
      const error = value["error"];
      return {
        kind: "reply",
        id: toText(value["id"]),
        error: typeof error === "string" ? error : null,
      };
    }
    case "tick": {
      const columns = toColumns(value["columns"]);
      const { after, seq } = value;
      if (columns === null || typeof after !== "number" || typeof seq !== "number") return null;
      const { memory, gpus } = value;
      return {
        kind: "tick",
        tick: {
          after,
          seq,
          columns,
          events: toEvents(value["events"]),
          memory: Array.isArray(memory) ? toObjects(memory) : null,
          gpus: Array.isArray(gpus) ? toObjects(gpus) : null,
          scale: toScale(value["scale"]),
          reason: toReason(value["reason"]),
        },
      };
    }
    default:
      return null;
  }
}
