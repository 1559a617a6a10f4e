"""Ascend's run-time settings: what wins, what is refused, and that they stand before torch_npu reads them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from configs.compose import compose
from configs.errors import ConfigError, DeviceError, ErrorGroup
from configs.schema.device import AscendConfig
from launchers.environment import ascend_config, keep_out_plugins, prepare_environment
from launchers.torchrun import worker_environment
from tests.command import crosstune
from train.devices import ascend_environment, ascend_variables
from train.devices.ascend_environment import plan, recorded, settle

DEFAULTS = {
    "HCCL_CONNECT_TIMEOUT": "600",
    "HCCL_EXEC_TIMEOUT": "1836",
    "HCCL_BUFFSIZE": "200",
    "HCCL_DETERMINISTIC": "true",
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
    "TASK_QUEUE_ENABLE": "2",
    "CPU_AFFINITY_CONF": "1",
}


def config(**values: object) -> AscendConfig:
    return AscendConfig(_target_="train.devices.ascend.AscendDevice", **values)


def faults_of(environment: dict[str, str], **values: object) -> dict[str, str]:
    """Where -> the whole message, of everything that is wrong."""
    with pytest.raises((DeviceError, ErrorGroup)) as caught:
        settle(config(**values), environment)
    error = caught.value
    return {each.where: each.render() for each in (error.errors if isinstance(error, ErrorGroup) else [error])}


def test_the_config_wins_over_the_environment_and_the_environment_over_the_defaults():
    environment = {"PATH": "/bin"}
    assert settle(config(), environment) == []
    assert environment == {"PATH": "/bin"} | DEFAULTS

    environment = {"HCCL_CONNECT_TIMEOUT": "1200", "HCCL_BUFFSIZE": "120", "HCCL_EXEC_TIMEOUT": ""}
    notes = settle(config(buffer_mib=64, task_queue=1, deterministic=False), environment)
    wanted = {"HCCL_CONNECT_TIMEOUT": "1200", "HCCL_BUFFSIZE": "64", "TASK_QUEUE_ENABLE": "1"}
    assert environment == {name: value for name, value in DEFAULTS.items() if "DETERM" not in name} | wanted
    assert notes == ["HCCL_BUFFSIZE=120 of the environment is replaced: device.buffer_mib=64"]
    again = dict(environment)
    assert settle(config(buffer_mib=64, task_queue=1, deterministic=False), again) == [] and again == environment


def test_where_a_value_comes_from_is_known():
    found = plan(config(base_port=50000), {"HCCL_BUFFSIZE": "100"})
    assert [found.origins[name] for name in ("HCCL_IF_BASE_PORT", "HCCL_BUFFSIZE", "TASK_QUEUE_ENABLE")] == [
        ascend_environment.CONFIG,
        ascend_environment.ENVIRONMENT,
        ascend_environment.DEFAULT,
    ]


def test_deterministic_replaces_false_but_not_strict():
    environment = {"HCCL_DETERMINISTIC": "false"}
    (note,) = settle(config(), environment)
    assert environment["HCCL_DETERMINISTIC"] == "true" and "device.deterministic=false" in note
    environment = {"HCCL_DETERMINISTIC": "strict"}
    assert settle(config(), environment) == [] and environment["HCCL_DETERMINISTIC"] == "strict"


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("HCCL_DETERMINISITIC", "HCCL_DETERMINISTIC"),
        ("HCCL_EXEC_TIMEOT", "HCCL_EXEC_TIMEOUT"),
        ("HCCL_BUFFER_SIZE", "HCCL_BUFFSIZE"),
        ("HCLL_CONNECT_TIMEOUT", "HCCL_CONNECT_TIMEOUT"),
        ("hccl_buffsize", "HCCL_BUFFSIZE"),
        ("TASK_QUEUE_ENABLED", "TASK_QUEUE_ENABLE"),
        ("TORCH_NPU_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF"),
        ("COMBINE_ENABLE", "COMBINED_ENABLE"),
        ("ASCEND_RT_VISIBLE_DEVICE", "ASCEND_RT_VISIBLE_DEVICES"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_right_one_and_with_the_way_to_keep_it(name, right):
    message = faults_of({name: "1"})[name]
    assert f"did you mean {right}?" in message and f"device.known_variables=[{name}]" in message
    settle(config(known_variables=[name]), {name: "1"})


def test_names_of_other_vendors_and_of_a_newer_cann_stop_nothing():
    others = ["NCCL_BUFFSIZE", "NCCL_SOCKET_IFNAME", "TORCH_NCCL_BLOCKING_WAIT", "PYTORCH_CUDA_ALLOC_CONF"]
    others += ["TORCHELASTIC_USE_AGENT_STORE"]  # torchrun's, in every worker
    newer = ["ASCEND_HCCL_PATH", "HCCL_TIMEOUT"]
    environment = dict.fromkeys([*others, *newer, "TP_SOCKET_IFNAME"], "1")
    settle(config(), environment)
    assert ascend_variables.unknown(environment) == newer


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("HCCL_CONNECT_TIMEOUT", "60", "120 to 7,200"),
        ("HCCL_CONNECT_TIMEOUT", "7201", "120 to 7,200"),
        ("HCCL_EXEC_TIMEOUT", "-1", "0 (waits for ever)"),
        ("HCCL_BUFFSIZE", "0", "1 or more MiB"),
        ("HCCL_IF_BASE_PORT", "80", "1024 to 65,520"),
        ("HCCL_DETERMINISTIC", "yes", "true, false, strict"),
        ("HCCL_OP_EXPANSION_MODE", "AICPU", "AI_CPU"),
        ("HCCL_WHITELIST_DISABLE", "true", "0, 1"),
        ("HCCL_RDMA_TC", "33", "a multiple of 4"),
        ("HCCL_IF_IP", "203.0.113.7", "an address of this machine"),
        ("TASK_QUEUE_ENABLE", "3", "0 to 2"),
        ("CPU_AFFINITY_CONF", "1,npu0:3", "0, 1 or 2"),
        ("ASCEND_RT_VISIBLE_DEVICES", "0,0", "each once"),
        ("ASCEND_RT_VISIBLE_DEVICES", "0-3", "with commas"),
        ("ASCEND_HOME_PATH", "/nowhere", "a folder that exists"),
        ("ASCEND_GLOBAL_LOG_LEVEL", "5", "0 to 4"),
        ("PYTORCH_NPU_ALLOC_CONF", "expandable_segment:True", "expandable_segments (there is no"),
        ("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:true", "True, False"),
        ("PYTORCH_NPU_ALLOC_CONF", "max_split_size_mb:10", "20 or more"),
        ("PYTORCH_NPU_ALLOC_CONF", "garbage_collection_threshold:1.5", "between 0 and 1"),
        ("PYTORCH_NPU_ALLOC_CONF", "page_size:1G", "1g"),
        ("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:32", "but not both"),
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True,garbage_collection_threshold:0.6", "but not both"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(variable, value, allowed):
    message = faults_of({variable: value})[variable]
    assert f"'{value}'" in message and allowed in message


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HCCL_EXEC_TIMEOUT", "0.05"),
        ("HCCL_DETERMINISTIC", "STRICT"),
        ("CPU_AFFINITY_CONF", "1,npu0:0-1,npu1:2-5,npu_affine:1"),
        ("ASCEND_RT_VISIBLE_DEVICES", ""),
        ("ASCEND_RT_VISIBLE_DEVICES", "3,1"),
        ("PYTORCH_NPU_ALLOC_CONF", "max_split_size_mb:20, garbage_collection_threshold:0.6"),
        ("PYTORCH_NPU_ALLOC_CONF", "roundup_power2_divisions:[256:1,512:2],expandable_segments:False"),
        ("PYTORCH_ALLOC_CONF", "page_size:1g"),
        ("HCCL_SOCKET_IFNAME", "^docker"),
    ],
)
def test_a_right_value_stays_as_it_is(variable, value):
    environment = {variable: value}
    settle(config(), environment)
    assert environment[variable] == value


@pytest.mark.parametrize(
    ("environment", "where"),
    [
        ({"HCCL_IF_IP": "127.0.0.1", "HCCL_SOCKET_IFNAME": "^docker"}, "HCCL_IF_IP"),
        ({"PYTORCH_ALLOC_CONF": "page_size:1g", "PYTORCH_NPU_ALLOC_CONF": "page_size:1g"}, "PYTORCH_ALLOC_CONF"),
        ({"HCCL_INTRA_PCIE_ENABLE": "1", "HCCL_INTRA_ROCE_ENABLE": "1"}, "HCCL_INTRA_ROCE_ENABLE"),
        ({"HCCL_WHITELIST_DISABLE": "0"}, "HCCL_WHITELIST_DISABLE"),
        ({"HCCL_EVENT_TIMEOUT": "600"}, "HCCL_EVENT_TIMEOUT"),
        ({"HCCL_DETERMINISTIC": "strict", "INF_NAN_MODE_ENABLE": "0"}, "HCCL_DETERMINISTIC"),
        ({"TORCH_TRANSFER_TO_NPU": "1"}, "TORCH_TRANSFER_TO_NPU"),
    ],
)
def test_settings_that_cannot_both_be_meant_are_refused(environment, where):
    assert where in faults_of(environment)


def test_the_allocator_has_no_default_beside_the_variable_that_torch_shares():
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}
    settle(config(), environment)
    assert "PYTORCH_NPU_ALLOC_CONF" not in environment


def test_launching_one_operator_at_a_time_leaves_no_queue():
    environment: dict[str, str] = {}
    assert settle(config(launch_blocking=True), environment) == []
    assert (environment["ASCEND_LAUNCH_BLOCKING"], environment["TASK_QUEUE_ENABLE"]) == ("1", "0")
    environment = {"ASCEND_LAUNCH_BLOCKING": "1", "TASK_QUEUE_ENABLE": "2"}
    (note,) = settle(config(), environment)
    assert environment["TASK_QUEUE_ENABLE"] == "0" and "turns the queue off" in note
    assert "device.task_queue" in faults_of({"ASCEND_LAUNCH_BLOCKING": "1"}, task_queue=2)
    with pytest.raises(ConfigError, match="turns the queue off"):
        config(launch_blocking=True, task_queue=2)


def test_an_interface_must_be_one_of_this_machines(monkeypatch):
    here = {"lo": [], "eth0": [], "eth1": [], "docker0": []}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: here)
    for value, first in [("eth", "eth0"), ("=eth1,eth0", "eth0"), ("^lo,docker", "eth0"), ("^=lo,eth0", "eth1")]:
        environment: dict[str, str] = {}
        settle(config(interface=value), environment)
        assert (environment["HCCL_SOCKET_IFNAME"], environment["GLOO_SOCKET_IFNAME"]) == (value, first)
    for value in ("enp", "=eth", "^", "==eth0", "^lo,eth,docker"):
        message = faults_of({}, interface=value)["device.interface"]
        assert "this machine has docker0, eth0, eth1, lo" in message
    assert "eth7" in faults_of({"GLOO_SOCKET_IFNAME": "eth7"})["GLOO_SOCKET_IFNAME"]


def test_all_faults_come_at_once_and_nothing_is_changed():
    environment = {"HCCL_DETERMINISITIC": "true", "HCCL_CONNECT_TIMEOUT": "60", "TASK_QUEUE_ENABLE": "5"}
    before = dict(environment)
    assert set(faults_of(environment, allocator="nonsense:1")) == {*before, "device.allocator"}
    assert environment == before


def test_what_a_timeout_really_means_is_said():
    assert "544 s" in settle(config(execute_timeout_seconds=600), {})[0]
    environment: dict[str, str] = {}
    assert "waits for ever" in settle(config(execute_timeout_seconds=0), environment)[0]
    assert settle(config(execute_timeout_seconds=0), environment) == [], "it is said once"


@pytest.mark.parametrize(
    "override",
    ["connect_timeout_seconds=60", "buffer_mib=0", "base_port=80", "task_queue=3", "cpu_affinity=-1", "interface=''"],
)
def test_the_config_knows_its_ranges(override):
    with pytest.raises(ConfigError) as caught:
        compose("train", ["model.path=/m", "dataset.path=/d", "device=ascend", f"device.{override}"])
    assert f"device.{override.partition('=')[0]}" in caught.value.render()


def test_only_known_names_are_recorded():
    environment = {"HCCL_BUFFSIZE": "100", "HCCL_TOKEN": "secret", "HF_TOKEN": "secret", "ASCEND_PASSWORD": "secret"}
    assert recorded(environment) == {"HCCL_BUFFSIZE": "100"}


def test_auto_settles_too_where_torch_npu_is_installed(monkeypatch):
    cfg = compose("train", ["model.path=/m", "dataset.path=/d", "device.deterministic=false"])
    monkeypatch.setattr("launchers.environment.importlib.util.find_spec", lambda name: None)
    assert ascend_config(cfg.device) is None
    monkeypatch.setattr("launchers.environment.importlib.util.find_spec", lambda name: object())
    environment: dict[str, str] = {}
    prepare_environment(cfg, environment)
    assert environment["HCCL_CONNECT_TIMEOUT"] == "600" and "HCCL_DETERMINISTIC" not in environment
    cpu = compose("train", ["model.path=/m", "dataset.path=/d", "device=cpu"])
    assert ascend_config(cpu.device) is None


PLUGIN = """
import json, os, sys
with open(os.environ["SEEN"], "a") as file:
    file.write(json.dumps([{k: v for k, v in os.environ.items() if "HCCL" in k or "NPU" in k}, "torch" in sys.modules]))
raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")
"""


@pytest.fixture
def broken_plugin(tmp_path: Path) -> dict[str, str]:
    """Environment with a torch_npu that, as the real one without CANN does, breaks `import torch`."""
    (tmp_path / "site/torch_npu").mkdir(parents=True)
    (tmp_path / "site/torch_npu/__init__.py").write_text(PLUGIN)
    info = tmp_path / "site/torch_npu-2.13.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return {"PYTHONPATH": str(tmp_path / "site"), "SEEN": str(tmp_path / "seen")}


def test_torch_npu_sees_our_values_when_it_is_loaded_and_a_plugin_that_does_not_load_is_no_traceback(
    broken_plugin, tmp_path
):
    """Without CANN the real wheel makes a plain `import torch` fail; this one also writes down what it sees."""
    by_itself = subprocess.run(
        [sys.executable, "-c", "import torch"], env=broken_plugin | {"PATH": ""}, capture_output=True, text=True
    )
    assert "Failed to load the backend extension" in by_itself.stderr
    (tmp_path / "seen").unlink()
    words = ["train", "model.path=/m", "dataset.path=/d", "device=ascend", "device.buffer_mib=64"]
    out = crosstune(*words, f"run_dir={tmp_path / 'run'}", code=2, HCCL_CONNECT_TIMEOUT="900", **broken_plugin)
    assert "device=ascend" in out and "libhccl.so" in out and "set_env.sh" in out and "Traceback" not in out
    seen, after_torch = json.JSONDecoder().raw_decode((tmp_path / "seen").read_text())[0]
    wanted = DEFAULTS | {"HCCL_CONNECT_TIMEOUT": "900", "HCCL_BUFFSIZE": "64"}
    assert seen == {name: value for name, value in wanted.items() if name in seen} and len(seen) == 5
    assert after_torch, "the device layer loads it, and torch alone does not"


def test_libraries_do_without_a_plugin_that_does_not_load(broken_plugin):
    """A login node: torch_npu is installed, CANN is not, and transformers imports it wherever it finds it."""
    code = """
import sys
from configs.schema.device import DeviceConfig
from train.devices.auto import AutoDevice
device = AutoDevice(DeviceConfig(_target_="train.devices.auto.AutoDevice"))
import transformers.integrations.sdpa_attention
print(device.name)
"""
    environment = broken_plugin | {"PATH": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["cpu"], done.stderr


def test_torch_npu_is_kept_out_of_work_on_other_devices(broken_plugin, monkeypatch):
    monkeypatch.syspath_prepend(broken_plugin["PYTHONPATH"])
    words = ["model.path=/m", "dataset.path=/d"]
    elsewhere = [
        compose("train", [*words, "device=cpu"]),
        compose("prep", words),
        compose("export", ["run_dir=/r"]),
        None,
    ]
    there = [compose("train", [*words, f"device={name}"]) for name in ("ascend", "auto")] + [compose("doctor", [])]
    for cfg, kept in [*((each, False) for each in elsewhere), *((each, True) for each in there)]:
        monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
        keep_out_plugins(cfg)
        assert (importlib.util.find_spec("torch_npu") is not None) is kept
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)


def test_workers_inherit_the_settled_environment(tmp_path):
    environment: dict[str, str] = {}
    settle(config(buffer_mib=64), environment)
    workers = worker_environment(environment, tmp_path, 2, 1)
    assert environment.items() <= workers.items()
    assert settle(config(buffer_mib=64), workers) == [], "and there is nothing left to say in them"
