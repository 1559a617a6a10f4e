"""The ops of `train/ops` by torch_npu's fused operators.

Their meaning and limits are those of Huawei's documentation (Ascend/op-plugin at 517f2e7, folder
``docs/zh/custom_APIs/torch_npu``, and the argument checks of ``op_plugin/ops/opapi``); gradients are torch_npu's own.
Checked against the reference on a pretended NPU only, whose operators are written from the same documentation. On a
card `train/ops/agreement.py` compares values, gradients and masks at each start before one of them is used: others met
silent faults in kernels of this kind (vllm-project/vllm-ascend#13699: no softmax with TND and no mask; #15503: a mask
ignored behind the 512th key).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import accumulate, chain
from types import MappingProxyType

import torch

from train.ops.kernel import Kernel, Needs
from train.ops.packed_attention import Lengths

MASK_EDGE = 2048
"""Edge of the one causal mask that the sparse modes 2, 3 and 4 read block by block, however long the samples are."""
MOST_SAMPLES = 1024
"""Longest actual_seq_qlen of the TND layout."""
CAUSAL, BAND = 3, 4
"""Values of sparse_mode: causal from the lower right corner of each sample, and a band, from there too."""
UNBOUNDED = 2147483647
"""pre_tockens where nothing bounds how far a query looks back."""


def attention(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    lengths: Lengths,
    *,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """`train.ops.packed_attention.Attend` by npu_fusion_attention, all samples of all rows in one call.

    The layout is TND: tokens of all samples one after another, the running sum of their lengths on the host. Keys
    are not repeated for the heads that share them. In atten_mask True hides a position, the reverse of SDPA's mask.
    """
    import torch_npu  # type: ignore[import-not-found]  # only a machine with NPUs has it

    batch, heads, tokens, _ = query_BHTD.shape
    query, key, value = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (query_BHTD, key_BKTD, value_BKTD))
    samples = list(chain.from_iterable(lengths))
    # A window as long as the longest sample hides nothing, and the causal mode skips more work than the band.
    window = sliding_window if sliding_window is not None and sliding_window < max(samples) else None
    outs: list[torch.Tensor] = []
    begin = 0
    for first in range(0, len(samples), MOST_SAMPLES):
        ends = list(accumulate(samples[first : first + MOST_SAMPLES]))
        piece = slice(begin, begin + ends[-1])
        out, *_ = torch_npu.npu_fusion_attention(
            query[piece],
            key[piece],
            value[piece],
            heads,
            "TND",
            atten_mask=_causal_mask(query.device),
            scale=scaling,
            keep_prob=1.0 - dropout,
            pre_tockens=UNBOUNDED if window is None else window - 1,
            next_tockens=0,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
            sparse_mode=CAUSAL if window is None else BAND,
        )
        outs.append(out)
        begin = piece.stop
    whole = outs[0] if len(outs) == 1 else torch.cat(outs)
    return whole.reshape(batch, tokens, heads, -1)


@cache
def _causal_mask(device: torch.device) -> torch.Tensor:
    """True above the diagonal, 4 MiB, made once for each device.

    Outside of inference mode, whose tensors no later backward pass may keep.
    """
    with torch.inference_mode(False):
        return torch.ones(MASK_EDGE, MASK_EDGE, dtype=torch.bool, device=device).triu(1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`train.ops.rms_norm.rms_norm`; in half precision it rounds once where the reference rounds twice."""
    import torch_npu

    out: torch.Tensor = torch_npu.npu_rms_norm(x, weight, epsilon=epsilon)[0]
    return out


def rotary(x_BHTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`train.ops.rotary.rotary`; the layout is BNSD with B1SD or 11SD for cosine and sine."""
    import torch_npu

    out: torch.Tensor = torch_npu.npu_rotary_mul(x_BHTD, cos, sin, rotary_mode="half")
    return out


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`train.ops.swiglu.swiglu`; the operator wants both halves in one contiguous tensor, which costs a copy."""
    import torch_npu

    out: torch.Tensor = torch_npu.npu_swiglu(torch.cat((gate, up), dim=-1), dim=-1)
    return out


def _attention_unmet(needs: Needs) -> str | None:
    if needs.head_dim > 768:
        return f"heads of {needs.head_dim}, npu_fusion_attention takes 1 to 768"
    if needs.heads > 256 or needs.heads % needs.kv_heads:
        found = f"{needs.heads} heads over {needs.kv_heads}"
        return f"{found}, npu_fusion_attention takes up to 256, a multiple of those of keys"
    if needs.dropout >= 1:
        return f"attention dropout {needs.dropout:g}, npu_fusion_attention keeps a share above 0"
    return None


def _rotary_unmet(needs: Needs) -> str | None:
    if needs.head_dim % 2 or needs.head_dim >= 896:
        return f"heads of {needs.head_dim}, npu_rotary_mul takes an even number below 896"
    if needs.heads >= 1000:
        return f"{needs.heads} heads, npu_rotary_mul takes fewer than 1000"
    if needs.rotary_factor > 1:
        return f"cosine and sine up to {needs.rotary_factor:g} (context extension), npu_rotary_mul takes -1 to 1"
    return None


def _all_met(needs: Needs) -> None:
    """Last dimensions of any size are taken."""


KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        "attention": Kernel(attention, _attention_unmet),
        "rms_norm": Kernel(rms_norm, _all_met),
        "rotary": Kernel(rotary, _rotary_unmet),
        "swiglu": Kernel(swiglu, _all_met),
    }
)
"""By the names of `train.ops.kernel.REFERENCES`."""
