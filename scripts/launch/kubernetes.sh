#!/usr/bin/env bash
# Runs jaxrl on Kubernetes as the JobSet of jobset.yaml: a pod for each node with GPUs.
#
#   scripts/launch/kubernetes.sh [--dry-run] --name=NAME --image=IMAGE --pods=N --gpus=N --claim=CLAIM \
#       [--grace=SECONDS] -- ARGUMENTS OF jaxrl run
#
#   scripts/launch/kubernetes.sh --name=llama --image=REGISTRY/jaxrl --pods=2 --gpus=8 --claim=runs -- \
#       --config=configs/models/llama3_8b.py:h200-1 --config.mesh.fsdp=16 --workdir=/runs/llama
#
# IMAGE has jaxrl installed, CLAIM is a volume that all pods can write, mounted at /runs. --grace (900) is the
# time between SIGTERM and the end of a pod: that of one update and one checkpoint. --dry-run prints the
# manifest and the command that would be given it.
set -euo pipefail

dry_run= NAME= IMAGE= PODS= GPUS= CLAIM= GRACE=900
while (($#)); do
  case $1 in
    --dry-run) dry_run=1 ;;
    --name=*) NAME=${1#*=} ;;
    --image=*) IMAGE=${1#*=} ;;
    --pods=*) PODS=${1#*=} ;;
    --gpus=*) GPUS=${1#*=} ;;
    --claim=*) CLAIM=${1#*=} ;;
    --grace=*) GRACE=${1#*=} ;;
    --) shift; break ;;
    *) echo "kubernetes.sh: unknown option $1; arguments of jaxrl run come after --" >&2; exit 2 ;;
  esac
  shift
done
for needed in NAME IMAGE PODS GPUS CLAIM; do
  [[ -n ${!needed} ]] || { echo "kubernetes.sh: --${needed,,}=... is missing" >&2; exit 2; }
done
[[ " $* " == *" --workdir=/runs/"* ]] || {
  echo "kubernetes.sh: --workdir must be below /runs, which all pods see" >&2; exit 2; }

quoted=()
for argument in "$@"; do  # as a list of YAML, in single quotes
  quoted+=("'${argument//\'/\'\'}'")
done
ARGUMENTS="[$(IFS=,; echo "${quoted[*]}")]"
manifest=$(<"$(dirname "${BASH_SOURCE[0]}")/jobset.yaml")
for name in NAME IMAGE PODS GPUS CLAIM GRACE ARGUMENTS; do
  manifest=${manifest//"\${$name}"/"${!name}"}
done
manifest=$(grep -v '^#' <<<"$manifest")

if [[ $dry_run ]]; then
  echo "# kubectl apply --filename=-"
  echo "$manifest"
else
  kubectl apply --filename=- <<<"$manifest"
fi
