/* What the parent finds out about the host after its children died. */
#define _GNU_SOURCE
#include "fuzz.h"

#include "../src/host.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

static const char *occasion = "";

static void print_finding(const char *text) { printf("FOUND %s: %s\n", occasion, text); }

int check_host(int is_quiet, const char *when) {
    occasion = when;
    host_lock();
    int findings = host_check(print_finding, is_quiet);
    host_unlock();
    fflush(stdout);
    return findings;
}

uint64_t used_bytes_of_host(void) {
    uint64_t used_bytes = 0;
    host_lock();
    for (uint32_t d = 0; d < host->device_count; d++)
        used_bytes += host->devices[d].used_bytes;
    host_unlock();
    return used_bytes;
}

pid_t start_child(void) {
    pid_t parent = getpid();
    fflush(stdout);
    pid_t child = fork();
    if (child)
        return child;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(4);
    return 0;
}
