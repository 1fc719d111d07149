#!/bin/sh
# Encode every picture below a folder into a folder of the same shape, check the results, and compare sizes.
# Run it again after an interruption: what is done stays done.
#
# usage: convert_tree.sh SOURCE TARGET [OPTION OF lic encode]...
set -eu

if [ $# -lt 2 ] || [ ! -d "$1" ]; then
    echo "usage: ${0##*/} SOURCE TARGET [OPTION OF lic encode]..." >&2
    exit 2
fi
source=$1 target=$2
shift 2

status=0
lic encode "$source" --output-dir "$target" --recursive --no-clobber "$@" || status=$?
if [ "$status" -gt 1 ] || [ ! -d "$target" ]; then # usage, interrupted, nothing to do; 1: some files failed
    exit "$status"
fi
find "$target" -type f -name '*.lic' -exec lic verify --quiet {} + || status=1

kilobytes() { du -sk "$1" | cut -f 1; }
echo "$source: $(kilobytes "$source") kB, $target: $(kilobytes "$target") kB" >&2
exit "$status"
