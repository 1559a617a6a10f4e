// Device memory is host memory, with an account per device: beyond CROSSTUNE_STANDIN_HBM_MIB an allocation fails as
// on a card.
//
// The account is a process's own. Processes that share a card are not seen by each other.
#include "cann.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// torch_npu expects device addresses on 512 bytes, and puts its own blocks on multiples of it. The header takes the
// first.
enum { ALIGNMENT = 512 };

typedef struct {
    size_t bytes;
    int32_t device;
} Allocation;

static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static size_t used_bytes[MAX_DEVICES];

static size_t total_bytes(void) {
    return (size_t)standin_setting("CROSSTUNE_STANDIN_HBM_MIB", 65536) << 20;
}

static int take(int32_t device, size_t bytes) {
    pthread_mutex_lock(&guard);
    int fits = bytes <= total_bytes() - used_bytes[device];
    if (fits) used_bytes[device] += bytes;
    pthread_mutex_unlock(&guard);
    return fits;
}

static void give_back(int32_t device, size_t bytes) {
    pthread_mutex_lock(&guard);
    used_bytes[device] -= bytes;
    pthread_mutex_unlock(&guard);
}

aclError aclrtMalloc(void **address, size_t bytes, int32_t policy) {
    int32_t device = standin_current_device();
    void *block = NULL;
    *address = NULL;
    if (!take(device, bytes)) return ACL_ERROR_MEMORY_ALLOCATION;
    if (posix_memalign(&block, ALIGNMENT, bytes + ALIGNMENT)) {
        give_back(device, bytes);
        return ACL_ERROR_MEMORY_ALLOCATION;
    }
    *(Allocation *)block = (Allocation){bytes, device};
    *address = (char *)block + ALIGNMENT;
    return ACL_SUCCESS;
}

aclError aclrtMallocAlign32(void **address, size_t bytes, int32_t policy) {
    return aclrtMalloc(address, bytes, policy);
}

aclError aclrtMallocCached(void **address, size_t bytes, int32_t policy) {
    return aclrtMalloc(address, bytes, policy);
}

aclError aclrtFree(void *address) {
    if (!address) return ACL_SUCCESS;
    Allocation *block = (Allocation *)((char *)address - ALIGNMENT);
    give_back(block->device, block->bytes);
    free(block);
    return ACL_SUCCESS;
}

aclError aclrtGetMemInfo(int32_t kind, size_t *free_bytes, size_t *total) {
    pthread_mutex_lock(&guard);
    *total = total_bytes();
    *free_bytes = *total - used_bytes[standin_current_device()];
    pthread_mutex_unlock(&guard);
    return ACL_SUCCESS;
}

// ---- Virtual memory: what PYTORCH_NPU_ALLOC_CONF=expandable_segments:True allocates with.
//
// An address range is reserved without access; physical memory is only an account until it is mapped into a range.

typedef struct Mapping {
    void *address;
    size_t bytes;
    struct Mapping *next;
} Mapping;

static Mapping *reserved_ranges = NULL;
static Mapping *mapped_ranges = NULL;

static aclError remember(Mapping **list, void *address, size_t bytes) {
    Mapping *entry = malloc(sizeof *entry);
    if (!entry) return ACL_ERROR_MEMORY_ALLOCATION;
    pthread_mutex_lock(&guard);
    *entry = (Mapping){address, bytes, *list};
    *list = entry;
    pthread_mutex_unlock(&guard);
    return ACL_SUCCESS;
}

// Size of the range at the address, which is forgotten; 0 where there is none.
static size_t forget(Mapping **list, void *address) {
    size_t bytes = 0;
    pthread_mutex_lock(&guard);
    for (Mapping **at = list; *at; at = &(*at)->next) {
        if ((*at)->address != address) continue;
        Mapping *entry = *at;
        bytes = entry->bytes;
        *at = entry->next;
        free(entry);
        break;
    }
    pthread_mutex_unlock(&guard);
    return bytes;
}

aclError aclrtReserveMemAddress(void **address, size_t bytes, size_t alignment, void *wanted, uint64_t flags) {
    *address = mmap(wanted, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*address == MAP_FAILED) return ACL_ERROR_MEMORY_ALLOCATION;
    return remember(&reserved_ranges, *address, bytes);
}

aclError aclrtReleaseMemAddress(void *address) {
    size_t bytes = forget(&reserved_ranges, address);
    return bytes && !munmap(address, bytes) ? ACL_SUCCESS : ACL_ERROR_INVALID_PARAM;
}

aclError aclrtMallocPhysical(void **handle, size_t bytes, const void *properties, uint64_t flags) {
    int32_t device = standin_current_device();
    *handle = NULL;
    if (!take(device, bytes)) return ACL_ERROR_MEMORY_ALLOCATION;
    Allocation *block = malloc(sizeof *block);
    if (!block) {
        give_back(device, bytes);
        return ACL_ERROR_MEMORY_ALLOCATION;
    }
    *block = (Allocation){bytes, device};
    *handle = block;
    return ACL_SUCCESS;
}

aclError aclrtFreePhysical(void *handle) {
    Allocation *block = handle;
    give_back(block->device, block->bytes);
    free(block);
    return ACL_SUCCESS;
}

aclError aclrtMapMem(void *address, size_t bytes, size_t offset, void *handle, uint64_t flags) {
    if (mprotect(address, bytes, PROT_READ | PROT_WRITE)) return ACL_ERROR_MEMORY_ALLOCATION;
    return remember(&mapped_ranges, address, bytes);
}

aclError aclrtUnmapMem(void *address) {
    size_t bytes = forget(&mapped_ranges, address);
    if (!bytes) return ACL_ERROR_INVALID_PARAM;
    // A fresh mapping over the old one gives its pages back to the host; a later read is an error, as on a card.
    void *fresh = mmap(address, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return fresh == address ? ACL_SUCCESS : ACL_ERROR_MEMORY_ALLOCATION;
}

// ---- Host memory and copies.

aclError aclrtMallocHost(void **address, size_t bytes) {
    return posix_memalign(address, 4096, bytes ? bytes : 1) ? ACL_ERROR_MEMORY_ALLOCATION : ACL_SUCCESS;
}

aclError aclrtMallocHostWithCfg(void **address, uint64_t bytes, void *config) {
    return aclrtMallocHost(address, bytes);
}

aclError aclrtFreeHost(void *address) {
    free(address);
    return ACL_SUCCESS;
}

aclError aclrtHostRegister(void *host, uint64_t bytes, int32_t kind, void **device) {
    if (device) *device = host;
    return ACL_SUCCESS;
}

aclError aclrtHostUnregister(void *host) {
    return ACL_SUCCESS;
}

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int32_t kind) {
    if (bytes > room) return ACL_ERROR_INVALID_PARAM;
    memmove(to, from, bytes);
    return ACL_SUCCESS;
}

aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int32_t kind, void *stream) {
    return aclrtMemcpy(to, room, from, bytes, kind);
}

aclError aclrtMemset(void *to, size_t room, int32_t value, size_t bytes) {
    if (bytes > room) return ACL_ERROR_INVALID_PARAM;
    memset(to, value, bytes);
    return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t bytes, void *stream) {
    return aclrtMemset(to, room, value, bytes);
}
