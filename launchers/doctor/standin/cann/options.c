// Options of the runtime and of the operator compiler: kept and given back, without effect.
//
// torch_npu looks these up by name when the program runs (dlsym), so the linker does not ask for them.
#include "cann.h"

#include <string.h>

enum { OPTIONS = 64, ACL_OP_JIT_COMPILE = 10 };

static int64_t system_options[OPTIONS];

aclError aclrtGetSysParamOpt(uint32_t option, int64_t *value) {
    if (option >= OPTIONS) return ACL_ERROR_INVALID_PARAM;
    *value = system_options[option];
    return ACL_SUCCESS;
}

aclError aclrtSetSysParamOpt(uint32_t option, int64_t value) {
    if (option >= OPTIONS) return ACL_ERROR_INVALID_PARAM;
    system_options[option] = value;
    return ACL_SUCCESS;
}

aclError aclrtCtxGetSysParamOpt(uint32_t option, int64_t *value) {
    return aclrtGetSysParamOpt(option, value);
}

aclError aclrtCtxSetSysParamOpt(uint32_t option, int64_t value) {
    return aclrtSetSysParamOpt(option, value);
}

// Overflow is reported as inf and nan (1), not saturated (0).
aclError aclrtGetDeviceSatMode(int32_t *mode) {
    *mode = 1;
    return ACL_SUCCESS;
}

aclError aclrtSetDeviceSatMode(int32_t mode) {
    return ACL_SUCCESS;
}

aclError aclrtSetStreamOverflowSwitch(void *stream, uint32_t on) {
    return ACL_SUCCESS;
}

aclError aclrtGetStreamOverflowSwitch(void *stream, uint32_t *on) {
    *on = 0;
    return ACL_SUCCESS;
}

aclError aclrtSetOpWaitTimeout(uint32_t seconds) {
    return ACL_SUCCESS;
}

aclError aclrtSetOpExecuteTimeOut(uint32_t seconds) {
    return ACL_SUCCESS;
}

aclError aclrtPeekAtLastError(int32_t level) {
    return ACL_SUCCESS;
}

aclError aclrtGetLastError(int32_t level) {
    return ACL_SUCCESS;
}

aclError aclSetCompileopt(int32_t option, const char *value) {
    return ACL_SUCCESS;
}

// torch_npu makes room for as many bytes as this says, and fails on 0.
size_t aclGetCompileoptSize(int32_t option) {
    return 256;
}

// torch_npu asks for one option alone: whether operators are compiled for each new shape. CANN's default is to do so
// on the first training chips (910A, 910PremiumA, ...) and on inference chips, and not to from 910B on. torch_npu has
// no complex numbers with it.
aclError aclGetCompileopt(int32_t option, char *value, size_t room) {
    const char *soc = aclrtGetSocName();
    int later = !strncmp(soc, "Ascend910B", 10) || !strncmp(soc, "Ascend910_93", 12) || !strncmp(soc, "Ascend95", 8);
    const char *text = option != ACL_OP_JIT_COMPILE ? "0" : later ? "disable" : "enable";
    if (room <= strlen(text)) return ACL_ERROR_INVALID_PARAM;
    strcpy(value, text);
    return ACL_SUCCESS;
}

aclError aclGenGraphAndDumpForOp(void) {
    return ACL_SUCCESS;
}

aclError aclopStartDumpArgs(void) {
    return ACL_SUCCESS;
}

aclError aclopStopDumpArgs(void) {
    return ACL_SUCCESS;
}
