#!/usr/bin/env bash
# A sweep as a job of a Ray cluster that is already running; the job goes on when this shell is closed.
#
#   export RAY_ADDRESS=http://HEAD:8265 RAY_AUTH_MODE=token RAY_AUTH_TOKEN=...
#   deploy/job-submit.sh conf=qwen_sweep limit=100
#
# LMSWEEP_HOME is the checkout as the nodes see it; this one when unset. It is no --working-dir on purpose: Ray would run
# the sweep in a temporary copy of it and delete that after the job, with the runs that are written there.
#
# Ends with 0 when the launch ended with 0 or was stopped by `ray job stop`, and with 1 otherwise; Ray's last message
# tells the launch's own code.
# `ray job stop` sends SIGTERM and waits, by what is set here, a minute instead of three seconds for its end.
set -euo pipefail
home=${LMSWEEP_HOME:-$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
# shellcheck disable=SC2016
exec ray job submit --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}' -- \
    sh -c 'cd "$0" && exec .venv/bin/python launch.py "$@"' "$home" "$@"
