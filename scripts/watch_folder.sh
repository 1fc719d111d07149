#!/bin/sh
# Encode pictures as they arrive in a folder. With inotifywait (inotify-tools) at once, without it by polling.
# What was encoded once is not encoded again; a file that fails is tried again when the folder next changes.
#
# usage: watch_folder.sh SOURCE TARGET [OPTION OF lic encode]...
# INTERVAL: seconds between two looks, 2 by default.
set -eu

if [ $# -lt 2 ] || [ ! -d "$1" ]; then
    echo "usage: ${0##*/} SOURCE TARGET [OPTION OF lic encode]..." >&2
    exit 2
fi
source=$1 target=$2
shift 2
interval=${INTERVAL:-2}

listing() { find "$source" -type f -exec ls -ln {} + 2>/dev/null || :; }

pause() {
    if command -v inotifywait >/dev/null; then
        inotifywait -qq -r -t "$interval" -e create,close_write,moved_to "$source" || [ $? -eq 2 ] || sleep "$interval"
    else
        sleep "$interval"
    fi
}

trap 'exit 0' INT TERM
done= allowed=1
while :; do
    seen=$(listing)
    if [ "$seen" != "$done" ]; then
        sleep 1 # a file that still grows is not complete
        if [ "$seen" = "$(listing)" ]; then
            # 1: some failed, and have been named; another picture may still work. 2 at the first time: wrong
            # options, which no later picture changes; then: two pictures of one name, of which one may go.
            status=0
            lic encode "$source" --output-dir "$target" --recursive --no-clobber "$@" || status=$?
            [ "$status" -le "$allowed" ] || exit "$status"
            done=$seen allowed=2
        fi
    else
        pause
    fi
done
