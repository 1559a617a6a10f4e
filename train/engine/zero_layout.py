"""Where each of DeepSpeed's ZeRO optimizers keeps masters and state, and how to refresh it after they were written.

This is the only file that reaches into DeepSpeed's internals (0.19.8). Its public way, ``safe_get_full_*`` and
``_hp_mapping``, gives wrong values under ``round_robin_gradients`` and hangs with several parameter groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from train.engine.base import Fragment

Norm = Callable[[], torch.Tensor]


class Layout(ABC):
    """Fragments of one kind of ZeRO optimizer.

    Args:
        zero: DeepSpeed's optimizer.
        names: name of each trained parameter.
    """

    def __init__(self, zero: Any, names: Mapping[torch.Tensor, str]) -> None:
        self.zero, self.names = zero, names

    @abstractmethod
    def fragments(self) -> list[Fragment]:
        """The pieces on this rank; no other rank has them."""

    def prepare_restore(self) -> None:  # noqa: B027  # stage 3 alone has something to do
        """Before the masters are overwritten."""

    @abstractmethod
    def finish_restore(self) -> None:
        """Masters -> working weights, on all ranks."""

    def forget_gradients(self) -> None:  # noqa: B027  # not every layout leaves something
        """Zeroes what DeepSpeed leaves in its buffers after a step.

        Without it a parameter that only some steps use would take part in a step with an older gradient.
        """

    @abstractmethod
    def count_in(self, norm: Norm) -> None:
        """From now on `norm`, that of gradients which DeepSpeed does not see, is a part of the one it clips by.

        So the whole gradient is clipped as one, and a step is dropped wherever something is not finite.
        """

    def _intersect(self, flat: torch.Tensor, start: int, p: torch.Tensor, at: int) -> Fragment | None:
        """The piece of `p`, which begins at `at` of the whole group, within `flat`, which begins at `start`."""
        begin, end = max(at, start), min(at + p.numel(), start + flat.numel())
        if begin >= end:
            return None
        shape = tuple(p.shape)
        return Fragment(self.names[p], shape, begin - at, end - begin, flat, begin - start, self.zero.optimizer)


class Stage12(Layout):
    """`DeepSpeedZeroOptimizer`: stages 1 and 2, with or without offload. One flat partition per group and rank."""

    def fragments(self) -> list[Fragment]:
        """By the order of the flat buffer, which ``round_robin_gradients`` permutes."""
        zero, found = self.zero, []
        for i, flat in enumerate(zero.single_partition_of_fp32_groups):
            start = zero.partition_size[i] * dist.get_rank(group=zero.real_dp_process_group[i])
            for p, at in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
                if fragment := self._intersect(flat, start, p, at):
                    found.append(fragment)
        return found

    def finish_restore(self) -> None:
        """Links the new state, then all-gathers the working weights."""
        self.zero._hp_optimizer_states_linked = False
        self.zero._lazy_init_hp_params_optimizer_state()
        self.zero.update_lp_params()

    def forget_gradients(self) -> None:
        """Only the offload's host buffers outlive a step."""
        if self.zero.cpu_offload:
            for flat in self.zero.single_partition_of_fp32_groups:
                flat.grad.zero_()
            for gradient in self.zero.accumulated_grads_in_cpu.values():
                gradient.zero_()
            self.zero.norm_for_param_grads.clear()

    def count_in(self, norm: Norm) -> None:
        """Where the groups' norms are put together."""
        own = self.zero.scaled_global_norm

        def whole() -> torch.Tensor:
            total: torch.Tensor = own()
            both: torch.Tensor = torch.linalg.vector_norm(torch.stack([total, norm().to(total)]))
            return both

        self.zero.scaled_global_norm = whole


class Bf16(Layout):
    """`BF16_Optimizer`: stage 1 with bf16 weights and fp32 gradients."""

    def fragments(self) -> list[Fragment]:
        """The groups' parameters lie one after the other."""
        zero, found = self.zero, []
        for i, flat in enumerate(zero.fp32_groups_flat_partition):
            start, at = flat.numel() * dist.get_rank(group=zero.real_dp_process_group[i]), 0
            for p in zero.bf16_groups[i]:
                if fragment := self._intersect(flat, start, p, at):
                    found.append(fragment)
                at += p.numel()
        return found

    def finish_restore(self) -> None:
        """As `Stage12.finish_restore`."""
        self.zero._hp_optimizer_states_linked = False
        self.zero._lazy_init_hp_params_optimizer_state()
        self.zero.update_lp_params()

    def count_in(self, norm: Norm) -> None:
        """As one more gradient of the norm, but not of those that are clipped."""
        own = self.zero.get_grads_for_norm

        def with_norm(for_clipping: bool = False) -> Any:
            if for_clipping:
                return own(for_clipping=True)
            gradients, of_experts = own()
            return [*gradients, norm()], of_experts

        self.zero.get_grads_for_norm = with_norm


class Stage3(Layout):
    """`DeepSpeedZeroOptimizer_Stage3`: every parameter split evenly over the ranks, its last piece padded."""

    def fragments(self) -> list[Fragment]:
        """Of frozen parameters nothing: they come from the base model."""
        zero, found = self.zero, []
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            for p in group:
                _, at, size = zero.grad_position[zero.get_param_id(p)]
                offset = size * zero._get_param_partition_rank(p)
                numel = min(size, p.ds_numel - offset)  # below 1 where this rank has padding only
                if numel > 0:
                    shape = tuple(p.ds_shape)
                    found.append(Fragment(self.names[p], shape, offset, numel, flat, at, zero.optimizer))
        return found

    def prepare_restore(self) -> None:
        """Drops gathered copies, which would outlive the new values."""
        self.zero._partition_all_parameters()

    def finish_restore(self) -> None:
        """Masters -> partitions; small parameters stay gathered and must be gathered anew."""
        for i in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(i)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)
        self.zero.invalidate_secondary_tensor()

    def forget_gradients(self) -> None:
        """The partitions' gradients, and the offload's copies of them."""
        self.zero.grad_partitions_flat_buffer.zero_()
        if self.zero.offload_optimizer:
            for flat in self.zero.fp32_partitioned_groups_flat:
                if flat.grad is not None:
                    flat.grad.zero_()
            self.zero.norm_for_param_grads.clear()

    def count_in(self, norm: Norm) -> None:
        """As the norm of one more group."""
        own = self.zero._get_norm_groups

        def with_norm() -> list[torch.Tensor]:
            groups: list[torch.Tensor] = own()
            return [*groups, norm().to(groups[0])]

        self.zero._get_norm_groups = with_norm


def layout_of(zero: Any, names: Mapping[torch.Tensor, str]) -> Layout:
    """The layout of DeepSpeed's optimizer, told by its class name so that nothing of DeepSpeed is imported here."""
    layouts: dict[str, type[Layout]] = {
        "DeepSpeedZeroOptimizer": Stage12,
        "BF16_Optimizer": Bf16,
        "DeepSpeedZeroOptimizer_Stage3": Stage3,
    }
    return layouts[type(zero).__name__](zero, names)
