"""What an objective asks of a family, the balance of its experts, and the gauge on its hyper-connections."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import MixtralConfig

from configs.compose import compose
from configs.errors import ConfigError
from configs.schema.objective import CausalLMConfig, IndexerStage
from tests.tiny import samples_of, write_prepared
from tests.tiny_families import build, save
from train.checkpoint.layout import CheckpointReader
from train.data.collate import collate
from train.data.plan import RowKind
from train.data.sampler import GlobalStep
from train.loop import Loop
from train.objectives.base import Term, Unit
from train.objectives.causal_lm import CausalLM
from train.objectives.totals import Totals
from train.ops.mixing import hyper_connections_of
from train.ops.packed_attention import register
from train.prove.reload import load_and_save
from train.run import train
from train.run_folder import RunFolder

CPU = torch.device("cpu")
SAMPLES = samples_of((21, 13, 30, 9, 17), vocab_size=300)
STEP = GlobalStep(np.arange(5), 90, sum(int((s.spans[:, 1] - s.spans[:, 0]).sum()) for s in SAMPLES), [])
# The affinities of each family's routers, written out.
AFFINITY = {
    "qwen3_5_moe_text": lambda x: x.softmax(-1),
    "qwen3_next": lambda x: x.softmax(-1),
    "minimax": lambda x: x.softmax(-1),
    "minimax_m2": lambda x: 1 / (1 + (-x).exp()),
    "minimax_m3_vl": lambda x: 1 / (1 + (-x).exp()),
    "deepseek_v4": lambda x: (1 + x.exp()).log().sqrt(),
    "glm5_next": lambda x: 1 / (1 + (-x).exp()),
}
ALWAYS = ("qwen3_5_moe_text", "minimax_m2", "deepseek_v4")
"""In the fast tests one for each kind of affinity."""


def tiny(name, **changes):
    """A model whose experts are loaded unevenly."""
    if name == "glm5_next":
        changes["index_n_heads"] = 32  # fewer tie at 0, where attention hangs on the width of the row
    model = build(name, **changes).train()
    with torch.no_grad():
        for router in routers_of(model):
            router.weight.mul_(10)
    return model


def routers_of(model):
    return [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]


def take(module, batches, *, recompute=False, **config) -> tuple[dict[str, float], dict[str, torch.Tensor], CausalLM]:
    """One global step of `SAMPLES`: its figures, its gradients, and the objective."""
    module.zero_grad()
    if recompute:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made, totals = CausalLM(CausalLMConfig(**config)), Totals(STEP)
    made.attach(module)
    for rows, kind in batches:
        totals.add(made.terms(module, collate(rows, SAMPLES.__getitem__, kind=kind, device=CPU))).backward()
    totals.read()
    grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return totals.means(totals.sums), grads, made


ALONE = [(((i,),), RowKind.single) for i in range(5)]
SPLITS = {
    "padded": [(((2,), (0,), (4,), (1,), (3,)), RowKind.padded)],
    "two passes and a filler": [
        (((2,), (3,)), RowKind.padded),
        (((0,), (4,), (1,)), RowKind.padded),
        ((), RowKind.padded),
    ],
}


def naive_balance(name, model) -> float:
    """Equations 17 to 20 of DeepSeek-V3 for each sample alone, in fp64 and with loops; mean over samples and layers."""
    found, logits = [], []
    hooks = [r.register_forward_hook(lambda m, a, out: logits.append(out[0].double())) for r in routers_of(model)]
    with torch.no_grad():
        for sample in SAMPLES:
            model(input_ids=torch.from_numpy(sample.input_ids)[None].long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer in logits:
        affinity = AFFINITY[name](layer)
        tokens, experts = affinity.shape
        chosen = affinity.argsort(-1, descending=True)[:, :2].tolist()
        total = 0.0
        for i in range(experts):
            f = experts / (2 * tokens) * sum(i in best for best in chosen)
            p = sum(float(affinity[t, i] / affinity[t].sum()) for t in range(tokens)) / tokens
            total += f * p
        found.append(total)
    return sum(found) / len(found)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in AFFINITY]
)
def test_the_balance_is_that_of_each_sample_however_a_step_is_split(name):
    model = tiny(name)
    expected = naive_balance(name, model)
    assert expected > 1.02
    figures, grads, _ = take(model, SPLITS["padded"], balance_loss=1.0)
    assert figures["balance_loss"] == pytest.approx(expected, rel=1e-4)
    assert all(grads[n].any() for n, p in model.named_parameters() if any(p is r.weight for r in routers_of(model)))


def test_a_split_changes_no_gradient():
    wanted, gradients, _ = take(tiny("minimax_m2"), ALONE, balance_loss=0.5)
    off = take(tiny("minimax_m2"), ALONE)[1]
    moved = [n for n in off if n.endswith("gate.weight") and (off[n] - gradients[n]).norm() > 0.01 * off[n].norm()]
    assert len(moved) == 3
    packed = [(((2, 0, 4),), RowKind.packed), (((3, 1),), RowKind.packed), ((), RowKind.packed)]
    again = [*SPLITS.items(), ("recomputed", SPLITS["two passes and a filler"]), ("packed", packed)]
    for split, batches in again:
        module = tiny("minimax_m2", attention=register() if split == "packed" else None)
        found, grads, _ = take(module, batches, recompute=split == "recomputed", balance_loss=0.5)
        assert found == pytest.approx(wanted, rel=1e-5), split
        for n, gradient in gradients.items():
            assert (grads[n] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, f"{split}: {n}"


def test_packed_samples_are_balanced_each_by_itself():
    """A packed row differs from its samples in attention only, which this family is not packed for: routers see it."""
    from transformers.models.qwen3_next.modeling_qwen3_next import load_balancing_loss_func

    from train.ops.balance import balance, mean_over_samples

    logits = torch.randn(24, 8, generator=torch.Generator().manual_seed(0)) * 3
    packed = balance(logits.softmax(-1), mean_over_samples(((9, 15),), 24, CPU), 2)
    padded = balance(logits.softmax(-1), mean_over_samples(((9,), (7,)), 12, CPU), 2)
    for found, rows in ((packed[0], slice(0, 9)), (packed[1], slice(9, 24)), (padded[1], slice(12, 19))):
        # Of one sample in one layer it is transformers' loss over k.
        assert float(found) == pytest.approx(float(load_balancing_loss_func((logits[rows],), 8, 2)) / 2, rel=1e-5)


# --- hyper-connections


@pytest.mark.parametrize("name", ["deepseek_v4", "glm5_next"])
def test_the_mixing_error_is_small_until_iterations_are_cut(name):
    errors = {}
    for iterations in (20, 3, 1):
        module = build(name, hc_sinkhorn_iters=iterations).train()
        with torch.no_grad():
            for connection in hyper_connections_of(module):
                connection.base.normal_(std=2.0)
        figures, _, made = take(module, ALONE[:1])
        errors[iterations] = made.gauges()["mixing_error"]
        assert set(figures) == {"loss"}
    print(name, errors)
    assert errors[20] < 0.03 < 0.1 < errors[3] < 0.5 < errors[1] < 2


def test_a_fresh_model_mixes_well_and_one_without_has_no_such_figure():
    assert 0 < take(build("deepseek_v4").train(), ALONE)[2].gauges()["mixing_error"] < 1e-3
    assert take(build("llama").train(), ALONE)[2].gauges() == {}


def test_the_gauge_is_of_the_last_micro_batch_and_recomputation_leaves_it():
    module = build("deepseek_v4").train()
    made = take(module, ALONE, recompute=True)[2]
    last = made.gauges()["mixing_error"]
    take(module, ALONE[:-1])
    alone = take(module, ALONE[-1:])[2].gauges()["mixing_error"]
    assert last == alone


def test_ranks_report_the_highest_gauge_and_the_sum_of_the_terms():
    """Two ranks by hand: what the other one gives is added as a collective would."""
    others = [0.0, 0.0, 0.0, 10.0, 4.0, 0.0, 7.0, 0.0, 1.0]

    def add(mine):
        return [a + b for a, b in zip(mine, others, strict=True)]

    loop = SimpleNamespace(
        world=SimpleNamespace(rank=0, size=2, all_reduce_sum=add),
        heartbeat=SimpleNamespace(enter=lambda phase: None),
        stop=SimpleNamespace(wanted=lambda: None),
        checkpointer=SimpleNamespace(fault=lambda: None),
        objective=SimpleNamespace(gauges=lambda: {"mixing_error": 3.0, "other": 5.0}),
    )
    totals = Totals(STEP)
    totals.add([Term("loss", torch.tensor(2.0), Unit.targets), Term("extra", torch.tensor(1.0), Unit.samples, 0.5)])
    totals.read()
    sums, gauges, sound = Loop._agree(loop, totals, 1.0)
    assert (sums, gauges, sound) == ({"loss": 12.0, "extra": 5.0}, {"mixing_error": 7.0, "other": 5.0}, True)
    assert totals.means(sums) == {"loss": 12.0 / STEP.num_targets, "extra": 1.0}


# --- terms


def test_each_term_is_divided_by_its_own_count():
    weight = torch.ones((), requires_grad=True)
    totals = Totals(STEP)
    for _ in range(2):
        terms = [
            Term("loss", weight * 6, Unit.targets),
            Term("a", weight * 9, Unit.tokens, 2.0),
            Term("b", weight * 5, Unit.samples, 0.1),
        ]
        totals.add(terms).backward()
    totals.read()
    assert float(weight.grad) == pytest.approx(2 * (6 / STEP.num_targets + 2.0 * 9 / 90 + 0.1 * 5 / 5))
    assert totals.losses == [6, 6] and totals.means(totals.sums)["a"] == pytest.approx(18 / 90)


def test_a_term_that_is_not_finite_spoils_the_gradient_whatever_its_own_is():
    weight = torch.ones((), requires_grad=True)
    terms = [Term("loss", weight * 1, Unit.targets), Term("a", weight * 0 + torch.inf, Unit.tokens)]
    Totals(STEP).add(terms).backward()
    assert math.isnan(float(weight.grad))


# --- what is refused and said


def check(name, **config) -> list[str]:
    said: list[str] = []
    CausalLM(CausalLMConfig(**config)).check(build(name).config, said.append)
    return said


@pytest.mark.parametrize(
    ("name", "config", "told"),
    [
        ("deepseek_v3", {"balance_loss": 0.1}, r"objective\.balance_loss: .*'deepseek_v3' balances its experts by"),
        ("kimi_k25", {"balance_loss": 0.1}, r"'deepseek_v3' balances its experts by a bias"),
        ("glm_moe_dsa", {"balance_loss": 0.1}, r"'glm_moe_dsa' balances its experts by a bias"),
        ("llama", {"balance_loss": 0.1}, r"'llama' has no routed experts"),
        ("llama", {"indexer_kl": 1.0}, r"objective\.indexer_kl: .*'llama' cannot have it: it has no indexer"),
        ("deepseek_v4", {"indexer_stage": IndexerStage.warmup}, r"objective\.indexer_stage: .*'deepseek_v4' .*entries"),
        ("minimax_m3_vl", {"indexer_kl": 1.0}, r"'minimax_m3_vl_text' cannot have it: its indexer ranks blocks"),
    ],
)
def test_what_a_family_has_nothing_for_is_refused_by_its_config_alone(name, config, told):
    with pytest.raises(ConfigError, match=told):
        check(name, **config)


def test_a_balancing_loss_that_the_config_asks_for_and_the_run_does_not_is_told():
    [said] = check("qwen3_5_moe")
    assert "router_aux_loss_coef=0.001" in said and "objective.balance_loss=0" in said and "0.002" in said
    assert check("qwen3_5_moe", balance_loss=0.01) == [] == check("deepseek_v3") == check("llama")


def test_of_a_balancing_loss_that_is_not_known_here_nothing_false_is_said():
    said: list[str] = []
    mixtral = MixtralConfig(router_aux_loss_coef=0.02)
    CausalLM(CausalLMConfig()).check(mixtral, said.append)
    assert said == []
    with pytest.raises(ConfigError, match="'mixtral' is none whose routers crosstune knows"):
        CausalLM(CausalLMConfig(balance_loss=0.1)).check(mixtral, said.append)


def test_either_key_turns_the_indexers_loss_on():
    def cfg(*words):
        return compose("train", ["model.path=m", "dataset.path=d", "tuning=full", *words]).objective

    typed = [cfg(*words) for words in ([], ["objective.indexer_kl=0.5"], ["objective.indexer_stage=sparse"])]
    assert [(each.stage.value, each.indexer_weight) for each in typed] == [
        ("none", 0.0),
        ("sparse", 0.5),
        ("sparse", 1.0),
    ]
    with pytest.raises(
        ConfigError, match=r"objective\.indexer_stage: trains the indexer, on which tuning=lora puts no"
    ):
        cfg("objective.indexer_kl=1", "tuning=lora")
    warm = cfg("objective.indexer_stage=warmup", "objective.indexer_kl=2")
    assert (warm.stage.value, warm.indexer_weight) == ("warmup", 2.0)
    with pytest.raises(ConfigError, match=r"objective\.balance_loss: -1"):
        cfg("objective.balance_loss=-1")


def run(tmp_path, name, *words):
    """Two steps of a saved model, by their metrics."""
    return trained(tmp_path, name, *words)[1]


def trained(tmp_path, name, *words):
    """The config and the metrics of two steps of a saved model, in a folder of their own."""
    model = tmp_path / "model"
    if not model.exists():
        save(name, model)
        write_prepared(tmp_path / "data", {"train": SAMPLES})
    paths = [f"model.path={model}", f"dataset.path={tmp_path / 'data'}", "device=cpu", "model.precision=fp32"]
    sizes = ["max_steps=2", "batch_tokens=120", "max_length=30", "tuning=full", "packing=off"]
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    cfg = compose("train", [*paths, *sizes, *words])
    train(cfg, model_dir=model, prepared=tmp_path / "data", run_dir=folder)
    return cfg, [json.loads(line) for line in RunFolder(folder).metrics.read_text().splitlines()], RunFolder(folder)


def test_a_run_reports_the_balance_and_one_that_cannot_be_ends_before_the_weights_load(tmp_path):
    lines = run(tmp_path, "minimax_m2", "objective.balance_loss=0.01")
    assert len(lines) == 2 and all(line["balance_loss"] > 1 and "mixing_error" not in line for line in lines)
    next((tmp_path / "model").glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match=r"objective\.indexer_stage: .*'minimax_m2' cannot have it"):
        run(tmp_path, "minimax_m2", "objective.indexer_stage=sparse")


@pytest.mark.slow
def test_a_run_of_v4_reports_how_it_mixes(tmp_path):
    whole, split = (
        run(tmp_path, "deepseek_v4", "objective.balance_loss=0.01", f"micro_batch_tokens={tokens}")
        for tokens in (400, 40)
    )
    assert len(whole) == 2 and all(0 < line["mixing_error"] < 1e-3 for line in [*whole, *split])
    for key in ("loss", "balance_loss", "grad_norm"):
        assert [line[key] for line in whole] == pytest.approx([line[key] for line in split], rel=1e-4)


def test_a_proof_loads_the_indexers_that_the_run_trained(tmp_path):
    cfg, _, folder = trained(tmp_path, "glm_moe_dsa", "objective.indexer_stage=sparse", "checkpoint.every=2")
    [saved] = folder.checkpoints.glob("step-*")
    out = tmp_path / "again"
    out.mkdir()
    load_and_save(cfg, folder, out)
    [again] = out.glob("step-*")
    with CheckpointReader(saved) as before, CheckpointReader(again) as after:
        assert before.params == after.params and any(".indexer." in name for name in before.params)
