"""What rows become: the first few of them as the model will see them, learned tokens marked."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantheraml import hub
from pantheraml.config import Settings
from pantheraml.data import tokenise
from pantheraml.data.handover import Data, GivenFile, look_at
from pantheraml.data.long_text import PIECE
from pantheraml.data.readers import text_pieces
from pantheraml.data.rows import Row, kind_of, same_kind
from pantheraml.data.shard import IGNORE
from pantheraml.errors import InvalidError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

#: Characters of a row that are shown; the rest is counted.
SHOWN = 2000

_BEFORE = 32  # tokens that a part's first ones are decoded with: some depend on what is before
_STYLES = {"learned": "bold green", "context": "dim", "cut": "strike dim"}
_CSS = {
    "learned": "background:#2da44e33;border-bottom:2px solid #2da44e",
    "context": "opacity:.65",
    "cut": "opacity:.5;text-decoration:line-through",
}


@dataclass(frozen=True)
class Part:
    """Tokens next to each other that are alike.

    Attributes
    ----------
    text
        What they say.
    kind
        ``learned``, ``context`` (seen, not learned), or ``cut`` (beyond `max_length`).
    tokens
        How many they are.
    """

    text: str
    kind: str
    tokens: int


@dataclass(frozen=True)
class PreviewRow:
    """One row: where it is from, its ids and labels, its parts."""

    where: str
    input_ids: list[int]
    labels: list[int]
    parts: list[Part]

    @property
    def learned(self) -> int:
        """Tokens that are learned."""
        return sum(part.tokens for part in self.parts if part.kind == "learned")

    @property
    def cut(self) -> int:
        """Tokens beyond `max_length`."""
        return sum(part.tokens for part in self.parts if part.kind == "cut")

    @property
    def heading(self) -> str:
        """Place and counts in one line."""
        cut = f", {self.cut:,} of them beyond max_length" if self.cut else ""
        return f"{self.where}: {len(self.input_ids):,} tokens, {self.learned:,} learned{cut}"


@dataclass(frozen=True)
class Preview:
    """Rows as they will be learned from; shows itself in a notebook, a terminal, or as text.

    Attributes
    ----------
    rows
        The rows.
    kind
        ``text``, ``prompt_completion``, ``messages`` or ``tokens``.
    note
        What is done with rows longer than `max_length`.
    """

    rows: list[PreviewRow]
    kind: str
    note: str

    def __repr__(self) -> str:
        """Plain text: learned text stands in ⟦brackets⟧."""
        lines = []
        for row in self.rows:
            shown = (_marked(part) for part in _shortened(row.parts))
            lines.append(f"{row.heading}\n{''.join(shown)}\n")
        return "\n".join([*lines, self.note])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Colours, where the terminal has them."""
        from rich.text import Text

        for row in self.rows:
            yield Text(row.heading, style="bold")
            if console.color_system is None:
                yield Text("".join(_marked(part) for part in _shortened(row.parts)) + "\n")
                continue
            text = Text()
            for part in _shortened(row.parts):
                text.append(_printable(part.text), _STYLES[part.kind])
            yield text.append("\n")
        yield Text(self.note, style="dim")

    def _repr_html_(self) -> str:
        """Text from the data is set as text: every character that HTML knows is escaped."""
        rows = []
        for row in self.rows:
            spans = "".join(
                f'<span class="pml-{part.kind}" style="{_CSS[part.kind]}">'
                f"{html.escape(_printable(part.text))}</span>"
                for part in _shortened(row.parts)
            )
            rows.append(
                f'<figure style="margin:0 0 1em"><figcaption><b>{html.escape(row.heading)}</b>'
                f'</figcaption><pre style="white-space:pre-wrap;margin:.3em 0">{spans}</pre>'
                "</figure>"
            )
        legend = "".join(f'<span style="{style}">{kind}</span> ' for kind, style in _CSS.items())
        return (
            f'<div class="pml-preview">{"".join(rows)}'
            f"<small>{legend}· {html.escape(self.note)}</small></div>"
        )


def preview(data: Data, model: str | os.PathLike[str], rows: int, chosen: Settings) -> Preview:
    """Do what :func:`pantheraml.preview` says.

    Raises
    ------
    InvalidError
        `rows` is no number from 1 on, or the data has no rows.
    """
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise InvalidError(f"rows must be a number from 1 on, it is {rows!r}")
    given = look_at(data)
    options = chosen.data_options(held_out=False)
    chosen.resolve(1 << 20)  # what is wrong with them comes before a download
    path = hub.resolve(model)
    folder = tokenise.load_model_folder(
        path, options.get("chat_template"), options.get("chat_template_kwargs")
    )
    max_length = chosen.resolve(_positions(path))["max_length"]
    if isinstance(given, GivenFile) and given.source.format == "txt":
        return _of_text(given.source.path, folder, rows, max_length)
    found = list(islice(given.rows(), rows))
    if not found:
        raise InvalidError(f"{given.name}: there are no rows in it")
    kind = kind_of(found[0])
    for row in found:
        same_kind(row, kind)
    made = tokenise.Tokeniser(folder, kind).batch(found)
    policy = chosen.overlong or ("split" if kind == "text" and chosen.packing else "cut")
    edge = max_length if policy in ("cut", "drop", "refuse") else None
    done = {
        "cut": "lose their end", "drop": "are left out", "refuse": "end the preparation",
        "split": "are made into several rows",
    }[policy]  # fmt: skip
    note = f"rows longer than max_length={max_length:,} {done}"
    shown = [_row(_place(row), folder, ids, labels, edge) for row, (ids, labels) in made]
    return Preview(shown, kind, note)


def _positions(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = config.get("max_position_embeddings")
    return found if isinstance(found, int) and found > 1 else 1 << 20


def _of_text(path: Path, model: tokenise.ModelFolder, rows: int, max_length: int) -> Preview:
    ids: list[int] = []
    for part in tokenise.long_text(model, (text for text, _ in text_pieces(path, PIECE))):
        ids += part.tolist()
        if len(ids) > rows * max_length:
            break
    pieces = [ids[at : at + max_length] for at in range(0, len(ids), max_length)][:rows]
    shown = [_row(f"{path}, row {i + 1}", model, ids, ids, None) for i, ids in enumerate(pieces)]
    return Preview(shown, "text", f"one text, cut into rows of max_length={max_length:,} tokens")


def _row(
    where: str, model: tokenise.ModelFolder, ids: Any, labels: Any, edge: int | None
) -> PreviewRow:
    ids, labels = list(map(int, ids)), list(map(int, labels))
    kinds = []
    for at, label in enumerate(labels):
        # A row's first token has nothing before it to be predicted from.
        learned = "learned" if label != IGNORE and at > 0 else "context"
        kinds.append("cut" if edge is not None and at >= edge else learned)
    parts = []
    begin = 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and kinds[end] == kinds[begin]:
            continue
        first = max(0, begin - _BEFORE)
        said = _decoded(model, ids[first:begin])
        text = _decoded(model, ids[first:end])[len(said) :]
        parts.append(Part(text, kinds[begin], end - begin))
        begin = end
    return PreviewRow(where, ids, labels, parts)


def _decoded(model: tokenise.ModelFolder, ids: list[int]) -> str:
    if model.tokenizer is None:
        return "".join(f"{i} " for i in ids)
    return str(model.tokenizer.decode(ids, skip_special_tokens=False))


def _place(row: Row) -> str:
    return row.source.where(row.index)


def _shortened(parts: list[Part]) -> list[Part]:
    """Parts with at most SHOWN characters; from what is longer the middle is left out."""
    total = sum(len(part.text) for part in parts)
    shown = []
    for part in parts:
        room = max(80, SHOWN * len(part.text) // max(1, total))
        text = part.text
        if total > SHOWN and len(text) > room:
            left_out = len(text) - room
            text = f"{text[: room // 2]} … {left_out:,} characters … {text[-room // 2 :]}"
        shown.append(Part(text, part.kind, part.tokens))
    return shown


def _marked(part: Part) -> str:
    text = _printable(part.text)
    return {"learned": f"⟦{text}⟧", "cut": f"⟨cut: {text}⟩"}.get(part.kind, text)


def _printable(text: str) -> str:
    """Show what steers a terminal instead of sending it there."""
    return "".join(
        c if c == "\n" or c == "\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text
    )
