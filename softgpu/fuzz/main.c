/* softgpu-fuzz: random operations with kills, kills at every step of chosen operations, and damage on purpose.
 * The host is SOFTGPU_DIR; python -m softgpu fuzz makes one and reads what this prints. */
#include "fuzz.h"

#include "../src/host.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int usage(void) {
    fprintf(stderr, "usage: softgpu-fuzz run SEED OPERATIONS WORKERS KILL_EVERY BREAK_EVERY CHECK_EVERY FAILING | steps OPERATION|quick|all EVERY_INSTRUCTION STRIDE | "
                    "plant KIND | kinds | races | lose-wakeup | try-patience\n");
    return 2;
}

static int list_kinds(void) {
    for (int i = 0; plant_kind(i); i++)
        printf("%s\n", plant_kind(i));
    return 0;
}

int main(int count, char **arguments) {
    if (count == 2 && !strcmp(arguments[1], "kinds"))
        return list_kinds();
    int is_lost_wakeup = count == 2 && !strcmp(arguments[1], "lose-wakeup");
    int is_races = count == 2 && !strcmp(arguments[1], "races");
    int is_patience = count == 2 && !strcmp(arguments[1], "try-patience");
    if (count < 3 && !is_lost_wakeup && !is_patience && !is_races)
        return usage();
    if (host_attach())
        return 2;
    if (is_lost_wakeup)
        return lose_wakeup();
    if (is_patience)
        return try_patience();
    if (is_races)
        return races_run();
    if (!strcmp(arguments[1], "plant"))
        return plant(arguments[2]);
    if (!strcmp(arguments[1], "steps") && count == 5)
        return steps_run(arguments[2], atoi(arguments[3]), atoi(arguments[4]));
    if (strcmp(arguments[1], "run") || count != 9)
        return usage();
    fuzz_options options = {.seed = strtoull(arguments[2], NULL, 10),
                            .operations = strtoull(arguments[3], NULL, 10),
                            .workers = atoi(arguments[4]),
                            .kill_every = strtoull(arguments[5], NULL, 10),
                            .break_every = strtoull(arguments[6], NULL, 10),
                            .check_every = strtoull(arguments[7], NULL, 10),
                            .failing = arguments[8]};
    if (options.workers < 1 || options.workers > WORKER_MAX || !options.kill_every || !options.break_every ||
        !options.check_every)
        return usage();
    return fuzz_run(&options);
}
