#!/bin/sh
# What is written to the module's file is read there. The argument, if any, is what should be there at first.
set -e
[ -z "$1" ] || [ "$(cat /proc/good)" = "$1" ]
echo 7 >/proc/good
[ "$(cat /proc/good)" = 7 ]
if (echo x >/proc/good) 2>/dev/null; then
    echo "what is no number was taken" >&2
    exit 1
fi
echo "all as it should be"
