"""A corpus that every machine has: the source of its own Python standard library.

The lesson needs no download. From the interpreter that runs it, it makes

* text to learn Python from (the sources, cut into training and held-out files),
* chat pairs *signature → docstring* (read with :mod:`ast`, so no code is executed),
* a byte-level BPE tokenizer trained on those sources,
* a small Llama with random weights, written as an ordinary Hugging Face folder.

Everything is a pure function of the interpreter's version and ``seed``.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["CHAT_TEMPLATE", "Lesson", "ask", "pairs", "prepare", "source_files", "write_model"]

#: Folders of the library that teach little: tests, generated tables, other people's packages.
_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SKIP |= {"lib2to3", "pydoc_data", "encodings", "config", "turtledemo", "lib-dynload"}

#: One user or assistant turn is ``<|user|>…<|end|>`` or ``<|assistant|>…<|end|>``.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]


@dataclass(frozen=True)
class Lesson:
    """Where :func:`prepare` put things.

    Attributes
    ----------
    model : Path
        Hugging Face folder: ``config.json``, ``model.safetensors``, tokenizer.
    train_text, eval_text : Path
        ``.jsonl`` of ``{"text"}`` rows, one source file a row; no file is in both.
    train_pairs, eval_pairs : Path
        ``.jsonl`` of ``{"messages"}`` rows; no file's functions are in both.
    parameters : int
        Number of weights in the model.
    """

    model: Path
    train_text: Path
    eval_text: Path
    train_pairs: Path
    eval_pairs: Path
    parameters: int


def source_files(root: Path | None = None) -> list[Path]:
    """Python files of the standard library, sorted by their path.

    Parameters
    ----------
    root : Path, optional
        Folder to read instead of the running interpreter's standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    found = (path for path in root.rglob("*.py") if not _SKIP & set(path.relative_to(root).parts))
    return sorted(path for path in found if not path.name.startswith("test_"))


def _held_out(path: Path, root: Path) -> bool:
    """One file in twenty, chosen by its name so that every run holds out the same."""
    digest = hashlib.blake2b(path.relative_to(root).as_posix().encode(), digest_size=2).digest()
    return int.from_bytes(digest, "big") % 20 == 0


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return f"def {node.name}({ast.unparse(node.args)}){returns}"


def pairs(source: str) -> Iterator[tuple[str, str]]:
    """Yield (signature, first sentence of the docstring) of each documented function.

    Nothing is yielded for a source that does not parse: the library ships a few on purpose.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if not doc:
                continue
            first = " ".join(doc.split("\n\n")[0].split())
            signature = _signature(node)
            if 8 <= len(first) <= 200 and len(signature) <= 200:
                yield signature, first


def ask(signature: str) -> str:
    """The text of a chat prompt for one signature, ready to be continued by the assistant."""
    return f"<|user|>What does this do?\n{signature}<|end|><|assistant|>"


def _train_tokenizer(texts: list[str], vocabulary: int, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": _SPECIAL[1:],
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")


def write_model(
    folder: Path,
    *,
    vocabulary: int = 4096,
    hidden: int = 256,
    layers: int = 8,
    heads: int = 8,
    kv_heads: int = 4,
    intermediate: int = 704,
    positions: int = 1024,
    seed: int = 0,
) -> int:
    """Write a Llama with random weights as a Hugging Face folder and return its size.

    Weights are normal with standard deviation 0.02, those that write into the residual stream
    smaller by ``sqrt(2 * layers)`` (GPT-2's initialisation); norms are one.

    Returns
    -------
    int
        Number of parameters.
    """
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    head_dim = hidden // heads

    def normal(rows: int, cols: int, scale: float = 0.02) -> np.ndarray:
        return (rng.standard_normal((rows, cols), dtype=np.float32) * scale).astype(np.float32)

    residual = 0.02 / (2 * layers) ** 0.5
    weights: dict[str, np.ndarray] = {"model.embed_tokens.weight": normal(vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        weights |= {
            at + "input_layernorm.weight": np.ones(hidden, np.float32),
            at + "self_attn.q_proj.weight": normal(heads * head_dim, hidden),
            at + "self_attn.k_proj.weight": normal(kv_heads * head_dim, hidden),
            at + "self_attn.v_proj.weight": normal(kv_heads * head_dim, hidden),
            at + "self_attn.o_proj.weight": normal(hidden, heads * head_dim, residual),
            at + "post_attention_layernorm.weight": np.ones(hidden, np.float32),
            at + "mlp.gate_proj.weight": normal(intermediate, hidden),
            at + "mlp.up_proj.weight": normal(intermediate, hidden),
            at + "mlp.down_proj.weight": normal(hidden, intermediate, residual),
        }
    weights["model.norm.weight"] = np.ones(hidden, np.float32)
    weights["lm_head.weight"] = normal(vocabulary, hidden)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": [_SPECIAL.index("<|endoftext|>"), _SPECIAL.index("<|end|>")],
        "pad_token_id": _SPECIAL.index("<|endoftext|>"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    return sum(weight.size for weight in weights.values())


def _write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _chat(signature: str, doc: str) -> dict[str, object]:
    user = {"role": "user", "content": f"What does this do?\n{signature}"}
    return {"messages": [user, {"role": "assistant", "content": doc}]}


def prepare(
    folder: str | Path = "stdlib-lesson",
    *,
    root: Path | None = None,
    vocabulary: int = 4096,
    max_bytes: int = 6_000_000,
    eval_rows: int = 96,
    seed: int = 0,
) -> Lesson:
    """Write the whole lesson into a folder; what is already there is used again.

    Parameters
    ----------
    folder : str or Path
        Where to write.
    root : Path, optional
        Sources to read instead of the running interpreter's standard library.
    vocabulary : int
        Entries of the tokenizer and of the model's embedding.
    max_bytes : int
        Training text is cut off after so many bytes (files in a seeded random order).
    eval_rows : int
        Rows kept of each held-out set, so that an evaluation takes a second or two.
    seed : int
        For the order of files and the model's random weights.

    Returns
    -------
    Lesson

    Raises
    ------
    FileNotFoundError
        There are no Python sources.
    """
    folder = Path(folder).resolve()
    lesson_file = folder / "lesson.json"
    library = Path(sysconfig.get_paths()["stdlib"]) if root is None else Path(root)
    made_from = {"python": sysconfig.get_python_version(), "root": str(library), "seed": seed}
    made_from |= {"vocabulary": vocabulary, "max_bytes": max_bytes, "eval_rows": eval_rows}
    model = folder / "model"
    names = ("train_text", "eval_text", "train_pairs", "eval_pairs")
    files = {name: folder / f"{name.replace('_', '-')}.jsonl" for name in names}
    if lesson_file.is_file():
        known = json.loads(lesson_file.read_text("utf-8"))
        if known.get("made_from") == made_from:
            return Lesson(model=model, parameters=int(known["parameters"]), **files)

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = source_files(library)
    if not paths:
        raise FileNotFoundError(
            f"no Python sources under {library}: is the standard library zipped?"
        )
    texts: dict[str, list[dict[str, object]]] = {"train": [], "eval": []}
    chats: dict[str, list[dict[str, object]]] = {"train": [], "eval": []}
    sources: list[str] = []
    taken = 0
    for index in rng.permutation(len(paths)):
        path = paths[int(index)]
        source = path.read_text("utf-8", errors="replace")
        kind = "eval" if _held_out(path, library) else "train"
        chats[kind] += [_chat(*pair) for pair in pairs(source)]
        if kind == "eval":
            # The head of a file is mostly licence and imports; keep a bite of each file's middle.
            middle = len(source) // 2
            texts[kind].append({"text": source[middle : middle + 1500]})
        elif taken < max_bytes:
            taken += len(source)
            sources.append(source)
            texts[kind].append({"text": source})
    for name, rows in texts.items():
        _write_rows(files[f"{name}_text"], rows if name == "train" else rows[:eval_rows])
    for name, rows in chats.items():
        order = rng.permutation(len(rows))
        rows = [rows[int(i)] for i in order]
        _write_rows(files[f"{name}_pairs"], rows if name == "train" else rows[:eval_rows])

    model.mkdir(exist_ok=True)
    _train_tokenizer(sources, vocabulary, model)
    parameters = write_model(model, vocabulary=vocabulary, seed=seed)
    lesson_file.write_text(json.dumps({"made_from": made_from, "parameters": parameters}), "utf-8")
    return Lesson(model=model, parameters=parameters, **files)
