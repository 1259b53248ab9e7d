"""Loss curves in 16 bits and float32, ours and transformers', from one start on the same data.

    python3 tools/bench/curve.py --curve build/gpu/bundle/test_curve [--device cuda] [--steps 200]
                                 [--head-dim 128] [--trials 1] [--first 0]

Two cases on text that is there: a Llama of 24 million parameters trained whole from random weights
on the source of Python's standard library, in bytes; then LoRA (r = 16, all seven projections) on
what came of it, on this repository's documentation. Float32 transformers (no TF32) is the line; the
table has each other curve's distance from it. Transformers in bfloat16 runs three times, with
other kernels of attention: their distances are the spread that bfloat16 itself has. Ours is within
it when its root mean square and its largest distance are at most the largest of theirs; else exit
status 1.
With --trials 12 all of it is done as often, six at a time, from other random weights and adapters
(those from number --first on), the second case on other texts in turn (documentation, the library
from its other end, the engine's C). One trial may be outside by chance: of four curves that are
equally good each is the farthest in one of four. So trials are judged together: by the mean of
squares, over all trials, of root mean squares and of largest distances, each of ours against the
worst of theirs. In how many a curve was farther than all of theirs is told.

With --adamw-8bit the first case is also trained with its moments in 8 bits, by ours, and by
bitsandbytes' AdamW8bit where that can be imported. Their distances stand beside each other; 8 bits
are not judged by the spread.
With --outliers 128 a few channels of what the second case's linear layers read are so much larger,
and the function the same.
With --quant fp8 (or nf4) the second case has one more curve, over frozen weights stored so: what
that costs in loss, not held to the spread.

With --resume the second case is also stopped at half, and gone on with from the checkpoint by
another process: every file of both ends must be the same bytes.

Models and curves are made in a folder of this call's own, in memory where that can be, which is
gone at the end. --folder keeps them: one that is not there yet, or empty.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import multiprocessing
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, get_scheduler
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
FIRST_BYTE = 3  # ids below it are special
OUTLIERS_APART = 97  # channels
AT_A_TIME = 6  # trials
FIRST_SEED = 7  # of the weights of the first trial; its adapter's is one more

#: By a curve's title: root mean square, largest and mean distance from the line.
Distances = dict[str, tuple[float, float, float]]


def text_rows(files: list[Path], rows: int, length: int) -> np.ndarray:
    """Rows of `length` bytes as ids, in the files' order."""
    data = bytearray()
    for file in files:
        data += file.read_bytes()
        if len(data) >= rows * length:
            break
    if len(data) < rows * length:
        data *= -(-rows * length // len(data))
    ids = np.frombuffer(bytes(data[: rows * length]), dtype=np.uint8).astype(np.int32)
    return (ids + FIRST_BYTE).reshape(rows, length)


def write_case(folder: Path, ids: np.ndarray, settings: dict[str, Any]) -> None:
    """Write rows.safetensors and case.json beside the model."""
    offsets = np.arange(len(ids) + 1, dtype=np.int64) * ids.shape[1]
    tensors = {"input_ids": ids.ravel(), "labels": ids.ravel().copy(), "offsets": offsets}
    words = {"format": "pml-shard-1", "max_id": str(int(ids.max())), "source": "curve"}
    save_file(tensors, folder / "rows.safetensors", words)
    (folder / "case.json").write_text(json.dumps(settings))


def load(folder: Path, settings: dict[str, Any], device: str, attention: str) -> torch.nn.Module:
    """Model and adapter as a user of PEFT has them: trained parameters in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation=attention
    )
    if settings["method"] == "lora":
        model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    model.config.use_cache = False
    return model.to(device).train()


def peer(
    folder: Path,
    ids: np.ndarray,
    settings: dict[str, Any],
    device: str,
    narrow: torch.dtype | None,
    attention: str,
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
) -> tuple[torch.nn.Module, list[float]]:
    """Train as the Trainer does; its bf16=True and fp16=True are autocast.

    Frozen weights have that dtype then, and float16 has a GradScaler.
    """
    model = load(folder, settings, device, attention)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if narrow:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(narrow)
    decay = [p for n, p in trained.items() if "norm" not in n]
    rest = [p for n, p in trained.items() if "norm" in n]
    groups = [{"params": decay, "weight_decay": settings["weight_decay"]},
              {"params": rest, "weight_decay": 0.0}]  # fmt: skip
    optimizer = optimizer_class(groups, lr=settings["learning_rate"], betas=(0.9, 0.999), eps=1e-8)
    schedule = get_scheduler(
        settings["lr_scheduler_type"], optimizer, num_warmup_steps=settings["warmup_steps"],
        num_training_steps=settings["max_steps"],
    )  # fmt: skip
    batch, losses = settings["per_device_train_batch_size"], []
    scaler = torch.amp.GradScaler(device, enabled=narrow is torch.float16)
    for step in range(settings["max_steps"]):
        at = step * batch % len(ids)
        rows = torch.tensor(ids[at : at + batch], dtype=torch.long, device=device)
        with torch.autocast(device, narrow) if narrow else nullcontext():
            loss = model(input_ids=rows, labels=rows).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained.values(), settings["max_grad_norm"])
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return model, [float(loss) for loss in losses]


def ours(args: argparse.Namespace, name: str, *more: str) -> dict[str, Any]:
    """Run test_curve; its answer is its last line."""
    command = [args.curve, str(args.folder), name, "--device", args.device, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def folder_in_memory(prefix: str) -> tempfile.TemporaryDirectory[str]:
    """One that is gone at the end, in memory where that can be."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix=prefix, dir=memory if memory.is_dir() else None)


def distance(curve: list[float], line: list[float]) -> tuple[float, float, float]:
    """Root mean square, largest and mean relative distance of a curve from the line."""
    d = (np.array(curve) - np.array(line)) / np.array(line)
    return float(np.sqrt((d**2).mean())), float(np.abs(d).max()), float(d.mean())


def in_8_bits(
    args: argparse.Namespace, ids: np.ndarray, settings: dict[str, Any], curves: dict[str, Any]
) -> None:
    """Add the curves with AdamW's moments in 8 bits, ours and bitsandbytes'."""
    folder = args.folder / "whole8"
    folder.mkdir()
    (folder / "model").symlink_to(args.folder / "whole" / "model")
    write_case(folder, ids, settings | {"optim": "adamw_8bit"})
    if args.device == "cpu":
        curves["8 bits, ours float32"] = ours(args, "whole8")["loss"]
    else:
        curves["8 bits, ours bf16"] = ours(args, "whole8", "--bf16", "--fast")["loss"]
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        print(f"  8 bits by bitsandbytes left out: {error}")
        return
    for narrow in (None, torch.bfloat16):
        title = f"8 bits, bitsandbytes {'bf16' if narrow else 'float32'}"
        curves[title] = peer(
            args.folder / "whole", ids, settings, args.device, narrow, "sdpa", AdamW8bit
        )[1]


def plant_outliers(model: torch.nn.Module, factor: float) -> None:
    """Make a few channels of what linear layers read `factor` times as large, the same function.

    What trained models grow by themselves: a norm's weight, or a row of up_proj, is multiplied, the
    columns that read it are divided. By a power of two no bit of any product changes.
    """
    for layer in model.model.layers:  # type: ignore[union-attr]
        attention, mlp = layer.self_attn, layer.mlp
        readers = (
            (layer.input_layernorm.weight, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm.weight, (mlp.gate_proj, mlp.up_proj)),
            (mlp.up_proj.weight, (mlp.down_proj,)),
        )
        for made, reads in readers:
            made.data[::OUTLIERS_APART] *= factor
            for linear in reads:
                linear.weight.data[:, ::OUTLIERS_APART] /= factor


def make_base(args: argparse.Namespace, model: torch.nn.Module) -> None:
    """Save the float32 line's model, rounded, as the next case's."""
    if args.outliers > 1:
        plant_outliers(model, args.outliers)
    model.bfloat16().save_pretrained(args.folder / "lora" / "model")  # type: ignore[operator]


def compare(
    args: argparse.Namespace, name: str, ids: np.ndarray, settings: dict[str, Any]
) -> Distances:
    """All curves of one case; what the float32 line leads to is, rounded, the next case's model."""
    folder = args.folder / name
    write_case(folder, ids, settings)
    begin = time.monotonic()
    model, line = peer(folder, ids, settings, args.device, None, "sdpa")
    if name == "whole":
        make_base(args, model)
    curves = {}
    ways = (
        ("sdpa", "sdpa", list(SDPBackend.__members__.values())),
        ("sdpa math", "sdpa", [SDPBackend.MATH]),
        ("eager", "eager", [SDPBackend.MATH]),
    )
    for title, attention, kernels in ways[: args.spread]:
        with sdpa_kernel([k for k in kernels if k is not SDPBackend.ERROR]):
            curves[f"transformers bf16, {title}"] = peer(
                folder, ids, settings, args.device, torch.bfloat16, attention
            )[1]
    if args.device == "cpu":  # computes in float32 alone
        curves["ours float32"] = ours(args, name)["loss"]
    else:
        curves["ours bf16"] = ours(args, name, "--bf16", "--fast")["loss"]
        curves["ours bf16, deterministic"] = ours(args, name, "--bf16")["loss"]
    if args.fp16:
        title = "transformers fp16, GradScaler"
        curves[title] = peer(folder, ids, settings, args.device, torch.float16, "sdpa")[1]
        made = ours(args, name, "--fp16", "--fast")
        curves["ours fp16"] = made["loss"]
        print(f"  ours fp16: {made['skipped']} steps skipped")
    if args.adamw_8bit and name == "whole":
        in_8_bits(args, ids, settings, curves)
    if args.quant and settings["method"] == "lora":
        narrow = [] if args.device == "cpu" else ["--bf16", "--fast"]
        title = f"over {args.quant}"
        curves[title] = ours(args, name, *narrow, "--quant", args.quant)["loss"]
    every = max(1, len(line) // 4)
    steps = ", ".join(f"{loss:.4f}" for loss in [*line[::every], line[-1]])
    lines = [f"{name}: {len(line)} steps, float32 line {steps} ({time.monotonic() - begin:.0f} s)"]
    far = {title: distance(curve, line) for title, curve in curves.items()}
    lines += [
        f"  {title:28} rms {rms:.2e}  largest {most:.2e} at step "
        f"{np.abs(np.array(curves[title]) / np.array(line) - 1).argmax() + 1}  mean {mean:+.1e}"
        f"  last {curves[title][-1]:.4f}"
        for title, (rms, most, mean) in far.items()
    ]
    print("\n".join(lines), flush=True)
    (args.folder / f"{name}.json").write_text(json.dumps({"line": line, **curves}))
    return far


def judge(case: str, trials: list[Distances]) -> bool:
    """Say whether ours are within the spread of theirs; without theirs nothing is judged."""
    titles = list(trials[0])
    theirs = [t for t in titles if t.startswith("transformers bf16")]
    mine = [t for t in titles if t.startswith("ours")]
    if not theirs:
        return True
    # Root mean squares over the trials, of rms and of largest distance.
    far = {t: [float(np.sqrt(np.mean([one[t][i] ** 2 for one in trials]))) for i in range(2)]
           for t in titles}  # fmt: skip
    most = [max(far[t][i] for t in theirs) for i in range(2)]
    good = True
    for title in mine:
        inside = all(far[title][i] <= most[i] for i in range(2))  # no NaN is
        good = good and inside
        beyond = [sum(not one[title][i] <= max(one[t][i] for t in theirs) for one in trials)
                  for i in range(2)]  # fmt: skip
        print(
            f"  {case}, {title} {'within' if inside else 'OUTSIDE'} the spread of transformers' "
            f"bfloat16: rms {far[title][0]:.2e} of {most[0]:.2e}, largest {far[title][1]:.2e} of "
            f"{most[1]:.2e}; beyond all of theirs in {beyond[0]} and {beyond[1]} of {len(trials)}",
            flush=True,
        )
    if len(trials) > 1:
        print(f"  {case}, theirs: " + "; ".join(
            f"{t.removeprefix('transformers bf16, ')} {far[t][0]:.2e}, {far[t][1]:.2e}"
            for t in theirs), flush=True)  # fmt: skip
    return good


def resume(args: argparse.Namespace, name: str, half: int) -> bool:
    """Undisturbed, and stopped and gone on with: the same bytes in every file."""
    narrow = ["--bf16"] if args.device == "cuda" else []
    end, part, rest = (str(args.folder / n) for n in ("end", "part", "rest"))
    ours(args, name, *narrow, "--save", end)
    ours(args, name, *narrow, "--stop", str(half), "--save", part)
    ours(args, name, *narrow, "--from", part, "--save", rest)
    files = sorted(p.name for p in Path(end).iterdir())
    same, other, missing = filecmp.cmpfiles(end, rest, files, shallow=False)
    print(f"resumed at step {half}: {len(same)} files of {len(files)} are the same bytes"
          + (f"; not {', '.join(other + missing)}" if other + missing else ""))  # fmt: skip
    return not other and not missing and "adapter_model.safetensors" in same


def text_for(number: int) -> list[Path]:
    """What a trial's second case learns."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return (
        sorted((ROOT / "docs").rglob("*.md")),
        sorted(library.glob("*.py"), reverse=True),
        sorted((ROOT / "engine").rglob("*.c")),
    )[number % 3]


def trial(args: argparse.Namespace, number: int) -> dict[str, Distances]:
    """Make the cases in a folder of their own and compare."""
    logging.disable_progress_bar()
    if args.trials > 1:
        args = argparse.Namespace(**{**vars(args), "folder": args.folder / f"trial{number}"})
        args.folder.mkdir()
    shape, batch, length = (SMALL, 2, 64) if args.small else (SHAPE, 8, 512)
    common = {"max_steps": args.steps, "max_length": length, "per_device_train_batch_size": batch,
              "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "lr_scheduler_type": "cosine",
              "warmup_steps": args.steps // 10}  # fmt: skip
    heads = shape["hidden_size"] // args.head_dim
    torch.manual_seed(FIRST_SEED + 2 * number)
    model = LlamaForCausalLM(LlamaConfig(
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), vocab_size=320,
        max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5, **shape,
    ))  # fmt: skip
    model.save_pretrained(args.folder / "whole" / "model")
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    ids = text_rows(library, args.steps * batch, length)
    whole = {**common, "method": "full", "learning_rate": 3e-4, "weight_decay": 0.1}
    made = {}
    if "whole" in args.cases:
        made["whole"] = compare(args, "whole", ids, whole)
    else:
        write_case(args.folder / "whole", ids, whole)
        make_base(args, peer(args.folder / "whole", ids, whole, args.device, None, "sdpa")[0])
    if "lora" not in args.cases:
        return made
    lora = {**common, "method": "lora", "learning_rate": 5e-4, "weight_decay": 0.0, "lora_r": 16,
            "lora_alpha": 16.0, "lora_targets": TARGETS}  # fmt: skip
    torch.manual_seed(FIRST_SEED + 2 * number + 1)
    model = AutoModelForCausalLM.from_pretrained(
        args.folder / "lora" / "model", dtype=torch.float32
    )
    get_peft_model(
        model, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    ).save_pretrained(args.folder / "lora" / "adapter")
    ids = text_rows(text_for(number), args.steps * batch, length)
    made["lora"] = compare(args, "lora", ids, lora)
    return made


def run(args: argparse.Namespace) -> bool:
    """All trials; whether all is well."""
    if args.trials == 1:
        trials = [trial(args, args.first)]
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(AT_A_TIME, spawn) as pool:
            numbers = range(args.first, args.first + args.trials)
            waiting = [pool.submit(trial, args, number) for number in numbers]
            trials = [one.result() for one in waiting]
    good = all([judge(case, [made[case] for made in trials]) for case in trials[0]])
    if args.resume:
        good = resume(args, "lora", args.steps // 2) and good
    return good


def main() -> None:
    """Parse arguments, make the cases, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--curve", required=True, help="the program test_curve")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--folder", type=Path, help="made, and kept; else a temporary one")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--small", action="store_true", help="a model for a try on a CPU")
    parser.add_argument(
        "--head-dim", type=int, default=128, choices=[64, 128], help="other kernels of attention"
    )
    parser.add_argument("--trials", type=int, default=1, help="models, adapters and texts")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--adamw-8bit", action="store_true")
    parser.add_argument(
        "--spread", type=int, default=3, help="transformers' bfloat16 runs; 0: none"
    )
    parser.add_argument("--fp16", action="store_true", help="float16 too, ours and autocast's")
    parser.add_argument("--quant", choices=["fp8", "nf4"], help="one more curve of the LoRA case")
    parser.add_argument(
        "--outliers", type=float, default=1, help="a few channels of the LoRA case so much larger"
    )
    parser.add_argument("--cases", default="whole,lora", help="lora alone makes its model, too")
    args = parser.parse_args()
    if args.trials < 1:
        parser.error("--trials takes 1 or more")
    if args.resume and (args.trials > 1 or "lora" not in args.cases):
        parser.error("--resume goes with one trial and the case lora")
    if args.folder is not None:
        if args.folder.exists() and any(args.folder.iterdir()):
            parser.error(f"--folder {args.folder} is not empty: give another, or remove it first")
        good = run(args)
    else:
        with folder_in_memory("pml-curve-") as made:
            args.folder = Path(made)
            good = run(args)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
