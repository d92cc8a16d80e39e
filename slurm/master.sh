# shellcheck shell=bash
# Sourced by the batch files whose ranks meet: where they do. Sets and exports MASTER_ADDR and MASTER_PORT; `hosts` holds
# the job's hosts, one to a line.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*}                         # rank 0 runs on the first host
# Jobs that share a host begin at different ports; this shell runs on the first host, and sees which one is taken.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
while (: <"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_PORT
