/** The curve of a run: one row per optimizer step, stored by column. */

import { COLUMNS, type Column, type Columns } from "./protocol";

export class Curve {
  readonly columns: Columns = emptyColumns();
  /** Exponential mean of the loss, the same length as the columns. */
  readonly smooth: number[] = [];
  private beta = 0.9;
  private mean = 0;
  private weight = 0;

  get length(): number {
    return this.columns.step.length;
  }

  /** Value of a column in the last row, NaN when there is none. */
  last(column: Column): number {
    return this.columns[column].at(-1) ?? NaN;
  }

  /**
   * Adds rows. A row whose step is not beyond the last one begins a new timeline (a restart, a
   * rewind): what it replaces is cut off first.
   */
  append(rows: Columns): void {
    for (let i = 0; i < rows.step.length; i++) {
      const step = rows.step[i] ?? NaN;
      this.cutAfter(step - 1);
      for (const name of COLUMNS) this.columns[name].push(rows[name][i] ?? NaN);
      this.extendSmooth(this.length - 1);
    }
  }

  /** Drops the rows behind a step: a past that is told anew. */
  cutAfter(step: number): void {
    if (!(this.last("step") > step)) return;
    const keep = this.columns.step.findIndex((s) => s > step);
    for (const name of COLUMNS) this.columns[name].length = keep;
    this.resmooth();
  }

  clear(): void {
    for (const name of COLUMNS) this.columns[name].length = 0;
    this.resmooth();
  }

  /** beta in [0, 1): the share of the mean that is still there one step later; 0 is no smoothing. */
  setSmoothing(beta: number): void {
    this.beta = beta;
    this.resmooth();
  }

  get smoothing(): number {
    return this.beta;
  }

  /** Seconds a step takes: the mean over the last rows, NaN before the first. */
  secondsPerStep(over = 50): number {
    const recent = this.columns.seconds.slice(-over).filter((s) => Number.isFinite(s) && s > 0);
    return recent.length === 0 ? NaN : recent.reduce((a, b) => a + b, 0) / recent.length;
  }

  /** Index of the row nearest to a step, -1 when there is none. */
  nearest(step: number): number {
    const steps = this.columns.step;
    let low = 0;
    let high = steps.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if ((steps[middle] ?? Infinity) < step) low = middle + 1;
      else high = middle;
    }
    if (low === steps.length) return low - 1;
    const left = steps[low - 1];
    const right = steps[low];
    return left !== undefined && right !== undefined && step - left < right - step ? low - 1 : low;
  }

  private resmooth(): void {
    this.smooth.length = 0;
    this.mean = 0;
    this.weight = 0;
    for (let i = 0; i < this.length; i++) this.extendSmooth(i);
  }

  // The weight is carried along so that the mean is unbiased from the first step on, and a gap of
  // k steps (a thinned curve) counts as k steps.
  private extendSmooth(i: number): void {
    const { step, loss } = this.columns;
    const value = loss[i] ?? NaN;
    if (Number.isFinite(value)) {
      const gap = i > 0 ? Math.max(1, (step[i] ?? 0) - (step[i - 1] ?? 0)) : 1;
      const keep = this.beta ** gap;
      this.mean = keep * this.mean + (1 - keep) * value;
      this.weight = keep * this.weight + (1 - keep);
    }
    this.smooth.push(this.weight > 0 ? this.mean / this.weight : NaN);
  }
}

export function emptyColumns(): Columns {
  return {
    step: [],
    loss: [],
    learning_rate: [],
    grad_norm: [],
    tokens_per_second: [],
    seconds: [],
  };
}
