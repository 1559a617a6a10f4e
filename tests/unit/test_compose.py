"""Overrides and YAML -> typed config; every fault at once; resolved.yaml."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from configs.compose import amend, build, compose, load_resolved, save_resolved
from configs.errors import ConfigError, CrosstuneError, ErrorGroup
from configs.groups import CONFIG_ROOT, groups_of, options_of, register_schemas
from configs.schema.dataset import SourceConfig
from configs.schema.optim import SGDConfig
from configs.schema.roots import Packing, PrepConfig, RunConfig
from configs.schema.sharding import ZeroConfig
from configs.schema.tuning import LoraConfig

CLOSED = ("doubao", "seedance")
"""Models that nobody can have."""

BASE = {
    "prep": ["model.path=/m", "dataset.path=/d"],
    "train": ["model.path=/m", "dataset.path=/d"],
    "run": ["model.path=/m", "dataset.path=/d"],
    "export": ["run_dir=/r"],
    "eval": ["run_dir=/r"],
    "doctor": [],
    "doctor_portability": ["model.path=/m"],
    "doctor_ascend-standin": [],
}
# `prep` and `train` have the groups of `run`; one option of theirs each is enough.
EVERY_OPTION = [
    *(
        (command, group, option)
        for command in ("run", "eval")
        for group in groups_of(command)
        for option in options_of(group)
        if option not in CLOSED
    ),
    ("prep", "model", "smollm2_135m"),
    ("train", "sharding", "zero3_offload"),
    ("export", "export", "default"),
]


def faults_of(command: str, *overrides: str, config_dir: Path | None = None) -> list[CrosstuneError]:
    with pytest.raises(CrosstuneError) as caught:
        compose(command, overrides, config_dir=config_dir)
    return caught.value.errors if isinstance(caught.value, ErrorGroup) else [caught.value]


def needed(command: str, group: str, option: str) -> list[str]:
    """What has to be set besides the option, which may itself lack no dataset.path."""
    brings = {"licenses": "dataset.path", "mix": "dataset.path", "smollm2_135m": "model.path"}.get(option)
    given = [text for text in BASE[command] if text.partition("=")[0] != brings and group != "experiment"]
    given += {
        ("dataset", "mix"): ["+dataset.sources.a={path: a.jsonl}"],
        ("executor", "local"): ["executor.work_dir=/w"],
        ("executor", "ray"): ["executor.work_dir=/w"],
        ("executor", "slurm"): ["executor.work_dir=/w", "executor.partition=p"],
    }.get((group, option), [])
    return [*given, "model.path=/m"] if (command, option) == ("eval", "custom") else given


@pytest.mark.parametrize(("command", "group", "option"), EVERY_OPTION)
def test_every_shipped_option_composes_to_what_hydra_itself_composes(command, group, option):
    overrides = [f"{group}={option}", *needed(command, group, option)]
    register_schemas()
    with initialize_config_dir(str(CONFIG_ROOT), version_base="1.3"):
        expected = OmegaConf.to_object(hydra_compose(command, overrides))
    assert compose(command, overrides) == expected


def test_the_shortest_train_command_has_the_documented_defaults():
    cfg = compose("train", ["model.path=/m", "dataset.path=/d.jsonl", "max_steps=10"])
    assert (cfg.max_steps, cfg.model.path, cfg.dataset.path) == (10, "/m", "/d.jsonl")
    targets = [getattr(cfg, group)._target_ for group in ("tuning", "optim", "schedule", "sharding", "device")]
    assert targets == [
        "train.tuning.lora.LoraTuning",
        "torch.optim.AdamW",
        "train.schedule.Cosine",
        "train.engine.plain.PlainEngine",
        "train.devices.auto.AutoDevice",
    ]


def test_the_sources_of_a_mixture_are_typed_and_every_fault_names_its_source():
    given = ["model.path=/m", "dataset=mix"]
    cfg = compose(
        "prep",
        [
            *given,
            "dataset.sources={b: {path: b.csv, columns: {prompt: q}}, a: {path: a.jsonl}}",
            "dataset.sources.a.weight=3",
        ],
    )
    sources = cfg.dataset.source_configs()
    assert [(name, type(s), s.path, s.weight) for name, s in sources.items()] == [
        ("b", SourceConfig, "b.csv", 1.0),
        ("a", SourceConfig, "a.jsonl", 3.0),
    ]
    assert sources["b"].columns == {"prompt": "q"} and sources["a"].name == "a"
    for text, where in {
        "{a: {pth: x}}": "dataset.sources.a.pth",
        "{a: {weight: 2}}": "dataset.sources.a.path",
        "{a: {path: x, weight: many}}": "dataset.sources.a.weight",
        "{a: {path: x, weight: 0}}": "dataset.sources.a.weight",
        "{a: {path: x, validation_fraction: 2}}": "dataset.sources.a.validation_fraction",
        "{a: x.jsonl}": "dataset.sources.a",
        "{}": "dataset.sources",
    }.items():
        assert [f.where for f in faults_of("prep", *given, f"dataset.sources={text}")] == [where], text


def test_an_experiment_serves_the_smaller_commands_and_the_command_line_wins():
    whole = compose("run", ["experiment=licenses", "tuning.rank=3"])
    part = compose("prep", ["experiment=licenses"])
    assert isinstance(whole, RunConfig) and type(part) is PrepConfig
    assert part.dataset == whole.dataset and part.max_length == whole.max_length
    assert whole.tuning.rank == 3 and compose("run", ["experiment=licenses", "optim=sgd"]).optim.lr == whole.optim.lr
    assert compose("run", ["experiment=licenses", "tuning=full"]).max_steps == whole.max_steps
    assert [fault.where for fault in faults_of("run", "experiment=licenses", "tuning=full", "tuning.rank=1")] == [
        "tuning.rank"
    ]
    assert [fault.where for fault in faults_of("prep", "experiment=licenses", "tuning=lora")] == ["tuning"]


def test_all_faults_of_a_command_line_are_listed_at_once():
    faults = faults_of(
        "train",
        "model.pth=/m",
        "tuning=lorra",
        "tunin=lora",
        "max_steps=many",
        "packing=onn",
        "rank=4",
        "sharding.stage=2",
        "optim.lr=nan",
        "optim.weight_decay=x",
        "junk",
        "dataset.path=/a b/c=d",
        "seed=1,2",
        "nproc=0",
        "epochs=-1",
        "schedule.warmup_fraction=3",
        "~optim",
    )
    told = {fault.where: f"{fault.found} | {fault.allowed} | {fault.remedy}" for fault in faults}
    expected = {
        "junk": "key=value",
        "dataset.path": "quote it twice: \"dataset.path='/a b/c=d'\"",
        "seed": "seed=[1,2]",
        "tuning": "full, lora | did you mean tuning=lora?",
        "optim": "cannot be taken out",
        "model.pth": "did you mean model.path?",
        "tunin": "did you mean the group tuning?",
        "max_steps": "'many' does not fit | a whole number",
        "packing": "auto, on, off",
        "rank": "did you mean tuning.rank?",
        "sharding.stage": "choose sharding=zero1, zero2",
        "optim.lr": "a finite number",
        "optim.weight_decay": "a finite number",
        "nproc": "1 or more",
        "epochs": "above 0",
        "schedule.warmup_fraction": "0 to 1",
    }
    assert {where for where in told} == set(expected)
    for where, text in expected.items():
        assert text in told[where], (where, told[where])


def test_missing_values_say_what_to_type():
    faults = faults_of("train", "optim.lr=-1")
    assert [fault.where for fault in faults] == ["dataset.path", "model.path", "optim.lr"]
    assert "crosstune train model.path=..." in str(faults[1].remedy) and "safetensors" in str(faults[1].allowed)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's folder with sound and broken YAML."""
    files = {
        "tuning/wide.yaml": "defaults: [lora_schema, _self_]\nrank: 64\n",
        "tuning/bad.yaml": "defaults: [lora_schema, _self_]\nrnk: 64\nalpha: x\n",
        "experiment/mine.yaml": "# @package _global_\ndefaults:\n  - override /tuning: wide\n  - _self_\n"
        "model:\n  path: /m\ndataset:\n  path: /d\n  columns: {prompt: q, answer: a}\npacking: off\n",
        "experiment/typos.yaml": "# @package _global_\ndefaults:\n  - override /tuning: bad\n  - _self_\n"
        "model:\n  pth: /m\noptim: sgd\nmax_steps: many\n",
        "experiment/choices.yaml": "# @package _global_\ndefaults:\n  - override /tunin: wide\n"
        "  - override /optim: adam\n  - _self_\n",
        "experiment/torn.yaml": "model: [\n  path: /m\n",
        "experiment/licenses.yaml": "# @package _global_\nseed: 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_users_own_experiment_and_option(own):
    cfg = compose("run", ["experiment=mine", "~dataset.columns.answer"], config_dir=own)
    assert cfg.tuning == LoraConfig(rank=64)
    assert cfg.packing is Packing.off, "YAML reads a bare off as false"
    assert cfg.dataset.columns == {"prompt": "q"}


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        (
            "typos",
            [
                ("tuning/bad.yaml:2: tuning.rnk", "did you mean tuning.rank?"),
                ("tuning/bad.yaml:3: tuning.alpha", "a finite number"),
                ("experiment/typos.yaml:6: model.pth", "did you mean model.path?"),
                ("experiment/typos.yaml:7: optim", "override /optim: sgd"),
                ("experiment/typos.yaml:8: max_steps", "a whole number"),
                ("dataset.path", "crosstune run dataset.path=..."),
                ("model.path", "crosstune run model.path=..."),
                ("nproc", "1 or more"),
            ],
        ),
        (
            "choices",
            [
                ("experiment/choices.yaml: defaults: tunin", "did you mean /tuning?"),
                ("experiment/choices.yaml: defaults: optim", "did you mean optim=adamw?"),
                ("nproc", "1 or more"),
            ],
        ),
        ("torn", [("experiment/torn.yaml:3", "not readable as YAML"), ("nproc", "1 or more")]),
        ("min", [("experiment", "did you mean experiment=mine?"), ("nproc", "1 or more")]),
    ],
)
def test_faults_in_files_name_the_file_and_the_line(own, experiment, expected):
    faults = faults_of("run", f"experiment={experiment}", "nproc=0", config_dir=own)
    assert len(faults) == len(expected), [fault.render() for fault in faults]
    for fault, (where, text) in zip(faults, expected, strict=True):
        assert fault.where.endswith(where) and text in fault.render()


def test_a_name_that_we_ship_is_refused_in_a_users_folder(own):
    with pytest.raises(ConfigError, match="crosstune ships an option of this name"):
        compose("run", ["experiment=licenses"], config_dir=own)


def test_a_missing_folder_of_the_user_is_named(tmp_path):
    with pytest.raises(ConfigError, match="--config-dir: no folder"):
        compose("run", [], config_dir=tmp_path / "none")


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        ("prep", ["dataset.system='Zeile 1: ä \"x\" # y'", "dataset.columns={prompt: q}", "name=on"]),
        ("train", ["sharding=zero2", "+sharding.deepspeed.a.b=3", "optim=sgd", "tuning=full", "packing=off"]),
        ("run", ["experiment=licenses", "schedule=linear", "model.precision=bf16"]),
        ("export", ["export.shard_gib=0.5"]),
        ("eval", ["eval.limit=3", "device=cpu"]),
    ],
)
def test_resolved_yaml_gives_an_equal_config_back(tmp_path, command, overrides):
    given = BASE[command] if "experiment=licenses" not in overrides else []
    cfg = compose(command, [*given, *overrides])
    save_resolved(cfg, tmp_path / "resolved.yaml")
    assert load_resolved(tmp_path / "resolved.yaml") == cfg
    assert [path.name for path in tmp_path.iterdir()] == ["resolved.yaml"]


def test_an_edited_or_torn_resolved_yaml_is_explained(tmp_path):
    path = tmp_path / "resolved.yaml"
    save_resolved(compose("run", ["experiment=licenses"]), path)
    text = path.read_text()
    path.write_text(re.sub(r"max_steps: \d+", "max_steps: -5", text.replace("rank: 16", "rnk: 16")))
    with pytest.raises(ErrorGroup, match=r"resolved.yaml:\d+: tuning.rnk: unknown key") as caught:
        load_resolved(path)
    assert [e.where for e in caught.value.errors][1:] == ["max_steps"]
    for torn, message in (
        (text[: text.index("max_steps:")] + "- [", "not readable"),
        ("", "command"),
        ("command: fly\n", "fly"),
    ):
        path.write_text(torn)
        with pytest.raises(ConfigError, match=message):
            load_resolved(path)
    with pytest.raises(ConfigError, match="no such file"):
        load_resolved(tmp_path / "none.yaml")


def test_amend_replaces_a_group_and_leaves_the_rest():
    cfg = compose("run", ["experiment=licenses", "optim.lr=0.5"])
    changed = amend(cfg, ["sharding=zero3", "optim=sgd", "nproc=2", "tuning.rank=4"])
    assert changed.sharding == ZeroConfig(stage=3) and changed.optim == SGDConfig()
    assert (changed.nproc, changed.tuning.rank, changed.dataset) == (2, 4, cfg.dataset)
    assert (cfg.nproc, cfg.tuning.rank) == (1, 16)
    with pytest.raises(ErrorGroup):
        amend(cfg, ["sharding=zero9", "nproc=0"])


@dataclass
class Node:
    _target_: str


class Base:
    def __init__(self, node: Node, extra: int) -> None:
        self.node, self.extra = node, extra


class Derived(Base):
    pass


def test_build_makes_what_the_target_names_and_refuses_others():
    made = build(Node(f"{__name__}.Derived"), Base, extra=3)
    assert type(made) is Derived and made.extra == 3
    with pytest.raises(ConfigError, match="is no Base"):
        build(Node("pathlib.Path"), Base)
    with pytest.raises(ConfigError, match="cannot load 'no.such.Thing'"):
        build(Node("no.such.Thing"), Base)
    with pytest.raises(ConfigError, match="cannot load 'os.getcwd'"):
        build(Node("os.getcwd"), Base)


def test_a_key_of_text_keeps_a_number_as_it_was_typed():
    cfg = compose(
        "train", ["model.path=hf://a/b", "model.revision=12e4567", "dataset.path=7", "name=1e3", "max_steps=10"]
    )
    assert (cfg.model.revision, cfg.dataset.path, cfg.name, cfg.max_steps) == ("12e4567", "7", "1e3", 10)


@pytest.mark.parametrize("key", ["dataset.path", "dataset.test_path", "run_dir", "out", "cache_dir"])
def test_an_empty_path_is_not_the_working_folder(key):
    (fault,) = faults_of("train", *BASE["train"], f"{key}=")
    assert fault.where == key and "shell variable" in str(fault)


@pytest.mark.parametrize(
    "wrong",
    [
        "seed=-1",
        "seed=99999999999999999999",
        "dataset.name=../elsewhere",
        "dataset.name=.hidden",
    ],
)
def test_values_that_would_fail_later_are_refused_at_once(wrong):
    (fault,) = faults_of("train", *BASE["train"], wrong)
    assert fault.where == wrong.partition("=")[0]


@pytest.mark.parametrize("wrong", ["shingle_words=0", "max_per_label=0", "test_fraction=-0.1", "validation_fraction=1"])
def test_limits_of_the_licence_data_are_checked(wrong):
    (fault,) = faults_of("prep", "experiment=licenses", f"dataset.{wrong}")
    assert fault.where == f"dataset.{wrong.partition('=')[0]}"


def test_another_model_is_not_quietly_made_from_the_package_of_an_experiment():
    (fault,) = faults_of("run", "experiment=licenses", "model.path=models/mine")
    assert fault.where == "model.path" and "model=custom model.path=models/mine" in str(fault)
    assert compose("run", ["experiment=licenses", "model=custom", "model.path=models/mine"]).model.gguf_package is None


@pytest.mark.parametrize("content", [b"defaults:\nname: x\n", b"\xff\xfe"])
def test_an_experiment_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_bytes(content)
    (fault, *_) = faults_of("train", *BASE["train"], "experiment=mine", config_dir=tmp_path)
    assert "mine.yaml" in fault.where


@pytest.mark.parametrize("value", ["weird (d)", "a $(touch x) 'b", 'say "hi" `now`'])
def test_the_remedy_for_an_odd_value_can_be_copied_into_a_shell(value):
    (fault,) = faults_of("train", *BASE["train"], f"run_dir={value}")
    (word,) = shlex.split(str(fault.remedy).removeprefix("quote it twice: "))
    assert "$(" not in str(fault.remedy) or '"run_dir' not in str(fault.remedy)
    assert compose("train", [*BASE["train"], word]).run_dir == value


def test_letters_of_any_language_need_no_quotes():
    cfg = compose(
        "prep",
        [
            "model.path=模型",
            "dataset.path=数据/客户 2024.jsonl",
            "dataset.system=请简短回答。",
            "dataset.columns={prompt: 问题, completion: the answer (zh)}",
            "dataset.roles={客户: user, Kundin: user}",
            "clean.drop_matching=[广告, spam]",
        ],
    )
    assert (cfg.model.path, cfg.dataset.path, cfg.dataset.system) == ("模型", "数据/客户 2024.jsonl", "请简短回答。")
    assert cfg.dataset.columns == {"prompt": "问题", "completion": "the answer (zh)"}
    assert cfg.dataset.roles == {"客户": "user", "Kundin": "user"}
    assert cfg.clean.drop_matching == ["广告", "spam"]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("dataset.roles={客户: user, 客户: tool}", "'客户' stands twice"),
        ("dataset.roles={客户: ${seed}}", "cannot read the value"),
        ("dataset.roles={客户: user", "cannot read the value"),
        ("dataset.roles.客户=user", "in braces behind the key above"),
    ],
)
def test_what_looks_like_a_value_in_braces_and_is_none_is_a_fault(word, told):
    (fault,) = faults_of("prep", *BASE["prep"], word)
    assert told in str(fault) and fault.where.startswith("dataset.roles")


@pytest.mark.parametrize("value", ["a${nowhere}b", "${oc.env:NOT_SET_ANYWHERE}", "${no_such:1}"])
def test_an_interpolation_that_leads_nowhere_is_a_fault_of_its_key(value):
    (fault,) = faults_of("train", *BASE["train"], f"name='{value}'")
    assert fault.where == "name" and "\\${" in str(fault.remedy)


def test_a_text_that_looks_like_an_interpolation_comes_back_as_it_was(tmp_path):
    cfg = compose("train", [*BASE["train"], "dataset.system='Pay \\${price} now'"])
    assert cfg.dataset.system == "Pay ${price} now"
    save_resolved(cfg, tmp_path / "resolved.yaml")
    assert load_resolved(tmp_path / "resolved.yaml") == cfg


@pytest.mark.parametrize("option", CLOSED)
def test_a_closed_model_answers_with_what_is_true_and_what_is_open(option, capsys):
    """One fault, whatever else was typed, and exit code 2."""
    for overrides in (
        [f"model={option}", "dataset.path=d.jsonl"],
        [f"model={option}", "model.path=/m", "dataset.path=d"],
    ):
        (fault,) = faults_of("train", *overrides)
        assert fault.where == "model" and "its weights are not published" in str(fault) and "Qwen3.5" in str(fault)
