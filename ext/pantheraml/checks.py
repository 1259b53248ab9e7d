"""Checks of single parameters: what is wrong, by name."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import operator
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

from pantheraml.errors import InvalidError

P = ParamSpec("P")
R = TypeVar("R")


#: Names that others give to what is called otherwise here, or is not there.
ELSEWHERE = {
    "args": "settings are keywords, by TrainingArguments' names",
    "bf16": 'give dtype="bfloat16"; "auto" chooses it where a GPU has it',
    "bias": "biases are not trained with an adapter",
    "dataset": "it is data",
    "ddp_find_unused_parameters": "devices= says what trains",
    "deepspeed": "devices= and memory_limit= say what trains where",
    "do_sample": "a temperature above 0 draws, 0 takes the likeliest",
    "epochs": "it is num_train_epochs",
    "eval_dataset": "it is eval_data",
    "fp16": 'give dtype="float16"; "auto" chooses it where a GPU has no bfloat16',
    "fsdp": "devices= and memory_limit= say what trains where",
    "gradient_checkpointing": "the plan recomputes what memory_limit= asks for, by itself",
    "greater_is_better": "the least eval_loss is the best",
    "init_lora_weights": "A is drawn as PEFT's default, B is zero",
    "layers_pattern": "layers_to_transform counts a model's own layers",
    "load_in_4bit": 'give quant="nf4"',
    "load_in_8bit": 'give quant="nf4" or quant="fp8"',
    "logging_steps": "every step is recorded",
    "lora_r": "give lora=pantheraml.LoRA(r=…)",
    "lora_rank": "give lora=pantheraml.LoRA(r=…)",
    "lr": "it is learning_rate",
    "lr_scheduler": "it is lr_scheduler_type",
    "no_cuda": 'give devices="cpu"',
    "max_memory": "it is memory_limit",
    "max_tokens": "it is max_new_tokens",
    "num_beams": "beams are not in this version",
    "num_epochs": "it is num_train_epochs",
    "num_return_sequences": "give a list of prompts, in which one may be several times",
    "optimizer": "it is optim",
    "output_dir": "runs lie under PANTHERAML_RUNS, each in a folder of its name=",
    "peft_config": "give lora=pantheraml.LoRA(…)",
    "per_device_eval_batch_size": "evaluation uses per_device_train_batch_size",
    "prompt": "it is the first argument, text",
    "processing_class": "the tokenizer is the one in the model's folder",
    "quantization_config": 'give quant="nf4"',
    "rank": "it is r",
    "report_to": "the run records every step itself, in run.history",
    "target_parameters": "experts are not in this version",
    "task_type": "only causal language models are trained",
    "tokenizer": "it is the one in the model's folder",
    "train_dataset": "it is data",
    "use_cpu": 'give devices="cpu"',
    "use_dora": "DoRA is not in this version",
    "vram": "it is memory_limit",
}


def unknown_parameter(name: str, known: Sequence[str]) -> TypeError:
    """Make the error for a keyword that is none, with what is here in its place."""
    if name in ELSEWHERE:
        return TypeError(f"{name!r} is not a parameter: {ELSEWHERE[name]}")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return TypeError(f"{name!r} is not a parameter{hint}")


def names_checked(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function answer a keyword that it has not with the nearest one that it has."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                raise unknown_parameter(name, known)
        return function(*args, **kwargs)

    return checked


def choice(name: str, value: object, known: Sequence[str]) -> str:
    """Refuse a word that is not one of `known`, naming the nearest.

    Raises
    ------
    InvalidError
        It is none of them.
    """
    if isinstance(value, str) and value in known:
        return value
    near = difflib.get_close_matches(str(value).lower(), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InvalidError(f"{name} must be one of {', '.join(known)}; it is {value!r}{hint}")


def whole(name: str, value: object, low: int, high: int) -> int:
    """Refuse what is not a whole number in [low, high].

    Raises
    ------
    InvalidError
        It is none; the message has the name and the value.
    """
    # NumPy's whole numbers are such, too.
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        result = operator.index(value)
    elif isinstance(value, float) and value.is_integer():
        result = int(value)
    else:
        raise InvalidError(f"{name} must be a whole number, it is {value!r}")
    if not low <= result <= high:
        raise InvalidError(f"{name} must be from {low} to {high}, it is {result}")
    return result


def number(
    name: str, value: object, low: float, high: float, *, above: bool = False, below: bool = False
) -> float:
    """Refuse what is not a finite number in [low, high]; `above`, `below`: without that end.

    Raises
    ------
    InvalidError
        It is none; the message has the name and the value.
    """
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise InvalidError(f"{name} must be a number, it is {value!r}")
    try:
        result = float(value)
    except OverflowError:  # a whole number beyond all floats
        result = math.inf
    inside = math.isfinite(result) and low <= result <= high
    if not inside or (above and result == low) or (below and result == high):
        first = f"above {low:g}" if above else f"at least {low:g}"
        last = f"below {high:g}" if below else f"at most {high:g}"
        raise InvalidError(f"{name} must be {first} and {last}, it is {result:g}")
    return result


def truth(name: str, value: object) -> bool:
    """Refuse what is not True or False.

    Raises
    ------
    InvalidError
        It is neither.
    """
    # NumPy has a truth value of its own, which is none of Python's.
    kind = type(value)
    of_numpy = kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")
    if not isinstance(value, bool) and not of_numpy:
        raise InvalidError(f"{name} must be True or False, it is {value!r}")
    return bool(value)


def path_of(given: str | os.PathLike[str]) -> Path:
    """Make a path of what somebody wrote; ``~`` and ``~name`` are homes.

    Raises
    ------
    InvalidError
        Nobody of that name has a home here; or it is no UTF-8, and so cannot stand in run.json.
    """
    try:
        path = Path(given).expanduser()
        os.fspath(path.absolute()).encode()
    except RuntimeError:
        raise InvalidError(f"{os.fspath(given)!r}: nobody of that name has a home here") from None
    except UnicodeEncodeError:
        raise InvalidError(
            f"{os.fspath(path.absolute())!r}: a name that is no UTF-8 cannot be kept in a run's "
            "files; rename it"
        ) from None
    return path


def memory(value: int | str | None, name: str = "memory_limit") -> int:
    """Bytes of ``8GiB``, ``500MB`` or a number; 0 for None.

    Raises
    ------
    InvalidError
        It looks like none of these.
    """
    if value is None:
        return 0
    if isinstance(value, str):
        units = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
        match = re.fullmatch(r"\s*([0-9.]+)\s*(?:([kmgt])(i?))?b?\s*", value, re.IGNORECASE)
        try:
            if match is None:
                raise ValueError
            base = 1024 if match[3] else 1000
            value = int(float(match[1]) * base ** units[(match[2] or "").lower()])
        except (ValueError, OverflowError):
            raise InvalidError(f'{name} must look like "8GiB", it is {value!r}') from None
    return whole(name, value, 1, 2**53)
