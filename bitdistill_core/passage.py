"""Sequences on their way through a decoder, block after block: each block sees what the blocks before it put out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from bitdistill_core.progress import progress_bar

PASS_TOKENS = 4096  # that go through a block together, unless a batch is larger


class _Reached(Exception):
    """Ends a forward pass at the module whose input is wanted."""


@dataclass
class Passage:
    """The hidden states of some sequences before block `index` of a decoder.

    Sequences of unequal length are padded on the right; with causal attention no token sees padding.
    """

    decoder_blocks: Sequence[nn.Module]
    hidden: list[Tensor]  # batches (B, T, D)
    keywords: dict[int, list[dict[str, Any]]]  # by T, then block: masks and rotary embeddings, which differ by block
    index: int = 0

    @classmethod
    def begin(cls, model: PreTrainedModel, batches: Iterable[Tensor]) -> "Passage":
        """Token ids (B, T) to the first block; of each T one sequence runs through all of them, for the keywords."""
        decoder = model.get_decoder()
        passage = cls(list(decoder.layers), [], {})
        with torch.no_grad():
            for input_ids in batches:
                length = input_ids.shape[1]
                if length not in passage.keywords:
                    passage.keywords[length] = block_keywords(decoder, passage.decoder_blocks, input_ids[:1])
                passage.hidden.append(_entrance(decoder, passage.decoder_blocks[0], input_ids))
        return passage

    @property
    def block(self) -> nn.Module:
        """The block that the sequences stand before."""
        return self.decoder_blocks[self.index]

    def blocks(self, name: str) -> Iterator[int]:
        """The index of each block in turn, behind a progress bar; the sequences pass it when the next is asked for."""
        with progress_bar(name, total=len(self.decoder_blocks), unit="block") as bar:
            while self.index < len(self.decoder_blocks):
                yield self.index
                self.advance()
                bar.update()

    @torch.no_grad()
    def advance(self) -> None:
        """Takes the sequences past the present block; small batches of one length go together."""
        by_length: dict[int, list[int]] = {}
        for number, states in enumerate(self.hidden):
            by_length.setdefault(states.shape[1], []).append(number)
        for numbers in by_length.values():
            for together in _up_to(PASS_TOKENS, numbers, lambda number: self.hidden[number].shape[:2].numel()):
                before = [self.hidden[number] for number in together]
                after = self.run(torch.cat(before)).to(before[0].dtype).split([len(states) for states in before])
                for number, states in zip(together, after, strict=True):
                    self.hidden[number] = states
        self.index += 1

    def run(self, states: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The output of the present block, (B, T, D), for states that stand before it; differentiable.

        Args:
            parameters: in place of the block's own, by name.
        """
        keywords = self.keywords[states.shape[1]][self.index]
        if parameters is None:
            output = self.block(states, **keywords)
        else:
            output = functional_call(self.block, dict(parameters), (states,), keywords)
        return output[0] if isinstance(output, tuple) else output

    def inputs_of(self, module: nn.Module) -> Iterator[Tensor]:
        """What reaches `module` of the present block, a batch at a time: (B * T, K)."""
        reached: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Tensor]) -> None:
            reached.append(args[0])
            raise _Reached

        handle = module.register_forward_pre_hook(stop)
        try:
            for states in self.hidden:
                try:
                    self.run(states)
                except _Reached:
                    yield reached.pop().flatten(0, 1)
        finally:
            handle.remove()


def _up_to(limit: int, numbers: Iterable[int], size: Callable[[int], int]) -> Iterator[list[int]]:
    """`numbers` in groups whose sizes add up to at most `limit`; one that is larger is alone."""
    group: list[int] = []
    total = 0
    for number in numbers:
        if group and total + size(number) > limit:
            yield group
            group, total = [], 0
        group.append(number)
        total += size(number)
    if group:
        yield group


def _forward(decoder: nn.Module, input_ids: Tensor) -> None:
    """The decoder's own forward pass: in a replayed one no hook sees anything."""
    type(decoder).forward(decoder, input_ids=input_ids, use_cache=False)


def block_keywords(decoder: nn.Module, blocks: Sequence[nn.Module], input_ids: Tensor) -> list[dict[str, Any]]:
    """What the decoder passes to each of its blocks beside the hidden states."""
    seen: list[dict[str, Any]] = []

    def record(block: nn.Module, args: tuple[Tensor], keywords: dict[str, Any]) -> None:
        seen.append(keywords)

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        _forward(decoder, input_ids)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _entrance(decoder: nn.Module, first_block: nn.Module, input_ids: Tensor) -> Tensor:
    """The hidden states before the first block."""
    reached: list[Tensor] = []

    def stop(block: nn.Module, args: tuple[Tensor]) -> None:
        reached.append(args[0])
        raise _Reached

    handle = first_block.register_forward_pre_hook(stop)
    try:
        _forward(decoder, input_ids)
    except _Reached:
        pass
    finally:
        handle.remove()
    return reached[0]
