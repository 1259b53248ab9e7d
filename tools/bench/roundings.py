"""Which rounding moves a curve: LoRA in float32 that rounds where our 16-bit program rounds.

    python3 tools/bench/roundings.py FOLDER [--device cuda] [--steps 52] [--batch 52]
                                     [--only norm,res] [--curve build/gpu/bundle/test_curve]

FOLDER is what ``curve.py --folder FOLDER`` left (its second case is used: a Llama and an adapter).
The same training runs once without rounding, the line; once with all roundings, those forwards,
those backwards; and with each by itself. At some steps the adapters are taken, and the float32 loss
of --batch with them is told as a distance from the line's: what the training made of the roundings,
without that batch's own.

With --curve our gradients at the line's adapters are fetched, too (a step of that program, whose
first moment is a tenth of the gradient), and set beside those with all roundings: how far each is
from float32's, and the cosine of the two errors. Near 1 our program errs by what is emulated here;
near 0 by something else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from curve import ROOT, ours, write_case
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

sys.path.insert(0, str(ROOT / "tools/fixtures"))
from rounded import Rounded  # noqa: E402

State = dict[str, torch.Tensor]

#: Where the program keeps 16 bits: forwards by these names, gradients by those of both sides.
PLACES = ["copy", "norm", "u", "qkv", "rope", "p", "o", "oy", "res", "gu", "swiglu", "dy", "logits"]
MARKS = (12, 20, 26, 32, 40, 46, 52)  # steps


class Model:
    """A Llama of curve.py's with an adapter on each linear layer, and what of it is rounded."""

    def __init__(self, case: Path, device: str) -> None:
        """Load weights; the adapter is given to each call."""
        self.device = device
        self.weights = {
            name: x.float().to(device)
            for name, x in load_file(case / "model" / "model.safetensors").items()
        }
        config = json.loads((case / "model" / "config.json").read_text())
        self.layers, self.eps = config["num_hidden_layers"], config["rms_norm_eps"]
        self.heads, self.kv = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim = config["hidden_size"] // self.heads
        self.there: set[str] = set()  # rounded forwards
        self.back = False  # gradients are rounded
        self.adapter: State = {}
        self.angles: tuple[torch.Tensor, torch.Tensor] = self._angles(8192)

    def _angles(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = 1e4 ** -(torch.arange(0, self.dim, 2).float() / self.dim)
        angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
        return angles.cos().to(self.device), angles.sin().to(self.device)

    def at(self, x: torch.Tensor, place: str, grad: bool = True) -> torch.Tensor:
        """Round at a place, and the gradient that comes back there."""
        there, back = place in self.there, grad and self.back
        return Rounded.apply(x, there, back) if there or back else x  # type: ignore[no-any-return]

    def linear(self, x: torch.Tensor, name: str, place: str) -> torch.Tensor:
        """Product with the frozen weight and the adapter's two, rounded once."""
        a = self.at(self.adapter[f"{name}.lora_A"], "copy", grad=False)
        b = self.at(self.adapter[f"{name}.lora_B"], "copy", grad=False)
        u = self.at(x @ a.T, "u")
        return self.at(x @ self.weights[f"{name}.weight"].T + u @ b.T, place)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """RMSNorm, rounded once."""
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.at(x * rstd * self.weights[f"{name}.weight"], "norm")

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """By rope, [rows, heads, tokens, dim]."""
        cos, sin = (table[: x.shape[2]] for table in self.angles)
        low, high = x.chunk(2, -1)
        return self.at(x * cos + torch.cat([-high, low], -1) * sin, "rope", grad=False)

    def attention(self, x: torch.Tensor, at: str) -> torch.Tensor:
        """From the norm's output to that of o_proj."""
        rows, tokens, _ = x.shape
        q, k, v = (
            self.linear(x, f"{at}{name}_proj", "qkv")
            .view(rows, tokens, -1, self.dim).transpose(1, 2)
            for name in "qkv"
        )  # fmt: skip
        q, k = self.turned(q), self.turned(k)
        k, v = (y.repeat_interleave(self.heads // self.kv, 1) for y in (k, v))
        mask = torch.full((tokens, tokens), -torch.inf, device=x.device).triu(1)
        scores = self.at(q @ k.transpose(-1, -2), "scores") * self.dim**-0.5 + mask
        powers = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
        out = (self.at(powers, "p", grad=False) @ v) / powers.sum(-1, keepdim=True)
        out = self.at(out.transpose(1, 2).reshape(rows, tokens, -1), "o")
        return self.linear(out, f"{at}o_proj", "oy")

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the table, which has 16 bits itself."""
        return self.weights["model.embed_tokens.weight"][ids]

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """By the head, rounded once."""
        return self.at(x @ self.weights["lm_head.weight"].T, "logits")

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean over all tokens but the first of each row."""
        h = self.embedded(ids)
        for i in range(self.layers):
            at = f"model.layers.{i}."
            h = self.at(h, "residual gradient")
            more = self.attention(self.norm(h, f"{at}input_layernorm"), f"{at}self_attn.")
            h = self.at(self.at(h + more, "res", grad=False), "residual gradient")
            x = self.norm(h, f"{at}post_attention_layernorm")
            gate, up = (self.linear(x, f"{at}mlp.{n}_proj", "gu") for n in ("gate", "up"))
            inner = self.at(F.silu(gate) * up, "swiglu")
            h = self.at(h + self.linear(inner, f"{at}mlp.down_proj", "dy"), "res", grad=False)
        x = self.norm(self.at(h, "residual gradient"), "model.norm")
        logits = self.logits(x)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def exact(self, ids: torch.Tensor, adapter: State) -> float:
        """Loss without any rounding."""
        kept = self.there, self.back
        self.there, self.back, self.adapter = set(), False, adapter
        with torch.no_grad():
            loss = float(self.loss(ids))
        self.there, self.back = kept
        return loss

    def gradient(self, ids: torch.Tensor, adapter: State) -> State:
        """Of each matrix of the adapter, clipped to a norm of 1."""
        self.adapter = {name: x.clone().requires_grad_(True) for name, x in adapter.items()}
        self.loss(ids).backward()
        torch.nn.utils.clip_grad_norm_(self.adapter.values(), 1.0)
        return {name: x.grad for name, x in self.adapter.items() if x.grad is not None}


class Trial:
    """One folder of curve.py's, and its trainings."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Read rows, settings and the adapter that training begins with."""
        self.args, self.case = args, args.folder / "lora"
        self.settings = json.loads((self.case / "case.json").read_text())
        ids = load_numpy(self.case / "rows.safetensors")["input_ids"]
        self.ids = ids.reshape(-1, self.settings["max_length"])
        self.model = Model(self.case, args.device)
        adapter = load_file(self.case / "adapter" / "adapter_model.safetensors")
        self.start = {short(name): x.float().to(args.device) for name, x in adapter.items()}

    def rows(self, step: int) -> np.ndarray:
        """Ids of a step's batch."""
        batch = self.settings["per_device_train_batch_size"]
        return self.ids[step * batch : (step + 1) * batch].copy()

    def batch(self, step: int) -> torch.Tensor:
        """The same, on the device."""
        return torch.tensor(self.rows(step), dtype=torch.long, device=self.args.device)

    def train(self, there: set[str], back: bool) -> dict[int, State]:
        """Adapters at the steps that are marked."""
        model, taken = self.model, {}
        trained = {name: x.clone().requires_grad_(True) for name, x in self.start.items()}
        optimizer = torch.optim.AdamW(
            trained.values(), lr=self.settings["learning_rate"], weight_decay=0.0
        )
        schedule = get_scheduler(
            self.settings["lr_scheduler_type"], optimizer, self.settings["warmup_steps"],
            self.settings["max_steps"],
        )  # fmt: skip
        for step in range(self.args.steps):
            if step in MARKS:
                taken[step] = {name: x.detach().clone() for name, x in trained.items()}
            model.there, model.back, model.adapter = there, back, trained
            model.loss(self.batch(step)).backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), self.settings["max_grad_norm"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        taken[self.args.steps] = {name: x.detach() for name, x in trained.items()}
        return taken

    def losses(self, taken: dict[int, State]) -> dict[int, float]:
        """Float32 loss of the batch that is asked about with each of them."""
        batch = self.batch(self.args.batch)
        return {step: self.model.exact(batch, state) for step, state in taken.items()}

    def our_gradient(self, adapter: State, step: int) -> State:
        """Our gradient of a step's batch, by one step of test_curve."""
        folder = emptied(self.args.folder / "one")
        (folder / "adapter").mkdir(parents=True)
        (folder / "model").symlink_to((self.case / "model").resolve())
        shutil.copy(self.case / "adapter" / "adapter_config.json", folder / "adapter")
        save_file(
            {long(name): x.cpu() for name, x in adapter.items()},
            folder / "adapter" / "adapter_model.safetensors",
        )
        found = first_gradient(self.args, self.rows(step), self.settings, "--bf16")
        return {short(name): x for name, x in found.items()}

    def beside(self, adapter: State, at: int, step: int) -> None:
        """Errors of two gradients of a step's batch with adapters as they are at another."""
        model, batch, found = self.model, self.batch(step), []
        for there, back in ((set(), False), (set(PLACES), True)):
            model.there, model.back = there, back
            found.append(model.gradient(batch, adapter))
        exact, rounded = found
        mine = self.our_gradient(adapter, step)
        print(f"adapters of step {at}, batch {step}: error rounded, error ours, cosine")
        for layer in range(model.layers):
            words = []
            for name in (n for n in exact if f".{layer}." in n):
                theirs, errs = rounded[name] - exact[name], mine[name] - exact[name]
                size = exact[name].norm()
                cosine = (theirs * errs).sum() / (theirs.norm() * errs.norm())
                matrix = name.split(".")[-2].removesuffix("_proj") + name[-2:]
                words.append(
                    f"{matrix} {theirs.norm() / size:.0e} {errs.norm() / size:.0e} {cosine:+.2f}"
                )
            print(f"  {layer}: " + ", ".join(words), flush=True)


def emptied(folder: Path) -> Path:
    """A folder that is not there, whatever was."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def first_gradient(
    args: argparse.Namespace, rows: np.ndarray, settings: dict[str, Any], *narrow: str
) -> State:
    """Our gradient of these rows, by one step of test_curve: its first moment is a tenth of it.

    The folder ``one`` has the model, and the adapter where there is one. narrow: on a GPU.
    """
    saved = emptied(args.folder / "one-saved")
    write_case(args.folder / "one", rows, settings | {"max_steps": 1, "warmup_steps": 0})
    ours(args, "one", *(narrow if args.device == "cuda" else ()), "--save", str(saved))
    moments = load_file(saved / "optimizer.safetensors")
    return {n.removeprefix("exp_avg."): 10 * x.to(args.device)
            for n, x in moments.items() if n.startswith("exp_avg.")}  # fmt: skip


def short(name: str) -> str:
    """A matrix's name without PEFT's words."""
    return name.removeprefix("base_model.model.").removesuffix(".weight")


def long(name: str) -> str:
    """The same with them."""
    return f"base_model.model.{name}.weight"


def main() -> None:
    """Parse arguments, train, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path, help="of curve.py --folder")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=52)
    parser.add_argument("--batch", type=int, default=52, help="the step whose batch is asked about")
    parser.add_argument("--only", default=",".join(PLACES), help="roundings to try by themselves")
    parser.add_argument("--curve", help="the program test_curve: our gradients, too")
    args = parser.parse_args()
    only = [place for place in args.only.split(",") if place]
    if strange := set(only) - set(PLACES):
        parser.error(f"{', '.join(sorted(strange))}: there are {', '.join(PLACES)}")
    begin, trial = time.monotonic(), Trial(args)
    taken = trial.train(set(), back=False)
    line = trial.losses(taken)
    print("float32: " + ", ".join(f"{step} {loss:.5f}" for step, loss in line.items()), flush=True)
    ways: dict[str, tuple[set[str], bool]] = {
        "all": (set(PLACES), True), "forwards": (set(PLACES), False), "backwards": (set(), True),
        **{f"{place} alone": ({place}, False) for place in only},
    }  # fmt: skip
    for name, (there, back) in ways.items():
        made = trial.losses(trial.train(there, back))
        words = ", ".join(f"{step} {made[step] / line[step] - 1:+.1e}" for step in made)
        print(f"{name:13} {words} ({time.monotonic() - begin:.0f} s)", flush=True)
    if args.curve:
        for at, step in ((min(taken), min(taken)), (args.steps, args.batch)):
            trial.beside(taken[at], at, step)


if __name__ == "__main__":
    main()
