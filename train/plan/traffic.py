"""What a rank sends in a step, as a ring does it: a collective moves (n - 1) / n of its data, an all-reduce twice."""

from __future__ import annotations

from collections.abc import Sequence

from train.plan.engines import FP32, Weight


def sent_bytes(weights: Sequence[Weight], itemsize: int, *, stage: int, world: int, passes: int) -> dict[str, int]:
    """Bytes, by what they are.

    Args:
        weights: of the model.
        itemsize: bytes of a working weight.
        stage: of ZeRO; 0: the plain engine.
        world: processes.
        passes: micro-batches of a rank in a step.
    """
    if world == 1:
        return {}
    ring = (world - 1) / world
    trained = FP32 * ring * sum(weight.numel for weight in weights if weight.trained)
    if stage == 0:
        return {"gradients, all-reduce": int(2 * trained)}
    gradients = FP32 * ring * sum(weight.numel for weight in weights if weight.trained and not weight.fp32)
    # Parts in fp32 are whole on every rank, and summed once a step.
    replicas = {"gradients of parts in fp32, all-reduce": int(2 * (trained - gradients))} if gradients < trained else {}
    if stage in (1, 2):
        times = passes if stage == 2 else 1
        gathered = gradients * itemsize / FP32
        return {"gradients, all-reduce": int(2 * gradients * times), "weights, all-gather": int(gathered), **replicas}
    whole = itemsize * ring * sum(weight.numel for weight in weights if not weight.fp32)
    return {
        "weights, gathered forward and backward": int(2 * whole * passes),
        "gradients, reduce-scatter": int(gradients * passes),
        **replicas,
    }
