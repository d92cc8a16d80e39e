#!/bin/bash
# A throw-away Slurm + ssh/pdsh + Open MPI cluster inside one machine, for the tests of this folder.
#   cluster.sh up | down | status | run HOST CMD... | kill-node HOST | heal-node HOST | cut-link HOST | join-link HOST
#              | stop-slurmd HOST | start-slurmd HOST
# TC_NODES names the nodes ("node1 node2"). $TC_DIR/disk is a file system of its own, of TC_DISK_MB, that all hosts share
# and this machine does not see. Each "host" (head, node1, node2, ...) is one process tree in its own net, UTS, IPC, mount
# and PID namespace:
#   net   head owns a bridge, nodes have eth0 on it; 10.77.0.0/24, NO default route, never joined to the real eth0
#   uts   real distinct hostnames (torchelastic, Open MPI and DeepSpeed all key on them)
#   mount private /etc/hosts, /root/.ssh, /run, /dev/shm, /etc/resolv.conf; the rest of / is the "shared filesystem"
#   pid   killing the host's init kills everything on it, and nothing else (also confines DeepSpeed's own `pkill -f`)
# Teardown therefore is: kill -9 of the recorded init pids (checked by start time), nothing is ever matched by name.
# Needs root with CAP_SYS_ADMIN/CAP_NET_ADMIN and: slurmctld slurmd slurm-client munge openssh-server pdsh iproute2 nftables.
set -euo pipefail
export TC_DIR=${TC_DIR:?a folder for the state of the cluster}
export SLURM_CONF=$TC_DIR/slurm.conf
export TC_SHARE="$TC_DIR ${TC_SHARE:-}"   # shared dirs below /tmp; everything outside /tmp is shared anyway
SELF=$(readlink -f "$0")
NET=10.77.0; read -ra NODES <<<"${TC_NODES:-node1 node2}"; CPUS=${TC_CPUS:-4}; MEM=${TC_MEM_MB:-10000}
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

ip_of() { case $1 in head) echo $NET.10;; node*) echo $NET.$((10 + ${1#node}));; esac; }
starttime() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }   # field 22 = start time: detects pid reuse
alive() { # HOST -> prints its init pid if that very process is still alive
  local p s; [ -s "$TC_DIR/$1.init" ] || return 1
  read -r p s < "$TC_DIR/$1.init"; [ -n "$s" ] && [ "$(starttime "$p")" = "$s" ] && echo "$p"; }
inhost() { # HOST CMD... : run a command "on" a host, keeping cwd and environment
  local h=$1 p; shift; p=$(alive "$h") || { echo "host $h is not up" >&2; return 1; }
  nsenter -t "$p" -m -u -i -n -p --wdns="$PWD" -- "$@"; }
wait_for() { local n=$1; shift; while ! "$@" >/dev/null 2>&1; do n=$((n-1)); [ $n -gt 0 ] || { echo "timed out: $*" >&2; return 1; }; sleep 0.1; done; }

host_init() { # runs as PID 1 of a new host: args HOST
  local h=$1 d=$TC_DIR/hosts/$1
  read -r outer _ < /proc/self/stat                       # /proc is still the outer one, so this is the outer pid
  echo "$outer $(starttime "$outer")" > "$TC_DIR/$h.init.new"
  hostname "$h"; mount -t proc proc /proc
  mount -t tmpfs -o mode=755 tmpfs /run; mkdir -p /run/sshd /run/munge; mount -t tmpfs -o size="${TC_SHM:-2g}" tmpfs /dev/shm
  mount --bind "$TC_DIR/etc_hosts" /etc/hosts; mount --bind "$d/resolv.conf" /etc/resolv.conf
  mkdir -p /root/.ssh; mount --bind "$TC_DIR/ssh" /root/.ssh
  local i=0 s stage=(); for s in $TC_SHARE; do case $s in /tmp/*)              # node-local /tmp, with holes for shared dirs
    mkdir -p "/run/stage$i"; mount --rbind "$s" "/run/stage$i"; stage+=("$s"); i=$((i+1));; esac; done
  mount --bind "$d/tmp" /tmp; chmod 1777 /tmp; i=0
  for s in "${stage[@]}"; do mkdir -p "$s"; mount --move "/run/stage$i" "$s"; i=$((i+1)); done
  ip link set lo up
  mv "$TC_DIR/$h.init.new" "$TC_DIR/$h.init"
  sleep "${TC_TTL:-7200}" & wait $!        # bash as PID 1 reaps orphans; leaving here (a forgotten cluster's TTL) ends the host
}
hold_disk() { # a process whose mount namespace has the shared disk; the hosts' are made from it
  mount -t tmpfs -o size="${TC_DISK_MB:-64}m" tmpfs "$TC_DIR/disk"
  read -r outer _ < /proc/self/stat
  echo "$outer $(starttime "$outer")" > "$TC_DIR/disk.init.new"; mv "$TC_DIR/disk.init.new" "$TC_DIR/disk.init"
  exec sleep "${TC_TTL:-7200}"
}
start_disk() {
  mkdir -p "$TC_DIR/disk"; rm -f "$TC_DIR/disk.init"
  setsid unshare --mount --propagation private "$SELF" __disk </dev/null >"$TC_DIR/disk.log" 2>&1 &
  disown; wait_for 100 alive disk; }
start_host() {
  local h=$1; mkdir -p "$TC_DIR/hosts/$h"/{spool,tmp}; : > "$TC_DIR/hosts/$h/resolv.conf"; rm -f "$TC_DIR/$h.init"
  setsid nsenter -t "$(alive disk)" -m --wdns="$PWD" -- unshare --net --uts --ipc --mount --pid --fork --propagation private \
    "$SELF" __init "$h" </dev/null >"$TC_DIR/hosts/$h/init.log" 2>&1 &
  disown; wait_for 100 alive "$h"; }
plug() { # connect a node to head's bridge (run again after a node was re-created)
  local h=$1 p; p=$(alive "$h")
  nsenter -t "$(alive head)" -n ip link del "v$h" 2>/dev/null || :
  nsenter -t "$(alive head)" -n ip link add "v$h" type veth peer name eth0 netns "$p"
  nsenter -t "$(alive head)" -n ip link set "v$h" master br0 up
  inhost "$h" ip addr add "$(ip_of "$h")/24" dev eth0; inhost "$h" ip link set eth0 up; }
start_slurmd() {
  local h=$1
  inhost "$h" env -i PATH="$PATH" HOME=/root USER=root SLURM_CONF="$SLURM_CONF" slurmd -L "$TC_DIR/hosts/$h/slurmd.log"; }
stop_slurmd() { inhost "$1" kill -9 "$(inhost "$1" cat /run/slurmd.pid)"; }  # its children, the steps, live on
start_node() {
  local h=$1; alive "$h" >/dev/null && { echo "$h is up"; return; }
  start_host "$h"; plug "$h"
  inhost "$h" /usr/sbin/sshd -f "$TC_DIR/sshd_config"
  start_slurmd "$h"; }
kill_host() { # SIGKILL a host's PID 1: the kernel then ends all of its PID namespace and frees its net namespace
  local p; p=$(alive "$1") || { rm -f "$TC_DIR/$1.init"; return 0; }
  kill -9 "$p"; wait_for 100 test ! -e "/proc/$p"; rm -f "$TC_DIR/$1.init"; }

write_config() {
  mkdir -p "$TC_DIR"/{ssh,state,hosts,munge}; chmod 755 "$TC_DIR" "$TC_DIR/munge"; chmod 700 "$TC_DIR/ssh"
  { echo "127.0.0.1 localhost"; for h in head "${NODES[@]}"; do echo "$(ip_of "$h") $h"; done; } > "$TC_DIR/etc_hosts"
  [ -s "$TC_DIR/munge/key" ] || (umask 077; head -c 128 /dev/urandom > "$TC_DIR/munge/key")
  [ -s "$TC_DIR/ssh/id_ed25519" ] || { ssh-keygen -q -t ed25519 -N '' -f "$TC_DIR/ssh/id_ed25519"; cp "$TC_DIR/ssh/id_ed25519.pub" "$TC_DIR/ssh/authorized_keys"; }
  [ -s "$TC_DIR/ssh/host_key" ] || ssh-keygen -q -t ed25519 -N '' -f "$TC_DIR/ssh/host_key"
  for h in head "${NODES[@]}"; do echo "$h,$(ip_of "$h") $(cut -d' ' -f1,2 "$TC_DIR/ssh/host_key.pub")"; done > "$TC_DIR/ssh/known_hosts"
  cat > "$TC_DIR/sshd_config" <<-C
	Port 22
	ListenAddress 0.0.0.0
	HostKey $TC_DIR/ssh/host_key
	AuthorizedKeysFile $TC_DIR/ssh/authorized_keys
	PidFile /run/sshd.pid
	PermitRootLogin prohibit-password
	PasswordAuthentication no
	UsePAM no
	StrictModes no
	MaxStartups 100
	C
  for h in "${NODES[@]}"; do echo "$h slots=2"; done > "$TC_DIR/hostfile"
  for i in 0 1; do [ -c "$TC_DIR/gpu$i" ] || mknod "$TC_DIR/gpu$i" c 1 3; done   # twins of /dev/null stand in for GPUs, so that
  printf 'AutoDetect=off\nName=gpu File=%s/gpu[0-1] Flags=nvidia_gpu_env\n' "$TC_DIR" > "$TC_DIR/gres.conf"  # --gpus-* and CUDA_VISIBLE_DEVICES work
  printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' > "$TC_DIR/cgroup.conf"
  cat > "$TC_DIR/slurm.conf" <<-C
	ClusterName=tc
	SlurmctldHost=head($(ip_of head))
	SlurmUser=root
	SlurmdUser=root
	AuthType=auth/munge
	CredType=cred/munge
	AuthInfo=socket=$TC_DIR/munge/socket
	StateSaveLocation=$TC_DIR/state
	SlurmdSpoolDir=$TC_DIR/hosts/%n/spool
	SlurmctldPidFile=/run/slurmctld.pid
	SlurmdPidFile=/run/slurmd.pid
	SlurmctldLogFile=$TC_DIR/slurmctld.log
	ProctrackType=proctrack/linuxproc
	TaskPlugin=task/none
	JobAcctGatherType=jobacct_gather/none
	SelectType=select/cons_tres
	SelectTypeParameters=CR_Core
	MpiDefault=none
	JobCompType=jobcomp/filetxt
	JobCompLoc=$TC_DIR/jobcomp.log
	ReturnToService=2
	SlurmdParameters=config_overrides
	SlurmctldTimeout=30
	SlurmdTimeout=${TC_SLURMD_TIMEOUT:-20}
	TCPTimeout=2
	KillWait=5
	InactiveLimit=0
	GresTypes=gpu
	NodeName=node[1-${#NODES[@]}] NodeAddr=$NET.[11-$((10 + ${#NODES[@]}))] CPUs=$CPUS RealMemory=$MEM Gres=gpu:2 State=UNKNOWN
	PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
	C
}
nodes_idle() { [ "$(inhost head sinfo -h -N -t idle -o %N | sort -u | wc -l)" = "${#NODES[@]}" ]; }
all_alive() { local h; for h in head "${NODES[@]}"; do alive "$h" >/dev/null || return 1; done; }
up() {
  if all_alive; then echo "already up"; return; fi
  down; write_config; start_disk; start_host head
  inhost head ip link add br0 type bridge; inhost head ip addr add "$(ip_of head)/24" dev br0; inhost head ip link set br0 up
  inhost head /usr/sbin/sshd -f "$TC_DIR/sshd_config"
  inhost head munged --key-file="$TC_DIR/munge/key" --socket="$TC_DIR/munge/socket" --pid-file="$TC_DIR/munge/pid" \
    --log-file="$TC_DIR/munge/log" --seed-file="$TC_DIR/munge/seed"
  inhost head env -i PATH="$PATH" SLURM_CONF="$SLURM_CONF" slurmctld -c
  for h in "${NODES[@]}"; do start_node "$h"; done
  wait_for 300 nodes_idle; }
down() { for h in "${NODES[@]}" head disk; do kill_host "$h"; done; rm -rf "$TC_DIR"/{state,hosts,munge/socket*}; }   # logs, keys and config stay

case ${1:-} in
  __init) host_init "$2";;
  __disk) hold_disk;;
  up) up;;
  down) down;;
  status) for h in head "${NODES[@]}"; do echo "$h $(alive "$h" || echo down)"; done; inhost head sinfo -N -l || :;;
  run) shift; inhost "$@";;
  kill-node) inhost "$2" ip link set eth0 down || :; kill_host "$2";;      # power loss: link first, so peers get no FIN/RST
  heal-node) start_node "$2";;
  cut-link) inhost "$2" ip link set eth0 down;;                            # cable pulled, processes live on
  stop-slurmd) stop_slurmd "$2";;
  start-slurmd) start_slurmd "$2";;
  join-link) inhost "$2" ip link set eth0 up;;
  *) sed -n '3,4p' "$SELF"; exit 2;;
esac
