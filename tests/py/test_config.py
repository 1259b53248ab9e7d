"""Parameters: names, ranges, and what they resolve to."""

from __future__ import annotations

import ast
import dataclasses
import errno
import importlib
import json
import math
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pantheraml as pm
import pytest
from pantheraml import _native, api, autopsy, folders, hub, sharing
from pantheraml.checks import ELSEWHERE, memory, path_of
from pantheraml.config import Settings
from pantheraml.data import handover
from pantheraml.devices import device_list
from pantheraml.lora import Model

POSITIONS = 4096


def test_defaults_are_what_the_documentation_says() -> None:
    made = Settings().resolve(POSITIONS)
    assert made["method"] == "lora" and made["lora_r"] == 16 and made["lora_alpha"] == 16
    assert made["learning_rate"] == 2e-4 and made["lr_scheduler_type"] == "cosine"
    assert made["max_steps"] == 0 and made["num_train_epochs"] == 1.0
    assert made["devices"] == ["cpu"] and made["max_length"] == 2048
    assert len(made["lora_targets"]) == 7


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("adamw_torch", "adamw"),
        ("adamw_bnb_8bit", "adamw_8bit"),
        ("adamw_8bit", "adamw_8bit"),
        ("adamw_auto", "adamw_auto"),
    ],
)
def test_optimizers_have_transformers_names(given: str, made: str) -> None:
    assert Settings(optim=given).resolve(POSITIONS)["optim"] == made


def test_no_norm_is_no_limit() -> None:
    assert Settings(max_grad_norm=None).resolve(POSITIONS)["max_grad_norm"] == 0


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("learning_rat", "learning_rate"),
        ("max_step", "max_steps"),
        ("batch_size", "per_device_train_batch_size"),
        ("evaldata", "eval_data"),
    ],
)
def test_unknown_parameter_suggests(name: str, near: str, runs: Path, model: Path) -> None:
    with pytest.raises(TypeError, match=rf"'{name}' is not a parameter; did you mean {near}\?"):
        pm.finetune(model, [{"text": "a"}], **{name: 1})
    assert not runs.exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_steps": 0}, "max_steps must be from 1"),
        ({"max_steps": 1.5}, "max_steps must be a whole number"),
        ({"max_steps": True}, "max_steps must be a whole number"),
        ({"learning_rate": -1}, "learning_rate must be at least 0"),
        ({"learning_rate": math.nan}, "learning_rate must be"),
        ({"learning_rate": "1e-4"}, "learning_rate must be a number"),
        ({"lr_scheduler_type": "cosin"}, "did you mean 'cosine'"),
        ({"method": "lorra"}, "method must be one of lora, full"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be from 1"),
        ({"packing": 1}, "packing must be True or False"),
        ({"adam_beta2": 1.0}, "adam_beta2 must be at least 0 and below 1"),
        ({"num_train_epochs": 0}, "num_train_epochs must be above 0"),
        ({"devices": []}, "devices is empty"),
        ({"devices": 0}, "devices must be from 1"),
        ({"devices": "gpu"}, "'gpu' is no device"),
        ({"devices": None}, "devices must be"),
        ({"devices": 5.5}, "devices must be"),
        ({"lr_scheduler_kwargs": 3}, "lr_scheduler_kwargs must be a dict"),
        ({"lr_scheduler_kwargs": {"min_lr": math.nan}}, "'min_lr' must be a finite number"),
        ({"memory_limit": "8 apples"}, "memory_limit must look like"),
        ({"method": "full", "lora": pm.LoRA()}, "trains every weight"),
        ({"optim": "lion"}, "optim must be one of"),
        ({"optim_args": "momentum=0.9"}, "optim_args are of optim='sgd'"),
        ({"optim": "sgd", "optim_args": {"momentun": 0.9}}, "did you mean 'momentum'"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "momentum must be a number"),
        ({"optim": "sgd", "optim_args": "nesterov=maybe"}, "nesterov must be True or False"),
        ({"early_stopping_patience": 0}, "early_stopping_patience must be from 1"),
        ({"eval_strategy": "steps"}, "needs eval_steps"),
        ({"eval_strategy": "epoch", "eval_steps": 5}, "eval_strategy is 'epoch'"),
        ({"save_strategy": "steps"}, "needs save_steps"),
        ({"metric_for_best_model": "accuracy"}, 'there is "eval_loss"'),
        ({"warmup_ratio": 1.0}, "warmup_ratio must be"),
        ({"lora": {"r": 8}}, "lora must be a pantheraml.LoRA"),
        ({"lora": pm.LoRA(r=0)}, r"LoRA\(r\) must be from 1"),
        ({"lora": pm.LoRA(lora_dropout=1.0)}, r"LoRA\(lora_dropout\) must be"),
        ({"lora": pm.LoRA(target_modules=["q_prj"])}, "did you mean 'q_proj'"),
        ({"lora": pm.LoRA(target_modules=[])}, "target_modules"),
    ],
)
def test_wrong_values_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(pm.InvalidError, match=words):
        Settings.of(settings).resolve(POSITIONS)


#: What a cell may hold by mistake; a whole number beyond all floats is among it.
NONSENSE = (5, -1, True, 1.5, math.nan, math.inf, 10**400, 2**63, "", "x", "(", "9" * 400 + "GB",
            b"x", [], [None], {}, {1: 2}, {"a": None}, {"x": 10**400}, object(), {"a"}, range(3),
            )  # fmt: skip


@pytest.mark.parametrize("kind", [Settings, pm.LoRA])
def test_nonsense_is_answered(kind: type[Settings] | type[pm.LoRA], tmp_path: Path) -> None:
    """Whatever a setting is given, it is taken or refused by its name, by nothing of Python's."""
    refused = 0
    for field in dataclasses.fields(kind):
        for value in NONSENSE:
            try:
                made = kind(**{field.name: value})
                made.resolve(POSITIONS) if isinstance(made, Settings) else made.resolve()
            except pm.Error as why:
                assert field.name in str(why) or field.name in ("devices", "init", "lora"), str(why)
                refused += 1
            except Exception as why:
                pytest.fail(f"{field.name}={value!r}: {type(why).__name__} {why}")
    assert refused > 10 * len(dataclasses.fields(kind)) // 2


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bfloat16"},
        {"devices": "tpu"},
        {"dtype": "float16"},
        {"save_to": "/drive"},
    ],
)
def test_not_in_this_version(settings: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match="not in this version"):
        Settings.of(settings).resolve(POSITIONS)


def test_devices_and_memory() -> None:
    assert device_list("auto") == device_list("cpu") == device_list(1) == ["cpu"]
    assert device_list(2) == device_list(["cpu"] * 2) == ["cpu", "cpu"]
    assert device_list("cuda") == ["cuda:0"] and device_list(["cuda:1", "cuda"])[0] == "cuda:1"
    with pytest.raises(pm.InvalidError, match="one kind"):
        device_list(["cpu", "cuda"])
    assert memory("8GiB") == 8 << 30 and memory("1.5 GB") == 1_500_000_000
    assert memory(123) == 123 and memory(None) == 0
    for wrong in ("8i", "8iB", "1e3", "nan", "-1", "0", "..", "9" * 400, ""):
        with pytest.raises(pm.InvalidError, match="memory_limit must"):
            memory(wrong)


def test_a_home_that_nobody_has_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is named by a path: it is said by its name, not by Python's error for it."""
    asked: list[Callable[[str], object]] = [
        pm.attach, pm.plan, sharing.parse, autopsy.find, hub.resolve, path_of,
        handover.look_at, lambda path: pm.LoRA(init=path).resolve(None),
    ]  # fmt: skip
    for ask in asked:
        with pytest.raises(pm.InvalidError, match="'~nobody here/x': nobody .* has a home here"):
            ask("~nobody here/x")
    monkeypatch.setenv("PANTHERAML_RUNS", "~nobody here/x")
    with pytest.raises(pm.InvalidError, match="has a home here"):
        folders.runs_folder()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/x") == tmp_path / "x" and path_of("x~") == Path("x~")


def test_lengths_may_go_beyond_the_models_positions() -> None:
    made = Settings(max_length=2048, generate_length=9999).resolve(128)
    assert made["max_length"] == 2048 and made["generate_length"] == 9999
    assert Settings(max_length=64).resolve(128)["generate_length"] == 128
    # Not given, it does not go beyond them.
    assert Settings().resolve(128)["max_length"] == 128
    assert Settings().resolve(1 << 17)["max_length"] == 2048
    assert Settings(max_length=64).resolve(4096)["generate_length"] == 512
    assert Settings(max_length=200).resolve(128)["generate_length"] == 200


FIXTURES = Path(__file__).parent.parent / "parity" / "fixtures"


def model_of(case: str) -> Model:
    config = json.loads((FIXTURES / case / "model" / "config.json").read_text())
    qk_norm = config["model_type"] == "qwen3"
    return Model(FIXTURES / case / "model", config["num_hidden_layers"], qk_norm)


def test_adapter_to_start_from(tmp_path: Path) -> None:
    model = model_of("qwen2-tied-lora")
    folder = tmp_path / "adapter"
    shutil.copytree(FIXTURES / "qwen2-tied-lora" / "adapter", folder)
    made = pm.LoRA(init=folder).resolve(model)
    assert (made["lora_r"], made["lora_alpha"], made["lora_groups"]) == (4, 8, [])
    assert made["lora_targets"] == ["q_proj", "v_proj", "down_proj"]
    assert made["lora_init"] == str(folder)
    with pytest.raises(pm.InvalidError, match=r"LoRA\(r=16\) does not fit"):
        pm.LoRA(r=16, init=folder).resolve(model)
    with pytest.raises(pm.InvalidError, match="rank_pattern"):
        pm.LoRA(rank_pattern={"q_proj": 2}, init=folder).resolve(model)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(pm.NotInThisVersion, match="use_dora = true"):
        pm.LoRA(init=folder).resolve(model)
    path.write_text("{}")
    with pytest.raises(pm.InvalidError, match="peft_type"):
        pm.LoRA(init=folder).resolve(model)
    with pytest.raises(pm.NotFoundError, match="adapter_config"):
        pm.LoRA(init=tmp_path / "none").resolve()


def test_an_adapter_that_is_not_the_same_everywhere() -> None:
    made = pm.LoRA(init=FIXTURES / "qwen3-mixed-lora" / "adapter").resolve(
        model_of("qwen3-mixed-lora")
    )
    assert made["lora_use_rslora"] is True
    assert made["lora_modules_to_save"] == [
        "lm_head", "norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm",
    ]  # fmt: skip
    assert {"r": 7, "lora_alpha": 8.0, "target_modules": ["gate_proj"], "layers": [2]} in made[
        "lora_groups"
    ]
    assert {"r": 2, "lora_alpha": 8.0, "target_modules": ["q_proj"], "layers": [0, 2]} in made[
        "lora_groups"
    ]
    # The same, said in words.
    said = pm.LoRA(
        r=4, lora_alpha=8, use_rslora=True, layers_to_transform=[0, 2],
        target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"],
        rank_pattern={"q_proj": 2, r"layers\.2\.mlp.gate_proj": 7},
        alpha_pattern={"v_proj": 3, "down_proj": 20}, modules_to_save=["lm_head", "norm"],
    )  # fmt: skip
    again = said.resolve(model_of("qwen3-mixed-lora"))
    assert again | {"lora_init": made["lora_init"]} == made


@pytest.mark.parametrize(
    ("lora", "paths"),
    [
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": r".*layers\.1\..*(q|v)_proj"}, 2),
        ({"target_modules": ["up_proj", "layers.0.self_attn.q_proj"]}, 3),
        ({"target_modules": "all-linear", "exclude_modules": ["o_proj", "k_proj"]}, 10),
        ({"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}, 8),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, 1),
        ({"target_modules": "All-Linear", "layers_to_transform": range(1)}, 7),
    ],
)
def test_projections_are_matched_as_peft_matches_them(lora: dict[str, Any], paths: int) -> None:
    made = pm.LoRA(**lora).resolve(model_of("qwen2-tied-lora"))
    groups = made["lora_groups"] or [{"target_modules": made["lora_targets"], "layers": [0, 1]}]
    assert sum(len(g["target_modules"]) * len(g["layers"]) for g in groups) == paths


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": r".*layers\.7\..*q_proj"}, "no projection of this model"),
        ({"target_modules": "(q_proj"}, "no regular expression"),
        ({"target_modules": "*.q_proj"}, r"any path is '\.\*', so: '\.\*\.q_proj'"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"target_modules": "q_prj"}, "did you mean 'q_proj'"),
        ({"layers_to_transform": [2]}, "layers_to_transform"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"modules_to_save": ["lm_hed"]}, "did you mean 'lm_head'"),
        ({"modules_to_save": ["q_norm"]}, "this model has no q_norm"),
        ({"target_modules": "(q|v)_proj"}, "matches a whole path, such as model.layers.0"),
        ({"exclude_modules": "all-linear"}, "and not of exclude_modules"),
        ({"layers_to_transform": -1}, "layers_to_transform.* must be from 0 to 1, it is -1"),
        ({"layers_to_transform": "0-1"}, "must be a whole number, it is '0-1'"),
        ({"rank_pattern": {"z_proj": 4}}, "rank_pattern.*: no projection .* is 'z_proj'"),
        ({"alpha_pattern": [4]}, "alpha_pattern.* must be a dict"),
        ({"modules_to_save": 5}, "modules_to_save.* must be names, it is 5"),
    ],
)
def test_what_an_adapter_cannot_sit_on(lora: dict[str, Any], words: str) -> None:
    with pytest.raises(pm.InvalidError, match=words):
        pm.LoRA(**lora).resolve(model_of("qwen2-tied-lora"))


@pytest.mark.parametrize("entry", ["layers.1.input_layernorm", "0.post_attention_layernorm"])
def test_a_norm_of_one_layer_is_not_taken_for_that_of_all(entry: str) -> None:
    words = f"a norm of one layer, '{entry}'; '{entry.rpartition('.')[2]}' is that of every layer"
    with pytest.raises(pm.NotInThisVersion, match=words):
        pm.LoRA(modules_to_save=[entry]).resolve(model_of("qwen2-tied-lora"))


def test_names(runs: Path) -> None:
    for bad in ("", ".", "..", "a/b", "-a", "a b", "é", "x" * 101):
        with pytest.raises(pm.InvalidError, match="name"):
            folders.check_name(bad)
    made = folders.create("one", "m")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    with pytest.raises(pm.BusyError, match="without a run in it"):
        folders.create("one", "m")
    (made / "run.json").write_text("{}")
    with pytest.raises(pm.BusyError, match="there is a run 'one' already"):
        folders.create("one", "m")
    assert folders.create(None, "Qwen/Qwen2.5-0.5B").name.startswith("qwen2.5-0.5b-")


def test_finding_runs(runs: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no runs in"):
        pm.attach()
    for name in ("alpha", "beta"):
        (folders.create(name, "m") / "run.json").write_text("{}")
    os.utime(runs / "beta" / "run.json", (1.0, 1.0))
    assert folders.find(None) == runs / "alpha"
    assert folders.find("beta") == folders.find(runs / "beta") == runs / "beta"
    with pytest.raises(pm.NotFoundError, match="did you mean 'alpha'"):
        pm.attach("alfa")


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ("none.jsonl", FileNotFoundError, "there is no file"),
        (".", pm.InvalidError, "is not a file"),
        ("rows.csv", pm.InvalidError, "ends in .csv"),
        ("rows.jsonl.gz", pm.InvalidError, "ends in .gz"),
        (3, pm.InvalidError, "must be a file or a list"),
        ({"text": ["a"]}, pm.InvalidError, "not one dict"),
        ([], pm.InvalidError, "no rows"),
        ("https://example.com/rows.jsonl", pm.InvalidError, "is an address; download it"),
        ("owner/rows", pm.NotFoundError, r'load_dataset\("owner/rows"'),
        ([{"text": None}], pm.InvalidError, r"'text' \(null\)"),
    ],
)
def test_bad_sources_leave_no_run(
    data: Any, error: type[Exception], words: str, runs: Path, model: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("rows.csv", "rows.jsonl.gz"):
        (tmp_path / name).write_text("x")
    with pytest.raises(error, match=words):
        pm.finetune(model, data)
    assert pm.runs() == [] and (not runs.exists() or not list(runs.iterdir()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eval_steps": 5}, "need eval_data or eval_split"),
        ({"chat_template": ""}, "chat_template is empty"),
        ({"chat_template": 5}, "chat_template must be a file"),
        ({"model": None}, "model must be a folder or a name"),
        ({"model": ""}, "model must be a folder or a name"),
        ({"model": "config.json"}, "is a file; give the folder"),
        ({"model": "adapter"}, "is an adapter; give the model that it sits on"),
    ],
)
def test_bad_settings_leave_no_run(
    settings: dict[str, Any], words: str, runs: Path, model: Path, tmp_path: Path
) -> None:
    given = {"model": model} | settings
    if given["model"] == "adapter":
        given["model"] = tmp_path / "adapter"
        given["model"].mkdir()
        (given["model"] / "adapter_config.json").write_text("{}")
    if given["model"] == "config.json":
        given["model"] = model / "config.json"
    with pytest.raises(pm.InvalidError, match=words):
        pm.finetune(data=[{"text": "a b c"}], **given)
    assert not runs.exists()


def test_names_of_every_call_are_suggested(model: Path) -> None:
    for call in (
        lambda: pm.LoRA(lora_alfa=8),  # type: ignore[call-arg]
        lambda: pm.preview("x.jsonl", model, max_len=8),  # type: ignore[call-arg]
        lambda: pm.Run.sample(None, "x", temprature=1),  # type: ignore[call-overload]
        lambda: pm.Run.export(None, "x", formt="peft"),  # type: ignore[call-arg,arg-type]
    ):
        with pytest.raises(TypeError, match="is not a parameter; did you mean"):
            call()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bf16", 'dtype="bfloat16"'),
        ("load_in_4bit", 'quant="nf4"'),
        ("gradient_checkpointing", "memory_limit="),
        ("output_dir", "PANTHERAML_RUNS"),
        ("greater_is_better", "the least eval_loss"),
        ("args", "settings are keywords"),
    ],
)
def test_names_of_others_are_known(name: str, words: str, model: Path) -> None:
    with pytest.raises(TypeError, match=f"'{name}' is not a parameter: .*{words}"):
        pm.finetune(model, [{"text": "a"}], **{name: True})


def test_names_of_others_are_none_of_ours() -> None:
    ours = {*Settings.__dataclass_fields__, *pm.LoRA.__dataclass_fields__}
    assert not ours & set(ELSEWHERE)


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS"])
def test_a_full_disk_leaves_no_run(
    code: str, runs: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: bytes) -> None:
        number = getattr(errno, code)
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(folders, "write_private", full)
    with pytest.raises(pm.IOFailed, match="could not be written .* make room"):
        pm.finetune(model, [{"text": "panther"}], name="none", max_length=64)
    assert not (runs / "none").exists()


def test_what_a_schedule_cannot_have_is_named_as_it_was_given(model: Path) -> None:
    with pytest.raises(pm.InvalidError, match='lr_scheduler_kwargs: .* no field "foo"'):
        pm.plan(model, devices="cpu", lr_scheduler_kwargs={"foo": 1})
    greedy = {"smooth": True, "window_size": 3, "verbose": True}
    kept = Settings(lr_scheduler_type="greedy", lr_scheduler_kwargs=greedy).resolve(POSITIONS)
    assert kept["lr_scheduler_kwargs"] == {"smooth": True, "window_size": 3}


def test_the_package_loads_what_is_asked_for() -> None:
    """What prepares data loads no API, and what type checkers read is what is given."""
    child = "import sys, pantheraml.data.prepare as p; print('pantheraml.api' in sys.modules)"
    said = subprocess.run([sys.executable, "-P", "-c", child], capture_output=True, check=True)
    assert said.stdout.split() == [b"False"]
    tree = ast.parse(Path(pm.__file__).read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pantheraml.")
        for alias in node.names
    }
    assert set(typed) == set(pm.__all__) <= set(dir(pm))
    for name, home in typed.items():
        assert getattr(pm, name) is getattr(importlib.import_module(str(home)), name)
    with pytest.raises(AttributeError, match="no attribute 'finetun'"):
        pm.finetun  # noqa: B018
    assert pm.__version__


def test_a_plan_is_refused_the_schedules_that_a_run_is(model: Path) -> None:
    refused: list[tuple[dict[str, object], str]] = [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs one of min_lr and min_lr_rate"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs num_decay_steps"),
        ({"lr_scheduler_kwargs": {"power": 2}}, "cosine has no keyword power"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-9}, "must be below learning_rate"),
    ]
    for settings, why in refused:
        for ask in (pm.plan, pm.program):
            with pytest.raises(pm.InvalidError, match=why):
                ask(model, devices="cpu", **settings)


@pytest.mark.parametrize("place", ["file", "file/inside", "/proc/none", "/sys/kernel"])
def test_runs_that_cannot_be_kept_there(
    place: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("PANTHERAML_RUNS", str(tmp_path / place))
    with pytest.raises(pm.IOFailed, match="cannot hold runs|no run can be made in"):
        pm.finetune(model, [{"text": "a b c"}], name="x")


def test_hub_without_a_network_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("Name or service not known\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConnectionError, match="the hub cannot be reached") as caught:
        hub.resolve("owner/model")
    assert "\n" not in str(caught.value)
    for missing in (tmp_path / "none", "./none", "a/b/c"):
        with pytest.raises(pm.NotFoundError, match="there is no folder"):
            hub.resolve(missing)


def test_the_dtype_is_what_the_gpus_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {0: ["float32", "bfloat16", "float16"], 1: ["float32", "float16"]}
    monkeypatch.setattr(_native, "gpu_dtypes", have.__getitem__)

    def chosen(dtype: str, *devices: str) -> str:
        return Settings(dtype=dtype)._dtype(list(devices))

    assert chosen("auto", "cpu") == "float32"
    assert chosen("auto", "cuda:0") == "bfloat16"
    assert chosen("auto", "cuda:1") == "float16"
    assert chosen("auto", "cuda:0", "cuda:1") == "float16"  # one dtype for all workers
    assert chosen("fp16", "cuda:0") == chosen("float16", "cuda:1") == "float16"
    assert chosen("fp32", "cuda:1") == "float32"
    with pytest.raises(pm.InvalidError, match='cuda:1 does not compute in it.*"float16"'):
        chosen("bfloat16", "cuda:0", "cuda:1")

    have[2] = [*have[0], "float8"]
    assert Settings(quant="fp8")._dtype(["cuda:2"]) == "bfloat16"
    assert Settings(quant="fp8")._dtype(["cpu"]) == "float32"  # the reference
    with pytest.raises(pm.InvalidError, match=r'quant="fp8": cuda:0 does not .*8\.9'):
        Settings(quant="fp8")._dtype(["cuda:2", "cuda:0"])

    def nowhere(index: int) -> list[str]:
        raise pm.NotFoundError("no driver")

    monkeypatch.setattr(_native, "gpu_dtypes", nowhere)
    assert chosen("auto", "cuda:0") == "bfloat16"  # a plan for a GPU elsewhere
    assert Settings(quant="fp8")._dtype(["cuda:0"]) == "bfloat16"


def test_nobody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PANTHERAML_WAIT", "KAGGLE_KERNEL_RUN_TYPE", "PAPERMILL_INPUT_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert not api._nobody_is_there()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert not api._nobody_is_there()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert api._nobody_is_there()
    monkeypatch.setenv("PANTHERAML_WAIT", "0")
    assert not api._nobody_is_there()
