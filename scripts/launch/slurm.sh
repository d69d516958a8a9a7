#!/usr/bin/env bash
# Runs jaxrl under SLURM, a process for each GPU; submit it, and it submits itself again until it is done.
#
#   scripts/launch/slurm.sh [--dry-run] [OPTIONS OF sbatch ...] -- ARGUMENTS OF jaxrl run
#
#   scripts/launch/slurm.sh --nodes=2 --partition=h100 -- \
#       --config=configs/models/llama3_8b.py:h200-1 --config.mesh.fsdp=16 --workdir=/shared/runs/llama
#
# The workdir has to be on a file system that all nodes see. Nothing names a coordinator: in a SLURM step
# `jaxrl.sharding.start_distributed` has jax.distributed find the others by the variables of SLURM; each
# process takes the GPU of its own number on the node, so all of a node's have to be visible to it.
# Ten minutes before the time limit, and when it is preempted, every process gets SIGTERM, saves a
# checkpoint after the update in progress and ends with status 143; the job is then queued again, and the
# same command continues. --dry-run prints the command that submits, and the one that runs in the job.
#SBATCH --job-name=jaxrl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=jaxrl-%j.log
set -euo pipefail

say() { printf '%q ' "$@"; echo; }
step=(srun --gpu-bind=none --kill-on-bad-exit=1 --wait=600 "${PYTHON:-python3}" -m jaxrl run --quiet)

if [[ -n ${SLURM_JOB_ID:-} && ${JAXRL_SUBMITTED:-} ]]; then  # inside of the job
  status=0
  "${step[@]}" "$@" || status=$?
  if ((status == 143)); then  # stopped as asked, with a checkpoint
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit $status
fi

dry_run= options=()
while (($#)); do
  case $1 in
    --dry-run) dry_run=1 ;;
    --) shift; break ;;
    *) options+=("$1") ;;
  esac
  shift
done
[[ " $* " == *" --workdir="* ]] || {
  echo "slurm.sh: after -- come the arguments of jaxrl run, with --workdir=DIR" >&2; exit 2; }
submit=(sbatch --export=ALL,JAXRL_SUBMITTED=1 "${options[@]}" "${BASH_SOURCE[0]}" "$@")
if [[ $dry_run ]]; then
  say "${submit[@]}"
  say "${step[@]}" "$@"
else
  exec "${submit[@]}"
fi
