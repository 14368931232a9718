#!/usr/bin/env bash
# Makes a TPU VM ready for launch/worker.sh: ends what an earlier attempt left running, installs, mounts the bucket. It may be
# run again. launch/tpu_vm.sh runs it on every worker, in the clone's folder. Usage: launch/tpu_host.sh BUCKET FOLDER
set -euo pipefail
bucket=$1 folder=$2

# Where the connection broke the command runs on, and holds the chips. It saves and goes.
if old=$(cat ares.pid 2>/dev/null) && [[ $(ps -o args= -p "$old") == *launch/worker.sh* ]]; then
  kill -TERM "$old"
  while kill -0 "$old" 2>/dev/null; do sleep 1; done
fi

# The images come with Python 3.10, JAX wants 3.11: uv brings it.
uv=$HOME/.local/bin/uv
[[ -x $uv ]] || curl -LsSf https://astral.sh/uv/install.sh | sh
[[ -x .venv/bin/python ]] || "$uv" venv --quiet --python 3.11 .venv
"$uv" pip install --quiet --python .venv/bin/python -r requirements.txt 'jax[tpu]' libtpu==0.0.42.1

if ! command -v gcsfuse >/dev/null; then # from Google's own packages: Ubuntu has none
  key=/usr/share/keyrings/cloud.google.asc
  curl -sS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq
  sudo apt-get install -y -qq gcsfuse
fi
# By the user, who writes there. By itself gcsfuse remembers files for ever on TPU machines, also those that another host has
# changed. A checkpoint is a folder that is renamed: at once in a bucket with a hierarchical namespace, else file by file.
if ! mountpoint -q "$folder"; then
  sudo mkdir -p "$folder"
  sudo chown "$(id -u):$(id -g)" "$folder"
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 --rename-dir-limit=1000000 \
    "$bucket" "$folder"
fi
