/* softgpu-control: makes a host and works its switches. The Python side checks and translates what users
 * type; arguments here are numbers. The host is SOFTGPU_DIR. */
#include "control.h"
#include "cuda_results.h"
#include "host.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const char *name;
    int arguments;
    const char *form;
    int (*run)(char **arguments);
} command;

static device *device_of(const char *argument) {
    unsigned long index = strtoul(argument, NULL, 10);
    if (index < host->device_count)
        return &host->devices[index];
    fprintf(stderr, "softgpu: no device %s (there are %u)\n", argument, host->device_count);
    return NULL;
}

static uint64_t integer(const char *argument) { return strtoull(argument, NULL, 10); }

static int run_status(char **arguments) {
    (void)arguments;
    control_status();
    return 0;
}

/* A number (NVML's codes are small numbers), or the name of a CUDA result; -1 when it is neither. */
#define RESULT_OF_NAME(number, name, text) \
    if (!strcmp(argument, #name))          \
        return number;
static int code_of(const char *argument) {
    CUDA_RESULTS(RESULT_OF_NAME)
    char *end;
    long code = strtol(argument, &end, 10);
    if (*argument && !*end && code >= 0)
        return (int)code;
    fprintf(stderr, "softgpu: %s is neither a number nor a CUDA result that softgpu knows\n", argument);
    return -1;
}

static int kind_of(const char *argument) {
    for (int kind = 0; kind < FAULT_KIND_COUNT; kind++)
        if (!strcmp(argument, fault_names[kind]))
            return kind;
    fprintf(stderr, "softgpu: %s is no kind of fault\n", argument);
    return -1;
}

static int run_fault(char **arguments) {
    int kind = kind_of(arguments[3]);
    int code = kind == FAULT_CODE ? code_of(arguments[4]) : 0;
    if (kind < 0 || code < 0)
        return 1;
    for (int i = 0; i < FAULT_MAX; i++) {
        fault_record *fault = &host->faults[i];
        if (fault->function[0] && (fault->times || fault->kind == FAULT_HANG))
            continue; /* used up: its row is free again, but not while calls hang on it */
        host->fault_count += !fault->function[0];
        *fault = (fault_record){.after = atoi(arguments[1]),
                                .times = atoi(arguments[2]),
                                .kind = (uint32_t)kind,
                                .value = kind == FAULT_CODE ? (uint64_t)code : integer(arguments[4]),
                                .serial = ++host->last_fault_serial};
        for (uint32_t d = 0; d < host->device_count; d++)
            fault->used_bytes[d] = host->devices[d].used_bytes;
        snprintf(fault->function, sizeof fault->function, "%s", arguments[0]);
        return 0;
    }
    fprintf(stderr, "softgpu: no more than %d faults at a time\n", FAULT_MAX);
    return 1;
}

static int run_clear_faults(char **arguments) {
    (void)arguments;
    memset(host->faults, 0, sizeof host->faults);
    host->fault_count = 0;
    return 0;
}

static int run_xid(char **arguments) {
    device *gpu = device_of(arguments[0]);
    if (!gpu)
        return 1;
    xid_raise((int)(gpu - host->devices), integer(arguments[1]));
    return 0;
}

/* As xid, but it strikes: a process (0: none is meant), or everybody there. */
static int run_strike(char **arguments) {
    device *gpu = device_of(arguments[0]);
    uint64_t number = integer(arguments[1]);
    int pid = atoi(arguments[2]), process = process_of_pid(pid);
    if (!gpu)
        return 1;
    if (pid && process < 0) {
        fprintf(stderr, "softgpu: process %d does not use this host\n", pid);
        return 1;
    }
    if (xid_strike((int)(gpu - host->devices), number, process)) {
        fprintf(stderr, "softgpu: XID %s has no effect that softgpu knows%s\n", arguments[1],
                pid ? "" : ", or needs a process: name its pid");
        return 1;
    }
    xid_raise((int)(gpu - host->devices), number);
    return 0;
}

static int run_fail(char **arguments) {
    int process = process_of_pid(atoi(arguments[0]));
    if (process < 0 || !host->processes[process].is_client) {
        fprintf(stderr, "softgpu: process %s does not use this host\n", arguments[0]);
        return 1;
    }
    checkpoint_fail(&host->processes[process]);
    return 0;
}

static int run_end(char **arguments) {
    int process = process_of_pid(atoi(arguments[0]));
    if (process < 0 || !host->processes[process].is_client ||
        checkpoint_state(&host->processes[process]) != STATE_RUNNING) {
        fprintf(stderr, "softgpu: process %s does not use this host, or is frozen\n", arguments[0]);
        return 1;
    }
    checkpoint_end_client(&host->processes[process]);
    return 0;
}

static int run_mps(char **arguments) {
    host->is_mps = integer(arguments[0]) != 0;
    return 0;
}

static int run_lose(char **arguments) {
    device *gpu = device_of(arguments[0]);
    if (!gpu)
        return 1;
    xid_lose((int)(gpu - host->devices), integer(arguments[1]) != 0);
    return 0;
}

static int run_bandwidth(char **arguments) {
    device *gpu = device_of(arguments[0]);
    if (!gpu)
        return 1;
    gpu->engines[HOST_TO_DEVICE].bytes_per_s = integer(arguments[1]);
    gpu->engines[DEVICE_TO_HOST].bytes_per_s = integer(arguments[2]);
    gpu->pageable_bytes_per_s = integer(arguments[3]);
    return 0;
}

static int run_utilization(char **arguments) {
    device *gpu = device_of(arguments[0]);
    if (!gpu)
        return 1;
    gpu->utilization_gpu_percent = (uint32_t)integer(arguments[1]);
    gpu->utilization_memory_percent = (uint32_t)integer(arguments[2]);
    return 0;
}

static int run_health(char **arguments) {
    device *gpu = device_of(arguments[0]);
    if (!gpu)
        return 1;
    gpu->temperature_c = (uint32_t)integer(arguments[1]);
    gpu->is_hot = integer(arguments[2]) != 0;
    gpu->ecc_error_count = integer(arguments[3]);
    return 0;
}

static int run_limit(char **arguments) {
    const char *name = arguments[0];
    device *gpu = device_of(arguments[1]);
    uint64_t key = name[0] == '/' ? group_key_of_path(name) : group_key_of_name(name);
    if (!gpu)
        return 1;
    if (!key ||
        group_set(key, name, (int)(gpu - host->devices), integer(arguments[2]), integer(arguments[3]))) {
        fprintf(stderr, "softgpu: cannot set a limit on %s\n", name);
        return 1;
    }
    return 0;
}

static void print_finding(const char *text) { printf("%s\n", text); }

static int run_check(char **arguments) {
    return host_check(print_finding, integer(arguments[0]) != 0) ? 3 : 0;
}

static const command commands[] = {
    {"check", 1, "0|1", run_check},
    {"fault", 5, "FUNCTION AFTER TIMES KIND VALUE", run_fault},
    {"clear-faults", 0, "", run_clear_faults},
    {"xid", 2, "DEVICE NUMBER", run_xid},
    {"strike", 3, "DEVICE NUMBER PID", run_strike},
    {"fail", 1, "PID", run_fail},
    {"end", 1, "PID", run_end},
    {"mps", 1, "0|1", run_mps},
    {"lose", 2, "DEVICE 0|1", run_lose},
    {"bandwidth", 4, "DEVICE H2D D2H PAGEABLE", run_bandwidth},
    {"utilization", 3, "DEVICE GPU_PERCENT MEMORY_PERCENT", run_utilization},
    {"health", 4, "DEVICE TEMPERATURE_C IS_HOT ECC_ERRORS", run_health},
    {"limit", 4, "GROUP DEVICE SOFT HARD", run_limit},
};

static int run_locked(const command *chosen, char **arguments) {
    host_lock();
    int code = chosen->run(arguments);
    host_unlock();
    return code;
}

static int usage(void) {
    fprintf(stderr, "usage: softgpu-control create|status");
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        fprintf(stderr, " | %s %s", commands[i].name, commands[i].form);
    fprintf(stderr, "\n");
    return 2;
}

int main(int count, char **arguments) {
    if (count < 2)
        return usage();
    if (!strcmp(arguments[1], "create"))
        return control_create() ? 1 : 0;
    if (!strcmp(arguments[1], "status"))
        return host_attach() ? 1 : run_status(arguments + 2);
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        if (!strcmp(arguments[1], commands[i].name) && count - 2 == commands[i].arguments)
            return host_attach() ? 1 : run_locked(&commands[i], arguments + 2);
    return usage();
}
