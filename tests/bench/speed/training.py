"""Parts 1 and 2: crosstune against a plain loop and TRL, on the same samples, in alternating rounds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.bench.speed import data, ours, rivals
from tests.bench.speed.machine import Bench, Failed, Figures, Shape, calm, disturbed, gemm_peak, script, shape_of
from tests.bench.speed.rivals import CONTESTANTS, Contestant

ONE_BY_ONE = ("padded", "padding_free", "padding_free, halves")
"""Modes whose first step holds the same samples for all."""
LEAK = 0.05
"""A logit that moves by more when the sample before it is another one: no rounding."""


def part_1(bench: Bench) -> None:
    """LoRA and full fine-tuning on samples of up to 512 tokens."""
    chosen = [each for each in CONTESTANTS if each.in_quick or not bench.quick]
    tunings = ("lora",) if bench.quick else ("lora", "full")
    for tuning in tunings:
        compare(bench, "1", "short", tuning, chosen)


def part_2(bench: Bench) -> None:
    """LoRA with long prompts and short answers, and with long rows."""
    chosen = [each for each in CONTESTANTS if not each.once]
    if bench.quick:
        chosen = [each for each in chosen if each.in_quick and each.script != "trl_sft"]
    names = ("prompts",) if bench.quick else ("prompts", "long")
    for name in names:
        compare(bench, "2", name, "lora", chosen)


@dataclass
class Contest:
    """What stays the same for all contestants of a table."""

    bench: Bench
    tuning: str
    found: data.DataSet
    losses: dict[str, float] = field(default_factory=dict)
    """Of each contestant's first step."""

    def __post_init__(self) -> None:
        self.model, self.python = data.model_of(self.bench), rivals.trl_python()
        self.steps = self.found.steps(self.bench.warmup + self.bench.timed)
        self.about = data.facts(self.steps[self.bench.warmup :])

    def run(self, contestant: Contestant) -> Figures:
        """One run of one of them.

        Raises:
            Failed: it did not end well, or did not train on what the others train on.
        """
        if contestant.script:
            given = spec_of(self.bench, contestant, self.tuning, self.model, self.found.batch_tokens, self.steps)
            python = {"python": self.python} if contestant.script == "trl_sft" and self.python else {}
            figures = script(self.bench, contestant.script, given, **python)
        else:
            figures = ours.train(self.bench, self.model, self.found, self.tuning, len(self.steps))
            _same_steps(figures, self.steps)
        if contestant.mode in ONE_BY_ONE:
            self.losses[contestant.name] = figures["losses"][0]
        return window(figures, self.bench.warmup, self.about)


def compare(bench: Bench, part: str, name: str, tuning: str, chosen: Sequence[Contestant]) -> None:
    """Rounds of all contestants on one data set; prints the table and adds it to the part's."""
    contest = Contest(bench, tuning, data.data_set(bench, name))
    chosen = [c for c in chosen if tuning in c.tunings and (contest.python or c.script != "trl_sft")]
    print(f"{tuning}, {name}: {contest.about}", flush=True)
    runs: dict[str, list[Figures]] = defaultdict(list)
    faults: dict[str, str] = {}
    for number in range(bench.rounds):
        gemm_peak(bench)
        # Every second round the other way about, so that none always runs after the same one.
        for contestant in chosen if number % 2 == 0 else reversed(chosen):
            if contestant.name in faults or (contestant.once and number):
                continue
            try:
                runs[contestant.name].append(figures := contest.run(contestant))
                print(
                    f"  round {number + 1}: {contestant.name} {figures['tokens_per_second']:.0f} tokens/s", flush=True
                )
            except Failed as fault:
                faults[contestant.name] = str(fault)
                print(f"  {contestant.name}: left out: {fault}", flush=True)
        for name, said in odd_ones(contest.losses).items():
            faults[name] = said
            del runs[name], contest.losses[name]
            print(f"  {name}: left out: {said}", flush=True)
    peak, shape = gemm_peak(bench)["bf16"], shape_of(contest.model, ours.RANK)
    table = {name: _figures(each, contest.about, shape, tuning, peak) for name, each in runs.items() if each}
    _ratios(table)
    show(table)
    found = {"data": name, "tuning": tuning, "steps": contest.about, "contestants": table, "left_out": faults}
    bench.report.setdefault(part, []).append(found)


def window(figures: Figures, warmup: int, about: Figures) -> Figures:
    """Speed over the timed steps, which hold the same tokens for all; the rest as it was.

    Raises:
        Failed: they hold other tokens.
    """
    tokens = figures.get("step_tokens")
    if tokens and sum(tokens[warmup:]) != about["tokens"]:
        raise Failed(f"{sum(tokens[warmup:])} tokens in the timed steps, not {about['tokens']}")
    seconds = sum(figures["step_seconds"][warmup:])
    started = figures["started_at"]
    return figures | {"tokens_per_second": about["tokens"] / seconds, "to_first": figures["first_step_at"] - started}


def spec_of(
    bench: Bench, contestant: Contestant, tuning: str, model: object, batch_tokens: int, steps: list[list[Figures]]
) -> Figures:
    """What a contestant's script reads."""
    return {
        "model": str(model),
        "tuning": tuning,
        "weights": contestant.weights,
        "mode": contestant.mode,
        "rank": ours.RANK,
        "alpha": ours.ALPHA,
        "lr": ours.LR,
        "warmup": bench.warmup,
        "batch_tokens": batch_tokens,
        "steps": steps,
    }


def _same_steps(figures: Figures, steps: list[list[Figures]]) -> None:
    planned = [sum(len(sample["ids"]) for sample in step) for step in steps]
    if figures["step_tokens"] != planned:
        raise Failed(f"took steps of {figures['step_tokens']} tokens, not of {planned}")


def odd_ones(losses: dict[str, float]) -> dict[str, str]:
    """Of first losses those that most others do not share, each with what is wrong.

    The weights of a first step are those of the base for all: another loss is another objective, or other data. Nobody
    is the measure, crosstune neither; where two alone differ both go.
    """
    odd = {}
    for name, loss in losses.items():
        others = [each for key, each in losses.items() if key != name]
        alike = sum(max(loss, each) <= 1.02 * min(loss, each) for each in others)
        if alike < len(others) - alike:
            odd[name] = f"its first loss, {loss:.4f}, is off by more than 2 % from {len(others) - alike} of {losses}"
    return odd


def _figures(runs: list[Figures], about: Figures, shape: Shape, tuning: str, peak: float) -> Figures:
    """Medians over the calm rounds."""
    speeds = [each["tokens_per_second"] for each in calm(runs)]
    speed, length, share = statistics.median(speeds), about["mean_length"], about["supervised_share"]
    gflops = speed / 1e9
    found = {
        "tokens_per_second": round(speed, 1),
        "lowest_and_highest": [round(min(speeds), 1), round(max(speeds), 1)],
        "supervised_tokens_per_second": round(speed * share, 1),
        "utilisation": round(gflops * shape.flops(tuning, length) / peak, 3),
        "utilisation_head_where_supervised": round(gflops * shape.flops(tuning, length, share) / peak, 3),
        "others_cores": [each["others_cores"] for each in runs],
        "peak_rss_gib": round(max(each["peak_rss_gib"] for each in runs), 2),
        "seconds_to_first_step": round(statistics.median(each["to_first"] for each in calm(runs)), 1),
        "first_loss": round(runs[0]["losses"][0], 4),
        "last_loss": round(runs[0]["losses"][-1], 4),
        "step_seconds": [[round(seconds, 2) for seconds in each["step_seconds"]] for each in runs],
    }
    if "leak" in runs[0]:
        found["leak"] = round(runs[0]["leak"], 3)
    return found


def _ratios(table: Figures) -> None:
    """What crosstune is to each of the others."""
    if "crosstune" not in table:
        return
    mine = table["crosstune"]
    for name, figures in table.items():
        if name != "crosstune":
            figures["crosstune_speed_ratio"] = round(mine["tokens_per_second"] / figures["tokens_per_second"], 2)
            figures["crosstune_memory_ratio"] = round(mine["peak_rss_gib"] / figures["peak_rss_gib"], 2)


def show(table: Figures) -> None:
    """A line a contestant."""
    head = f"  {'':34} {'tokens/s':>9} {'superv./s':>9} {'of peak':>8} {'GiB':>6} {'first step':>10} {'ours is':>8}"
    print(head, flush=True)
    for name, each in table.items():
        note = disturbed([{"others_cores": cores} for cores in each["others_cores"]])
        note += f"  leaks: logits move by {each['leak']}" if each.get("leak", 0.0) > LEAK else ""
        print(
            f"  {name:34} {each['tokens_per_second']:9.0f} {each['supervised_tokens_per_second']:9.0f} "
            f"{each['utilisation']:8.1%} {each['peak_rss_gib']:6.2f} {each['seconds_to_first_step']:8.1f} s "
            f"{each.get('crosstune_speed_ratio', 1.0):7.2f}x{note}",
            flush=True,
        )
