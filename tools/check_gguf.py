"""Hold GGUF exports against llama.cpp: it must load each, and greedily continue as the run does.

    .venv/bin/python tools/check_gguf.py --llama PYTHON [--cases NAME...] [--tokens N]

PYTHON is an interpreter with llama-cpp-python, in an environment of its own (it builds llama.cpp
from its source package; nothing of it is a dependency of ours). Each model of the parity fixtures,
some with a changed config.json, and one with a tokenizer, is trained for some steps and exported in
every type; llama.cpp gets the same prompt as token ids. Where types round, a token may differ that
was nearly a tie: the table says after how many of them it did. Exit status 1 when a float32 file
that comes without a note is not the same throughout, or the tokenizers disagree.
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

import pantheraml as pm
from pantheraml.tiny import TinyLlama
from safetensors.numpy import load_file

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
    "llama-linear": (
        "llama-untied-lora",
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    ),
}
TEXTS = ["3 plus 4 is ", "Hello,  world!\n\n  12345 don't", "caf\u00e9 \u4f60\u597d <|im_end|> x"]

#: Run by PYTHON: a request on standard input, an answer on standard output.
ASK = """
import json, sys
from llama_cpp import Llama
request = json.load(sys.stdin)
llama = Llama(request["path"], n_ctx=request["context"], verbose=False, n_threads=1)
tokens = []
for token in llama.generate(request["prompt"], temp=0.0):
    tokens.append(int(token))
    if len(tokens) == request["count"] or token in request["ends"]:
        break
texts = [llama.tokenize(t.encode(), add_bos=True, special=True) for t in request["texts"]]
json.dump({"tokens": tokens, "texts": texts}, sys.stdout)
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
        model = folder / f"{name}-changed"
        shutil.copytree(FIXTURES / name / "model", model)
        config = json.loads((model / "config.json").read_text()) | changes
        (model / "config.json").write_text(json.dumps(config))
    run = pm.finetune(model, rows, packing=False, **settings)
    prompt = load_file(FIXTURES / name / "expected.safetensors")["prompt"].tolist()
    return run.wait(120), prompt


def tiny_run(folder: Path) -> tuple[pm.Run, list[int]]:
    """Train a model with a tokenizer."""
    model = TinyLlama(hidden=96, heads=3, kv_heads=1, intermediate=160).write(folder / "tiny")
    rows = [{"text": f"{a} plus {b} is {a + b}. and so on"} for a in range(9) for b in range(9)]
    run = pm.finetune(
        model, rows, max_steps=60, max_length=64, packing=False, learning_rate=3e-3, name="tiny"
    )
    return run.wait(120), list(TEXTS[0].encode())


def same(ours: list[int], theirs: list[int]) -> int:
    """How many tokens agree from the front."""
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def check(python: str, name: str, folder: Path, count: int) -> bool:
    """One model in every type; whether the float32 file is the run."""
    run, prompt = tiny_run(folder) if name == "tiny" else fixture_run(name, folder)
    ours = run.sample(input_ids=prompt, max_new_tokens=count).token_ids
    config = json.loads((Path(run.config["model"]) / "config.json").read_text())
    ends = config.get("eos_token_id")
    good = True
    for kind in TYPES:
        try:
            made = run.export(folder / f"{name}-{kind}.gguf", "gguf", dtype=kind)
        except pm.Error as error:
            print(f"{name:22} refused: {error}")
            return True
        request = {
            "path": str(made), "prompt": prompt, "count": count, "context": 256,
            "ends": ends if isinstance(ends, list) else [ends],
            "texts": TEXTS if name == "tiny" else [],
        }  # fmt: skip
        answer = ask(python, request)
        agree = same(ours, answer["tokens"])
        whole = answer["tokens"] == ours
        notes = f"  ({made.notes[0]})" if made.notes else ""
        print(f"{name:22} {kind:5} {agree:3} of {len(ours):3}  {made.difference:.1e}{notes}")
        good = good and (whole or kind != "f32" or bool(made.notes))
        for text, ids in zip(request["texts"], answer["texts"], strict=True):
            mine = run._text.encode(text)
            if ids != mine:
                print(f"  tokenised {text!r} as {ids}, the tokenizer says {mine}")
                good = False
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
    # A folder of NF4 weights has no original ones to merge into.
    found = [name for name in found if "quantization_config" not in
             (FIXTURES / name / "model" / "config.json").read_text()]  # fmt: skip
    good = True
    print(f"{'model':22} type  tokens      logits apart, read back by us")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PANTHERAML_RUNS"] = str(Path(folder) / "runs")
        for name in args.cases or [*found, *VARIANTS, "tiny"]:
            good = check(args.llama, name, Path(folder), args.tokens) and good
        for info in pm.runs():
            pm.attach(info.folder).close()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
