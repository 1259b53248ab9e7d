"""``pantheraml profile`` on a GPU: of a run and of a model, its table and its Chrome trace.

    python3 tests/gpu/profiled.py [--device cuda]

(``--device cpu`` tries it where there is no GPU, with a smaller model.)

Both forms go through the shell. Checked of each: every line of the table says calls, a time above
zero, FLOP/s and bytes/s, and a share of its limit of at most 200 % (operands may come out of a
cache, an embedding's table wholly); each share is that of its time, and they add up to `LEAST` of
the step or more and not to more than the whole; the trace is what chrome://tracing reads, with the
same ops, calls and times, one behind the other. Of the run also that every op of its program that
belongs to a step was timed, and, from ``--json``, that each moves bytes and has a share of its
limit above zero.

The model is so large that what lies between ops, the host's, is little of a step, and that an op's
operands are more than a GPU's cache holds. Exits with 1 when something is not so, 77 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import pantheraml as pm
from pantheraml.aside import end
from pantheraml.devices import usable_gpus
from pantheraml.tiny import TinyLlama

PATIENCE = 120.0
SKIPPED = 77
#: Ops' share of a step: the rest is the host's between them (an upload, a wait a segment, and
#: reading the times). Above 1 only by what two clocks differ by.
LEAST, MOST = 0.6, 1.02
#: Of what the table rounds to three digits.
ROUNDED = 0.006
MOST_OF_LIMIT = 2.0
WINDOW = 7  # steps that were timed by the tenth, at most 8 later
SEGMENTS = ("micro", "norm", "update", "clear")

LINE = re.compile(
    r"(?P<label>\S.*?) +(?P<op>[a-z]\w*) +(?P<calls>\d+) +"
    r"(?P<time>[\d.e+]+) (?P<unit>s|ms|µs|ns) +(?P<share>[\d.]+) % +"
    r"(?P<flops>[\d.]+) +(?P<bytes>[\d.]+) +(?P<limit>\d+) % (gemm|memory)"
)
UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}

failures: list[str] = []


def check(good: bool, what: str) -> None:
    """Remember what is not so."""
    if not good:
        failures.append(what)
        print(f"FAIL {what}", flush=True)


def shell(*words: str) -> str:
    """What the shell command says."""
    made = subprocess.run(
        [sys.executable, "-P", "-m", "pantheraml", "profile", *words],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    if made.returncode != 0:
        raise SystemExit(f"FAIL profile {' '.join(words)}: {made.stdout}{made.stderr}")
    return made.stdout


def parsed(title: str, table: str) -> dict[tuple[str, str], dict[str, float]]:
    """Lines of the table by label and op; all in seconds and shares of 1."""
    lines = table.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("what "))
    check(any("of the GEMM peak" in line for line in lines[:begin]), f"{title}: no peak measured")
    rows = {}
    for line in lines[begin + 1 :]:
        found = LINE.fullmatch(line.strip())
        check(found is not None, f"{title}: not a line of the table: {line!r}")
        if found is None:
            continue
        rows[found["label"], found["op"]] = {
            "calls": float(found["calls"]), "seconds": float(found["time"]) * UNITS[found["unit"]],
            "share": float(found["share"]) / 100, "flops": float(found["flops"]) * 1e9,
            "bytes": float(found["bytes"]) * 1e9, "of_limit": float(found["limit"]) / 100,
        }  # fmt: skip
    check(len(rows) == len(lines) - begin - 1, f"{title}: two lines of the same label and op")
    return rows


def check_table(title: str, table: str) -> dict[tuple[str, str], dict[str, float]]:
    """Times above zero that add up, rates, shares of the limit."""
    rows = parsed(title, table)
    heading = re.search(r" took ([\d.e+]+) (s|ms|µs|ns) .*; ops ([\d.]+) % of it", table)
    if heading is None:
        raise SystemExit(f"FAIL {title}: no heading in {table}")
    step, told = float(heading[1]) * UNITS[heading[2]], float(heading[3]) / 100
    whole = sum(row["seconds"] for row in rows.values())
    highest = max(rows, key=lambda key: rows[key]["of_limit"])
    for key, row in rows.items():
        check(row["seconds"] > 0 and row["calls"] > 0, f"{title}: {key} took no time")
        check(row["of_limit"] <= MOST_OF_LIMIT, f"{title}: {key} is {row['of_limit']} of its limit")
        # The share has one digit behind its point.
        apart = abs(row["share"] - row["seconds"] / step)
        check(apart <= 5.1e-4 + 2 * ROUNDED * row["share"], f"{title}: share of {key}")
    check(abs(whole / step - told) <= 2 * ROUNDED, f"{title}: ops are {whole / step}, told {told}")
    check(LEAST <= told <= MOST, f"{title}: ops are {told} of the step")
    products = [row["flops"] for (_, op), row in rows.items() if op.startswith(("linear", "att"))]
    check(bool(products) and min(products) > 0, f"{title}: a product without FLOP/s")
    print(
        f"     {title}: {len(rows)} lines, ops {100 * told:.1f} % of {step * 1e3:.2f} ms a step, "
        f"nearest to its limit {highest[0]} with {100 * rows[highest]['of_limit']:.0f} %",
        flush=True,
    )
    return rows


def check_trace(title: str, path: Path, rows: dict[tuple[str, str], dict[str, float]]) -> None:
    """What chrome://tracing wants, and the same as the table says."""
    events = json.loads(path.read_text())["traceEvents"]
    for event in events:
        good = event["ph"] == "X" and event["dur"] > 0 and event["ts"] >= 0
        good = good and isinstance(event["name"], str) and isinstance(event["cat"], str)
        good = good and isinstance(event["pid"], int) and isinstance(event["tid"], int)
        check(good, f"{title}: not an event of a trace: {event}")
    spans = [event for event in events if event["cat"] != "segment"]
    segments = [event["name"] for event in events if event["cat"] == "segment"]
    check(segments == list(SEGMENTS), f"{title}: segments of the trace are {segments}")
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in spans:
        calls = event["args"]["calls in a step"]
        sums[event["name"], event["cat"]][0] += calls
        sums[event["name"], event["cat"]][1] += calls * event["dur"] * 1e-6
    check(set(sums) == set(rows), f"{title}: ops only in one: {sorted(set(sums) ^ set(rows))}")
    for key in sums.keys() & rows.keys():
        calls, took = sums[key]
        check(round(calls) == rows[key]["calls"], f"{title}: calls of {key}")
        apart = abs(took - rows[key]["seconds"])
        check(apart <= ROUNDED * took, f"{title}: {key} took {took} in the trace")
    for one, following in zip(spans, spans[1:], strict=False):
        late = following["ts"] - one["ts"] - one["dur"]
        check(abs(late) <= 1e-6 * following["ts"], f"{title}: {following['name']} is not behind")


def of_model(model: Path, device: str, sizes: list[str], folder: Path) -> None:
    """Of ten steps that are made for it."""
    trace = folder / "model.json"
    table = shell(str(model), "--devices", device, *sizes, "--trace", str(trace))
    check_trace("model", trace, check_table("model", table))


def of_run(model: Path, device: str, rows: int, length: int, folder: Path) -> None:
    """Of steps that a run has made, full fine-tuning; asked of its log alone."""
    ids = [[(7 * i + 3 * j * j) % 1000 for j in range(length)] for i in range(rows)]
    run = pm.finetune(
        model, [{"input_ids": row, "labels": row} for row in ids], devices=device, method="full",
        max_steps=10**6, max_length=length, per_device_train_batch_size=rows, name="profiled",
    )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE
        while not any(e["type"] == "profile" and e["steps"] >= WINDOW for e in run.events()):
            if run.state not in ("starting", "running") or time.monotonic() > deadline:
                raise SystemExit(f"FAIL no times: {run.state}, {run.reason}")
            run.wait_for_change(0.5)
        run.stop(wait=True)
        trace = folder / "run.json"
        table = shell(str(run.folder), "--trace", str(trace))
        found = check_table("run", table)
        check_trace("run", trace, found)
        told = json.loads(shell(str(run.folder), "--json"))
        check({(row["label"], row["op"]) for row in told} == set(found), "run: --json has others")
        for row in told:
            good = row["bytes"] > 0 and row["flops"] >= 0 and 0 < row["of_limit"] <= MOST_OF_LIMIT
            check(good, f"run: {row}")
        program = run.program()
        timed = {op.node for op in program if op.seconds is not None and op.seconds > 0}
        meant = {op.node for op in program if op.segment in SEGMENTS and op.op != "allreduce"}
        labels = [op.name for op in program if op.node in meant ^ timed]
        check(timed == meant, f"run: timed and meant differ in {labels}")
    finally:
        end(run)


def main() -> int:
    """Profile a run and a model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    count, why, _ = usable_gpus()
    if args.device != "cpu" and count == 0:
        print(f"gpu.profile skipped: {why}")
        return SKIPPED
    shape = TinyLlama(vocab=4096, hidden=2048, layers=2, heads=32, kv_heads=8, intermediate=5632)
    rows, length = 16, 1024
    if args.device == "cpu":
        shape = TinyLlama(vocab=1024, hidden=256, layers=2, intermediate=512)
        rows, length = 4, 64
    with tempfile.TemporaryDirectory(prefix="pml-profile-") as name:
        folder = Path(name)
        os.environ["PANTHERAML_RUNS"] = str(folder / "runs")
        os.environ["PANTHERAML_CACHE"] = str(folder / "cache")
        model = shape.write(folder / "model")
        sizes = ["--max-length", str(length), "--per-device-train-batch-size", str(rows)]
        of_model(model, args.device, sizes, folder)
        of_run(model, args.device, rows, length, folder)
    print("FAIL" if failures else "ok  ", "profile of a model and of a run", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
