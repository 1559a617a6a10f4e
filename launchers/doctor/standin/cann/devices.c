// Devices, contexts, and what a chip says about itself.
#include "cann.h"

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

// A context is its device: the pointer's value is this plus the device. CANN's are opaque too.
#define FIRST_CONTEXT ((intptr_t)0x1000)

static __thread int32_t current_device = 0;
static uint32_t visible_devices = 0;
static pthread_once_t counted = PTHREAD_ONCE_INIT;

long standin_setting(const char *variable, long fallback) {
    const char *text = getenv(variable);
    return text && *text ? atol(text) : fallback;
}

int32_t standin_current_device(void) {
    return current_device;
}

// ASCEND_RT_VISIBLE_DEVICES holds numbers of devices, separated by commas. As with CUDA the first one that is not
// there, or that is not a number, ends the list: what stands before it is visible, what follows is not.
static void count_devices(void) {
    long machine = standin_setting("CROSSTUNE_STANDIN_DEVICES", 2);
    const char *list = getenv("ASCEND_RT_VISIBLE_DEVICES");
    if (!list) {
        visible_devices = (uint32_t)machine;
        return;
    }
    char *end = NULL;
    for (const char *rest = list; *rest; rest = end + 1) {
        long device = strtol(rest, &end, 10);
        if (end == rest || (*end && *end != ',') || device < 0 || device >= machine) return;
        visible_devices++;
        if (!*end) return;
    }
}

aclError aclInit(const char *config_path) {
    return ACL_SUCCESS;
}

aclError aclFinalize(void) {
    return ACL_SUCCESS;
}

const char *aclGetRecentErrMsg(void) {
    return "(pretended CANN)";
}

const char *aclrtGetSocName(void) {
    const char *soc = getenv("CROSSTUNE_STANDIN_SOC");
    return soc && *soc ? soc : "Ascend910B3";
}

aclError aclrtGetDeviceCount(uint32_t *count) {
    pthread_once(&counted, count_devices);
    *count = visible_devices;
    return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t device) {
    uint32_t count;
    aclrtGetDeviceCount(&count);
    if (device < 0 || (uint32_t)device >= count) return ACL_ERROR_INVALID_DEVICE;
    current_device = device;
    return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t *device) {
    *device = current_device;
    return ACL_SUCCESS;
}

aclError aclrtResetDevice(int32_t device) {
    return ACL_SUCCESS;
}

aclError aclrtGetCurrentContext(void **context) {
    *context = (void *)(FIRST_CONTEXT + current_device);
    return ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(void *context) {
    intptr_t value = (intptr_t)context;
    if (value >= FIRST_CONTEXT && value < FIRST_CONTEXT + MAX_DEVICES) {
        current_device = (int32_t)(value - FIRST_CONTEXT);
    }
    return ACL_SUCCESS;
}

// Active: torch_npu else takes a device for one that nothing runs on, and skips its synchronization.
aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    if (flags) *flags = 0;
    *active = 1;
    return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t *can_access, int32_t device, int32_t peer) {
    *can_access = 1;
    return ACL_SUCCESS;
}

// The process as the device knows it; shared memory between processes is addressed by it.
aclError aclrtDeviceGetBareTgid(int32_t *process) {
    *process = getpid();
    return ACL_SUCCESS;
}

aclError aclGetDeviceCapability(uint32_t device, int32_t which, int64_t *value) {
    *value = 1;
    return ACL_SUCCESS;
}
