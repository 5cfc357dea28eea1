"""Between tokens and what people read: text as it comes, and its words."""
from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence

import numpy as np

from txl.vocab import Vocab, WordVocab


def words(vocab: Vocab, text: str) -> list[tuple[str, list[int]]]:
    """The words of a text and the tokens of each; these, one after the other, are the tokens of the text.

    Where tokens are words, a line's end is one too; elsewhere a word has the space before it, as byte pairs do.
    """
    pattern = r"\n|\S+" if isinstance(vocab, WordVocab) else r"[ \t\r\n]*[^ \t\r\n]+|[ \t\r\n]+"
    return [(word, vocab.encode(word)) for word in re.findall(pattern, text)]


def unknown(vocab: Vocab, scored: Iterable[tuple[str, list[int]]]) -> list[str]:
    """The words that hold something for which the vocabulary has only <unk> (or U+FFFD), each once."""
    return list(dict.fromkeys(word.strip() for word, ids in scored if vocab.unk is not None and vocab.unk in ids
                              and word.lower() != "<unk>" and "\ufffd" not in word))


def count_words(vocab: Vocab, ids: np.ndarray) -> int:
    """Words and ends of lines of a text: the tokens it has where tokens are words, whatever the vocabulary."""
    if isinstance(vocab, WordVocab):
        return len(ids)
    chunks = (b"".join(vocab.piece(i) for i in ids[first:first + 65536].tolist())
              for first in range(0, len(ids), 65536))
    count, last = 0, "\n"
    for text in codecs.iterdecode(chunks, "utf-8", "replace"):
        goes_on = not last.isspace() and not text[0].isspace()
        count, last = count + len(text.split()) + text.count("\n") - goes_on, text[-1]
    return count + (last != "\n")


class TextStream:
    """Tokens as they come, and the text that they make as soon as it is certain: no half characters, and nothing that
    may yet turn out to begin a stop string. The text ends before the stop string that is complete first."""

    def __init__(self, vocab: Vocab, after: int | None = None, stops: tuple[str, ...] = ()):
        self.stopped = False
        self._vocab, self._last, self._stops, self._held = vocab, after, stops, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that this token makes certain; none once it has stopped."""
        piece, self._last = self._vocab.piece(token, self._last), token
        return self._certain(self._decoder.decode(piece), final=False)

    def close(self) -> str:
        """The rest of the text, when no more tokens come."""
        return self._certain(self._decoder.decode(b"", final=True), final=True)

    def _certain(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        complete = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(complete)
        if complete or final:
            return self._held[:min(complete)[1] if complete else None]
        beginning = max((n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])),
                        default=0)
        cut = len(self._held) - beginning
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def ends_in(stops: tuple[str, ...], vocab: Vocab, after: int | None, tokens: Sequence[int]) -> bool:
    """Whether the last token completes a stop string. `after` is the token before all of these, if there is one."""
    longest = max((len(stop.encode()) for stop in stops), default=0)         # in tokens too: none is without bytes
    first = max(0, len(tokens) - longest)
    before = [after, *tokens][first:]
    tail = b"".join(vocab.piece(token, last) for last, token in zip(before, tokens[first:]))
    return any(stop.encode() in tail for stop in stops)
