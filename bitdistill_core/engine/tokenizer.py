"""The packed model's own tokenizer, and text streamed from token ids."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"


class EngineTokenizer:
    """A `tokenizers` tokenizer from the bytes of a tokenizer.json, without truncation or padding."""

    def __init__(self, tokenizer_json: bytes) -> None:
        try:
            self._tokenizer = Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"tokenizer.json of the packed model cannot be read: {error}; pack it again") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; `add_special_tokens` puts the model's own marks (often a BOS) around them.

        Raises:
            ValueError: bytes that are not UTF-8, which Python hands on as lone surrogates.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            raise ValueError(f"a text must be valid Unicode; got {text[:80]!r}; convert it to UTF-8") from None

    @cached_property
    def num_leading(self) -> int:
        """Marks that `encode` with special tokens puts before a text: 1 (a BOS) or 0."""
        return int(self.encode("x", add_special_tokens=True)[:1] != self.encode("x")[:1])

    @cached_property
    def num_trailing(self) -> int:
        """Marks that `encode` with special tokens puts behind a text: some append the end of text."""
        return len(self.encode("x", add_special_tokens=True)) - len(self.encode("x")) - self.num_leading

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, prompt_ids: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as `ids` arrive after `prompt_ids`; their sum is the text that follows the prompt.

        A piece waits until its characters are whole: bytes of one character may be spread over tokens. The tokens of
        the piece before are decoded along, because a first word may lose its leading space when decoded alone, and
        they begin with a whole character, because tokens that are bytes decode to nothing right from the middle of one.
        """
        windows = (list(prompt_ids[-length:]) for length in range(4, 8))
        window = next((w for w in windows if REPLACEMENT not in self.decode(w)), list(prompt_ids[-4:]))
        known = len(window)  # tokens of the window whose text is out
        for token in ids:
            window.append(token)
            emitted, text = self.decode(window[:known]), self.decode(window)
            if len(text) > len(emitted) and not text.endswith(REPLACEMENT):
                yield text[len(emitted) :]
                window = window[known:]
                known = len(window)
        emitted, text = self.decode(window[:known]), self.decode(window)
        if len(text) > len(emitted):
            yield text[len(emitted) :]


def keep_end(ids: Sequence[int], room: int, num_leading: int) -> list[int]:
    """At most `room` of a prompt's token ids: its leading marks and its end.

    Raises:
        ValueError: no room for a token of the text.
    """
    _require_room(room, num_leading)
    if len(ids) <= room:
        return list(ids)
    return [*ids[:num_leading], *ids[len(ids) - room + num_leading :]]


def leave_out_middle(ids: Sequence[int], room: int, num_leading: int) -> list[int]:
    """At most `room` of a prompt's token ids: as many of its beginning as of its end, or one more.

    For prompts of generation, where a text begins with what matters most, or a question stands behind it.

    Raises:
        ValueError: no room for a token of the text.
    """
    _require_room(room, num_leading)
    if len(ids) <= room:
        return list(ids)
    num_last = (room - num_leading) // 2
    return [*ids[: room - num_last], *ids[len(ids) - num_last :]]


def _require_room(room: int, num_leading: int) -> None:
    if room <= num_leading:
        raise ValueError(
            f"a prompt needs room beside its answer; got room={room} tokens, of which "
            f"{num_leading} for its leading mark; ask for fewer new tokens or a shorter answer"
        )


def until_stop(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """`pieces` up to the first occurrence of a string in `stop`, which is left out.

    Text that may be the beginning of a stop string is held back until it is known not to be.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [position for text in stop if (position := held.find(text)) >= 0]
        if found:
            if min(found) > 0:
                yield held[: min(found)]
            return
        keep = max((n for text in stop for n in range(1, len(text)) if held.endswith(text[:n])), default=0)
        ready, held = held[: len(held) - keep], held[len(held) - keep :]
        if ready:
            yield ready
    if held:
        yield held
