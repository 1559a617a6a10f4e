"""README.md of an export: a model card with base, data, licence, method, figures and how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from configs.files import write_whole
from configs.schema.model import HUB_PREFIX
from train.export.trained import Trained


def write_card(trained: Trained, folder: Path, *, adapter: bool) -> None:
    """Writes (or brings up to date) README.md in the folder of an export.

    Args:
        trained: what was exported.
        folder: adapter/ or merged/; its card names the place it will have, so pass the final name.
        adapter: which of the two it is.
    """
    # Markdown, not HTML: nothing is escaped, and the values are the user's own config.
    environment = Environment(
        loader=PackageLoader("train.export"), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    text = environment.get_template("card.md.jinja").render(_facts(trained, folder, adapter))
    write_whole(folder / "README.md", text)


def _facts(trained: Trained, folder: Path, adapter: bool) -> dict[str, Any]:
    cfg, record, summary = trained.cfg, trained.record, _summary(trained)
    from_hub = cfg.model.path.startswith(HUB_PREFIX)
    # A folder by its name only: a card is made to be published, the path is in provenance.json.
    base = cfg.model.path.removeprefix(HUB_PREFIX) if from_hub else Path(cfg.model.path).name
    return {
        "adapter": adapter,
        "lora": trained.is_lora,
        "title": cfg.name,
        "base": base,
        "base_path": base if from_hub else record.model_dir,
        "folder": folder.name,
        "cfg": cfg,
        "data": _data(trained),
        "method": _method(trained),
        "steps": trained.reader.state.step,
        "optimizer": cfg.optim._target_.rpartition(".")[2],
        "schedule": f"{cfg.schedule._target_.rpartition('.')[2].lower()} schedule",
        "precision": record.precision,
        "system": json.dumps(cfg.dataset.system) if cfg.dataset.system else None,
        "summary": summary,
        "measured_on": _measured_on(trained, summary) if summary else None,
        "front_matter": yaml.safe_dump(_front_matter(trained, base, adapter), sort_keys=False).strip(),
    }


def _front_matter(trained: Trained, base: str, adapter: bool) -> dict[str, Any]:
    return {
        "library_name": "peft" if adapter else "transformers",
        "base_model": base,
        "base_model_relation": "adapter" if adapter else "finetune",
        "pipeline_tag": "text-generation",
        "tags": ["crosstune", *(["lora"] if trained.is_lora else [])],
    }


def _method(trained: Trained) -> str:
    if not trained.is_lora:
        return "full fine-tuning: all weights trained"
    modules = sorted({module.replace(".base_layer", "").rpartition(".")[2] for module in trained.pairs})
    rate = trained.lora
    return f"LoRA, rank {rate.rank}, alpha {rate.alpha:g}, on {len(trained.pairs)} modules ({', '.join(modules)})"


def _data(trained: Trained) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": trained.cfg.dataset.name, "license": trained.cfg.dataset.license, "rows": 0}
    manifest = Path(trained.record.prepared) / "manifest.json"
    if manifest.is_file():
        split = json.loads(manifest.read_text(encoding="utf-8"))["splits"]["train"]
        facts |= {"rows": split["rows"], "supervised_tokens": split.get("supervised_tokens", 0)}
    return facts


def _measured_on(trained: Trained, summary: dict[str, Any]) -> str:
    """Which samples the figures are of: whoever reads a card takes them for held-out ones of the same data."""
    size, split = summary["test_size"], summary["split"]
    if summary.get("manifest_sha256") != trained.record.manifest_sha256:
        return f"{size} samples of other data than it was trained on"
    return (
        f"{size} samples that it was trained on"
        if split == "train"
        else f"the {size} held-out samples of the same data"
    )


def _summary(trained: Trained) -> dict[str, Any] | None:
    """The run's figures, if they are of this checkpoint."""
    if not trained.run.summary.is_file():
        return None
    summary: dict[str, Any] = json.loads(trained.run.summary.read_text(encoding="utf-8"))
    return summary if summary.get("step") == trained.reader.state.step and "tuned" in summary else None
