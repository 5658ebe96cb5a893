"""The ranks' first meeting: whoever does not come, or has another kind of device, is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.launch import ROOT
from harness.processes import started

WORKER = ROOT / "tests/harness/rendezvous_worker.py"


def test_all_ranks_meet(tmp_path: Path) -> None:
    with started(2, tmp_path, WORKER, 2, "cpu,cpu", 60) as ranks:
        assert [rank.end(60) for rank in ranks] == [(0, "met\n")] * 2


def test_a_rank_without_a_gpu_is_named_on_all(tmp_path: Path) -> None:
    with started(3, tmp_path, WORKER, 3, "cuda,cpu,cuda", 60) as ranks:
        for number, rank in enumerate(ranks):
            status, output = rank.end(60)
            assert status == 2 and output == (
                f"[rank {number} on n{number}] error: rank 1 on n1 found no GPU, others did; is the driver broken? "
                "Leave the node out: sbatch --exclude=n1\n"
            )


@pytest.mark.slow
def test_ranks_that_never_come_are_named(tmp_path: Path) -> None:
    with started(2, tmp_path, WORKER, 4, "cpu,cpu,cpu,cpu", 8) as ranks:
        for rank in ranks:
            status, output = rank.end(60)
            assert status == 2 and "error: ranks 2-3 of 4 did not come in 8 s; those that did are on n0, n1" in output
