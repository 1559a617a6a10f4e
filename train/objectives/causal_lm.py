"""Next-token prediction."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from configs.errors import ConfigError
from configs.schema.objective import CausalLMConfig, IndexerStage
from train.data.collate import Batch
from train.data.prepared import DataKind
from train.objectives.base import Note, Objective, Term, Unit
from train.objectives.indexer import check_indexer, choose_indexer
from train.ops.balance import ROUTERS, BalanceLoss
from train.ops.indexer import IndexerLoss
from train.ops.loss_head import CHUNK_BYTES, LossHead, Scoring, score
from train.ops.mixing import MixingError, hyper_connections_of


class CausalLM(Objective):
    """Cross-entropy of each supervised token given those before it.

    Where the model has them: the loss of its indexers, the balance of its experts, and how well its hyper-connections
    mix.
    """

    name = "causal_lm"
    needs = DataKind.samples

    def __init__(self, cfg: CausalLMConfig) -> None:
        self.cfg = cfg
        self._scoring = Scoring(label_smoothing=cfg.label_smoothing, z_weight=cfg.z_loss)
        self._head: LossHead | None = None
        self._squares = torch.zeros(())
        """Of the last micro-batch, see `score`."""
        self._indexer: IndexerLoss | None = None
        self._balance: BalanceLoss | None = None
        self._mixing: MixingError | None = None

    def check(self, model_config: Any, note: Note) -> None:
        """Refuses terms that the model's family has nothing for."""
        text = model_config.get_text_config()
        check_indexer(self.cfg, text.model_type)
        if self.cfg.balance_loss:
            _check_balance(text)
        elif text.model_type in ROUTERS and (coefficient := getattr(text, "router_aux_loss_coef", None)):
            note(
                f"router: config.json asks for router_aux_loss_coef={coefficient}, but objective.balance_loss=0: the "
                f"experts train without a balancing loss ({coefficient * _top_k(text):g} would be its like)"
            )

    def choose(self, module: nn.Module, note: Note, *, on_host: bool) -> None:
        """Indexers train where they have a loss, and in their warm-up nothing else does; the head gets its loss."""
        choose_indexer(self.cfg.stage, module, note)
        self._head, why = LossHead.of(_model_of(module), self._scoring, CHUNK_BYTES, on_host=on_host)
        if self._head is None:
            note(f"head: logits of all supervised tokens of a micro-batch are made at once, since {why}")

    def attach(self, module: nn.Module) -> None:
        """Hooks on what has a term or a gauge."""
        if self.cfg.stage is not IndexerStage.none:
            self._indexer = IndexerLoss(module, dense=self.cfg.stage is IndexerStage.warmup)
        if self.cfg.balance_loss:
            self._balance = BalanceLoss(module, _text_config(module))
        if hyper_connections_of(module):
            self._mixing = MixingError(module)

    def loss_sum(self, forward: Callable[..., Any], batch: Batch) -> torch.Tensor:
        """The head runs at the positions that predict a supervised token only; see `Batch.predicts_BT`."""
        if self._head is not None:
            loss, squares = self._head.loss(forward, batch.model_inputs(), batch.targets_N)
        else:
            logits_NV: torch.Tensor = forward(**batch.model_inputs()).logits.flatten(0, -2)
            loss, squares = score(logits_NV, batch.targets_N, self._scoring)
        if batch.num_targets == 0:
            # A filler so that every rank runs the same passes: nothing to learn, but a graph to go back through.
            loss, squares = loss * 0.0, squares * 0.0
        self._squares = squares
        return loss

    def terms(self, forward: Callable[..., Any], batch: Batch) -> list[Term]:
        """The loss, then ``z_loss``, ``indexer_kl`` and ``balance_loss`` where they are on."""
        with ExitStack() as stack:
            for watch in (self._indexer, self._balance, self._mixing):
                if watch is not None:
                    stack.enter_context(watch.listening())
            terms = [Term("loss", self.loss_sum(forward, batch), Unit.targets)]
        if self.cfg.z_loss:
            terms.append(Term("z_loss", self._squares, Unit.targets, weight=0.0))  # its gradient is in the loss
        counts = float(batch.num_tokens > 0)  # a filler's tokens are no data
        if self._indexer is not None:
            terms.append(Term("indexer_kl", self._indexer.total() * counts, Unit.tokens, self.cfg.indexer_weight))
        if self._balance is not None:
            total = self._balance.total(batch.lengths(), batch.input_ids_BT.shape[1])
            terms.append(Term("balance_loss", total * counts, Unit.samples, self.cfg.balance_loss))
        return terms

    def gauges(self) -> dict[str, float]:
        """``mixing_error``, where the model has hyper-connections."""
        return {} if self._mixing is None else {"mixing_error": self._mixing.highest()}


def _check_balance(text_config: Any) -> None:
    if text_config.model_type in ROUTERS:
        return
    if getattr(text_config, "router_aux_loss_coef", None) is not None:
        why = "is none whose routers crosstune knows"
    elif hasattr(text_config, "n_routed_experts") or hasattr(text_config, "num_experts"):
        why = "balances its experts by a bias beside the scores, and has no such loss"
    else:
        why = "has no routed experts"
    raise ConfigError(
        "objective.balance_loss",
        f"above 0, but family '{text_config.model_type}' {why}",
        allowed=f"0; above 0 with {', '.join(sorted(ROUTERS))}",
        remedy="leave objective.balance_loss out",
    )


def _top_k(text_config: Any) -> int:
    return int(getattr(text_config, "num_experts_per_tok", 1))


def _text_config(module: nn.Module) -> Any:
    return _model_of(module).config.get_text_config()


def _model_of(module: nn.Module) -> Any:
    """The model of transformers' in what a tuning method made of it."""
    from transformers import PreTrainedModel

    return next((each for each in module.modules() if isinstance(each, PreTrainedModel)), module)
