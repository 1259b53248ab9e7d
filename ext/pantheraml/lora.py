"""LoRA: which parts of a model an adapter sits on, as PEFT's LoraConfig says it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pantheraml import _native
from pantheraml.checks import choice, names_checked, number, path_of, truth, whole
from pantheraml.errors import InvalidError, NotFoundError, NotInThisVersion

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: What may be trained whole beside the matrices, by the path of its module.
SAVED = {
    "embed_tokens": "model.embed_tokens",
    "lm_head": "lm_head",
    "norm": "model.norm",
    "input_layernorm": "model.layers.{}.input_layernorm",
    "post_attention_layernorm": "model.layers.{}.post_attention_layernorm",
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
}

#: Layer, projection, rank, alpha.
Module = tuple[int, str, int, float]
#: What a projection's path may end in, and its number.
Patterns = list[tuple[re.Pattern[str], float]]


@dataclass(frozen=True)
class Model:
    """What an adapter needs to know of its model."""

    folder: Path
    layers: int
    qk_norm: bool

    def path(self, layer: int, target: str) -> str:
        """Give the path of a projection, as PEFT matches it."""
        room = "self_attn" if target in TARGETS[:4] else "mlp"
        return f"model.layers.{layer}.{room}.{target}"


@dataclass(frozen=True)
class LoRA:
    r"""A low-rank adapter, as PEFT's LoraConfig.

    Parameters
    ----------
    r
        Rank. Default 16, or the adapter's that `init` names.
    lora_alpha
        Scale times rank: the adapter's output is multiplied by ``lora_alpha / r``. Default 16.
    lora_dropout
        Dropout of the adapter's input while training. A token's mask is a function of the seed, the
        step and where it stands in the data: packing, accumulation and the number of workers do
        not change it.
    target_modules
        ``"all-linear"``; names out of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj,
        down_proj, or paths such as ``layers.3.mlp.up_proj``; or a regular expression that matches
        whole paths, such as ``r".*layers\.[0-7]\..*(q|v)_proj"``.
    use_rslora
        Multiply by ``lora_alpha / sqrt(r)`` instead.
    layers_to_transform
        Only in these layers, from 0.
    exclude_modules
        Not in these, by name, path or regular expression.
    rank_pattern, alpha_pattern
        Other ranks and alphas: numbers by regular expressions that match a path's end.
    modules_to_save
        Parts that are trained whole and kept with the adapter: ``embed_tokens``, ``lm_head``, and
        norms, matched as PEFT does, by the end of their paths (``"norm"`` is every norm).
        ``q_norm`` and ``k_norm`` go together.
    init
        Folder of a PEFT adapter to start from; what is not given is taken from it.
    """

    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    target_modules: str | Sequence[str] | None = None
    use_rslora: bool | None = None
    layers_to_transform: int | Sequence[int] | None = None
    exclude_modules: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    modules_to_save: str | Sequence[str] | None = None
    init: str | os.PathLike[str] | None = None

    def resolve(self, model: Model | None = None) -> dict[str, Any]:
        """Give run.json's fields ``lora_*``.

        Parameters
        ----------
        model
            What the adapter is made for. None: only what can be said without one is checked, and
            a model of one layer is taken.
        """
        if self.init is not None:
            return self._from_folder(self._init_folder(), model)
        known = model if model is not None else Model(Path(), 1, True)
        made = self._modules(known, checked=model is not None)
        return self._fields(made, known, self._saved(known), _pick(self.r, 16), self._alpha(16))

    # ---- what it sits on -------------------------------------------------------------------

    def _modules(self, model: Model, checked: bool) -> list[Module]:
        rank = whole("LoRA(r)", _pick(self.r, 16), 1, 4096)
        alpha = self._alpha(16)
        ranks = _pattern("rank_pattern", self.rank_pattern)
        alphas = _pattern("alpha_pattern", self.alpha_pattern)
        layers = _layers(self.layers_to_transform, model.layers) if checked else None
        wanted = _matcher("target_modules", _pick(self.target_modules, "all-linear"))
        unwanted = _matcher("exclude_modules", self.exclude_modules or ())
        made: list[Module] = []
        for layer in range(model.layers):
            for target in TARGETS:
                path = model.path(layer, target)
                if not wanted(path) or unwanted(path):
                    continue
                if layers is not None and layer not in layers:
                    continue
                r = whole("LoRA(rank_pattern)", _by_pattern(ranks, path, rank), 1, 4096)
                a = number("LoRA(alpha_pattern)", _by_pattern(alphas, path, alpha), 0, 1e6)
                made.append((layer, target, r, a))
        if checked:
            self._check_met(model, made, {"rank_pattern": ranks, "alpha_pattern": alphas})
        return made

    def _check_met(self, model: Model, made: list[Module], patterns: dict[str, Patterns]) -> None:
        """Refuse targets of which this model has none, and patterns that mean nothing."""
        if not made:
            text = isinstance(self.target_modules, str)
            raise InvalidError(
                "LoRA(target_modules): no projection of this model is one of them"
                + " and not of exclude_modules" * bool(self.exclude_modules)
                + f"; a pattern matches a whole path, such as {model.path(0, 'q_proj')}" * text
            )
        for name, pairs in patterns.items():
            for key, (pattern, _) in zip(getattr(self, name) or (), pairs, strict=True):
                if not any(pattern.match(model.path(layer, t)) for layer, t, *_ in made):
                    raise InvalidError(f"LoRA({name}): no projection of the adapter is {key!r}")

    def _alpha(self, default: float) -> float:
        return number("LoRA(lora_alpha)", _pick(self.lora_alpha, default), 0, 1e6, above=True)

    def _saved(self, model: Model) -> list[str]:
        """Give the names of ``modules_to_save`` by PEFT's rule: a path's end."""
        found: set[str] = set()
        given = self.modules_to_save or ()
        if not isinstance(given, str | Iterable):
            raise InvalidError(f"LoRA(modules_to_save) must be names, it is {given!r}")
        for entry in [given] if isinstance(given, str) else given:
            matched = _saved_by(str(entry))
            if not model.qk_norm:
                matched -= {"q_norm", "k_norm"}
            if not matched:
                _refuse_one_layers_norm(str(entry))
                choice("LoRA(modules_to_save)", entry, tuple(SAVED))
                raise InvalidError(f"LoRA(modules_to_save): this model has no {entry}")
            found |= matched
        return [name for name in SAVED if name in found]

    # ---- an adapter that is there ----------------------------------------------------------

    def _init_folder(self) -> Path:
        if not isinstance(self.init, str | os.PathLike):
            raise InvalidError(f"LoRA(init) must be a folder, it is {self.init!r}")
        return path_of(self.init).absolute()

    def _from_folder(self, folder: Path, model: Model | None) -> dict[str, Any]:
        if not os.path.isfile(folder / "adapter_config.json"):  # False of what no path can be, too
            raise NotFoundError(f"LoRA(init): {folder} has no adapter_config.json")
        given = [
            name
            for name in ("layers_to_transform", "exclude_modules", "rank_pattern", "alpha_pattern")
            if getattr(self, name) is not None
        ]
        if given:
            raise InvalidError(f"LoRA({given[0]}) is the adapter's in {folder}; leave it out")
        if model is None:
            return self._fields([], Model(folder, 1, True), [], 1, 1.0) | {"lora_targets": []}
        start = _native.read_adapter(folder, model.folder)
        made: list[Module] = start["modules"]
        theirs: dict[str, Any] = {name: start[name] for name in ("r", "lora_alpha", "use_rslora")}
        theirs["modules_to_save"] = start["modules_to_save"]
        theirs["target_modules"] = [t for t in TARGETS if any(m[1] == t for m in made)]
        for name, value in theirs.items():
            mine = getattr(self, name)
            if name == "target_modules" and mine is not None:
                wanted = _matcher(name, mine)
                mine = [t for t in TARGETS if wanted(model.path(0, t))]
            elif name == "modules_to_save" and mine is not None:
                mine = self._saved(model)
            if mine is not None and mine != value:
                raise InvalidError(
                    f"LoRA({name}={getattr(self, name)!r}) does not fit the adapter in "
                    f"{self.init}, which has {value!r}; leave {name} out"
                )
        dropout = _pick(self.lora_dropout, start["lora_dropout"])
        fields = self._fields(
            made, model, theirs["modules_to_save"], start["r"], start["lora_alpha"]
        )
        return fields | {
            "lora_dropout": number("LoRA(lora_dropout)", dropout, 0, 1, below=True),
            "lora_use_rslora": theirs["use_rslora"],
            "lora_init": str(folder),
        }

    # ---- run.json --------------------------------------------------------------------------

    def _fields(
        self, made: Sequence[Module], model: Model, saved: list[str], r: int, alpha: float
    ) -> dict[str, Any]:
        dropout = _pick(self.lora_dropout, 0.0)
        targets = [t for t in TARGETS if any(module[1] == t for module in made)]
        same = all(module[2:] == (r, alpha) for module in made)
        everywhere = len(made) == len(targets) * model.layers
        return {
            "lora_r": r,
            "lora_alpha": alpha,
            "lora_dropout": number("LoRA(lora_dropout)", dropout, 0, 1, below=True),
            "lora_use_rslora": truth("LoRA(use_rslora)", _pick(self.use_rslora, False)),
            "lora_targets": targets,
            "lora_groups": [] if same and everywhere else _groups(made),
            "lora_modules_to_save": saved,
            "lora_init": "",
        }


def _saved_by(end: str) -> set[str]:
    """Names out of SAVED whose path has that end, in every layer."""
    return {name for name, path in SAVED.items() if end and path.endswith(end)}


def _refuse_one_layers_norm(entry: str) -> None:
    """PEFT would train that one; what a run has of a name is trained in every layer.

    Raises
    ------
    NotInThisVersion
        It is one layer's.
    """
    of_each = re.sub(r"(^|\.)\d+\.", r"\1{}.", entry)
    for name in sorted(_saved_by(of_each)) if of_each != entry else ():
        raise NotInThisVersion(
            f"not in this version: LoRA(modules_to_save) with a norm of one layer, {entry!r}; "
            f"{name!r} is that of every layer"
        )


LoRA.__init__ = names_checked(LoRA.__init__)  # type: ignore[method-assign]


def _groups(made: Sequence[Module]) -> list[dict[str, Any]]:
    """Projections of one rank and alpha that lie in the same layers, together."""
    layers: dict[tuple[int, float, str], list[int]] = {}
    for layer, target, r, alpha in made:
        layers.setdefault((r, alpha, target), []).append(layer)
    groups: dict[tuple[int, float, tuple[int, ...]], list[str]] = {}
    for (r, alpha, target), where in layers.items():
        groups.setdefault((r, alpha, tuple(where)), []).append(target)
    if len(groups) > 64:
        raise InvalidError(f"LoRA: {len(groups)} different groups of projections; 64 are possible")
    return [
        {"r": r, "lora_alpha": alpha, "target_modules": targets, "layers": list(where)}
        for (r, alpha, where), targets in groups.items()
    ]


class _Matcher:
    """Whether a path is meant, by PEFT's rules."""

    def __init__(self, what: str, value: object) -> None:
        self._pattern: re.Pattern[str] | None = None
        self._names: list[str] = []
        if isinstance(value, str) and value.lower() == "all-linear":  # as PEFT reads it
            value = "all-linear"
        if value == "all-linear" or value == ["all-linear"]:
            self._names = list(TARGETS)
        elif isinstance(value, str) and value in TARGETS:
            self._names = [value]
        elif isinstance(value, str):
            try:
                self._pattern = re.compile(value)
            except re.error as error:
                hint = f"; any path is '.*', so: {'.' + value!r}" if value[:1] == "*" else ""
                raise InvalidError(
                    f"LoRA({what}): {value!r} is no regular expression: {error}{hint}"
                ) from None
            if what == "target_modules" and value.replace("_", "").isalnum():
                choice(f"LoRA({what})", value, ("all-linear", *TARGETS))
        elif isinstance(value, Iterable):
            self._names = [str(name) for name in value]
            for name in self._names:
                if name in ("embed_tokens", "lm_head"):
                    raise InvalidError(
                        f"LoRA({what}): an adapter does not sit on {name}; "
                        f"modules_to_save=[{name!r}] trains it whole"
                    )
                if name.rpartition(".")[2] not in TARGETS:
                    choice(f"LoRA({what})", name, TARGETS)
            if not self._names and what == "target_modules":
                raise InvalidError(f"LoRA({what}) is empty")
        else:
            raise InvalidError(f"LoRA({what}) must be names, it is {value!r}")

    def __call__(self, path: str) -> bool:
        if self._pattern is not None:
            return self._pattern.fullmatch(path) is not None
        return any(path == name or path.endswith(f".{name}") for name in self._names)


def _matcher(what: str, value: object) -> _Matcher:
    return _Matcher(what, value)


def _layers(value: int | Sequence[int] | None, count: int) -> set[int] | None:
    if value is None:
        return None
    numbers = [value] if not isinstance(value, Iterable) or isinstance(value, str) else list(value)
    if not numbers:
        return None
    return {whole("LoRA(layers_to_transform)", n, 0, count - 1) for n in numbers}


def _pattern(what: str, given: Mapping[str, float] | None) -> Patterns:
    made = []
    if given is not None and not isinstance(given, Mapping):
        raise InvalidError(f"LoRA({what}) must be a dict, it is {given!r}")
    for key, value in (given or {}).items():
        try:
            made.append((re.compile(rf"(.*\.)?({key})$"), value))
        except re.error as error:
            raise InvalidError(f"LoRA({what}): {key!r} is no pattern: {error}") from None
    return made


def _by_pattern(patterns: Patterns, path: str, otherwise: float) -> float:
    return next((value for key, value in patterns if key.match(path)), otherwise)


def _pick(*values: Any) -> Any:
    """Give the first that is not None."""
    return next((value for value in values if value is not None), None)
