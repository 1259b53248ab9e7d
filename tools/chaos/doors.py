"""Crowds at a shared door: what they cost a step.

Usage: tools/chaos/doors.py [--seconds S] [--phase S] [--cores N] [--hidden N | --model FOLDER]
                            [--others SHARE] [--who NAME…] [--report-only]

A run is shared on loopback; its coordinator and its worker are pinned to `--cores` processors, the
crowd, the viewers and this program to others (no sibling threads of the first). With one core the
coordinator takes the trainer's time for all that it does; with two it need not. Within one run,
short phases take turns: nobody, crowd, nobody, viewers, nobody, babble, nobody, … A crowd is 2,000
connections that say nothing. Viewers are 30, ten of them in a stopped process. Babble are 500
messages a second, with the run's own key, each of them wrong, from one who is turned out for it
and comes again, and again. A phase begins when they are there:
what it takes the coordinator to receive them, once, is told by itself. With --model, LoRA on a GPU
(rows of 2,048 tokens) in place of a small model on the CPU: its steps hardly differ from each
other, so that a small effect shows in few rounds.

Each disturbed phase is held against the mean of its two undisturbed neighbours, so that a machine
that slowly changes its pace changes nothing. Measures of a step: median and mean of the steps' own
seconds, and the worker's processor seconds. A fourth is a bound that other work on the machine
hardly moves: what the coordinator uses more of a processor, as a share of it, is the most that it
can take from a trainer on the same core. It is one at the pace of these
steps: what it comes to a step is said, too. Of the rounds' values the median is given, with its
bootstrap interval of 95%.

What others take of the run's processors, in user and system time, is counted in each phase: a round
in which they took more than --others of them says more of them than of the door, and counts for the
bound only. That a round is set aside does not depend on how long its steps were. So a machine of
two cores that other work comes to now and then is good enough: one for the run, one for everybody
else. How many rounds were left is said; fewer than six decide nothing.

Goals: +2% with the crowd, +1% with the viewers and with the babble. A goal is held where the whole
interval is within it, missed where it is beyond, and not decided where it is on both sides: more
rounds, or a quieter machine. Exit status 0: all held; 1: one is missed; 3: one is not decided;
--report-only: always 0. SIGTERM ends it after the round that is under way, with what it has.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from signal import SIGCONT, SIGSTOP, SIGTERM, signal

import pantheraml as pm
from common import end, reach, work_in
from pantheraml import _native
from pantheraml.tiny import TinyLlama
from reap import at_end

GOALS = {"crowd": 0.02, "viewers": 0.01, "babble": 0.01}
MEASURES = ("median", "mean", "processor", "bound")
OTHERS = len(MEASURES)  # behind a phase's measures: what others had of its processors
CONFIDENCE, RESAMPLED = 0.95, 10_000
SETTLE = 0.3  # seconds until a disturbance stands, or has gone
CROWD, PROCESSES, EACH = 2000, 3, 10  # viewers: so many in each process; the first one is stopped
RATE = 500  # of wrong messages, a second
LEAST = 10  # steps in a phase, however slow the machine is
LEAST_ROUNDS = 6
SETTLED = 80  # steps on a GPU: graphs are recorded and products timed before

# Many at a time: whom the queue of those who want to be accepted has no room for tries again a
# second later, by the system's doing.
SILENT = """
import resource, socket, sys
from concurrent.futures import ThreadPoolExecutor
host, port, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, number + 100), most))

def is_open(connection):
    try:
        while connection.recv(4096, socket.MSG_DONTWAIT):
            pass
    except BlockingIOError:
        return True
    except ConnectionError:
        pass
    return False

held = []
for order in sys.stdin:
    if order == "come\\n":
        with ThreadPoolExecutor(100) as pool:
            held = list(pool.map(socket.create_connection, [(host, port)] * number))
        print(len(held), flush=True)
    else:
        print(sum(map(is_open, held)), flush=True)
        for connection in held:
            connection.close()
"""
VIEWER = """
import sys
import pantheraml as pm
runs = []
for order in sys.stdin:
    if order == "come\\n":
        runs = [pm.attach(sys.argv[1]) for _ in range(int(sys.argv[2]))]
    else:
        for run in runs:
            run.close()
    print(len(runs), flush=True)
"""
BABBLE = r"""
import os, select, sys, time
from pantheraml import _native
from pantheraml.errors import BusyError
wrong = ['{"type":"set","id":"b%d","learning_rate":"fast"}', '{"type":"fly","id":"b%d"}',
         '{"type":"set","id":"b%d","learning_rate":-1}', '{"type":"stop","id":"b%d"', 'b%d',
         '{"type":"stop","id":"b%d","why":' + 40 * '[' + 40 * ']' + '}',
         '{"type":"replay","id":"b%d","from":1e30}',
         '{"type":"stop","id":"b%d' + 40000 * 'x' + '"}']
client = _native.Client(sys.argv[1])
rate, sent, begin, going = int(sys.argv[2]), 0, 0.0, False
while True:
    if select.select([0], [], [], 0.002 if going else None)[0]:
        order = os.read(0, 100)
        if not order:
            break
        going = order == b"come\n"
        begin, first = time.monotonic(), sent
        print(sent, flush=True)
    while going and sent - first < (time.monotonic() - begin) * rate:
        try:
            client.send(wrong[sent % len(wrong)] % sent)
        except BusyError:  # a thousand wait already to be let in again
            first -= 1
            break
        sent += 1
    client.receive()
"""


class Others:
    """A process that comes and goes when it is told to."""

    def __init__(self, program: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", program, *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def tell(self, order: str) -> None:
        """Give an order, and do not wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(order + "\n")

    def hear(self) -> int:
        """Wait until it is done; the number that it says."""
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        if not said:
            raise SystemExit(f"a process of the crowd ended with {self.process.wait()}")
        return int(said)

    def end(self) -> None:
        """Kill it, if it is not gone."""
        self.process.kill()
        self.process.communicate()


class Crowd:
    """Connections that say nothing; who is thrown out is gone."""

    def __init__(self, share: pm.Share) -> None:
        host, port = share.address.removeprefix("tcp://").rsplit(":", 1)
        self._silent = Others(SILENT, host, port, CROWD)
        self.stood: list[int] = []  # connections that were open at the end of each phase

    @contextmanager
    def come(self) -> Iterator[None]:
        """All have come; how many may stay is the door's to say."""
        self._silent.tell("come")
        if self._silent.hear() != CROWD:
            raise SystemExit("not all of the crowd has come")
        yield
        self._silent.tell("go")
        self.stood.append(self._silent.hear())

    def end(self) -> None:
        """Be gone for good."""
        self._silent.end()


class Viewers:
    """Processes of ten viewers each; the first one stops reading."""

    def __init__(self, share: pm.Share, folder: Path) -> None:
        key = share.save(folder / "key.json")
        self._all = [Others(VIEWER, key, EACH) for _ in range(PROCESSES)]

    def _order(self, word: str) -> None:
        for viewer in self._all:
            viewer.tell(word)
        for viewer in self._all:
            viewer.hear()

    @contextmanager
    def come(self) -> Iterator[None]:
        """All are there when the phase begins."""
        self._order("come")
        self._all[0].process.send_signal(SIGSTOP)
        yield
        self._all[0].process.send_signal(SIGCONT)
        self._order("go")

    def end(self) -> None:
        """Be gone for good."""
        for viewer in self._all:
            viewer.end()


class Babble:
    """One who sends nothing that is right."""

    def __init__(self, run: pm.Run) -> None:
        self._run = run
        self._sender = Others(BABBLE, _native.connection_file(run.folder), RATE)

    @contextmanager
    def come(self) -> Iterator[None]:
        """It goes on through the phase."""
        self._sender.tell("come")
        self._sender.hear()
        yield
        self._sender.tell("go")
        self._sent = self._sender.hear()

    def end(self) -> None:
        """Be gone for good."""
        self._sender.end()

    def check(self) -> str:
        """What it sent, of which nothing has to be done, and for which it has to be turned out."""
        refused = self._run.refused
        counted = refused["messages"] + refused["hurried"]
        if any(e["type"] == "command" for e in self._run.events()):
            raise SystemExit("a wrong message had an effect")
        if not 0 < counted < self._sent or refused["turned_out"] == 0:
            raise SystemExit(f"of {self._sent} wrong messages {counted} were heard: {refused}")
        return f"of {self._sent} wrong messages {counted} were heard and refused"


Visitors = Crowd | Viewers | Babble
Measured = list[tuple[float, ...]]


# ---- what a step costs ---------------------------------------------------------------------------


def siblings(processor: int) -> set[int]:
    """Processors on the same core as this one, itself too."""
    place = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
    found = set()
    for part in place.read_text().strip().split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def divide(cores: int) -> tuple[set[int], set[int]]:
    """Processors for the run, one of each of so many cores, and those of all other cores."""
    left = os.sched_getaffinity(0)
    ours: set[int] = set()
    while left and len(ours) < cores:
        ours.add(min(left))
        left -= siblings(min(left))
    if not left:
        raise SystemExit(f"{cores} cores for the run leave none for its visitors")
    return ours, left


def pin(processors: set[int]) -> None:
    """Have every thread of this process, and what it starts from now on, run there alone."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), processors)


def processor_seconds(run: pm.Run) -> float:
    """User and system seconds of the run's workers so far, by their processes' own clocks."""
    clocks = (~worker["pid"] << 3 | 2 for worker in run.workers)  # as clock_getcpuclockid has it
    return sum(time.clock_gettime(clock) for clock in clocks)


def coordinator_seconds(run: pm.Run) -> float:
    """The same of its coordinator."""
    return time.clock_gettime(~(run.coordinator_pid or 0) << 3 | 2)


def busy_seconds(processors: set[int]) -> float:
    """User and system seconds, also stolen ones, of these processors so far, whoever had them.

    Interrupts are not among them: on the run's own processors they are its visitors' packets.
    """
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in processors:
            user, nice, system, _, _, _, _, stolen = map(int, fields[:8])
            ticks += user + nice + system + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


def phase(run: pm.Run, seconds: float, ours: set[int]) -> tuple[float, ...]:
    """What a step costs for a while, by each measure; and what others had of our processors."""
    used, led, busy, begin, since = (
        processor_seconds(run), coordinator_seconds(run), busy_seconds(ours), run.step,
        time.monotonic(),
    )  # fmt: skip
    time.sleep(seconds)
    reach(run, begin + LEAST)
    used, led = processor_seconds(run) - used, coordinator_seconds(run) - led
    busy = busy_seconds(ours) - busy
    last, passed = run.step, time.monotonic() - since
    taken = [row["seconds"] for row in run.history[begin:last]]
    others = (busy - used - led) / (passed * len(ours))
    steps = statistics.median(taken), statistics.mean(taken), used / (last - begin)
    return *steps, led / passed, others


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median, and the ends of its bootstrap interval (percentiles)."""
    chance = random.Random(1)
    medians = sorted(
        statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(RESAMPLED)
    )
    cut = round((1 - CONFIDENCE) / 2 * RESAMPLED)
    return statistics.median(ratios), medians[cut], medians[-1 - cut]


def compared(
    before: Measured, with_them: Measured, after: Measured, at: int, others: float
) -> list[float]:
    """Of each round that others left alone, how much more the disturbed phase took than both."""
    found = []
    for was, is_now, then in zip(before, with_them, after, strict=False):
        if max(was[OTHERS], is_now[OTHERS], then[OTHERS]) > others:
            continue
        beside = (was[at] + then[at]) / 2
        more = is_now[at] - beside
        found.append(more if MEASURES[at] == "bound" else more / beside)
    return found


def judged(ratios: list[float], goal: float) -> tuple[str, str]:
    """The middle with its interval in words, and what that says of a goal."""
    if not ratios:
        return "no quiet round", "not decided"
    median, low, high = interval(ratios)
    words = f"{median:+.2%} ({low:+.2%} to {high:+.2%})"
    if len(ratios) < LEAST_ROUNDS:
        return words, "not decided"
    return words, "held" if high <= goal else "MISSED" if low > goal else "not decided"


enough = threading.Event()  # the round under way is the last one

Come = Callable[[], AbstractContextManager[None]]


def take_turns(
    run: pm.Run, come: dict[str, Come], seconds: float, length: float, ours: set[int]
) -> tuple[Measured, dict[str, Measured]]:
    """Give the undisturbed phases, one more than disturbed ones, and the others in between."""
    alone: Measured = []
    disturbed: dict[str, Measured] = {name: [] for name in come}
    begin = time.monotonic()
    came: dict[str, list[float]] = {name: [] for name in come}
    alone.append(phase(run, length, ours))
    while not enough.is_set() and (
        time.monotonic() < begin + seconds or len(alone) <= LEAST_ROUNDS * len(come)
    ):
        for name, crowd in come.items():
            before = coordinator_seconds(run)
            with crowd():
                time.sleep(SETTLE)
                came[name].append(coordinator_seconds(run) - before)
                disturbed[name].append(phase(run, length, ours))
            time.sleep(SETTLE)
            alone.append(phase(run, length, ours))
            last = alone[-2], disturbed[name][-1], alone[-1]
            steps = " ".join(f"{1e3 * each[1]:.2f}" for each in last)
            others = " ".join(f"{each[OTHERS]:.0%}" for each in last)
            passed = time.monotonic() - begin
            print(f"{passed:5.1f} s {name:<8}{steps} ms, others had {others}", flush=True)
    for name, spent in ((name, spent) for name, spent in came.items() if spent):
        print(f"when they come, {name}: {1e3 * statistics.median(spent):.0f} ms of the coordinator")
    return alone, disturbed


def start(args: argparse.Namespace, folder: Path) -> pm.Run:
    """The run whose steps are measured."""
    if args.model:
        vocab = int(_native.check_model(args.model)["vocab"])
        lists = [[(7 * i + 13 * j) % (vocab - 3) + 3 for j in range(2048)] for i in range(16)]
        return pm.finetune(
            args.model, [{"input_ids": ids, "labels": ids} for ids in lists], devices="cuda",
            max_steps=10**6, max_length=2048, per_device_train_batch_size=1, lora=pm.LoRA(r=16),
            save_strategy="no", name="doors",
        )  # fmt: skip
    model = TinyLlama(hidden=args.hidden, layers=4, intermediate=2 * args.hidden)
    return pm.finetune(
        model.write(folder / "model"), [{"text": "a panther climbs well " * 20}] * 50,
        max_steps=10**6, max_length=256, threads=1, name="doors",
    )  # fmt: skip


def measure(
    args: argparse.Namespace, ours: set[int], theirs: set[int], folder: Path
) -> tuple[Measured, dict[str, Measured], str]:
    """Start a run, have them come and go; also says what was turned away."""
    work_in(folder)
    pin(ours)
    run = start(args, folder)
    visitors: list[Visitors] = []
    try:
        reach(run, SETTLED if args.model else 20)
        pin(theirs)
        for pid in (run.coordinator_pid or 0, *(worker["pid"] for worker in run.workers)):
            if os.sched_getaffinity(pid) != ours:
                raise SystemExit(f"process {pid} of the run is not where it was put")
        share = run.share("tcp://127.0.0.1:*")
        crowd, viewers, babble = Crowd(share), Viewers(share, folder), Babble(run)
        visitors += [crowd, viewers, babble]
        who: dict[str, Visitors] = {"crowd": crowd, "viewers": viewers, "babble": babble}
        for each in (who[name] for name in args.who):  # once before, for what is only done once
            with each.come():
                time.sleep(SETTLE)
        come: dict[str, Come] = {name: who[name].come for name in args.who}
        alone, disturbed = take_turns(run, come, args.seconds, args.phase, ours)
        said = [f"turned away: {run.refused}"]
        if "crowd" in args.who:
            stood = f"{min(crowd.stood)} to {max(crowd.stood)} of {CROWD}"
            said.append(f"{stood} silent ones still there at the end of a phase")
        if "babble" in args.who:
            said.append(babble.check())
        if not all(disturbed.values()):
            raise SystemExit("ended before the first round was over")
        return alone, disturbed, "; ".join(said)
    finally:
        for visitor in visitors:
            visitor.end()
        end(run)


def main() -> int:
    """Print a line for each goal and measure, and one of all at last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=100, help="of all phases")
    parser.add_argument("--phase", type=float, default=2.0, help="seconds")
    parser.add_argument("--cores", type=int, default=1, help="for coordinator and worker")
    parser.add_argument("--hidden", type=int, default=128, help="the model's size")
    parser.add_argument("--model", help="a folder, trained on a GPU in place of the small one")
    parser.add_argument("--others", type=float, default=0.05, help="share that they may have")
    parser.add_argument("--who", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    at_end()
    signal(SIGTERM, lambda *_: enough.set())
    begin = time.monotonic()
    ours, theirs = divide(args.cores)
    with tempfile.TemporaryDirectory(prefix="pml-doors-") as folder:
        alone, disturbed, turned_away = measure(args, ours, theirs, Path(folder))
    said, verdicts = [], []
    for at, name in enumerate(MEASURES):
        quiet = [values for values in alone if name == "bound" or values[OTHERS] <= args.others]
        base = statistics.median(values[at] for values in quiet or alone)
        unit = "ms a second" if name == "bound" else "ms a step"
        left = (
            f"{len(quiet)} of {len(alone)} phases" if quiet else "in no phase left alone by others"
        )
        print(f"{name:<10}alone    {base * 1e3:8.3f} {unit}, {left}")
        for which, (who, phases) in enumerate(disturbed.items()):
            most = math.inf if name == "bound" else args.others
            ratios = compared(
                alone[which :: len(disturbed)], phases, alone[which + 1 :: len(disturbed)], at, most
            )
            words, end = judged(ratios, GOALS[who])
            verdicts.append(end)
            words += f", {len(ratios)} of {len(phases)} rounds"
            if (
                name == "bound"
            ):  # of a second; how many steps there are in one is the machine's pace
                each = statistics.median(r * p[1] for r, p in zip(ratios, phases, strict=True))
                words += f", {1e3 * each:.2f} ms a step"
            said.append(f"{who} {name} {words} {end}")
            print(f"{name:<10}{who:<9}{words}, goal {GOALS[who]:+.0%}: {end}")
    where = f"run on {sorted(ours)}, visitors on {len(theirs)} others"
    print(f"{where}; {turned_away}")
    print(f"doors: {'; '.join(said)}; {time.monotonic() - begin:.0f} s")
    if args.report_only:
        return 0
    return 1 if "MISSED" in verdicts else 3 if "not decided" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
