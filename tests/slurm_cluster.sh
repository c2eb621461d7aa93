#!/usr/bin/env bash
# A real Slurm of two nodes on one machine, for tests: as root, without systemd; all traffic stays on loopback.
#   slurm_cluster.sh start FOLDER        sets it up in FOLDER and waits until both nodes are idle (about 0.3 s)
#   slurm_cluster.sh stop FOLDER         ends what start began, by process id
#   slurm_cluster.sh lose FOLDER NODE    kills the node's slurmd and all that it runs; at most 15 s later it is DOWN
#   slurm_cluster.sh begin FOLDER NODE   begins the node's slurmd, again after `lose`
#   SLURM_CONF=FOLDER/slurm.conf sbatch|srun|squeue|scontrol ...
# Needs (3.5 MB to load): apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
# Each node is a slurmd with a host name (UTS namespace) and an /etc/hosts (mount namespace) of its own.
set -euo pipefail
action=$1 folder=$(mkdir -p "$2" && cd "$2" && pwd)
nodes=(node1 node2) port=${PORT:-26817}
export SLURM_CONF=$folder/slurm.conf

stop() {
  if [ -s "$folder/slurmctld.pid" ]; then
    timeout 10 scancel --user=root || true
    for _ in $(seq 150); do [ -n "$(squeue --noheader)" ] || break; sleep 0.1; done
  fi
  for node in "${nodes[@]}"; do lose "$node"; done
  pids=$(cat "$folder"/{slurmctld,munged}.pid 2>/dev/null || true)
  [ -n "$pids" ] || return 0
  kill $pids 2>/dev/null || true
  for _ in $(seq 150); do kill -0 $pids 2>/dev/null || break; sleep 0.1; done # slurmctld takes up to 5 s
  rm -f "$folder"/*.pid
}

begin() { # NODE
  mkdir -p "$folder/$1.spool"
  unshare --mount --uts bash -c "hostname $1 && mount --bind '$folder/hosts' /etc/hosts && exec slurmd"
}

lose() { # NODE
  local name
  name=$(readlink "/proc/$(cat "$folder/$1.slurmd.pid" 2>/dev/null)/ns/uts") || return 0 # it is lost already
  for process in /proc/[0-9]*; do
    [ "$(readlink "$process/ns/uts" 2>/dev/null)" != "$name" ] || kill -KILL "${process#/proc/}" 2>/dev/null || true
  done
  rm -f "$folder/$1.slurmd.pid"
}

start() {
  mkdir -p "$folder/state"
  [ -s "$folder/munge.key" ] || head -c 128 /dev/urandom >"$folder/munge.key"
  chmod 400 "$folder/munge.key"
  printf '127.0.0.1 localhost %s\n127.0.0.11 node1\n127.0.0.12 node2\n' "$(hostname)" >"$folder/hosts"
  echo "NodeName=node[1-2] Name=gpu File=/dev/tty[0-3]" >"$folder/gres.conf" # four "GPUs" a node: --gpus is accepted
  cat >"$SLURM_CONF" <<END
ClusterName=here
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also what a job that was queued again waits before it starts (else 120 s)
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n.spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
# nodes may claim more cores and memory than the machine has, so that --cpus-per-task=32 --mem=32G is accepted
SlurmdParameters=config_overrides
GresTypes=gpu
JobRequeue=1
ReturnToService=2
KillWait=10
SlurmdTimeout=6
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/jobcomp.txt
NodeName=node1 NodeAddr=127.0.0.11 Port=$((port + 1)) CPUs=64 RealMemory=256000 Gres=gpu:4
NodeName=node2 NodeAddr=127.0.0.12 Port=$((port + 2)) CPUs=64 RealMemory=256000 Gres=gpu:4
PartitionName=batch Nodes=node[1-2] Default=YES MaxTime=1-0 DefaultTime=10 PriorityTier=1
PartitionName=urgent Nodes=node[1-2] MaxTime=1-0 DefaultTime=10 PriorityTier=10
END
  munged --force --num-threads=1 --socket="$folder/munge.socket" --key-file="$folder/munge.key" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
  slurmctld -i
  for node in "${nodes[@]}"; do
    begin "$node"
  done
  for _ in $(seq 100); do
    [ "$(sinfo --noheader --Node --partition=batch --format=%T | grep -c idle)" = 2 ] && return
    sleep 0.1
  done
  sinfo --Node --long
  return 1
}

"$action" "${@:3}"
