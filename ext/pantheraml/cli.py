"""``pantheraml``: the same verbs in the shell."""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import pantheraml as pm
from pantheraml import folders
from pantheraml.checks import number, path_of, unknown_parameter
from pantheraml.config import OVERLONG, Settings
from pantheraml.plain import complain, plain, say
from pantheraml.sharing import SharedRun, share_into

_DATA = ".jsonl, .json, .parquet or .txt file"
#: Settings that are made of several options, or read in another way.
_MADE = ("method", "lora", "chat_template_kwargs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    warnings.formatwarning = _warning
    if isinstance(sys.stdout, io.TextIOWrapper):  # it may have no letter for a model's, or for ours
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = _parsed(_parser(), sys.argv[1:] if arguments is None else arguments)
        result = args.call(args)
    except BrokenPipeError:
        return 0
    except (pm.Error, TypeError, OSError) as error:
        complain(f"pantheraml: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return int(result or 0)


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; options may have underlines, as those of transformers' scripts, and other names."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)  # then: as it is
    dashed = [
        re.sub(r"^--\w[\w-]*", lambda name: name[0].replace("_", "-"), one)
        for one in arguments[:end]
    ]
    args, others = parser.parse_known_args([*dashed, *arguments[end:]])
    if others:
        hint = ""
        if others[0].startswith("--"):
            name = others[0][2:].partition("=")[0].replace("-", "_")
            known = [one for one in vars(args) if one not in ("call", "model_option", name)]
            hint = f"; {unknown_parameter(name, known)}".replace("_", "-")
        parser.error(f"unrecognized arguments: {' '.join(others)}{hint}")
    return args


def _warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """Word a warning for people: without the line of code that gave it."""
    return plain(f"pantheraml: warning: {message}\n")


# ---- commands --------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    settings = {**_given(args), "method": args.method}
    if args.chat_template_kwargs is not None:
        settings["chat_template_kwargs"] = args.chat_template_kwargs
    if args.method == "lora":
        settings["lora"] = pm.LoRA(
            r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
            target_modules=args.target_modules, init=args.lora_init,
        )  # fmt: skip
    run = pm.finetune(_model(args), args.data, eval_data=args.eval_data, name=args.name, **settings)
    say(f"run {run.name} in {run.folder}", flush=True)
    return 0 if args.detach else _watch(run, whole=True)


def _plan(args: argparse.Namespace) -> None:
    settings = {**_given(args), "method": args.method}
    if args.method == "lora" and args.lora_r is not None:
        settings["lora"] = pm.LoRA(r=args.lora_r)
    if args.program:
        program = pm.program(_model(args), **settings)
        say(json.dumps(program.document) if args.json else program, end="")
        return
    plan = pm.plan(_model(args), **settings)
    say(json.dumps(vars(plan), indent=1) if args.json else plan)


def _profile(args: argparse.Namespace) -> None:
    if args.subject is None or folders.named(args.subject) is not None:
        found = pm.attach(args.subject, restart=False).profile()
    else:
        settings = {**_given(args), "method": args.method}
        if args.method == "lora" and args.lora_r is not None:
            settings["lora"] = pm.LoRA(r=args.lora_r)
        try:
            found = pm.profile(args.subject, **settings)
        except (pm.NotFoundError, pm.PeerError) as error:
            raise type(error)(f"there is no run {args.subject!r} here, and {error}") from None
    if args.trace is not None:
        complain(f"a step for chrome://tracing: {found.to_trace(args.trace)}")
    say(json.dumps(found.rows(), indent=1) if args.json else found, end="")


def _preview(args: argparse.Namespace) -> None:
    from pantheraml.terminal import Terminal

    settings = {
        name: value
        for name in ("max_length", "packing", "overlong", "chat_template")
        if (value := getattr(args, name)) is not None
    }
    if args.chat_template_kwargs is not None:
        settings["chat_template_kwargs"] = args.chat_template_kwargs
    Terminal().print(pm.preview(args.data, _model(args), rows=args.rows, **settings))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error})") from None


def _runs(args: argparse.Namespace) -> None:
    from rich.markup import escape
    from rich.table import Table

    from pantheraml.terminal import Terminal

    found = pm.runs()
    if args.json:
        say(json.dumps([{**vars(info), "folder": str(info.folder)} for info in found], indent=1))
        return
    if not found:
        say("there are no runs yet; pantheraml train MODEL --data FILE starts one")
        return
    table = Table("run", "state", "step", "model", "begun", box=None)
    for info in found:
        of = f"/{info.max_steps}" if info.max_steps else ""
        begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.created))
        name, model = escape(plain(info.name)), escape(plain(info.model))
        table.add_row(name, info.state, f"{info.step}{of}", model, begun)
    Terminal().print(table)


def _attach(args: argparse.Namespace) -> int:
    return _watch(pm.attach(args.run))


def _pause(args: argparse.Namespace) -> None:
    say(_waited(pm.attach(args.run).pause(), args))


def _resume(args: argparse.Namespace) -> None:
    run = pm.attach(args.run)
    over = run.state == "finished" and args.checkpoint is None
    command = run.resume(checkpoint=args.checkpoint, accept_changes=args.accept_changes)
    if command is not None:
        say(_waited(command, args))
    elif over:
        say(f"{run.name} has finished: its weights are loaded again, and no more steps are made")
    else:
        say(f"{run.name} goes on from its checkpoint")


def _set(args: argparse.Namespace) -> None:
    settings: dict[str, Any] = {}
    for pair in args.settings:
        name, equals, value = pair.partition("=")
        if not equals:
            raise pm.InvalidError(f"{pair!r} is not NAME=VALUE; --run says which run is meant")
        if name == "lr_scheduler_type":
            settings[name] = value
            continue
        if (name, value.lower()) == ("max_grad_norm", "none"):  # as 0: no limit
            settings[name] = None
            continue
        try:
            settings[name] = _json(value) if name == "lr_scheduler_kwargs" else float(value)
        except argparse.ArgumentTypeError as error:
            raise pm.InvalidError(f"{name}: {error}") from None
        except ValueError:
            raise pm.InvalidError(f"{name} must be a number, it is {value!r}") from None
    say(_waited(pm.attach(args.run).set(**settings), args))


def _checkpoint(args: argparse.Namespace) -> None:
    say(pm.attach(args.run).checkpoint(args.name, wait=True))


def _sample(args: argparse.Namespace) -> None:
    run = pm.attach(args.run)
    prompt: dict[str, Any] = {"text": args.text}
    if args.chat:
        prompt = {"messages": [{"role": "user", "content": args.text}]}
    for piece in run.sample(
        **prompt, max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed,
        top_k=args.top_k, top_p=args.top_p, repetition_penalty=args.repetition_penalty,
        stop=args.stop, stream=True,
    ):  # fmt: skip
        say(piece, end="", flush=True)
    say()


def _evaluate(args: argparse.Namespace) -> None:
    made = pm.attach(args.run).evaluate()
    say(f"held-out loss {made.loss:.5f} over {made.labels:,} tokens at step {made.step}")


def _export(args: argparse.Namespace) -> None:
    made = pm.attach(args.run).export(
        args.folder, args.format, args.step, dtype=args.dtype, max_shard_size=args.max_shard_size,
        verify=not args.no_verify,
    )  # fmt: skip
    say(made.describe())


def _report(args: argparse.Namespace) -> None:
    run = pm.attach(args.run)
    if args.file is None and isinstance(run, SharedRun):  # its folder is a path of somebody else's
        raise pm.InvalidError(f"run {run.name} is elsewhere: say by --file where its page goes")
    page = run.to_html().encode()
    if args.file is None:
        target = run.folder / "report.html"
        folders.write_private(target, page)
    else:
        target = path_of(args.file)
        target.write_bytes(page)
    say(target)


def _share(args: argparse.Namespace) -> None:
    run = pm.attach(args.run)
    target, made = share_into(args.out, run, args.bind, args.role, args.name, args.address)
    say(f"{target}: a {made.role} key for {made.address}")


def _unshare(args: argparse.Namespace) -> None:
    say(f"{pm.attach(args.run).unshare()} keys revoked; it listens on no network")


def _stop(args: argparse.Namespace) -> None:
    run = pm.attach(args.run)
    run.stop(wait=True)
    say(f"{run.name}: {run.state} at step {run.step}")


def _doctor(args: argparse.Namespace) -> int:
    if args.run is not None:
        from pantheraml.autopsy import examine_run, find, show

        found = examine_run(find(args.run))
        if not args.json:
            return show(found)
        say(found.to_json())
        return 1 if found.damaged else 0
    from pantheraml.doctor import examine

    return examine(run=not args.no_run)


def _monitor(_: argparse.Namespace) -> NoReturn:
    pm.monitor()
    raise AssertionError


# ---- helpers ---------------------------------------------------------------------------------


def _watch(run: pm.Run, *, whole: bool = False) -> int:
    try:
        from pantheraml.live import watch

        watch(run, whole=whole)
    except KeyboardInterrupt:
        say(f"\ndetached; the run goes on. Come back by: pantheraml attach {run.name}")
        return 0
    if run.state == "failed":
        complain(f"pantheraml: run {run.name} failed: {run.reason}")
        return 1
    checkpoint = run._ends_with or next(reversed(run.checkpoints), None)
    if checkpoint is not None:
        say(f"{run.state}: {checkpoint.path}")
    return 0


def _waited(command: pm.Command, args: argparse.Namespace) -> pm.Command:
    return command.wait(args.timeout)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    names = [name for name in Settings.__dataclass_fields__ if name not in _MADE]
    found = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _model(args: argparse.Namespace) -> str:
    given = [model for model in (args.model, args.model_option) if model]
    if len(given) != 1:
        raise pm.InvalidError("name one MODEL: a folder, or as on the hub (owner/name)")
    return str(given[0])


def _part(text: str) -> float | int:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        words = f"must be a share such as 0.1, or a number of rows; it is {text!r}"
        raise argparse.ArgumentTypeError(words) from None


def _seconds(text: str) -> float:
    """Read how long to wait: here, because a command that was sent has its effect."""
    try:
        return number("it", float(text), 0, threading.TIMEOUT_MAX)
    except ValueError:
        words = f"must be a number of seconds, 0 or more; it is {text!r}"
        raise argparse.ArgumentTypeError(words) from None


def _devices(text: str) -> str | int | list[str]:
    if text.isdecimal():
        return int(text)
    return text.split(",") if "," in text else text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pantheraml",
        description="Fine-tune language models in the background, watched and steered live.",
        epilog="RUN is a run's name or folder, or a shared key's file (.json); without one, the "
        "latest is meant. "
        "Runs live in $PANTHERAML_RUNS or ./runs.",
    )
    parser.add_argument("--version", action="version", version=pm.__version__)
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def verb(
        name: str, call: Callable[[argparse.Namespace], int | None], text: str, *, run: bool = True
    ) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(call=call)
        if run:
            made.add_argument("run", nargs="?", metavar="RUN")
        return made

    train = verb("train", _train, "Start a run and watch it.", run=False)
    _model_argument(train)
    train.add_argument("--data", required=True, help=_DATA)
    train.add_argument("--eval-data", help="held-out data, likewise")
    train.add_argument("--eval-split", type=_part, metavar="N", help="share or number held out")
    train.add_argument("--name", help="of the run")
    train.add_argument("--detach", action="store_true", help="start it and return at once")
    train.add_argument("--lora-alpha", type=float)
    train.add_argument("--lora-dropout", type=float)
    train.add_argument("--target-modules", nargs="+", metavar="NAME")
    train.add_argument("--lora-init", metavar="FOLDER", help="adapter to start from")
    plan = verb("plan", _plan, "Plan the memory of a run, without starting it.", run=False)
    _model_argument(plan)
    plan.add_argument("--program", action="store_true", help="print every operation of a step")
    plan.add_argument("--json", action="store_true")
    profile = verb(
        "profile",
        _profile,
        "Say where the time of a step goes, op by op, beside what the machine can do: of a run, or "
        "of some ten steps that are made with a model.",
        run=False,
    )
    profile.add_argument("subject", nargs="?", metavar="RUN|MODEL")
    profile.add_argument("--trace", metavar="FILE.json", help="write a step as a Chrome trace")
    profile.add_argument("--json", action="store_true")
    for command in (train, plan, profile):
        _settings_arguments(command)

    preview = verb(
        "preview", _preview, "Show rows as they will be learned from, without a run.", run=False
    )
    _model_argument(preview)
    preview.add_argument("--data", required=True, help=_DATA)
    preview.add_argument("--rows", type=int, default=3, metavar="N", help="default 3")
    preview.add_argument("--max-length", type=int, metavar="N")
    preview.add_argument("--packing", action=argparse.BooleanOptionalAction)
    for command in (train, preview):
        command.add_argument("--overlong", choices=OVERLONG, help="rows above max-length")
        command.add_argument("--chat-template", metavar="FILE", help="in place of the model's")
        command.add_argument(
            "--chat-template-kwargs", type=_json, metavar="JSON",
            help='such as {"enable_thinking": false}',
        )  # fmt: skip

    verb("runs", _runs, "List runs, the latest first.", run=False).add_argument(
        "--json", action="store_true"
    )
    verb("attach", _attach, "Watch a run; Ctrl-C leaves it alone.")
    pause = verb("pause", _pause, "Let a run stand still before its next update.")
    resume = verb("resume", _resume, "Let a run go on: after a pause, or from a checkpoint.")
    resume.add_argument("--checkpoint", help="of a run that ended: go back to this one")
    resume.add_argument("--accept-changes", action="store_true", help="though bits will differ")
    change = verb("set", _set, "Change settings of a run.", run=False)
    change.add_argument("settings", nargs="+", metavar="NAME=VALUE")
    change.add_argument("--run", metavar="RUN")
    for command in (pause, resume, change):
        command.add_argument("--timeout", type=_seconds, default=600.0, help="seconds to wait")
    checkpoint = verb("checkpoint", _checkpoint, "Write a checkpoint.")
    checkpoint.add_argument("--name", help="to remember it by")
    sample = verb("sample", _sample, "Let the model continue a prompt.", run=False)
    sample.add_argument("text", metavar="PROMPT")
    sample.add_argument("--run", metavar="RUN")
    sample.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    sample.add_argument("--max-new-tokens", type=int, default=64)
    sample.add_argument("--temperature", type=float, default=0.0)
    sample.add_argument("--top-k", type=int)
    sample.add_argument("--top-p", type=float)
    sample.add_argument("--repetition-penalty", type=float)
    sample.add_argument("--stop", action="append", metavar="TEXT", help="end where this begins")
    sample.add_argument("--seed", type=int, default=0)
    verb("evaluate", _evaluate, "Measure the loss on the held-out data.")
    export = verb("export", _export, "Write what was trained as other tools read it.")
    export.add_argument("folder", metavar="FOLDER")
    export.add_argument("--format", choices=("peft", "merged", "gguf"))
    export.add_argument("--step", type=int)
    export.add_argument(
        "--dtype", help="merged: auto float32 bfloat16 float16; gguf: f32 f16 bf16 q8_0"
    )
    export.add_argument("--max-shard-size", default="5GB", help="of merged weights' files")
    export.add_argument("--no-verify", action="store_true", help="do not read it back")
    verb("report", _report, "Write a page with the curves.").add_argument("--file")
    share = verb("share", _share, "Let others see a run over a network, with a key.")
    share.add_argument("--bind", required=True, metavar="tcp://ADDRESS:PORT", help="* = any port")
    share.add_argument("--out", required=True, metavar="FILE.json", help="the key, mode 0600")
    share.add_argument("--role", choices=("view", "control"), default="view")
    share.add_argument("--name", help="whom it is for")
    share.add_argument("--address", help="what viewers connect to, if not ADDRESS")
    verb("unshare", _unshare, "Revoke all shared keys and close the network doors.")
    verb("stop", _stop, "End a run with a checkpoint.")
    verb("monitor", _monitor, "Not in this version.", run=False)
    doctor = verb(
        "doctor",
        _doctor,
        "Say what is there, by a ten-second real run; with RUN, what happened to that run and what "
        "can be resumed.",
    )
    doctor.add_argument("--no-run", action="store_true", help="only look")
    doctor.add_argument("--json", action="store_true", help="of RUN, for programs")
    return parser


def _model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub name")
    parser.add_argument("--model", dest="model_option", metavar="MODEL", help=argparse.SUPPRESS)


def _settings_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--lora-r", type=int, help="rank")
    parser.add_argument(
        "--quant", choices=("nf4", "fp8"), help="store frozen layers in 4 or in 8 bits"
    )
    numbers: dict[type, tuple[str, ...]] = {
        int: (
            "max_steps", "per_device_train_batch_size",
            "gradient_accumulation_steps", "max_length", "seed", "eval_steps", "save_steps",
            "save_total_limit", "early_stopping_patience", "threads", "max_restarts",
            "generate_length",
        ),
        float: (
            "num_train_epochs", "learning_rate", "weight_decay", "max_grad_norm", "warmup_ratio",
            "warmup_steps",  # below 1: a share of all steps
            "early_stopping_threshold", "adam_beta1", "adam_beta2", "adam_epsilon", "hang_timeout",
        ),
    }  # fmt: skip
    for kind, names in numbers.items():
        for name in names:
            default = Settings.__dataclass_fields__[name].default
            shown = "" if default is None else f"default {default}"
            parser.add_argument("--" + name.replace("_", "-"), type=kind, help=shown, metavar="N")
    parser.add_argument("--lr-scheduler-type")
    parser.add_argument("--lr-scheduler-kwargs", type=_json, metavar="JSON")
    parser.add_argument("--optim", help='"adamw", "adamw_8bit", "adamw_auto" or "sgd"')
    parser.add_argument("--optim-args", metavar="NAME=VALUE,…", help="of sgd")
    parser.add_argument("--eval-strategy", choices=("no", "steps", "epoch"))
    parser.add_argument("--save-strategy", choices=("no", "steps", "epoch", "best"))
    parser.add_argument("--memory-limit", help='such as "8GiB"')
    parser.add_argument("--dtype", help='of weights and activations; default "auto"')
    parser.add_argument("--restart", choices=("never", "on-failure"), help="where a worker ends")
    parser.add_argument("--devices", type=_devices, help='"cpu", a number of workers, "cpu,cpu"')
    for name in (
        "packing", "shuffle", "deterministic", "group_by_length", "load_best_model_at_end"
    ):  # fmt: skip
        parser.add_argument("--" + name.replace("_", "-"), action=argparse.BooleanOptionalAction)


if __name__ == "__main__":
    sys.exit(main())
