#!/usr/bin/env bash
# Runs jaxrl on all hosts of a Cloud TPU slice: queued resource, installation, shared workdir, run.
#
#   scripts/launch/tpu_pod.sh [--dry-run] --name=NAME --zone=ZONE --type=TYPE --share=HOST:/EXPORT \
#       [--runtime=VERSION] [--project=PROJECT] [--spot] [--restarts=N] -- ARGUMENTS OF jaxrl run
#
#   scripts/launch/tpu_pod.sh --name=grpo --zone=us-east5-a --type=v5p-64 --share=10.0.0.2:/runs -- \
#       --config=configs/models/qwen3_4b.py:v5p-64 --workdir=/mnt/runs/grpo
#
# TYPE is Google's, as v5litepod-8 or v5p-64. --share is an NFS export (Filestore), mounted at /mnt/runs on
# every host, for checkpoints are read and written by all. Nothing names a coordinator: on TPU hosts
# `jaxrl.sharding.start_distributed` has jax.distributed find the others by the metadata server.
# A run that ends because a host was taken back (its processes save a checkpoint at SIGTERM, and at
# checkpoint.every) is started again on a new slice, up to --restarts times (0), by the same command.
# --dry-run prints the commands. Delete the slice when you are done:
#   gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
set -euo pipefail

dry_run= name= zone= type= share= runtime= project=() spot=() restarts=0
while (($#)); do
  case $1 in
    --dry-run) dry_run=1 ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --share=*) share=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --project=*) project=("--project=${1#*=}") ;;
    --spot) spot=(--spot) ;;
    --restarts=*) restarts=${1#*=} ;;
    --) shift; break ;;
    *) echo "tpu_pod.sh: unknown option $1; arguments of jaxrl run come after --" >&2; exit 2 ;;
  esac
  shift
done
for needed in name zone type share; do
  [[ -n ${!needed} ]] || { echo "tpu_pod.sh: --$needed=... is missing" >&2; exit 2; }
done
(($#)) || { echo "tpu_pod.sh: no arguments of jaxrl run after --" >&2; exit 2; }
[[ " $* " == *" --workdir=/mnt/runs/"* ]] || {
  echo "tpu_pod.sh: --workdir must be below /mnt/runs, where all hosts see $share" >&2; exit 2; }
case $type in
  v5litepod-*) : "${runtime:=v2-alpha-tpuv5-lite}" ;;
  v5p-*) : "${runtime:=v2-alpha-tpuv5}" ;;
  v6e-*) : "${runtime:=v2-alpha-tpuv6e}" ;;
  *) : "${runtime:=tpu-ubuntu2204-base}" ;;
esac

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
tpus=(gcloud compute tpus)
where=("--zone=$zone" "${project[@]}")

say() { printf '%q ' "$@"; echo; }
do_it() { if [[ $dry_run ]]; then say "$@"; else "$@"; fi; }
on_all() { do_it "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all "--command=$1"; }

state() { "${tpus[@]}" queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'; }

acquire() {
  do_it "${tpus[@]}" queued-resources create "$name" "--node-id=$name" "${where[@]}" \
    "--accelerator-type=$type" "--runtime-version=$runtime" "${spot[@]}"
  if [[ $dry_run ]]; then
    say "${tpus[@]}" queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
    return
  fi
  local found
  until found=$(state); [[ $found == ACTIVE ]]; do
    [[ $found == FAILED ]] && { echo "tpu_pod.sh: the request for $name failed" >&2; exit 1; }
    sleep 30
  done
}

prepare() {
  do_it "${tpus[@]}" tpu-vm scp --recurse --compress "${where[@]}" --worker=all "$here" "$name:jaxrl"
  on_all "curl -LsSf https://astral.sh/uv/install.sh | sh && cd jaxrl && ~/.local/bin/uv venv --quiet --clear \
--python 3.11 .venv && ~/.local/bin/uv pip install --quiet --editable '.[tpu]'"  # the image's Python is older
  on_all "sudo apt-get -qq install -y nfs-common && sudo mkdir -p /mnt/runs && (mountpoint -q /mnt/runs || \
sudo mount -t nfs $share /mnt/runs)"
}

printf -v arguments ' %q' "$@"
for ((try = 0; ; try++)); do
  if [[ $dry_run ]] || [[ $(state 2>/dev/null) != ACTIVE ]]; then
    acquire
    prepare
  fi
  if on_all "cd jaxrl && exec .venv/bin/jaxrl run --quiet$arguments"; then
    exit 0
  fi
  ((try < restarts)) || { echo "tpu_pod.sh: the run ended; the same command continues it" >&2; exit 1; }
  [[ $(state 2>/dev/null) == ACTIVE ]] ||
    do_it "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
done
