"""What proofs are made of: configs, moments, comparisons that find what differs, models cut to some layers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from configs.compose import compose, save_resolved
from configs.errors import ConfigError, ModelError
from configs.schema.prove import ProveReshardConfig, ProveResumeConfig
from launchers.cli import _config
from launchers.command_line import parse
from launchers.help import command_help
from launchers.prove import resume
from launchers.prove.kills import Kill, Moment, Rhythm, draw, kill_at
from launchers.prove.page import show, write
from launchers.prove.proof import Part, Proof
from launchers.prove.runs import Seen, kill_all, seen
from launchers.prove.setting import choose_model, layout_name, setting_of, under_layout
from tests.tiny import save_tiny_model
from tests.unit.checkpoint_kit import WORLD, MomentumConfig, engine, state, steps
from train.checkpoint.save import save
from train.models.load import load_config, load_model
from train.prove import tensors
from train.prove.comparison import close_figure, equal_figures, steps_in_order
from train.prove.cut import cut_model
from train.prove.tensors import close_tensors, equal_checkpoints

BASE = ["model.path=/m", "dataset.path=/d"]


def configured(*words: str):
    return _config(parse(words))


# The config.


def test_from_and_to_are_read_as_they_are_typed():
    cfg = configured("prove", "reshard", *BASE, "from=zero3x4", "to=zero1x2,plainx1")
    assert (cfg.layout_from, cfg.layouts_to) == ("zero3x4", ["zero1x2", "plainx1"])
    assert configured("prove", "layout", *BASE, "to=[zero2x2]").layouts_to == ["zero2x2"]
    text = command_help("prove_reshard", "x", None)
    assert "\n  from " in text and "\n  to " in text and "layouts_to" not in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["reshard", *BASE, "to=zero1"], "SHARDINGxPROCESSES"),
        (["reshard", *BASE, "from=zero1x0"], "SHARDINGxPROCESSES"),
        (["reshard", *BASE, "to="], "to=zero1x2,plainx1"),
        (["resume", *BASE, "kills=7"], "1 to half of steps=12"),
        (["resume", *BASE, "to=plainx1"], "to"),
        (["resume", *BASE, "layers=0"], "layers"),
    ],
)
def test_a_wrong_key_of_a_proof_is_explained(words, told):
    with pytest.raises(ConfigError) as caught:
        configured("prove", *words)
    assert told in caught.value.render()


def test_prove_alone_asks_which_one():
    with pytest.raises(ConfigError, match="prove reshard"):
        parse(["prove"])
    with pytest.raises(ConfigError, match="did you mean crosstune prove resume"):
        parse(["prove", "resum"])


@pytest.mark.parametrize("command", ["train", "run"])
def test_a_run_s_own_config_is_proven_without_its_folder(command, tmp_path):
    save_resolved(compose(command, [*BASE, "run_dir=/mine", "out=/prepared", "optim.lr=0.5"]), tmp_path / "r.yaml")
    cfg = configured("prove", "resume", "--resolved", str(tmp_path / "r.yaml"), "kills=2")
    assert type(cfg) is ProveResumeConfig and (cfg.optim.lr, cfg.kills) == (0.5, 2)
    assert cfg.run_dir is None and cfg.out is None


def test_an_experiment_is_proven_too():
    cfg = configured("prove", "reshard", "experiment=licenses", "steps=4")
    assert type(cfg) is ProveReshardConfig and cfg.model.gguf_package and cfg.steps == 4


def test_the_runs_of_a_proof_are_short_and_what_was_changed_is_listed():
    words = ["prove", "resume", *BASE, "eval_every=50", "checkpoint.keep_best=2", "guard.stop_after_minutes=9"]
    cfg = configured(*words, "shrink=true", "max_length=64", "batch_tokens=90000")
    setting = setting_of(cfg, steps=12, every=3)
    run = setting.train
    assert (run.max_steps, run.checkpoint.every, run.checkpoint.keep_best, run.guard.stop_after_minutes) == (
        12,
        3,
        0,
        0,
    )
    assert (run.micro_batch_tokens, run.batch_tokens) == (64, 256)
    changed = {change.key: (change.before, change.after) for change in setting.changes}
    assert changed["batch_tokens"] == (90000, 256) and changed["checkpoint.every"] == (100, 3)
    assert layout_name(under_layout(run, "zero2_offloadx3", None)) == "zero2_offloadx3"
    with pytest.raises(ConfigError, match="no option 'zero9'"):
        under_layout(run, "zero9x2", None)


def test_a_proof_leaves_alone_what_is_not_its_own(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").touch()
    cfg = configured("prove", "resume", *BASE, f"out={tmp_path}", "overwrite=true")
    setting = setting_of(cfg, steps=4, every=1)
    with pytest.raises(ConfigError, match="holds something else"):
        Proof(cfg, "resume", "x", setting, stages=1)
    (tmp_path / "mine.txt").unlink()
    (tmp_path / "runs").mkdir()  # of a user who said out=. where runs/ is
    with pytest.raises(ConfigError, match="holds something else"):
        Proof(cfg, "resume", "x", setting, stages=1)
    for content, told in (("{}", "a proof that did not come to its end"), ('{"proven": true}', "an earlier proof")):
        (tmp_path / "proof.json").write_text(content)
        with pytest.raises(ConfigError, match=rf"{told}(.|\n)*or overwrite=true"):
            Proof(replace(cfg, overwrite=False), "resume", "x", setting, stages=1)
    assert Proof(cfg, "resume", "x", setting, stages=1).folder == tmp_path
    assert json.loads((tmp_path / "proof.json").read_text()) == {"proof": "resume", "proven": None}
    with pytest.raises(ConfigError, match="runs of its own"):
        Proof(replace(cfg, run_dir="/mine"), "resume", "x", setting, stages=1)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="without torchrun"):
        Proof(cfg, "resume", "x", setting, stages=1)


# Kills.


def test_moments_are_spread_over_the_run_and_come_again_with_their_seed():
    for seed in range(50):
        moments = draw(seed, kills=4, steps=20, every=3)
        assert moments == draw(seed, kills=4, steps=20, every=3)
        places = [moment.step for moment in moments]
        assert places == sorted(set(places)) and 1 <= places[0] and places[-1] <= 16
        assert all(moment.step % 3 == 0 for moment in moments if moment.inside_save)
        assert [moment.inside_save for moment in moments] == [False, True, False, True]
    assert len({tuple(draw(seed, 4, 20, 3)) for seed in range(50)}) > 40
    assert len(draw(0, kills=2, steps=4, every=1)) == 2
    assert all(draw(seed, kills=1, steps=12, every=3)[0].step > 3 for seed in range(50)), "something to resume"


@pytest.mark.parametrize(("goes_on_from", "failure"), [([0, 3], None), ([0, 0], "nothing was resumed")])
def test_a_proof_without_a_resume_proves_nothing(goes_on_from, failure, tmp_path, monkeypatch):
    kills = [Kill("", 1, 1, False, step) for step in goes_on_from]
    monkeypatch.setattr(resume, "_go_on", lambda proof, count: None)
    monkeypatch.setattr(resume, "ends_well", lambda command: None)
    monkeypatch.setattr(resume, "kill_at", lambda *given: kills[given[0].step])
    proof, part = SimpleNamespace(run_of=tmp_path.joinpath, stages=SimpleNamespace(note=print)), Part("killed")
    resume._killed_run(proof, part, [Moment(0, False, 0.0), Moment(1, False, 0.0)], Rhythm(), every=3)
    assert part.failure is None if failure is None else failure in part.failure


class Told:
    """A command that goes through what it is told, a look at a time."""

    def __init__(self, *looks: Seen):
        self.looks, self.process, self.killed_at = list(looks), self, None

    def poll(self):
        return None if self.looks else 0

    def watch(self, run_dir):
        while self.looks:
            yield self.looks[0]
            self.looks.pop(0)

    def kill(self):
        self.killed_at = self.looks.pop(0)
        self.looks.clear()
        return 1


def test_a_kill_waits_for_its_step_and_for_the_save_or_comes_one_save_later(tmp_path):
    looks = [Seen(2, True), Seen(3, False), Seen(4, False), Seen(5, True), Seen(6, False)]
    cases = {(3, False): looks[1], (3, True): looks[3], (2, True): looks[0], (7, False): None}
    for (step, inside), expected in cases.items():
        command = Told(*looks)
        kill = kill_at(Moment(step, inside, 0.5), command, tmp_path, Rhythm(), every=3)
        assert command.killed_at == expected and (kill is None) == (expected is None)
    unseen = Told(*(Seen(step, False) for step in range(2, 9)))
    assert kill_at(Moment(3, True, 0.5), unseen, tmp_path, Rhythm(), every=3) and unseen.killed_at.step == 6


def test_a_kill_reaches_processes_in_sessions_of_their_own():
    child = "import subprocess, sys; subprocess.Popen(['sleep', '60'], start_new_session=True).wait()"
    root = psutil.Popen([sys.executable, "-c", child], start_new_session=True, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 20
    while not (below := root.children(recursive=True)) and time.monotonic() < end:
        time.sleep(0.01)
    assert kill_all(root) == 2 and root.poll() == -9
    assert not below[0].is_running() or below[0].status() == psutil.STATUS_ZOMBIE


def test_a_run_is_read_while_a_line_is_being_written(tmp_path):
    assert seen(tmp_path).step == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    (tmp_path / "checkpoints/step-00000002.partial").mkdir(parents=True)
    assert (seen(tmp_path).step, seen(tmp_path).saving) == (2, True)


# Comparisons.


def lines(*numbers: int, **changes: object):
    return [
        {"step": n, "loss": 1 / n, "data_hash": f"{n:x}", "tokens_per_second": time.time()} | changes for n in numbers
    ]


def test_a_gap_a_double_step_and_a_missing_end_are_told():
    assert steps_in_order(lines(1, 2, 3), 3).same
    assert "missing: 2" in steps_in_order(lines(1, 3), 3).figure
    assert "twice: 2" in steps_in_order(lines(1, 2, 2, 3), 3).figure
    assert steps_in_order(lines(1, 2), 3).first.found == "(absent)"


def test_every_figure_of_every_step_is_compared_but_the_machine_s_speed():
    expected = lines(1, 2, 3)
    assert all(each.same for each in equal_figures(expected, lines(1, 2, 3)))
    found = lines(1, 2, 3)
    found[1]["loss"] += 1e-16 + 2**-50
    found[2] = found[2] | {"skipped": "spike"}
    differing = {each.what.split()[0]: str(each.first) for each in equal_figures(expected, found) if not each.same}
    assert set(differing) == {"loss", "skipped"} and "step 2, loss: 0.5000" in differing["loss"]
    assert close_figure("loss", expected, found, 1e-5).same
    assert not close_figure("loss", expected, lines(1, 2, 3, loss=None), 1e-5).same
    assert not close_figure("loss", expected, lines(1, 2, 3, loss=float("nan")), 1e-5).same
    assert not close_figure("loss", expected, lines(1, 2), 1e-5).same


def saved(folder: Path, spoil=lambda built: None, optim=None):
    built = engine(optim)
    steps(built, 0, 2)
    spoil(built)
    return save(built, folder, state(2), WORLD, run_id="r", metrics={})


def view(built, name, kind):
    return next(each for each in built.fragments(owned=False) if each.name == name).view(kind)


def test_one_bit_of_one_weight_is_found_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "PIECE", 3)  # several pieces a parameter

    def flip(built):
        view(built, "0.weight", "exp_avg").view(torch.int32)[7] ^= 1

    ours = saved(tmp_path / "a")
    assert all(each.same for each in equal_checkpoints(ours, saved(tmp_path / "b"), rng=False))
    found = [each for each in equal_checkpoints(ours, saved(tmp_path / "c", flip), rng=False) if not each.same]
    assert [each.what for each in found] == ["optimizer, exp_avg"] and "1 differ" in found[0].figure
    first = found[0].first
    assert (first.where, first.kind, first.index) == ("0.weight", "exp_avg", (1, 3)) and first.expected != first.found


def test_another_counter_and_other_generators_are_found(tmp_path):
    ours = saved(tmp_path / "a")
    torch.manual_seed(12345)
    theirs = saved(tmp_path / "b", lambda built: (steps(built, 2, 1), torch.manual_seed(12345)))
    differing = {each.what for each in equal_checkpoints(ours, theirs, rng=True) if not each.same}
    assert {"weights", "optimizer, counters", "random generators"} <= differing


def test_gradients_are_held_against_their_norm(tmp_path):
    def shift(factor):
        return lambda built: view(built, "0.weight", "momentum_buffer").mul_(factor)

    ours = saved(tmp_path / "a", optim=MomentumConfig())
    near, far = (saved(tmp_path / name, shift(f), MomentumConfig()) for name, f in (("b", 1 + 1e-6), ("c", 1.001)))
    nan = saved(tmp_path / "d", shift(float("nan")), MomentumConfig())
    assert close_tensors(ours, near, "momentum_buffer", 1e-5).same
    found = close_tensors(ours, far, "momentum_buffer", 1e-5)
    assert not found.same and found.first.where == "0.weight" and "1.0e-03" in found.figure
    assert not close_tensors(ours, nan, "momentum_buffer", 1e-5).same


# Models.


def test_a_model_is_cut_to_some_layers_with_their_weights(tmp_path):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    whole = save_tiny_model(tmp_path / "whole", "qwen3", layer_types=kinds, attention_dropout=0.1)
    cfg = configured("prove", "layout", f"model.path={whole}", "dataset.path=/d", "shrink=true", "layers=2")
    setting = setting_of(cfg, steps=2, every=2)
    choose_model(setting, cfg, whole, tmp_path / "work", quiet=True)
    cut = Path(setting.train.model.path)
    config = load_config(cut)
    assert (config.num_hidden_layers, config.layer_types, config.attention_dropout) == (2, kinds[:2], 0.0)
    before, after = (load_model(folder, dtype=torch.float32).state_dict() for folder in (whole, cut))
    assert set(after) == {name for name in before if ".layers.2." not in name}
    assert all(torch.equal(after[name], before[name]) for name in after)
    listed = {change.key for change in setting.changes}
    assert {"model", "config.json: attention_dropout"} <= listed and (cut / "tokenizer.json").is_file()
    with pytest.raises(ModelError, match="no list of 7 layers"):
        cut_model(whole, tmp_path / "none", {}, [0], 7)


def test_layers_are_told_from_other_lists_and_counted_anew(tmp_path):
    from safetensors.torch import load_file, save_file

    names = [f"m.layers.{i}.mlp.experts.{j}.w" for i in range(3) for j in range(2)] + ["m.towers.0.w", "m.norm"]
    (tmp_path / "whole").mkdir()
    save_file({name: torch.full((2,), float(i)) for i, name in enumerate(names)}, tmp_path / "whole/model.safetensors")
    cut_model(tmp_path / "whole", tmp_path / "cut", {"a": 1}, [0, 2], 3)
    cut = {name: value[0].item() for name, value in load_file(tmp_path / "cut/model.safetensors").items()}
    assert cut["m.layers.1.mlp.experts.1.w"] == 5.0 and cut["m.towers.0.w"] == 6.0 and len(cut) == 6
    assert json.loads((tmp_path / "cut/config.json").read_text()) == {"a": 1}


def test_without_shrink_a_random_forward_pass_is_made_quiet_and_the_weights_are_links(tmp_path):
    whole = save_tiny_model(tmp_path / "whole", attention_dropout=0.1)
    words = ["prove", "layout", f"model.path={whole}", "dataset.path=/d", "tuning.dropout=0.2"]
    cfg = configured(*words)
    setting = setting_of(cfg, steps=2, every=2)
    choose_model(setting, cfg, whole, tmp_path / "work", quiet=True)
    quiet = Path(setting.train.model.path)
    assert load_config(quiet).attention_dropout == 0.0 and setting.train.tuning.dropout == 0.0
    assert (quiet / "model.safetensors").is_symlink() and load_config(whole).attention_dropout == 0.1
    setting = setting_of(cfg, steps=2, every=2)
    choose_model(setting, cfg, whole, tmp_path / "work2", quiet=False)
    assert setting.train.model.path == str(whole) and setting.train.tuning.dropout == 0.2


# The report.


def test_the_report_names_the_first_difference(tmp_path, capsys):
    comparison = next(each for each in equal_figures(lines(1, 2), lines(1, 2, loss=9.0)) if not each.same)
    part = Part("after <kills>", [comparison], ["a note"])
    assert not part.holds and part.first_difference() == comparison.first
    result = {
        **{"proof": "resume", "promise": "so it is", "proven": False, "began": "now", "seconds": 1, "model": "/m"},
        **{"tuning": "lora", "precision": "fp32", "layout": "plainx1", "changes": [], "config": "a: 1"},
        **{"base_sha256": {"w": "00"}, "environment": {"device": {"name": "cpu"}, "packages": {"torch": "2"}}},
        "first_difference": {"text": str(comparison.first)},
        "parts": [
            {"title": part.title, "notes": part.notes, "failure": None, "left_out": False}
            | {"comparisons": [vars(comparison)]}
        ],
    }
    write(result, tmp_path / "proof.json", tmp_path / "proof.html")
    show(result, tmp_path)
    shown, page = capsys.readouterr().out, (tmp_path / "proof.html").read_text()
    for text in (shown, page, (tmp_path / "proof.json").read_text()):
        assert "step 1, loss: 9.0 instead of 1.0" in text
    assert "NOT PROVEN" in shown and "DIFFERS" in shown and "not proven" in page
    assert "after &lt;kills&gt;" in page and "http" not in page
