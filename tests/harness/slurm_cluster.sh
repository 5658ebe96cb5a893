#!/usr/bin/env bash
# A real SLURM cluster on this machine, for the tests: munge, slurmctld and several slurmd as plain processes on loopback.
#
#     slurm_cluster.sh install            Debian's packages where they are missing (needs root)
#     slurm_cluster.sh up DIR             start a cluster whose files are all below DIR; talk to it with SLURM_CONF=DIR/slurm.conf
#     slurm_cluster.sh down DIR           stop it and every job on it, nothing else
#     slurm_cluster.sh kill-node DIR N    a node dies: kill -9 its slurmd, its steps and their processes
#     slurm_cluster.sh start-node DIR N   it comes back
#
# Nodes are named by their loopback address, 127.0.0.2 and up: names that resolve everywhere, without changing /etc/hosts.
# Each has 8 GPUs that are not there, so that scripts which ask for GPUs run unchanged. Jobs of the partition `train` are
# preempted (with a warning, then requeued) by those of `urgent`.
#
# Environment: NODES (default 3); OWNER, a process id: when that process is gone, the cluster goes too.
set -euo pipefail
NODES=${NODES:-3}
CPUS=16 GPUS=8 MEMORY_MB=64000 # of each node, by its own word: none of it need be there
KILL_WAIT=8                    # seconds from SIGTERM to SIGKILL; SLURM's default is 30
export PATH=$PATH:/usr/sbin:/sbin

fail() {
    printf 'slurm_cluster: %s\n' "$*" >&2
    exit 1
}
runs() { [ -d "/proc/$1" ] && ! grep -q '^State:.Z' "/proc/$1/status" 2>/dev/null; } # a zombie does not
runs_by_file() { [ -s "$1" ] && runs "$(cat "$1")"; }
within() { # within SECONDS COMMAND...: until it succeeds
    local tries=$(($1 * 10))
    shift
    while ! "$@" >/dev/null 2>&1; do
        [ $((tries--)) -gt 0 ] || return 1
        sleep 0.1
    done
}

install_packages() {
    command -v slurmctld slurmd sbatch munged >/dev/null && return
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        fail "there is no SLURM here, and only root on Debian can install it"
    fi
    local packages=(slurmctld slurmd slurm-client munge)
    export DEBIAN_FRONTEND=noninteractive
    # The list of packages is refreshed only where it must be.
    apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null 2>&1 ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >/dev/null ||
        fail "apt-get could not install ${packages[*]}"
}

free_ports() { # free_ports N
    python3 - "$1" <<'PYTHON'
import socket, sys
probes = [socket.socket() for _ in range(int(sys.argv[1]))]
for probe in probes:
    probe.bind(("127.0.0.1", 0))
print(*(probe.getsockname()[1] for probe in probes))
PYTHON
}

write_configuration() { # write_configuration DIR
    local dir=$1 ports number nodes="127.0.0.[2-$((NODES + 1))]"
    read -ra ports <<<"$(free_ports $((NODES + 1)))"
    # A GPU needs a device file. A link to /dev/null passes, and the number at its end becomes the GPU's.
    for number in $(seq 0 $((GPUS - 1))); do ln -s /dev/null "$dir/devices/gpu$number"; done
    echo "NodeName=$nodes Name=gpu File=$dir/devices/gpu[0-$((GPUS - 1))]" >"$dir/gres.conf"
    echo "CgroupPlugin=cgroup/v1" >"$dir/cgroup.conf" # not used, but slurmd ends without it where /sys/fs/cgroup is missing
    cat >"$dir/slurm.conf" <<CONF
ClusterName=test
# Job ids would start at 1 on each cluster and meet the files of an earlier one.
FirstJobId=$((1000 + RANDOM))
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits this long, 5 s at the least; the default is 120.
AuthInfo=cred_expire=5,socket=$dir/munge/socket
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
DependencyParameters=kill_invalid_depend
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=$KILL_WAIT
MinJobAge=3600
ReturnToService=2
SlurmdTimeout=5
UnkillableStepTimeout=60
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
CONF
    for number in $(seq "$NODES"); do
        local name=127.0.0.$((number + 1))
        mkdir "$dir/spool/$name"
        echo "NodeName=$name NodeHostname=$(hostname -s) NodeAddr=$name Port=${ports[$number]}" \
            "CPUs=$CPUS RealMemory=$MEMORY_MB Gres=gpu:$GPUS" >>"$dir/slurm.conf"
    done
    cat >>"$dir/slurm.conf" <<CONF
PartitionName=train Nodes=$nodes Default=YES DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=$nodes PriorityTier=10 PreemptMode=OFF
CONF
}

start_munge() { # start_munge DIR
    mkdir "$1/munge"
    chmod 755 "$1/munge"
    (umask 077 && head -c 128 /dev/urandom >"$1/munge/key")
    munged --force --key-file="$1/munge/key" --socket="$1/munge/socket" --pid-file="$1/run/munged.pid" \
        --log-file="$1/log/munged.log" --seed-file="$1/munge/seed" --num-threads=2
}

start_node() { slurmd -N "$2" -f "$1/slurm.conf"; } # start_node DIR NODE

all_idle() { [ "$(sinfo -h -N -p train -t idle -o %N | wc -l)" = "$NODES" ]; }

up() {
    local dir=$1 node
    case $dir in /*) ;; *) fail "$dir: DIR must be absolute" ;; esac
    [ ${#dir} -le 60 ] || fail "$dir: too long a path for the sockets below it"
    [ -z "$(ls -A "$dir" 2>/dev/null)" ] || fail "$dir: is not empty"
    install_packages
    mkdir -p "$dir"/{state,spool,log,run,devices}
    chmod 755 "$dir"
    write_configuration "$dir"
    export SLURM_CONF=$dir/slurm.conf
    if [ -n "${OWNER:-}" ]; then # first, so that nothing stays even if this script is killed half-way
        (
            trap '' HUP INT
            while runs "$OWNER"; do sleep 1; done
            down "$dir"
        ) </dev/null >/dev/null 2>&1 &
        echo $! >"$dir/run/keeper.pid"
    fi
    start_munge "$dir"
    slurmctld -f "$dir/slurm.conf"
    for node in "$dir"/spool/*; do start_node "$dir" "${node##*/}"; done
    within 20 all_idle || {
        sinfo -R >&2
        tail -n 20 "$dir"/log/slurm*.log >&2
        fail "the nodes do not come up"
    }
}

# Daemons and steps hold their node's log open; the processes of jobs carry its name in their environment.
node_processes() { # node_processes DIR [NODE]
    local process
    for process in /proc/[0-9]*; do
        if [ -n "$(find "$process/fd" -lname "$1/log/slurmd.${2:-*}.log" -print -quit 2>/dev/null)" ] ||
            { tr '\0' '\n' <"$process/environ" | grep -qxF "SLURM_CONF=$1/slurm.conf" &&
                tr '\0' '\n' <"$process/environ" | grep -qx "SLURMD_NODENAME=${2:-.*}"; } 2>/dev/null; then
            echo "${process#/proc/}"
        fi
    done
}

kill_node() { # kill_node DIR [NODE]
    local processes
    mapfile -t processes < <(node_processes "$@")
    [ ${#processes[@]} = 0 ] || kill -9 "${processes[@]}" 2>/dev/null || true
}

stop_by_file() { # stop_by_file FILE
    runs_by_file "$1" || return 0
    local process
    process=$(cat "$1")
    kill "$process" 2>/dev/null || true
    within 10 gone "$process" || kill -9 "$process" 2>/dev/null || true
}
gone() { ! runs "$1"; }

down() {
    [ -f "$1/slurm.conf" ] || return 0
    kill_node "$1"
    stop_by_file "$1/run/slurmctld.pid"
    kill_node "$1" # what the controller still started
    stop_by_file "$1/run/munged.pid"
    [ "$(cat "$1/run/keeper.pid" 2>/dev/null)" = "$BASHPID" ] || stop_by_file "$1/run/keeper.pid"
}

case ${1:-} in
    install) install_packages ;;
    up) up "${2:?DIR}" ;;
    down) down "${2:?DIR}" ;;
    kill-node) kill_node "${2:?DIR}" "${3:?NODE}" ;;
    start-node) start_node "${2:?DIR}" "${3:?NODE}" ;;
    *)
        sed -n '2,/^set/{/^set/!p}' "$0" >&2
        exit 2
        ;;
esac
