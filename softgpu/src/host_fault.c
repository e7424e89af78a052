/* Injected failures: "function F, after N calls, fails M times with code C". */
#include "host.h"

#include <ctype.h>
#include <string.h>

/* A fault on cuMemAlloc also means cuMemAlloc_v2: clients know the plain name. */
static int names(const char *fault, const char *function) {
    size_t length = strlen(fault);
    if (strncmp(function, fault, length))
        return 0;
    const char *rest = function + length;
    return !*rest || (rest[0] == '_' && rest[1] == 'v' && isdigit((unsigned char)rest[2]));
}

int fault_code(const char *function) {
    if (!__atomic_load_n(&host->fault_count, __ATOMIC_RELAXED))
        return 0;
    int code = 0;
    host_lock();
    for (int i = 0; i < FAULT_MAX && !code; i++) {
        fault_record *fault = &host->faults[i];
        if (!fault->function[0] || !fault->times || !names(fault->function, function))
            continue;
        if (fault->after > 0) {
            fault->after--;
            continue;
        }
        if (fault->times > 0)
            fault->times--;
        code = fault->code;
    }
    host_unlock();
    return code;
}
