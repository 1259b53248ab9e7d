"""Why llama.cpp's greedy token over bf16 and q8_0 is at times not the run's: its arithmetic.

    .venv/bin/python tools/check_gguf_rounding.py --llama PYTHON --peer PYTHON [--cases NAME...]

Two PYTHONs: one with llama-cpp-python, one with torch and transformers. A type that rounds weights
makes two differences: the weights are others, and ggml multiplies them with activations that it
rounds to the same type (its `vec_dot_type`). They are held apart here, for each model of
tools/check_gguf.py:

1. The run's weights are rounded as the type rounds them. That these are the weights of the run's
   own GGUF file is shown by exporting them in the type again: llama.cpp's logits over both files
   must be the same bits. A run over them, in float32, and llama.cpp over their float32 file must
   give the same token everywhere.
2. transformers over them in float32, where the input of each linear layer is rounded as ggml rounds
   it, must think what llama.cpp thinks over the rounded file: the same likeliest token at each
   place, and logits as near as the rest of the arithmetic lets them be. For comparison: how near
   they are without the rounding of inputs.

For each token where llama.cpp over the rounded file prefers another than the run over the same
weights: how far apart the two tokens' logits are in both, by the largest logit. Exit status 1 where
1. or 2. is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pantheraml as pm
from check_gguf import FIXTURES, TINY, VARIANTS, Logits, ask, comparable, fixture_run, tiny_run
from safetensors.numpy import load_file, save_file

KINDS = ("bf16", "q8_0")
Floats = np.ndarray[Any, np.dtype[np.float32]]

#: Run by --peer: a request a line on standard input; the logits with and without inputs rounded go
#: to a file, and its name to standard output.
PEER = """
import json, sys
import numpy as np
import torch
from transformers import AutoModelForCausalLM, utils
utils.logging.disable_progress_bar()
torch.set_num_threads(1)
def rounded(x, kind):
    # What is no multiple of 32 wide is f16 in a q8_0 file.
    if kind == "q8_0" and x.shape[-1] % 32:
        return x.half().float()
    if kind == "bf16":
        return x.bfloat16().float()
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    top = blocks.abs().amax(-1, keepdim=True)
    codes = torch.round(blocks * torch.where(top > 0, 127 / top, 0))
    return (codes * (top / 127).half().float()).reshape(x.shape)
for line in sys.stdin:
    request = json.loads(line)
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32,
                                                 attn_implementation="eager").eval()
    tokens, prompt = request["tokens"], request["prompt"]
    def logits():
        with torch.no_grad():
            found = model(torch.tensor([prompt + tokens[:-1]])).logits
        return found[0, len(prompt) - 1:].numpy()
    plain = logits()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, given: (rounded(given[0], request["kind"]),))
    np.savez(request["to"], plain=plain, rounded=logits())
    print(request["to"], flush=True)
"""


class Peer:
    """transformers, in a process of its own."""

    def __init__(self, python: str) -> None:
        self._child = subprocess.Popen(
            [python, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Logits]:
        """Give a model's logits at each token, ``plain`` and with inputs ``rounded``."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        if not self._child.stdout.readline():
            raise SystemExit(f"transformers does not take {request['model']}")
        with np.load(request["to"]) as answer:
            return dict(answer)

    def close(self) -> None:
        """End the process."""
        self._child.communicate()


def round_weights(kind: str, tensor: Floats) -> Floats:
    """Give a matrix as a GGUF file of a type holds it."""
    if kind == "bf16":
        bits = tensor.view(np.uint32)
        nearest: Floats = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
        return nearest
    if tensor.shape[-1] % 32:
        return tensor.astype(np.float16).astype(np.float32)
    blocks = tensor.reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    scaled = blocks * inverse
    codes = np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))  # halves go away from zero
    held: Floats = (codes * scale.astype(np.float16).astype(np.float32)).reshape(tensor.shape)
    return held


def rounded_model(kind: str, merged: Path, folder: Path) -> Path:
    """Copy a merged model with its matrices rounded."""
    shutil.copytree(merged, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                tensors[name] = round_weights(kind, tensor)
        save_file(tensors, path, {"format": "pt"})
    return folder


def gaps(ours: Logits, theirs: Logits) -> list[str]:
    """Where the likeliest tokens differ: how far apart the two are, in both."""
    words = []
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        mine, other = int(a.argmax()), int(b.argmax())
        if mine != other:
            lead = (a[mine] - a[other]) / np.abs(a).max()
            back = (b[other] - b[mine]) / np.abs(b).max()
            words.append(f"token {i + 1}: {lead:.1e} there, {back:.1e} here")
    return words


def apart(one: Logits, other: Logits) -> float:
    """Give the largest difference by the largest logit."""
    return float(np.abs(one - other).max() / np.abs(one).max())


def check(llama: str, peer: Peer, name: str, folder: Path, count: int) -> tuple[int, bool]:
    """Hold one model in each type; how many tokens there were, and whether all is as it must."""
    tiny = name.startswith("tiny-")
    run, prompt = (
        tiny_run(folder, name.removeprefix("tiny-")) if tiny else fixture_run(name, folder)
    )
    merged = run.export(folder / f"{name}-merged", "merged", dtype="float32", verify=False)
    config = json.loads((Path(merged) / "config.json").read_text())
    asked, good = 0, config.get("sliding_window") != 1
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    yarn = {f"yarn_{key}": rope[key] for key in ("beta_fast", "beta_slow") if key in rope}
    for kind in KINDS if good else ():
        model = rounded_model(kind, Path(merged), folder / f"{name}-{kind}")
        again = pm.finetune(
            model, [{"input_ids": prompt, "labels": prompt}], method="full", learning_rate=0,
            max_steps=1, max_length=max(64, len(prompt)), packing=False, devices="cpu",
        ).wait(120)  # fmt: skip
        tokens = again.sample(input_ids=prompt, max_new_tokens=count).token_ids
        tokens = tokens[: comparable(config, len(prompt), len(tokens))]
        try:
            first = run.export(folder / f"{name}-{kind}.gguf", "gguf", dtype=kind, verify=False)
        except pm.Error:
            tokens = []
        if not tokens:
            again.close()
            break
        file = again.export(folder / f"{name}-{kind}2.gguf", "gguf", dtype=kind, verify=False)
        exact = again.export(folder / f"{name}-{kind}32.gguf", "gguf", dtype="f32", verify=False)
        again.close()
        request = {
            "prompt": prompt, "tokens": tokens, "context": 256, "texts": [], "yarn": yarn,
        }  # fmt: skip
        over32, over, of_run = (
            np.array(ask(llama, {**request, "path": str(path)})["logits"])
            for path in (exact, file, first)
        )
        by_peer = peer.ask(
            {**request, "model": str(model), "kind": kind, "to": str(folder / "peer.npz")}
        )
        equal = int((over32.argmax(1) == np.array(tokens)).sum())
        follows = int((by_peer["rounded"].argmax(1) == over.argmax(1)).sum())
        alike = np.array_equal(over, of_run)
        near, far = apart(over, by_peer["rounded"]), apart(over, by_peer["plain"])
        print(
            f"{name:22} {kind:5} {'same' if alike else 'OTHER'} bits  float32 {equal:3} of "
            f"{len(tokens):3}  rounded inputs {follows:3} of {len(tokens):3}, apart {near:.0e} "
            f"({far:.0e} without)  {'; '.join(gaps(over32, over))}",
            flush=True,
        )
        asked += len(tokens)
        good = good and alike and equal == follows == len(tokens)
    run.close()
    return asked, good


def main() -> int:
    """Check every case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--llama", required=True, metavar="PYTHON")
    parser.add_argument("--peer", required=True, metavar="PYTHON")
    parser.add_argument("--cases", nargs="*")
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    found = sorted(path.parent.name for path in FIXTURES.glob("*/case.json"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PANTHERAML_RUNS"] = str(folder / "runs")
        peer = Peer(args.peer)
        results = [
            check(args.llama, peer, case, folder, args.tokens)
            for case in args.cases or [*found, *VARIANTS, *TINY]
        ]
        peer.close()
    held = [good for asked, good in results if asked]
    print(f"{sum(asked for asked, _ in results)} tokens of {len(held)} models: "
          f"{'all as they must be' if all(held) else 'NOT all as they must be'}")  # fmt: skip
    return 0 if held and all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
