/** Numbers and events as text. Every function takes NaN for "not known yet". */

import { isObject, toNumber, toText, type RunEvent, type Scale } from "./protocol";

export const NONE = "–";

function notFinite(value: number, seen: boolean): string {
  if (!seen) return NONE;
  return Number.isNaN(value) ? "NaN" : value > 0 ? "∞" : "−∞";
}

/** A loss or a norm: four decimals below 100, fewer above. `seen` tells NaN from "none yet". */
export function decimal(value: number, seen = false): string {
  if (!Number.isFinite(value)) return notFinite(value, seen);
  const size = Math.abs(value);
  if (size >= 10000) return value.toExponential(2);
  return value.toFixed(size >= 1000 ? 1 : size >= 100 ? 2 : 4);
}

/** A learning rate, always with an exponent, so that the digits stay in place: 1.83e-4. */
export function rate(value: number): string {
  if (!Number.isFinite(value)) return NONE;
  return value === 0 ? "0" : value.toExponential(2);
}

/** A learning rate as a person would type it: 1e-4, 0.05. */
export function shortRate(value: number): string {
  if (!Number.isFinite(value)) return "";
  const rounded = Number(value.toPrecision(4));
  return rounded !== 0 && Math.abs(rounded) < 0.01 ? rounded.toExponential() : String(rounded);
}

const integer = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

export function count(value: number): string {
  return Number.isFinite(value) ? integer.format(value) : NONE;
}

/** float16's loss scale, and how often it was too large. */
export function lossScale(scale: Scale | null): string {
  if (scale === null) return NONE;
  return `${scale.value}${scale.skipped > 0 ? ` · ${count(scale.skipped)} skipped` : ""}`;
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(value: number): string {
  if (!Number.isFinite(value)) return NONE;
  let unit = 0;
  while (value >= 1000 && unit < UNITS.length - 1) {
    value /= 1024;
    unit++;
  }
  const digits = unit === 0 || value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return `${value.toFixed(digits)} ${UNITS[unit] ?? ""}`;
}

/** Seconds as a clock: 0:07, 12:31, 3:04:09; days where it comes to that. */
export function duration(seconds: number): string {
  if (!Number.isFinite(seconds)) return NONE;
  const s = Math.max(0, Math.round(seconds));
  const two = (n: number): string => String(n).padStart(2, "0");
  if (s >= 86400) return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
  const hours = Math.floor(s / 3600);
  const minutes = Math.floor((s % 3600) / 60);
  return hours > 0 ? `${hours}:${two(minutes)}:${two(s % 60)}` : `${minutes}:${two(s % 60)}`;
}

/** Local time of day of a Unix time. */
export function clock(time: number): string {
  return new Date(time * 1000).toLocaleTimeString("en-GB");
}

/** What a command does, in words: `pause`, `learning rate 1e-4`. */
export function command(verb: string, args: unknown): string {
  if (verb !== "set" || !isObject(args)) {
    const name = isObject(args) ? toText(args["name"]) : "";
    return name === "" ? verb : `${verb} ${name}`;
  }
  return Object.entries(args)
    .map(([key, value]) => {
      const words = key.replaceAll("_", " ");
      return `${words} ${key === "learning_rate" ? shortRate(toNumber(value)) : String(value)}`;
    })
    .join(", ");
}

export type Level = "plain" | "good" | "warning" | "error";

/** One line of the event list, or null for an event that is shown elsewhere. */
export function describe(event: RunEvent): { text: string; level: Level } | null {
  const step = toNumber(event["step"]);
  const reason = toText(event["reason"]);
  switch (event.type) {
    case "state": {
      const state = toText(event["state"]);
      const where = step > 0 ? ` at step ${count(step)}` : "";
      const level = state === "failed" ? "error" : state === "finished" ? "good" : "plain";
      return { text: `${state}${where}${reason === "" ? "" : `: ${reason}`}`, level };
    }
    case "restart": {
      const from = `from the ${toText(event["from"])} of step ${count(step)}`;
      const which = `restart ${String(event["attempt"])} of ${String(event["most"])}`;
      const wait = `in ${String(toNumber(event["delay"]))} s`;
      return { text: `${which}: goes on by itself ${wait}, ${from}`, level: "warning" };
    }
    case "command":
      return {
        text: `${command(toText(event["verb"]), event["args"])}: accepted`,
        level: "plain",
      };
    case "applied": {
      const done = command(toText(event["verb"]), event["args"]);
      return { text: `${done}: applied at step ${count(step)}`, level: "plain" };
    }
    case "refused":
      return { text: `${toText(event["verb"])} refused: ${reason}`, level: "warning" };
    case "eval":
      return {
        text: `held-out loss ${decimal(toNumber(event["loss"]), true)} at step ${count(step)}`,
        level: "plain",
      };
    case "checkpoint":
      return {
        text: `${toText(event["path"])} on disk, ${bytes(toNumber(event["bytes"]))}`,
        level: "good",
      };
    case "log": {
      const level = toText(event["level"]);
      const known = level === "error" || level === "warning" ? level : "plain";
      return { text: toText(event["message"]), level: known };
    }
    default:
      return null;
  }
}
