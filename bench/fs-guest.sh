#!/usr/bin/env bash
# The guest's part of bench/fs.sh: mounts each file server and does the same work on each in turn.
# fs-guest.sh SCRATCH ROUNDS SYSROOT SERVER...: prints a line "ROW SERVER SECONDS" for each measurement.
#
# SCRATCH is a directory of the host that holds a source tree, `tree`, a program, `files`, and room
# for what the work makes. SYSROOT is where the Rust toolchain is. A server is the tag of a share of the
# host's root.
set -euo pipefail

scratch=$1 rounds=$2 sysroot=$3
shift 3

# Only what comes from the server is measured: this is the guest's own memory.
mkdir -p /tmp/bench
mount -t tmpfs tmpfs /tmp/bench

for server in "$@"; do
    mkdir /tmp/bench/"$server"
    case $server in
        9p*)
            modprobe -a 9pnet_virtio 9p
            mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=mmap \
                "$server" /tmp/bench/"$server"
            ;;
        *) mount -t virtiofs "$server" /tmp/bench/"$server" ;;
    esac
done

cp "/tmp/bench/$1$scratch/files" /tmp/bench/files

cold() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
}

# row ROW SERVER COMMAND...: how long it takes.
row() {
    local name=$1 server=$2 before after
    shift 2
    before=$EPOCHREALTIME
    "$@" >/tmp/bench/output 2>/tmp/bench/errors || {
        echo "$name on $server failed: $*" >&2
        tail -n 5 /tmp/bench/errors >&2
        exit 1
    }
    after=$EPOCHREALTIME
    echo "$name $server $((${after/./} - ${before/./}))"
}

# same WHAT: the output is that of the first server that did this.
same() {
    local digest
    digest=$(sha256sum </tmp/bench/output)
    if [ ! -e "/tmp/bench/same-$1" ]; then
        echo "$digest" >"/tmp/bench/same-$1"
    elif [ "$digest" != "$(cat "/tmp/bench/same-$1")" ]; then
        echo "$server gives another answer to $1" >&2
        exit 1
    fi
}

count() { find "$1/usr" -xdev | wc -l; }
search() { grep -rc "unsafe impl" "$1" | awk -F: '{ sum += $NF } END { print sum }'; }
# Nothing is written, and inode numbers do not count: 9p has its own, and the next would pay for that.
git_status() { git --no-optional-locks -c core.checkStat=minimal -C "$1" status --short; }
# The toolchain comes from the server, too.
build() {
    (
        cd "$1/crate"
        PATH=$2$sysroot/bin:$PATH CARGO_TARGET_DIR=$1/target cargo build --quiet --offline
    )
}

# What can be done where nothing is written.
read_rows() {
    local server=$1 mnt=$2 dir=$2$scratch
    cold
    row find-cold "$server" count "$mnt"
    same find
    row find-warm "$server" count "$mnt"
    same find
    cold
    row grep "$server" search "$dir/tree"
    same grep
    cold
    row git-status "$server" git_status "$dir/tree"
    same git
    row git-status-warm "$server" git_status "$dir/tree"
    same git
    cold
    row read "$server" dd "if=$dir/big" of=/dev/null bs=1M
    cold
    row random "$server" /tmp/bench/files random "$dir/big" 20000
}

write_rows() {
    local server=$1 mnt=$2 dir=$2$scratch
    row write "$server" dd if=/dev/zero "of=$dir/new" bs=1M count=200 conv=fsync
    rm "$dir/new"
    row files-create "$server" /tmp/bench/files create "$dir/small" 20000
    row files-stat "$server" /tmp/bench/files stat "$dir/small" 20000
    row files-unlink "$server" /tmp/bench/files unlink "$dir/small" 20000
    cold
    row build "$server" build "$dir" "$mnt"
    rm -r "$dir/target"
}

for round in $(seq "$rounds"); do
    # Whoever comes first would pay for what the machine has to read from its disk.
    set -- "${@:2}" "$1"
    for server in "$@"; do
        # Once is enough for what takes minutes.
        if [ "$server" = 9p ] && [ "$round" -gt 1 ]; then continue; fi
        read_rows "$server" "/tmp/bench/$server"
        if [ "$server" != fixed ]; then write_rows "$server" "/tmp/bench/$server"; fi
        echo "round $round of $rounds: $server is done" >&2
    done
done
