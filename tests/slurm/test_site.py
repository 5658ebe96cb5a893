"""The settings of a site: slurm/site.sh, and jobs in a container on nodes without packages."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from far_scale.utils.event_log import read_events
from far_scale.utils.hosts import first_host
from harness.launch import ROOT
from harness.processes import forked_python, program
from harness.slurm_jobs import Cluster, started_cluster, steps_logged, tiny

ONE_RANK = "--nodes=1 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1 --time=10"

# As a job's script does; then what it would run.
SOURCED = """
set -euo pipefail
main() {
    local checkout=$1 host_python python=""
    source "$checkout/slurm/environment.sh"
    echo "$host_python | $python | ${in_step[*]} | $- $(trap -p EXIT ERR DEBUG)"
    inside printenv VISIBLE || inside printenv NCCL_X
}
main "$@"
"""


def checkout_with(folder: Path, site: str) -> Path:
    """What jobs need of this checkout, with these settings of a site."""
    skipped = shutil.ignore_patterns("__pycache__", "site.sh")
    for part in ("far_scale", "recipes", "slurm", "tools"):
        shutil.copytree(ROOT / part, folder / "checkout" / part, ignore=skipped)
    (folder / "checkout" / "slurm" / "site.sh").write_text(site)
    return folder / "checkout"


@pytest.mark.parametrize(
    ("site", "expected", "refused"),
    [
        ("export VISIBLE=$UNSET[1\n[ 1 = 2 ] && export VISIBLE=2", "HERE/ds | HERE/ds | --export=ALL", None),
        ("SITE_SRUN_OPTIONS=(--mpi=none)\nexport VISIBLE=1", "HERE/ds | HERE/ds | --export=ALL --mpi=none", None),
        ("SITE_CONTAINER=(env VISIBLE=2)", "python3 | HERE/ds | --export=ALL env VISIBLE=2 env -C HERE", None),
        (
            "declare -x VISIBLE=1\ndeclare SITE_SRUN_OPTIONS=(--mpi=none)\nset -u\nIFS=, python=a site=c\ncd /",
            "HERE/ds | HERE/ds | --export=ALL --mpi=none",
            None,
        ),
        ("SITE_SRUN_OPTIONS=-mpi\nSITE_CONTAINER=\nNCCL_X=1", "HERE/ds | HERE/ds | --export=ALL -mpi", None),
        ("SITE_SRUN_OPTIONS=--mpi=none\nexport VISIBLE=1\nreturn", "HERE/ds | HERE/ds | --export=ALL --mpi=none", None),
        ("SITE_CONTAINER=(a)\nHOST_PYTHON=$PYTHON", "", "HERE/ds on HOST: is not Python 3.9 or newer (Python 3.8.1)"),
        ("SITE_CONTAINER='env VISIBLE=2'", "", "SITE: write an array, SITE_CONTAINER=(...), one word an element"),
        ("SITE_CONTAINER=(a)\nSITE_CONTAINER_OPTIONS=(--b)", "", "SITE: SITE_CONTAINER and SITE_CONTAINER_OPTIONS are"),
        ("module() { return 3; }\nmodule load cuda/99", "", "SITE: line 2 failed (see above)"),
        ("if true; then", "", "SITE: is not valid bash (see above)"),
        ("SITE_SRUN_OPTIONS='--mpi=none --label'", "", "SITE: write an array, SITE_SRUN_OPTIONS=(...), one word"),
        ("SITE_CONTAINERS=(env)", "", "SITE: there is no setting SITE_CONTAINERS, only SITE_SRUN_OPTIONS"),
        ("export VISIBLE=1\r\n", "", "SITE: has the line ends of Windows; take them out: sed -i"),
        ("exit 0", "", "SITE: ends the job by exit (status 0, see above)"),
        ("set -u\necho $UNSET", "", "SITE: ends the job by exit (status 1"),
        ("false || return", "", "SITE: returns status 1 (see above)"),
        ("PYTHON=/no/such", "", "/no/such: is no Python with DeepSpeed; run tools/setup_env.sh in"),
    ],
)  # fmt: skip
def test_settings_of_a_site(site: str, expected: str, refused: str | None, tmp_path: Path) -> None:
    has_deepspeed = program(tmp_path / "ds", '[ "$1" != --version ] || exec echo Python 3.8.1; [[ $2 = *deepspeed* ]]')
    path = tmp_path / "checkout" / "slurm" / "site.sh"
    path.parent.mkdir(parents=True)
    path.write_bytes(site.encode())
    shutil.copy(ROOT / "slurm" / "environment.sh", path.parent)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(has_deepspeed)}
    command = ["bash", "-c", SOURCED, "bash", str(path.parent.parent)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    output = done.stdout.replace(str(tmp_path), "HERE")
    if refused is None:
        visible = "2" if "env VISIBLE=2" in expected else "1" if "mpi" in expected else "[1"
        assert (done.returncode, output) == (0, f"{expected} | ehuBc \n{visible}\n"), done.stderr
    else:
        host = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
        refused = refused.replace("HERE", str(tmp_path)).replace("SITE:", f"{path}:").replace("HOST", host)
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"error: {refused}"), done.stderr


@pytest.mark.parametrize(
    ("container", "status", "last"),
    [
        (
            "env -i",
            2,
            "error: SLURM_JOB_ID is not set: this is for inside a job; submit one with sbatch",
        ),
        ("/no/such/apptainer exec", 127, "error: the job's start failed (status 127, see above); is the container in"),
        (
            "env",
            2,
            "error: {bare}: this Python has no DeepSpeed, so it cannot train; set PYTHON, or the environment or",
        ),
    ],
)
def test_a_container_that_cannot_be_used(container: str, status: int, last: str, tmp_path: Path) -> None:
    bare = program(tmp_path / "bare", f'exec {shlex.quote(os.path.realpath(sys.executable))} -S "$@"')
    python = sys.executable if "-i" in container else bare
    site = f"SITE_CONTAINER=({container})\nHOST_PYTHON={bare} PYTHON={python}\n"
    launcher = checkout_with(tmp_path, site) / "slurm" / "launch.sh"
    own = {"SLURM_JOB_ID": "7", "PATH": os.environ["PATH"]}
    command = ["bash", str(launcher), "demo_cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True)
    last = last.format(bare=os.path.realpath(sys.executable))
    assert done.returncode == status and done.stderr.splitlines()[-1].startswith(last), done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_code_is_that_of_the_checkout(tmp_path: Path) -> None:
    """Python would take it from the folder that the job was submitted from."""
    program(tmp_path / "far_scale" / "__init__.py", "")
    own = {"SLURM_JOB_ID": "7", "PATH": os.environ["PATH"], "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "slurm" / "launch.sh"), "demo_cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path}: holds a far_scale of its own, which Python would take, not that")


def test_with_a_container_a_node_needs_only_the_standard_library() -> None:
    """Nothing but Python's own modules and far_scale's is loaded by what calls SLURM's commands."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from far_scale.slurm import __main__, job, lifecycle\n"
        "known = {*sys.stdlib_module_names, 'far_scale', '__main__'}\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} - known))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, ROOT], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_the_images_are_made_of_what_is_there() -> None:
    """Both definitions copy the same files of the checkout, and install the same."""
    folder = ROOT / "slurm" / "container"
    docker, apptainer = (folder / name for name in ("Dockerfile", "far_scale.def"))
    copied = {
        word for line in docker.read_text().splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]
    }
    files = apptainer.read_text().partition("%files\n")[2].partition("\n\n")[0]
    assert copied == {line.split()[0] for line in files.splitlines()} and "setup.py" in copied
    install = {line.split(" pip install ")[-1].split("/pip install ")[-1] for path in (docker, apptainer)
               for line in path.read_text().splitlines() if "pip install" in line}  # fmt: skip
    assert len(install) == 1
    named = [*copied, *re.findall(r"--constraint (\S+)", install.pop())]
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with started_cluster(tmp_path_factory.mktemp("jobs")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a node whose Python has no packages."""
    folder = tmp_path_factory.mktemp("host")
    program(folder / "python3", f'exec {shlex.quote(os.path.realpath(sys.executable))} -S "$@"')
    return {"PATH": f"{folder}:/usr/bin:/bin"}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a stand-in for a container: the Python of this test, and none of SLURM's."""
    folder = tmp_path_factory.mktemp("image")
    program(folder / "python", f'exec {shlex.quote(sys.executable)} "$@"')
    if not torch.cuda.is_available():  # ranks on two nodes are forked; that on one node is started anew
        ranks = f'if [ "$2" = train ] && [ "$SLURM_NNODES" = 2 ]; then exec {forked_python()} "$@"; fi'
        program(folder / "python", f'{ranks}\nexec {shlex.quote(sys.executable)} "$@"')
    for name in ("bash", "env", "sh", "uname"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


@pytest.mark.slow
def test_all_of_a_training_runs_in_the_container(
    cluster: Cluster, bare: dict[str, str], image: Path, recorded_shards: Path, tmp_path: Path
) -> None:
    """Checked, trained on two nodes, warned, started again by the node, resumed, done; with the site's settings."""
    seen, run = tmp_path / "seen", tmp_path / "run"
    container = program(
        tmp_path / "container",
        f'echo "${{SEEN:-}} ${{SLURM_PROCID:-}} $*" >>{seen}\nexport PATH={image}\nexec "${{@:2}}"',
    )
    site = f"export SEEN=yes\nSITE_SRUN_OPTIONS=(--label)\nSITE_CONTAINER=({container} --nv)\n"
    checkout = checkout_with(tmp_path, site)
    options = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1 --time=10"
    script, overrides = checkout / "slurm" / "far_xl.sh", tiny(recorded_shards, run, 60)
    job = cluster.sbatch(script, options, overrides, FAR_SCALE=checkout, **bare)
    cluster.until(job, "step 3", lambda: len(steps_logged(run)) >= 3)
    cluster.run("scancel", "--signal=USR1", job)
    shown = cluster.wait(job)
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("COMPLETED", "0:0", "1"), cluster.output(job)
    assert steps_logged(run) == list(range(1, 61))
    stop, end = (event for event in read_events(run) if event["event"] == "end")
    assert stop["status"] == 75 and stop["requeue"] and 0 < stop["step"] < 60 and end["status"] == 0
    assert any(line.startswith("0: ") for line in cluster.output(job).splitlines()), "srun's --label"
    inside = ["env", "-C", str(cluster.folder)]
    prepared, *trained = (line.split() for line in seen.read_text().splitlines())
    assert prepared[:7] == ["yes", "0", "--nv", *inside, f"PYTHONPATH={checkout}"]
    assert sorted(words[:7] for words in trained) == [["yes", rank, "--nv", *inside, "python"] for rank in "0011"]


@pytest.mark.slow
def test_srun_may_start_the_container_and_sbatchs_options_reach_the_jobs(
    cluster: Cluster, bare: dict[str, str], image: Path, recorded_shards: Path, tmp_path: Path
) -> None:
    """As with pyxis. The scripts besides training, jobs of tools/submit.py, a warning that only sbatch was given."""
    prolog = program(tmp_path / "prolog", f"echo export PATH={image}")  # SLURM sets what it prints for the task
    checkout = checkout_with(tmp_path, f"SITE_CONTAINER_OPTIONS=(--task-prolog={prolog})\n")

    def sbatch(script: str, options: str, arguments: list[str]) -> str:
        path = checkout / "slurm" / script
        return cluster.sbatch(path, f"{ONE_RANK} {options}", arguments, FAR_SCALE=checkout, **bare)

    training = sbatch("far_xl.sh", "--time=4 --signal=USR1@60", tiny(recorded_shards, tmp_path / "run", 3))
    helps = [sbatch(script, "", ["--help"]) for script in ("encode_latents.sh", "evaluate.sh")]
    submitted = cluster.run(
        sys.executable, checkout / "tools" / "submit.py", "far_xl_ucf101_256_cond",
        *tiny(recorded_shards, tmp_path / "submitted", 3), "--gpus-per-node", 0, "--cpus-per-task", 1, "--time", 30,
        "--", "--comment=a b", "--exclude", "127.0.0.2", "--mem=3000", "--export=NONE", PYTHONPATH=checkout,
    )  # fmt: skip
    shown = [cluster.wait(job) for job in (training, *helps, submitted)]
    outputs = [cluster.output(training), *map(cluster.output, helps)]
    assert [show["ExitCode"] for show in shown] == ["0:0"] * 4, outputs
    assert steps_logged(tmp_path / "run") == steps_logged(tmp_path / "submitted") == [1, 2, 3]
    assert "warning: job" in outputs[0] and "--signal=USR1@300 and a time limit of 0:04:00" in outputs[0]
    assert all("usage: " in output for output in outputs[1:])
    assert shown[3]["ExcNodeList"] == "127.0.0.2"


@pytest.mark.parametrize("nodes", ["n[001-004,7],m3", "a,b[1-2]", "r[1-2]n[3-4]", "127.0.0.[2-3]", "n1"])
def test_the_first_host_is_that_of_scontrol(cluster: Cluster, nodes: str) -> None:
    assert first_host(nodes) == cluster.run("scontrol", "show", "hostnames", nodes).split()[0]
