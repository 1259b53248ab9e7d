/**
 * The state of one run as the panel knows it, rebuilt from a snapshot and kept by ticks.
 *
 * There is one store per widget model and any number of views on it. The only way in is `receive`
 * and `load`, the only way out is `send`: nothing here touches the page.
 */

import { Curve } from "./curve";
import { describe, type Level } from "./format";
import {
  isObject,
  parseIncoming,
  parseSnapshot,
  toNumber,
  toText,
  type Evals,
  type Json,
  type JsonObject,
  type Outgoing,
  type RunEvent,
  type Scale,
  type Snapshot,
  type Tick,
  type Verb,
} from "./protocol";

export type Phase = "starting" | "running" | "paused" | "finished" | "stopped" | "failed";
const PHASES: readonly string[] = [
  "starting",
  "running",
  "paused",
  "finished",
  "stopped",
  "failed",
];

/** waiting: asked and no answer yet. offline: nobody answers (a saved notebook, a new kernel). */
export type Connection = "waiting" | "live" | "offline";

/** A command of this page, from the click to its effect. */
export interface Request {
  id: string;
  verb: Verb;
  args: { learning_rate?: number };
  status: "sent" | "accepted" | "applied" | "refused";
  /** Its place in the run's one order of commands, once accepted. */
  number: number | null;
  /** Only events behind this sequence number can belong to it. */
  after: number;
  step: number;
  workers: number;
  reason: string;
}

export interface LogLine {
  seq: number;
  time: number;
  text: string;
  level: Level;
}

export interface Sample {
  key: string;
  command: string;
  row: number; // which of the command's prompts
  step: number;
  text: string;
  done: boolean;
  ended: boolean; // so is its command: a restart does not begin it again
}

export interface Marker {
  step: number;
  kind: "set" | "checkpoint";
}

/** Kept of each list; the log on disk has everything. */
const LOG_LINES = 200;
const SAMPLES = 8;
const REQUESTS = 20;
const PATIENCE_MS = 4000;
/** How often a hello without an answer is said again, each time after twice as long. */
const HELLOS = 6;

/** As Python's Command says it. */
const LOST = "its coordinator died before it was in the log; send it again";

export class Store {
  connection: Connection = "waiting";
  name = "";
  phase: Phase = "starting";
  reason = "";
  step = 0;
  maxSteps = 0;
  /** What takes long; `beside`: while steps are made, as a save to a slow disk is. */
  progress: { what: string; fraction: number; beside: boolean } | null = null;
  readonly curve = new Curve();
  evals: { step: number; loss: number }[] = [];
  plan: JsonObject | null = null;
  memory: JsonObject[] = [];
  gpus: JsonObject[] = [];
  scale: Scale | null = null;
  workers: JsonObject[] = [];
  log: LogLine[] = [];
  samples: Sample[] = [];
  markers: Marker[] = [];
  requests: Request[] = [];

  private seq = 0;
  private loaded = false;
  private gone = false;
  private patience: ReturnType<typeof setTimeout> | undefined;
  private readonly listeners = new Set<() => void>();
  private readonly sendOut: (message: Outgoing) => boolean;
  private readonly newId: () => string;

  /** `send` returns false where there is nobody to send to any more. */
  constructor(send: (message: Outgoing) => boolean, newId: () => string) {
    this.sendOut = send;
    this.newId = newId;
  }

  /** Calls back after every change; returns the way out. */
  subscribe(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  /**
   * Says hello to the Python half, which answers with a welcome and a fresh snapshot. A hello may be
   * lost, as one seems to have been by a page that had just been loaded again; of a paused run
   * nothing else comes that would tell, so it is said again.
   */
  hello(said = 0): void {
    clearTimeout(this.patience);
    if (this.gone) return;
    if (!this.sendOut({ kind: "hello" })) {
      this.lose();
      return;
    }
    this.patience = setTimeout(() => {
      this.lose();
      if (said < HELLOS) this.hello(said + 1);
    }, PATIENCE_MS * 2 ** said);
  }

  destroy(): void {
    this.gone = true;
    clearTimeout(this.patience);
    this.listeners.clear();
  }

  /** Takes over a snapshot (the synced trait), unless it is older than what is known already. */
  load(value: unknown): void {
    const snapshot = parseSnapshot(value);
    if (snapshot === null || (this.loaded && snapshot.seq < this.seq)) return;
    this.reset(snapshot);
    this.notify();
  }

  /** Takes a custom message. Returns true when it was the welcome to a widget just displayed. */
  receive(message: unknown): boolean {
    const incoming = parseIncoming(message);
    if (incoming === null) return false;
    // An answer to a command says that somebody is there, not how the run stands.
    if (incoming.kind !== "reply") clearTimeout(this.patience);
    this.connection = "live";
    let fresh = false;
    if (incoming.kind === "welcome") fresh = incoming.fresh;
    else if (incoming.kind === "tick") this.take(incoming.tick);
    else if (incoming.error !== null) this.fail(incoming.id, incoming.error);
    else this.accept(incoming.id);
    this.notify();
    return fresh;
  }

  command(verb: Verb, args: { learning_rate?: number } = {}): void {
    const id = this.newId();
    const request: Request = {
      id,
      verb,
      args,
      status: "sent",
      number: null,
      after: this.seq,
      step: NaN,
      workers: 0,
      reason: "",
    };
    this.requests = [...this.requests, request].slice(-REQUESTS);
    if (!this.sendOut({ kind: "command", id, verb, args })) {
      this.fail(id, "not connected");
      this.connection = "offline";
    }
    this.notify();
  }

  /** The last command with one of these verbs, undefined when there was none. */
  lastRequest(...verbs: Verb[]): Request | undefined {
    return this.requests.findLast((request) => verbs.includes(request.verb));
  }

  /** True while the run can still be steered. */
  get active(): boolean {
    return ["starting", "running", "paused"].includes(this.phase);
  }

  /** Seconds to the last step at the pace of the last steps; NaN when that is not known. */
  get eta(): number {
    if (this.phase !== "running" || this.maxSteps <= 0) return NaN;
    return (this.maxSteps - this.step) * this.curve.secondsPerStep();
  }

  private lose(): void {
    this.connection = "offline";
    this.notify();
  }

  private notify(): void {
    for (const listener of this.listeners) listener();
  }

  private reset(snapshot: Snapshot): void {
    this.loaded = true;
    this.seq = 0;
    this.name = snapshot.name;
    this.maxSteps = snapshot.max_steps;
    this.evals = [];
    this.log = [];
    this.samples = [];
    this.markers = [];
    this.progress = null;
    this.memory = snapshot.memory;
    this.gpus = snapshot.gpus;
    this.scale = snapshot.scale;
    this.curve.clear();
    this.curve.append(snapshot.columns);
    for (const event of snapshot.events) this.reduce(event);
    // Events are the newest ones only. (What a restart took is not in these.)
    if (snapshot.evals !== null) this.evals = toPoints(snapshot.evals);
    this.reason = snapshot.reason ?? this.reason;
    this.step = this.curve.last("step") || this.step;
    this.seq = snapshot.seq;
  }

  private take(tick: Tick): void {
    if (tick.after !== this.seq || !this.loaded) {
      // Something is missing in between (a late view, a lost message): ask for the whole.
      if (tick.seq > this.seq || !this.loaded) this.hello();
      return;
    }
    for (const event of tick.events) {
      // From a checkpoint on another past is told. (In a snapshot the curve is cut already.)
      if (isStart(event)) this.curve.cutAfter(toNumber(event["step"]));
    }
    this.curve.append(tick.columns);
    const step = this.curve.last("step");
    if (tick.memory !== null) this.memory = tick.memory;
    if (tick.gpus !== null) this.gpus = tick.gpus;
    if (tick.scale !== null) this.scale = tick.scale;
    for (const event of tick.events) this.reduce(event);
    this.reason = tick.reason ?? this.reason;
    if (tick.columns.step.length > 0 && Number.isFinite(step)) {
      this.step = step;
      if (this.progress?.beside === false) this.progress = null;
    }
    this.seq = tick.seq;
  }

  private reduce(event: RunEvent): void {
    const step = toNumber(event["step"]);
    switch (event.type) {
      case "state": {
        const phase = toText(event["state"]);
        if (PHASES.includes(phase)) this.phase = phase as Phase;
        this.reason = toText(event["reason"]);
        if (isStart(event)) this.beginAgain(step, event["rewound"] === true);
        else this.progress = null;
        if (step >= 0) this.step = step;
        break;
      }
      case "progress": {
        const fraction = toNumber(event["fraction"]);
        const beside = this.phase !== "starting";
        const over = beside && fraction >= 1;
        this.progress = over ? null : { what: toText(event["what"]), fraction, beside };
        break;
      }
      case "plan":
        this.plan = event;
        this.maxSteps = toNumber(event["max_steps"]) || this.maxSteps;
        break;
      case "workers":
        this.workers = Array.isArray(event["workers"]) ? event["workers"].filter(isObject) : [];
        break;
      case "eval":
        // One that was asked for adds nothing to the run's own; of a finished run that has its best
        // weights it is of their step.
        if (event["command"] !== undefined && this.evals.some((e) => e.step >= step)) break;
        this.evals = this.evals.filter((e) => e.step < step);
        this.evals.push({ step, loss: toNumber(event["loss"]) });
        break;
      case "restart":
        if (event["cause"] === "coordinator") this.loseRequests(event.seq);
        break;
      case "checkpoint":
        this.markers.push({ step, kind: "checkpoint" });
        break;
      case "sample":
        this.takeSample(event, step);
        break;
      case "command":
      case "applied":
      case "refused":
        this.takeCommand(event, step);
        break;
      default:
        break;
    }
    const line = describe(event);
    if (line !== null) {
      this.log.push({ seq: event.seq, time: event.time, ...line });
      if (this.log.length > LOG_LINES) this.log.splice(0, this.log.length - LOG_LINES);
    }
  }

  /** From a checkpoint on another past is told, and an answer without an end begins again. */
  private beginAgain(step: number, rewound: boolean): void {
    this.evals = this.evals.filter((e) => e.step <= step);
    // What was set is in force again from its step on, and no event says so once more. Only who has
    // gone back to a checkpoint has given it up.
    this.markers = this.markers.filter((m) => m.step <= step || (m.kind === "set" && !rewound));
    this.samples = this.samples.filter((sample) => sample.ended);
    if (this.progress?.beside) this.progress = null; // of the workers that are gone
  }

  private takeSample(event: RunEvent, step: number): void {
    const row = toNumber(event["row"] ?? 0); // of several prompts
    const command = String(event["command"] ?? event.seq);
    const key = `${command}${row > 0 ? `.${row}` : ""}`;
    const text = toText(event["text"]);
    const ended = event["ended"] === true; // Python says it in a snapshot
    const done = event["done"] !== false;
    const known = this.samples.find((sample) => sample.key === key);
    if (known !== undefined) {
      // Each event carries the whole text so far: a token need not end where a character does.
      known.text = text;
      known.done = done;
      return;
    }
    const sample = { key, command, row, step, text, done, ended };
    this.samples = [sample, ...this.samples].slice(0, SAMPLES);
  }

  /** Nothing is added to what a command has written: by its end, or because a stop broke it off. */
  private endSamples(command: string): void {
    for (const sample of this.samples) {
      if (sample.command === command) sample.done = sample.ended = true;
    }
  }

  private takeCommand(event: RunEvent, step: number): void {
    const number = toNumber(event["command"]);
    const verb = toText(event["verb"]);
    if (event.type === "applied" && verb === "set") this.markers.push({ step, kind: "set" });
    if (event.type !== "command" && verb === "sample") this.endSamples(String(event["command"]));
    const request =
      this.requests.find((r) => r.number === number) ??
      this.requests.find(
        (r) =>
          r.number === null &&
          r.status !== "refused" &&
          r.verb === verb &&
          event.seq > r.after &&
          sameArgs(r.args, event["args"]),
      );
    if (request === undefined) return;
    request.number = number;
    if (event.type === "command" && request.status === "sent") request.status = "accepted";
    if (event.type === "applied") {
      request.status = "applied";
      request.step = step;
      request.workers = Array.isArray(event["workers"]) ? event["workers"].length : 0;
    }
    if (event.type === "refused") {
      request.status = "refused";
      request.reason = toText(event["reason"]);
    }
  }

  /** What was accepted and is not in the log went with its coordinator: the next one has no word of it. */
  private loseRequests(seq: number): void {
    for (const { id, status, number, after } of this.requests) {
      if (status === "accepted" && number === null && after < seq) this.fail(id, LOST);
    }
  }

  private accept(id: string): void {
    const request = this.requests.find((r) => r.id === id);
    if (request?.status === "sent") request.status = "accepted";
  }

  private fail(id: string, reason: string): void {
    const request = this.requests.find((r) => r.id === id);
    if (request === undefined) return;
    request.status = "refused";
    request.reason = reason;
  }
}

function isStart(event: RunEvent): boolean {
  return event.type === "state" && event["state"] === "starting";
}

function toPoints({ step, loss }: Evals): { step: number; loss: number }[] {
  return step.map((s, i) => ({ step: s, loss: loss[i] ?? NaN }));
}

function sameArgs(sent: { learning_rate?: number }, logged: Json | undefined): boolean {
  if (sent.learning_rate === undefined) return true;
  const rate = isObject(logged) ? toNumber(logged["learning_rate"]) : NaN;
  return Math.abs(rate - sent.learning_rate) <= 1e-9 * Math.abs(sent.learning_rate);
}
