"""Images from records to the loss: tokens, pixels, positions, what is left out and why."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import shutil
import warnings
from functools import cache

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from PIL import Image

from configs.errors import DataError
from configs.schema.objective import CausalLMConfig
from data_prep.images import decoded, file_of
from data_prep.manifest import read
from data_prep.prepare import prepare
from data_prep.summary import summary_lines
from data_prep.vision import vision_of
from tests.cells import IMAGE
from tests.tiny_images import IMAGE_TEXT, SEEING, picture, save_seeing, write_records
from tests.unit.prep_kit import files, model_folder, prep_config, write_jsonl
from train.data.collate import collate
from train.data.images import ImageInputs, image_processor
from train.data.plan import RowKind
from train.data.prepared import PreparedData, Sample
from train.evaluate.samples import read_samples
from train.evaluate.with_images import measure_with_images
from train.models.families import family_of
from train.models.load import load_config, load_model
from train.models.vision import settle_vision_tower
from train.objectives.causal_lm import CausalLM
from train.ops.packed_mixers import attention_for_packing, wrap_mixers

CPU = torch.device("cpu")
ODD_SIZES = ((30, 21), (17, 44), (9, 8), (64, 64), (200, 7), (5, 5), (131, 77), (1000, 9))
FAMILIES = ("qwen3_5", "kimi_k25")


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Model folder and prepared data of a family, made once."""

    @cache
    def made(name):
        folder = tmp_path_factory.mktemp(name)
        model = save_seeing(name, folder / "model")
        cfg = prep_config(folder, files(write_records(folder / "data")))
        return model, prepare(cfg, model, out=folder / "prepared").path

    return made


def processor_of_transformers(model):
    """The family's own, or of Kimi, whose own needs torchvision, the stand-in."""
    if "kimi" in load_config(model).model_type:
        return image_processor("kimi_k25", model)
    return transformers.AutoImageProcessor.from_pretrained(str(model), backend="pil")


def inputs_of(home, name):
    model, path = home(name)
    data = PreparedData.open(path)
    return data.split("train"), ImageInputs.of(data, model, load_config(model))


def batch_of(home, name, rows, kind, **changes):
    split, images = inputs_of(home, name)
    return collate(rows, split.__getitem__, kind=kind, device=CPU, images=images, **changes)


def loss_of(model, batch):
    return CausalLM(CausalLMConfig()).loss_sum(model, batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_has_the_tokens_that_its_processor_makes(home, name):
    model, _ = home(name)
    vision, processor = vision_of(model), processor_of_transformers(model)
    for width, height in ODD_SIZES:
        if name == "qwen3_5" and max(width, height) > 200 * min(width, height):
            continue
        made = processor(images=[picture(width, height)], return_tensors="pt")
        assert vision.grid(height, width) == tuple(made["image_grid_thw"][0].tolist()), (width, height)
        assert vision.tokens(vision.grid(height, width)) * 4 == len(made["pixel_values"])


def test_prepared_samples_are_what_transformers_makes_of_the_same_conversation(home):
    """Its processor repeats the image token in the text; nothing else differs."""
    model, path = home("qwen3_5")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(model))
    processor, split = processor_of_transformers(model), PreparedData.open(path).split("train")
    rows = [json.loads(line) for line in (path.parent / "data/data.jsonl").read_text().splitlines()]
    for n, row in enumerate(rows):
        text = tokenizer.apply_chat_template(
            [{**m, "content": _parts(m["content"])} for m in row["messages"]], tokenize=False
        )
        for reference in _references(row):
            grid = processor(images=[Image.open(path.parent / "data" / reference)])["image_grid_thw"][0]
            text = text.replace(IMAGE_TEXT, "@" * (int(np.prod(grid)) // 4), 1)
        expected = tokenizer(text.replace("@", IMAGE_TEXT), add_special_tokens=False)["input_ids"]
        assert split[n].input_ids.tolist() == expected
        answer = row["messages"][1]["content"] + "<|im_end|>"
        assert [tokenizer.decode(split[n].input_ids[start:end]) for start, end in split[n].spans] == [answer]
        learned = np.concatenate([split[n].input_ids[start:end] for start, end in split[n].spans])
        assert tokenizer.convert_tokens_to_ids(IMAGE_TEXT) not in learned
    assert [len(split[n].images) for n in range(4)] == [2, 0, 1, 0]


def _parts(content):
    if isinstance(content, str):
        return content
    return [{"type": "image"} if part["type"] != "text" else part for part in content]


def _references(row):
    parts = [part for part in row["messages"][0]["content"] if part["type"] != "text"]
    return [part.get("image") or part["image_url"]["url"] for part in parts]


@pytest.mark.cell(IMAGE)
@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_of_a_batch_are_the_processors(home, name):
    model, path = home(name)
    batch = batch_of(home, name, ((0,), (4,)), RowKind.padded)
    made = processor_of_transformers(model)
    each = [made(images=[Image.open(path.parent / f"data/{n}.png")], return_tensors="pt") for n in (0, 3, 2)]
    assert torch.equal(batch.pixels.values_P, torch.cat([one["pixel_values"] for one in each]))
    assert torch.equal(batch.pixels.grid_N3, torch.cat([one["image_grid_thw"] for one in each]))


def test_kimis_pixels_by_hand(home):
    """An image that is not scaled is padded below and on the right, cut into patches row by row, and normalised."""
    model, _ = home("kimi_k25")
    source = picture(14, 9)
    made = image_processor("kimi_k25", model)(images=[source], return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [[1, 4, 4]]
    whole = np.zeros((16, 16, 3))
    whole[:9, :14] = np.asarray(source)
    patch = whole[4:8, 8:12].transpose(2, 0, 1) / 255  # second row of patches, third column
    expected = (patch - np.array([0.5, 0.4, 0.3])[:, None, None]) / np.array([0.5, 0.6, 0.7])[:, None, None]
    np.testing.assert_allclose(made["pixel_values"][1 * 4 + 2].numpy(), expected, atol=1e-6)


def test_positions_are_those_of_transformers_and_begin_anew_with_each_sample(home):
    model, _ = home("qwen3_5")
    split, images = inputs_of(home, "qwen3_5")
    inner = load_model(model, dtype=torch.float32).model
    row = (0, 1, 2)
    batch = batch_of(home, "qwen3_5", (row,), RowKind.packed)
    expected = []
    for n in row:
        ids = torch.from_numpy(split[n].input_ids.astype(np.int64))[None]
        kinds = (ids == inner.config.image_token_id).int()
        grid = torch.tensor([image.grid for image in split[n].images]) if split[n].images else None
        expected.append(inner.get_rope_index(ids, kinds, grid)[0])
    assert torch.equal(batch.rotary_3BT, torch.cat(expected, dim=2))
    assert batch.model_inputs()["position_ids"].shape[0] == 4


@pytest.mark.cell(IMAGE)
@pytest.mark.parametrize("name", SEEING)
def test_the_loss_is_that_of_a_plain_forward_pass(home, name):
    """Transformers' own class, inputs and positions, and its own loss over labels."""
    folder, _ = home(name)
    split, _ = inputs_of(home, name)
    model = load_model(folder, dtype=torch.float32)
    ours = loss_of(model, batch_of(home, name, ((0,),), RowKind.single))
    batch = batch_of(home, name, ((0,),), RowKind.single)
    labels = torch.full_like(batch.input_ids_BT, -100)
    for start, end in split[0].spans:
        labels[0, start:end] = batch.input_ids_BT[0, start:end]
    plain = getattr(transformers, load_config(folder).architectures[0]).from_pretrained(str(folder)).eval()
    kinds = {"mm_token_type_ids": (batch.input_ids_BT == plain.config.image_token_id).int()} if "qwen" in name else {}
    theirs = plain(
        input_ids=batch.input_ids_BT,
        pixel_values=batch.pixels.values_P,
        image_grid_thw=batch.pixels.grid_N3,
        labels=labels,
        **kinds,
    ).loss
    assert ours.item() / batch.num_targets == pytest.approx(theirs.item(), rel=1e-5)


def rows_of_one(model, home, name, samples):
    return sum(loss_of(model, batch_of(home, name, ((n,),), RowKind.single)) for n in samples)


@pytest.mark.cell(IMAGE)
@pytest.mark.parametrize("name", FAMILIES)
def test_single_padded_and_blank_rows_give_one_loss_and_one_gradient(home, name):
    """Of samples with and without images; the latter have a blank one in rows of their own."""
    model = load_model(home(name)[0], dtype=torch.float32)
    samples = (0, 1, 2, 3)
    single = rows_of_one(model, home, name, samples)
    single.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    padded = loss_of(model, batch_of(home, name, tuple((n,) for n in samples), RowKind.padded))
    padded.backward()
    assert padded.item() == pytest.approx(single.item(), rel=1e-5)
    must_be_close(model, gradients)


def must_be_close(model, gradients):
    for n, p in model.named_parameters():
        if n in gradients:
            error = (p.grad - gradients[n]).norm() / gradients[n].norm().clamp(min=1e-3)
            assert error < 2e-4, (n, float(error))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_row_gives_the_same(home, name):
    """The language model is packed; its vision tower knows no boundaries and is not causal."""
    folder = home(name)[0]
    model = load_model(folder, dtype=torch.float32)
    expected = rows_of_one(model, home, name, (0, 1, 2))
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    family = family_of(model.config)
    packed = load_model(folder, dtype=torch.float32, attention=attention_for_packing(family))
    wrap_mixers(packed, family)
    loss = loss_of(packed, batch_of(home, name, ((0, 1, 2),), RowKind.packed))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    must_be_close(packed, gradients)
    filler = batch_of(home, name, (), RowKind.packed)
    assert filler.pack.lengths == ((2, 1),) and loss_of(packed, filler).item() == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_in_bf16_takes_the_pixels(home, name):
    exact, model = (load_model(home(name)[0], dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    batch = batch_of(home, name, ((0,),), RowKind.single)
    assert loss_of(model, batch).item() == pytest.approx(loss_of(exact, batch).item(), rel=0.05)


def test_a_tower_gets_pixels_by_keyword_in_its_dtype_and_one_of_own_code_is_left_alone(home):
    class OwnCode(torch.nn.Linear):
        pass

    model = load_model(home("qwen3_5")[0], dtype=torch.bfloat16)
    tower = model.model.visual
    seen = []
    tower.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    pixels = torch.rand(16, tower.patch_embed.in_channels * tower.patch_embed.temporal_patch_size * tower.patch_size**2)
    tower(hidden_states=pixels, grid_thw=torch.tensor([[1, 4, 4]]))
    assert seen == [torch.bfloat16]
    model.model.visual = OwnCode(2, 2)
    settle_vision_tower(model)
    assert model.model.visual(torch.rand(1, 2)).dtype == torch.float32


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rows", [((1,),), ()], ids=["text", "filler"])
def test_the_blank_image_runs_the_tower_and_teaches_it_nothing(home, name, rows):
    model = load_model(home(name)[0], dtype=torch.float32)
    batch = batch_of(home, name, rows, RowKind.single)
    passes = []
    tower = next(m for n, m in model.named_modules() if n in ("model.visual", "model.vision_tower"))
    tower.register_forward_hook(lambda *_: passes.append(1))
    loss = loss_of(model, batch)
    loss.backward()
    assert passes == [1]
    assert batch.num_tokens == (len(inputs_of(home, name)[0][1].input_ids) if rows else 0)
    touched = [p.grad for n, p in model.named_parameters() if n.startswith(("model.vis", "model.mm_"))]
    assert touched and all(grad is not None and not grad.any() for grad in touched)
    assert bool(rows) == any(p.grad.any() for n, p in model.named_parameters() if "language_model" in n)


def test_images_in_every_form_of_record(tmp_path):
    """Parts with a path, an address, a data: URI; LLaMA-Factory's column; one image kept once."""
    model = save_seeing("qwen3_5", tmp_path / "model", weights=False)
    picture(30, 21).save(tmp_path / "a.png")
    inline = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    answer = {"role": "assistant", "content": "a"}
    rows = [
        {"messages": [{"role": "user", "content": [{"type": kind, kind: value}]}, answer]}
        for kind, value in (
            ("image", "a.png"),
            ("image_url", {"url": f"data:image/png;base64,{inline}"}),
            ("image_url", {"url": (tmp_path / "a.png").as_uri()}),
        )
    ]
    rows.append({"messages": [{"role": "user", "content": "<image>"}, answer], "images": [str(tmp_path / "a.png")]})
    talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "s").mkdir()
    mixed = prepare(prep_config(tmp_path, files(write_jsonl(tmp_path / "m.jsonl", rows))), model)
    cfg = prep_config(
        tmp_path, files(write_jsonl(tmp_path / "s/s.jsonl", [{"conversations": talk, "images": "a.png"}]))
    )
    cfg.image_folder = str(tmp_path)
    shared = prepare(cfg, model)
    splits = [PreparedData.open(made.path).split("train") for made in (mixed, shared)]
    ids = {tuple(split[n].input_ids.tolist()) for split in splits for n in range(len(split))}
    assert [len(split) for split in splits] == [4, 1] and len(ids) == 1
    assert any(
        line.startswith("images") and "4 shown, 1 files" in line for line in summary_lines(mixed.manifest, tmp_path)
    )
    assert mixed.manifest["images"]["files"] == 1 and mixed.manifest["splits"]["train"]["images"] == 4


def _bad_images(folder):
    """Reference -> the reject's reason, or how it begins."""
    good = io.BytesIO()
    picture(40, 40).save(good, "PNG")
    (folder / "cut.png").write_bytes(good.getvalue()[:-900])
    (folder / "text.png").write_text("no image")
    (folder / "empty.jpg").write_bytes(b"")
    picture(101, 100).save(folder / "large.png")
    picture(1200, 5).save(folder / "thin.png")
    bent = io.BytesIO()
    picture(64, 64).save(bent, "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x12\x01")
    (folder / "bent.jpg").write_bytes(bent.getvalue()[:300])
    frames = [picture(8, 8, seed=n) for n in range(2)]
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:])
    return {
        "gone.png": "an image cannot be read: no such file",
        "cut.png": "an image cannot be read: damaged",
        "text.png": "an image cannot be read: not an image",
        "empty.jpg": "an image cannot be read: not an image",
        "large.png": "an image has more pixels than max_image_pixels",
        "thin.png": "an image is more than 200 times as long as wide",
        "film.gif": "an image has several frames",
        "http://example.com/a.png": "an image is not on this machine",
        "data:image/png;base64,###": "an image cannot be read: damaged",
        "~nosuchuser/a.png": "an image cannot be read: Could not determine home directory.",
        "http://[x": "an image cannot be read: Invalid IPv6 URL",
        "/dev/zero": "an image cannot be read: not a file",
        "bent.jpg": "an image cannot be read: damaged",
    }


def test_a_bad_image_is_a_fault_of_its_row_and_mending_it_is_noticed(tmp_path):
    model = save_seeing("qwen3_5", tmp_path / "model", weights=False)
    bad = _bad_images(tmp_path)
    picture(9, 9).save(tmp_path / "good.png")
    rows = [{"prompt": "<image>", "completion": "a", "images": [reference]} for reference in [*bad, "good.png"]]
    write_jsonl(tmp_path / "d.jsonl", rows)
    cfg = prep_config(tmp_path, files(tmp_path / "d.jsonl", max_rejects=-1))
    cfg.max_image_pixels = 10_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = prepare(cfg, model)
    rejects = [json.loads(line) for line in (made.path / "rejects.jsonl").read_text().splitlines()]
    assert [(r["line"], r["reason"]) for r in rejects] == list(enumerate(bad.values(), start=1))
    assert all(r["file"].endswith("d.jsonl") and r["detail"] for r in rejects)
    assert prepare(cfg, model).reused, "nothing was mended"
    picture(9, 9, seed=1).save(tmp_path / "gone.png")
    again = prepare(cfg, model)
    assert not again.reused and again.manifest["splits"]["train"]["rows"] == 2


def test_what_cannot_be_prepared_with_images_is_told(tmp_path):
    model = save_seeing("qwen3_5", tmp_path / "model", weights=False)
    picture(9, 9).save(tmp_path / "a.png")
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<image>"}]
    rows = {
        "an image in an assistant's turn": {"messages": said, "images": "a.png"},
        "images in preferences are not prepared": {
            "prompt": "<image>", "chosen": "a", "rejected": "b", "images": "a.png"
        },
        "longer than max_length": {"prompt": "<image>" + "q" * 99, "completion": "a", "images": "a.png"},
    }  # fmt: skip
    for reason, row in rows.items():
        cfg = prep_config(tmp_path, files(write_jsonl(tmp_path / "d.jsonl", [row]), max_rejects=-1))
        cfg.max_length = 60
        with pytest.raises(DataError, match=reason):
            prepare(cfg, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"image_token_id": 5000}))
    text = prep_config(tmp_path, files(write_jsonl(tmp_path / "t.jsonl", [{"prompt": "q", "completion": "a"}])))
    assert prepare(text, model).manifest["splits"]["train"]["rows"] == 1
    with pytest.raises(DataError, match="images need a model that sees.*image_token_id of config.json is no token"):
        prepare(cfg, model)
    (model / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match="images need a model that sees.*has no preprocessor_config.json"):
        prepare(cfg, model)


def test_preparing_twice_gives_the_same_bytes_and_a_changed_image_other_ones(tmp_path):
    """However the rows came: by one worker or two, in chunks or not."""
    model = save_seeing("kimi_k25", tmp_path / "model", weights=False)
    data = write_records(tmp_path / "data", 30, every=7)
    trees = []
    for n, workers in enumerate((1, 2)):
        cfg = prep_config(tmp_path / str(n), files(data), workers=workers)
        made = prepare(cfg, model, out=tmp_path / f"out{n}")
        trees.append({str(p.relative_to(made.path)): p.read_bytes() for p in made.path.rglob("*") if p.is_file()})
    assert trees[0].keys() == trees[1].keys()
    assert trees[0] == trees[1]
    assert prepare(cfg, model, out=tmp_path / "out1").reused
    picture(30, 21, seed=9).save(data.parent / "0.png")
    cfg.overwrite = True
    again = prepare(cfg, model, out=tmp_path / "out1")
    assert (
        not again.reused
        and (again.path / "train/shard-00000.arrow").read_bytes() != trees[0]["train/shard-00000.arrow"]
    )


def test_rows_before_the_first_image_and_texts_alone_are_stored_as_ever(tmp_path):
    model = save_seeing("qwen3_5", tmp_path / "model", weights=False)
    picture(9, 9).save(tmp_path / "a.png")
    text = [{"prompt": f"q{n}", "completion": "a"} for n in range(3)]
    shown = {"prompt": "<image>", "completion": "a", "images": "a.png"}
    stored = {}
    for name, rows in {"text": text, "both": [*text, shown, *text]}.items():
        made = prepare(prep_config(tmp_path, files(write_jsonl(tmp_path / f"{name}.jsonl", rows))), model)
        shards = made.manifest["splits"]["train"]["shards"]
        stored[name] = [pa.ipc.open_file(str(made.path / shard["file"])).read_all() for shard in shards]
        assert ("images" in made.manifest) == (name == "both")
    assert [table.column_names for table in stored["text"]] == [["input_ids", "spans", "id"]]
    assert [len(table) for table in stored["both"]] == [3, 4]
    assert stored["both"][0].column_names == ["input_ids", "spans", "id"]
    assert stored["both"][1]["images"].to_pylist()[1:] == [[], [], []]


@pytest.mark.parametrize("name", FAMILIES)
def test_evaluation_sees_the_images(home, name):
    """Likelihoods are those of training; answers are those of a model that reads everything anew for each token."""
    folder, path = home(name)
    model, (split, images) = load_model(folder, dtype=torch.float32), inputs_of(home, name)
    samples = read_samples(path, "train")[:3]
    measured = measure_with_images(model, samples, [2], 5, CPU, keep_logits=True, images=images)
    for n, (sample, result) in enumerate(zip(samples, measured, strict=True)):
        loss = loss_of(model, batch_of(home, name, ((n,),), RowKind.single))
        assert result.nll == pytest.approx(loss.item(), rel=1e-5)
        said = []
        for _ in range(5):
            ids = np.array([*sample.prompt, *said, 0], np.int32)  # the last one is predicted
            asked = Sample("", ids, np.array([[len(ids) - 1, len(ids)]], np.int32), split[n].images)
            batch = collate(((0,),), [asked].__getitem__, kind=RowKind.single, device=CPU, images=images)
            logits = model(**batch.model_inputs()).logits.flatten(0, -2)[0]
            if not said:
                torch.testing.assert_close(result.first_logits_V, logits.detach(), rtol=1e-4, atol=1e-4)
            if logits.argmax() in (2, sample.answer[-1]):
                break
            said.append(int(logits.argmax()))
        assert result.answer_ids == said


def test_a_setting_for_images_makes_other_data_for_models_that_see_only(tmp_path):
    rows = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "q", "completion": "a"}])
    seeing = save_seeing("qwen3_5", tmp_path / "seeing", weights=False)
    for model, same in ((model_folder(tmp_path / "blind"), True), (seeing, False)):
        cfg = prep_config(tmp_path, files(rows))
        first = prepare(cfg, model)
        cfg.max_image_pixels = 7
        assert prepare(cfg, model).reused == same and "images" not in first.manifest


def test_a_picture_is_turned_as_its_file_says(tmp_path):
    """Phones store what they saw and how they were held."""
    stored, upright = io.BytesIO(), picture(40, 12)
    tags = Image.Exif()
    tags[0x0112] = 8  # to be turned by a quarter
    upright.rotate(-90, expand=True).save(stored, "PNG", exif=tags)
    assert Image.open(stored).size == (12, 40)
    opened = decoded(stored.getvalue(), 10**6, "a.png")
    assert opened.size == (40, 12) and opened.tobytes() == upright.tobytes()


def test_training_refuses_other_processors_and_damaged_images(home, tmp_path):
    model, path = home("qwen3_5")
    other = shutil.copytree(model, tmp_path / "model")
    settings = json.loads((other / "preprocessor_config.json").read_text()) | {"image_mean": [0.1, 0.1, 0.1]}
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="another processor"):
        ImageInputs.of(PreparedData.open(path), other, load_config(other))
    copy = shutil.copytree(path, tmp_path / "prepared")
    data = PreparedData.open(copy)
    sample = data.split("train")[0]
    images = ImageInputs.of(data, model, load_config(model))
    file = file_of(copy / "images", sample.images[0].sha256)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match="damaged"):
        images.pixels(sample.images)
    file.unlink()
    with pytest.raises(DataError, match="No such file"):
        images.pixels(sample.images)
    assert read(path)["images"]["files"] == 4


def test_the_same_records_beside_other_pictures_are_other_data(tmp_path, monkeypatch):
    model = save_seeing("qwen3_5", tmp_path / "model", weights=False)
    made = []
    for n in range(2):
        folder = tmp_path / f"{n}"
        folder.mkdir()
        picture(9, 9, seed=n).save(folder / "a.png")
        write_jsonl(folder / "d.jsonl", [{"prompt": "<image>", "completion": "a", "images": "a.png"}])
        monkeypatch.chdir(folder)
        made.append(prepare(prep_config(tmp_path, files("d.jsonl")), model))
    assert not made[1].reused
    assert [len(list((each.path / "images").glob("??/*"))) for each in made] == [1, 1]
    assert made[0].manifest["images"]["sha256"] != made[1].manifest["images"]["sha256"]


def test_a_picture_of_the_same_size_in_the_place_of_a_prepared_one_is_refused(home, tmp_path):
    model, path = home("qwen3_5")
    data = PreparedData.open(shutil.copytree(path, tmp_path / "prepared"))
    sample = data.split("train")[0]
    file = file_of(tmp_path / "prepared/images", sample.images[0].sha256)
    with Image.open(file) as old:
        picture(*old.size, seed=77).save(file, old.format)
    with pytest.raises(DataError, match="another one than was prepared"):
        ImageInputs.of(data, model, load_config(model)).pixels(sample.images)


def test_an_image_of_a_turn_behind_the_answer_is_not_shown_to_who_answers(home):
    """`weight: 0` keeps a later turn of the user, and its image, from being learned."""
    folder, _ = home("qwen3_5")
    model, (_, images) = load_model(folder, dtype=torch.float32), inputs_of(home, "qwen3_5")
    first = next(s for s in read_samples(home("qwen3_5")[1], "train") if s.images)
    places = [i for i, token in enumerate(first.input_ids) if token == images.image_token]
    ids = [*first.input_ids, *[images.image_token] * len(places)]
    late = dataclasses.replace(first, input_ids=ids, images=(*first.images, *first.images))
    (alone,) = measure_with_images(model, [first], [2], 5, CPU, images=images)
    (result,) = measure_with_images(model, [late], [2], 5, CPU, images=images)
    assert result.answer_ids == alone.answer_ids


@pytest.mark.parametrize("kind", list(RowKind))
def test_a_blank_image_is_no_sample_and_no_part_of_one(home, kind):
    """Terms that are counted by samples would else depend on how many micro-batches have no image."""
    split, images = inputs_of(home, "qwen3_5")
    text = next(n for n in range(len(split)) if not split[n].images)
    batch = collate(((text,),), split.__getitem__, kind=kind, device=CPU, images=images)
    assert batch.blank and batch.lengths() == ((len(split[text].input_ids),),)


def test_a_row_with_a_blank_image_is_filled_up_behind_it(home):
    split, images = inputs_of(home, "kimi_k25")
    text = next(n for n in range(len(split)) if not split[n].images)
    plain, filled = (
        collate(((text,),), split.__getitem__, kind=RowKind.packed, device=CPU, images=images, fill_to=fill_to)
        for fill_to in (lambda tokens: tokens, lambda tokens: tokens + 9)
    )
    assert filled.blank and filled.lengths() == plain.lengths() and filled.num_tokens == plain.num_tokens
    assert filled.pack.lengths == ((*plain.pack.lengths[0], 9),)
    assert torch.equal(filled.input_ids_BT[:, :-9], plain.input_ids_BT)


def test_positions_have_three_dimensions_though_the_config_says_no_sections(home):
    model, path = home("qwen3_5")
    config = load_config(model)
    config.text_config.rope_parameters.pop("mrope_section")
    assert ImageInputs.of(PreparedData.open(path), model, config).rotary_3d
