"""`crosstune plan` beside real runs: a short form of tests/bench/plan_memory.py, which has the whole table."""

from __future__ import annotations

import json

import pytest

from configs.compose import compose, save_resolved
from configs.errors import EXIT_USER_FAULT
from launchers.cli import main
from tests.command import crosstune, write_uneven_records
from tests.tiny import save_tiny_model
from tests.tiny_families import save

WITHIN = 0.10
"""Of the whole process: the goal of the table, where the worst of all cases is closer."""
WITHOUT_LIBRARIES = 0.15
"""Of what the config decides. Libraries are half of a process with a model so small, and are measured, not predicted;
what is left holds the heap's holes, which differ by some MiB from run to run."""
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "head_dim": 64,
    "num_attention_heads": 8,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    save_tiny_model(folder / "model", **SHAPE)
    write_uneven_records(folder / "data.jsonl", count=40)
    return folder


def words_of(place, *more):
    known = "dataset.test_fraction=0.2 dataset.license=CC0-1.0 device=cpu model.precision=fp32 max_length=256".split()
    step = "batch_tokens=1500 micro_batch_tokens=700 max_steps=3".split()
    paths = [f"model.path={place / 'model'}", f"dataset.path={place / 'data.jsonl'}", f"cache_dir={place / 'cache'}"]
    return [*paths, *known, *step, *more]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["tuning=full", "nproc=1"], id="full", marks=pytest.mark.slow),
        pytest.param(["tuning=lora", "sharding=zero2", "nproc=2"], id="lora-zero2-2", marks=pytest.mark.slow),
        pytest.param(["tuning=full", "checkpoint.every=2"], id="asynchronous-save", marks=pytest.mark.slow),
    ],
)
def test_a_run_takes_what_it_was_predicted_to_take(place, tmp_path, words):
    run = tmp_path / "run"
    said = crosstune("train", *words_of(place, *words, f"run_dir={run}"))
    plan = json.loads((run / "plan.json").read_text())
    predicted, measured = plan["device_bytes"] / 2**30, plan["measured_peak_gib"]
    base = plan["parts"]["process: Python and libraries"] / 2**30
    assert predicted == pytest.approx(measured, rel=WITHIN), plan["parts"]
    assert predicted - base == pytest.approx(measured - base, rel=WITHOUT_LIBRARIES), plan["parts"]
    assert f"peak memory: predicted {predicted:.2f} GiB, measured {measured:.2f} GiB" in said
    assert main(["report", str(run)]) == 0
    assert f"predicted {predicted:.1f} GiB" in (run / "report.html").read_text()


@pytest.fixture
def planned(capfd, monkeypatch):
    """The JSON of a plan, made in this process: what it imports takes longer than a plan."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # set by the command; put back at the end

    def plan(*words):
        assert main(["plan", "--json", *words]) == 0
        said = capfd.readouterr()  # --json leaves standard output to the JSON: a second time it is the error stream
        return json.loads(next(line for line in (said.out + said.err).splitlines() if line.startswith("{")))

    return plan


def test_a_plan_needs_a_config_json_only(place, tmp_path, planned):
    (tmp_path / "config.json").write_text((place / "model" / "config.json").read_text())
    words = words_of(place, "tuning=full", f"model.path={tmp_path}")
    result = planned(*words, "sharding=zero3", "nproc=4", "plan.flops=1e12")
    assert result["processes"] == 4 and result["trained"] == result["parameters"]
    assert sum(result["parts"].values()) == result["device_bytes"]
    assert result["checkpoint_bytes"] == 12 * result["trained"]
    assert result["speed"]["tokens_per_second"] == pytest.approx(4e12 / result["flops_per_token"])
    assert result["per_machine"] == {"processes": 4, "host_bytes": 4 * result["device_bytes"]}
    assert any("supervised" in note for note in result["notes"]), "what is assumed is said"


def test_fit_tells_what_fits_and_why_the_rest_does_not(place, tmp_path, planned):
    config = json.loads((place / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    words = [*words_of(place, "tuning=full", "plan.reserve_gib=0"), "device=ascend", "micro_batch_tokens=1400"]
    words.append(f"model.path={tmp_path}")
    whole = planned(*words, "nproc=2", "sharding=zero2", "plan.reserve_gib=0.5")
    assert whole["beside_bytes"] == {
        "reserve for context and libraries": 2**29,
        "collective library, two buffers a communicator": 2 * 2 * 200 * 2**20,
    }
    fitted = planned(*words, "device=auto", "--fit", "180MiB", "x2")
    assert fitted["per_machine"]["processes"] == 2
    assert any("2 processes of fit are taken to be on one machine" in note for note in fitted["notes"])
    lines = fitted["fits"]
    fitting = [line for line in lines if line["fits"]]
    assert 0 < len(fitting) < len(lines) == 24
    assert lines[: len(fitting)] == fitting and all(line["needs_bytes"] <= 180 * 2**20 for line in fitting)
    assert all(line["needs_bytes"] > 180 * 2**20 and "GiB" in line["reason"] for line in lines[len(fitting) :])
    assert {line["micro_batch_tokens"] for line in lines} <= {1400, 700, 350, 256}


def test_a_plan_of_a_run_that_was_with_flops_measured_here(place, tmp_path, planned):
    resolved = tmp_path / "resolved.yaml"
    save_resolved(compose("train", words_of(place, "sharding=zero1")), resolved)
    result = planned("--resolved", str(resolved), "nproc=2", "plan.measure=true")
    assert result["processes"] == 2
    assert result["speed"]["from"] == "a matrix product timed here"
    assert 1e9 < result["speed"]["flops"] < 1e14, "of a CPU"


@pytest.mark.parametrize(
    ("words", "said"),
    [(["fit=much"], "64GiB x 8"), (["model.path=/nowhere"], "a plan needs no weights"), (["plan.mfu=2"], "plan.mfu")],
)
def test_faults_name_the_remedy(place, capfd, words, said):
    assert main(["plan", *words_of(place), *words]) == EXIT_USER_FAULT
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective.balance_loss=0.01"], "objective.balance_loss: above 0, but family 'llama' has no routed experts"),
        (
            ["objective.indexer_stage=sparse"],
            "objective.indexer_stage: asks for the indexer's loss, and family 'llama'",
        ),
        (["objective.indexer_kl=1"], "objective.indexer_kl: asks for the indexer's loss, and family 'llama'"),
    ],
)
def test_what_training_would_refuse_of_the_objective_is_refused(place, capfd, monkeypatch, words, said):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert main(["plan", *words_of(place, "tuning=full"), *words]) == EXIT_USER_FAULT
    assert said in capfd.readouterr().err


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """A model whose mixers are wrapped for packing, with a router that asks for a balancing loss."""
    return save("qwen3_next", tmp_path_factory.mktemp("leaky"), router_aux_loss_coef=0.001)


def test_what_a_run_notes_is_noted(place, leaky, planned):
    words = [*words_of(place, "tuning=full", f"model.path={leaky}"), "sharding=zero3"]
    said = "runs its mixers sample by sample, which ranks of ZeRO-3 cannot do in step, so each row holds one sample"
    two, one = planned(*words, "nproc=2"), planned(*words, "nproc=1")
    assert [said in " ".join(result["notes"]) for result in (two, one)] == [True, False]
    assert two["micro_batch"]["tokens"] == 256 < one["micro_batch"]["tokens"], "and counted with"
    assert any("router_aux_loss_coef=0.001" in note for note in one["notes"])


def test_a_setting_that_a_run_would_refuse_does_not_fit(place, leaky, planned, capfd):
    words = [*words_of(place, "tuning=full", f"model.path={leaky}"), "micro_batch_tokens=256", "packing=on"]
    lines = planned(*words, "model.precision=fp32", "--fit", "64GiB", "x2")["fits"]
    assert {line["sharding"] for line in lines if not line["fits"]} == {"zero3", "zero3_offload"}
    refused = [line for line in lines if line["needs_bytes"] is None]
    assert len(refused) == 8 and all("cannot do in step" in line["reason"] for line in refused)
    assert main(["plan", *words, "sharding=zero3", "nproc=2"]) == EXIT_USER_FAULT
    assert "packing: on, but family 'qwen3_next'" in capfd.readouterr().err
