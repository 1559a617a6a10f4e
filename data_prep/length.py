"""What becomes of samples of more than `max_length` tokens. Lengths are in tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from configs.schema.roots import TooLong
from data_prep.rendered import Sample, Span

TOO_LONG = "longer than max_length"
NOTHING_LEFT = "no supervised tokens left"


class LengthFault(Exception):
    """A sample is left out because of its length; `reason` and `detail` are a `Reject`'s."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


def fitted(sample: Sample, max_length: int, too_long: TooLong, *, lead: int, document: bool = False) -> list[Sample]:
    """The sample if it is short enough, else what is left of it.

    Args:
        sample: of any length.
        max_length: of the longest sample.
        too_long: what to do.
        lead: tokens at the beginning that truncation on the left keeps: a begin token.
        document: it is plain text, learned from wherever it begins; else spans are answers, which are not learned
            without their beginnings.

    Raises:
        LengthFault: it is left out.
    """
    length = len(sample.input_ids)
    if length <= max_length:
        return [sample]
    if too_long is TooLong.chunk and document:
        return list(_chunks(sample, max_length))
    if too_long is TooLong.truncate_right:
        left = _without_end(sample, max_length)
    elif too_long is TooLong.truncate_left:
        left = _without_beginning(sample, max_length, lead, document=document)
    else:
        why = "; conversations are not cut into chunks" if too_long is TooLong.chunk else ""
        raise LengthFault(TOO_LONG, f"{length} tokens{why}")
    if not left.spans:
        raise LengthFault(NOTHING_LEFT, f"{length} tokens, cut to {max_length}")
    return [left]


def _without_end(sample: Sample, max_length: int) -> Sample:
    spans = [(start, min(end, max_length)) for start, end in sample.spans if start < max_length]
    return replace(sample, input_ids=sample.input_ids[:max_length], spans=spans, cut=len(sample.input_ids) - max_length)


def _without_beginning(sample: Sample, max_length: int, lead: int, *, document: bool) -> Sample:
    kept = min(lead, max_length - 1)
    cut = len(sample.input_ids) - max_length
    ids = sample.input_ids[:kept] + sample.input_ids[kept + cut :]
    spans: list[Span] = [(start - cut, end - cut) for start, end in sample.spans if start - cut >= max(kept, 1)]
    return replace(sample, input_ids=ids, spans=[(max(kept, 1), len(ids))] if document else spans, cut=cut)


def _chunks(sample: Sample, max_length: int) -> Iterator[Sample]:
    """Pieces of a document, each after the first begun by the token before it, so that every token is learned once."""
    ids = sample.input_ids
    for start in range(0, len(ids) - 1, max_length - 1):
        piece = ids[start : start + max_length]
        yield replace(sample, input_ids=piece, spans=[(1, len(piece))])
