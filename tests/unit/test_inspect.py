"""`crosstune prep inspect`: samples with what is learned, one record's fate, rows left out."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from configs.errors import ConfigError, DataError, ErrorGroup, ModelError
from data_prep import manifest as manifests
from data_prep.inspect import Wanted, inspect
from data_prep.tokenizer import load_tokenizer, tokenizer_sha256
from launchers import cli
from launchers.prep import read_wanted
from tests.unit.prep_kit import model_folder

_ASK, _END = "<|start|>user\n{}<|end|>\n<|start|>assistant\n", "<|end|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def _row(model: Path, name: str, question: str, answer: str, *, prefix: str = "") -> dict[str, Any]:
    """One sample whose answer, with its end token, is learned."""
    tokenizer = load_tokenizer(model)
    asked = tokenizer(_ASK.format(question), add_special_tokens=False)["input_ids"]
    learned = tokenizer(answer + _END, add_special_tokens=False)["input_ids"]
    after = tokenizer("\n", add_special_tokens=False)["input_ids"]
    spans = [len(asked), len(asked) + len(learned)]
    return {f"{prefix}input_ids": asked + learned + after, f"{prefix}spans": spans, "id": name}


def _write(
    folder: Path,
    model: Path,
    shards: Sequence[tuple[str, str, list[dict[str, Any]]]],
    rejects: Sequence[dict[str, Any]] = (),
) -> Path:
    """A folder of prepared data with these shards: (split, source, rows)."""
    splits: dict[str, Any] = {}
    for split, source, rows in shards:
        entry = splits.setdefault(
            split, {"rows": 0, "tokens": 0, "supervised_tokens": 0, "max_length": 9, "shards": []}
        )
        path = folder / split / f"shard-{len(entry['shards']):05d}.arrow"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
        entry["rows"] += len(rows)
        entry["tokens"] += sum(len(row["input_ids"]) for row in rows)
        name = path.relative_to(folder).as_posix()
        entry["shards"].append({"file": name, "source": source, "rows": len(rows), "bytes": path.stat().st_size})
    (folder / "rejects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rejects))
    reasons = [row["reason"] for row in rejects]
    by_reason = {reason: reasons.count(reason) for reason in sorted(set(reasons), key=lambda r: -reasons.count(r))}
    manifest = {
        "fingerprint": "f" * 64,
        "dataset": {"name": "data", "license": None},
        "tokenizer": {"sha256": tokenizer_sha256(model), "path": str(model)},
        "sources": [{"path": "data/rows.jsonl"}],
        "splits": splits,
        "rejects": {"total": len(rejects), "by_reason": by_reason},
        "notes": [],
    }
    manifests.write(folder, manifest)
    return folder


def _shown(wanted: Wanted, **console: Any) -> str:
    text = io.StringIO()
    inspect(wanted).show(Console(file=text, width=200, **console))
    return text.getvalue()


def test_learned_text_is_in_brackets_where_there_is_no_colour(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _write(tmp_path, model, [("train", "a", [_row(model, "rows.jsonl:1", "which?", "this [bold]one[/bold]")])])
    text = _shown(Wanted(folder))
    assert "rows.jsonl:1  train  " in text and " learned (" in text
    assert "<|start|>user\nwhich?<|end|>\n<|start|>assistant\n⟦this [bold]one[/bold]<|end|>⟧\n" in text
    assert "\x1b" not in text
    monkeypatch.setenv("NO_COLOR", "1")
    text = _shown(Wanted(folder), force_terminal=True)
    assert "⟦this" in text and "\x1b[30;102m" not in text


def test_learned_text_is_in_colour_on_a_terminal(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    folder = _write(tmp_path, model, [("train", "a", [_row(model, "rows.jsonl:1", "which?", "this one")])])
    text = _shown(Wanted(folder), force_terminal=True, color_system="standard")
    assert "\x1b[30;102mthis one\x1b[0m" in text and "⟦" not in text
    assert "\x1b[1m<|start|>\x1b[0muser" in text, "special tokens are set off"


def test_a_record_cannot_steer_the_terminal(tmp_path: Path, model: Path) -> None:
    row = _row(model, "a\x1b[2J.jsonl:1", "\x1b]0;title\x07 \u202eright", "x\r\x9b2J")
    rejects = [{"file": "b\x1b[2J", "line": 1, "reason": "malformed JSON", "detail": "\x1b[31m"}]
    folder = _write(tmp_path, model, [("train", "a", [row])], rejects)
    text = _shown(Wanted(folder)) + _shown(Wanted(folder, rejects=True))
    assert not set("\x1b\x07\r\x9b\u202e") & set(text)
    assert "\\x1b]0;title\\x07 \\u202eright" in text and "⟦x\\x0d\\x9b2J<|end|>⟧" in text


def test_pairs_and_votes_are_labelled(tmp_path: Path, model: Path) -> None:
    pair = _row(model, "p:1", "q", "good") | _row(model, "p:1", "q", "bad", prefix="rejected_")
    folder = _write(tmp_path / "pairs", model, [("train", "a", [pair])])
    text = _shown(Wanted(folder))
    assert text.index("chosen") < text.index("⟦good<|end|>⟧") < text.index("rejected  ") < text.index("⟦bad<|end|>⟧")
    votes = [_row(model, f"v:{i}", "q", f"answer {i}") | {"liked": bool(i)} for i in range(2)]
    folder = _write(tmp_path / "votes", model, [("train", "a", votes)])
    text = _shown(Wanted(folder))
    assert "v:0  train  not liked  " in text and "v:1  train  liked  " in text


def test_each_source_is_shown_and_the_samples_are_spread(tmp_path: Path, model: Path) -> None:
    def rows(source: str, begin: int, count: int) -> tuple[str, str, list[dict[str, Any]]]:
        return "train", source, [_row(model, f"{source}:{begin + i}", "q", "a") for i in range(count)]

    folder = _write(tmp_path, model, [rows("big", 0, 6), rows("big", 6, 4), rows("small", 0, 1)])
    assert [sample.id for sample in inspect(Wanted(folder, n=5)).samples] == ["big:0", "big:3", "big:6", "small:0"]
    assert [sample.id for sample in inspect(Wanted(folder, n=1)).samples] == ["big:0"]


def test_one_record_is_found_wherever_it_went(tmp_path: Path, model: Path) -> None:
    names = ["data/rows.jsonl:1", "data/rows.jsonl:11", "data/rows.jsonl:12#2", "data/rows.jsonl:12/2"]
    first, *others = [_row(model, name, "q", "a") for name in names]
    gone = {"file": "data/rows.jsonl", "line": 13, "reason": "malformed JSON", "detail": "at column 3"}
    folder = _write(tmp_path, model, [("train", "a", [first]), ("test", "a", others)], [gone])

    def ids(origin: str) -> list[str]:
        return [sample.id for sample in inspect(Wanted(folder, id=origin)).samples]

    assert ids("data/rows.jsonl:1") == ids("rows.jsonl:1") == names[:1]
    assert ids("data/rows.jsonl:12") == names[2:]
    assert inspect(Wanted(folder, id="rows.jsonl:11")).samples[0].split == "test"
    text = _shown(Wanted(folder, id="data/rows.jsonl:13"))
    assert "malformed JSON  1 row:\n  data/rows.jsonl:13  at column 3" in text
    for wrong in ("ata/rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:.*"):
        with pytest.raises(DataError, match="neither kept nor left out[\\s\\S]*data/rows.jsonl"):
            ids(wrong)


def test_rows_left_out_are_shown_by_reason(tmp_path: Path, model: Path) -> None:
    rejects = [{"file": "rows.jsonl", "line": i, "reason": "too long"} for i in range(1, 5)]
    rejects.append({"file": "rows.jsonl", "line": 9, "reason": "null where text belongs", "detail": "prompt"})
    folder = _write(tmp_path, model, [("train", "a", [_row(model, "rows.jsonl:5", "q", "a")])], rejects)
    text = _shown(Wanted(folder, rejects=True, n=2))
    assert text.endswith(
        "\ntoo long  4 rows, the first:\n  rows.jsonl:1\n  rows.jsonl:2\n"
        "\nnull where text belongs  1 row:\n  rows.jsonl:9  prompt\n"
    )
    assert "⟦" not in text


def test_the_tokenizer_must_be_the_one_the_data_was_made_with(tmp_path: Path, model: Path) -> None:
    folder = _write(tmp_path / "out", model, [("train", "a", [_row(model, "rows.jsonl:1", "q", "a")])])
    other = model_folder(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="another tokenizer[\\s\\S]*model.path=DIR"):
        inspect(Wanted(folder, model=other))
    manifest = manifests.read(folder)
    manifest["tokenizer"]["path"] = "gone/model"
    manifests.write(folder, manifest)
    with pytest.raises(ModelError, match="gone/model: no such folder[\\s\\S]*model.path=DIR"):
        inspect(Wanted(folder))
    assert len(inspect(Wanted(folder, model=model)).samples) == 1
    assert inspect(Wanted(folder, rejects=True)).rejects == {}, "no tokenizer is needed for that"


def test_what_is_no_prepared_data_is_explained(tmp_path: Path, model: Path) -> None:
    raw = tmp_path / "rows.jsonl"
    raw.write_text("{}\n")
    for path in (raw, tmp_path):
        with pytest.raises(DataError, match="if these are raw records: crosstune prep --dry-run"):
            inspect(Wanted(path))
    with pytest.raises(DataError, match="nowhere"):
        inspect(Wanted(tmp_path / "nowhere"))
    folder = _write(tmp_path / "out", model, [("train", "a", [_row(model, "rows.jsonl:1", "q", "a")])])
    with pytest.raises(DataError, match="split=tset: no such split\n  allowed: train"):
        inspect(Wanted(folder, split="tset"))


def test_keys_are_checked_all_at_once() -> None:
    wanted = read_wanted(Path("p"), ["n=2", "split=test", "id=a=b.jsonl:3", "model.path=m"])
    assert wanted == Wanted(Path("p"), 2, "test", "a=b.jsonl:3", False, Path("m"))
    with pytest.raises(ErrorGroup) as caught:
        read_wanted(Path("p"), ["splt=test", "n=0", "rejects=yes", "id="])
    shown = caught.value.render()
    assert (
        "splt: unknown key\n  allowed: n, split, id, rejects, model.path\n  remedy:  did you mean split=...?" in shown
    )
    assert "n: '0'" in shown and "rejects: 'yes'" in shown and "id: empty" in shown
    with pytest.raises(ConfigError, match="id: has no use with rejects=true"):
        read_wanted(Path("p"), ["rejects=true", "id=a:1"])


def test_the_command_answers_machines_and_imports_no_torch(tmp_path: Path, model: Path) -> None:
    folder = _write(tmp_path, model, [("train", "a", [_row(model, "rows.jsonl:1", "q", "a")])])
    code = (
        "import sys; from launchers.cli import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    words = ["prep", "inspect", str(folder), "--json"]
    done = subprocess.run([sys.executable, "-P", "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (sample,) = json.loads(done.stdout)["samples"]
    ((part,), name) = (sample["parts"], sample["id"])
    assert name == "rows.jsonl:1" and part["pieces"][1] == {"text": "a<|end|>", "learned": True}
    assert "".join(piece["text"] for piece in part["pieces"]) == _ASK.format("q") + "a<|end|>\n"


def test_its_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prep", "inspect", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {key} " in text for key in ("n", "split", "id", "rejects", "model.path"))
    assert cli.main(["prep", "--help"]) == 0
    assert "crosstune prep inspect PATH" in capsys.readouterr().out
