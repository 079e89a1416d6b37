#!/usr/bin/env bash
# A throw-away Slurm cluster: two nodes, n1 and n2, on this machine. Nothing outside one folder is written.
#
#   tests/slurm/cluster.sh start [FOLDER]    prints how to use it
#   tests/slurm/cluster.sh stop [FOLDER]     ends its jobs and daemons, removes FOLDER
#   tests/slurm/cluster.sh node N [FOLDER]   starts the slurmd of node nN once more
#
#   FOLDER    default: ${TMPDIR:-/tmp}/mpifedlora-slurm-UID; a cluster for each folder
#
# Needs slurmctld, slurmd, the clients and munge, on Debian and Ubuntu:
#   apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
set -euo pipefail
# Debian keeps the daemons where only root looks.
PATH=$PATH:/usr/sbin:/sbin

die() { echo "cluster.sh: $1" >&2; exit 1; }

free_ports() {
    python3 - "$1" <<'PYTHON'
import socket
import sys

sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(each.getsockname()[1] for each in sockets))
PYTHON
}

write_config() {
    local host user controller first second
    host=$(hostname -s)
    user=$(id -un)
    # Free ports, so that two clusters do not collide.
    read -r controller first second < <(free_ports 3)
    cat >"$folder/slurm.conf" <<CONF
ClusterName=throwaway
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=$user
SlurmdUser=$user
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credentials have expired, by default two minutes.
AuthInfo=socket=$folder/munge.socket,cred_expire=2
# No cgroups, which containers seldom have.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
# The nodes claim more processors than the machine may have.
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=2,sched_min_interval=0
# Seconds after which a node that does not answer is down, and its jobs are requeued.
SlurmdTimeout=5
KillWait=5
ReturnToService=2
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$first CPUs=8
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$second CPUs=8
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF
}

start_munge() {
    head -c 128 /dev/urandom >"$folder/munge.key"
    chmod 600 "$folder/munge.key"
    # --force: root may run it, and the folder may lie in one that others write to, as /tmp.
    munged --force --num-threads=2 --socket="$folder/munge.socket" --key-file="$folder/munge.key" \
        --pid-file="$folder/munge.pid" --log-file="$folder/munge.log" --seed-file="$folder/munge.seed"
}

start_node() { slurmd -N "n$1" -f "$folder/slurm.conf"; }

is_ready() { [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = 2 ]; }

start() {
    for tool in munged slurmctld slurmd sbatch; do
        command -v "$tool" >/dev/null || die "needs $tool; on Debian and Ubuntu: apt-get install slurmctld slurmd slurm-client munge"
    done
    [ ! -e "$folder" ] || die "$folder must not exist, is a cluster running in it? Stop it: $0 stop $folder"
    mkdir -m 755 -p "$folder" "$folder/state"
    write_config
    start_munge
    slurmctld -f "$folder/slurm.conf"
    start_node 1
    start_node 2
    for _ in $(seq 100); do
        if is_ready; then break; fi
        sleep 0.2
    done
    is_ready || die "both nodes must be idle after 20 s, and are not; see $folder/*.log"
    echo "a Slurm cluster of two nodes is up: export SLURM_CONF=$SLURM_CONF"
}

end() { # the process that a file names, if it is alive
    local pid
    pid=$(cat "$1" 2>/dev/null) || return 0
    kill "$pid" 2>/dev/null || return 0
    for _ in $(seq 50); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
}

stop() {
    [ -e "$folder/slurm.conf" ] || { echo "no cluster in $folder"; return; }
    # Jobs first: a slurmd that ends leaves its jobs running.
    if timeout 10 scancel --quiet --user="$(id -un)" 2>/dev/null; then
        for _ in $(seq 75); do
            [ -n "$(timeout 5 squeue --noheader 2>/dev/null)" ] || break
            sleep 0.2
        done
    fi
    end "$folder/slurmctld.pid"
    end "$folder/slurmd-n1.pid"
    end "$folder/slurmd-n2.pid"
    end "$folder/munge.pid"
    rm -rf "$folder"
    echo "the Slurm cluster in $folder is gone"
}

command=${1:-}
node=
if [ "$command" = node ]; then
    node=${2:?which node?}
    shift
fi
folder=${2:-${TMPDIR:-/tmp}/mpifedlora-slurm-$(id -u)}
export SLURM_CONF=$folder/slurm.conf
case $command in
    start) start ;;
    stop) stop ;;
    node) start_node "$node" ;;
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
