"""The start-up check: what is not as it must be is refused with the node's name before training starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from far_scale.config.recipe import load_recipe
from far_scale.distributed.exit_codes import REFUSED
from far_scale.health.bandwidth import BETWEEN, INSIDE, Links, fastest_links, rounds
from far_scale.health.gemm_probe import GemmProbe
from far_scale.health.node_check import RankReport, code_hash, examine, refusals
from far_scale.health.preflight import checkpoint_bytes, node_table, slow_nodes
from far_scale.utils.event_log import read_events
from harness.launch import ROOT
from harness.processes import started

WORKER = ROOT / "tests/harness/startup_worker.py"
CASES = [
    "sound", "wrong product", "device error", "slow product", "other code", "other recipe", "other local folders",
    "other torch", "other deepspeed", "full disk",
]  # fmt: skip


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Every case on 2 ranks, on nodes n0 and n1, in one start of the processes: the folder, and rank 0's output."""
    out = tmp_path_factory.mktemp("checks")
    with started(2, out / "out", WORKER, out, *CASES) as ranks:
        ends = [rank.end(120) for rank in ranks]
    assert [status for status, _ in ends] == [0, 0], ends[0][1] + ends[1][1]
    return out, ends[0][1]


def result(checks: tuple[Path, str], case: str) -> str:
    """What a case raised, on both ranks alike."""
    first, second = ((checks[0] / f"{case}-{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    return first


def test_sound_nodes_are_printed_line_by_line(checks: tuple[Path, str]) -> None:
    assert result(checks, "sound") == "sound ['n0', 'n1']"
    table = checks[1].splitlines()
    assert table[0].split()[:3] == ["node", "ranks", "device"]
    assert table[1].split()[:4] == ["n0", "0", "1", "x"] and table[2].split()[:2] == ["n1", "1"]
    assert table[3].startswith("all-reduce over 2 ranks: ")
    (event,) = [event for event in read_events(checks[0] / "sound") if event["event"] == "nodes"]
    assert event["nodes"] == {"n0": "rank 0", "n1": "rank 1"}


def test_a_device_with_wrong_results_is_refused(checks: tuple[Path, str]) -> None:
    text = result(checks, "wrong product")
    assert "rank 1 on n1" in text and "came out wrong" in text and "sbatch --exclude=n1" in text


def test_a_device_that_fails_is_refused(checks: tuple[Path, str]) -> None:
    text = result(checks, "device error")
    assert "rank 1 on n1" in text and "ECC error encountered; leave the node out: sbatch --exclude=n1" in text


def test_a_slow_device_is_logged(checks: tuple[Path, str]) -> None:
    assert result(checks, "slow product").startswith("sound")
    (event,) = [event for event in read_events(checks[0] / "slow product") if event["event"] == "node"]
    assert event["ranks"] == [1] and event["hosts"] == ["n1"] and "rank 1 on n1 calculates at" in event["text"]


def test_other_code_is_refused(checks: tuple[Path, str]) -> None:
    assert "the code of far_scale is not the same everywhere: 0123456789ab on rank 1 on n1" in result(
        checks, "other code"
    )


def test_another_recipe_is_refused_with_the_keys_that_differ(checks: tuple[Path, str]) -> None:
    text = result(checks, "other recipe")
    assert "the recipe is not the same everywhere" in text and "on rank 1 on n1" in text
    assert text.endswith("the keys that differ: train.zero_stage")


def test_folders_on_a_nodes_own_disk_may_differ(checks: tuple[Path, str]) -> None:
    assert result(checks, "other local folders").startswith("sound")


@pytest.mark.parametrize(("library", "version"), [("torch", "2.9.0"), ("deepspeed", "0.1.2")])
def test_other_versions_are_refused(checks: tuple[Path, str], library: str, version: str) -> None:
    text = result(checks, f"other {library}")
    assert f"{library} is not the same everywhere: {version} on rank 1 on n1" in text and "environment" in text


def test_a_full_disk_is_refused(checks: tuple[Path, str]) -> None:
    text = result(checks, "full disk")
    assert "run_dir: on n1 a checkpoint needs" in text and "0 GB are free; free some" in text


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("stuck device", "rank 1 on n1 did not come through the examination of its node in 3 s; leave the node out"),
        ("stuck link", "rank 1 on n1 did not come through an exchange of messages in 6 s; leave the node out"),
        ("lost messages", "rank 0 on n0, rank 1 on n1 wait for each other's messages for more than 3 s; NCCL_DEBUG"),
    ],
    ids=["device", "link", "messages"],
)
@pytest.mark.slow
def test_a_node_that_hangs_is_named_and_the_check_ends(tmp_path: Path, case: str, text: str) -> None:
    with started(2, tmp_path / "out", WORKER, tmp_path, case) as ranks:
        status, output = ranks[0].end(60)
    assert status == REFUSED and text in output


def report(rank: int, host: str, **others: object) -> RankReport:
    sound = RankReport(
        rank, host, "GPU", "cuda", 78 * 10**9, 80 * 10**9, None, 500e12, {"run_dir": 10**12}, "c", "r", {"torch": "2"}
    )
    return replace(sound, **others)  # type: ignore[arg-type]


def test_of_thousands_only_the_outlier_is_named() -> None:
    reports = [report(rank, f"n{rank // 8}") for rank in range(4096)]
    assert refusals(reports, 10**9) == []
    reports[17] = report(17, "n2", free_memory=20 * 10**9)
    reports[4000] = report(4000, "n500", code="d")
    memory, code = refusals(reports, 10**9)
    assert memory.startswith("rank 17 on n2 (GPU): only 20.0 of 80.0 GB are free") and "--exclude=n2" in memory
    assert "d on rank 4000 on n500, but c on ranks 0-3999, 4001-4095" in code


def test_a_nodes_own_disk_must_hold_its_ranks_share_of_a_checkpoint() -> None:
    disk = {"run_dir": 10**12, "checkpoint.local_dir": 3 * 10**9}
    reports = [report(rank, f"n{rank // 2}", free_disk=disk) for rank in range(4)]
    assert refusals(reports, 6 * 10**9) == []
    (text,) = refusals(reports, 8 * 10**9)
    assert text.startswith("checkpoint.local_dir: on all nodes a checkpoint needs 4 GB, 3 GB are free")


def test_a_checkpoint_takes_sixteen_bytes_a_parameter() -> None:
    recipe = load_recipe("demo_cpu")
    from far_scale.train.engine import build_model

    model = build_model(recipe.far_config(), recipe.seed)
    assert checkpoint_bytes(recipe.far_config()) == 16 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("sizes", [(1,), (2,), (8,), (1, 1, 1), (2, 2), (4, 4, 4), (3, 2, 1, 2, 5)], ids=str)
def test_every_rank_exchanges_messages_with_two_neighbours_of_each_kind(sizes: tuple[int, ...]) -> None:
    hosts = [f"n{node}" for node, ranks in enumerate(sizes) for _ in range(ranks)]
    partners: dict[tuple[str, int], set[int]] = {}
    for turn in rounds(hosts):
        for rank, partner in turn.partners.items():
            assert turn.partners[partner] == rank != partner
            assert (hosts[rank] == hosts[partner]) == (turn.kind == INSIDE)
            partners.setdefault((turn.kind, rank), set()).add(partner)
    for rank, host in enumerate(hosts):
        place = hosts[:rank].count(host)
        ring = {INSIDE: hosts.count(host), BETWEEN: sum(size > place for size in sizes)}
        for kind, members in ring.items():
            assert len(partners.get((kind, rank), ())) == min(2, members - 1)


def test_the_node_between_two_slow_links_is_the_one_named() -> None:
    """Four nodes in a ring: n1 is slow to talk to, so n0 and n2 are slow on one side only, which does not count."""
    reports = [report(rank, f"n{rank}") for rank in range(4)]
    edges = {(0, 1): 2e9, (1, 2): 3e9, (2, 3): 50e9, (3, 0): 48e9}
    measured: list[dict[int, float]] = [{} for _ in reports]
    for (one, other), speed in edges.items():
        measured[one][other], measured[other][one] = speed, 5 * speed  # a message may have come early
    fastest = fastest_links(rounds([report.host for report in reports]), measured)
    ((text, ranks),) = slow_nodes(reports, Links(fastest, 40e9))
    assert ranks == [1] and text == "the links of rank 1 on n1 between nodes carry 3 GB/s, the median is 50"


def test_a_line_for_each_node_holds_its_worst_numbers() -> None:
    reports = [report(rank, f"n{rank // 2}", flops=(500 - rank) * 1e12) for rank in range(4)]
    links = Links({INSIDE: {rank: (300 + rank) * 1e9 for rank in range(4)}, BETWEEN: dict.fromkeys(range(4), 48e9)}, 1)
    table = [line.split() for line in node_table(reports, links)]
    assert table[1] == ["n0", "0-1", "2", "x", "GPU", "78.0", "499", "300", "48", "1000.0"]
    assert table[2] == ["n1", "2-3", "2", "x", "GPU", "78.0", "497", "302", "48", "1000.0"]


def test_the_code_hash_sees_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = code_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("no code")
    assert code_hash(tmp_path) == first
    (tmp_path / "a.py").write_text("x = 2\n")
    second = code_hash(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, code_hash(tmp_path)}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_product_is_exact_and_one_wrong_number_is_found(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = GemmProbe(torch.device(kind), dtype)
    assert product.is_right() and product.seconds(2) > 0
    assert product._out.abs().max() < 512 and (product._out.int() % 2 == 0).all()
    multiply = GemmProbe._multiply

    def multiply_wrongly(product: GemmProbe) -> None:
        multiply(product)
        product._out[7, 1] += 2

    monkeypatch.setattr(GemmProbe, "_multiply", multiply_wrongly)
    assert not product.is_right()


@pytest.mark.gpu
def test_a_gpu_is_examined(tmp_path: Path) -> None:
    recipe = load_recipe("demo_gpu", [f"run_dir={tmp_path}"])
    found = examine(
        0, "n0", torch.device("cuda", 0), torch.bfloat16, recipe.shared_values(), {"run_dir": recipe.run_dir}
    )
    assert found.fault is None and found.kind == "cuda" and found.flops > 1e12
    assert 0 < found.free_memory <= found.total_memory
