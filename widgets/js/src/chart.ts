/** The curves: loss (raw, smoothed, held-out) above, learning rate below, on one step axis. */

import uPlot from "uplot";
import { el, setText, uniqueId } from "./dom";
import { count, decimal, NONE, rate } from "./format";
import type { Store } from "./store";

const AXIS_WIDTH = 54;

type Points = (number | null)[];

interface Size {
  width: number;
  height: number;
}

/** null while the panel is not laid out (a hidden tab): a plot of no size cannot be drawn. */
function sizeOf(box: HTMLElement): Size | null {
  const size = { width: Math.floor(box.clientWidth), height: Math.floor(box.clientHeight) };
  return size.width >= 80 && size.height >= 40 ? size : null;
}

/** Ticks of a logarithmic axis: 1-2-5 per decade, or evenly spaced where that gives too few. */
export function logTicks(min: number, max: number): number[] {
  const ticks: number[] = [];
  for (let decade = Math.floor(Math.log10(min)); decade <= Math.log10(max); decade++) {
    for (const digit of [1, 2, 5]) {
      // 10 ** -1 * 5 is not 0.5 exactly; as text it is.
      const tick = Number(`${digit}e${decade}`);
      if (tick >= min && tick <= max) ticks.push(tick);
    }
  }
  if (ticks.length >= 3) return ticks;
  const rough = (max - min) / 6;
  const magnitude = 10 ** Math.floor(Math.log10(rough));
  const increment = magnitude * ([1, 2, 5, 10].find((m) => m * magnitude >= rough) ?? 10);
  const even: number[] = [];
  for (let i = Math.ceil(min / increment); i * increment <= max; i++) {
    even.push(Number((i * increment).toPrecision(6)));
  }
  return even;
}

function tickText(value: number): string {
  const size = Math.abs(value);
  return size !== 0 && (size < 0.01 || size >= 1e5)
    ? value.toExponential().replace("e+", "e")
    : String(Number(value.toPrecision(6)));
}

function finite(values: number[], positive = false): Points {
  return values.map((v) => (Number.isFinite(v) && (!positive || v > 0) ? v : null));
}

/** One labelled value of the line above the chart; its width does not depend on the value. */
class Reading {
  readonly node: HTMLElement;
  private readonly value = el("span", { class: "pml-reading-value", text: NONE });

  constructor(label: string, width: string, swatch?: string) {
    const name = el("span", { class: "pml-reading-label", text: label });
    if (swatch !== undefined) name.prepend(el("span", { class: `pml-swatch ${swatch}` }));
    this.value.style.minWidth = width;
    this.node = el("span", { class: "pml-reading" }, [name, this.value]);
  }

  set(text: string): void {
    setText(this.value, text);
  }
}

export class Charts {
  readonly node: HTMLElement;
  private readonly lossBox = el("div", { class: "pml-plot pml-plot-loss" });
  private readonly rateBox = el("div", { class: "pml-plot pml-plot-rate" });
  private readonly focus: HTMLElement;
  private readonly reset: HTMLButtonElement;
  private readonly step = new Reading("step", "3.2em");
  private readonly raw = new Reading("loss", "3.6em", "pml-key-raw");
  private readonly smooth = new Reading("smoothed", "3.6em", "pml-key-smooth");
  private readonly heldOut = new Reading("held-out", "3.6em", "pml-key-eval");
  private readonly rate = new Reading("rate", "5em", "pml-key-rate");
  private loss: uPlot | null = null;
  private rates: uPlot | null = null;
  private log = false;
  private zoomed = false;
  /** Row under the cursor, null when there is none: then the last row is read out. */
  private at: number | null = null;
  /** The step that the keyboard reads: it stays while new steps move the curve under the cursor. */
  private kept: number | null = null;
  private evalAt = new Map<number, number>();

  constructor(
    private readonly store: Store,
    signal: AbortSignal,
  ) {
    const logButton = el("button", {
      class: "pml-toggle",
      text: "Log scale",
      attrs: { type: "button", "aria-pressed": "false" },
    });
    logButton.addEventListener("click", () => {
      this.log = !this.log;
      logButton.setAttribute("aria-pressed", String(this.log));
      this.build();
    });
    this.reset = el("button", {
      class: "pml-toggle",
      text: "Whole run",
      attrs: { type: "button", title: "Show the whole run again (or double-click the chart)" },
    });
    this.reset.addEventListener("click", () => {
      this.zoomed = false;
      this.update();
    });
    this.focus = el(
      "div",
      {
        class: "pml-charts-focus",
        attrs: {
          role: "slider",
          tabindex: "0",
          "aria-label": "Curves; arrow keys read them step by step",
          "aria-orientation": "horizontal",
          "aria-valuemin": "0",
          "aria-valuemax": "0",
          "aria-valuenow": "0",
          "aria-valuetext": "no step yet",
        },
      },
      [
        this.lossBox,
        el("div", { class: "pml-rate-title" }, [
          el("h3", { class: "pml-heading", text: "Learning rate" }),
          this.rate.node,
        ]),
        this.rateBox,
      ],
    );
    this.focus.addEventListener("keydown", (event) => this.onKey(event));
    this.focus.addEventListener("blur", () => this.moveTo(null));
    this.focus.addEventListener("pointermove", () => {
      this.kept = null;
    });
    this.node = el("section", { class: "pml-charts", attrs: { "aria-label": "Curves" } }, [
      el("div", { class: "pml-charts-bar" }, [
        el("h3", { class: "pml-heading", text: "Loss" }),
        this.reset,
        this.smoothing(),
        logButton,
      ]),
      el("div", { class: "pml-readings" }, [
        this.step.node,
        this.raw.node,
        this.smooth.node,
        this.heldOut.node,
      ]),
      this.focus,
    ]);
    const observer = new ResizeObserver(() => this.resize());
    observer.observe(this.lossBox);
    signal.addEventListener("abort", () => {
      observer.disconnect();
      this.loss?.destroy();
      this.rates?.destroy();
    });
  }

  /** Draws what the store knows now. */
  update(): void {
    if (this.loss === null || this.rates === null) {
      this.build();
      return;
    }
    this.setData(this.loss, this.lossData());
    this.setData(this.rates, this.rateData());
    // After the scales, which uPlot sets in a microtask of its own.
    if (this.kept !== null) queueMicrotask(() => this.moveTo(this.row()));
    this.reset.style.visibility = this.zoomed ? "visible" : "hidden";
    this.read();
  }

  /** Takes the colours of the page again. */
  restyle(): void {
    this.build();
  }

  private setData(plot: uPlot, data: uPlot.AlignedData): void {
    plot.setData(data, !this.zoomed);
    if (this.zoomed) plot.redraw(true, true);
  }

  private smoothing(): HTMLElement {
    const id = uniqueId("smoothing");
    const slider = el("input", {
      attrs: { id, type: "range", min: "0", max: "0.99", step: "0.01" },
    });
    slider.value = String(this.store.curve.smoothing);
    slider.addEventListener("input", () => {
      this.store.curve.setSmoothing(Number(slider.value));
      this.update();
    });
    const label = el("label", { text: "Smoothing", attrs: { for: id } });
    return el("span", { class: "pml-smoothing" }, [label, slider]);
  }

  private lossData(): uPlot.AlignedData {
    const { curve, evals } = this.store;
    const heldOut: Points = new Array<number | null>(curve.length).fill(null);
    this.evalAt = new Map();
    for (const { step, loss } of evals) {
      const row = curve.nearest(step);
      if (row < 0 || !Number.isFinite(loss)) continue;
      heldOut[row] = loss;
      this.evalAt.set(row, loss);
    }
    const { step, loss } = curve.columns;
    return [step, finite(loss, this.log), finite(curve.smooth, this.log), heldOut];
  }

  private rateData(): uPlot.AlignedData {
    const { step, learning_rate } = this.store.curve.columns;
    return [step, finite(learning_rate)];
  }

  private resize(): void {
    const [loss, rates] = [sizeOf(this.lossBox), sizeOf(this.rateBox)];
    if (loss === null || rates === null) return;
    if (this.loss === null || this.rates === null) this.build();
    else {
      this.loss.setSize(loss);
      this.rates.setSize(rates);
    }
  }

  private build(): void {
    const [lossSize, rateSize] = [sizeOf(this.lossBox), sizeOf(this.rateBox)];
    if (lossSize === null || rateSize === null) return;
    this.loss?.destroy();
    this.rates?.destroy();
    const colour = (name: string): string =>
      getComputedStyle(this.node).getPropertyValue(`--pml-${name}`).trim();
    const font = `11px ${getComputedStyle(this.node).fontFamily}`;
    const axis = (size: number): uPlot.Axis => ({
      stroke: colour("muted"),
      font,
      size,
      gap: 4,
      grid: { stroke: colour("grid"), width: 1 },
      ticks: { show: false },
      values: (_, ticks) => ticks.map(tickText),
    });
    const key = uniqueId("sync");
    const common = (size: Size): Omit<uPlot.Options, "series"> => ({
      ...size,
      padding: [8, 10, 0, 0],
      legend: { show: false },
      cursor: {
        y: false,
        sync: { key, scales: ["x", null] },
        drag: { x: true, y: false, dist: 6 },
        points: { size: 7 },
      },
    });
    const steps: uPlot.Scale = { time: false };
    this.loss = new uPlot(
      {
        ...common(lossSize),
        scales: {
          x: steps,
          y: this.log ? { distr: 3, range: logRange } : { range: paddedRange },
        },
        axes: [
          { ...axis(22), values: (_, ticks) => ticks.map((t) => (t % 1 === 0 ? count(t) : "")) },
          this.log
            ? {
                ...axis(AXIS_WIDTH),
                splits: (_, __, min, max) => logTicks(min, max),
                filter: (_, ticks) => ticks,
              }
            : axis(AXIS_WIDTH),
        ],
        series: [
          {},
          { stroke: colour("raw"), width: 1, points: { show: false } },
          { stroke: colour("smooth"), width: 2, points: { show: false } },
          {
            stroke: colour("eval"),
            width: 1.5,
            spanGaps: true,
            points: { show: true, size: 6, fill: colour("surface"), width: 2 },
          },
        ],
        hooks: {
          setCursor: [(u) => this.onCursor(u)],
          setScale: [(u, name) => name === "x" && this.onZoom(u)],
          draw: [(u) => this.drawMarkers(u, colour("marker"))],
        },
      },
      this.lossData(),
      this.lossBox,
    );
    this.rates = new uPlot(
      {
        ...common(rateSize),
        scales: { x: steps, y: { range: (_, __, max) => [0, (max || 1e-4) * 1.08] } },
        axes: [
          { ...axis(8), values: (_, ticks) => ticks.map(() => "") },
          { ...axis(AXIS_WIDTH), space: 26 },
        ],
        series: [{}, { stroke: colour("rate"), width: 1.5, points: { show: false } }],
      },
      this.rateData(),
      this.rateBox,
    );
    this.read();
  }

  private onZoom(plot: uPlot): void {
    const { min, max } = plot.scales["x"] ?? {};
    const steps = this.store.curve.columns.step;
    const first = steps[0];
    const last = steps.at(-1);
    if (min == null || max == null || first === undefined || last === undefined) return;
    this.zoomed = min > first || max < last;
    this.reset.style.visibility = this.zoomed ? "visible" : "hidden";
  }

  private onCursor(plot: uPlot): void {
    this.at = plot.cursor.idx ?? null;
    this.read();
  }

  /** The row that is read out. */
  private row(): number {
    const { curve } = this.store;
    if (this.kept !== null) return curve.nearest(this.kept);
    return this.at !== null && this.at < curve.length ? this.at : curve.length - 1;
  }

  private read(): void {
    const { columns, smooth, length } = this.store.curve;
    const row = this.row();
    const step = columns.step[row];
    const value = (values: number[]): string =>
      step === undefined ? NONE : decimal(values[row] ?? NaN, true);
    this.step.set(step === undefined ? NONE : count(step));
    this.raw.set(value(columns.loss));
    this.smooth.set(value(smooth));
    // The held-out loss is measured now and then: read out the last one up to here.
    const heldOut = this.store.evals.findLast((e) => step !== undefined && e.step <= step);
    this.heldOut.set(decimal(heldOut?.loss ?? NaN));
    const learning = rate(columns.learning_rate[row] ?? NaN);
    this.rate.set(learning);
    if (step === undefined) return;
    this.focus.setAttribute("aria-valuemin", String(columns.step[0] ?? 0));
    this.focus.setAttribute("aria-valuemax", String(columns.step[length - 1] ?? 0));
    this.focus.setAttribute("aria-valuenow", String(step));
    this.focus.setAttribute(
      "aria-valuetext",
      `step ${step}, loss ${value(columns.loss)}, smoothed ${value(smooth)}, learning rate ${learning}`,
    );
  }

  private onKey(event: KeyboardEvent): void {
    const last = this.store.curve.length - 1;
    if (last < 0) return;
    const row = this.row();
    const page = Math.max(1, Math.round(last / 10));
    const moves: Record<string, number | null> = {
      ArrowLeft: row - 1,
      ArrowRight: row + 1,
      ArrowDown: row - 1,
      ArrowUp: row + 1,
      PageDown: row - page,
      PageUp: row + page,
      Home: 0,
      End: last,
      Escape: null,
    };
    const target = moves[event.key];
    if (target === undefined) return;
    // A notebook has its own use for the arrows: it must not see these.
    event.preventDefault();
    event.stopPropagation();
    this.moveTo(target === null ? null : Math.min(last, Math.max(0, target)));
  }

  private moveTo(row: number | null): void {
    if (this.loss === null) return;
    const step = row === null ? undefined : this.store.curve.columns.step[row];
    this.kept = step ?? null;
    const left = step === undefined ? -10 : this.loss.valToPos(step, "x");
    this.loss.setCursor({ left, top: step === undefined ? -10 : 10 });
    this.read();
  }

  // Where a setting changed: a dashed line. Where a checkpoint is: a small triangle on the axis.
  private drawMarkers(plot: uPlot, colour: string): void {
    const { ctx, bbox } = plot;
    const ratio = window.devicePixelRatio;
    const { min, max } = plot.scales["x"] ?? {};
    if (min == null || max == null) return;
    ctx.save();
    ctx.strokeStyle = colour;
    ctx.fillStyle = colour;
    ctx.lineWidth = ratio;
    for (const { step, kind } of this.store.markers) {
      if (step < min || step > max) continue;
      const x = Math.round(plot.valToPos(step, "x", true));
      const bottom = bbox.top + bbox.height;
      ctx.beginPath();
      if (kind === "set") {
        ctx.setLineDash([3 * ratio, 3 * ratio]);
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bottom);
        ctx.stroke();
        ctx.setLineDash([]);
      } else {
        ctx.moveTo(x, bottom - 7 * ratio);
        ctx.lineTo(x - 4 * ratio, bottom);
        ctx.lineTo(x + 4 * ratio, bottom);
        ctx.fill();
      }
    }
    ctx.restore();
  }
}

function paddedRange(_: uPlot, min: number | null, max: number | null): uPlot.Range.MinMax {
  if (min === null || max === null) return [0, 1];
  const pad = Math.max((max - min) * 0.06, Math.abs(max) * 1e-3, 1e-6);
  // A loss is not negative: the axis may touch zero and goes below it only with the data.
  return [min >= 0 ? Math.max(0, min - pad) : min - pad, max + pad];
}

function logRange(_: uPlot, min: number | null, max: number | null): uPlot.Range.MinMax {
  if (min === null || max === null || min <= 0) return [0.1, 10];
  return [min / 1.06, max * 1.06];
}
