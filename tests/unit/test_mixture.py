"""How much of each source an epoch of a mixture shows."""

from __future__ import annotations

from fractions import Fraction

import pytest

from configs.errors import ConfigError, DataError
from configs.schema.dataset import MixDatasetConfig, Mixing
from data_prep.mixture import epochs_per_source

TOKENS = {"tickets": 1000, "faq": 100, "law": 10}


def mix(mixing: Mixing, tokens: int = 0, temperature: float = 1.0, **values: dict[str, float]) -> MixDatasetConfig:
    sources = {name: {"path": f"{name}.jsonl", **values.get(name, {})} for name in TOKENS}
    return MixDatasetConfig(sources=sources, mixing=mixing, tokens=tokens, temperature=temperature)


def test_epochs_are_those_of_the_sources():
    cfg = mix(Mixing.epochs, faq={"epochs": 3.5})
    assert epochs_per_source(cfg, TOKENS) == {"tickets": 1.0, "faq": 3.5, "law": 1.0}


def test_weights_are_shares_of_tokens_and_only_their_proportions_count():
    weights = {"tickets": {"weight": 0.1}, "faq": {"weight": 0.2}, "law": {"weight": 0.7}}
    epochs = epochs_per_source(mix(Mixing.weight, 500, **weights), TOKENS)
    assert epochs == {"tickets": 0.05, "faq": 1.0, "law": 35.0}
    tenfold = {name: {"weight": 10 * value["weight"]} for name, value in weights.items()}
    assert epochs_per_source(mix(Mixing.weight, 500, **tenfold), TOKENS) == epochs


def test_numbers_are_the_decimals_that_were_written():
    """In binary, 0.1 and 0.3 are not as one to three."""
    weights = {"tickets": {"weight": 0.1}, "faq": {"weight": 0.3}, "law": {"weight": 0.2}}
    whole = {name: {"weight": round(10 * value["weight"])} for name, value in weights.items()}
    for tokens in (1000, 1002, 1004, 1006):
        epochs = epochs_per_source(mix(Mixing.weight, tokens, **weights), TOKENS)
        assert epochs == epochs_per_source(mix(Mixing.weight, tokens, **whole), TOKENS)


@pytest.mark.parametrize("mixing", [Mixing.weight, Mixing.temperature])
@pytest.mark.parametrize("tokens", [0, 12345])
def test_an_epoch_shows_the_tokens_asked_for(mixing, tokens):
    epochs = epochs_per_source(mix(mixing, tokens, temperature=3.0, faq={"weight": 1 / 3}), TOKENS)
    assert list(epochs) == list(TOKENS)
    shown = sum(Fraction(epochs[name]) * TOKENS[name] for name in TOKENS)
    assert float(shown) == pytest.approx(tokens or 1110, rel=1e-14)


def test_temperature_evens_the_sources_out():
    assert set(epochs_per_source(mix(Mixing.temperature), TOKENS).values()) == {1.0}
    epochs = epochs_per_source(mix(Mixing.temperature, temperature=2.0), TOKENS)
    assert epochs["law"] * 10 / (epochs["tickets"] * 1000) == pytest.approx((10 / 1000) ** 0.5, rel=1e-14)
    even = epochs_per_source(mix(Mixing.temperature, temperature=float("inf")), TOKENS)
    assert even == {"tickets": 0.37, "faq": 3.7, "law": 37.0}


@pytest.mark.parametrize("mixing", list(Mixing))
def test_a_source_without_training_rows_is_named(mixing):
    with pytest.raises(DataError, match=r"dataset\.sources\.faq: has no training rows"):
        epochs_per_source(mix(mixing), TOKENS | {"faq": 0})


@pytest.mark.parametrize(
    ("cfg", "lever"),
    [
        (mix(Mixing.temperature, temperature=1e-12), "dataset.temperature"),
        (mix(Mixing.weight, law={"weight": 1e-9}), "weight"),
        (mix(Mixing.epochs, law={"epochs": 0.05}), "epochs"),
    ],
)
def test_a_source_of_which_nothing_would_be_shown_is_named(cfg, lever):
    with pytest.raises(ConfigError, match=f"less than one token of .*law[\\s\\S]*{lever}"):
        epochs_per_source(cfg, TOKENS)


def test_a_temperature_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="dataset.temperature"):
        mix(Mixing.temperature, temperature=float("nan"))
