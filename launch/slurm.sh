#!/usr/bin/env bash
# Submits one command of ares_jax to SLURM, one process a node with all its GPUs. Five minutes before the time limit, or when
# it is preempted, the run saves, and the job is queued again until it is done. So it is after a crash, such as the loss of a
# process, --crashes times at most between two orderly ends; bad input (exit code 2) ends it. --workdir is on storage all
# nodes see.
# Nodes are taken whole, unless --cpus and --memory say how much of each. `convert` and `report` are one process, on one node.
#
#   launch/slurm.sh --nodes=4 --gpus=8 --workdir=/shared/runs/7b --config=configs/qwen2_5_vl_7b_aepo.py \
#     [--command=train] [--partition=P] [--time=24:00:00] [--cpus=32] [--memory=256G] [--python=.venv/bin/python] \
#     [--crashes=5] [--dry_run] [-- --config.x=y ...]
set -euo pipefail

nodes=1 gpus=8 workdir='' config='' command=train partition='' limit=24:00:00 cpus='' memory='' python=.venv/bin/python crashes=5 \
  dry_run=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --config=*) config=${1#*=} ;;
    --command=*) command=${1#*=} ;;
    --partition=*) partition=${1#*=} ;;
    --time=*) limit=${1#*=} ;;
    --cpus=*) cpus=${1#*=} ;;
    --memory=*) memory=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --crashes=*) crashes=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --) shift && break ;;
    *) echo "error: $1 is unknown; the head of $0 lists the flags" >&2 && exit 2 ;;
  esac
  shift
done
for flag in workdir config; do
  [[ -n ${!flag} ]] || { echo "error: --$flag is missing" >&2 && exit 2; }
done
[[ $workdir == /* ]] || { echo "error: --workdir=$workdir; give an absolute path that all nodes see" >&2 && exit 2; }

stop=$workdir
case $command in
  cold_start | train | evaluate) ;;
  convert | report) nodes=1 stop=/dev/null ;; # a run that was stopped is exported, not gone on with
  *) echo "error: --command=$command is none of cold_start, train, evaluate, convert, report" >&2 && exit 2 ;;
esac

share=$'#SBATCH --exclusive\n#SBATCH --mem=0' # all of it
[[ -z $cpus ]] || share="#SBATCH --cpus-per-task=$cpus${memory:+$'\n'#SBATCH --mem=$memory}"

printf -v line ' %q' launch/worker.sh "$stop" "$python" -m "ares_jax.$command" "--config=$config" "--workdir=$workdir" \
  --config.sampler.colocated=True "$@"

script() {
  cat <<BATCH
#!/usr/bin/env bash
#SBATCH --job-name=ares-$command
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=$gpus
$share
#SBATCH --time=$limit
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --output=$workdir/slurm.%j.log
${partition:+#SBATCH --partition=$partition}
set -uo pipefail
export XLA_PYTHON_CLIENT_MEM_FRACTION="\${XLA_PYTHON_CLIENT_MEM_FRACTION:-.95}" # JAX's default is three quarters
rm -f "$stop/stopped" # of the attempt before
# The cores are named, or srun gives a task one of them.
srun --label --kill-on-bad-exit=0 --cpus-per-task="\${SLURM_CPUS_PER_TASK:-\$SLURM_CPUS_ON_NODE}"$line
code=\$?
crashed="$workdir/crashes.\$SLURM_JOB_ID" # a line for each since the last orderly end
if [[ -e "$stop/stopped" ]]; then
  rm -f "\$crashed"
  scontrol requeue "\$SLURM_JOB_ID"
elif [[ \$code -ne 0 && \$code -ne 2 && \$(cat "\$crashed" 2>/dev/null | wc -l) -lt $crashes ]]; then
  date >> "\$crashed"
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
BATCH
}

if [[ -n $dry_run ]]; then
  script
else
  mkdir -p "$workdir"
  script | sbatch
fi
