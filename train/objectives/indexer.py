"""What an objective decides about the indexers of sparse attention: whether they can train, and what else does."""

from __future__ import annotations

from torch import nn

from configs.errors import ConfigError
from configs.schema.objective import CausalLMConfig, IndexerStage
from train.objectives.base import Note
from train.ops.indexer import NOT_TRAINABLE, TRAINABLE, indexers_of


def check_indexer(cfg: CausalLMConfig, model_type: str) -> None:
    """Whether the model has indexers that the loss is for.

    Raises:
        ConfigError: the loss was asked for and it has none.
    """
    if cfg.stage is IndexerStage.none or model_type in TRAINABLE:
        return
    key = "indexer_kl" if cfg.indexer_stage is IndexerStage.none else "indexer_stage"
    raise ConfigError(
        f"objective.{key}",
        f"asks for the indexer's loss, and family '{model_type}' cannot have it: "
        + NOT_TRAINABLE.get(model_type, "it has no indexer"),
        allowed=f"with {', '.join(TRAINABLE)}",
        remedy="objective.indexer_stage=none objective.indexer_kl=0",
    )


def choose_indexer(stage: IndexerStage, module: nn.Module, note: Note) -> None:
    """Sets `requires_grad` by the stage.

    Raises:
        ConfigError: an adapter on an indexer would get no gradient, or the loss would have no adapter to train.
    """
    indexers = indexers_of(module)
    if not indexers:
        return
    inside = [parameter for indexer in indexers for parameter in indexer.parameters()]
    if hasattr(module, "peft_config"):
        _check_adapters(stage, adapted=any(parameter.requires_grad for parameter in inside))
        told = False
    else:
        told = not any(parameter.requires_grad for parameter in inside)  # the tuning method froze them, and said so
        for parameter in inside:
            parameter.requires_grad_(stage is not IndexerStage.none)
    if stage is IndexerStage.none and not told:
        numel = sum(parameter.numel() for parameter in inside)
        note(f"indexer: {len(indexers)} indexers of sparse attention ({numel:,} parameters) are frozen, as they get no "
             "gradient from the loss; objective.indexer_stage=sparse trains them by their own")  # fmt: skip
    elif stage is IndexerStage.warmup:
        own = {id(parameter) for parameter in inside}
        for parameter in module.parameters():
            if id(parameter) not in own:
                parameter.requires_grad_(False)
        note("indexer: warm-up, attention is dense and only the indexers train; loss is that of the model as it is")
    elif stage is IndexerStage.sparse:
        note("indexer: trains after all, by its own loss (indexer_kl); the rest by the model's")


def _check_adapters(stage: IndexerStage, *, adapted: bool) -> None:
    if adapted and stage is IndexerStage.none:
        raise ConfigError(
            "tuning.targets",
            "hold projections of the indexer, which gets no gradient from the loss",
            remedy="leave them out, or train them: objective.indexer_stage=sparse",
        )
    if not adapted and stage is not IndexerStage.none:
        raise ConfigError(
            "tuning.targets",
            f"leave the indexer out, and objective.indexer_stage={stage.value} would have nothing to train",
            remedy="tuning=full",
        )
