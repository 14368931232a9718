#!/usr/bin/env bash
# Runs one command on one host and hands SIGTERM on to it. A command that was told to go saves and exits with 0; here it
# ends with 75, so that a scheduler starts it again. Usage: launch/worker.sh WORKDIR COMMAND...
# For a command that has no end of its own, such as a service, WORKDIR is -: it is started again whenever it ends.
set -uo pipefail
workdir=$1
shift
trap 'kill -TERM $!' TERM
"$@" &
child=$!
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the command
  wait "$child"
  code=$?
done
if [[ $code -eq 0 && ($workdir == - || -e $workdir/stopped) ]]; then
  exit 75
fi
exit "$code"
