/** What steers the run: Pause/Resume, Checkpoint, Stop, the learning rate, and how far each got. */

import { el, setText, uniqueId } from "./dom";
import { command, count, shortRate } from "./format";
import type { Verb } from "./protocol";
import type { Request, Store } from "./store";

/** A learning rate as typed, or the sentence that says what is wrong with it. */
export function parseRate(text: string): { rate: number } | { error: string } {
  const trimmed = text.trim().replace(",", ".");
  const value = Number(trimmed);
  if (trimmed === "" || !Number.isFinite(value)) return { error: "Not a number: try 1e-4." };
  if (value < 0) return { error: "A learning rate is not negative." };
  return { rate: value };
}

/** How far a command got, in words. */
export function outcome(request: Request, workers: number): string {
  const what = command(request.verb, request.args);
  switch (request.status) {
    case "sent":
      return `${what}: sent`;
    case "accepted":
      return `${what}: accepted`;
    case "applied": {
      const of = Math.max(workers, request.workers);
      return `${what}: applied at step ${count(request.step)} on ${request.workers}/${of} workers`;
    }
    case "refused":
      return `${what}: refused. ${request.reason}`;
  }
}

/** The three stations of one command as a line of dots: sent, accepted, applied. */
class Stations {
  readonly node: HTMLElement;
  private readonly dots: HTMLElement[];
  private readonly text = el("span", { class: "pml-outcome" });

  constructor(label: string) {
    this.dots = ["sent", "accepted", "applied"].map((name) =>
      el("span", { class: "pml-station", text: name }),
    );
    const path = this.dots.flatMap((dot, i) => (i > 0 ? [el("span", { class: "pml-way" }), dot] : [dot]));
    const line = el("div", { class: "pml-stations", attrs: { "aria-hidden": "true" } }, path);
    this.node = el("div", { class: "pml-progress", attrs: { "aria-label": label, role: "group" } }, [
      line,
      this.text,
    ]);
  }

  update(request: Request | undefined, workers: number): void {
    const reached = { sent: 1, accepted: 2, applied: 3, refused: 0 };
    const stage = request === undefined ? 0 : reached[request.status];
    this.dots.forEach((dot, i) => {
      dot.classList.toggle("pml-reached", i < stage);
      dot.classList.toggle("pml-pending", i === stage && stage > 0);
    });
    this.node.classList.toggle("pml-refused", request?.status === "refused");
    setText(this.text, request === undefined ? "" : outcome(request, workers));
  }
}

function button(text: string, kind: string): HTMLButtonElement {
  return el("button", { class: `pml-button ${kind}`, text, attrs: { type: "button" } });
}

export class Toolbar {
  readonly node: HTMLElement;
  private readonly pause = button("Pause", "pml-primary");
  private readonly checkpoint = button("Checkpoint", "");
  private readonly stop = button("Stop", "pml-stop");
  /** Stop asks once more; the question goes away by itself. */
  private asking: ReturnType<typeof setTimeout> | undefined;

  constructor(
    private readonly store: Store,
    signal: AbortSignal,
  ) {
    this.pause.addEventListener("click", () =>
      store.command(store.phase === "paused" ? "resume" : "pause"),
    );
    this.checkpoint.addEventListener("click", () => store.command("checkpoint"));
    this.stop.addEventListener("click", () => this.onStop());
    this.stop.addEventListener("blur", () => this.ask(false));
    this.stop.addEventListener("keydown", (event) => event.key === "Escape" && this.ask(false));
    this.node = el("div", { class: "pml-toolbar", attrs: { role: "group", "aria-label": "Run" } }, [
      this.pause,
      this.checkpoint,
      this.stop,
    ]);
    signal.addEventListener("abort", () => clearTimeout(this.asking));
  }

  update(): void {
    const { store } = this;
    const usable = store.active && store.connection !== "offline";
    const busy = (...verbs: Verb[]): boolean => {
      const status = store.lastRequest(...verbs)?.status;
      return status === "sent" || status === "accepted";
    };
    const pausing = busy("pause", "resume");
    const paused = store.phase === "paused";
    setText(this.pause, paused ? (pausing ? "Resuming…" : "Resume") : pausing ? "Pausing…" : "Pause");
    this.pause.disabled = !usable || pausing || store.phase === "starting";
    const saving = busy("checkpoint");
    setText(this.checkpoint, saving ? "Saving…" : "Checkpoint");
    this.checkpoint.disabled = !usable || saving || store.phase === "starting";
    this.stop.disabled = !usable || busy("stop");
    if (this.stop.disabled) this.ask(false);
    if (this.asking === undefined) setText(this.stop, busy("stop") ? "Stopping…" : "Stop");
  }

  private onStop(): void {
    if (this.asking === undefined) {
      this.ask(true);
    } else {
      this.ask(false);
      this.store.command("stop");
    }
  }

  private ask(on: boolean): void {
    clearTimeout(this.asking);
    this.asking = on ? setTimeout(() => this.ask(false), 4000) : undefined;
    this.stop.classList.toggle("pml-asking", on);
    if (on) setText(this.stop, "Really stop?");
    else if (!this.stop.disabled) setText(this.stop, "Stop");
  }
}

export class RateField {
  readonly node: HTMLElement;
  private readonly input: HTMLInputElement;
  private readonly apply = button("Apply", "");
  private readonly stations = new Stations("Last command");
  private readonly problem: HTMLElement;
  /** True from the first keystroke until it is sent or given up: no update touches the text then. */
  private edited = false;

  constructor(private readonly store: Store) {
    const id = uniqueId("rate");
    this.problem = el("span", { class: "pml-problem", attrs: { id: `${id}-problem` } });
    this.input = el("input", {
      class: "pml-input",
      attrs: {
        id,
        type: "text",
        inputmode: "decimal",
        autocomplete: "off",
        spellcheck: "false",
        "aria-describedby": `${id}-problem`,
      },
    });
    this.input.addEventListener("input", () => {
      this.edited = true;
      this.complain("");
      this.update();
    });
    this.input.addEventListener("focus", () => this.input.select());
    this.input.addEventListener("blur", () => this.update());
    const form = el("form", { class: "pml-rate-form" }, [
      el("label", { text: "Learning rate", attrs: { for: id } }),
      this.input,
      this.apply,
    ]);
    this.apply.type = "submit";
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    form.addEventListener("keydown", (event) => {
      // Keys typed here are not for the notebook (Enter would run a cell, Escape leave it).
      event.stopPropagation();
      if (event.key === "Escape") this.giveUp();
    });
    this.node = el("section", { class: "pml-rate", attrs: { "aria-label": "Steer" } }, [
      form,
      this.problem,
      this.stations.node,
    ]);
  }

  update(): void {
    const { store } = this;
    const usable = store.active && store.connection !== "offline";
    this.input.disabled = !usable;
    const status = store.lastRequest("set")?.status;
    const pending = status === "sent" || status === "accepted";
    this.apply.disabled = !usable || !this.edited || pending;
    if (!this.edited && document.activeElement !== this.input) {
      const now = shortRate(store.curve.last("learning_rate"));
      if (this.input.value !== now) this.input.value = now;
    }
    this.stations.update(store.requests.at(-1), store.workers.length);
  }

  private submit(): void {
    const parsed = parseRate(this.input.value);
    if ("error" in parsed) {
      this.complain(parsed.error);
      return;
    }
    this.complain("");
    this.edited = false;
    this.store.command("set", { learning_rate: parsed.rate });
  }

  private giveUp(): void {
    this.edited = false;
    this.complain("");
    this.input.blur();
    this.update();
  }

  private complain(text: string): void {
    setText(this.problem, text);
    this.input.setAttribute("aria-invalid", String(text !== ""));
  }
}
