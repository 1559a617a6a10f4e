"""The indexer's loss is what the DeepSeek-V3.2 report says, trains the indexer only, and counts every token once."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from configs.compose import compose
from configs.errors import ConfigError
from configs.schema.objective import CausalLMConfig, IndexerStage
from tests.tiny import samples_of, write_prepared
from tests.tiny_families import build, save
from train.data.collate import collate
from train.data.plan import RowKind
from train.data.sampler import GlobalStep
from train.models.families import FAMILIES
from train.objectives.causal_lm import CausalLM
from train.objectives.indexer import choose_indexer
from train.objectives.totals import Totals
from train.ops.indexer import IndexerLoss, indexers_of
from train.ops.packed_mixers import wrap_mixers
from train.run import train
from train.run_folder import RunFolder

CPU = torch.device("cpu")
NAMES = ("deepseek_v32", "glm_moe_dsa", "glm5_next")
STAGES = {IndexerStage.warmup: "warmup", IndexerStage.sparse: "sparse"}
# So many heads that scores do not tie at 0, where the selection would hang on the width of the row.
HEADS = {"index_n_heads": 32}
LENGTHS = (21, 13, 30, 9, 17)


def tiny(name, **changes):
    """A model whose attention and indexer both choose clearly, and differently."""
    model = build(name, **HEADS, **changes).train()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if part.endswith(("self_attn.q_b_proj.weight", "wq_b.weight")):
                parameter.mul_(8)
    return model


def objective(stage, module, **weights) -> CausalLM:
    """As a run has it."""
    made = CausalLM(CausalLMConfig(indexer_stage=stage, **weights))
    made.choose(module, lambda text: None, on_host=True)
    made.attach(module)
    return made


def data(lengths=LENGTHS, seed=0):
    return samples_of(lengths, vocab_size=300, seed=seed)


def step_of(samples) -> GlobalStep:
    """All samples; the rows are the test's to make."""
    targets = sum(int((s.spans[:, 1] - s.spans[:, 0]).sum()) for s in samples)
    return GlobalStep(np.arange(len(samples)), sum(len(s.input_ids) for s in samples), targets, [])


def gradients(module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}


def take(stage, module, batches, samples, **weights) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """One global step: its figures and its gradients."""
    module.zero_grad()
    totals, made = Totals(step_of(samples)), objective(stage, module, **weights)
    for rows, kind in batches:
        batch = collate(rows, samples.__getitem__, kind=kind, device=CPU)
        totals.add(made.terms(module, batch)).backward()
    totals.read()
    return totals.means(totals.sums), gradients(module)


def alone(samples):
    """One sample a micro-batch, without padding or boundaries."""
    return [(((i,),), RowKind.single) for i in range(len(samples))]


# --- what the loss is


def naive(model, ids, stage) -> float:
    """Mean over queries and layers, in fp64 and with loops, from transformers' own eager attention weights."""
    model = copy.deepcopy(model).double().eval()
    text = model.config.get_text_config()
    text._attn_implementation = "eager"
    model.set_experts_implementation("eager")  # the others know no fp64
    if stage is IndexerStage.warmup:
        text.index_topk = 4096
        for indexer in indexers_of(model):
            indexer.index_topk = 4096
    layers = [m for m in model.modules() if getattr(m, "indexer", None) is not None]
    heard = {}
    hooks = [
        hook
        for layer in layers
        for hook in (
            layer.register_forward_hook(lambda m, a, out: heard.setdefault(m, {}).update(weights=out[1][0])),
            layer.indexer.register_forward_pre_hook(
                lambda m, a, k: heard.setdefault(m, {}).update(a=a, k=k), with_kwargs=True
            ),
        )
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    sums = []
    for layer in layers:
        attention = heard[layer]["weights"].sum(0)
        call = heard[layer.indexer]
        inputs = [*call["a"], *call["k"].values()]
        scorer = pooled_scores if text.model_type.startswith("glm5_next") else token_scores
        scores, groups = scorer(layer.indexer, *(x for x in inputs if x is not None))
        sums.append(kl_by_loops(attention, scores, groups, None if stage is IndexerStage.warmup else text))
    return sum(sums) / len(sums) / ids.shape[1]


def kl_by_loops(attention, scores, groups, config) -> float:
    """For each query: what may be ranked, of that the best, the attention each gets, and the divergence."""
    total = 0.0
    for t in range(len(attention)):
        open_ = [j for j, group in enumerate(groups) if group[-1] <= t]
        if config is not None:
            best = config.index_topk // len(groups[0])
            open_ = sorted(open_, key=lambda j: -float(scores[t, j]))[:best]
        if not open_:
            continue
        mass = torch.stack([attention[t, groups[j]].sum() for j in open_])
        p, q = mass / mass.sum(), torch.stack([scores[t, j] for j in open_]).softmax(0)
        total += float((p * (p / q).log()).sum())
    return total


def token_scores(indexer, hidden, q_resid, rotary, *rest):
    """Equation 1 of the report, one head at a time."""
    cos, sin = (x[0] for x in rotary)
    half = cos.shape[-1] // 2
    interleaved = type(indexer).__name__ == "GlmMoeDsaIndexer"

    def turned(x):
        first, second = (x[:, :half], x[:, half : 2 * half])
        if interleaved:
            first, second = (x[:, 0 : 2 * half : 2], x[:, 1 : 2 * half : 2])
        c, s = cos[:, :half], sin[:, :half]
        return torch.cat([first * c - second * s, second * c + first * s, x[:, 2 * half :]], -1)

    with torch.no_grad():
        keys = turned(indexer.k_norm(indexer.wk(hidden[0])))
        weights = indexer.weights_proj(hidden[0]) * indexer.n_heads**-0.5
        queries = indexer.wq_b(q_resid[0]).view(len(keys), indexer.n_heads, -1)
        scores = sum(
            weights[:, h, None] * (turned(queries[:, h]) @ keys.T * indexer.head_dim**-0.5).relu()
            for h in range(indexer.n_heads)
        )
    return scores, [[t] for t in range(len(keys))]


def pooled_scores(indexer, hidden, q_resid, mask):
    """As above, for the gated mean of each whole pool of keys."""
    size = indexer.index_kpool
    with torch.no_grad():
        keys = indexer.k_norm(indexer.wk(hidden[0]))
        gates = hidden[0] @ indexer.index_kpool_compress_gate.T
        groups = [list(range(start, start + size)) for start in range(0, len(keys) - size + 1, size)]
        pools = torch.stack(
            [((gates[g] + indexer.index_kpool_compress_ape).softmax(0) * keys[g]).sum(0) for g in groups]
        )
        weights = indexer.weights_proj(hidden[0]) * indexer.n_heads**-0.5
        queries = indexer.wq_b(q_resid[0]).view(len(keys), indexer.n_heads, -1)
        scores = sum(
            weights[:, h, None] * (queries[:, h] @ pools.T * indexer.head_dim**-0.5).relu()
            for h in range(indexer.n_heads)
        )
    return scores, groups


@pytest.mark.parametrize("stage", STAGES, ids=STAGES.get)
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_divergence_of_the_report(name, stage):
    model = tiny(name)
    [sample] = data((27,))
    ids = torch.from_numpy(sample.input_ids)[None].long()
    expected = naive(model, ids, stage)
    found, _ = take(stage, model, alone([sample]), [sample])
    assert expected > 0.1
    assert found["indexer_kl"] == pytest.approx(expected, rel=1e-4)


def test_the_model_attends_as_before_in_the_sparse_stage_and_to_all_keys_in_the_warm_up():
    model, dense = tiny("deepseek_v32"), tiny("deepseek_v32", index_topk=4096)
    ids = torch.arange(3, 43)[None]
    before = [each(input_ids=ids, use_cache=False).logits for each in (model, dense)]
    assert not torch.allclose(*before, atol=1e-2)
    for stage, wanted in ((IndexerStage.sparse, before[0]), (IndexerStage.warmup, before[1])):
        watched = tiny("deepseek_v32")
        objective(stage, watched)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.allclose(watched(input_ids=ids, use_cache=False).logits, wanted, atol=1e-5)


# --- what it trains


@pytest.mark.parametrize("name", NAMES)
def test_it_gives_a_gradient_to_the_indexers_alone_and_takes_none_from_the_loss(name):
    samples = data((21, 13))
    model = tiny(name)
    inside = {n for n, _ in model.named_parameters() if ".indexer." in n}
    _, off = take(IndexerStage.none, model, alone(samples), samples)
    model = tiny(name)
    figures, on = take(IndexerStage.sparse, model, alone(samples), samples)
    assert set(on) - set(off) == inside and not inside & set(off)
    # Else the rest of the model would learn to be easy to index.
    assert all(torch.equal(on[n], off[n]) for n in off)
    _, twice = take(IndexerStage.sparse, tiny(name), alone(samples), samples, indexer_kl=2.0)
    assert all(torch.allclose(twice[n], 2 * on[n], rtol=1e-4, atol=1e-9) for n in inside)
    assert set(figures) == {"loss", "indexer_kl"}


def test_only_the_indexers_train_in_the_warm_up_and_without_their_loss_all_but_them():
    for stage, trained in ((IndexerStage.warmup, {True}), (IndexerStage.none, {False}), (IndexerStage.sparse, {True})):
        model, said = tiny("glm_moe_dsa").requires_grad_(True), []
        choose_indexer(stage, model, said.append)
        grads = {".indexer." in n: p.requires_grad for n, p in model.named_parameters()}
        assert {grads[True]} == trained and grads[False] is (stage is not IndexerStage.warmup)
        assert len(said) == 1 and said[0].startswith("indexer: ")
        choose_indexer(stage, model, said.append)
        assert len(said) == (1 if stage is IndexerStage.none else 2), "what was frozen before is told of already"


def adapted(*targets):
    from peft import LoraConfig, get_peft_model

    wanted = f".*({'|'.join(targets)})"
    return get_peft_model(tiny("deepseek_v32", num_hidden_layers=1), LoraConfig(r=2, target_modules=wanted))


def test_an_adapter_on_the_indexer_and_its_loss_need_each_other():
    with pytest.raises(ConfigError, match=r"tuning\.targets: hold projections of the indexer, which gets no gradient"):
        choose_indexer(IndexerStage.none, adapted("o_proj", "indexer.wk"), print)
    with pytest.raises(ConfigError, match=r"tuning\.targets: leave the indexer out, .*=sparse would have nothing"):
        choose_indexer(IndexerStage.sparse, adapted("o_proj"), print)
    module = adapted("o_proj", "indexer.wk")
    samples = data((21, 13))
    _, found = take(IndexerStage.sparse, module, alone(samples), samples)
    assert any(".indexer.wk.lora_B" in n for n in found) and all(".lora_" in n for n in found)
    module = adapted("o_proj", "indexer.wk")
    choose_indexer(IndexerStage.warmup, module, lambda text: None)
    assert {n.split(".")[-4] for n, p in module.named_parameters() if p.requires_grad} == {"wk"}


@pytest.mark.parametrize(
    ("name", "stage", "lr", "kl_falls", "loss_falls"),
    [("deepseek_v32", IndexerStage.warmup, 3e-3, 10, 1), ("deepseek_v32", IndexerStage.sparse, 3e-3, 2, 10)],
    ids=["warmup", "sparse"],
)
def test_both_losses_fall(name, stage, lr, kl_falls, loss_falls):
    module, samples = tiny(name, num_hidden_layers=2), data((40,))
    made = objective(stage, module)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr, weight_decay=0)
    batch = collate(((0,),), samples.__getitem__, kind=RowKind.single, device=CPU)
    course = []
    for _ in range(60):
        totals = Totals(step_of(samples))
        totals.add(made.terms(module, batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        totals.read()
        course.append(totals.means(totals.sums))
    first, last = course[0], course[-1]
    print({key: (first[key], last[key]) for key in first})  # shown by pytest -rP
    assert last["indexer_kl"] * kl_falls < first["indexer_kl"]
    assert last["loss"] * loss_falls <= first["loss"] * (1 + 1e-6)


# --- how often it counts


@pytest.mark.parametrize("stage", STAGES, ids=STAGES.get)
@pytest.mark.parametrize("name", NAMES)
def test_activations_computed_again_change_no_bit(name, stage):
    samples = data((21, 13))
    rows = [(((0,), (1,)), RowKind.padded), (((0, 1),), RowKind.packed)]
    modules = [tiny(name), tiny(name)]
    for module in modules:
        wrap_mixers(module, FAMILIES[name])
    kept = take(stage, modules[0], rows, samples)
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = take(stage, module, rows, samples)
    assert again[0] == kept[0]
    assert set(again[1]) == set(kept[1]) and all(torch.equal(again[1][n], kept[1][n]) for n in kept[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_the_same_however_it_is_split(name):
    samples = data()
    figures, wanted = take(IndexerStage.sparse, tiny(name), alone(samples), samples)
    splits = {
        "padded": [(((2,), (0,), (4,), (1,), (3,)), RowKind.padded)],
        "padded, two passes and a filler": [
            (((2,), (3,)), RowKind.padded),
            (((0,), (4,), (1,)), RowKind.padded),
            ((), RowKind.padded),
        ],
        "packed": [(((2, 0, 4),), RowKind.packed), (((3, 1),), RowKind.packed), ((), RowKind.packed)],
    }
    for split, batches in splits.items():
        module = tiny(name)
        if split == "packed":
            assert wrap_mixers(module, FAMILIES[name])
        found, grads = take(IndexerStage.sparse, module, batches, samples)
        assert found == pytest.approx(figures, rel=1e-5), split
        assert set(grads) == set(wanted)
        for n, gradient in wanted.items():
            assert (grads[n] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, f"{split}: {n}"


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_packed_samples_count_as_if_alone(name):
    """By positions that begin again, from which transformers makes the mask of these families."""
    samples = data((21, 13, 30))

    def divergences(*rows):
        model = tiny(name)
        loss, total = IndexerLoss(model, dense=False), 0.0
        for row in rows:
            ids = np.concatenate([samples[i].input_ids for i in row])
            positions = np.concatenate([np.arange(len(samples[i].input_ids)) for i in row])
            with loss.listening():
                model(input_ids=torch.from_numpy(ids)[None].long(), position_ids=torch.from_numpy(positions)[None])
            total = total + loss.total()
        total.backward()
        return total.item(), gradients(model)

    (packed, grads), (apart, wanted) = divergences((0, 1, 2)), divergences((0,), (1,), (2,))
    assert packed == pytest.approx(apart, rel=1e-5)
    assert all((grads[n] - wanted[n]).norm() <= 2e-5 * wanted[n].norm() for n in wanted)


def test_half_precision_weights_are_compared_in_single():
    samples = data((21, 13))
    single, _ = take(IndexerStage.sparse, tiny("deepseek_v32"), alone(samples), samples)
    half, grads = take(IndexerStage.sparse, tiny("deepseek_v32", dtype=torch.bfloat16), alone(samples), samples)
    assert half["indexer_kl"] == pytest.approx(single["indexer_kl"], rel=0.05)
    assert any(".indexer." in n for n in grads)


# --- through a run


def runs(name, tmp_path, *layouts):
    """A run of two steps for each layout, by its metrics."""
    model = save(name, tmp_path / "model", **HEADS)
    prepared = write_prepared(tmp_path / "data", {"train": data(LENGTHS * 2)})
    for number, layout in enumerate(layouts):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        paths = [f"model.path={model}", f"dataset.path={prepared}", "device=cpu", "model.precision=fp32"]
        sizes = ["max_steps=2", "batch_tokens=120", "max_length=30", "optim.lr=0.01", "tuning=full", "optim=sgd"]
        cfg = compose("train", [*paths, *sizes, *layout])
        train(cfg, model_dir=model, prepared=prepared, run_dir=run_dir)
        yield [json.loads(line) for line in RunFolder(run_dir).metrics.read_text().splitlines()]


@pytest.mark.parametrize(
    "name", ["deepseek_v32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("glm_moe_dsa", "glm5_next"))]
)
def test_a_run_reports_it_and_one_without_does_not(name, tmp_path):
    on, split, off = runs(
        name,
        tmp_path,
        ["objective.indexer_stage=sparse", "micro_batch_tokens=400", "packing=off"],
        ["objective.indexer_kl=1", "micro_batch_tokens=40"],
        ["micro_batch_tokens=400", "packing=off"],
    )
    assert [line["indexer_kl"] for line in on] == pytest.approx([line["indexer_kl"] for line in split], rel=1e-4)
    assert [line["grad_norm"] for line in on] == pytest.approx([line["grad_norm"] for line in split], rel=1e-4)
    assert all("indexer_kl" not in line for line in off)
    assert on[0]["loss"] == off[0]["loss"] and on[0]["grad_norm"] > off[0]["grad_norm"]
