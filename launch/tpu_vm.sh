#!/usr/bin/env bash
# Runs one command of ares_jax on every worker of a Cloud TPU slice; makes the slice, and makes it again when it is
# preempted, until the command has ended. The workers' output is gathered in --logs. The workdir is a folder of a bucket.
# `convert` and `report` are one process: they run on the first worker.
#
#   launch/tpu_vm.sh --name=ares --zone=us-east5-a --type=v5p-128 --bucket=my-bucket --workdir=runs/7b \
#     --config=configs/qwen2_5_vl_7b_aepo.py [--command=train] [--spot] [--dry_run] [-- --config.aepo.steps=100 ...]
set -euo pipefail

name='' zone='' type='' bucket='' workdir='' config='' command=train runtime='' logs=logs attempts=20 spot='' dry_run=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --config=*) config=${1#*=} ;;
    --command=*) command=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --logs=*) logs=${1#*=} ;;
    --attempts=*) attempts=${1#*=} ;;
    --spot) spot=1 ;;
    --dry_run) dry_run=1 ;;
    --) shift && break ;;
    *) echo "error: $1 is unknown; the head of $0 lists the flags" >&2 && exit 2 ;;
  esac
  shift
done
for flag in name zone type bucket workdir config; do
  [[ -n ${!flag} ]] || { echo "error: --$flag is missing" >&2 && exit 2; }
done
if [[ -z $runtime ]]; then
  case $type in
    v4-*) runtime="tpu-ubuntu2204-base" ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) echo "error: --type=$type is none of v4-, v5litepod-, v5p-, v6e-; or name its --runtime" >&2 && exit 2 ;;
  esac
fi

case $command in
  cold_start | train | evaluate) workers=all ;;
  convert | report) workers=0 ;;
  *) echo "error: --command=$command is none of cold_start, train, evaluate, convert, report" >&2 && exit 2 ;;
esac

tpu=(gcloud compute tpus tpu-vm)
mounted=/mnt/ares
stop=$mounted/$workdir
[[ $workers == all ]] || stop=/dev/null # a run that was stopped is exported, not gone on with

run() { # prints a command, and runs it unless this is a dry run
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [[ -n $dry_run ]] || "$@"
}

on() { # a shell command on these workers, their output into a folder of its own
  local folder=$logs/$2
  [[ -n $dry_run ]] || mkdir -p "$folder"
  run "${tpu[@]}" ssh "$name" --zone="$zone" --worker="$1" --output-directory="$folder" --command="$3"
}

state() {
  [[ -z $dry_run ]] || { echo READY && return; }
  "${tpu[@]}" describe "$name" --zone="$zone" --format='value(state)' 2>/dev/null || echo MISSING
}

make_slice() {
  run "${tpu[@]}" delete "$name" --zone="$zone" --quiet || true
  run "${tpu[@]}" create "$name" --zone="$zone" --accelerator-type="$type" --version="$runtime" ${spot:+--spot}
}

archive=$(mktemp --suffix=.tgz)
trap 'rm -f "$archive"' EXIT

prepare() {
  # 1: a file changed meanwhile, such as a log
  run tar --exclude=./.venv --exclude=./.git --exclude=./runs --exclude="./$logs" -czf "$archive" . || [[ $? -eq 1 ]] || return
  run "${tpu[@]}" scp "$archive" "$name:ares.tgz" --zone="$zone" --worker=all || return
  on all prepare "mkdir -p ares && tar -xzf ares.tgz -C ares && cd ares && launch/tpu_host.sh $bucket $mounted"
}

printf -v overrides ' %q' "$@"
[[ $# -gt 0 ]] || overrides=''
# The number of the process, for the next attempt: this one may outlive its connection.
line="cd ares && echo \$\$ > ares.pid && exec launch/worker.sh $stop .venv/bin/python -m ares_jax.$command"
line+=" --config=$config --workdir=$mounted/$workdir --config.sampler.colocated=True$overrides"

for ((attempt = 1; attempt <= attempts; attempt++)); do
  if [[ -n $dry_run || $(state) != READY ]]; then
    make_slice || { sleep 60 && continue; }
  fi
  if prepare && on "$workers" "$command.$attempt" "$line"; then
    echo "done; the workers' output is in $logs/$command.$attempt"
    exit 0
  fi
  echo "attempt $attempt of $attempts ended, the slice is $(state); the next one resumes" >&2
  sleep 10
done
echo "error: not done after $attempts attempts; $logs has every worker's output" >&2
exit 1
