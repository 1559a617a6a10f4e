"""Loss and gradients of the chunked head are those of whole logits, on every family, and no logits are ever whole."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.errors import ConfigError
from configs.schema.objective import CausalLMConfig
from tests.tiny_families import CONFIGS, build
from train.objectives.causal_lm import CausalLM
from train.ops.loss_head import LossHead, Scoring, _Score, score

WORDS, WIDTH = 53, 8
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
FORMULAS = [
    Scoring(),
    Scoring(label_smoothing=0.1, z_weight=0.01),
    Scoring(factor=0.5, cap=3.0),
    Scoring(label_smoothing=0.2, z_weight=0.1, factor=2.0, cap=4.0),
]


def problem(positions: int, dtype: torch.dtype, bias: bool):
    draw = torch.Generator().manual_seed(positions)

    def tensor(*shape):
        return (torch.randn(shape, generator=draw) * 2).to(dtype).requires_grad_()

    targets = torch.randint(WORDS, (positions,), generator=draw)
    return tensor(positions, WIDTH), tensor(WORDS, WIDTH), tensor(WORDS) if bias else None, targets


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("scoring", FORMULAS)
@pytest.mark.parametrize(("positions", "rows", "bias"), [(1, 4, False), (12, 4, True), (13, 4, False), (3, 1000, True)])
def test_loss_and_gradients_are_those_of_whole_logits(scoring, positions, rows, bias, on_host):
    inputs = problem(positions, torch.float32, bias)
    twins = [None if each is None else each.detach().double().requires_grad_() for each in inputs[:3]]
    wanted, wanted_squares = score(F.linear(*twins).double(), inputs[3], scoring)
    loss, squares = _Score.apply(*inputs, scoring, rows * 4 * WORDS, on_host, True)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    if scoring.z_weight:
        assert squares.item() == pytest.approx(wanted_squares.item(), rel=1e-5)
    (wanted * 0.37).backward()
    (loss * 0.37).backward()
    for mine, theirs in zip(inputs[:3], twins, strict=True):
        if mine is not None:
            assert theirs.grad.any()
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("scoring", FORMULAS[1:3])
@pytest.mark.parametrize(("positions", "rows"), [(300, 16), (300, 35), (201, 64), (64, 32), (1, 1000)])
def test_in_bf16_it_rounds_no_worse_than_whole_logits_do(monkeypatch, scoring, positions, rows, on_host):
    """Of a host in several chunks, which are filled up to 64 and scored in several pieces."""
    monkeypatch.setattr("train.ops.loss_head.CACHED_BYTES", 7 * 4 * WORDS)
    inputs = problem(positions, torch.bfloat16, positions % 2 == 0)
    exact, whole = (
        [x if x is None else x.detach().to(d).requires_grad_() for x in inputs[:3]]
        for d in (torch.float64, torch.bfloat16)
    )
    score(F.linear(*exact), inputs[3], scoring)[0].backward()
    score(F.linear(*whole), inputs[3], scoring)[0].backward()
    _Score.apply(*inputs, scoring, rows * 4 * WORDS, on_host, True)[0].backward()
    for mine, theirs, true in zip(inputs[:3], whole[:3], exact[:3], strict=True):
        if mine is None:
            continue
        mine_off, theirs_off = ((x.grad.double() - true.grad).norm() / true.grad.norm() for x in (mine, theirs))
        assert mine_off < 1.2 * theirs_off + 1e-3


def test_smoothing_is_that_of_torch_and_z_that_of_palm():
    logits, targets = torch.randn(5, WORDS) * 3, torch.arange(5)
    loss, squares = score(logits, targets, Scoring(label_smoothing=0.1, z_weight=0.5))
    log_sum = logits.exp().sum(-1).log()
    by_hand = -(0.9 * (logits.log_softmax(-1))[range(5), targets] + 0.1 * logits.log_softmax(-1).mean(-1)).sum()
    assert loss.item() == pytest.approx((by_hand + 0.5 * log_sum.square().sum()).item(), rel=1e-5)
    assert squares.item() == pytest.approx(log_sum.square().sum().item(), rel=1e-5)


def inputs_of(tokens=14, supervised=9):
    draw = torch.Generator().manual_seed(1)
    keep = torch.zeros(1, tokens, dtype=torch.bool)
    keep[0, 2 : 2 + supervised] = True
    ids = torch.randint(3, 300, (1, tokens), generator=draw)
    targets = torch.randint(3, 300, (supervised,), generator=draw)
    return {"input_ids": ids, "logits_to_keep": keep, "use_cache": False}, targets


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_family_has_the_loss_and_the_gradients_of_its_own_logits(name):
    model = build(name).train()
    inputs, targets = inputs_of()
    wanted = F.cross_entropy(model(**inputs).logits.flatten(0, -2), targets, reduction="sum")
    expected = gradients_of(model, wanted)
    logits = model(**inputs).logits.detach()
    head, why = LossHead.of(
        model, Scoring(), chunk_bytes=4 * 4 * len(model.get_output_embeddings().weight), on_host=True
    )
    assert head is not None, why
    loss, _ = head.loss(model, inputs, targets)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    found = gradients_of(model, loss)
    assert found.keys() == expected.keys()
    whole = max(float(gradient.norm()) for gradient in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6 * whole, msg=lambda m, k=key: f"{k}: {m}")
    assert torch.equal(model(**inputs).logits, logits), "without targets it gives logits"


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ("Gemma2Config", {"head_dim": 16, "final_logit_softcapping": 2.0}),
        ("GraniteConfig", {"logits_scaling": 3.0}),
        ("CohereConfig", {"logit_scale": 0.3}),
        ("PhiConfig", {}),
    ],
)
def test_what_a_model_does_to_its_logits_is_done_to_each_chunk(config, values):
    torch.manual_seed(0)
    made = getattr(transformers, config)(vocab_size=300, num_key_value_heads=2, **SMALL, **values)
    model = transformers.AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # else every logit is near 0, where a cap does nothing
    inputs, targets = inputs_of()
    wanted = F.cross_entropy(model(**inputs).logits.flatten(0, -2), targets, reduction="sum")
    expected = gradients_of(model, wanted)
    head, why = LossHead.of(model, Scoring(), chunk_bytes=4 * 4 * 300, on_host=True)
    assert head is not None, why
    loss, _ = head.loss(model, inputs, targets)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    found = gradients_of(model, loss)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-6)


def test_a_model_in_bf16_may_give_logits_in_fp32_and_in_bf16():
    config = transformers.LlamaConfig(vocab_size=300, num_key_value_heads=2, **SMALL)
    for kind in (transformers.LlamaForCausalLM, Rounds):
        assert LossHead.of(kind(config).bfloat16(), Scoring(), 2**20, on_host=True)[0] is not None


def test_what_the_z_part_reports_holds_no_graph():
    model, (inputs, targets) = build("llama").train(), inputs_of()
    head, _ = LossHead.of(model, Scoring(), 2**20, on_host=True)
    assert head is not None
    loss, squares = head.loss(model, inputs, targets)
    assert loss.requires_grad and not squares.requires_grad


class CutsOff(transformers.LlamaForCausalLM):
    """Words that only fill the vocabulary up have no logits, as in Inkling."""

    def forward(self, **inputs):
        out = super().forward(**inputs)
        out.logits = out.logits[..., :250]
        return out


class Rounds(transformers.LlamaForCausalLM):
    def forward(self, **inputs):
        out = super().forward(**inputs)
        out.logits = out.logits.bfloat16()
        return out


class Clamps(transformers.LlamaForCausalLM):
    def forward(self, **inputs):
        out = super().forward(**inputs)
        out.logits = out.logits.clamp(-30, 30)
        return out


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(CutsOff, torch.float32), (CutsOff, torch.bfloat16), (Rounds, torch.float32), (Clamps, torch.float32)],
)
def test_models_that_drop_words_or_change_their_logits_keep_them(kind, dtype):
    model = kind(transformers.LlamaConfig(vocab_size=300, num_key_value_heads=2, **SMALL)).to(dtype)
    head, why = LossHead.of(model, Scoring(), 2**20, on_host=True)
    assert head is None and "a way of its own" in why


class OwnWay(transformers.LlamaForCausalLM):
    """Its logits of one word are lowered by the model itself."""

    def forward(self, **inputs):
        out = super().forward(**inputs)
        out.logits[..., 1] -= 3
        return out


def test_a_model_with_a_way_of_its_own_keeps_its_logits_and_it_is_told():
    torch.manual_seed(0)
    model = OwnWay(transformers.LlamaConfig(vocab_size=300, num_key_value_heads=2, **SMALL))
    inputs, targets = inputs_of()
    said: list[str] = []
    objective = CausalLM(CausalLMConfig(label_smoothing=0.1, z_loss=0.1))
    objective.choose(model, said.append, on_host=True)
    assert len(said) == 1 and "OwnWay changes its logits in a way of its own" in said[0]
    batch = Batch(inputs, targets)
    expected = score(model(**inputs).logits.flatten(0, -2), targets, Scoring(label_smoothing=0.1, z_weight=0.1))
    assert objective.loss_sum(model, batch).item() == pytest.approx(expected[0].item(), rel=1e-6)
    # A config that names a scale which the model does not apply is not believed either.
    config = transformers.LlamaConfig(vocab_size=300, num_key_value_heads=2, **SMALL)
    config.logit_scale = 0.5
    assert LossHead.of(transformers.LlamaForCausalLM(config), Scoring(), 1, on_host=True)[0] is None


class Batch:
    def __init__(self, inputs, targets) -> None:
        self._inputs, self.targets_N, self.num_targets, self.num_tokens = inputs, targets, len(targets), 14

    def model_inputs(self):
        return self._inputs


def test_smoothing_and_z_are_settings_and_their_figures_are_those_of_the_formula():
    torch.manual_seed(0)
    model = build("llama").train()
    inputs, targets = inputs_of()
    expected, squares = score(model(**inputs).logits.flatten(0, -2), targets, Scoring(0.1, 0.01))
    objective = CausalLM(CausalLMConfig(label_smoothing=0.1, z_loss=0.01))
    objective.choose(model, lambda _: None, on_host=True)
    terms = objective.terms(model, Batch(inputs, targets))
    assert [(term.name, term.weight) for term in terms] == [("loss", 1.0), ("z_loss", 0.0)]
    assert terms[0].total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms[1].total.item() == pytest.approx(squares.item(), rel=1e-6)
    for wrong in ({"label_smoothing": 1.0}, {"z_loss": -1.0}):
        with pytest.raises(ConfigError, match=f"objective.{next(iter(wrong))}"):
            CausalLMConfig(**wrong)


class Widest(TorchDispatchMode):
    """The most positions of a tensor whose last dimension is the vocabulary, but for the head's weight turned over."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words, self.width, self.most = words, width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.dim() > 1 and each.shape[-1] == self.words:
                positions = each.shape[:-1].numel()
                self.most = max(self.most, 0 if positions == self.width else positions)
        return out


@pytest.mark.parametrize("frozen", [True, False])
def test_logits_are_never_whole_forward_or_backward(frozen):
    model = build("qwen3").train()
    model.get_output_embeddings().weight.requires_grad_(not frozen)
    words, width = model.get_output_embeddings().weight.shape
    assert width > 32
    inputs, targets = inputs_of(40, 32)
    head, _ = LossHead.of(model, Scoring(label_smoothing=0.1, z_weight=0.1), chunk_bytes=5 * 4 * words, on_host=True)
    assert head is not None
    with Widest(words, width) as widest:
        head.loss(model, inputs, targets)[0].backward()
    assert widest.most == 5
    with Widest(words, width) as widest, torch.no_grad():
        head.loss(model, inputs, targets)
    assert widest.most == 5


class Fp32(TorchDispatchMode):
    """The most positions of a tensor of logits, or their like, in fp32."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.most = words, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.dtype == torch.float32 and each.shape[1:] == (self.words,):
                self.most = max(self.most, len(each))
        return out


@pytest.mark.parametrize(("threads", "chunk", "most"), [(1, 2**20, 5), (3, 2**20, 15), (64, 2**20, 300), (64, 70, 70)])
def test_a_host_scores_a_few_positions_for_each_thread_and_no_more_than_a_chunk(monkeypatch, threads, chunk, most):
    words, width = 400, 32
    monkeypatch.setattr("train.ops.loss_head.CACHED_BYTES", 5 * 4 * words)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=draw).bfloat16().requires_grad_() for n in (300, words))
    targets = torch.randint(0, words, (300,), generator=draw)
    with Fp32(words) as fp32:
        _Score.apply(hidden, weight, None, targets, Scoring(), chunk * 4 * words, True, True)
    assert fp32.most == most


@pytest.mark.parametrize(("frozen", "products"), [(True, 256), (False, 640)])
def test_a_host_takes_smaller_chunks_where_no_gradient_is_summed_over_them(frozen, products):
    """Fewer shapes, for which code is made."""
    weight = torch.randn(100, 8).bfloat16().requires_grad_(not frozen)
    hidden = torch.randn(900, 8).bfloat16().requires_grad_()

    class Longest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default and out.shape[1] == 100:
                self.most = max(self.most, len(out))
            return out

    with Longest() as longest:
        _Score.apply(hidden, weight, None, torch.arange(900) % 100, Scoring(), 2 * 640 * 100, True, True)
    assert longest.most == products


def test_the_gradient_of_the_weight_is_there_once_in_backward():
    """It may be the largest tensor of a step."""
    words, width = 4000, 32
    weight, hidden = torch.randn(words, width, requires_grad=True), torch.randn(6, width, requires_grad=True)
    loss, _ = _Score.apply(hidden, weight, None, torch.arange(6), Scoring(), 2**20, True, True)
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(each.untyped_storage().data_ptr() for each in tree_leaves(out) if each.shape == weight.shape)
            return out

    with Made():
        (loss * 2).backward()
    assert len(set(made)) <= 1
    expected = torch.autograd.grad(2 * F.cross_entropy(hidden @ weight.T, torch.arange(6), reduction="sum"), weight)[0]
    torch.testing.assert_close(weight.grad, expected)


def test_a_copy_of_a_model_has_a_head_of_its_own():
    model = build("llama")
    head, _ = LossHead.of(model, Scoring(), 1, on_host=True)
    assert head is not None
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.mul_(2)
        inputs, _ = inputs_of()
        assert torch.allclose(twin(**inputs).logits, 2 * model(**inputs).logits)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, **SMALL))


def test_a_model_that_does_not_keep_to_the_positions_asked_for_has_no_such_head():
    class Swallows(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, logits_to_keep=None, **kwargs):
            return super().forward(input_ids=input_ids, **kwargs)

    model = Swallows(llama().config)
    assert LossHead.of(model, Scoring(), 2**20, on_host=True)[0] is None
    head, _ = LossHead.of(llama(), Scoring(), 2**20, on_host=True)
    with pytest.raises(ValueError, match="18 positions reach the head, of which 8 have a target"):
        head.loss(lambda: SimpleNamespace(logits=head._forward(torch.randn(2, 9, 32))), {}, torch.zeros(8).long())


def test_a_scale_that_is_a_word_is_a_reason_to_leave_the_logits_alone():
    model = llama()
    model.config.logit_scale = "inv_sqrt_d_model"
    head, why = LossHead.of(model, Scoring(), 2**20, on_host=True)
    assert head is None and "inv_sqrt_d_model" in why
