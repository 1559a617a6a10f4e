"""Greedy answers and their likelihood, each prompt read once.

For families whose cache is a plain key-value list, a batch goes through the model like this:

1. what all its prompts share at their beginning (the system turn) is read once and its cache repeated;
2. the rest of the prompts and the reference answers, padded on the right, is read on top of it. This gives the
   likelihood, and also most of the greedy answer: as long as the model would itself have chosen the reference's
   tokens, the next choice is already known;
3. only rows that left the reference go on, one token at a time, the unused reference tokens and padding masked out.

Other families (recurrent state, sliding windows) take a forward pass for the likelihood, then `generate` over
prompts of equal length, so that nothing is padded. The answers are the same; it only takes longer.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from train.evaluate.perplexity import forward_nll, head_at, token_nll
from train.evaluate.samples import Sample


@dataclass
class Measured:
    """What a model did with one sample."""

    nll: float
    """Negative log-likelihood (nats) summed over the sample's supervised tokens."""
    answer_ids: list[int] | None
    """Greedy answer without the token that ended it; None where nothing was generated."""
    first_logits_V: torch.Tensor | None = None
    """fp32 logits of the answer's first token; None unless asked for."""


def has_plain_cache(model: Any) -> bool:
    """Whether every layer keeps all keys and values, so that cached tokens can be shared and masked out."""
    supported = getattr(model, "_supports_default_dynamic_cache", None)
    if supported is None or not supported() or model.get_output_embeddings() is None:
        return False
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    # A config without layer types gives an empty list here: such a cache makes its (plain) layers on first use.
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def _shared_length(samples: Sequence[Sample]) -> int:
    """Tokens that all prompts begin with, short of the first position whose logits are read."""
    limit = min(s.spans[0][0] - 1 for s in samples)
    first = samples[0].input_ids
    for i in range(limit):
        if any(s.input_ids[i] != first[i] for s in samples):
            return i
    return limit


class _Reader:
    """Feeds a model piece by piece, keeping cache and mask in step."""

    def __init__(self, model: Any, rows: int, device: torch.device) -> None:
        self.model, self.device = model, device
        self.cache = DynamicCache(config=model.config)
        self.mask_BL = torch.ones(rows, 0, dtype=torch.long, device=device)
        """1 where a cached token counts, 0 where padding or a dropped token lies."""

    def read(
        self, tokens_BS: torch.Tensor, real_BS: torch.Tensor, rows_N: Sequence[int], columns_N: Sequence[int]
    ) -> torch.Tensor:
        """Logits ``[N, V]`` of the positions named, after reading `tokens_BS` behind what was read before.

        `real_BS` is 1 for tokens and 0 for padding.
        """
        self.mask_BL = torch.cat([self.mask_BL, real_BS.to(self.device)], dim=1)
        # A token's position counts the real tokens before it, whatever masked columns lie between.
        positions = (self.mask_BL.cumsum(-1) - 1).clamp(min=0)[:, -tokens_BS.shape[1] :]
        with head_at(self.model, rows_N, columns_N):
            out = self.model(
                input_ids=tokens_BS.to(self.device),
                attention_mask=self.mask_BL,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            )
        logits: torch.Tensor = out.logits[0]
        return logits

    def repeat(self, rows: int) -> None:
        """Turns the one row that was read into `rows` equal ones."""
        self.cache.batch_repeat_interleave(rows)
        self.mask_BL = self.mask_BL.expand(rows, -1)

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all rows but these."""
        index = torch.tensor(rows, device=self.device)
        self.cache.batch_select_indices(index)
        self.mask_BL = self.mask_BL[index]


@torch.inference_mode()
def measure_batch(
    model: Any,
    samples: Sequence[Sample],
    stop: Collection[int],
    max_new_tokens: int,
    device: torch.device,
    keep_logits: bool = False,
) -> list[Measured]:
    """Likelihood and greedy answer of each sample, for families with `has_plain_cache`.

    Args:
        model: in evaluation mode, on `device`.
        samples: one batch; its size is the caller's care.
        stop: token ids that end an answer, besides the last token of the sample's own reference.
        max_new_tokens: longest answer, its end token included; 0: generate nothing.
        device: where the model is.
        keep_logits: also give the first token's logits.
    """
    shared = _shared_length(samples) if len(samples) > 1 else 0
    reader = _Reader(model, len(samples) if not shared else 1, device)
    if shared:
        tokens = torch.tensor([samples[0].input_ids[:shared]])
        reader.read(tokens, torch.ones_like(tokens), [0], [shared - 1])
        reader.repeat(len(samples))
    tokens_BS, real_BS = _right_padded([s.input_ids[shared : s.spans[-1][1] - 1] for s in samples])
    places = [(row, i) for row, s in enumerate(samples) for i in s.targets]
    logits = reader.read(tokens_BS, real_BS, [row for row, _ in places], [i - 1 - shared for _, i in places])
    targets = torch.tensor([samples[row].input_ids[i] for row, i in places], device=device)
    measured = [Measured(0.0, None) for _ in samples]
    known: list[list[int]] = [[] for _ in samples]
    losses, choices = token_nll(logits, targets).tolist(), logits.argmax(-1).tolist()
    for n, (row, i) in enumerate(places):
        measured[row].nll += losses[n]
        if i >= samples[row].answer_start:
            known[row].append(choices[n])
        if i == samples[row].answer_start and keep_logits:
            measured[row].first_logits_V = logits[n].float().cpu()
    if max_new_tokens:
        answers = _finish_answers(reader, samples, known, set(stop), max_new_tokens)
        for result, answer in zip(measured, answers, strict=True):
            result.answer_ids = answer
    return measured


def _right_padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and, equally shaped ``[B, S]``, 1 for tokens and 0 for padding."""
    width = max(map(len, rows))
    tokens_BS = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    real_BS = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return tokens_BS, real_BS


def _finish_answers(
    reader: _Reader,
    samples: Sequence[Sample],
    known: Sequence[Sequence[int]],
    stop: set[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy answers: what the pass over the references already tells, then token by token.

    `known` holds, per row, the model's choice at each token of the reference, given the reference before it.
    """
    answers: list[list[int]] = []
    going: list[int] = []
    for row, (sample, choices) in enumerate(zip(samples, known, strict=True)):
        answer, ended = _agreed(sample.answer, choices, stop, max_new_tokens)
        answers.append(answer)
        if not ended:
            going.append(row)
            # The last token of `answer` has left the reference: it is read next, the rest of the reference never.
            reader.mask_BL[row, sample.answer_start + len(answer) - 1 :] = 0
    if going:
        reader.keep(going)
    while going:
        last = torch.tensor([[answers[row][-1]] for row in going])
        chosen = reader.read(last, torch.ones_like(last), range(len(going)), [0] * len(going)).argmax(-1).tolist()
        stay = []
        for i, (row, token) in enumerate(zip(going, chosen, strict=True)):
            if token in stop or token == samples[row].answer[-1]:
                continue
            answers[row].append(token)
            if len(answers[row]) < max_new_tokens:
                stay.append(i)
        if len(stay) < len(going) and stay:
            reader.keep(stay)
        going = [going[i] for i in stay]
    return answers


def _agreed(
    reference: Sequence[int], choices: Sequence[int], stop: set[int], max_new_tokens: int
) -> tuple[list[int], bool]:
    """The greedy answer as far as it is known, and whether it has ended."""
    answer: list[int] = []
    for wanted, chosen in zip(reference, choices, strict=True):
        if chosen in stop or chosen == reference[-1]:
            return answer, True
        answer.append(chosen)
        if len(answer) == max_new_tokens:
            return answer, True
        if chosen != wanted:
            return answer, False
    raise AssertionError("the last token of a reference ends it")


@torch.inference_mode()
def measure_batch_plainly(
    model: Any,
    samples: Sequence[Sample],
    stop: Collection[int],
    max_new_tokens: int,
    device: torch.device,
    keep_logits: bool = False,
) -> list[Measured]:
    """As `measure_batch`, for any family: a forward pass, then `generate` over prompts of equal length."""
    measured = [Measured(nll, None) for nll in forward_nll(model, samples, device)]
    by_length: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        by_length[sample.answer_start, sample.answer[-1]].append(i)
    for (_, end), group in by_length.items() if max_new_tokens else ():
        prompts = torch.tensor([samples[i].prompt for i in group], device=device)
        ends = sorted({*stop, end})
        config = greedy(ends, end, max_new_tokens)
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
        for row, i in enumerate(group):
            measured[i].answer_ids = until_end(out.sequences[row, prompts.shape[1] :].tolist(), ends)
            if keep_logits:
                measured[i].first_logits_V = out.logits[0][row].float().cpu()
    return measured


def greedy(ends: list[int], padding: int, max_new_tokens: int) -> GenerationConfig:
    """All spelled out: a model's own generation_config may ask for sampling or penalties."""
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=padding,
        output_logits=True,
        return_dict_in_generate=True,
    )


def until_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    """The tokens before the first that ends an answer."""
    return tokens[: next((at for at, token in enumerate(tokens) if token in ends), len(tokens))]
