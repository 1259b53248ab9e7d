"""Hold GGUF exports against llama.cpp: it must load each, and greedily continue as the run does.

    .venv/bin/python tools/check_gguf.py --llama PYTHON [--cases NAME...] [--tokens N]

PYTHON is an interpreter with llama-cpp-python, in an environment of its own (it builds llama.cpp
from its source package; nothing of it is a dependency of ours). Each model of the parity fixtures,
some with a changed config.json, and one with a tokenizer, is trained for some steps and exported in
every type; llama.cpp gets the same prompt as token ids, and then the run's own greedy tokens, one
by one: at each it must think the same token likeliest. Where a type rounds, it may prefer another
one that was nearly as likely: the table says how far the run's token leads it in the float32 file,
by the largest logit, beside how far rounding moved the logits when the export was read back by us.
Beyond a sliding window, or beyond the positions of dynamic rope, llama.cpp does otherwise: such
tokens are not counted. Exit status 1 when a float32 file differs, when a token's lead is more than
four times what rounding the weights explains (llama.cpp rounds activations as well), or when the
tokenizers disagree.
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
from pantheraml.tiny import TinyLlama
from safetensors.numpy import load_file, save_file

FIXTURES = Path(__file__).parent.parent / "tests" / "parity" / "fixtures"
TYPES = ("f32", "f16", "bf16", "q8_0")
#: Fixtures with another config.json: what llama.cpp cannot have (windows) is taken away, and rope
#: types that stand only beside it stay.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-yarn": (
        "mistral-yarn-lora",
        {
            "sliding_window": None,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mistral": ("mistral-window-full", {"sliding_window": None}),
    "mistral-in-window": ("mistral-window-full", {"sliding_window": 40}),
    "qwen3": ("qwen3-layers-lora", {"use_sliding_window": False, "layer_types": None}),
    "qwen3-yarn": (
        "qwen3-mixed-lora",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama-linear": (
        "llama-untied-lora",
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    ),
}
#: A family each, with a tokenizer.
TINY = ("tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-qwen3")
Logits = np.ndarray[Any, np.dtype[Any]]
TEXTS = ["3 plus 4 is ", "Hello,  world!\n\n  12345 don't", "caf\u00e9 \u4f60\u597d <|im_end|> x"]

#: Run by PYTHON: a request on standard input, an answer on standard output.
ASK = """
import json, sys
import numpy as np
import llama_cpp
request = json.load(sys.stdin)
llama = llama_cpp.Llama(request["path"], n_ctx=request["context"], verbose=False, n_threads=1,
                        type_k=0, type_v=0,  # keys and values in float32, not float16
                        **request["yarn"])
logits, given = [], request["prompt"]
for token in request["tokens"]:
    llama.eval(given)
    at = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
    logits.append(np.ctypeslib.as_array(at, shape=(llama.n_vocab(),)).tolist())
    given = [token]
texts = [llama.tokenize(t.encode(), add_bos=True, special=True) for t in request["texts"]]
json.dump({"logits": logits, "texts": texts}, sys.stdout)
"""


def ask(python: str, request: dict[str, Any]) -> dict[str, Any]:
    """Let llama.cpp continue a prompt."""
    child = subprocess.run(
        [python, "-c", ASK], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    if child.returncode != 0:
        raise SystemExit(f"llama.cpp does not take {request['path']}:\n{child.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(child.stdout)
    return answer


def fixture_run(name: str, folder: Path) -> tuple[pm.Run, list[int]]:
    """Train a parity fixture as its case says; the run and its prompt."""
    variant = name
    name, changes = VARIANTS.get(name, (name, {}))
    case = json.loads((FIXTURES / name / "case.json").read_text())
    shard = load_file(FIXTURES / name / "rows.safetensors")
    bounds = shard["offsets"].tolist()
    rows = [
        {what: shard[what][a:b].tolist() for what in ("input_ids", "labels")}
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    known = ("method", "quant", "max_steps", "max_length", "learning_rate")
    settings = {key: case[key] for key in known if key in case}
    if (FIXTURES / name / "adapter").is_dir():
        settings["lora"] = pm.LoRA(init=FIXTURES / name / "adapter")
    model = FIXTURES / name / "model"
    if changes:
        model = folder / f"{variant}-model"
        shutil.copytree(FIXTURES / name / "model", model)
        config = json.loads((model / "config.json").read_text()) | changes
        (model / "config.json").write_text(json.dumps(config))
    run = pm.finetune(model, rows, packing=False, dtype="float32", devices="cpu", **settings)
    prompt = load_file(FIXTURES / name / "expected.safetensors")["prompt"].tolist()
    return run.wait(120), prompt


def tiny_model(folder: Path, family: str) -> Path:
    """Write a model with a tokenizer, whose matrices' rows are whole blocks of q8_0."""
    model = TinyLlama(hidden=96, heads=3, kv_heads=1, intermediate=160).write(folder / family)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": family, "sliding_window": None, "use_sliding_window": False}
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    random = np.random.default_rng(3)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.self_attn."
        more = {"qwen2": ("q_proj.bias", "k_proj.bias", "v_proj.bias"),
                "qwen3": ("q_norm.weight", "k_norm.weight")}.get(family, ())  # fmt: skip
        for name in more:
            size = 96 if name == "q_proj.bias" else 32
            drawn = random.standard_normal(size) * 0.1 + ("norm" in name)
            tensors[at + name] = drawn.astype(np.float32)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


def tiny_run(folder: Path, family: str) -> tuple[pm.Run, list[int]]:
    """Train a model with a tokenizer."""
    model = tiny_model(folder, family)
    rows = [{"text": f"{a} plus {b} is {a + b}. and so on"} for a in range(9) for b in range(9)]
    run = pm.finetune(
        model, rows, max_steps=60, max_length=64, packing=False, learning_rate=3e-3, name=family
    )
    return run.wait(120), list(TEXTS[0].encode())


def comparable(config: dict[str, Any], prompt: int, count: int) -> int:
    """How many new tokens see nothing that llama.cpp treats otherwise."""
    limits = []
    kinds = config.get("layer_types") or ["sliding_attention"]
    slides = config.get("use_sliding_window", config["model_type"] == "mistral")
    if slides and config.get("sliding_window") and "sliding_attention" in kinds:
        limits.append(config["sliding_window"])
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type") == "dynamic":
        limits.append(config["max_position_embeddings"])
    return max(0, min([count, *(limit - prompt + 1 for limit in limits)]))


def compare(
    kind: str, ours: list[int], logits: Logits, exact: Logits, rounding: float
) -> tuple[int, list[str], bool]:
    """Tokens that are likeliest in both, words about the others, and whether those are ties."""
    same, words, good = 0, [], True
    for i, (token, row, true) in enumerate(zip(ours, logits, exact, strict=True)):
        best = int(row.argmax())
        if best == token:
            same += 1
            continue
        lead = float(true[token] - true[best]) / float(np.abs(true).max())
        words.append(f"token {i + 1} leads by {lead:.1e}")
        good = good and kind != "f32" and lead <= 4 * rounding
    return same, words, good


def check(python: str, name: str, folder: Path, count: int) -> bool:
    """One model in every type; whether each file is the run, as far as its type can tell."""
    tiny = name.startswith("tiny-")
    run, prompt = (
        tiny_run(folder, name.removeprefix("tiny-")) if tiny else fixture_run(name, folder)
    )
    config = json.loads((Path(run.config["model"]) / "config.json").read_text())
    if config.get("sliding_window") == 1:
        print(f"{name:22} has a window of one token, from which neither is sampled")
        return True
    ours = run.sample(input_ids=prompt, max_new_tokens=count).token_ids
    ours = ours[: comparable(config, len(prompt), len(ours))]
    if not ours:
        print(f"{name:22} cannot be compared: the prompt itself is beyond the sliding window")
        return True
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # llama-cpp-python always gives llama.cpp these two, which go before those of the file.
    yarn = {f"yarn_{key}": rope[key] for key in ("beta_fast", "beta_slow") if key in rope}
    good, exact = True, np.empty(0)
    for kind in TYPES:
        try:
            made = run.export(folder / f"{name}-{kind}.gguf", "gguf", dtype=kind)
        except pm.Error as error:
            print(f"{name:22} refused: {error}")
            return True
        request = {
            "path": str(made), "prompt": prompt, "tokens": ours, "context": 256,
            "texts": TEXTS if tiny else [], "yarn": yarn,
        }  # fmt: skip
        answer = ask(python, request)
        logits = np.array(answer["logits"])
        exact = logits if kind == "f32" else exact
        rounding = made.difference or 0.0
        same, words, fine = compare(kind, ours, logits, exact, rounding)
        notes = "; ".join([*words, *made.notes])
        print(f"{name:22} {kind:5} {same:3} of {len(ours):3}  {rounding:.1e}  {notes}", flush=True)
        good = good and fine
        for text, ids in zip(request["texts"], answer["texts"], strict=True):
            mine = run._text.encode(text)
            if ids != mine:
                print(f"  tokenised {text!r} as {ids}, the tokenizer says {mine}")
                good = False
    run.close()
    return good


def main() -> int:
    """Check every case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--llama", required=True, metavar="PYTHON")
    parser.add_argument("--cases", nargs="*")
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    found = sorted(path.parent.name for path in FIXTURES.glob("*/case.json"))
    good = True
    print(f"{'model':22} type  tokens      logits apart, read back by us")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PANTHERAML_RUNS"] = str(Path(folder) / "runs")
        for name in args.cases or [*found, *VARIANTS, *TINY]:
            good = check(args.llama, name, Path(folder), args.tokens) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
