"""From what the probe, the tripwire and the stand-in noted to findings, a screen and JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import EXIT_DONE, EXIT_USER_FAULT
from configs.schema.doctor import PortabilityConfig

STOPS = "stops"
"""An NPU raises here."""
MAY_STOP = "may stop"
"""Some operators take it, most do not: nobody knows without a card, or CANN's list of operators."""
UNKNOWN = "unknown"
"""The pretended device cannot say."""
SLOW = "slow"
"""Runs, over the CPU and back."""
SILENT = "silent"
"""Runs, and does nothing or answers for a card that is not there."""
ASKED = "asked by libraries"
"""A library asks for CUDA and takes a no."""
VERDICTS = {
    STOPS: "stops: an NPU raises here",
    MAY_STOP: "may stop: few NPU operators take this dtype; the others raise, or run on the chip's slow CPU cores",
    UNKNOWN: "unknown: the pretended device computes on the CPU, whose kernel does not take this dtype; an NPU's may",
    SLOW: "slow: torch_npu has no kernel, copies to the CPU and back, and warns once (CAUTION)",
    SILENT: "silent: no error, but on an NPU it does nothing, answers for a GPU, or gives another dtype",
    ASKED: "asked by libraries: they take a no for an answer",
}
SHOWN = 8
"""Findings of one verdict on the screen; the JSON has all."""
MODEL_CODE = ("transformers_modules.", "transformers.models.")
REMOTE = "/transformers_modules/"
"""In the path of a copy that transformers made of a model's own code."""


@dataclass(frozen=True)
class Finding:
    """One thing that is otherwise on an NPU."""

    verdict: str
    kind: str
    """``operator``, ``cuda``, ``dtype``, ``device mixing`` or ``failure``."""
    what: str
    count: int = 1
    module: str = ""
    """Path of the torch module."""
    file: str = ""
    line: int = 0
    detail: str = ""
    stack: list[str] = field(default_factory=list)


class Report:
    """All findings of one look.

    Args:
        cfg: the command's config.
        model_dir: folder of the model.
        found: what the probe wrote.
        records: what the tripwire recorded.
        without_kernel: operators that torch_npu has no kernel for, with their calls.
    """

    def __init__(
        self,
        cfg: PortabilityConfig,
        model_dir: Path,
        found: dict[str, Any],
        records: list[dict[str, Any]],
        without_kernel: dict[str, int],
    ) -> None:
        self.cfg, self.model_dir, self.found = cfg, model_dir, found
        self.records, self.without_kernel = records, without_kernel

    def as_dict(self) -> dict[str, Any]:
        """For JSON, and for `render`."""
        findings = [*self._failures(), *self._assumptions(), *self._operators(), *self._dtypes()]
        findings.sort(key=lambda finding: list(VERDICTS).index(finding.verdict))
        stops = any(finding.verdict == STOPS for finding in findings)
        keys = ("device", "versions", "precision", "cut", "size", "class", "parameters", "stages")
        return {
            "exit_code": EXIT_USER_FAULT if stops else EXIT_DONE,
            "model": self.cfg.model.path,
            "tokens": self.cfg.tokens,
            **{key: self.found.get(key) for key in keys},
            "findings": [asdict(finding) for finding in findings],
            "operators": {
                name: noted | {"kernel": name not in self.without_kernel, "place": self._place(noted["place"])}
                for name, noted in sorted(self.found["operators"].items())
            },
        }

    def _failures(self) -> Iterator[Finding]:
        for failure in self.found["failures"]:
            frames = [self._frame(frame) for frame in failure["frames"]]
            first: dict[str, Any] = failure["frames"][0] if failure["frames"] else {"file": "", "line": 0}
            text = f"{failure['stage']}: {failure['exception']}: {failure['message']}"
            yield Finding(STOPS, "failure", text, file=self._own(first["file"]), line=first["line"], stack=frames)

    def _assumptions(self) -> Iterator[Finding]:
        for record in self.records:
            own = record["module"].startswith(MODEL_CODE)
            what = record["what"] + ("()" if record["what"].startswith("torch.cuda.") else "")
            if not own:
                verdict = ASKED
            elif record["kind"] == "raises":
                verdict = STOPS
            elif "integer device" in what:
                continue  # torch takes a bare number for the accelerator that is there
            else:
                verdict = SILENT
            stack = [self._own(line) for line in record["stack"]]
            yield Finding(verdict, "cuda", what, file=self._own(record["file"]), line=record["line"], stack=stack)

    def _operators(self) -> Iterator[Finding]:
        for name, noted in self.found["operators"].items():
            for fault, place in noted["faults"].items():
                at = self._place(place)
                if fault == "mixing":
                    yield Finding(STOPS, "device mixing", f"{name} on tensors of the NPU and the CPU", **at)
                elif fault == UNKNOWN:
                    yield Finding(UNKNOWN, "operator", f"{name} of {', '.join(noted['dtypes'])}", **at)
                else:
                    yield Finding(STOPS, "operator", f"{name}: {fault}", **at)
        for name, count in self.without_kernel.items():
            noted = self.found["operators"].get(name)
            # Inside another operator, or while the model was opened: then no place of its own is known.
            at = self._place(noted["place"]) if noted else {"detail": "inside another operator"}
            if noted:
                at["detail"] = ", ".join(noted["dtypes"])
            yield Finding(SLOW, "operator", name, count=noted["count"] if noted else count, **at)

    def _dtypes(self) -> Iterator[Finding]:
        """By dtype the operators that ran in it, with the place of the first."""
        for dtype, rare in self.found["rare"].items():
            verdict = STOPS if dtype.startswith("float8") else MAY_STOP
            names = ", ".join(name.removeprefix("aten::") for name in rare["operators"])
            yield Finding(verdict, "dtype", f"{dtype} in {names}", count=rare["count"], **self._place(rare["place"]))
        for dtype, rare in self.found["narrowed"].items():
            what = f"{dtype} was asked for, float32 was given"
            yield Finding(SILENT, "dtype", what, count=rare["count"], **self._place(rare["place"]))

    def _place(self, place: dict[str, Any]) -> dict[str, Any]:
        detail = {"detail": "in the backward pass"} if place["backward"] else {}
        return {"module": place["module"], "file": self._own(place["file"]), "line": place["line"]} | detail

    def _frame(self, frame: dict[str, Any]) -> str:
        return f"{self._own(frame['file'])}:{frame['line']} {frame['function']}: {frame['code']}"

    def _own(self, path: str) -> str:
        """The file in the model's folder: transformers copies a model's code away before it runs it."""
        if REMOTE not in path:
            return path
        file, colon, rest = path.partition(".py")
        original = self.model_dir / Path(file + colon).name
        return f"{original}{rest}" if original.is_file() else path


def render(result: dict[str, Any], out: str | None) -> str:
    """One screen."""
    size = f", {result['parameters']:,} parameters" if result["parameters"] else ""
    lines = [
        "",
        f"{result['class'] or 'the model'}: {result['cut']}{size}, {result['precision']}, {result['tokens']} tokens",
        f"pretended {result['device']}; went through: {', '.join(result['stages']) or 'nothing'}",
    ]
    for verdict, meaning in VERDICTS.items():
        findings = [finding for finding in result["findings"] if finding["verdict"] == verdict]
        if findings:
            lines += ["", meaning, *(_line(finding) for finding in findings[:SHOWN])]
        if len(findings) > SHOWN:
            lines.append(f"  and {len(findings) - SHOWN} more{'' if out else ': out=FILE writes all'}")
    operators = result["operators"].values()
    native = sum(1 for noted in operators if noted["kernel"])
    lines += [
        "",
        f"{len(operators)} operators, {native} with a kernel of torch_npu's, {len(operators) - native} without",
    ]
    stops = sum(1 for finding in result["findings"] if finding["verdict"] == STOPS)
    lines.append(
        f"{stops} thing{'s stop' if stops > 1 else ' stops'} this model on an NPU"
        if stops
        else "nothing found that stops this model on an NPU"
    )
    lines.append("not seen here: numerics, speed and memory of real kernels" + (f"; all of it: {out}" if out else ""))
    return "\n".join(lines)


def _line(finding: dict[str, Any]) -> str:
    times = f" x{finding['count']}" if finding["count"] > 1 else ""
    detail = f" ({finding['detail']})" if finding["detail"] else ""
    place = f"{_short(finding['file'])}:{finding['line']}" if finding["file"] else ""
    where = "  ".join(part for part in (finding["module"], place) if part)
    return f"  {finding['what']}{times}{detail}" + (f"\n      {where}" if where else "")


def _short(path: str) -> str:
    """Without what is before the installed packages."""
    return path.rpartition("/site-packages/")[2]
