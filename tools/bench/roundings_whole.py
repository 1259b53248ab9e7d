"""Which roundings move a curve of a Llama trained whole: float32 that rounds where we do.

    python3 tools/bench/roundings_whole.py [--device cuda] [--seeds 7,9] [--ways norms,all,…]
                                           [--hidden 512 --layers 8 --batch 8 --length 512]

The training of ``curve.py``'s first case (seeds are its trials': 7, 9, 11 …), without a rounding,
the line; then in each of the ways below. Told is the root mean square and largest distance of its
losses from the line's. Before that, with the line's weights at some steps, how far each way's
gradient is from float32's: the mean of all matrices in layers, and the whole; transformers' own
under bfloat16 autocast, too.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from curve import text_rows
from roundings import PLACES, Model, State
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

ALL = {*PLACES, "embed", "norm weights"}
#: What a way rounds forwards, and whether gradients are rounded. "norms" is our program, whose
#: norms read float32 weights; "all" what it was before. "embed" leaves out the table of embeddings
#: as well, "sums" that and the residual line. "forwards" is our program's forward alone, "copies"
#: the weights alone, "all copies" norms' among them, "norm copies" those alone.
WAYS: dict[str, tuple[set[str], bool]] = {
    "all": (ALL, True),
    "norms": (ALL - {"norm weights"}, True),
    "embed": (ALL - {"norm weights", "embed"}, True),
    "sums": (ALL - {"norm weights", "embed", "res"}, True),
    "forwards": (ALL - {"norm weights"}, False),
    "copies": ({"copy", "embed"}, False),
    "all copies": ({"copy", "embed", "norm weights"}, False),
    "norm copies": ({"norm weights"}, False),
}
MARKS = (5, 20, 60, 120)  # steps


class Whole(Model):
    """A Llama whose weights are all trained: float32 ones, read as they are or rounded."""

    def __init__(self, config: LlamaConfig, weights: State, device: str) -> None:
        """Take weights; they are not copied."""
        self.device, self.weights = device, weights
        self.layers, self.eps = config.num_hidden_layers, config.rms_norm_eps
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.dim = config.hidden_size // self.heads
        self.there, self.back, self.adapter = set(), False, {}
        self.angles = self._angles(config.max_position_embeddings)

    def weight(self, name: str, place: str = "copy") -> torch.Tensor:
        """As the products read it."""
        return self.at(self.weights[f"{name}.weight"], place, grad=False)

    def linear(self, x: torch.Tensor, name: str, place: str) -> torch.Tensor:
        """Product with the copy of the weight."""
        return self.at(x @ self.weight(name).T, place)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """RMSNorm, rounded once."""
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.at(x * rstd * self.weight(name, "norm weights"), "norm")

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the copy of the table."""
        return self.weight("model.embed_tokens", "embed")[ids]

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """By the copy of the head."""
        return self.at(x @ self.weight("lm_head").T, "logits")


def made(args: argparse.Namespace, seed: int) -> LlamaForCausalLM:
    """The model of a trial of curve.py."""
    torch.manual_seed(seed)
    heads = args.hidden // args.head_dim
    return LlamaForCausalLM(LlamaConfig(
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), vocab_size=320,
        hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4, bos_token_id=1,
        num_hidden_layers=args.layers, max_position_embeddings=2048, tie_word_embeddings=False,
        eos_token_id=2, rms_norm_eps=1e-5,
    ))  # fmt: skip


class Trial:
    """One seed's model and text, and its trainings."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        """Make the model and read the text."""
        self.args, self.peer = args, made(args, seed).to(args.device)
        self.start = {n: p.detach().clone() for n, p in self.peer.named_parameters()}
        library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        self.ids = text_rows(library, args.steps * args.batch, args.length)

    def batch(self, step: int) -> torch.Tensor:
        """Ids of a step."""
        rows = self.ids[step * self.args.batch : (step + 1) * self.args.batch]
        return torch.tensor(rows, dtype=torch.long, device=self.args.device)

    def model(self, weights: State, way: tuple[set[str], bool]) -> Whole:
        """One that trains these weights."""
        own = {n: x.clone().requires_grad_(True) for n, x in weights.items()}
        model = Whole(self.peer.config, own, self.args.device)
        model.there, model.back = way
        return model

    def train(self, way: tuple[set[str], bool]) -> tuple[np.ndarray, dict[int, State]]:
        """Losses, and weights at the steps that are marked."""
        model, steps = self.model(self.start, way), self.args.steps
        trained, kept, losses = model.weights, {}, []
        groups = [
            {"params": [x for n, x in trained.items() if "norm" not in n], "weight_decay": 0.1},
            {"params": [x for n, x in trained.items() if "norm" in n], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=3e-4)
        schedule = get_scheduler("cosine", optimizer, steps // 10, steps)
        for step in range(steps):
            if step in MARKS:
                kept[step] = {n: x.detach().clone() for n, x in trained.items()}
            loss = model.loss(self.batch(step))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return np.array([float(loss) for loss in losses]), kept

    def gradient(self, weights: State, step: int, way: tuple[set[str], bool]) -> State:
        """Of a step's batch with these weights."""
        model = self.model(weights, way)
        model.loss(self.batch(step)).backward()
        return {n: x.grad for n, x in model.weights.items() if x.grad is not None}

    def theirs(self, weights: State, step: int) -> State:
        """The same by transformers under autocast."""
        for name, parameter in self.peer.named_parameters():
            parameter.data.copy_(weights[name])
        self.peer.zero_grad()
        ids = self.batch(step)
        with torch.autocast(self.args.device, torch.bfloat16):
            loss = self.peer(input_ids=ids, labels=ids).loss
        loss.backward()
        return {n: p.grad.clone() for n, p in self.peer.named_parameters() if p.grad is not None}


def error(got: State, exact: State) -> str:
    """Mean relative distance of the matrices in layers, and that of all together."""
    names = [n for n, x in exact.items() if "layers" in n and x.dim() > 1]
    mean = np.mean([float((got[n] - exact[n]).norm() / exact[n].norm()) for n in names])
    apart = sum(float((got[n] - exact[n]).norm()) ** 2 for n in exact)
    return f"{mean:.1e} ({(apart / sum(float(x.norm()) ** 2 for x in exact.values())) ** 0.5:.1e})"


def main() -> None:
    """Parse arguments, train, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seeds", default="7")
    parser.add_argument("--ways", default=",".join(WAYS), help="of all that there are")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    ways = args.ways.split(",")
    if strange := set(ways) - set(WAYS):
        parser.error(f"{', '.join(sorted(strange))}: there are {', '.join(WAYS)}")
    for seed in map(int, args.seeds.split(",")):
        begin, trial = time.monotonic(), Trial(args, seed)
        line, kept = trial.train((set(), False))
        for step, weights in kept.items():
            exact = trial.gradient(weights, step, (set(), False))
            words = [f"{w} {error(trial.gradient(weights, step, WAYS[w]), exact)}" for w in ways]
            words.append(f"transformers {error(trial.theirs(weights, step), exact)}")
            print(f"{seed}, gradients at step {step}: {', '.join(words)}", flush=True)
        for way in ways:
            d = trial.train(WAYS[way])[0] / line - 1
            print(
                f"{seed} {way:13} rms {np.sqrt((d**2).mean()):.2e}  largest {np.abs(d).max():.2e} "
                f"({time.monotonic() - begin:.0f} s)", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
