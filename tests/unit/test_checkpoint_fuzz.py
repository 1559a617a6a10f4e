"""Checkpoints made up to harm: whatever stands in the files, a resume loads what is in them or names what is wrong.

Hashes do not help here: but where a test is about them, index and COMPLETE are made to fit again.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes

from configs.errors import CheckpointError
from tests.unit.checkpoint_kit import WORLD, all_tensors, engine, state, steps
from train.checkpoint.layout import read_index, tensor_key
from train.checkpoint.parse_index import DEEPEST, MAX_INDEX_BYTES
from train.checkpoint.restore import restore
from train.checkpoint.save import save
from train.run_folder import sha256_of

RANK, INDEX, COMPLETE = FILES = ("rank00000.safetensors", "index.json", "COMPLETE")
CODE = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "ctypes.dlopen")
"""Audit events of code, or a process, of somebody else's choice."""
MOST_GROWTH = 200 * 2**20
"""Bytes by which all cases of a test together may let this process grow."""
WEIRD = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 1.5, -0.0, 1e300, "", "x", "\x1b[2J", "../../etc/passwd"),
    *("\ud800", "rank00001.safetensors", "é" * 3000, [], {}, [[]], [1, 2, 3], {"a": 1}, [-1], [2**40, 2**40], [True]),
]
CASES = pytest.mark.parametrize("cases", [range(120), pytest.param(range(120, 3000), marks=pytest.mark.slow)])
_watching = False


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _watching and event in CODE:
        raise AssertionError(f"{event} {arguments}")


sys.addaudithook(_audit)  # for the life of the process, as Python has it; idle but while a case is read


class Made:
    """A good checkpoint, and copies of it to spoil."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        built = engine()
        steps(built, 0, 2)
        self.good = save(built, folder / "good", state(2), WORLD, run_id="mine", metrics={"loss": 0.5})
        self.tensors = all_tensors(built)
        self.index = json.loads((self.good / INDEX).read_text())
        self.target = engine(seed=5)

    def copy(self) -> Path:
        path = self.folder / "spoilt" / self.good.name
        shutil.rmtree(path.parent, ignore_errors=True)
        return Path(shutil.copytree(self.good, path))

    def restored(self, path: Path) -> dict[tuple[str, str], torch.Tensor] | None:
        """The tensors that were loaded; None where it was refused in good order, with nothing overwritten."""
        global _watching
        for fragment in self.target.fragments(owned=False):
            fragment.make_state(["master"], {})
        before = {key: tensor.clone() for key, tensor in all_tensors(self.target).items()}
        _watching = True
        try:
            restore(self.target, path, WORLD)
        except CheckpointError as error:
            shown = error.render()
            assert error.remedy and len(shown) < 4000 and shown.replace("\n", " ").isprintable(), shown
            after = all_tensors(self.target)
            assert all(torch.equal(before[key], after[key]) for key in before), "refused, yet overwritten"
            return None
        finally:
            _watching = False
        assert 0 <= random.gauss(0.5, 0) and 0 <= np.random.rand() < 1 and 0 <= float(torch.rand(1)) < 1
        return all_tensors(self.target)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def small():
    """The cases of a test take little memory, also for a moment."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_GROWTH


def same(loaded: dict[tuple[str, str], torch.Tensor], expected: dict[tuple[str, str], torch.Tensor]) -> bool:
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[key], expected[key]) for key in expected)


def seal(path: Path) -> None:
    (path / COMPLETE).write_text(sha256_of(path / INDEX))


def put(path: Path, index: Any) -> None:
    """The index as JSON or as it is, with a COMPLETE that fits."""
    (path / INDEX).write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
    seal(path)


def put_rank_file(made: Made, path: Path, content: bytes) -> None:
    """A rank's file, with an index and a COMPLETE that fit."""
    (path / RANK).write_bytes(content)
    index = json.loads(json.dumps(made.index))
    index["files"][RANK] |= {"sha256": sha256_of(path / RANK), "bytes": len(content)}
    put(path, index)


def spoilt(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, left out, put in or written twice; or nothing but noise."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        at, size = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 7, 100])
        kind = rng.randrange(6)
        if kind < 2 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = rng.choice([rng.randbytes(size), b"9" * size, b'"' * size, b"[" * size, data[at : at + size]])
        elif kind == 4:
            data[at : at + size] = rng.choice([b"0" * size, rng.randbytes(size)])
        else:
            data[:] = rng.choice([data[:at], data + data, rng.randbytes(at), b""])
    return bytes(data)


def header_end(content: bytes) -> int:
    return 8 + int(struct.unpack("<Q", content[:8])[0])


def stored_in(content: bytes, key: str) -> np.ndarray:
    """A tensor of a safetensors file, read by its documentation alone."""
    end = header_end(content)
    begin, stop = json.loads(content[8:end])[key]["data_offsets"]
    return np.frombuffer(content[end + begin : end + stop], dtype=np.float32)


@CASES
def test_any_change_of_any_file_is_seen(made, small, cases):
    for case in cases:
        rng = random.Random(case)
        path = made.copy()
        file = path / rng.choice(FILES)
        content = spoilt(file.read_bytes(), rng)
        changed = content.strip() != file.read_bytes() if file.name == COMPLETE else content != file.read_bytes()
        file.write_bytes(content)
        loaded = made.restored(path)
        assert loaded is None if changed else same(loaded, made.tensors), case


@CASES
def test_an_index_of_any_bytes_loads_nothing_wrong(made, small, cases):
    for case in cases:
        path = made.copy()
        put(path, spoilt((path / INDEX).read_bytes(), random.Random(case)))
        loaded = made.restored(path)
        assert loaded is None or same(loaded, made.tensors), case


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found.append((value, key))
        places(value[key], found)
    return found


@CASES
def test_an_index_of_any_values_loads_nothing_wrong(made, small, cases):
    """Values replaced, exchanged, left out and renamed."""
    refused = 0
    for case in cases:
        rng = random.Random(case)
        index = json.loads(json.dumps(made.index))
        (holder, key), (other, theirs) = rng.choices(places(index, []), k=2)
        kind = rng.randrange(5)
        if kind < 2:
            holder[key] = rng.choice(WEIRD)
        elif kind == 2:
            copies = json.loads(json.dumps([holder[key], other[theirs]]))
            holder[key], other[theirs] = copies[1], copies[0]
        elif kind == 3:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice([word for word in WEIRD if isinstance(word, str)])] = holder.pop(key)
        else:
            holder.append(holder[key])
        path = made.copy()
        put(path, index)
        loaded = made.restored(path)
        assert loaded is None or same(loaded, made.tensors), case
        refused += loaded is None
    assert refused > len(cases) / 2


@CASES
def test_a_rank_file_of_any_bytes_loads_what_is_in_it(made, small, cases):
    original = (made.good / RANK).read_bytes()
    end = header_end(original)
    for case in cases:
        rng = random.Random(case)
        inside = rng.random() < 0.7  # mostly the header: what is behind it are numbers like any others
        content = original[:8] + spoilt(original[8:end], rng) + original[end:] if inside else spoilt(original, rng)
        path = made.copy()
        put_rank_file(made, path, content)
        loaded = made.restored(path)
        for (name, kind), tensor in (loaded or {}).items():
            expected = stored_in(content, tensor_key(name, kind, 0))
            assert np.array_equal(tensor.flatten().numpy().view(np.uint32), expected.view(np.uint32)), (
                case,
                name,
                kind,
            )


@CASES
def test_generator_states_of_any_bytes_do_no_harm(made, small, cases):
    original = (made.good / RANK).read_bytes()
    end = header_end(original)
    header = json.loads(original[8:end])
    for case in cases:
        rng = random.Random(case)
        begin, stop = header[rng.choice([key for key in header if key.startswith("rng:")])]["data_offsets"]
        content = spoilt(original[end + begin : end + stop], rng).ljust(stop - begin)[: stop - begin]
        path = made.copy()
        put_rank_file(made, path, original[: end + begin] + content + original[end + stop :])
        loaded = made.restored(path)
        assert loaded is None or same(loaded, made.tensors), case


WORDS = [7] * 624
NO_STATES = [
    *[("python", state) for state in ([2, [*WORDS, 0], None], [3, [*WORDS, 625], None], [3, [*WORDS, -1], None])],
    *[("python", state) for state in ([3, [2**32, *WORDS], None], [3, [*WORDS, 0], "x"], [3, WORDS, None], {}, 3)],
    *[("numpy", state) for state in ([WORDS, 10**6, 0, 0.0], [WORDS, -1, 0, 0.0], [WORDS[1:], 0, 0, 0.0])],
    *[("numpy", state) for state in ([WORDS, 0, 2, 0.0], [WORDS, 0, 0, "x"], [[1.5] * 624, 0, 0, 0.0], [])],
    *[("torch", state) for state in ([], WORDS)],
]


@pytest.mark.parametrize("number", range(len(NO_STATES)))
def test_a_generator_state_beyond_its_bounds_is_named(made, number):
    """numpy would read foreign memory at a position beyond its state."""
    name, state = NO_STATES[number]
    path = made.copy()
    tensors = load_file(path / RANK)
    tensors[f"rng:{name}"] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    put_rank_file(made, path, save_bytes(tensors))
    with pytest.raises(CheckpointError, match=f"the state of {name}'s generator is damaged"):
        restore(made.target, path, WORLD)
    assert made.restored(path) is None


def at(*keys: Any, value: Any) -> Callable[[Any], Any]:
    """Puts a value at a place in the index."""

    def change(index: Any) -> Any:
        holder = index
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = value
        return index

    return change


def text(old: str, new: str) -> Callable[[Any], Any]:
    """Changes the index as text, to what json.dumps would not write."""
    return lambda index: json.dumps(index).replace(old, new, 1).encode()


WEIGHT = ("params", "0.weight")
MALFORMED = {
    "no object": (lambda index: [], "a list where an object is expected"),
    "deep": (lambda index: b"[" * 200_000, "nested too deeply"),
    "deep, and closed": (
        at("state", "extra", value={"a": json.loads("[" * DEEPEST + "]" * DEEPEST)}),
        "nested more than",
    ),
    "double key": (text('"epoch": 1', '"epoch": 1, "epoch": 2'), "'epoch' twice"),
    "long number": (text('"epoch": 1', '"epoch": ' + "9" * 5000), "a number of 5000 digits"),
    "huge number": (text('"epoch": 1', '"epoch": ' + "9" * 30), "state.epoch: 999"),
    "infinite": (text('"loss": 0.5', '"loss": 1e999'), "metrics.loss: inf"),
    "NaN": (text('"loss": 0.5', '"loss": NaN'), "NaN, which is no number"),
    "not UTF-8": (lambda index: json.dumps(index).encode("utf-16"), "utf-8"),
    "terminal codes": (at("run_id", value="\x1b[2J"), "printable"),
    "many ranks": (at("world_size", value=10**7), "1 for 10000000 ranks"),
    "a path": (lambda index: at("files", value={"../secret": index["files"][RANK]})(index), f"no {RANK}"),
    "a piece elsewhere": (at(*WEIGHT, "fragments", value=[["../x", 0, 20]]), "none of the files"),
    "a gap": (at(*WEIGHT, "fragments", value=[[RANK, 1, 19]]), "a piece of 19 at 1, expected at 0"),
    "an overlap": (
        at(*WEIGHT, "fragments", value=[[RANK, 0, 12], [RANK, 8, 12]]),
        "a piece of 12 at 8, expected at 12",
    ),
    "too few": (at(*WEIGHT, "fragments", value=[[RANK, 0, 12]]), "12 of 20 elements"),
    "negative": (at(*WEIGHT, "shape", value=[-5, -4]), "a whole number from 1"),
    "immense": (at(*WEIGHT, "shape", value=[2**30, 2**30]), "elements"),
    "true for 1": (at("state", "epoch", value=True), "expected a whole number"),
    "no master": (at(*WEIGHT, "kinds", value=["exp_avg"]), "lack 'master'"),
    "half a step": (at(*WEIGHT, "scalars", "step", "value", value=1.5), "scalars.step: 1.5"),
    "unknown": (at("params", "0.weight", "code", value="import os"), "unknown 'code'"),
    "another step": (at("state", "step", value=3), "is that of step 3"),
    "the older format": (at("format_version", value=1), "format_version 1"),
    "no such tensor": (
        at(*WEIGHT, "kinds", value=["master", "exp_avg", "exp_avg_sq", "more"]),
        "lacks '0.weight:more@0'",
    ),
    "more than said": (at(*WEIGHT, "kinds", value=["master", "exp_avg"]), "of which the index knows nothing"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_malformed_is_named(made, small, case):
    change, words = MALFORMED[case]
    path = made.copy()
    put(path, change(json.loads(json.dumps(made.index))))
    with pytest.raises(CheckpointError) as caught:
        restore(made.target, path, WORLD)
    assert words in caught.value.found
    assert made.restored(path) is None


def test_what_is_no_file_or_too_large_is_not_read(made, small):
    for name in FILES:
        path = made.copy()
        (path / name).unlink()
        (path / name).symlink_to("/dev/zero")
        assert made.restored(path) is None
    path = made.copy()
    with (path / INDEX).open("r+b") as file:
        file.truncate(MAX_INDEX_BYTES + 1)  # takes no room on disk
    with pytest.raises(CheckpointError, match="larger than any index"):
        read_index(path)
