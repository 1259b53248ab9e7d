"""The table of training on one GPU: ours, transformers + PEFT beside it, packed text, cold starts.

    python3 tools/bench/gpu.py --bench build/gpu/bundle/bench_gpu_step [--only 8bx4,1bx1,…]
                               [--what ours,packed,cold,plan,run,eager,compile] [--seconds 600]
                               [--profile]

The models are random weights at the real shapes, bfloat16, LoRA r = 16 on all seven projections,
rows of 2048 tokens, all tokens counted; the figure is the median step. Cases with a limit, NF4 or
FP8 are ours alone. Ours is a process a case (``bench_gpu_step``), eager a process a model, compiled
a process a case (tools/bench/gpu_peers.py); packed text, cold starts, plans against NVML and what a
run adds to its steps are the scripts beside this one, which need the package. One thing is measured
at a time, with nothing beside it; only what is not measured (loading, compiling) goes on side by
side. Each case has a time limit, and --seconds is one for all: what is left then says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from gpu_models import MODELS, write_model
from gpu_peers import Peer

LOADING, COMPILING, MEASURING = 90.0, 200.0, 40.0  # seconds at most
KEPT = 4.0  # seconds a case, of what is left: who is late to be warm must not take others' time
GIB = 1 << 30


class Case(NamedTuple):
    """One line of the table, and what is asked of ours."""

    name: str
    model: str
    rows: int
    options: tuple[str, ...] = ()  # of bench_gpu_step: ours alone
    rate: float = 0.0
    memory: float = 0.0  # GiB


CASES = [
    Case("8bx4", "8b", 4, rate=19e3, memory=46),
    Case("8bx4-24g", "8b", 4, ("--limit", "24576"), 16.5e3, 24),
    Case("8bx4-nf4", "8b", 4, ("--nf4",), 18e3),
    Case("8bx4-nf4-16g", "8b", 4, ("--nf4", "--limit", "16384"), 16e3, 16),
    Case("8bx4-nf4-8.5g", "8b", 4, ("--nf4", "--limit", "8704"), 13e3, 8.5),
    Case("8bx4-fp8", "8b", 4, ("--fp8",), 25e3),
    Case("7bx4-nf4", "7b", 4, ("--nf4",)),
    Case("mistral-7bx4", "mistral-7b", 4),
    Case("qwen3-8bx4", "qwen3-8b", 4),
    Case("qwen3-0.6bx8", "qwen3-0.6b", 8),
    Case("1bx8", "1b", 8, rate=95e3),
    Case("1bx2", "1b", 2, rate=88e3),
    Case("1bx1", "1b", 1, rate=80e3),
    Case("0.5bx8", "0.5b", 8, rate=175e3),
    Case("0.5bx1", "0.5b", 1, rate=100e3),
    Case("tinyx1", "tiny", 1),  # for a try without a GPU
]
#: Compiled side by side, the longest first. They are done compiling at different times and give
#: their memory back then; who finds none waits for it (gpu_peers.py).
ROUNDS = [["8bx4", "1bx8", "0.5bx8", "tinyx1"], ["1bx1", "1bx2", "0.5bx1"]]
WAYS = ("ours", "packed", "cold", "plan", "run", "eager", "compile")
Answer = dict[str, Any]


def run_ours(args: argparse.Namespace, case: Case, seconds: float) -> Answer:
    """One case of ours: the program's last line, and its profile where one was asked for."""
    command = [args.bench, str(Path(args.folder) / case.model), "--rows", str(case.rows)]
    command += ["--steps", str(args.steps), "--device", args.device, "--length", str(args.length)]
    command += [*case.options, *(["--profile"] if args.profile else [])]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=max(seconds, 0.1)
        )
    except subprocess.TimeoutExpired:
        return {"error": f"ended after {seconds:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        return {"error": done.stderr.strip()[-120:] or f"status {done.returncode}"}
    if args.profile:
        print("\n".join(lines[:-1]), flush=True)
    answer: Answer = json.loads(lines[-1])
    return answer


class Bench:
    """The cases, the clock and what came."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Choose the cases."""
        self.args, self.folder = args, Path(args.folder)
        self.last = time.monotonic() + args.seconds
        self.what = args.what.split(",")
        names = args.only.split(",") if args.only else [c.name for c in CASES if c.rate]
        self.cases = [c for c in CASES if c.name in names]
        self.found: dict[tuple[str, str], Answer] = {}

    def left(self) -> float:
        """Seconds until all must be over."""
        return self.last - time.monotonic()

    def keep(self, way: str, case: Case, answer: Answer) -> None:
        """Keep what came, and say it at once."""
        self.found[way, case.name] = answer
        said = answer.get("error") or (
            f"{answer['tokens_per_second']:,.0f} tok/s, {answer['used'] / GIB:.1f} GiB"
            + "".join(
                f", {words} {answer[key]:.1f}{unit}"
                for key, words, unit in (
                    ("load", "load", " s"), ("first_step", "first step", " s"),
                    ("warm", "warmed up in", " s"), ("loss", "loss", ""),
                )
                if key in answer
            )
        )  # fmt: skip
        print(f"{case.name} {way}: {said}", flush=True)

    def warm(self, peers: dict[str, Peer], cases: list[Case]) -> dict[str, Answer]:
        """Let peers compile, or allocate, side by side; their answers by case."""
        for case in cases:
            peers[case.name].tell("warm", case.rows)
        limit = time.monotonic() + min(COMPILING, self.left() - KEPT * len(cases))
        return {c.name: peers[c.name].hear(limit - time.monotonic()) for c in cases}

    def measure(self, peer: Peer, way: str, case: Case, warm: Answer) -> None:
        """Measure a case that is warm, alone."""
        if "error" in warm:
            self.keep(way, case, warm)
            return
        peer.tell("measure", case.rows, self.args.steps)
        self.keep(way, case, warm | peer.hear(min(MEASURING, self.left())))

    def start(self, way: str, cases: list[Case]) -> dict[str, Peer]:
        """Processes that begin to load: a peer for each case; eager ones of a model share it."""
        peers: dict[str, Peer] = {}
        for case in cases:
            same = [c.name for c in cases if c.model == case.model and c.name in peers]
            peers[case.name] = (
                peers[same[0]] if way == "eager" and same
                else Peer(self.folder / case.model, way, self.args.length)
            )  # fmt: skip
        return peers

    def loaded(self, way: str, peers: dict[str, Peer]) -> None:
        """Wait until all have loaded, and say what they are."""
        for peer in dict.fromkeys(peers.values()):
            first = peer.hear(min(LOADING, self.left()))
            print(f"{way}: {first.get('error') or first['versions']}", flush=True)

    def eager(self, cases: list[Case], peers: dict[str, Peer]) -> None:
        """One case after the other; a peer that has no more of them goes."""
        for at, case in enumerate(cases):
            peer = peers[case.name]
            self.measure(peer, "eager", case, self.warm(peers, [case])[case.name])
            if all(peers[later.name] is not peer for later in cases[at + 1 :]):
                peer.end()

    def compiled(self, cases: list[Case], peers: dict[str, Peer]) -> None:
        """One round."""
        warm = self.warm(peers, cases)
        for case in cases:
            self.measure(peers[case.name], "compile", case, warm[case.name])
            peers[case.name].end()

    def peers(self) -> None:
        """All cases of transformers; what is compiled first loads beside what is eager."""
        cases = [c for c in self.cases if not c.options]
        rounds = [[c for c in cases if c.name in names] for names in ROUNDS]
        rounds = [now for now in rounds if now and "compile" in self.what]
        eager = self.start("eager", cases) if "eager" in self.what else {}
        compiled = self.start("compile", rounds[0]) if rounds else {}
        try:
            self.loaded("eager", eager)
            self.loaded("compile", compiled)
            if eager:
                self.eager(cases, eager)
            for now in rounds:
                if now is not rounds[0]:
                    if self.left() <= 0:
                        break
                    compiled = self.start("compile", now)
                    self.loaded("compile", compiled)
                self.compiled(now, compiled)
        finally:
            for peer in [*eager.values(), *compiled.values()]:
                peer.end()

    def script(self, name: str, *words: object) -> None:
        """Another bench of this folder; its lines are ours."""
        command = [sys.executable, str(Path(__file__).with_name(name)), *map(str, words)]
        print(f"{name}:", flush=True)
        try:
            subprocess.run(command, check=False, timeout=max(self.left(), 0.1))
        except subprocess.TimeoutExpired:
            print(f"{name} was ended: no time left", flush=True)

    def table(self) -> None:
        """Everything side by side."""
        ways = [way for way in ("ours", "eager", "compile") if way in self.what]
        print(f"\n{'case':14}{'goal':>16}" + "".join(f"{w + ' tok/s':>16}{'GiB':>7}" for w in ways)
              + f"{'plan':>7}{'x best':>8}")  # fmt: skip
        for case in self.cases:
            goal = f"{case.rate:,.0f}" + (f", {case.memory:g}" if case.memory else "")
            line, rates = f"{case.name:14}{goal:>16}", []
            for way in ways:
                no = "" if case.options and way != "ours" else "no time"
                answer = self.found.get((way, case.name), {"error": no})
                rates.append(answer.get("tokens_per_second", 0.0))
                line += f"{rates[-1]:16,.0f}" if rates[-1] else f"{answer['error'][:15]:>16}"
                line += f"{answer.get('used', 0) / GIB:7.1f}" if "used" in answer else " " * 7
            planned = self.found.get(("ours", case.name), {}).get("planned", 0)
            line += f"{planned / GIB:7.1f}" if planned else ""
            print(line + (f"{rates[0] / max(rates[1:]):8.2f}" if any(rates[1:]) else ""))


def main() -> None:
    """Parse arguments and measure, or write a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--bench", help="the program bench_gpu_step")
    parser.add_argument("--what", default=",".join(WAYS))
    parser.add_argument("--only", help="cases, as 8bx4,1bx1; else all")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600, help="for all")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--device", default="cuda", help="of ours")
    parser.add_argument("--folder", default="/dev/shm/pml-bench", help="where models are written")
    parser.add_argument("--profile", action="store_true", help="ours: device time by op")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write_model(Path(args.folder) / args.write, MODELS[args.write])
        return
    for word, known in ((args.what, WAYS), (args.only or "", [c.name for c in CASES])):
        strange = sorted({part for part in word.split(",") if part} - set(known))
        if strange:
            parser.error(f"{', '.join(strange)}: there are {', '.join(known)}")
    if args.bench is None and {"ours", "cold", "run"} & set(args.what.split(",")):
        parser.error("--bench: where bench_gpu_step is (tests/gpu/run bundle builds it)")
    bench = Bench(args)
    for name in dict.fromkeys(c.model for c in bench.cases):
        if not (bench.folder / name).exists():
            me = [sys.executable, os.path.abspath(__file__), "--folder", args.folder]
            subprocess.run([*me, "--write", name], check=True, timeout=max(bench.left(), 0.1))
    for case in bench.cases if "ours" in bench.what else []:
        bench.keep("ours", case, run_ours(args, case, min(LOADING, bench.left())))
    device, first = ("--device", args.device), bench.folder
    scripts: dict[str, tuple[object, ...]] = {
        "packed": ("packed_gpu.py", first / "8b", "--turns", 3, *device),
        "cold": ("cold_gpu.py", "--bench", args.bench, "--folder", first, *device),
        "plan": ("plan_check_gpu.py",),
        "run": ("run_gpu.py", first / "0.5b", "--bench", args.bench, "--pairs", 6, *device),
    }
    for what, (name, *words) in scripts.items():
        if what in bench.what:
            bench.script(str(name), *words)
    if bench.left() > 0:
        bench.peers()
    bench.table()


if __name__ == "__main__":
    main()
