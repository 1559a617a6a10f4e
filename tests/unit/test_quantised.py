"""Models published in FP8, INT4 and MXFP4: what is got back, and that it is got back once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import ModelError, NoRoomError
from configs.schema.model import ModelConfig
from tests.command import crosstune, write_uneven_records
from tests.quantised_folders import FORMATS, FP4_STEPS, Parts, fp8, int4, save_quantised, write_files
from train.export.tensors import Stored, stored_tensors
from train.models import bf16_copy
from train.models.dequantise import Coding, decode, decode_scales, dequantise
from train.models.load import ensure_model
from train.models.quantised import quantised_original
from train.models.quantised_weight import Quantised, Shards


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A quantised folder of each format."""
    return {form: save_quantised(form, tmp_path_factory.mktemp(form) / form) for form in FORMATS}


@pytest.fixture
def small(published: dict[str, Path], tmp_path: Path) -> Path:
    """A folder of one's own, to change."""
    return Path(shutil.copytree(published["int4"], tmp_path / "model"))


def ensure(folder: Path, cache: Path, notes: list[str] | None = None, *, write: bool = True) -> Path:
    told = [] if notes is None else notes
    return ensure_model(ModelConfig(path=str(folder)), cache, on_note=told.append, write=write)


def parts_of(folder: Path) -> Parts:
    return {k: v for file in sorted(folder.glob("model-*.safetensors")) for k, v in load_file(file).items()}


def config_of(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text()))


# Codes and scales


def test_every_code_has_the_value_that_its_format_gives_it() -> None:
    byte = torch.arange(256, dtype=torch.uint8)[None]
    for coding, dtype in ((Coding.e4m3, torch.float8_e4m3fn), (Coding.e5m2, torch.float8_e5m2)):
        torch.testing.assert_close(decode(byte.view(dtype), coding), byte.view(dtype).float(), equal_nan=True)
    assert decode(byte.view(torch.int8), Coding.int8).tolist() == [[*range(128), *range(-128, 0)]]
    # The first value lies lowest: 0x2f is code 15 (-6), then code 2 (1).
    assert decode(torch.tensor([[0x2F]], dtype=torch.uint8), Coding.fp4).tolist() == [[-6.0, 1.0]]
    every = torch.tensor([[code + 16 * code for code in range(16)]], dtype=torch.uint8)
    assert decode(every, Coding.fp4)[0, ::2].tolist() == [*FP4_STEPS, *(-step for step in FP4_STEPS)]
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert decode(word, Coding.packed_int4).tolist() == [[-8, -7, -6, -5, -4, -3, -2, -1]]
    assert decode(word, Coding.packed_int8).tolist() == [[0x10 - 128, 0x32 - 128, 0x54 - 128, 0x76 - 128]]


def test_scales_of_one_byte_are_powers_of_two() -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    for scales in (byte, byte.view(torch.float8_e8m0fnu)):
        decoded = decode_scales(scales)
        assert decoded[:255].tolist() == [2.0 ** (number - 127) for number in range(255)] and decoded[255].isnan()


@pytest.mark.parametrize("chunk", [1, 700, 2**18])
@pytest.mark.parametrize("block", [(128, 128), (96, 40), (1, 32), (2**62, 2**62), (1, 2**62)])
def test_blocks_at_the_edge_are_partial(block: tuple[int, int], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.models.dequantise.CHUNK", chunk)
    torch.manual_seed(0)
    rows, cols = 200, 167
    codes = torch.randn(rows, cols).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // block[0]), -(-cols // block[1])) + 0.5
    expected = torch.zeros(rows, cols)
    for i in range(0, rows):
        for j in range(0, cols, min(block[1], cols)):
            part = codes[i, j : j + block[1]].float() * scales[i // block[0], j // block[1]]
            expected[i, j : j + block[1]] = part
    first = dequantise(codes[:70], scales, Coding.e4m3, cols=cols, block=block)
    rest = dequantise(codes[70:], scales, Coding.e4m3, cols=cols, block=block, first_row=70)
    assert torch.equal(torch.cat([first, rest]), expected.bfloat16())


# Whole folders


def _bound(weight: Quantised, whole: torch.Tensor, folder: Path) -> torch.Tensor:
    """Half a step of the format, by the scale, and the rounding to bf16 (2^-9, of a value that is itself off)."""
    scales = decode_scales(stored_tensors(folder)[weight.scales.name].read())
    matrix = whole.transpose(-1, -2) if weight.turned else whole
    rows, cols = matrix.shape[-2:]
    at_rows = torch.arange(rows) // min(weight.block[0], rows)
    scale = scales.index_select(-2, at_rows).index_select(-1, torch.arange(cols) // weight.block[1])
    size = matrix.float().abs()
    if weight.coding is Coding.e4m3:  # 3 bits behind the point; below 2^-6 steps of 2^-9
        half = torch.maximum(size / 16, scale / 1024)
    elif weight.coding is Coding.packed_int4:
        half = scale / 2
    else:  # steps of 1/2 up to 2, of 1 up to 4, of 2 up to 6
        half = scale * torch.where(size <= 2 * scale, 0.25, torch.where(size <= 4 * scale, 0.5, 1.0))
    bound = half * 1.0001 + size / 256
    return bound.transpose(-1, -2) if weight.turned else bound


@pytest.mark.parametrize("form", FORMATS)
def test_a_published_model_comes_back_within_the_error_of_its_format(
    form: str, published: dict[str, Path], tmp_path: Path
) -> None:
    folder = published[form]
    notes: list[str] = []
    copy = ensure(folder, tmp_path, notes)
    whole, got = load_file(folder / "whole" / "model.safetensors"), load_file(copy / "model.safetensors")
    found = quantised_original(folder)
    assert found is not None and got.keys() == whole.keys() and len(found.weights) >= 4
    for name, tensor in got.items():
        assert tensor.shape == whole[name].shape and tensor.dtype == whole[name].dtype
        if name in found.weights:
            error = (tensor.float() - whole[name].float()).abs()
            assert (error <= _bound(found.weights[name], whole[name], folder)).all(), name
        else:
            assert torch.equal(tensor, whole[name]), name
    config = config_of(copy)
    assert "quantization_config" not in str(config) and "expert_dtype" not in config and config["dtype"] == "bfloat16"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (copy / name).read_bytes() == (folder / name).read_bytes()
    assert quantised_original(copy) is None and "dequantised" in notes[-1] and found.codings in notes[0]


@pytest.mark.parametrize("form", ["fp4", "mxfp4"])
def test_transformers_reads_the_same_weights_from_the_original(
    form: str, published: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

    ways = {"fp4": FineGrainedFP8Config(**_without_method(FORMATS[form].config), dequantize=True)}
    way = ways.get(form) or Mxfp4Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(published[form], quantization_config=way, dtype=torch.bfloat16)
    ours = AutoModelForCausalLM.from_pretrained(ensure(published[form], tmp_path), dtype=torch.bfloat16)
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert expected.keys() == ours.state_dict().keys()


def _without_method(config: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in config.items() if key not in ("quant_method", "fmt")}


def test_transformers_dequantises_whole_fp8_blocks_alike() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    codes, scales = fp8(torch.randn(256, 384))
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=torch.bfloat16)
    assert torch.equal(dequantise(codes, scales, Coding.e4m3, cols=384, block=(128, 128)), expected)


def test_compressed_tensors_dequantises_int4_alike(published: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="the library is no dependency of crosstune's")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(**FORMATS["int4"].config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    parts, got = parts_of(published["int4"]), load_file(ensure(published["int4"], tmp_path) / "model.safetensors")
    for name in [n for n in parts if n.endswith("_packed")]:
        stem = name.removesuffix("_packed")
        state = {f"weight_{last}": parts[f"{stem}_{last}"] for last in ("packed", "scale", "shape")}
        assert torch.equal(got[stem], compressor.decompress(state, scheme)["weight"].bfloat16())


@pytest.mark.parametrize("form", FORMATS)
def test_the_copy_is_what_the_model_class_expects(form: str, published: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    copy = ensure(published[form], tmp_path)
    model_class = getattr(transformers, config_of(copy)["architectures"][0])  # type: ignore[index]
    model, info = model_class.from_pretrained(copy, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    logits = model(input_ids=torch.arange(3, 20)[None]).logits
    assert logits.isfinite().all() and logits.float().std() > 0


# What else is published


def _rewrite(folder: Path, change: object) -> None:
    files = [load_file(file) for file in sorted(folder.glob("model-*.safetensors"))]
    for tensors in files:
        change(tensors)  # type: ignore[operator]
    write_files(folder, files)


def _say(folder: Path, said: dict[str, object] | None) -> None:
    config = config_of(folder)
    config["text_config"].pop("quantization_config", None)  # type: ignore[attr-defined]
    if said is not None:
        config["quantization_config"] = said
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("codes", "scales", "said"),
    [
        (torch.float8_e4m3fn, (48, 1), {"quant_method": "compressed-tensors", "config_groups": {}}),
        (torch.float8_e4m3fn, (48,), {"quant_method": "fp8", "weight_block_size": None}),
        (torch.float8_e5m2, (), {"quant_method": "fp8", "weight_block_size": None}),
        (torch.float8_e4m3fn, (1,), None),
        (torch.int8, (48, 1), {"quant_method": "compressed-tensors", "config_groups": {}}),
    ],
)
def test_scales_of_rows_and_of_whole_weights(
    codes: torch.dtype, scales: tuple[int, ...], said: dict[str, object] | None, small: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    code = torch.randint(-100, 100, (48, 40)).to(codes)
    scale = torch.rand(scales) + 0.5
    _say(small, said)
    write_files(small, [{"a.weight": code, "a.weight_scale": scale, "a.input_scale": torch.ones(())}])
    notes: list[str] = []
    got = load_file(ensure(small, tmp_path, notes) / "model.safetensors")
    by_row = scale.reshape(-1, 1).expand(48 if scale.numel() > 1 else 1, 1)
    assert got.keys() == {"a.weight"} and torch.equal(got["a.weight"], (code.float() * by_row).bfloat16())
    assert "1 scales of activations are left out" in notes[-1]


def test_parts_of_a_model_may_be_quantised_in_different_ways(small: Path, tmp_path: Path) -> None:
    """compressed-tensors' ``mixed-precision``: the format stands in each group."""
    torch.manual_seed(0)
    groups = {
        "experts": {"format": "pack-quantized", "weights": {"num_bits": 4, "group_size": 32, "symmetric": True}},
        "attention": {"format": "float-quantized", "weights": {"num_bits": 8, "block_structure": [64, 64]}},
    }
    _say(small, {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups})
    whole = torch.randn(96, 80)
    codes, scales = fp8(whole, 64)
    words, steps = int4(whole[:, :64])
    parts = {"q.weight": codes, "q.weight_scale": scales, "e.weight_packed": words, "e.weight_scale": steps}
    write_files(small, [parts | {"e.weight_shape": torch.tensor([96, 64])}])
    got = load_file(ensure(small, tmp_path) / "model.safetensors")
    assert ((got["q.weight"] - whole).abs() <= whole.abs() / 15 + scales.max() / 1024).all()
    assert (
        (got["e.weight"] - whole[:, :64]).abs() <= steps.repeat_interleave(32, 1) * 0.51 + whole.abs().max() / 256
    ).all()


def test_a_stack_of_experts_has_blocks_of_its_own(small: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    experts = [fp8(torch.randn(200, 130)) for _ in range(3)]
    name = "model.layers.1.moe.down_proj.weight"
    parts = {name: torch.stack([c for c, _ in experts]), f"{name}_scale_inv": torch.stack([s for _, s in experts])}
    _say(small, {"quant_method": "fp8"})
    write_files(small, [parts])
    got = load_file(ensure(small, tmp_path) / "model.safetensors")[name]
    for i, (codes, scales) in enumerate(experts):
        assert torch.equal(got[i], dequantise(codes, scales, Coding.e4m3, cols=130, block=(128, 128)))


def _edit(**changes: object) -> dict[str, object]:
    return {**FORMATS["int4"].config, **changes}


def _group(**weights: object) -> dict[str, object]:
    return {"config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 32, **weights}}}}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"quant_method": "awq", "bits": 4},
            "quant_method 'awq'[\\s\\S]*fp8, compressed-tensors, mxfp4[\\s\\S]*remedy",
        ),
        ({"load_in_4bit": True}, "quant_method 'None'"),
        (_edit(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'[\\s\\S]*pack-quantized"),
        (_edit(**_group(num_bits=3)), "num_bits 3"),
        (_edit(**_group(num_bits=8)), "does not hold \\[64, 96\\] numbers of 8 bits"),
        (_edit(**_group(group_size=16)), "has shape \\[64, 12\\].*have \\[64, 3\\][\\s\\S]*1x16"),
        (_edit(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config.format 'sparse-24-bitmask'"),
    ],
)
def test_an_unknown_way_is_refused_with_what_is_known(said: dict[str, object], message: str, small: Path) -> None:
    _say(small, said)
    with pytest.raises(ModelError, match=message):
        quantised_original(small)


def _without(last: str) -> object:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(last)]


def _changed(last: str, change: object) -> object:
    def apply(tensors: Parts) -> None:
        for name in [name for name in tensors if name.endswith(last)]:
            tensors[name] = change(tensors[name]).contiguous()  # type: ignore[operator]

    return apply


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("int4", _without("_scale"), "weight_packed is quantised \\(I32\\), and its weight_scale are in none"),
        ("int4", _without("_shape"), "and its weight_shape are in none"),
        ("int4", _without("_packed"), "weight_scale are scales without their weight"),
        ("int4", _changed("_scale", torch.Tensor.t), "has shape \\[64, 12\\].*have \\[3, 64\\]"),
        ("int4", _changed("_packed", torch.Tensor.long), "weight_packed in I64[\\s\\S]*I32"),
        ("int4", _changed("_scale", torch.Tensor.long), "weight_scale in I64[\\s\\S]*F32, BF16"),
        ("fp8", _without("_scale_inv"), "is quantised \\(F8_E4M3\\), and its scales are in none of the files"),
        ("fp8", _changed("_scale_inv", torch.Tensor.t), "[\\s\\S]*one a block of 128x128"),
        ("fp4", _without("w1.scale"), "w1.weight is quantised"),
        ("mxfp4", _without("down_proj_scales"), "down_proj_scales are in none"),
        ("mxfp4", _changed("_scales", lambda scales: scales[:, :-1]), "and a scale a block"),
    ],
)
def test_missing_and_unfitting_scales_are_refused(
    form: str, change: object, message: str, published: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(published[form], tmp_path / "model"))
    _rewrite(folder, change)
    with pytest.raises(ModelError, match=message):
        quantised_original(folder)


@pytest.mark.parametrize("last", ["weight_zero_point", "weight_g_idx", "weight_global_scale"])
def test_what_the_formats_have_beside_is_refused_not_ignored(last: str, small: Path) -> None:
    added = iter([{f"a.{last}": torch.zeros(2)}])  # in one of the files
    _rewrite(small, lambda tensors: tensors.update(next(added, {})))
    with pytest.raises(ModelError, match=f"a.{last}: .*not known here"):
        quantised_original(small)


def test_a_scale_that_is_no_number_is_found_while_it_is_copied(small: Path, tmp_path: Path) -> None:
    _rewrite(small, _changed("_scale", lambda scales: scales.index_fill(0, torch.tensor([0]), float("nan"))))
    with pytest.raises(ModelError, match="weight_scale holds NaN"):
        ensure(small, tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


def test_a_config_that_speaks_of_quantisation_over_whole_weights_is_refused(small: Path) -> None:
    write_files(small, [load_file(small / "whole" / "model.safetensors")])
    with pytest.raises(ModelError, match="none of the weights is quantised[\\s\\S]*remove quantization_config"):
        quantised_original(small)


# The copy in the cache


def test_the_copy_is_made_once_and_anew_when_the_original_changed(small: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    first = ensure(small, tmp_path, notes)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert ensure(small, tmp_path, notes) == first and "reused" in notes[-1]
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp

    file = min(small.glob("model-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # same size, same header
    file.write_bytes(content)
    second = ensure(small, tmp_path, notes)
    assert second != first and f"older copies in {first.parent}" in notes[-1] and first.name in notes[-1]

    (small / "chat_template.jinja").write_text("{{ messages }}")
    third = ensure(small, tmp_path, notes)
    assert third not in (first, second) and (third / "chat_template.jinja").read_text() == "{{ messages }}"


def test_looking_writes_nothing(small: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    cache = tmp_path / "cache"
    assert ensure(small, cache, notes, write=False) == small and not cache.exists()
    assert "writes a bf16 copy first" in notes[-1]
    assert ensure(small, cache, notes, write=False) != ensure(small, cache) == ensure(small, cache, write=False)


def test_a_model_of_whole_numbers_is_used_where_it_lies(small: Path, tmp_path: Path) -> None:
    write_files(small, [load_file(small / "whole" / "model.safetensors")])
    _say(small, None)
    assert ensure(small, tmp_path / "cache") == small and not (tmp_path / "cache").exists()


def test_a_disk_that_does_not_hold_the_copy_is_told_before(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(NoRoomError, match="needs 6[45]\\.[0-9] MiB in .*1.0 MiB are free[\\s\\S]*cache_dir=FOLDER"):
        ensure(small, tmp_path / "cache")
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.export.tensors.write_file", full)
    with pytest.raises(NoRoomError, match="No space left"):
        ensure(small, tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from train.models import bf16_copy
from train.models.quantised import quantised_original
from train.models.quantised_weight import Quantised

read, count = Quantised.read, []
def read_and_die(self, shards):
    count.append(1)
    if len(count) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, shards)
Quantised.read = read_and_die
bf16_copy.bf16_folder(quantised_original(Path(sys.argv[1])), "m", Path(sys.argv[2]), print)
"""


def test_killed_in_the_middle_nothing_lies_under_the_final_name(small: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, str(small), str(tmp_path)], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    left = [p for p in (tmp_path / "models").iterdir() if p.is_dir()]
    assert len(left) == 1 and left[0].name.startswith(".m-bf16-")
    original = quantised_original(small)
    assert original is not None
    copy = bf16_copy.bf16_folder(original, "m", tmp_path, lambda note: None)
    assert [p for p in (tmp_path / "models").iterdir() if p.is_dir()] == [copy]  # what was left is gone
    assert quantised_original(copy) is None


def test_a_snapshot_of_the_hub_is_copied_under_its_name(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(small))
    copy = ensure_model(ModelConfig(path="hf://moonshotai/Kimi-K2.5"), tmp_path)
    assert copy.name.startswith("moonshotai--Kimi-K2.5-bf16-") and quantised_original(copy) is None


@pytest.mark.slow
def test_prep_makes_the_copy_and_two_ranks_train_on_it(published: dict[str, Path], tmp_path: Path) -> None:
    records = write_uneven_records(tmp_path / "d.jsonl")
    words = [f"model.path={published['fp8']}", f"cache_dir={tmp_path / 'cache'}"]
    sizes = ["max_length=128", "micro_batch_tokens=256", "batch_tokens=512"]
    assert "writes a bf16 copy first" in crosstune("prep", "--dry-run", *words, f"dataset.path={records}")
    planned = crosstune("plan", *words, f"dataset.path={records}", *sizes)
    assert "writes a bf16 copy first" in " ".join(planned.split())
    assert not (tmp_path / "cache" / "models").exists()
    prepared = f"dataset.path={tmp_path / 'prepared'}"
    told = crosstune("prep", *words, f"dataset.path={records}", f"out={tmp_path / 'prepared'}")
    assert "dequantising to bf16 once" in told
    run = [f"run_dir={tmp_path / 'run'}", "nproc=2", "max_steps=2", "device=cpu"]
    told = crosstune("train", *words, prepared, *sizes, *run)
    assert "its bf16 copy is reused" in told and "step 2/2" in told
    (copy,) = (p for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["model_dir"] == str(copy)


def test_of_several_processes_one_makes_the_copy(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    made: list[Path] = []
    make = bf16_copy._make

    def counted(original: object, folder: Path, *rest: object) -> None:
        made.append(folder)
        make(original, folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(bf16_copy, "_make", counted)
    with ThreadPoolExecutor(4) as ranks:
        copies = list(ranks.map(lambda _: ensure(small, tmp_path), range(4)))
    assert len(made) == 1 and set(copies) == set(made)


# Memory

_MEASURED = """
import resource, sys, time
from pathlib import Path
from train.models import bf16_copy, quantised, dequantise
import train.export.merged
from train.models.load import ensure_model
from configs.schema.model import ModelConfig

def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
Path("/proc/self/clear_refs").write_text("5")
before = rss()
started, worked = time.monotonic(), time.process_time()
ensure_model(ModelConfig(path=sys.argv[1]), Path(sys.argv[2]))
seconds, worked = time.monotonic() - started, time.process_time() - worked
peak = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
print(before, peak, seconds, worked)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8", "int4", "fp4", "mxfp4"])
def test_memory_is_the_largest_tensor_and_a_constant(
    form: str, published: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 GiB in bf16 in one file, of which the largest tensor is an eighth or a quarter."""
    folder = Path(shutil.copytree(published[form], tmp_path / "model"))
    for file in folder.glob("model-*.safetensors"):
        file.unlink()
    byte = lambda *shape: torch.randint(0, 120, shape, dtype=torch.uint8)  # noqa: E731
    tensors: Parts = {}
    for i in range(8 if form != "mxfp4" else 4):
        name = f"model.layers.{i}.mlp.down_proj.weight"
        rows, cols = 8192, 8192
        if form == "fp8":
            parts = {
                name: byte(rows, cols).view(torch.float8_e4m3fn),
                f"{name}_scale_inv": torch.ones(rows // 128, cols // 128),
            }
        elif form == "int4":
            parts = {
                f"{name}_packed": byte(rows, cols // 2).view(torch.int32),
                f"{name}_scale": torch.ones(rows, cols // 32, dtype=torch.bfloat16),
                f"{name}_shape": torch.tensor([rows, cols]),
            }
        elif form == "fp4":
            scale = name.removesuffix("weight") + "scale"
            parts = {name: byte(rows, cols // 2).view(torch.int8), scale: byte(rows, cols // 32)}
        else:
            name = f"model.layers.{i}.mlp.experts.down_proj"
            parts = {f"{name}_blocks": byte(16, 4096, 64, 16), f"{name}_scales": byte(16, 4096, 64)}
        tensors |= parts
    write_files(folder, [tensors])
    largest = 2 * 8192 * 8192 * (2 if form == "mxfp4" else 1)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(folder), str(tmp_path / "cache")],
        env=os.environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, peak, seconds, worked = (float(word) for word in done.stdout.split()[-4:])
    written = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*.safetensors"))
    with capsys.disabled():
        print(
            f"\n{form}: {written / 2**30:.2f} GiB written, largest {largest / 2**20:.0f} MiB, peak above start "
            f"{(peak - before) / 2**20:.0f} MiB, {written / 2 / seconds / 1e6:.0f} million values/s "
            f"({written / 2 / worked / 1e6:.0f} per second of a core)"
        )
    assert written > 1e9 and peak - before < largest + 160 * 2**20


def test_stored_reads_a_part(published: dict[str, Path]) -> None:
    """`Shards` maps a file anew now and then, and never mixes two of them up."""
    shards = Shards()
    stored: dict[str, Stored] = stored_tensors(published["fp8"])
    whole = parts_of(published["fp8"])
    for name, tensor in stored.items():
        assert torch.equal(shards.read(tensor).view(torch.uint8), whole[name].view(torch.uint8))
        assert torch.equal(shards.read(tensor, (slice(1, 3),)).float(), whole[name][1:3].float())
