"""Weights that ranks hold in common must be equal, bit by bit: memory and links fail silently.

Each parameter is hashed as it lies on the device, one at a time; 8 bytes of it travel. What an engine spreads over the
ranks has no second copy to be compared with.
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from collections.abc import Iterator

import torch

from configs.errors import RunFailedError
from train.engine.base import Engine

DIGEST_BYTES = 8
SHOWN = 5


def replicated(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters, trained or frozen, that are whole on this rank, by name."""
    for name, parameter in engine.weights():
        if parameter.shape == getattr(parameter, "ds_shape", parameter.shape):  # stage 3 leaves an empty tensor
            yield name, parameter.detach()


def not_compared(engine: Engine) -> str | None:
    """What a comparison leaves out, in words; None: nothing."""
    if engine.world.size == 1:
        return "guard.agreement_every: there is one rank, so nothing is compared"
    total, whole = sum(1 for _ in engine.weights()), sum(1 for _ in replicated(engine))
    if whole == total:
        return None
    return (
        f"guard.agreement_every: {total - whole} of {total} parameters are spread over the ranks, "
        "which hold no second copy: not compared"
    )


def must_agree(engine: Engine, step: int) -> None:
    """Compares the weights of all ranks. Called on all of them, between steps.

    Memory: one parameter on the host at a time.

    Raises:
        RunFailedError: they differ; names the parameters and the odd ranks. On every rank.
    """
    world = engine.world
    if world.size == 1:
        return
    names, digests = [], []
    for name, tensor in replicated(engine):
        names.append(name)
        data = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data
        digests.append(hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest())
    ranks = world.all_gather_bytes(b"".join(digests))
    assert len({len(data) for data in ranks}) == 1, "every rank holds the same parameters whole"
    if all(data == ranks[0] for data in ranks):
        return
    hosts = [data.decode() for data in world.all_gather_bytes(socket.gethostname().encode())]
    found = {}
    for i, name in enumerate(names):
        seen = [data[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES] for data in ranks]
        if len(set(seen)) > 1:
            found[name] = _odd(seen, hosts)
    shown = "; ".join(f"{name}: {odd}" for name, odd in list(found.items())[:SHOWN])
    more = f"; and {len(found) - SHOWN} more parameters" if len(found) > SHOWN else ""
    raise RunFailedError(
        f"step {step}",
        f"weights that all ranks should share differ: {shown}{more}",
        remedy="test the memory and the links of that device and leave it out; checkpoints were made of weights that "
        "agreed",
    )


def _odd(digests: list[bytes], hosts: list[str]) -> str:
    """The ranks that are not of the majority; all of them where there is none."""
    (usual, count), *_ = Counter(digests).most_common(1)
    odd = [rank for rank, digest in enumerate(digests) if digest != usual]
    if 2 * count <= len(digests):
        return f"no majority among the {len(digests)} ranks on {', '.join(sorted(set(hosts)))}"
    named = [f"{rank} on {hosts[rank]}" for rank in odd[:SHOWN]]
    more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
    return f"rank {', '.join(named)}{more} against {count} others"
