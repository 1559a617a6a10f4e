// Streams and events: everything has been done when its call returns, so only identities and times are kept.
#include "cann.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

typedef struct {
    int32_t id;
} Stream;

typedef struct {
    double milliseconds;
} Event;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e3 + (double)time.tv_nsec / 1e6;
}

aclError aclrtCreateStream(void **stream) {
    static atomic_int last_id = 0;
    Stream *made = malloc(sizeof *made);
    if (!made) return ACL_ERROR_MEMORY_ALLOCATION;
    made->id = ++last_id;
    *stream = made;
    return ACL_SUCCESS;
}

aclError aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) {
    return aclrtCreateStream(stream);
}

// Not freed: torch_npu keeps its streams until the process ends, and its static destructors may still ask for an id.
aclError aclrtDestroyStream(void *stream) {
    return ACL_SUCCESS;
}

aclError aclrtDestroyStreamForce(void *stream) {
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeStream(void *stream) {
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeStreamWithTimeout(void *stream, int32_t milliseconds) {
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeDevice(void) {
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeDeviceWithTimeout(int32_t milliseconds) {
    return ACL_SUCCESS;
}

aclError aclrtStreamQuery(void *stream, int32_t *status) {
    *status = 0;  // complete
    return ACL_SUCCESS;
}

// The default stream is a null pointer.
aclError aclrtStreamGetId(void *stream, int32_t *id) {
    *id = stream ? ((Stream *)stream)->id : 0;
    return ACL_SUCCESS;
}

aclError aclrtCreateEvent(void **event) {
    *event = calloc(1, sizeof(Event));
    return *event ? ACL_SUCCESS : ACL_ERROR_MEMORY_ALLOCATION;
}

aclError aclrtCreateEventWithFlag(void **event, uint32_t flags) {
    return aclrtCreateEvent(event);
}

aclError aclrtCreateEventExWithFlag(void **event, uint32_t flags) {
    return aclrtCreateEvent(event);
}

aclError aclrtDestroyEvent(void *event) {
    free(event);
    return ACL_SUCCESS;
}

aclError aclrtRecordEvent(void *event, void *stream) {
    ((Event *)event)->milliseconds = now();
    return ACL_SUCCESS;
}

aclError aclrtResetEvent(void *event, void *stream) {
    return ACL_SUCCESS;
}

aclError aclrtStreamWaitEvent(void *stream, void *event) {
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeEvent(void *event) {
    return ACL_SUCCESS;
}

aclError aclrtQueryEventStatus(void *event, int32_t *status) {
    *status = 1;  // ACL_EVENT_RECORDED_STATUS_COMPLETE
    return ACL_SUCCESS;
}

aclError aclrtQueryEventWaitStatus(void *event, int32_t *status) {
    *status = 0;  // ACL_EVENT_WAIT_STATUS_COMPLETE
    return ACL_SUCCESS;
}

aclError aclrtEventElapsedTime(float *milliseconds, void *start, void *end) {
    *milliseconds = (float)(((Event *)end)->milliseconds - ((Event *)start)->milliseconds);
    return ACL_SUCCESS;
}
