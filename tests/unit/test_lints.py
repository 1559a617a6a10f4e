"""The project's own lints find what they are for."""

from __future__ import annotations

from tests.lint_vendor_names import breaches


def test_a_vendor_name_is_found_outside_the_device_folder_only(tmp_path):
    for name in ("train/devices/cuda.py", "train/loop.py", "configs/device/cuda.yaml", "data_prep/prepare.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\ntorch.cuda.synchronize()  # on the NPU\n")
    assert [line.split(": ")[0] for line in breaches(tmp_path)] == ["data_prep/prepare.py:2", "train/loop.py:2"]


def test_the_project_names_no_vendor_outside_the_device_folder():
    assert breaches() == []
