#!/usr/bin/env bash
# How long a run takes as a whole, beside bare QEMU: the same kernel (Debian's 6.12), the same memory,
# one CPU, TCG, in one go. Puts a table on top of bench/results/boot.md.
#
# Bare QEMU is what anybody would type first: `-cpu max -kernel vmlinuz -initrd X`, where X holds a
# busybox that powers off at once. vmlab mounts the host's root as well and runs a command on it.
set -euo pipefail

# shellcheck source=bench/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

runs=${RUNS:-20}
memory=512
kernel=debian:6.12
wanted=0.8

need_toolchain
need_vmlab
need hyperfine hyperfine
need busybox-static /bin/busybox
install_needed

cargo build --release --locked --quiet
vmlab=$(target_dir)/release/vmlab
"$vmlab" kernel pull "$kernel"
inspect=$("$vmlab" kernel inspect "$kernel" --json)
field() { sed -nE "s/.*\"$1\": ?\"([^\"]+)\".*/\1/p" <<<"$inspect" | head -n 1; }
image=$(field boot_image)
release=$(field release)
[ -f "$image" ] || die "\`vmlab kernel inspect $kernel --json\` names no boot_image"

mkdir -p "$work/initrd/bin"
cp /bin/busybox "$work/initrd/bin/busybox"
printf '#!/bin/busybox sh\nexec /bin/busybox poweroff -f\n' >"$work/initrd/init"
chmod 755 "$work/initrd/init" "$work/initrd/bin/busybox"
(cd "$work/initrd" && printf '%s\n' . bin bin/busybox init | /bin/busybox cpio -o -H newc 2>/dev/null) |
    gzip >"$work/initrd.gz"

bare=(qemu-system-x86_64 -accel tcg -cpu max -m "$memory" -nographic -no-reboot
    -kernel "$image" -initrd "$work/initrd.gz" -append "console=ttyS0 panic=-1")
ours=("$vmlab" run --accel tcg -m "${memory}M" -c 1 -k "$kernel" -- true)

# Both must really do their work before their time means anything.
"${bare[@]}" </dev/null >"$work/console" 2>&1 || die "bare QEMU failed: $(tail -n 5 "$work/console")"
grep -q 'Power down' "$work/console" || die "bare QEMU did not power off: $(tail -n 5 "$work/console")"
"${ours[@]}" </dev/null
proof=$("$vmlab" run --accel tcg -m "${memory}M" -c 1 -k "$kernel" -- uname -r </dev/null)
[ "$proof" = "$release" ] || die "vmlab ran under $proof and not under $release"

load=$(cut -d " " -f 1 /proc/loadavg)

# Short alternating rounds, so that a change in the machine's load meets both.
rounds=4
for round in $(seq "$rounds"); do
    hyperfine --style none -N --warmup 1 --runs "$(((runs + rounds - 1) / rounds))" \
        --export-json "$work/$round.json" \
        -n bare "${bare[*]@Q}" -n vmlab "${ours[*]@Q}" >/dev/null
done

# times NAME: all times of one command in seconds, in order.
times() {
    awk -v name="$1" '
        /"command":/ { on = index($0, "\"" name "\"") }
        /"times":/ { list = on; next }
        /\]/ { list = 0 }
        list { gsub(/[ ,]/, ""); print }' "$work"/*.json | sort -n
}
median() { awk '{ t[NR] = $1 } END { print (t[int((NR + 1) / 2)] + t[int(NR / 2) + 1]) / 2 }'; }
row() {
    local list
    list=$(times "$2")
    [ -n "$list" ] || die "hyperfine gave no times for $2"
    printf '| %s | %.2f s | %.2f s | %.2f s | %d |\n' "$1" "$(median <<<"$list")" \
        "$(head -n 1 <<<"$list")" "$(tail -n 1 <<<"$list")" "$(wc -l <<<"$list")"
}
ratio=$(awk -v a="$(times vmlab | median)" -v b="$(times bare | median)" 'BEGIN { printf "%.2f", a / b }')

{
    heading
    echo
    echo "$(machine), guest kernel $release, $memory MB, one vCPU, TCG; load average $load before."
    echo
    echo "| whole process | median | fastest | slowest | runs |"
    echo "|---|---|---|---|---|"
    row "bare QEMU, busybox powers off" bare
    row "vmlab run -- true" vmlab
    echo
    echo "vmlab / bare QEMU: **$ratio** (wanted: at most $wanted)."
    echo
} | publish boot
