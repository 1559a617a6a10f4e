// The pretended CANN: the part of Ascend's C interface that torch_npu needs to start, over host memory.
//
// Written from the calls that torch_npu makes, not from CANN's headers, so that nothing of CANN is needed to build
// it. A function that is not defined here, and that torch_npu links against, gets a stub that returns success (see
// compile.py). Work is done at the time of the call: streams are always idle and events have always happened.
#pragma once

#include <stddef.h>
#include <stdint.h>

typedef int aclError;

// The codes that torch_npu tells apart.
enum {
    ACL_SUCCESS = 0,
    ACL_ERROR_INVALID_PARAM = 100000,
    ACL_ERROR_INVALID_DEVICE = 107001,
    ACL_ERROR_MEMORY_ALLOCATION = 207001,
};

enum { MAX_DEVICES = 64 };

// Device that the calling thread has chosen, from 0.
int32_t standin_current_device(void);

// Chip, as CANN names it.
const char *aclrtGetSocName(void);

// Number in the environment variable, or `fallback` where it is not set.
long standin_setting(const char *variable, long fallback);
