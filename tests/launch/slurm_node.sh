#!/bin/bash
# A SLURM of one node, this machine, for tests. As root, with Debian's packages:
#
#     apt-get install slurmctld slurmd slurm-client munge
#     eval "$(tests/launch/slurm_node.sh start DIR)"     # sets SLURM_CONF; the daemons log to DIR
#     tests/launch/slurm_node.sh stop DIR
set -euo pipefail

command=$1 dir=$(realpath -m "$2")

start() {
    mkdir -p "$dir"/{state,spool}
    # The service that signs messages refuses a socket below a folder that others may write to
    if ! munge -n > /dev/null 2>&1; then
        install -d -o munge -g munge -m 755 /run/munge
        runuser -u munge -- /usr/sbin/munged --pid-file="/run/munge/munged.pid"
        cp /run/munge/munged.pid "$dir/munged.pid"
    fi
    cat > "$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
SlurmctldPort=16817
SlurmdPort=16818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
GresTypes=gpu
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    export SLURM_CONF=$dir/slurm.conf
    slurmctld > "$dir/slurmctld.out" 2>&1
    slurmd -N "$(hostname)" > "$dir/slurmd.out" 2>&1
    for _ in $(seq 60); do
        if [ "$(sinfo --noheader --format=%T 2> /dev/null)" = idle ]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    echo "the node does not become idle: see the logs in $dir" >&2
    exit 1
}

stop() {
    SLURM_CONF=$dir/slurm.conf scancel --full --signal=KILL --user="$(id -un)" || true
    sleep 1
    for daemon in slurmd slurmctld munged; do
        if [ -f "$dir/$daemon.pid" ]; then kill "$(cat "$dir/$daemon.pid")" || true; fi
    done
}

"$command"
