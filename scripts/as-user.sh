#!/usr/bin/env bash
# as-user.sh WORK REPO TARGET USER PROGRAM [ARGUMENT...]
# Runs a test program from below TARGET as USER, as cargo would. For test.sh; as root.
#
# The user sees copies of the sources and of the programs at the very paths that are compiled into
# the programs, in a mount namespace of their own: those paths may be in a directory, such as /root,
# that is closed to others. The copies are in WORK, which every user can reach.
set -euo pipefail
work=$1 repo=$2 target=$3 user=$4
shift 4
home=$work/home

if [ -z "${AS_USER_INSIDE:-}" ]; then
    mkdir -p "$home/.cache" "$home/tmp" "$work/repo" "$work/target"
    tar -c -C "$repo" --exclude=./target --exclude=./fuzz/target --exclude=./.git . |
        tar -x -C "$work/repo"
    for program in "$target/debug/vmlab" "$1"; do
        install -D -m 755 "$program" "$work/target/${program#"$target"/}"
    done
    # What was fetched once need not be fetched again.
    cache=${VMLAB_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/vmlab}
    if [ -d "$cache" ]; then cp -a --reflink=auto "$cache" "$home/.cache/vmlab"; fi
    chown -R "$user:" "$home" "$work/repo" "$work/target"
    chmod 700 "$home"
    AS_USER_INSIDE=1 exec unshare --mount --propagation private -- \
        bash "$0" "$work" "$repo" "$target" "$user" "$@"
fi

# place SOURCE PATH: mounts SOURCE at PATH, where every user can reach it.
place() {
    local parent=$2 closed=
    while parent=$(dirname "$parent") && [ "$parent" != / ]; do
        runuser -u "$user" -- test -x "$parent" || closed=$parent
    done
    if [ -n "$closed" ]; then mount -t tmpfs -o mode=711 tmpfs "$closed"; fi
    (umask 022 && mkdir -p "$2")
    mount --bind "$1" "$2"
}
place "$work/repo" "$repo"
place "$work/target" "$target"

# The package's directory is where cargo runs tests.
cd "$repo/crates/vmlab-cli"
exec runuser -u "$user" -- env -i \
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" "HOME=$home" "USER=$user" \
    "LOGNAME=$user" "SHELL=/bin/bash" "LANG=${LANG:-C.UTF-8}" "TMPDIR=$home/tmp" \
    "CARGO_MANIFEST_DIR=$PWD" "$@"
