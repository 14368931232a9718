#!/usr/bin/env bash
# A JobSet on GKE: one learner slice of any size, and sampler slices of one host each, which it reaches by HTTP. The learner
# restarts the set when it is lost; a lost sampler comes back by itself. Needs JobSet 0.5 or newer in the cluster, an image
# (launch/Dockerfile), a volume claim for the workdir, and: kubectl create secret generic ares-token --from-literal=token=...
#
#   launch/gke.sh --name=ares --image=IMAGE --claim=ares-runs --workdir=7b --config=configs/qwen2_5_vl_7b_aepo.py \
#     --learner=tpu-v5p-slice:4x4x8:32:4 --sampler=tpu-v6e-slice:2x2:1:4 --samplers=8 [--command=train] [--dry_run] \
#     -- --config.sampler.tensor=4 [--config.x=y ...]
#
# A slice is ACCELERATOR:TOPOLOGY:HOSTS:CHIPS_PER_HOST, as in GKE's node pools. A sampler uses the first sampler.tensor chips of
# its host.
set -euo pipefail

name='' image='' claim='' workdir='' config='' learner='' sampler='' samplers=1 command=train restarts=20 dry_run=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --claim=*) claim=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --config=*) config=${1#*=} ;;
    --learner=*) learner=${1#*=} ;;
    --sampler=*) sampler=${1#*=} ;;
    --samplers=*) samplers=${1#*=} ;;
    --command=*) command=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --) shift && break ;;
    *) echo "error: $1 is unknown; the head of $0 lists the flags" >&2 && exit 2 ;;
  esac
  shift
done
for flag in name image claim workdir config learner sampler; do
  [[ -n ${!flag} ]] || { echo "error: --$flag is missing" >&2 && exit 2; }
done

case $command in
  cold_start | train | evaluate) ;;
  *) echo "error: --command=$command is none of cold_start, train, evaluate; others are one process: run them in one pod" >&2
     exit 2 ;;
esac

quoted() { # a YAML (and JSON) string
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

urls=''
for ((i = 0; i < samplers; i++)); do
  urls+="${urls:+,}http://$name-sampler-$i-0.$name:8000"
done

job() { # NAME REPLICAS SLICE BACKOFF RESTART_POLICY STOP MODULE FLAGS...
  local job=$1 replicas=$2 backoff=$4 restart=$5 stop=$6 module=$7 accelerator topology hosts chips flag exclusive=''
  IFS=: read -r accelerator topology hosts chips <<<"$3"
  [[ -n $chips ]] || { echo "error: slice $3 is no ACCELERATOR:TOPOLOGY:HOSTS:CHIPS_PER_HOST" >&2 && return 2; }
  shift 7
  # A slice of several hosts is a node pool of its own; slices of one host share one.
  [[ $hosts -eq 1 ]] || exclusive='
        metadata:
          annotations: {alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}'
  cat <<YAML
    - name: $job
      replicas: $replicas
      template:$exclusive
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: $backoff
          template:
            spec:
              restartPolicy: $restart
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology
              containers:
                - name: $job
                  image: $(quoted "$image")
                  workingDir: /ares
                  command: [launch/worker.sh, $(quoted "$stop"), python, -m, ares_jax.$module]
                  args:
                    - $(quoted "--config=$config")
YAML
  for flag in "$@"; do
    printf '                    - %s\n' "$(quoted "$flag")"
  done
  cat <<YAML
                  env:
                    - name: ARES_TOKEN
                      valueFrom: {secretKeyRef: {name: ares-token, key: token}}
                  ports:
                    - containerPort: 8000
                  resources:
                    limits: {google.com/tpu: $chips}
                  volumeMounts:
                    - {name: runs, mountPath: /runs}
                    - {name: shm, mountPath: /dev/shm}
              volumes:
                - name: shm # data.workers hand over what they read through it; a container has 64 MB
                  emptyDir: {medium: Memory}
                - name: runs
                  persistentVolumeClaim: {claimName: $(quoted "$claim")}
YAML
}

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  network: {enableDNSHostnames: true, subdomain: $name}
  failurePolicy: {maxRestarts: $restarts}
  successPolicy: {operator: All, targetReplicatedJobs: [learner]}
  replicatedJobs:
YAML
  # The slices come up one by one: the learner waits half an hour for samplers, not five minutes.
  job learner 1 "$learner" 0 Never "/runs/$workdir" "$command" "--workdir=/runs/$workdir" "--config.sampler.url=$urls" \
    --config.sampler.start_timeout=1800 "$@"
  # Samplers have folders of their own: a run's folder has one writer. They get their weights from the learner.
  job sampler "$samplers" "$sampler" 1000 OnFailure - serve "--workdir=/tmp/sampler" "--config.sampler.host=0.0.0.0" \
    "--config.sampler.port=8000" "$@"
}

if [[ -n $dry_run ]]; then
  manifest "$@"
else
  text=$(manifest "$@")
  kubectl apply -f - <<<"$text"
  echo "kubectl logs --follow --prefix --max-log-requests=1000 --selector=jobset.sigs.k8s.io/jobset-name=$name shows all output"
fi
