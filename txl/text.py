"""Between tokens and what people read: text as it comes, and its words."""
from __future__ import annotations

import codecs
import re
from collections.abc import Iterable

import numpy as np

from txl.vocab import Vocab, WordVocab


def words(vocab: Vocab, text: str) -> list[tuple[str, list[int]]]:
    """The words of a text and the tokens of each; these, one after the other, are the tokens of the text.

    Where tokens are words, a line's end is one too; elsewhere a word has the space before it, as byte pairs do.
    """
    pattern = r"\n|\S+" if isinstance(vocab, WordVocab) else r"[ \t\r\n]*[^ \t\r\n]+|[ \t\r\n]+"
    return [(word, vocab.encode(word)) for word in re.findall(pattern, text)]


def unknown(vocab: Vocab, scored: Iterable[tuple[str, list[int]]]) -> list[str]:
    """The words that the vocabulary has only <unk> for, each once."""
    unk = vocab.unk if isinstance(vocab, WordVocab) else None
    return list(dict.fromkeys(word for word, ids in scored
                              if unk is not None and ids == [unk] and word.lower() != "<unk>"))


def count_words(vocab: Vocab, ids: np.ndarray) -> int:
    """Words and ends of lines of a text: the tokens it has where tokens are words, whatever the vocabulary."""
    if isinstance(vocab, WordVocab):
        return len(ids) - (int((ids == vocab.start).sum()) // 2 if vocab.double else 0)
    chunks = (b"".join(vocab.piece(i) for i in ids[first:first + 65536].tolist())
              for first in range(0, len(ids), 65536))
    count, last = 0, "\n"
    for text in codecs.iterdecode(chunks, "utf-8", "replace"):
        goes_on = not last.isspace() and not text[0].isspace()
        count, last = count + len(text.split()) + text.count("\n") - goes_on, text[-1]
    return count + (last != "\n")
