/** The run panel: puts the parts together and redraws them, at most once a frame. */

import { Charts } from "./chart";
import { outcome, RateField, Toolbar } from "./controls";
import { el, setText } from "./dom";
import { EventList, Samples } from "./feed";
import { count, decimal, duration, lossScale, NONE, rate } from "./format";
import { MemoryBars } from "./memory";
import { toText } from "./protocol";
import type { Store } from "./store";
import { currentTheme, watchTheme } from "./theme";

interface Part {
  node: HTMLElement;
  update(): void;
}

/** State, name and progress. */
class Header implements Part {
  readonly node: HTMLElement;
  private readonly state = el("span", { class: "pml-state" });
  private readonly name = el("span", { class: "pml-name" });
  private readonly steps = el("span", { class: "pml-steps" });
  private readonly bar: HTMLElement;
  private readonly fill = el("span", { class: "pml-bar-fill" });

  constructor(
    private readonly store: Store,
    toolbar: Toolbar,
  ) {
    this.bar = el(
      "div",
      {
        class: "pml-bar",
        attrs: { role: "progressbar", "aria-label": "Steps", "aria-valuemin": "0" },
      },
      [this.fill],
    );
    const title = el("div", { class: "pml-title" }, [this.state, this.name]);
    const progress = el("div", { class: "pml-progress-line" }, [this.bar, this.steps]);
    this.node = el("div", { class: "pml-header" }, [title, progress, toolbar.node]);
  }

  update(): void {
    const { store } = this;
    setText(this.state, store.phase);
    this.state.dataset["phase"] = store.phase;
    setText(this.name, store.name);
    this.name.title = store.name;
    const { progress } = store;
    const steps = `${count(store.step)} / ${store.maxSteps > 0 ? count(store.maxSteps) : NONE}`;
    const first = progress !== null && !progress.beside;
    const share = first ? progress.fraction : store.step / store.maxSteps;
    const percent = Number.isFinite(share) ? Math.min(100, Math.max(0, share * 100)) : 0;
    this.fill.style.width = `${percent}%`;
    const slow =
      progress === null ? "" : `${progress.what} ${Math.round(100 * progress.fraction)} %`;
    const text = first ? slow : progress === null ? steps : `${steps} · ${slow}`;
    setText(this.steps, text);
    this.bar.setAttribute("aria-valuemax", "100");
    this.bar.setAttribute("aria-valuenow", String(Math.round(percent)));
    this.bar.setAttribute("aria-valuetext", first ? text : `step ${text}`);
  }
}

/** The row of large numbers. */
class Figures implements Part {
  readonly node: HTMLElement;
  private readonly values = new Map<string, HTMLElement>();

  constructor(private readonly store: Store) {
    // Not a dl: notebooks have a style of their own for those.
    this.node = el("div", { class: "pml-figures", attrs: { role: "group", "aria-label": "Now" } });
    for (const label of [
      "Loss",
      "Held-out loss",
      "Learning rate",
      "Gradient norm",
      "Tokens/s",
      "Time left",
      "Loss scale",
    ]) {
      const name = el("span", { class: "pml-figure-label", text: label });
      const value = el("span", { class: "pml-figure-value", text: NONE });
      this.values.set(label, value);
      this.node.append(el("div", { class: "pml-figure" }, [name, value]));
    }
  }

  update(): void {
    const { curve, evals, eta, scale } = this.store;
    const some = curve.length > 0;
    const lost = some && !Number.isFinite(curve.last("loss"));
    this.set("Loss", lost ? decimal(curve.last("loss"), true) : decimal(curve.smooth.at(-1) ?? NaN));
    this.values.get("Loss")?.classList.toggle("pml-error", lost);
    this.set("Held-out loss", decimal(evals.at(-1)?.loss ?? NaN, evals.length > 0));
    this.set("Learning rate", rate(curve.last("learning_rate")));
    this.set("Gradient norm", decimal(curve.last("grad_norm"), some));
    this.set("Tokens/s", count(curve.last("tokens_per_second")));
    this.set("Time left", duration(eta));
    this.set("Loss scale", lossScale(scale));
    const box = this.values.get("Loss scale")?.parentElement;
    if (box) box.hidden = scale === null; // float16 alone has one
    this.node.classList.toggle("pml-figures-float16", scale !== null);
  }

  private set(label: string, text: string): void {
    const node = this.values.get(label);
    if (node !== undefined) setText(node, text);
  }
}

/** Says what a sighted person sees change: state and the fate of commands, never the numbers. */
class Announcer implements Part {
  readonly node = el("div", {
    class: "pml-hidden",
    attrs: { role: "status", "aria-live": "polite" },
  });
  private state = "";
  private fate = "";

  constructor(private readonly store: Store) {}

  update(): void {
    const { phase, reason, step, requests, workers } = this.store;
    const state = `Run ${phase}${reason === "" ? "" : `: ${reason}`}`;
    const last = requests.at(-1);
    const fate = last === undefined ? "" : outcome(last, workers.length);
    if (state !== this.state) setText(this.node, step > 0 ? `${state}, step ${step}` : state);
    else if (fate !== this.fate) setText(this.node, fate);
    this.state = state;
    this.fate = fate;
  }
}

/** One line under the header when the panel is not live, or there is a reason for how it stands. */
class Notice implements Part {
  readonly node = el("p", { class: "pml-notice" });

  constructor(private readonly store: Store) {}

  update(): void {
    const { connection, phase, reason } = this.store;
    const text =
      connection === "offline"
        ? "Not connected: this is the last state seen. pm.attach() in a cell brings the live panel back."
        : reason;
    setText(this.node, text);
    this.node.hidden = text === "";
    this.node.classList.toggle("pml-error", connection !== "offline" && phase === "failed");
  }
}

/** What the workers have planned, as pm.plan says it: open for who sees it before the first step. */
class PlanText implements Part {
  readonly node = el("details", { class: "pml-plan" });
  private readonly text = el("pre", { attrs: { tabindex: "0", "aria-label": "Plan" } });
  private shown = false;

  constructor(private readonly store: Store) {
    this.node.append(el("summary", { text: "Plan" }), this.text);
  }

  update(): void {
    const { curve, plan } = this.store;
    const text = toText(plan?.["text"]);
    setText(this.text, text);
    this.node.hidden = text === "";
    // Once: from then on it is for people to open and close, and nothing moves at the first step.
    if (text !== "" && !this.shown) {
      this.shown = true;
      this.node.open = curve.length === 0;
    }
  }
}

export function renderPanel(root: HTMLElement, store: Store, signal: AbortSignal): void {
  const toolbar = new Toolbar(store, signal);
  const charts = new Charts(store, signal);
  const rateField = new RateField(store);
  const memory = new MemoryBars(store);
  const events = new EventList(store);
  const samples = new Samples(store);
  const header = new Header(store, toolbar);
  const plan = new PlanText(store);
  const figures = new Figures(store);
  const notice = new Notice(store);
  const announcer = new Announcer(store);
  const parts: Part[] = [
    header,
    notice,
    plan,
    figures,
    toolbar,
    charts,
    rateField,
    memory,
    events,
    samples,
    announcer,
  ];

  const side = el("div", { class: "pml-side" }, [rateField.node, memory.node]);
  const middle = el("div", { class: "pml-middle" }, [charts.node, side]);
  const bottom = el("div", { class: "pml-bottom" }, [events.node, samples.node]);
  const panel = el(
    "div",
    { class: "pml-panel", attrs: { role: "group", "aria-label": "Training run" } },
    [header.node, notice.node, plan.node, figures.node, middle, bottom, announcer.node],
  );
  // The container's size decides the layout, not the window's, so the panel sits in a box of it.
  const box = el("div", { class: "pml" }, [panel]);
  box.dataset["theme"] = currentTheme();
  root.append(box);
  watchTheme(() => {
    box.dataset["theme"] = currentTheme();
    // Custom properties of the new theme are there only once its style sheet is.
    setTimeout(() => charts.restyle(), 100);
  }, signal);

  let frame = 0;
  const draw = (): void => {
    frame = 0;
    for (const part of parts) part.update();
  };
  const later = (): void => {
    if (frame === 0) frame = requestAnimationFrame(draw);
  };
  const unsubscribe = store.subscribe(later);
  signal.addEventListener("abort", () => {
    unsubscribe();
    cancelAnimationFrame(frame);
  });
  draw();
}
