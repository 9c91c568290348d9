#!/bin/sh
# Uses the module: what is written to its file is read there.
set -e
[ "$(cat /proc/good)" = "${1:-42}" ]
echo 7 >/proc/good
[ "$(cat /proc/good)" = 7 ]
if echo x >/proc/good; then
    echo "what is no number was taken" >&2
    exit 1
fi 2>/dev/null
echo "all as it should be"
