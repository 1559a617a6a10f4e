"""What ``torch_npu.npu_fusion_attention`` computes, in plain aten, with the checks that the real one makes.

See `launchers.doctor.standin.inside.fused_operators`: what it is for, what it was written from, what it leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from launchers.doctor.standin.inside.fused_checks import on_fused_chip, require, same_dtype, shape

NAME = "npu_fusion_attention"
COMPRESSED = 2048
"""Edge of the one causal mask that the sparse modes 2, 3 and 4 read block by block."""
LAYOUTS = {"BSH": 3, "SBH": 3, "TND": 3, "BNSD": 4, "BSND": 4}
"""Their dimensions."""


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """``dropout(softmax(mask(scale * query @ key.T))) @ value``; True in `atten_mask` hides a position.

    Args:
        query: BSH, SBH, BSND, BNSD or TND, as `input_layout` says.
        key: as query, with as many heads or a divisor of them.
        value: as key; its head size may be smaller.
        head_num: heads of query.
        input_layout: in capitals or not.
        atten_mask: bool or uint8. Sparse modes 0 and 1: [Sq, Skv], [1, 1, Sq, Skv], [B, 1, Sq, Skv] or
            [B, N, Sq, Skv]; with TND only [max Sq, max Skv]. Modes 2, 3, 4: the 2048 x 2048 triangle, True above
            the diagonal.
        scale: of the scores.
        keep_prob: 1 - dropout.
        pre_tockens: how far before its own place a query looks; counts in modes 0 (from the upper left) and 4
            (from the lower right).
        next_tockens: how far behind it.
        actual_seq_qlen: ends of the samples in query, TND only; zeros at the end leave the last tokens out.
        actual_seq_kvlen: their ends in key and value.
        sparse_mode: 0 band with mask, 1 mask, 2 causal from the upper left, 3 from the lower right, 4 band.
        pse: refused, as are `padding_mask`, `prefix`, `sink` and `dropout_mask`.
        padding_mask: refused by the real operator too.
        prefix: refused.
        sink: refused.
        dropout_mask: refused.
        inner_precise: changes no value here, nor do `gen_mask_parallel`, `sync` and `softmax_layout`.
        gen_mask_parallel: no effect here.
        sync: no effect here.
        softmax_layout: "" or TND; no effect here.
        seed: given back.
        offset: given back.

    Returns:
        attention as query with value's head size; maximum and sum of each softmax, [B, N, Sq, 8] or [T, N, 8] fp32;
        an empty tensor; seed, offset and number of the dropout mask.
    """
    on_fused_chip(NAME)
    for option, given in {"pse": pse, "prefix": prefix, "sink": sink, "dropout_mask": dropout_mask}.items():
        require(given is None, NAME, f"{option}: not reproduced by the stand-in")
    require(padding_mask is None, NAME, "padding_mask is not supported")
    require(0 < keep_prob <= 1, NAME, f"keep_prob is {keep_prob}, not over 0 and at most 1")
    require(softmax_layout in ("", "TND"), NAME, f"softmax_layout is '{softmax_layout}', not TND")
    layout = input_layout.upper()
    require(layout in LAYOUTS, NAME, f"input_layout is '{input_layout}', not BSH, SBH, BNSD, BSND or TND")
    require(sparse_mode in range(5), NAME, f"sparse_mode {sparse_mode}: 0 to 4 are reproduced by the stand-in")
    same_dtype(NAME, query=query, key=key, value=value)
    for tensor in (query, key, value):
        require(tensor.dim() == LAYOUTS[layout], NAME, f"{shape(tensor)} is no {layout}")
    spans = _spans(layout, query, key, actual_seq_qlen, actual_seq_kvlen)
    q, k, v = _heads(query, key, value, head_num, layout)
    band = _Band(atten_mask, sparse_mode, pre_tockens, next_tockens, packed=layout == "TND")
    band.check(spans)
    parts = [
        _attend(
            q[:, :, a], k[:, :, b], v[:, :, b], band.hidden(q, a.stop - a.start, b.stop - b.start), scale, keep_prob
        )
        for a, b in spans
    ]
    left = q.shape[2] - spans[-1][0].stop  # tokens of the samples that are left out
    out_BNSD, top, total = (functional.pad(torch.cat(part, 2), (0, 0, 0, left)) for part in zip(*parts, strict=True))
    if layout == "TND":
        top, total = (part.squeeze(0).transpose(0, 1) for part in (top, total))
    top, total = (part.expand(*part.shape[:-1], 8).contiguous() for part in (top, total))
    scores = q.shape[0] * head_num * sum((a.stop - a.start) * (b.stop - b.start) for a, b in spans)
    return _back(out_BNSD.to(query.dtype), layout), top, total, query.new_empty(0), seed, offset, scores


@dataclass(frozen=True)
class _Band:
    """Which scores do not count.

    Args:
        mask: True hides; None: all count.
        mode: the operator's sparse_mode.
        before: how far before its own place a query looks.
        behind: how far behind it.
        packed: layout TND.
    """

    mask: Tensor | None
    mode: int
    before: int
    behind: int
    packed: bool

    def check(self, spans: Sequence[tuple[slice, slice]]) -> None:
        """Refuses a mask that does not fit mode or lengths."""
        mask, mode = self.mask, self.mode
        # A card ignores sparse_mode where no mask is given, and attends to everything.
        require(mask is not None or mode == 0, NAME, f"sparse_mode {mode} needs atten_mask (strict)")
        if mask is None:
            return
        require(mask.dtype in (torch.bool, torch.uint8), NAME, f"atten_mask is {mask.dtype}, not bool or uint8")
        if mode >= 2:
            require(mask.shape == (COMPRESSED, COMPRESSED), NAME, f"sparse_mode {mode} with atten_mask {shape(mask)}")
            triangle = torch.ones_like(mask, dtype=torch.bool).triu(1)
            require(bool(mask.bool().equal(triangle)), NAME, "atten_mask: True above the diagonal alone (strict)")
        elif self.packed:
            longest = tuple(max(span.stop - span.start for span in side) for side in zip(*spans, strict=True))
            require(tuple(mask.shape) == longest, NAME, f"atten_mask {shape(mask)}; the longest sample: {longest}")

    def hidden(self, q: Tensor, rows: int, columns: int) -> Tensor | None:
        """True where a score [B, N, rows, columns], or what broadcasts to it, does not count; None: all count."""
        if self.mask is None:
            return None
        place = torch.arange(rows, device=q.device).unsqueeze(1)
        distance = torch.arange(columns, device=q.device) - place  # 0 on the diagonal from the upper left
        if self.mode in (3, 4):
            distance = distance - (columns - rows)
        if self.mode in (2, 3):
            hidden = distance > 0
        else:
            hidden = (distance > self.behind) | (-distance > self.before)
            if self.mode in (0, 1):
                given = self._given(q, rows, columns)
                agrees = self.mode == 1 or not bool((hidden & ~given).any())
                require(agrees, NAME, "pre_tockens and next_tockens leave out what atten_mask shows (strict)")
                hidden = given
        require(not bool(hidden.all(-1).any()), NAME, "a query that may look at nothing (strict)")
        return hidden

    def _given(self, q: Tensor, rows: int, columns: int) -> Tensor:
        assert self.mask is not None
        if self.packed:
            return self.mask[:rows, :columns].bool()
        batch, heads = q.shape[:2]
        forms = {(rows, columns), (1, 1, rows, columns), (batch, 1, rows, columns), (batch, heads, rows, columns)}
        require(tuple(self.mask.shape) in forms, NAME, f"atten_mask {shape(self.mask)}, not one of {sorted(forms)}")
        return self.mask.bool()


def _spans(
    layout: str, query: Tensor, key: Tensor, q_ends: Sequence[int] | None, kv_ends: Sequence[int] | None
) -> list[tuple[slice, slice]]:
    """Where each sample lies in query and key; one span for the layouts with a batch."""
    if layout != "TND":
        require(not q_ends and not kv_ends, NAME, f"actual_seq_qlen and actual_seq_kvlen with {layout}, not TND")
        tokens = {"BSH": 1, "SBH": 0, "BSND": 1, "BNSD": 2}[layout]
        return [(slice(0, query.shape[tokens]), slice(0, key.shape[tokens]))]
    both = q_ends and kv_ends and len(q_ends) == len(kv_ends) <= 2048
    require(bool(both), NAME, "TND needs actual_seq_qlen and actual_seq_kvlen of one length, 1 to 2048")
    return list(zip(_slices("q", q_ends or (), len(query)), _slices("kv", kv_ends or (), len(key)), strict=True))


def _slices(side: str, ends: Sequence[int], tokens: int) -> list[slice]:
    used = list(ends)
    while used and used[-1] == 0:
        used.pop()
    rising = all(a <= b for a, b in pairwise([0, *used]))
    whole = bool(used) and (used[-1] == tokens or len(used) < len(ends) and used[-1] < tokens)
    found = f"actual_seq_{side}len {list(ends)} with {tokens} tokens"
    require(rising and whole, NAME, f"{found}: it holds rising ends, the last that of the tokens")
    return [slice(a, b) for a, b in pairwise([0, *used])] + [slice(used[-1], used[-1])] * (len(ends) - len(used))


def _heads(query: Tensor, key: Tensor, value: Tensor, head_num: int, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """All three as [B, N, S, D] in fp32, key and value repeated for the heads of query that share them."""
    require(1 <= head_num <= 256, NAME, f"head_num is {head_num}, not 1 to 256")
    if layout in ("BSH", "SBH"):
        fits = query.shape[-1] % head_num == 0 and key.shape[-1] % (width := query.shape[-1] // head_num) == 0
        require(fits, NAME, f"query {shape(query)} and key {shape(key)} do not divide into {head_num} heads")
        shared = key.shape[-1] // width
        require(shared > 0 and value.shape[-1] % shared == 0, NAME, f"value {shape(value)} against {shared} heads")
        sizes = ((query, head_num), (key, shared), (value, shared))
        query, key, value = (torch.unflatten(x, -1, (n, -1)) for x, n in sizes)
    query, key, value = (x.unsqueeze(0) if layout == "TND" else x for x in (query, key, value))
    order = {"SBH": (1, 2, 0, 3), "BNSD": (0, 1, 2, 3)}.get(layout, (0, 2, 1, 3))
    q, k, v = (x.permute(order) for x in (query, key, value))
    require(q.shape[1] == head_num, NAME, f"head_num is {head_num}, but query has {q.shape[1]} heads")
    require(q.shape[0] == k.shape[0] and k.shape[:3] == v.shape[:3], NAME, "batch, heads or lengths differ")
    require(1 <= v.shape[-1] <= k.shape[-1] == q.shape[-1] <= 768, NAME, "head sizes: query = key >= value, 1 to 768")
    require(head_num % k.shape[1] == 0, NAME, f"{head_num} heads of query over {k.shape[1]} of key")
    times = head_num // k.shape[1]
    return q.float(), k.float().repeat_interleave(times, 1), v.float().repeat_interleave(times, 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, keep_prob: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one span in fp32, with maximum and sum of its softmax [B, N, Sq, 1]."""
    scores = q @ k.transpose(-1, -2) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    if not k.shape[2]:  # an empty sample has no maximum
        maximum, total = (q.new_zeros(*q.shape[:3], 1) for _ in range(2))
        return q.new_zeros(*q.shape[:3], v.shape[-1]), maximum, total
    top = scores.detach().amax(-1, keepdim=True)
    total = (scores.detach() - top).exp().sum(-1, keepdim=True)
    kept = functional.dropout(scores.softmax(-1), 1 - keep_prob)
    return kept @ v, top, total


def _back(out_BNSD: Tensor, layout: str) -> Tensor:
    """From [B, N, S, D] to `layout`."""
    if layout == "BNSD":
        return out_BNSD
    out_BSND = out_BNSD.transpose(1, 2)
    if layout == "TND":
        return out_BSND.squeeze(0).contiguous()
    if layout == "BSND":
        return out_BSND.contiguous()
    out_BSH = out_BSND.flatten(2)
    return out_BSH if layout == "BSH" else out_BSH.transpose(0, 1).contiguous()
