"""Provenance: an export names all it came from, and the chain tells what has changed since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from configs.errors import CheckpointError
from configs.schema.outputs import ExportConfig
from tests.unit.tiny_run import tiny_run
from train.export.provenance import read_chain
from train.export.run import export
from train.run_folder import sha256_of


def states(folder: Path) -> dict[str, str]:
    return {link.title.split()[0]: link.state for link in read_chain(folder).links}


def test_the_chain_from_export_to_base(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    merged = export(run, ExportConfig(), on_note=lambda _: None).merged
    assert merged is not None
    content = json.loads((merged / "provenance.json").read_text())
    assert content["base"]["sha256"]["model.safetensors"] == sha256_of(tmp_path / "model" / "model.safetensors")
    assert content["data"]["manifest_sha256"] == sha256_of(tmp_path / "data" / "manifest.json")
    assert content["data"]["license"] == "CC0-1.0"
    assert content["config"]["optim"]["lr"] == 0.01 and content["config"]["command"] == "train"
    assert content["checkpoint"]["step"] == 3
    assert {"torch", "peft"} <= content["exporter"]["packages"].keys() and content["run"]["code"]
    sound = dict.fromkeys(("export", "checkpoint", "data", "base"), "unchanged") | {"run": "recorded"}
    assert states(merged) == sound

    # A card that is brought up to date is no change of the model.
    (merged / "README.md").write_text("new figures")
    assert states(merged) == sound
    # A flipped byte deep in the checkpoint is found through the index's own hashes.
    rank = run.checkpoints / "step-00000003" / "rank00000.safetensors"
    damaged = bytearray(rank.read_bytes())
    damaged[-1] ^= 1
    rank.write_bytes(damaged)
    (tmp_path / "model" / "config.json").write_text("{}")
    shutil.rmtree(tmp_path / "data")
    assert states(merged) == sound | {"checkpoint": "changed", "base": "changed", "data": "not here"}
    text = str(read_chain(merged))
    for said in ("rank00000.safetensors: changed", "config.json: changed", "manifest.json: not here", "CC0-1.0"):
        assert said in text


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not an export"):
        read_chain(tmp_path)
    (tmp_path / "provenance.json").write_text('{"kind": "something else"}')
    with pytest.raises(CheckpointError, match="something else"):
        read_chain(tmp_path)
