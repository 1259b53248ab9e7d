"""Real text through every way that data can go, counted beside transformers.

    tools/realtext/run.py --peer PYTHON [--text FILE …] [--least BYTES] [--kinds …] [--ways …]

PYTHON is an interpreter with transformers. The corpora are the standard library's sources, the
documentation in them (prompt: a function's head, completion: its docstring), and every FILE: one
long text such as a dictionary that a package of the system brings. Tokenizers are trained on the
first corpus, in the three ways that models have them. For each of them and each way of giving rows,
ids and labels are prepared here and made there by transformers, and every one is compared.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/py"))
from examples import RUN  # noqa: E402
from real_text import KINDS, model_folder, sources  # noqa: E402

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
WAYS = ("jsonl", "json", "parquet", "list", "dataset", "txt", "pairs", "marked", "prefixes")


def main() -> int:
    """Prepare, let the peer do the same, compare; the exit status says whether all agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peer", required=True)
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--least", type=int, default=4 << 20)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    args = parser.parse_args()
    files = sources(args.least)
    texts = [path.read_text("utf-8") for path in files]
    corpora = {"standard library": texts}
    for path in args.text:
        corpora[path.name] = path.read_text("utf-8", "replace").split("\n\n")
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="realtext-") as name:
        for kind in args.kinds:
            model = model_folder(Path(name) / kind, kind)
            for title, rows in corpora.items():
                rows = [row for row in rows if row.strip()]
                for way in args.ways:
                    if way in ("pairs", "marked", "prefixes") and title != "standard library":
                        continue
                    folder = Path(name) / f"{kind}-{len(list(Path(name).iterdir()))}"
                    wrong += one(folder, model, kind, title, rows, way, args.peer)
    print("all agree" if not wrong else f"{wrong} do not agree")
    return int(wrong > 0)


def one(
    folder: Path, model: Path, kind: str, title: str, texts: list[str], way: str, peer: str
) -> bool:
    """One corpus one way; whether it is wrong."""
    rows = rows_of(texts, way)
    run = prepared(folder, model, rows, way)
    (folder / "rows.json").write_text(json.dumps({"way": way, "rows": rows}), "utf-8")
    (folder / "peer.py").write_text(PEER, "utf-8")
    subprocess.run(
        [peer, str(folder / "peer.py"), str(model), str(folder)], check=True, capture_output=True
    )
    theirs = np.load(folder / "peer.npz")
    same = all(np.array_equal(run[name], theirs[name]) for name in ("ids", "labels"))
    learned = int((run["labels"] != -100).sum())
    print(
        f"{kind:10}  {title:24}  {way:8}  {sum(map(len, texts)):>10,} characters  "
        f"{len(run['ids']):>9,} tokens  {learned:>9,} labels  {run['full']}  "
        f"{run['seconds']:6.1f} s  {'same' if same else 'DIFFERENT'}",
        flush=True,
    )
    return not same


def rows_of(texts: list[str], way: str) -> list[Any]:
    """Make rows of the corpus as the way has them."""
    if way == "txt":
        return ["\n\n".join(texts)]
    if way not in ("pairs", "marked", "prefixes"):
        return [{"text": text} for text in texts]
    pairs = [pair for text in texts for pair in documented(text)]
    if way == "pairs":
        return [{"prompt": head + "\n    ", "completion": words} for head, words in pairs]
    talks = []
    for at in range(0, len(pairs) - 1, 2):
        talk = []
        for head, words in pairs[at : at + 2]:
            talk += [{"role": "user", "content": head}, {"role": "assistant", "content": words}]
        talks.append({"messages": talk})
    return talks


def documented(text: str) -> list[tuple[str, str]]:
    """Heads and docstrings of a source's functions."""
    lines = text.split("\n")
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            words = ast.get_docstring(node)
            if words:
                found.append((lines[node.lineno - 1], words))
    return found


def prepared(folder: Path, model: Path, rows: list[Any], way: str) -> dict[str, Any]:
    """Prepare as a run would, and read the shard."""
    from pantheraml.data.handover import look_at

    (folder / "data").mkdir(parents=True)
    data: Any = rows
    if way in ("jsonl", "json", "parquet", "txt"):
        data = folder / f"rows.{way}"
        if way == "txt":
            data.write_text(rows[0], "utf-8", newline="")
        elif way == "json":
            data.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
        elif way == "jsonl":
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        else:
            import pyarrow as pa
            from pyarrow import parquet

            parquet.write_table(pa.Table.from_pylist(rows), data)
    elif way == "dataset":
        import pyarrow as pa
        from test_readers import Dataset

        data = Dataset(pa.Table.from_pylist(rows))
    described = {"train": look_at(data).hand_over(folder, "source")}
    if way in ("marked", "prefixes"):
        (folder / "data/t.jinja").write_text(MARKED if way == "marked" else PLAIN, "utf-8")
        described["chat_template"] = "data/t.jinja"  # type: ignore[assignment]
    run = RUN | {
        "model": str(model), "train_data": "data/train.safetensors", "eval_data": "",
        "max_length": 1024, "packing": True, "data": described | {"overlong": "split"},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run), "utf-8")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pantheraml.data.prepare", str(folder)],
        env={"PANTHERAML_CACHE": str(folder / "cache"), "PANTHERAML_CACHE_SIZE": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    seconds = time.monotonic() - start
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    lines = map(json.loads, done.stdout.splitlines())
    full = next(line["message"] for line in lines if "packed into" in line.get("message", ""))
    with safe_open(folder / "data/train.safetensors", "np") as file:
        ids, labels = file.get_tensor("input_ids"), file.get_tensor("labels")
    return {"ids": ids, "labels": labels, "seconds": seconds, "full": full.rpartition(", ")[2]}


PEER = f"""
import json, sys
import numpy as np
from transformers import PreTrainedTokenizerFast
model, folder = sys.argv[1:]
given = json.load(open(folder + "/rows.json", encoding="utf-8"))
tok = PreTrainedTokenizerFast(tokenizer_file=model + "/tokenizer.json", eos_token="<|endoftext|>")
tok.model_max_length = 10 ** 12
tok.chat_template = {MARKED!r}
ids, labels = [], []
for row in given["rows"]:
    if given["way"] == "txt":
        made = tok(row)["input_ids"] + [tok.eos_token_id]
        mask = [1] * len(made)
    elif given["way"] == "pairs":
        whole = tok(row["prompt"] + row["completion"], return_offsets_mapping=True)
        made = whole["input_ids"] + [tok.eos_token_id]
        border = len(row["prompt"])
        first = whole.char_to_token(border)  # as transformers finds the assistant's first token
        mask = [int(i >= first) for i in range(len(made))]
    elif "messages" in row:
        out = tok.apply_chat_template(row["messages"], tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True)
        made, mask = out["input_ids"], out["assistant_masks"]
    else:
        made = tok(row["text"])["input_ids"]
        made += [] if made[-1] == tok.eos_token_id else [tok.eos_token_id]
        mask = [1] * len(made)
    ids += made
    labels += [i if m else -100 for i, m in zip(made, mask)]
np.savez(folder + "/peer.npz", ids=np.array(ids), labels=np.array(labels))
"""


if __name__ == "__main__":
    sys.exit(main())
