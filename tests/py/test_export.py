"""Exports: what is in them, whole or not there, and never over anything."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import chain, starmap
from pathlib import Path
from typing import Any

import numpy as np
import pantheraml as pm
import pytest
from conftest import PATIENCE, until
from pantheraml import _native, gguf
from pantheraml.tiny import TinyLlama
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

Start = Callable[..., pm.Run]


@pytest.fixture
def trained(start: Start) -> pm.Run:
    return start(max_steps=8, learning_rate=5e-3).wait(PATIENCE)


def test_merged_is_base_plus_adapter(trained: pm.Run, model: Path, tmp_path: Path) -> None:
    out = trained.export(tmp_path / "merged", "merged")
    assert out.difference is not None and out.difference <= 1e-5
    assert out.same_top == out.tokens == 24 and out.step == 8 and out.format == "merged"
    base, made = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    adapter = load_file(trained.export(tmp_path / "peft") / "adapter_model.safetensors")
    assert set(made) == set(base)
    for name, weight in base.items():
        module = "base_model.model." + name.removesuffix(".weight")
        want = weight.astype(np.float64)
        if module + ".lora_A.weight" in adapter:
            a, b = (adapter[f"{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
            want = want + b @ a  # r = lora_alpha = 16
            assert np.abs(made[name] - weight).max() > 0
        assert np.abs(made[name] - want).max() <= 1e-7 * max(1, np.abs(want).max()), name
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    prompt = "3 plus 4 is "
    again = pm.finetune(out, [{"text": "a b"}], max_steps=1, learning_rate=0.0, max_length=64)
    assert (
        again.wait(PATIENCE).sample(prompt, max_new_tokens=24).token_ids
        == trained.sample(prompt, max_new_tokens=24).token_ids
    )


@pytest.mark.parametrize("what", ["adapter_config.json", "adapter_model.safetensors", "", ".."])
def test_no_link_is_followed(trained: pm.Run, tmp_path: Path, what: str) -> None:
    """In a folder from somebody else it would bring a file of ours to whoever gets the export."""
    checkpoint = trained.checkpoints[-1].path
    path = Path(os.path.normpath(checkpoint / what))
    path.rename(tmp_path / "secret")
    path.symlink_to(tmp_path / "secret")
    for format in ("peft", "merged", "gguf"):
        with pytest.raises(pm.DeniedError, match=rf"{path.name}.* is a link, which is not"):
            trained.export(tmp_path / "out", format)
        assert {path.name for path in tmp_path.iterdir()} <= {"secret", "runs"}


def test_the_log_tells_of_it(trained: pm.Run, tmp_path: Path) -> None:
    out = trained.export(tmp_path / "out")
    until(lambda: any(e["type"] == "export" for e in trained.events()), "the event")
    event = next(e for e in trained.events() if e["type"] == "export")
    assert event["path"] == str(out) and event["difference"] == 0.0 and event["format"] == "peft"


def test_shards_and_types(trained: pm.Run, tmp_path: Path) -> None:
    whole = load_file(trained.export(tmp_path / "one", "merged") / "model.safetensors")
    out = trained.export(tmp_path / "many", "merged", dtype="float16", max_shard_size="80kB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    found = {name: tensor for file in files for name, tensor in load_file(out / file).items()}
    assert all(name in load_file(out / file) for name, file in index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"
    moved = 0.0
    for name, tensor in whole.items():
        assert np.array_equal(found[name], tensor.astype(np.float16)), name
        moved = max(moved, float(np.abs(tensor.astype(np.float16) - tensor).max()))
    assert out.rounding is not None and 0 < out.rounding <= moved
    assert len(out.notes) == 1 and "rounded to float16" in out.notes[0]


def test_bfloat16_stays_bfloat16(start: Start, tmp_path: Path) -> None:
    """The original's type is kept, and a tensor that was not trained keeps its bits."""
    folder = TinyLlama().write(tmp_path / "half")
    tensors = {name: t.astype(np.float16) for name, t in TinyLlama().tensors().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    run = start(model=folder, max_steps=4, learning_rate=5e-3).wait(PATIENCE)
    out = run.export(tmp_path / "out", "merged")
    assert any("additional_chat_templates" in note for note in out.notes)  # and is not copied
    made = load_file(out / "model.safetensors")
    assert {t.dtype for t in made.values()} == {np.dtype(np.float16)} and out.dtype == "float16"
    assert np.array_equal(made["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert out.difference is not None and 1e-7 < out.difference < 1e-2


def test_an_empty_tensor_in_the_folder(model: Path, runs: Path, tmp_path: Path) -> None:
    """One that came into the model's folder after the run is refused by name."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    run = pm.finetune(folder, [{"text": "a b"}], max_steps=1, max_length=64).wait(PATIENCE)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"nothing": np.zeros(0, np.float32)}, folder / "model.safetensors")
    for format in ("merged", "gguf"):
        with pytest.raises(pm.Error, match="'nothing' is empty; take it out"):
            run.export(tmp_path / format, format)


def test_nothing_is_written_over(trained: pm.Run, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    for format in ("peft", "merged", "gguf"):
        with pytest.raises(pm.BusyError, match="there already"):
            trained.export(taken, format)
    assert [p.name for p in taken.iterdir()] == ["mine.txt"]
    file = tmp_path / "mine.gguf"
    file.write_text("mine")
    with pytest.raises(pm.BusyError, match="there already"):
        trained.export(file, "gguf")
    assert file.read_text() == "mine"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (trained.export(empty, "merged") / "config.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize("format", ["peft", "merged", "gguf"])
def test_weights_that_changed_meanwhile_are_told(
    format: str, start: Start, model: Path, tmp_path: Path
) -> None:
    """Merged into other weights than were trained over it is another model, and reads back well."""
    mine = shutil.copytree(model, tmp_path / "mine")
    run = start(model=mine, max_steps=2).wait(PATIENCE)
    (mine / "model.safetensors").touch()
    assert run.export(tmp_path / "same", format).notes == ()
    weights = load_file(mine / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 0.01
    save_file(weights, mine / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"mine has changed since this was trained"):
        out = run.export(tmp_path / "other", format)
    assert "has changed since this was trained" in out.notes[0] and "note: " in out.describe()


def test_a_cell_that_exports_can_be_run_again(trained: pm.Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = trained.export(out, "peft", verify=False)
    kept = sorted(p.name for p in first.iterdir())
    (out / "adapter_model.safetensors").chmod(0o600)  # what the next one writes is its own
    again = trained.export(out, "peft", verify=False)
    assert sorted(p.name for p in again.iterdir()) == kept
    assert trained.export(out, "merged", verify=False) == out  # also one of another kind
    assert not (out / "adapter_model.safetensors").exists() and (out / "config.json").is_file()
    file = tmp_path / "out.gguf"
    assert trained.export(file, "gguf", verify=False) == trained.export(file, "gguf", verify=False)
    assert {p.name for p in tmp_path.iterdir()} - {"runs"} == {"out", "out.gguf"}

    (out / "README.md").write_text("mine")
    with pytest.raises(pm.BusyError, match="there already"):
        trained.export(out, "merged", verify=False)
    (out / "README.md").unlink()
    (out / "config.json").write_text("{}")
    with pytest.raises(pm.BusyError, match="there already"):
        trained.export(out, "merged", verify=False)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(pm.BusyError, match="there already"):
        trained.export(tmp_path / "link", "merged", verify=False)
    with pytest.raises(pm.IOFailed, match="cannot be written to"):
        trained.export("/proc/none/out", verify=False)
    with pytest.raises(pm.IOFailed, match="File name too long"):
        trained.export(tmp_path / ("x" * 300), verify=False)


def test_bad_words(trained: pm.Run, tmp_path: Path) -> None:
    for format, dtype in (("merged", "q8_0"), ("gguf", "float32"), ("peft", "bfloat16")):
        with pytest.raises(pm.InvalidError, match="dtype"):
            trained.export(tmp_path / "no", format, dtype=dtype)
    with pytest.raises(pm.InvalidError, match="format"):
        trained.export(tmp_path / "no", "onnx")
    with pytest.raises(pm.InvalidError, match="max_shard_size"):
        trained.export(tmp_path / "no", "merged", max_shard_size="much")
    assert not (tmp_path / "no").exists()


LIMITED = """
import resource, signal, sys
import pantheraml as pm
run = pm.attach(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for format in ("merged", "gguf"):
    try:
        run.export(sys.argv[2], format)
    except pm.Error as error:
        print(error)
"""


def test_a_full_disk_leaves_nothing(trained: pm.Run, tmp_path: Path) -> None:
    """A file-size limit fails a write in its middle, as a full disk does."""
    folder = tmp_path / "full"
    folder.mkdir()
    child = subprocess.run(
        [sys.executable, "-P", "-c", LIMITED, str(trained.folder), str(folder / "out")],
        capture_output=True, text=True, check=True, env={**os.environ},
    )  # fmt: skip
    lines = child.stdout.splitlines()
    assert len(lines) == 2 and all("cannot write" in line for line in lines), child
    assert list(folder.iterdir()) == []


MASKED = """
import builtins, io, os, sys
from pathlib import Path
import pantheraml as pm
opened = io.open
def without_proc(file, *rest, **named):
    if str(file).startswith("/proc/self/status"):
        raise FileNotFoundError(file)
    return opened(file, *rest, **named)
def nobody_sets_it(mask):
    raise AssertionError("the umask is every thread's")
os.umask(int(sys.argv[3], 8))
io.open = builtins.open = without_proc
os.umask = nobody_sets_it
run = pm.attach(sys.argv[1])
for out in (run.export(sys.argv[2] + "/peft"), run.export(sys.argv[2] + "/one.gguf", "gguf")):
    for path in (out, *(out.iterdir() if out.is_dir() else ())):
        print(path.name, oct(path.stat().st_mode & 0o777))
"""


@pytest.mark.parametrize("form", ["merged", "gguf"])
def test_ctrl_c_is_heard_while_weights_are_written(
    trained: pm.Run, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when the call has begun: nothing of Python runs between it and the first piece."""
    interrupt = partial(ctypes.CDLL(None)["raise"], signal.SIGINT)
    written: list[int] = []

    def in_the_midst(write: Callable[..., Any]) -> Callable[..., Any]:
        def begun(*arguments: Any) -> Any:
            try:  # the last of what is chained interrupts, and adds nothing
                return write(*chain(arguments, iter(interrupt, 0)))
            finally:
                beside = Path(arguments[2])
                found = beside.parent if form == "gguf" else beside
                written.append(sum(file.stat().st_size for file in found.iterdir()))

        return begun

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            for name in ("merge", "gguf"):
                patch.setattr(_native, name, in_the_midst(getattr(_native, name)))
            with pytest.raises(KeyboardInterrupt):
                trained.export(tmp_path / "out", form)
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(tmp_path.glob("*out*")) == []  # what was begun is gone
    assert len(written) == 1 and written[0] < trained.export(tmp_path / "out", form).bytes / 2


@pytest.mark.parametrize("form", ["peft", "merged", "gguf"])
def test_ctrl_c_is_heard_while_an_export_is_read_back(
    trained: pm.Run, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when the call has begun, which ends of it and not when all has been compared."""
    interrupt = partial(ctypes.CDLL(None)["raise"], signal.SIGINT)
    compare, compared = _native.compare_export, []

    def interrupted(*arguments: Any) -> Any:
        # Nothing of Python runs between the two, nor before what comes back is in the list.
        compared.extend(starmap(compare, chain(iter(interrupt, 0), [arguments])))
        raise AssertionError("it was not heard at all")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(_native, "compare_export", interrupted)
            with pytest.raises(KeyboardInterrupt):
                trained.export(tmp_path / "out", form)
    finally:
        signal.signal(signal.SIGINT, before)
    assert compared == [] and list(tmp_path.glob("*out*")) == []  # what was begun is gone
    trained.export(tmp_path / "out", form)
    assert list(tmp_path.glob("*out*")) != []


@pytest.mark.parametrize(("mask", "folder", "file"), [("027", 0o750, 0o640), ("077", 0o700, 0o600)])
def test_modes_are_the_umask_s(
    trained: pm.Run, tmp_path: Path, mask: str, folder: int, file: int
) -> None:
    """Also where there is no /proc to ask, and without setting it."""
    child = subprocess.run(
        [sys.executable, "-P", "-c", MASKED, str(trained.folder), str(tmp_path), mask],
        capture_output=True, text=True, check=True, env={**os.environ},
    )  # fmt: skip
    modes = dict(line.split() for line in child.stdout.splitlines())
    assert len(modes) >= 4 and modes.pop("peft") == oct(folder)
    assert set(modes.values()) == {oct(file)}, modes


# ---- GGUF ------------------------------------------------------------------------------------


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, list[int], bytes]]]:
    """Read a file by the format's description alone: pairs, and type, sizes, bytes of tensors."""
    data = path.read_bytes()
    at = 0

    def number(form: str) -> Any:
        nonlocal at
        at += struct.calcsize(form)
        return struct.unpack_from("<" + form, data, at - struct.calcsize(form))[0]

    def text() -> str:
        nonlocal at
        n = number("Q")
        at += n
        return data[at - n : at].decode()

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind == 9:
            inner, count = number("I"), number("Q")
            return [value(inner) for _ in range(count)]
        return number({4: "I", 5: "i", 6: "f", 7: "?", 10: "Q"}[kind])

    assert data[:4] == b"GGUF"
    at = 4
    assert number("I") == 3
    tensors, count = number("Q"), number("Q")
    pairs = {}
    for _ in range(count):
        key = text()
        pairs[key] = value(number("I"))
    records = []
    for _ in range(tensors):
        name, dims = text(), number("I")
        sizes = [number("Q") for _ in range(dims)]
        records.append((name, sizes, number("I"), number("Q")))
    begin = (at + 31) // 32 * 32
    found = {}
    for name, sizes, kind, offset in records:
        n = int(np.prod(sizes))
        size = {0: 4 * n, 1: 2 * n, 30: 2 * n, 8: n // 32 * 34}[kind]
        assert offset % 32 == 0 and begin + offset + size <= len(data)
        found[name] = (kind, sizes, data[begin + offset : begin + offset + size])
    return pairs, found


def test_gguf_by_the_format_s_description(trained: pm.Run, model: Path, tmp_path: Path) -> None:
    merged = load_file(trained.export(tmp_path / "merged", "merged") / "model.safetensors")
    out = trained.export(tmp_path / "a.gguf", "gguf", dtype="f32")
    assert out.difference is not None and out.difference <= 1e-5
    pairs, tensors = read_gguf(out)
    assert pairs["general.architecture"] == "llama" and pairs["llama.block_count"] == 2
    assert pairs["llama.attention.head_count_kv"] == 2 and pairs["llama.context_length"] == 256
    assert pairs["tokenizer.ggml.model"] == "gpt2" and pairs["tokenizer.ggml.pre"] == "gpt-2"
    assert len(pairs["tokenizer.ggml.tokens"]) == 272
    assert pairs["tokenizer.ggml.eos_token_id"] == 256
    assert "im_start" in pairs["tokenizer.chat_template"]
    assert len(tensors) == len(merged)
    q = np.frombuffer(tensors["blk.1.attn_q.weight"][2], np.float32).reshape(64, 64)
    want = merged["model.layers.1.self_attn.q_proj.weight"]
    assert np.array_equal(q, want.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64))
    down = tensors["blk.0.ffn_down.weight"]
    assert down[1] == [128, 64]  # innermost first
    assert down[2] == merged["model.layers.0.mlp.down_proj.weight"].tobytes()


@pytest.mark.parametrize(("dtype", "limit"), [("f16", 2e-3), ("bf16", 1e-2), ("q8_0", 5e-2)])
def test_gguf_types(trained: pm.Run, tmp_path: Path, dtype: str, limit: float) -> None:
    whole = read_gguf(trained.export(tmp_path / "f32.gguf", "gguf", dtype="f32"))[1]
    out = trained.export(tmp_path / "out", "gguf", dtype=dtype)
    assert out == tmp_path / "out" / "model.gguf"
    assert out.difference is not None and out.difference <= limit
    found = read_gguf(out)[1]
    kinds = {"f16": 1, "bf16": 30, "q8_0": 8}
    for name, (kind, sizes, data) in found.items():
        assert kind == (kinds[dtype] if len(sizes) == 2 else 0), name
        exact = np.frombuffer(whole[name][2], np.float32)
        if kind == 1:
            assert np.array_equal(np.frombuffer(data, np.float16), exact.astype(np.float16))
        if kind == 8:
            blocks = np.frombuffer(data, np.dtype([("d", "<f2"), ("q", "i1", 32)]))
            scale = np.abs(exact.reshape(-1, 32)).max(1) / np.float32(127)
            assert np.array_equal(blocks["d"], scale.astype(np.float16))
            back = blocks["q"] * scale[:, None]
            assert (np.abs(back - exact.reshape(-1, 32)) <= scale[:, None] * 0.5001).all()


def sentencepiece(folder: Path) -> None:
    """A tokenizer as SentencePiece's BPE is converted: byte fallback, a space before the text."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words += ["\u2581", "a", "b", "ab", "\u2581ab"]
    vocab = {word: i for i, word in enumerate(words)}
    made = models.BPE(
        vocab=vocab, merges=[("a", "b"), ("\u2581", "ab")], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(made)
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in words[:3]])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_sentencepiece_scores(tmp_path: Path) -> None:
    sentencepiece(tmp_path)
    found = {pair["key"]: pair["value"] for pair in gguf.pairs(tmp_path, "x", 270)}
    assert found["tokenizer.ggml.model"] == "llama"
    tokens, scores = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"]
    types = found["tokenizer.ggml.token_type"]
    assert scores[tokens.index("ab")] == 0.0 and scores[tokens.index("\u2581ab")] == -1.0
    assert types[:4] == [3, 3, 3, 6] and types[-1] == 5 and len(tokens) == 270
    assert found["tokenizer.ggml.add_space_prefix"] is True


@pytest.mark.parametrize(
    ("splitter", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
            "smollm",
        ),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.Whitespace(), None),
    ],
)
def test_splits_have_names(tmp_path: Path, splitter: Any, name: str | None) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.pre_tokenizer = splitter
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    if name is None:
        with pytest.raises(NotImplementedError, match="pre_tokenizer"):
            gguf.pairs(tmp_path, "x", 8)
        return
    found = {pair["key"]: pair["value"] for pair in gguf.pairs(tmp_path, "x", 8)}
    assert found["tokenizer.ggml.pre"] == name


def test_other_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    Tokenizer(models.Unigram([("a", -1.0)], 0, False)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(NotImplementedError, match="Unigram"):
        gguf.pairs(tmp_path, "x", 8)


def test_nf4_says_what_merging_means(start: Start, tmp_path: Path) -> None:
    run = start(max_steps=2, quant="nf4").wait(PATIENCE)
    out = run.export(tmp_path / "merged", "merged")
    assert any("NF4" in note for note in out.notes)
    assert out.difference is not None and out.difference > 1e-4
    exact = run.export(tmp_path / "peft")
    assert exact.difference == 0


FIXTURES = Path(__file__).parent.parent / "parity" / "fixtures"


@pytest.mark.parametrize("case", ["qwen3-mixed-lora", "qwen2-nf4-lora"])
def test_heads_that_were_tied_and_weights_stored_as_nf4(
    case: str, runs: Path, tmp_path: Path
) -> None:
    """A head that training took apart from the table is written; stored NF4 is dequantised."""
    folder = FIXTURES / case
    rows = [{"input_ids": list(range(3, 20 + i))} for i in range(4)]
    quant = "nf4" if "nf4" in case else None
    run = pm.finetune(
        folder / "model", data=rows, lora=pm.LoRA(init=folder / "adapter"), quant=quant,
        max_steps=2, learning_rate=1e-2, packing=False, max_length=32,
    ).wait(PATIENCE)  # fmt: skip
    merged = run.export(tmp_path / "merged", "merged", dtype="float32")
    assert merged.difference is not None and merged.difference <= 1e-5
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] == ("nf4" in case)
    tensors = load_file(merged / "model.safetensors")
    assert ("lm_head.weight" in tensors) != config["tie_word_embeddings"]
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())
    made = run.export(tmp_path / "model.gguf", "gguf", dtype="f32")
    assert made.difference is not None and made.difference <= 1e-5
    # Another run trains what was written, as any folder, and starts where this one stood.
    again = pm.finetune(
        merged, data=rows, eval_data=rows, max_steps=1, learning_rate=0.0, packing=False
    ).wait(PATIENCE)
    assert (
        again.sample(input_ids=[5, 9, 11], max_new_tokens=8).token_ids
        == run.sample(input_ids=[5, 9, 11], max_new_tokens=8).token_ids
    )
