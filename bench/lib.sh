# Shared by the benchmarks; sourced, not run.
# shellcheck shell=bash

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
. "$repo/scripts/lib.sh"
cd "$repo" || exit

work=$(mktemp -d /tmp/vmlab-bench.XXXXXX)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# The heading of a table: when, and of which commit.
heading() {
    local commit
    commit=$(git rev-parse --short HEAD)
    git diff --quiet HEAD -- . ':!bench/results' || commit="$commit, with changes"
    echo "## $(date -u +'%Y-%m-%d %H:%M') UTC, commit $commit"
}

# What the numbers come from, as the beginning of a sentence.
machine() {
    local cpu qemu
    cpu=$(sed -nE 's/^model name\s*: //p' /proc/cpuinfo | head -n 1)
    qemu=$(qemu-system-x86_64 --version | sed -nE 's/.*version ([0-9.]+).*/\1/p')
    echo "$(nproc) CPUs ($cpu), QEMU $qemu"
}

# of_kernel FIELD KERNEL: what $vmlab says of a kernel that it has, such as its boot_image.
of_kernel() {
    local found
    # shellcheck disable=SC2154
    found=$("$vmlab" kernel inspect "$2" --json | sed -nE "s/.*\"$1\": ?\"([^\"]+)\".*/\1/p" | head -n 1)
    [ -n "$found" ] || die "\`vmlab kernel inspect $2 --json\` names no $1"
    echo "$found"
}

# without_kvm FILE: makes a program that runs its arguments where there is no /dev/kvm.
without_kvm() {
    cat >"$1" <<'END'
#!/bin/sh
exec unshare --mount sh -c '
    dir=$(mktemp -d) && mount -t tmpfs dev "$dir" && cd /dev &&
    cp -a null zero full random urandom tty "$dir" && cd "$dir" && mkdir pts shm &&
    mount --bind /dev/pts pts && ln -s pts/ptmx ptmx && ln -s /proc/self/fd fd &&
    ln -s fd/0 stdin && ln -s fd/1 stdout && ln -s fd/2 stderr &&
    cd / && mount --move "$dir" /dev && rmdir "$dir" && exec "$@"' sh "$@"
END
    chmod 755 "$1"
}

# publish NAME: prints the table on stdin, and puts it on top of bench/results/NAME.md.
publish() {
    local results=$repo/bench/results/$1.md
    cat >"$work/table"
    {
        sed -n '1,/^<!-- newest first -->$/p' "$results"
        echo
        printf '%s\n\n' "$(cat "$work/table")"
        sed '1,/^<!-- newest first -->$/d' "$results" | sed '/./,$!d'
    } >"$work/results.md"
    cp "$work/results.md" "$results"
    cat "$work/table"
}
