"""What a run is made of: parameters, their ranges, and how they are resolved.

Names follow Hugging Face's TrainingArguments and PEFT's LoraConfig. Everything is checked here,
by name, before a run folder exists; the engine checks ``run.json`` again when it reads it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pantheraml.checks import choice as choice
from pantheraml.checks import memory as memory
from pantheraml.checks import number as number
from pantheraml.checks import path_of
from pantheraml.checks import truth as truth
from pantheraml.checks import unknown_parameter as unknown_parameter
from pantheraml.checks import whole as whole
from pantheraml.devices import device_list, gpu_dtypes
from pantheraml.errors import InvalidError, NotFoundError, NotInThisVersion
from pantheraml.lora import LoRA, Model

DTYPES = ("auto", "float32", "fp32", "bfloat16", "bf16", "float16", "fp16")
OVERLONG = ("cut", "split", "drop", "refuse")
#: What max_length is where it is not given and the model has as many positions.
USUAL_LENGTH = 2048
#: Of a micro-batch: the engine counts them in 32 bits.
MOST_TOKENS = 2**31 - 1
#: Bytes. What is less as a limit was meant in another unit.
LEAST_MEMORY = 1 << 20
SCHEDULES = (
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
)
#: transformers' names of the optimizers that there are.
OPTIMIZERS = {
    "adamw": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_auto": "adamw_auto",
    "sgd": "sgd",
}


@dataclass(frozen=True)
class Settings:
    """Every parameter of a run but model, data and name, with its default.

    Parameters
    ----------
    method
        ``"lora"`` trains an adapter, ``"full"`` every weight.
    quant
        How frozen linear layers are stored: ``"nf4"`` takes 4.13 bits a weight, in bitsandbytes'
        layout; ``"fp8"`` takes 8 bits and multiplies in 8 bits, which is the fastest on an H100 or
        H200; it needs compute capability 8.9, and is a slow reference on the CPU; None keeps them
        as they are.
    lora
        The adapter, for ``method="lora"``.
    max_steps
        Optimizer steps; None: as many as `num_train_epochs` makes.
    num_train_epochs
        Passes over the data, where `max_steps` is None. Default 1.
    learning_rate
        Peak of the schedule.
    lr_scheduler_type
        Any schedule of ``transformers.get_scheduler``: ``cosine``, ``linear``, ``constant``,
        ``constant_with_warmup``, ``cosine_with_restarts``, ``polynomial``, ``inverse_sqrt``,
        ``cosine_with_min_lr``, ``cosine_warmup_with_min_lr``, ``warmup_stable_decay``; and
        ``reduce_lr_on_plateau`` and ``greedy``, which follow the evaluation loss.
    lr_scheduler_kwargs
        The schedule's keywords, such as ``{"min_lr": 1e-5}``.
    warmup_steps
        Steps over which the rate rises linearly from 0; below 1: a share of all steps.
    warmup_ratio
        The same share, where `warmup_steps` is 0.
    per_device_train_batch_size
        Rows (with packing: packed rows) of a micro-batch on each device.
    gradient_accumulation_steps
        Micro-batches of one optimizer step.
    max_length
        Tokens a row may have; longer than the model's ``max_position_embeddings`` is warned of.
        None: 2048, or those positions where they are fewer.
    packing
        Lay rows together into rows of `max_length`; attention and positions stay within each.
    weight_decay
        On every weight but norms and biases, as transformers' Trainer; decoupled in AdamW, added
        to the gradient in SGD, as torch has them.
    adam_beta1, adam_beta2, adam_epsilon
        Of AdamW.
    max_grad_norm
        Gradients are scaled down to this norm; 0 or None for no limit.
    optim
        ``"adamw"`` (also as ``"adamw_torch"``) or ``"sgd"``, as torch.optim has them; or
        ``"adamw_8bit"`` (also as ``"adamw_bnb_8bit"``), whose moments take 2 bytes a parameter
        instead of 8, quantised as bitsandbytes has them (tensors of 4096 elements and more); or
        ``"adamw_auto"``, which leaves the width to the plan: 8 bits only where nothing else fits
        in ``memory_limit``, or where they save at least 2 % of a step's recomputation.
    optim_args
        Of SGD: ``momentum``, ``dampening``, ``nesterov``, as a dict or as Trainer's text
        ``"momentum=0.9,nesterov=true"``.
    seed
        Of the order of rows, of the adapter's initial weights and of dropout.
    devices
        ``"auto"`` (a GPU where one can be used), ``"cpu"``, ``"cuda"``, a number of workers, or a
        list such as ``["cuda:0", "cuda:1"]`` or ``["cpu"] * 2``.
    eval_steps, save_steps
        Evaluate, or write a checkpoint, every so many steps; None: at the end only.
    eval_strategy, save_strategy
        ``"steps"`` (with the settings above), ``"epoch"``, ``"no"``; None: ``"steps"`` where they
        are given. `save_strategy` may be ``"best"``: wherever an evaluation is the best so far.
    load_best_model_at_end
        End with the weights of the best evaluation, which are then saved whenever one is.
    metric_for_best_model
        ``"eval_loss"``, the only measure there is; the least is the best.
    early_stopping_patience, early_stopping_threshold
        End the run after so many evaluations in a row that are not better by more than the
        threshold (transformers' EarlyStoppingCallback).
    save_total_limit
        Unnamed checkpoints to keep; None for all. The best and the newest are never removed.
    group_by_length
        Draw rows of about the same length together (transformers' LengthGroupedSampler); needs
        ``packing=False``.
    memory_limit
        Per device: bytes, or text such as ``"8GiB"``; None: what is free.
    shuffle
        False keeps the rows' order.
    dtype
        Of weights and activations: ``"auto"`` is bfloat16 on a GPU (float16, with a loss scale that
        finds itself, on one before compute capability 8.0) and float32 on the CPU. What is trained
        has float32 values in each.
    deterministic
        The same bits on the same kind of machine with as many threads and as much memory, also
        when interrupted and resumed: a run keeps its plan, and does not go on where what decides
        bits is another, unless that is accepted. On a GPU the first step then waits until
        attention is compiled; else other kernels, with other last bits, serve meanwhile.
    restart
        ``"on-failure"``: when a worker or the coordinator dies or hangs, the run goes on by itself
        from its last snapshot in memory or checkpoint, and what was tuned is in force again at its
        steps; where others have its GPU's memory by then, it waits for that. ``"never"``: it fails.
    max_restarts
        How often it does so before it fails, counted from its start or its last resume.
    hang_timeout
        Seconds in which a worker must come on (a micro-batch, or ten times its usual time where
        that is more; loading and saving 20 times this); 0 for no limit.
    threads
        Of each CPU worker; None: its share of the cores.
    generate_length
        Prompt and new tokens that `Run.sample` has room for; None: `max_length`, at least 512 or
        the model's positions where those are fewer.
    eval_split
        Hold out so many documents of the data to evaluate on: a share below 1, or their number.
        Chosen by `seed`; of a .txt the end is taken.
    overlong
        What is done with rows longer than `max_length`: ``"cut"`` keeps the beginning, ``"split"``
        makes several rows of one, ``"drop"`` leaves it out, ``"refuse"`` ends the run with its
        name. None: texts are split where `packing` is on, all others are cut.
    chat_template
        File of a chat template to use in place of the model's, or its text.
    chat_template_kwargs
        Variables for the chat template, such as ``{"enable_thinking": False}``; a date for
        ``"strftime_now"`` is what the template takes for today.
    save_to
        Not in this version.
    """

    method: str = "lora"
    quant: str | None = None
    lora: LoRA | None = None
    max_steps: int | None = None
    num_train_epochs: float | None = None
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: Mapping[str, Any] | None = None
    warmup_steps: float = 0
    warmup_ratio: float = 0.0
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    max_length: int | None = None
    packing: bool = True
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    optim: str = "adamw"
    optim_args: Mapping[str, Any] | str | None = None
    seed: int = 42
    devices: str | int | Sequence[str] = "auto"
    eval_steps: int | None = None
    save_steps: int | None = None
    eval_strategy: str | None = None
    save_strategy: str | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    save_total_limit: int | None = None
    group_by_length: bool = False
    memory_limit: int | str | None = None
    shuffle: bool = True
    dtype: str = "auto"
    deterministic: bool = False
    restart: str = "on-failure"
    max_restarts: int = 3
    hang_timeout: float = 30.0
    threads: int | None = None
    generate_length: int | None = None
    eval_split: float | int | None = None
    overlong: str | None = None
    chat_template: str | os.PathLike[str] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    save_to: str | None = None

    @classmethod
    def of(cls, given: dict[str, Any], also: Iterable[str] = ()) -> Settings:
        """Make settings from keyword arguments.

        Raises
        ------
        TypeError
            A name is not a parameter; the nearest that is one is suggested. `also` holds names
            that the calling function takes itself.
        """
        known = list(cls.__dataclass_fields__)
        for name in given:
            if name not in known and name in LoRA.__dataclass_fields__:
                raise TypeError(f"{name!r} is not a parameter: give lora=pantheraml.LoRA({name}=…)")
            if name not in known:
                raise unknown_parameter(name, [*known, *also])
        return cls(**given)

    def resolve(self, positions: int, model: Model | None = None) -> dict[str, Any]:
        """Check every parameter and give run.json's fields.

        Parameters
        ----------
        positions
            ``max_position_embeddings`` of the model, for the default of `generate_length`.
        model
            What the adapter is made for; None: only what can be said without one.

        Raises
        ------
        InvalidError
            A parameter is out of its range, or two exclude each other: the message names them.
        """
        self._refuse_what_is_not_built()
        choice("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        epochs = self.num_train_epochs
        # By itself nothing goes beyond the positions that the model was trained for.
        usual = max(2, min(USUAL_LENGTH, positions))
        max_length = whole("max_length", _pick(self.max_length, usual), 2, 1 << 20)
        room = _pick(self.generate_length, None, max(max_length, min(512, positions)))
        rows = whole("per_device_train_batch_size", self.per_device_train_batch_size, 1, 65536)
        if rows * max_length > MOST_TOKENS:
            raise InvalidError(
                f"per_device_train_batch_size ({rows}) rows of max_length ({max_length}) are "
                f"{rows * max_length:,} tokens of one micro-batch; {MOST_TOKENS:,} are possible"
            )
        devices = device_list(self.devices)
        lora = self.lora if self.lora is not None else LoRA()
        if self.method == "full" and self.lora is not None:
            raise InvalidError('lora is given, but method="full" trains every weight; drop one')
        if self.method == "full":
            adapter: dict[str, Any] = {"lora_r": 0, "lora_alpha": 0, "lora_dropout": 0}
            adapter |= {"lora_targets": [], "lora_init": ""}
        else:
            adapter = lora.resolve(model)
        return {
            "method": self.method,
            "dtype": self._dtype(devices),
            "quant": self.quant or "none",
            **adapter,
            "max_steps": self._max_steps(),
            "num_train_epochs": number(
                "num_train_epochs", _pick(epochs, None, 1.0), 0, 1e9, above=True
            ),
            "learning_rate": number("learning_rate", self.learning_rate, 0, 1e3),
            "lr_scheduler_type": self.lr_scheduler_type,
            "lr_scheduler_kwargs": scheduler_kwargs(self.lr_scheduler_kwargs),
            **self._warmup(),
            **self._optimizer(),
            "weight_decay": number("weight_decay", self.weight_decay, 0, 1e3),
            "adam_beta1": number("adam_beta1", self.adam_beta1, 0, 1, below=True),
            "adam_beta2": number("adam_beta2", self.adam_beta2, 0, 1, below=True),
            "adam_epsilon": number("adam_epsilon", self.adam_epsilon, 0, 1, above=True),
            "max_grad_norm": number("max_grad_norm", _pick(self.max_grad_norm, 0.0), 0, 1e9),
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": whole(
                "gradient_accumulation_steps", self.gradient_accumulation_steps, 1, 65536
            ),
            "max_length": max_length,
            "packing": truth("packing", self.packing),
            "shuffle": truth("shuffle", self.shuffle),
            "deterministic": truth("deterministic", self.deterministic),
            "seed": whole("seed", self.seed, 0, 2**53),
            "eval_steps": whole("eval_steps", self.eval_steps or 0, 0, 10**12),
            "save_steps": whole("save_steps", self.save_steps or 0, 0, 10**12),
            **self._evaluation(),
            "group_by_length": truth("group_by_length", self.group_by_length),
            "save_total_limit": whole("save_total_limit", self.save_total_limit or 0, 0, 10**6),
            "memory_limit": self._memory_limit(),
            "restart": choice("restart", self.restart, ("never", "on-failure")),
            "max_restarts": whole("max_restarts", self.max_restarts, 0, 10**6),
            "hang_timeout": number("hang_timeout", self.hang_timeout, 0, 1e6),
            "threads": whole("threads", self.threads or 0, 0, 4096),
            "generate_length": whole("generate_length", room, 0, 1 << 20),
            "devices": devices,
        }

    def data_options(self, held_out: bool) -> dict[str, Any]:
        """Check what concerns the data and give those of run.json's ``data`` that are not default.

        Parameters
        ----------
        held_out
            Whether there is eval_data already.

        Raises
        ------
        InvalidError
            One is out of its range, or there are two held-out sets.
        """
        found: dict[str, Any] = {}
        if self.eval_split is not None:
            if held_out:
                raise InvalidError("eval_data and eval_split are both given; drop one")
            if isinstance(self.eval_split, int):
                found["eval_split"] = whole("eval_split", self.eval_split, 1, 10**12)
            else:
                found["eval_split"] = number(
                    "eval_split", self.eval_split, 0, 1, above=True, below=True
                )
        if self.overlong is not None:
            choice("overlong", self.overlong, OVERLONG)
            found["overlong"] = self.overlong
        if self.chat_template is not None:
            found["chat_template"] = _template_text(self.chat_template)
        if self.chat_template_kwargs is not None:
            found["chat_template_kwargs"] = _json_object(
                "chat_template_kwargs", self.chat_template_kwargs
            )
        return found

    def _max_steps(self) -> int:
        if self.max_steps is None:
            return 0
        if self.max_steps == -1:  # what TrainingArguments have for None
            raise InvalidError("max_steps is -1; None leaves it to num_train_epochs")
        return whole("max_steps", self.max_steps, 1, 10**12)

    def _memory_limit(self) -> int:
        limit = memory(self.memory_limit)
        if 0 < limit < LEAST_MEMORY:
            raise InvalidError(
                f"memory_limit: {self.memory_limit!r} is {limit:,} bytes, in which nothing runs; "
                f'with its unit it looks like "{limit if limit < 10_000 else 8}GiB"'
            )
        return limit

    def _warmup(self) -> dict[str, Any]:
        steps = number("warmup_steps", self.warmup_steps, 0, 1e12)
        ratio = number("warmup_ratio", self.warmup_ratio, 0, 1, below=True)
        if 0 < steps < 1:
            steps, ratio = 0, steps
        return {"warmup_steps": whole("warmup_steps", steps, 0, 10**12), "warmup_ratio": ratio}

    def _optimizer(self) -> dict[str, Any]:
        optim = OPTIMIZERS[choice("optim", self.optim, tuple(OPTIMIZERS))]
        args = optimizer_args(self.optim_args)
        if args and optim != "sgd":
            raise InvalidError(f"optim_args are of optim='sgd', and optim is {self.optim!r}")
        return {"optim": optim, "optim_args": args}

    def _evaluation(self) -> dict[str, Any]:
        for name, every in (("eval", self.eval_steps), ("save", self.save_steps)):
            strategy = getattr(self, f"{name}_strategy")
            if strategy is None:
                continue
            known = ("no", "steps", "epoch", "best") if name == "save" else ("no", "steps", "epoch")
            choice(f"{name}_strategy", strategy, known)
            if strategy == "steps" and not every:
                raise InvalidError(f'{name}_strategy="steps" needs {name}_steps')
            if strategy != "steps" and every:
                raise InvalidError(f"{name}_steps is given, but {name}_strategy is {strategy!r}")
        if self.metric_for_best_model not in (None, "eval_loss", "loss"):
            raise InvalidError(
                f"metric_for_best_model is {self.metric_for_best_model!r}; "
                'there is "eval_loss", and the least is the best'
            )
        return {
            "eval_strategy": self.eval_strategy or ("steps" if self.eval_steps else "no"),
            "save_strategy": self.save_strategy or ("steps" if self.save_steps else "no"),
            "load_best_model_at_end": truth("load_best_model_at_end", self.load_best_model_at_end),
            "early_stopping_patience": 0
            if self.early_stopping_patience is None
            else whole("early_stopping_patience", self.early_stopping_patience, 1, 10**9),
            "early_stopping_threshold": number(
                "early_stopping_threshold", self.early_stopping_threshold, 0, 1e300
            ),
        }

    def _dtype(self, devices: list[str]) -> str:
        wanted = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(
            self.dtype, self.dtype
        )
        if devices[0] == "cpu":
            if wanted in ("bfloat16", "float16"):
                raise NotInThisVersion(f'not in this version: dtype="{wanted}" on the CPU')
            return "float32"
        self._refuse_fp8(devices)
        without = [name for name in devices if "bfloat16" not in gpu_dtypes(name)]
        if wanted == "auto":
            return "float16" if without else "bfloat16"
        if wanted == "bfloat16" and without:
            raise InvalidError(
                f'dtype="bfloat16": {without[0]} does not compute in it, which needs compute '
                'capability 8.0; "float16" is what "auto" chooses there'
            )
        return wanted

    def _refuse_fp8(self, devices: list[str]) -> None:
        """Refuse 8 bits on GPUs that do not multiply them: here, so that a plan says it, too."""
        for name in devices if self.quant == "fp8" else ():
            if "float8" not in gpu_dtypes(name):
                raise InvalidError(
                    f'quant="fp8": {name} does not multiply 8-bit numbers, which needs compute '
                    'capability 8.9; "nf4" takes less memory still'
                )

    def _refuse_what_is_not_built(self) -> None:
        if self.method == "qlora":
            raise InvalidError('method is \'qlora\'; give method="lora" and quant="nf4"')
        choice("method", self.method, ("lora", "full"))
        if self.quant in ("4bit", "8bit", "int4", "int8"):
            raise InvalidError(
                f'quant must be one of nf4, fp8, it is {self.quant!r}; "nf4" has 4 bits, "fp8" 8'
            )
        if self.quant is not None:
            choice("quant", self.quant, ("nf4", "fp8"))
            if self.method == "full":
                bits = 4 if self.quant == "nf4" else 8
                raise InvalidError(
                    f'quant="{self.quant}" needs method="lora": weights of {bits} bits cannot be '
                    "trained"
                )
        choice("dtype", self.dtype, DTYPES)
        if self.save_to is not None:
            raise NotInThisVersion(
                "not in this version: save_to; set PANTHERAML_RUNS to a folder that stays"
            )
        if self.lora is not None and not isinstance(self.lora, LoRA):
            hint = "give lora=pantheraml.LoRA(r=…)"
            if isinstance(self.lora, Mapping):
                hint = "give lora=pantheraml.LoRA(**…) with it"
            raise InvalidError(f"lora must be a pantheraml.LoRA, it is {self.lora!r}; {hint}")


def scheduler_kwargs(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check that a schedule's keywords are names with numbers, words or truth values.

    Raises
    ------
    InvalidError
        They are not; the message names the first.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InvalidError(f"lr_scheduler_kwargs must be a dict, it is {given!r}")
    # Greedy's word for printing each change: every rate is in the run's history. None is what
    # transformers has for a keyword that is not given.
    given = {
        name: value for name, value in given.items() if name != "verbose" and value is not None
    }
    for name, value in given.items():
        finite = isinstance(value, int | float) and abs(value) <= sys.float_info.max
        if not isinstance(name, str) or not (finite or isinstance(value, str)):
            raise InvalidError(
                f"lr_scheduler_kwargs: {name!r} must be a finite number or a word, it is {value!r}"
            )
    return dict(given)


def optimizer_args(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Make ``{"momentum": 0.9}`` of that, or of Trainer's ``"momentum=0.9,nesterov=true"``.

    Raises
    ------
    InvalidError
        A value is no number, or the optimizer has no such argument.
    """
    if isinstance(given, str):
        pairs = [pair.partition("=") for pair in given.replace(" ", "").split(",") if pair]
        given = {name: value for name, _, value in pairs}
    if given is not None and not isinstance(given, Mapping):
        raise InvalidError(f"optim_args must be a dict or a text, it is {given!r}")
    result: dict[str, Any] = {}
    for name, value in (given or {}).items():
        choice("optim_args", name, ("momentum", "dampening", "nesterov"))
        if name == "nesterov" and isinstance(value, str):
            words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            value = words.get(value.lower(), value)
        elif isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise InvalidError(f"optim_args: {name} must be a number") from None
        if name == "nesterov":
            result[name] = truth("optim_args: nesterov", value)
        else:
            result[name] = number(f"optim_args: {name}", value, 0, 1, below=True)
    return result


def _template_text(value: str | os.PathLike[str]) -> str:
    if not isinstance(value, str | os.PathLike):
        raise InvalidError(f"chat_template must be a file or a template's text, it is {value!r}")
    text = os.fspath(value)
    if not text.strip():
        raise InvalidError("chat_template is empty; None takes the model's own")
    if "{{" in text or "{%" in text:
        return text
    path = path_of(text)
    if not path.is_file():
        raise NotFoundError(f"chat_template: there is no file {path}")
    return path.read_text(encoding="utf-8")


def _json_object(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InvalidError(f"{name} must be a dict with names as keys, it is {value!r}")
    try:
        return dict(json.loads(json.dumps(dict(value))))
    except (TypeError, ValueError) as error:
        raise InvalidError(f"{name} cannot be stored: {error}") from None


def _pick(*values: Any) -> Any:
    """Give the first that is not None."""
    return next((value for value in values if value is not None), None)
