"""How often an epoch of a mixture shows each of its sources. Pure, and the same on every machine.

Numbers of the config are taken as the decimals that were written (0.1 is a tenth). `weight` is exact arithmetic on
fractions. The powers of `temperature` are decimals of 50 digits, computed by the standard library and not by the
machine's maths library. Only the result is rounded, to the nearest float.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Context, Decimal
from fractions import Fraction

from configs.errors import ConfigError, DataError
from configs.schema.dataset import MixDatasetConfig, Mixing

_DECIMALS = Context(prec=50, Emax=999, Emin=-999)
_LEVER = {
    Mixing.epochs: "dataset.sources.NAME.epochs",
    Mixing.weight: "dataset.sources.NAME.weight or dataset.tokens",
    Mixing.temperature: "dataset.temperature or dataset.tokens",
}


def epochs_per_source(cfg: MixDatasetConfig, tokens: Mapping[str, int]) -> dict[str, float]:
    """Times that an epoch of the mixture shows each source, in the config's order.

    Args:
        cfg: the mixture.
        tokens: source -> tokens of its training rows.

    Raises:
        DataError: a source has no training rows.
        ConfigError: an epoch would show less than one token of a source.
    """
    sources = cfg.source_configs()
    assert set(tokens) == set(sources)
    for name in sources:
        if not tokens[name]:
            raise DataError(
                f"dataset.sources.{name}",
                "has no training rows, so there is nothing of it to mix",
                remedy="see with crosstune prep --dry-run what becomes of its rows, or take it out of dataset.sources",
            )
    if cfg.mixing is Mixing.epochs:
        epochs = {name: _exact(source.epochs) for name, source in sources.items()}
    else:
        if cfg.mixing is Mixing.weight:
            parts = {name: _exact(source.weight) for name, source in sources.items()}
        else:
            parts = _tempered(tokens, cfg.temperature)
        shown, whole = cfg.tokens or sum(tokens.values()), sum(parts.values())
        epochs = {name: shown * parts[name] / whole / tokens[name] for name in sources}
    _refuse_nothing(cfg, epochs, tokens)
    return {name: float(times) for name, times in epochs.items()}


def _tempered(tokens: Mapping[str, int], temperature: float) -> dict[str, Fraction]:
    """The sources' tokens to the power of 1/temperature; only their proportions are meant.

    Devlin et al. 2018, multilingual BERT; Conneau et al. 2020, "Unsupervised cross-lingual representation learning".
    """
    largest = Decimal(max(tokens.values()))
    power = _DECIMALS.divide(Decimal(1), Decimal(str(temperature)))
    return {
        name: Fraction(_DECIMALS.power(_DECIMALS.divide(Decimal(count), largest), power))
        for name, count in tokens.items()
    }


def _refuse_nothing(cfg: MixDatasetConfig, epochs: Mapping[str, Fraction], tokens: Mapping[str, int]) -> None:
    hidden = [name for name, times in epochs.items() if times * tokens[name] < 1]
    if hidden:
        raise ConfigError(
            f"dataset.mixing={cfg.mixing.value}",
            f"an epoch of the mixture would show less than one token of {', '.join(hidden)}",
            remedy=f"a larger {_LEVER[cfg.mixing]}, or take it out of dataset.sources",
        )


def _exact(number: float) -> Fraction:
    """The decimal that was written, as a fraction."""
    return Fraction(str(number))
