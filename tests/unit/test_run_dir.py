"""The folder of a run belongs to one command at a time."""

from __future__ import annotations

import pytest

from configs.errors import ConfigError, StorageError
from launchers.run_dir import LOCK, alone_in, new_run


def test_a_second_command_in_the_same_folder_is_refused_until_the_first_is_done(tmp_path):
    folder = tmp_path / "run"
    with new_run(folder):
        (folder / "resolved.yaml").touch()
        for second in (alone_in, new_run):
            with pytest.raises(ConfigError, match="another crosstune is at work"), second(folder):
                pytest.fail("two commands in one folder")
    with alone_in(folder):
        assert (folder / LOCK).exists()


def test_a_start_that_left_nothing_takes_its_folder_away(tmp_path):
    with pytest.raises(RuntimeError), new_run(tmp_path / "run"):
        raise RuntimeError
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_refused_with_what_helps(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    with pytest.raises(ConfigError, match="without a checkpoint[\\s\\S]*remove the folder"), new_run(tmp_path):
        pytest.fail("not empty")
    (checkpoint / "COMPLETE").touch()
    with pytest.raises(ConfigError, match="holds a run already[\\s\\S]*crosstune resume"), new_run(tmp_path):
        pytest.fail("not empty")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="name another folder with run_dir="), new_run(tmp_path / "file/run"):
        pytest.fail("below a file")
