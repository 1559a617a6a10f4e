"""The whole model for plain transformers: base and training joined, tensor by tensor.

The base's files decide names, shapes and what stays in fp32; the memory that is needed is that of a few blocks of rows,
of an expert, or of the adapter of a weight, whatever the size of the model.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.errors import CheckpointError, ModelError
from configs.schema.model import Precision
from configs.schema.outputs import ExportConfig
from train.export.base_files import BaseFiles
from train.export.layout import Place, keeps_fp32, plain_layout, read_layout
from train.export.tensors import Planned, Stored, stored_tensors, write_model
from train.export.trained import Trained
from train.export.updates import Updates, full_updates, lora_updates, open_skeleton, put_adapter_on

COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
"""What of a model folder goes along with the weights."""
TEMPLATES = "additional_chat_templates"
"""A folder of more chat templates."""
KINDS_NAMED = 6

Note = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """An export that is being planned."""

    trained: Trained
    stored: Mapping[str, Stored]
    places: Mapping[str, Place]
    updates: Updates
    dtype: torch.dtype
    """Of the export."""
    fp32_in_training: Callable[[str], bool]
    """Of a parameter: whether training kept it in fp32."""
    main_dtype: torch.dtype
    """That of most of the base's values: what is stored as fp32 beside bf16 is so on purpose."""

    def stays(self, tensor: Stored) -> bool:
        """Whether it keeps its number format: what the model has no part for, whole numbers, fp32 on purpose."""
        place = self.places.get(tensor.name)
        if place is None or not tensor.dtype.is_floating_point:
            return True
        on_purpose = tensor.dtype == torch.float32 != self.main_dtype
        return tensor.dtype == torch.float32 and (on_purpose or self.fp32_in_training(place.parameters[0]))

    def dtype_of(self, tensor: Stored) -> torch.dtype:
        """Number format in the export."""
        return tensor.dtype if self.stays(tensor) else self.dtype

    def as_trained_on(self, tensor: Stored, values: torch.Tensor) -> torch.Tensor:
        """Values of the base, rounded as they were while it trained."""
        if self.fp32_in_training(self.places[tensor.name].parameters[0]):
            return values
        return values.to(self.trained.working_dtype)


def write_merged(trained: Trained, cfg: ExportConfig, folder: Path, on_note: Note) -> dict[str, str]:
    """Fills `folder` with weights, config, tokenizer, processor and chat template.

    Returns:
        Name of each file with weights -> its SHA-256.

    Raises:
        CheckpointError: a trained parameter does not fit the base model, or is not finite.
        ModelError: the base cannot be read or has changed, or has no place for a trained parameter.
    """
    base_dir, record = trained.base_dir, trained.record
    stored = stored_tensors(base_dir)
    files = {tensor.file.name for tensor in stored.values()} & record.model_sha256.keys()
    record.refuse_changed_base(base_dir, {name: record.model_sha256[name] for name in files})  # those are read later
    dtype = trained.working_dtype
    if cfg.precision is not Precision.auto:
        dtype = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}[cfg.precision]
    job = _open_job(trained, stored, dtype, on_note)
    copy_along(base_dir, folder, trained.cfg.template.path)
    with closing(BaseFiles()) as base, _one_thread():
        hashes = write_model(folder, _plan(job, base, on_note), int(cfg.shard_gib * 2**30))
    record.refuse_changed_base(base_dir, base.hashes)
    _require_layout(stored, stored_tensors(folder))
    name = str(dtype).removeprefix("torch.")
    config = json.loads((base_dir / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(_with_dtype({**config, "dtype": name}, name), indent=2) + "\n")
    return hashes


def _open_job(trained: Trained, stored: Mapping[str, Stored], dtype: torch.dtype, on_note: Note) -> Job:
    model = open_skeleton(trained, on_note)
    kept = keeps_fp32(model) if model is not None else lambda name: False
    places = read_layout(model, stored) if model is not None else None
    head = _head_and_embedding(model)
    if trained.is_lora:
        of = lora_updates(trained, put_adapter_on(model, trained) if model is not None else None)
    else:
        of = full_updates(trained)
    if places is None:
        places = plain_layout(stored, of)
    held = {parameter for place in places.values() for parameter in place.parameters}
    if not trained.is_lora and head[0] in held and head[0] not in of and head[1] in of:
        of[head[0]] = of[head[1]]  # tied: it trained under the embedding's name and is stored under its own as well
    sizes: Counter[torch.dtype] = Counter()
    for tensor in stored.values():
        sizes[tensor.dtype] += tensor.num_bytes
    return Job(trained, stored, places, Updates(trained.reader, of), dtype, kept, sizes.most_common(1)[0][0])


def _head_and_embedding(model: Any | None) -> tuple[str, str]:
    """Names of the weights of the output's and the input's embedding; the usual ones, if they cannot be known."""
    found = ["lm_head.weight", "model.embed_tokens.weight"]
    if model is not None:
        for i, get in enumerate(("get_output_embeddings", "get_input_embeddings")):
            try:
                table = getattr(model, get)()
            except NotImplementedError:  # a class that transformers did not write
                continue
            paths = [path for path, module in model.named_modules() if module is table]
            found[i] = f"{paths[0]}.weight" if paths else found[i]
    return found[0], found[1]


def _plan(job: Job, base: BaseFiles, on_note: Note) -> list[Planned]:
    """All tensors of the base in their order, what trained in its place."""
    _require_places(job)
    planned: list[Planned] = []
    untouched: list[str] = []
    unknown: list[str] = []
    for name, tensor in job.stored.items():
        place = job.places.get(name)
        trained = [p for p in place.parameters if p in job.updates.of] if place else []
        dtype = job.dtype_of(tensor)
        if place and trained:
            _require_whole(job, name, place, trained)
            make = _replaced if not job.updates.adds(trained[0]) else _merged
            planned.append(Planned(name, tensor.shape, dtype, lambda m=make, t=tensor, p=place: m(job, base, t, p)))  # type: ignore[misc]
        else:
            (untouched if place else unknown).append(name)
            planned.append(Planned(name, tensor.shape, dtype, lambda t=tensor: _copied(job, base, t)))  # type: ignore[misc]
    if untouched and not job.trained.is_lora:
        on_note(f"{len(untouched)} tensors did not train and are the base's: {_kinds(untouched)}")
    if unknown:
        on_note(f"{len(unknown)} tensors are of no part that trains here and stay as they are: {_kinds(unknown)}")
    return planned


def _copied(job: Job, base: BaseFiles, tensor: Stored) -> Iterator[torch.Tensor]:
    """A tensor that did not train, in the number format of the export."""
    dtype = job.dtype_of(tensor)
    for _, _, block in base.rows(tensor):
        yield block if job.stays(tensor) else job.as_trained_on(tensor, block).to(dtype)


def _replaced(job: Job, base: BaseFiles, tensor: Stored, place: Place) -> Iterator[torch.Tensor]:
    """A tensor that trained itself. The base's is read all the same, for its hash."""
    dtype, read = job.dtype_of(tensor), place.rows(job.updates.rows)
    for start, stop, block in base.rows(tensor):
        yield _checked(job, tensor, read(start, stop), block.shape).to(dtype)


def _merged(job: Job, base: BaseFiles, tensor: Stored, place: Place) -> Iterator[torch.Tensor]:
    """A tensor of the base with its update. The base is rounded first, as it was while the adapter trained on top."""
    dtype, updates = job.dtype_of(tensor), job.updates
    adapted = next(name for name in place.parameters if name in updates.of)

    def delta_of(name: str, start: int, stop: int | None) -> torch.Tensor:
        found = updates.rows(name if name in updates.of else adapted, start, stop)
        return found if name in updates.of else found.zero_()  # stored together with one that has an adapter

    read = place.rows(delta_of)
    for start, stop, block in base.rows(tensor):
        delta = _checked(job, tensor, read(start, stop), block.shape)
        yield delta.add_(job.as_trained_on(tensor, block).float()).to(dtype)


def _checked(job: Job, tensor: Stored, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if values.shape != shape:
        raise CheckpointError(
            str(job.trained.checkpoint),
            f"what trained of {tensor.name} has shape {list(values.shape)}, the base {list(shape)}",
            remedy="the base model is not the one that was trained",
        )
    if not values.sum().isfinite():  # several times faster than to look at each
        raise CheckpointError(
            str(job.trained.checkpoint),
            f"{tensor.name} is not finite",
            remedy="export an earlier checkpoint with checkpoint=STEP",
        )
    return values


def _require_places(job: Job) -> None:
    """Refuses to leave out anything that trained.

    Raises:
        ModelError: some trained weight has no place in the base's files.
    """
    held = {parameter for place in job.places.values() for parameter in place.parameters}
    lost = sorted(set(job.updates.of) - held)
    if lost:
        raise ModelError(
            "export.merged",
            f"{len(lost)} trained weights of {job.trained.checkpoint} have no place in the base model's files: "
            + ", ".join(lost[:5]),
            remedy="export.merged=false writes the adapter alone; a tied lm_head is better left out of tuning.targets",
        )


def _require_whole(job: Job, name: str, place: Place, trained: Collection[str]) -> None:
    """Refuses a stored tensor of which some parameters trained and others did not, or otherwise.

    Raises:
        ModelError: it would have to be put together of several kinds of values.
    """
    whole = len(trained) == len(place.parameters) and not any(job.updates.adds(p) for p in trained)
    if not whole and not all(job.updates.adds(p) for p in trained):
        raise ModelError(
            "export.merged",
            f"of {name}, which holds {', '.join(place.parameters)}, only {', '.join(trained)} trained, or not alike",
            remedy="train all of them or none (tuning.frozen)",
        )


def _require_layout(base: Mapping[str, Stored], written: Mapping[str, Stored]) -> None:
    """The last look at what was written: its headers, by the library."""
    expected, found = ({name: t.shape for name, t in tensors.items()} for tensors in (base, written))
    assert found == expected, sorted(found.items() ^ expected.items())[:5]


def _kinds(names: Iterable[str]) -> str:
    """The names, numbers left out, with how many there are of each."""
    kinds = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    told = [f"{kind} x {count}" if count > 1 else kind for kind, count in kinds.most_common(KINDS_NAMED)]
    return ", ".join(told) + (f" and {len(kinds) - KINDS_NAMED} more kinds" if len(kinds) > KINDS_NAMED else "")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Blocks are small: threads that wait for each other took four times the processor time on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The config with every mention of the number format set right, in parts of the model too."""
    fixed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            fixed[key] = name
        else:
            fixed[key] = _with_dtype(value, name) if isinstance(value, dict) else value
    return fixed


def copy_along(base_dir: Path, folder: Path, template: str | None, patterns: Collection[str] = COPIED) -> None:
    """Copies tokenizer, template and configs of the base; a template that the run was given replaces the base's."""
    for pattern in patterns:
        for path in base_dir.glob(pattern):
            if not path.name.endswith(".index.json") and path.name != "provenance.json":
                shutil.copyfile(path, folder / path.name)
    if (base_dir / TEMPLATES).is_dir():
        shutil.copytree(base_dir / TEMPLATES, folder / TEMPLATES, dirs_exist_ok=True)
    if template:
        shutil.copyfile(Path(template).expanduser(), folder / "chat_template.jinja")
