"""The environment variables of CANN, HCCL and torch_npu: their names, which are easily misspelt, and their values.

Sources: HCCL's own documentation (hicann/hccl, docs/en/user_guide/hccl_env, September 2026), CANN 9's list of
environment variables (hiascend.com, envref), torch_npu's (Ascend/pytorch, docs/zh/environment_variable_reference), and
the names that the torch_npu 2.13.0 wheel reads (``strings libtorch_npu.so`` and its Python files).

Not covered: compile-time variables (TORCHINDUCTOR_*, TRITON_*), and what a given chip or CANN honours. A name that is
in none of the sources is no error here: it may be from a newer CANN.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable

from train.devices.ascend_values import (
    FOREVER,
    ON_OFF,
    TRUE_FALSE,
    Check,
    address_here,
    allocator,
    cpu_affinity,
    folder,
    interfaces_of_gloo,
    interfaces_of_hccl,
    multiple_of_four,
    one_of,
    seconds,
    visible_devices,
    whole,
)

UNCHECKED = """
    HCCL_ALGO HCCL_ALG_MULTIPLE_DIMENSION_SPLIT_RATIO HCCL_ASYNC_ERROR_HANDLING HCCL_BLOCKING_WAIT
    HCCL_DEBUG_CONFIG HCCL_DESYNC_DEBUG HCCL_DFS_CONFIG HCCL_DIAGNOSE_ENABLE HCCL_ENTRY_LOG_ENABLE
    HCCL_HOST_RDMA_UDP_PORTS_LIST HCCL_HOST_SOCKET_PORT_RANGE HCCL_NPU_SOCKET_PORT_RANGE HCCL_LOGIC_SUPERPOD_ID
    HCCL_MULTI_QP_THRESHOLD HCCL_OP_RETRY_ENABLE HCCL_OP_RETRY_PARAMS HCCL_RDMA_PCIE_DIRECT_POST_NOSTRICT
    HCCL_RDMA_QPS_PER_CONNECTION HCCL_RDMA_QP_PORT_CONFIG_PATH HCCL_UB_MULTI_CHANNEL_NUM HCCL_WHITELIST_FILE
    HCOMM_DEBUG_CONFIG RANK_TABLE_FILE

    TORCH_HCCL_BLOCKING_WAIT TORCH_HCCL_COORD_CHECK_MILSEC TORCH_HCCL_DEBUG_INFO_PIPE_FILE
    TORCH_HCCL_DEBUG_INFO_TEMP_FILE TORCH_HCCL_DUMP_ON_TIMEOUT TORCH_HCCL_ENABLE_MONITORING
    TORCH_HCCL_HEARTBEAT_TIMEOUT_SEC TORCH_HCCL_HIGH_PRIORITY TORCH_HCCL_RANKS_PER_ROOT
    TORCH_HCCL_STATUS_SAVE_ENABLE TORCH_HCCL_STATUS_SAVE_INTERVAL TORCH_HCCL_STATUS_SAVE_PATH
    TORCH_HCCL_TRACE_BUFFER_SIZE TORCH_HCCL_TRACE_CPP_STACK TORCH_HCCL_WAIT_TIMEOUT_DUMP_MILSEC
    TORCH_NPU_COMPACT_ERROR_OUTPUT TORCH_NPU_DEVICE_CAPABILITY TORCH_NPU_DISABLED_WARNING
    TORCH_NPU_DVM_FUSION_REGION_BW_GBPS TORCH_NPU_DVM_FUSION_REGION_TRACE TORCH_NPU_ELASTIC_USE_AGENT_STORE
    TORCH_NPU_FALLBACK_CPU_DISABLE TORCH_NPU_LAZY_FUSION TORCH_NPU_LEGACY_IMPL_LIST TORCH_NPU_LOGS
    TORCH_NPU_LOGS_FILTER TORCH_NPU_SANITIZER TORCH_NPU_USE_COMPATIBLE_IMPL TORCH_NPU_USE_PARALLEL_TCPSTORE
    TORCH_NPU_WARNING_DISABLE TORCH_NPUGRAPH_GC TORCH_ACL_INIT_CONFIG_PATH TORCH_TRANSFER_TO_NPU
    PYTORCH_NO_NPU_MEMORY_CACHING PYTORCH_HAL_BASED_NPU_CHECK PER_STREAM_QUEUE OOM_SNAPSHOT_PATH
    ACLNN_CACHE_LIMIT NPU_ASD_CONFIG NPU_ASD_ENABLE NPU_ASD_SIGMA_THRESH NPU_ASD_UPPER_THRESH NPU_DEVICE_LIMIT
    NPU_FUZZY_COMPILE_BLACKLIST NPU_INDUCTOR_DYNAMIC_FX_PASS NPU_INDUCTOR_FALLBACK_LIST NPU_SHMEM_SYMMETRIC_SIZE
    PROF_CONFIG_PATH KINETO_USE_DAEMON

    ACL_DEBUG_DIR ACL_OP_COMPILER_CACHE_DIR ACL_OP_DEBUG_LEVEL ACL_OP_DEBUG_OPTION ACL_OP_INIT_MODE
    ACL_OP_SELECT_IMPL_MODE ACL_OPTYPELIST_FOR_IMPLMODE ACL_PRECISION_MODE ACL_STREAM_TIMEOUT ALLOW_CONV_HF32
    ALLOW_INTERNAL_FORMAT ALLOW_MATMUL_HF32 ASCEND_AICPU_PATH ASCEND_CACHE_PATH ASCEND_COREDUMP_SIGNAL
    ASCEND_CUSTOM_OPP_PATH ASCEND_DEVICE_ID ASCEND_ENGINE_PATH ASCEND_ENHANCE_ENABLE ASCEND_HOST_LOG_FILE_NUM
    ASCEND_LOG_DEVICE_FLUSH_TIMEOUT ASCEND_LOG_SAVE_MODE ASCEND_MAX_OP_CACHE_SIZE ASCEND_MODULE_LOG_LEVEL
    ASCEND_OPP_DEBUG_PATH ASCEND_PROCESS_LOG_PATH ASCEND_REMAIN_CACHE_SIZE_RATIO ASCEND_WORK_PATH

    ASCEND_ALLOW_LINK ASCEND_DRIVER_PATH ASCEND_INSTALL_PATH ASCEND_RUNTIME_MOUNTS ASCEND_RUNTIME_OPTIONS
    ASCEND_VISIBLE_DEVICES ASCEND_VNPU_SPECS
    """.split()
"""Names alone: HCCL's, torch_npu's, CANN's, then those of the container runtime and the installers."""

KNOWN: dict[str, Check | None] = {
    # HCCL: https://www.hiascend.com/document, "HCCL, environment variables".
    "HCCL_CONNECT_TIMEOUT": whole(120, 7200, "seconds"),
    "HCCL_EXEC_TIMEOUT": seconds,
    "HCCL_EVENT_TIMEOUT": whole(0, FOREVER, "seconds"),
    "HCCL_BUFFSIZE": whole(1, None, "MiB"),
    "P2P_HCCL_BUFFSIZE": whole(0, None, "MiB"),
    "HCCL_SOCKET_IFNAME": interfaces_of_hccl,
    "GLOO_SOCKET_IFNAME": interfaces_of_gloo,
    "HCCL_SOCKET_FAMILY": one_of("AF_INET", "AF_INET6"),
    "HCCL_IF_IP": address_here,
    "HCCL_IF_BASE_PORT": whole(1024, 65520),
    "HCCL_WHITELIST_DISABLE": ON_OFF,
    "HCCL_DETERMINISTIC": one_of("true", "false", "strict", any_case=True),
    # On A2 and A3 a word that HCCL does not know silently means the default.
    "HCCL_OP_EXPANSION_MODE": one_of(
        *("AI_CPU", "AICPU_TS", "AICPU_CacheDisable", "AIV", "HOST", "HOST_TS", "CCU_MS", "CCU_SCHED")
    ),
    "HCCL_INTRA_PCIE_ENABLE": ON_OFF,
    "HCCL_INTRA_ROCE_ENABLE": ON_OFF,
    "HCCL_INTER_HCCS_DISABLE": TRUE_FALSE,
    "HCCL_RDMA_TC": multiple_of_four,
    "HCCL_RDMA_SL": whole(0, 7),
    "HCCL_RDMA_TIMEOUT": whole(5, 24),
    "HCCL_RDMA_RETRY_CNT": whole(1, 7),
    # torch_npu; the bounds are those of its own messages.
    "TORCH_HCCL_ASYNC_ERROR_HANDLING": whole(0, 3),
    "TORCH_HCCL_DESYNC_DEBUG": ON_OFF,
    "TORCH_HCCL_ZERO_COPY": ON_OFF,
    "PYTORCH_NPU_ALLOC_CONF": allocator,
    "PYTORCH_ALLOC_CONF": allocator,
    "TASK_QUEUE_ENABLE": whole(0, 2),
    "CPU_AFFINITY_CONF": cpu_affinity,
    "ASCEND_LAUNCH_BLOCKING": ON_OFF,
    "COMBINED_ENABLE": ON_OFF,
    "INF_NAN_MODE_ENABLE": ON_OFF,
    "INF_NAN_MODE_FORCE_DISABLE": ON_OFF,
    "MULTI_STREAM_MEMORY_REUSE": whole(0, 3),
    "OOM_SNAPSHOT_ENABLE": whole(0, 2),
    "STREAMS_PER_DEVICE": one_of("8", "32"),
    "ACL_OP_COMPILER_CACHE_MODE": one_of("enable", "disable", "force"),
    "ACL_DEVICE_SYNC_TIMEOUT": whole(1, None, "seconds"),
    # CANN.
    "ASCEND_RT_VISIBLE_DEVICES": visible_devices,
    "ASCEND_HOME_PATH": folder,
    "ASCEND_OPP_PATH": folder,
    "ASCEND_TOOLKIT_HOME": folder,
    "ASCEND_GLOBAL_LOG_LEVEL": whole(0, 4),
    "ASCEND_SLOG_PRINT_TO_STDOUT": ON_OFF,
    "ASCEND_LOG_PRINT_TO_STDOUT": ON_OFF,
    "ASCEND_GLOBAL_EVENT_ENABLE": ON_OFF,
    **dict.fromkeys(UNCHECKED),
}
"""Every name, with the check of its value where there is one."""

FAMILIES = (
    *("HCCL_", "P2P_HCCL_", "TORCH_HCCL_", "ASCEND_", "ACL_", "PYTORCH_NPU_", "TORCH_NPU_", "NPU_"),
    *("TASK_QUEUE_", "CPU_AFFINITY_"),
)
"""Names that begin so are meant for an Ascend."""
OTHERS = re.compile(r"(TORCH_)?(?!HCCL_)[A-Z]{1,2}CCL_|PYTORCH_(CUDA|HIP|XPU|MPS)_|TORCHELASTIC_")
"""Right names of other vendors, one letter away from ours: NCCL_BUFFSIZE. And those that torchrun gives its workers."""
NEAR = 0.88
"""Likeness (difflib) from which a name is taken for a misspelt one; HCCL_BUFFER_SIZE has 0.90."""


def misspelt(environment: Iterable[str], accepted: Collection[str] = ()) -> dict[str, str]:
    """Names that are nearly one of ours, each with the right one."""
    found = {}
    for name in environment:
        if name in KNOWN or name in accepted or OTHERS.match(name):
            continue
        if name.upper() in KNOWN:
            found[name] = name.upper()
        elif near := difflib.get_close_matches(name, KNOWN, n=1, cutoff=NEAR):
            found[name] = near[0]
    return found


def unknown(environment: Iterable[str], accepted: Collection[str] = ()) -> list[str]:
    """Names that begin like ours but are like none of them: they may be from a newer CANN, or do nothing."""
    near = misspelt(environment, accepted)
    return sorted(
        name
        for name in environment
        if name.startswith(FAMILIES) and name not in KNOWN and name not in accepted and name not in near
    )
