"""The inner loops of the index: one source, run as it is or compiled (`compiled.py`). Whole numbers only.

So the compiled and the plain form cannot differ: there is nothing to round. Loops are written out, for a compiler; the
same rules in readable form are in `policies.py` and `potential.py`, and tests hold both to the same answers.
"""

from typing import Final

from services.placement.packing.columns import (
    ASK_CPU,
    ASK_GPUS,
    ASK_LABELS,
    ASK_MEMORY,
    ASK_NEEDS,
    ASK_SPREAD,
    BEST_FIT,
    CAPACITY_AT,
    CHANGED,
    CPU,
    CPU_STEP_COUNT,
    CPU_STEPS_AT,
    DOT_PRODUCT,
    FEWEST_GPUS_FIRST,
    FIT_WEIGHTS_AT,
    FORMULA,
    FREE,
    GPU_BY_STEP,
    GPU_COUNT,
    GPU_ORDER,
    GPU_WIDTH,
    GPUS,
    HOLES_AT,
    HOST_ORDER,
    KIND,
    KIND_COUNT,
    LABELS,
    MEMORY,
    MOST_GPUS_FIRST,
    NEED_COUNT,
    NEEDS_AT,
    OPEN,
    ORDER_SPAN,
    PART,
    POTENTIAL,
    SET_COUNT,
    SET_FIT_WEIGHTS_AT,
    SET_NEEDS_AT,
    SET_WEIGHTS_AT,
    SET_WIDTH,
    SHORTAGE_COUNT,
    SHORTAGES_AT,
    SINGLE_WEIGHT,
    SPREAD,
    STEP_COUNT,
    STEPS_AT,
    VALUE,
    Ints,
)
from services.placement.packing.fleet import PARTS
from services.placement.packing.hole_values import STEPS as HOLE_STEPS
from services.placement.packing.rating import CPU_MAX_MILLI, GPUS_MAX

NONE: Final = -(1 << 62)
"""The score of a node without room."""


def count_up_to(values: Ints, begin: int, count: int, value: int) -> int:
    """How many of so many ascending entries are at most this value."""
    low, high = begin, begin + count
    while low < high:
        middle = (low + high) >> 1
        if values[middle] <= value:
            low = middle + 1
        else:
            high = middle
    return low - begin


def parts_of(units: int, capacity_units: int) -> int:
    return units * PARTS // capacity_units if units > 0 else 0


def value_of(nodes: Ints, rules: Ints, ask: Ints, n: int, cpu_milli: int, taken: int) -> int:
    """`Potential.value` of a node with so much CPU left, after the ask took its part of each GPU in the set `taken`."""
    bucket = count_up_to(rules, rules[CPU_STEPS_AT], rules[CPU_STEP_COUNT], cpu_milli)
    value, total = 0, 0
    need_count = rules[NEED_COUNT]
    for g in range(nodes[n, GPU_COUNT]):
        at = GPUS + GPU_WIDTH * g
        kind, free, parts = nodes[n, at + KIND], nodes[n, at + FREE], nodes[n, at + PART]
        if (taken >> g) & 1:
            free -= ask[ASK_NEEDS + 2 * kind]
            parts = parts_of(free, rules[rules[CAPACITY_AT] + kind])
        if not parts:
            value += rules[rules[HOLES_AT] + kind * (HOLE_STEPS + 1)]
            continue
        total += parts
        fitting = count_up_to(rules, rules[NEEDS_AT] + kind * need_count, need_count, free)
        row = kind * (rules[CPU_STEP_COUNT] + 1) + bucket
        fit_weight = rules[rules[FIT_WEIGHTS_AT] + row * (need_count + 1) + fitting]
        value += rules[rules[HOLES_AT] + kind * (HOLE_STEPS + 1) + parts // (PARTS // HOLE_STEPS)]
        value -= parts * (rules[SINGLE_WEIGHT] - fit_weight)
    for s in range(rules[SET_COUNT]):
        value -= set_loss(nodes, rules, ask, n, taken, s, bucket, total)
    for r in range(rules[SHORTAGE_COUNT]):
        at = rules[SHORTAGES_AT] + 2 * r
        short = total - max(cpu_milli, 0) * rules[at] // 1000
        if short > 0:
            value -= short * rules[at + 1]
    return value


def set_loss(nodes: Ints, rules: Ints, ask: Ints, n: int, taken: int, s: int, bucket: int, total: int) -> int:
    """Weighted parts that are of no use to a group of typical classes of several GPUs."""
    fit_count, unfit = 0, 0
    for g in range(nodes[n, GPU_COUNT]):
        at = GPUS + GPU_WIDTH * g
        kind, free, parts = nodes[n, at + KIND], nodes[n, at + FREE], nodes[n, at + PART]
        if (taken >> g) & 1:
            free -= ask[ASK_NEEDS + 2 * kind]
            parts = parts_of(free, rules[rules[CAPACITY_AT] + kind])
        if 0 <= rules[rules[SET_NEEDS_AT] + s * rules[KIND_COUNT] + kind] <= free:
            fit_count += 1
        else:
            unfit += parts
    row = s * (rules[CPU_STEP_COUNT] + 1) + bucket
    weight = rules[rules[SET_FIT_WEIGHTS_AT] + row * SET_WIDTH + fit_count]
    loss: int = total * (rules[rules[SET_WEIGHTS_AT] + s] - weight) + unfit * weight
    return loss


def tightest(nodes: Ints, ask: Ints, n: int, is_spread: int) -> int:
    """The set of GPUs that are left with the least (spread: the most); 0 where too few fit."""
    taken = 0
    for _ in range(ask[ASK_GPUS]):
        best, best_left = -1, 0
        for g in range(nodes[n, GPU_COUNT]):
            at = GPUS + GPU_WIDTH * g
            need = ASK_NEEDS + 2 * nodes[n, at + KIND]
            if (taken >> g) & 1 or ask[need] < 0 or ask[need] > nodes[n, at + FREE]:
                continue
            left = nodes[n, at + PART] - ask[need + 1]
            if is_spread:
                left = -left
            if best < 0 or left < best_left:
                best, best_left = g, left
        if best < 0:
            return 0
        taken |= 1 << best
    return taken


def parts_left(nodes: Ints, n: int) -> int:
    left = 0
    for g in range(nodes[n, GPU_COUNT]):
        left += nodes[n, GPUS + GPU_WIDTH * g + PART]
    return left


def parts_asked(nodes: Ints, ask: Ints, n: int, taken: int) -> int:
    asked = 0
    for g in range(nodes[n, GPU_COUNT]):
        if (taken >> g) & 1:
            asked += ask[ASK_NEEDS + 2 * nodes[n, GPUS + GPU_WIDTH * g + KIND] + 1]
    return asked


def closeness(nodes: Ints, ask: Ints, n: int, taken: int) -> int:
    """`rating.closeness`."""
    gpu_left = parts_left(nodes, n) - parts_asked(nodes, ask, n, taken)
    cpu_left = nodes[n, CPU] - ask[ASK_CPU]
    whole = 2 * CPU_MAX_MILLI * 2 * GPUS_MAX * PARTS
    score: int = 100 * (whole - cpu_left * 2 * GPUS_MAX * PARTS - gpu_left * 2 * CPU_MAX_MILLI) // whole
    return score


def apartness(nodes: Ints, ask: Ints, n: int, taken: int) -> int:
    """`policies.DotProduct`."""
    gpu_milli = parts_left(nodes, n) // (PARTS // 1000)
    asked_milli = parts_asked(nodes, ask, n, taken) // (PARTS // 1000)
    scale = (CPU_MAX_MILLI // (GPUS_MAX * 1000)) ** 2
    whole = 2 * CPU_MAX_MILLI**2
    score: int = 100 * (whole - nodes[n, CPU] * ask[ASK_CPU] - scale * gpu_milli * asked_milli) // whole
    return score


def stepped(rules: Ints, gain: int) -> int:
    return count_up_to(rules, rules[STEPS_AT], rules[STEP_COUNT], gain) if rules[STEP_COUNT] else gain


def is_twin(nodes: Ints, n: int, gpu: int) -> bool:
    """Whether a GPU before this one is like it and has as much free."""
    at = GPUS + GPU_WIDTH * gpu
    for other in range(gpu):
        before = GPUS + GPU_WIDTH * other
        if nodes[n, before + KIND] == nodes[n, at + KIND] and nodes[n, before + FREE] == nodes[n, at + FREE]:
            return True
    return False


def best_single(nodes: Ints, rules: Ints, ask: Ints, n: int) -> tuple[int, int]:
    """(value or steps gained, set of that GPU) for the best of all GPUs with room for it."""
    best, best_gpu, best_left = NONE, -1, 0
    for g in range(nodes[n, GPU_COUNT]):
        at = GPUS + GPU_WIDTH * g
        need = ASK_NEEDS + 2 * nodes[n, at + KIND]
        if ask[need] < 0 or ask[need] > nodes[n, at + FREE] or is_twin(nodes, n, g):
            continue
        gain = value_of(nodes, rules, ask, n, nodes[n, CPU] - ask[ASK_CPU], 1 << g) - nodes[n, VALUE]
        left = nodes[n, at + PART] - ask[need + 1]
        if rules[GPU_BY_STEP]:
            gain = stepped(rules, gain)
            left = 0
        if best_gpu < 0 or gain > best or (gain == best and left < best_left):
            best, best_gpu, best_left = gain, g, left
    return (best if rules[GPU_BY_STEP] else stepped(rules, best)), 1 << best_gpu


def rated(nodes: Ints, rules: Ints, ask: Ints, n: int, taken: int) -> int:
    """What the policy thinks of this place."""
    if rules[FORMULA] == BEST_FIT:
        return closeness(nodes, ask, n, taken)
    if rules[FORMULA] == SPREAD:
        return -closeness(nodes, ask, n, taken)
    if rules[FORMULA] == DOT_PRODUCT:
        return apartness(nodes, ask, n, taken)
    if rules[FORMULA] == POTENTIAL:
        gain = value_of(nodes, rules, ask, n, nodes[n, CPU] - ask[ASK_CPU], taken) - nodes[n, VALUE]
        return stepped(rules, gain)
    return 0


def has_room(nodes: Ints, ask: Ints, n: int) -> bool:
    if not nodes[n, OPEN] or nodes[n, CPU] < ask[ASK_CPU] or nodes[n, MEMORY] < ask[ASK_MEMORY]:
        return False
    missing = ask[ASK_GPUS]
    for g in range(nodes[n, GPU_COUNT]):
        if missing <= 0:
            break
        at = GPUS + GPU_WIDTH * g
        if 0 <= ask[ASK_NEEDS + 2 * nodes[n, at + KIND]] <= nodes[n, at + FREE]:
            missing -= 1
    return bool(missing <= 0 and ask[ask[ASK_LABELS] + nodes[n, LABELS]])


def evaluate(nodes: Ints, rules: Ints, ask: Ints, n: int) -> tuple[int, int]:
    """(score, set of GPUs) of one node for one ask; (`NONE`, none) where it has no room. A set is a number's bits."""
    if not has_room(nodes, ask, n):
        return NONE, 0
    score, taken = 0, 0
    if rules[FORMULA] == POTENTIAL and ask[ASK_GPUS] == 1 and not ask[ASK_SPREAD]:
        score, taken = best_single(nodes, rules, ask, n)
    else:
        if ask[ASK_GPUS]:
            taken = tightest(nodes, ask, n, ask[ASK_SPREAD] or rules[FORMULA] == SPREAD)
        score = rated(nodes, rules, ask, n, taken)
    order = rules[GPU_ORDER] if ask[ASK_GPUS] else rules[HOST_ORDER]
    if order == FEWEST_GPUS_FIRST:
        score = score * ORDER_SPAN + ORDER_SPAN - 1 - nodes[n, GPU_COUNT]
    elif order == MOST_GPUS_FIRST:
        score = score * ORDER_SPAN + nodes[n, GPU_COUNT]
    return score, taken


def settle(nodes: Ints, rules: Ints, ask: Ints, log: Ints, changed: Ints, now: int) -> int:
    """After free units of these nodes changed: what follows from them, and the log of changes, which is counted on."""
    for i in range(len(changed)):
        n = changed[i]
        for g in range(nodes[n, GPU_COUNT]):
            at = GPUS + GPU_WIDTH * g
            nodes[n, at + PART] = parts_of(nodes[n, at + FREE], rules[rules[CAPACITY_AT] + nodes[n, at + KIND]])
        if rules[FORMULA] == POTENTIAL:
            nodes[n, VALUE] = value_of(nodes, rules, ask, n, nodes[n, CPU], 0)
        now += 1
        nodes[n, CHANGED] = now
        log[now & (len(log) - 1)] = n
    return now


def settle_all(nodes: Ints, rules: Ints, ask: Ints, log: Ints, twins: Ints, now: int) -> int:
    """The same for all nodes. `twins` names, for each, the first one that is equal: what follows for that is copied."""
    for n in range(len(twins)):
        twin = twins[n]
        if twin == n:
            for g in range(nodes[n, GPU_COUNT]):
                at = GPUS + GPU_WIDTH * g
                nodes[n, at + PART] = parts_of(nodes[n, at + FREE], rules[rules[CAPACITY_AT] + nodes[n, at + KIND]])
            if rules[FORMULA] == POTENTIAL:
                nodes[n, VALUE] = value_of(nodes, rules, ask, n, nodes[n, CPU], 0)
        else:
            for g in range(nodes[n, GPU_COUNT]):
                at = GPUS + GPU_WIDTH * g
                nodes[n, at + PART] = nodes[twin, at + PART]
            nodes[n, VALUE] = nodes[twin, VALUE]
        now += 1
        nodes[n, CHANGED] = now
        log[now & (len(log) - 1)] = n
    return now


def winner(scores: Ints, winners: Ints, i: int) -> int:
    """Of the two nodes that meet at entry i of the tournament: the better, of equals the first."""
    leaves = len(scores)
    left, right = 2 * i, 2 * i + 1
    a = winners[left] if left < leaves else left - leaves
    b = winners[right] if right < leaves else right - leaves
    return a if scores[a] > scores[b] or (scores[a] == scores[b] and a < b) else b


def build(scores: Ints, winners: Ints) -> None:
    """The tournament: entry i holds the winner of entries 2i and 2i + 1; the nodes, by name, are its leaves."""
    for i in range(len(scores) - 1, 0, -1):
        winners[i] = winner(scores, winners, i)


def rescore(scores: Ints, winners: Ints, n: int, score: int) -> None:
    """One score changes: its matches on the way to the top, as far as they end otherwise. O(log nodes)."""
    if scores[n] == score:
        return
    scores[n] = score
    i = (n + len(scores)) >> 1
    while i:
        best = winner(scores, winners, i)
        if best == winners[i] and best != n:
            return
        winners[i] = best
        i >>= 1


def catch_up(
    nodes: Ints,
    rules: Ints,
    ask: Ints,
    scores: Ints,
    winners: Ints,
    log: Ints,
    twins: Ints,
    count: int,
    seen: int,
    now: int,
) -> None:
    """Rate again what changed in (seen, now], each node once; below 0: all nodes, equal ones once."""
    if seen < 0:
        for n in range(count):
            if twins[n] == n:
                scores[n], _ = evaluate(nodes, rules, ask, n)
            else:
                scores[n] = scores[twins[n]]
        build(scores, winners)
    elif now - seen > count:
        for n in range(count):
            if nodes[n, CHANGED] > seen:
                score, _ = evaluate(nodes, rules, ask, n)
                rescore(scores, winners, n, score)
    else:
        for at in range(seen + 1, now + 1):
            n = log[at & (len(log) - 1)]
            if nodes[n, CHANGED] == at:
                score, _ = evaluate(nodes, rules, ask, n)
                rescore(scores, winners, n, score)


def choose(
    nodes: Ints,
    rules: Ints,
    ask: Ints,
    scores: Ints,
    winners: Ints,
    log: Ints,
    changed: Ints,
    twins: Ints,
    without: Ints,
    count: int,
    seen: int,
    now: int,
) -> tuple[int, int, int]:
    """(node, set of its GPUs, changes so far) with the best score; node -1 where none has room."""
    now = settle(nodes, rules, ask, log, changed, now)
    catch_up(nodes, rules, ask, scores, winners, log, twins, count, seen, now)
    for i in range(len(without)):
        rescore(scores, winners, without[i], NONE)
    best = winners[1]
    is_found = scores[best] != NONE
    for i in range(len(without)):
        score, _ = evaluate(nodes, rules, ask, without[i])
        rescore(scores, winners, without[i], score)
    if not is_found:
        return -1, 0, now
    _, taken = evaluate(nodes, rules, ask, best)
    return best, taken, now


def roomy(nodes: Ints, ask: Ints, without: Ints, count: int, nth: int) -> tuple[int, int]:
    """For a random choice: (how many nodes have room, the nth of them or -1)."""
    found, chosen = 0, -1
    at = 0
    for n in range(count):
        if at < len(without) and without[at] == n:
            at += 1
            continue
        if has_room(nodes, ask, n):
            if found == nth:
                chosen = n
            found += 1
    return found, chosen
