#!/usr/bin/env bash
# A stage as a Ray job, followed to its end:  cluster/submit.sh ID COMMAND...
#
#   export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=ray-token
#   cluster/submit.sh mine-train gist-ray train mine.yaml --resume
#
# The current folder goes along (100 MiB at most, without what .rayignore and .gitignore name). The id is the caller's:
# while a job of that id runs, it is followed, not started again; once it is over, it makes room for the next try, which
# goes on from what lies on the storage. Exit code: 0 if and only if the job's status is SUCCEEDED. Ray's own commands
# end with 0 for a job that was stopped, too. Ctrl-C leaves the job running; `ray job stop ID` ends it.
set -euo pipefail

if (($# < 2)); then
    echo "usage: cluster/submit.sh ID COMMAND..." >&2
    exit 2
fi
if [[ -z ${RAY_API_SERVER_ADDRESS:-} ]]; then
    echo "cluster/submit.sh: export RAY_API_SERVER_ADDRESS, the dashboard's URL, e.g. http://127.0.0.1:8265" >&2
    exit 2
fi
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} # unset, `ray job` would send no token
id=$1
shift

# The status in one word, lower case; "none" if the cluster knows no job of that id.
status() {
    local said
    if ! said=$(ray job status --log-style record --log-color false "$id" 2>&1); then
        if grep -q "does not exist" <<<"$said"; then
            echo none
            return
        fi
        tail -n 3 <<<"$said" >&2
        return 1
    fi
    case $said in
        *"'$id' succeeded"*) echo succeeded ;;
        *"'$id' failed"*) echo failed ;;
        *"'$id' was stopped"*) echo stopped ;;
        *) echo running ;; # or waiting for its turn
    esac
}

now=$(status)
if [[ $now != running ]]; then
    if [[ $now != none ]]; then
        ray job delete "$id" >/dev/null
    fi
    ray job submit --submission-id "$id" --no-wait --working-dir . -- "$@" >/dev/null
fi
unanswered=0
shown=no
while :; do
    if now=$(status); then
        unanswered=0
    elif ((++unanswered < 10)); then # the network, or a head that restarts: no end of the job
        sleep 5
        continue
    else
        exit 1
    fi
    [[ $now == running || $shown == no ]] || break
    # A connection that breaks is no end of the job: ask how it is, and follow again, from the start.
    if ray job logs --follow "$id"; then
        shown=yes
    fi
    [[ $now == running ]] || break
    sleep 2
done
echo "cluster/submit.sh: $id $now" >&2
[[ $now == succeeded ]]
