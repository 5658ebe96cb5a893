"""The start-up check: finds bad nodes before training starts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from far_scale.distributed import process_group
from far_scale.distributed.exit_codes import REFUSED
from far_scale.distributed.process_group import Processes, StuckError, all_gather_objects, wait_for_all_ranks
from far_scale.health.bandwidth import BETWEEN, INSIDE, Links, measure_links
from far_scale.health.node_check import MAX_MEDIAN_RATIO, RankReport, examine, refusals, slow_devices, upper_median
from far_scale.model import FAR, FARConfig
from far_scale.utils.errors import UserError, print_error
from far_scale.utils.event_log import EventLog
from far_scale.utils.hosts import host_name, rank_list, ranks_by_host, ranks_on_hosts
from far_scale.utils.io import flatten


def check_nodes(
    name: str,
    config: FARConfig,
    shared_values: Mapping[str, Any],
    folders: Mapping[str, str | None],
    processes: Processes,
    dtype: torch.dtype,
    events: EventLog,
    step: int,
) -> list[str]:
    """Examine all ranks' nodes and the links between them, all ranks together; print a line for each node.

    A few seconds: half a second for the node, one or two for the links, and NCCL's first contact, which would
    otherwise come with the first step.

    Args:
        name: of the run, for messages.
        config: of the model, for the size of a checkpoint.
        shared_values: recipe values that must be the same on all ranks.
        folders: to be written to, by recipe key.
        processes: the run's.
        dtype: dtype of the computation.
        events: of this process.
        step: steps done before, for the events.

    Returns:
        Every rank's host, by rank.

    Raises:
        UserError: on all ranks alike: a device calculates wrongly or is full, a disk is full, or the ranks do not all
            have the same code, recipe and versions. Names the ranks, their nodes and the fix.
    """
    hosts = all_gather_objects(host_name(), processes.host_group)
    report = examine(processes.rank, hosts[processes.rank], processes.device, dtype, shared_values, folders)
    try:
        wait_for_all_ranks(processes, "the examination of its node", process_group.STUCK_SECONDS)
    except StuckError as error:
        _exit(error, hosts)
    reports: list[RankReport] = all_gather_objects(report, processes.host_group)
    problems = refusals(reports, checkpoint_bytes(config))
    if len({report.recipe for report in reports}) > 1:
        keys = _different_keys(all_gather_objects(shared_values, processes.host_group))
        problems.append(f"the keys that differ: {', '.join(keys)}")
    if problems:
        raise UserError(f"{name}: start-up check: {'; '.join(problems)}")
    try:
        links = measure_links(processes, hosts)
    except StuckError as error:
        _exit(error, hosts)
    if processes.is_main_process:
        for line in node_table(reports, links):
            print(line, flush=True)
        for text, slow in slow_nodes(reports, links):
            on = sorted({hosts[rank] for rank in slow})
            events.emit("node", step, f"start-up check: {text}", ranks=slow, hosts=on)
        nodes = {host: rank_list(ranks) for host, ranks in ranks_by_host(hosts).items()}
        text = f"start-up check: nodes: {len(nodes)}, ranks: {len(hosts)}, all usable"
        events.emit("nodes", step, text, nodes=nodes)
    return hosts


def slow_nodes(reports: Sequence[RankReport], links: Links) -> list[tuple[str, list[int]]]:
    """Devices and links much slower than the median: a text, and the ranks."""
    hosts = [report.host for report in reports]
    problems = []
    slow = [report.rank for report in slow_devices(reports)]
    if slow:
        median = upper_median([report.flops for report in reports]) / 1e12
        worst = min(reports[rank].flops for rank in slow) / 1e12
        problems.append(
            (f"{ranks_on_hosts(slow, hosts)} calculates at {worst:.3g} TFLOP/s, the median is {median:.3g}", slow)
        )
    for kind, speeds in links.fastest.items():
        median = upper_median(list(speeds.values()))
        slow = [rank for rank, speed in speeds.items() if speed < median / MAX_MEDIAN_RATIO]
        if slow:
            worst = min(speeds[rank] for rank in slow) / 1e9
            names = ranks_on_hosts(slow, hosts)
            text = f"the links of {names} {kind} carry {worst:.3g} GB/s, the median is {median / 1e9:.3g}"
            problems.append((text, slow))
    return problems


def node_table(reports: Sequence[RankReport], links: Links) -> list[str]:
    """A line for each node, with the numbers of its worst rank."""
    rows: list[tuple[str, ...]] = [
        ("node", "ranks", "device", "GB free", "TFLOP/s", f"GB/s {INSIDE}", BETWEEN, "disk GB free")
    ]
    for host, ranks in ranks_by_host([report.host for report in reports]).items():
        on_host = [reports[rank] for rank in ranks]
        by_kind = [links.fastest.get(kind, {}) for kind in (INSIDE, BETWEEN)]
        speeds = [[by_rank[rank] for rank in ranks if rank in by_rank] for by_rank in by_kind]
        rows.append(
            (
                host,
                rank_list(ranks).split(" ", 1)[1],
                f"{len(ranks)} x {on_host[0].device}",
                f"{min(report.free_memory for report in on_host) / 1e9:.1f}",
                f"{min(report.flops for report in on_host) / 1e12:.3g}",
                *(f"{min(speed) / 1e9:.3g}" if speed else "-" for speed in speeds),
                f"{min(free for report in on_host for free in report.free_disk.values()) / 1e9:.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(reports) > 1:
        lines.append(f"all-reduce over {len(reports)} ranks: {links.all_reduce / 1e9:.3g} GB/s")
    return lines


def checkpoint_bytes(config: FARConfig) -> int:
    """Bytes of a checkpoint: weights, two moments and the EMA in float32."""
    with torch.device("meta"):
        return 16 * sum(parameter.numel() for parameter in FAR(config).parameters())


def _exit(error: StuckError, hosts: Sequence[str]) -> NoReturn:
    """Print which ranks hang, and exit without Python's cleanup, which would wait for them."""
    bad = dict.fromkeys(hosts[rank] for rank in error.ranks)
    is_every_host = len(bad) == len(set(hosts))
    fix = "NCCL_DEBUG=INFO shows more" if is_every_host else f"leave the node out: sbatch --exclude={','.join(bad)}"
    print_error(UserError(f"start-up check: {ranks_on_hosts(error.ranks, hosts)} {error.what}; {fix}"))
    os._exit(REFUSED)


def _different_keys(recipes: Sequence[dict[str, Any]]) -> list[str]:
    """The recipe keys with different values on the ranks."""
    by_key = [flatten(values) for values in recipes]
    keys = dict.fromkeys(key for values in by_key for key in values)
    return [key for key in keys if len({json.dumps(values.get(key)) for values in by_key}) > 1]
