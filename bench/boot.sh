#!/usr/bin/env bash
# How long a run takes as a whole, beside bare QEMU: the same kernel (Debian's 6.12 for clouds), the same
# memory, one CPU, TCG, in one go. Puts a table on top of bench/results/boot.md.
#
# Bare QEMU is what anybody would type first: `-cpu max -kernel vmlinuz -initrd X`, where X holds a
# busybox that powers off at once. vmlab runs a command, and but for the smallest row it mounts the host's
# root and the working directory, writable, as well.
#
# Where vmtest (danobi/vmtest) or vng (virtme-ng) are in PATH and PEER_KERNEL names a bzImage that has what
# they need built in (9p, virtio), they run beside bare QEMU and vmlab on that kernel.
set -euo pipefail

# shellcheck source=bench/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

runs=${RUNS:-20}
repeat=${REPEAT:-50}
memory=512
kernel=debian:6.12-cloud

need_toolchain
need_vmlab
need hyperfine hyperfine
need busybox-static /bin/busybox
install_needed

cargo build --release --locked --quiet
vmlab=$(target_dir)/release/vmlab
"$vmlab" kernel pull "$kernel"
image=$(of_kernel boot_image "$kernel")
[ -f "$image" ] || die "the boot image of $kernel, $image, is not there"
release=$(of_kernel release "$kernel")

mkdir -p "$work/initrd/bin" "$work/cwd"
cp /bin/busybox "$work/initrd/bin/busybox"
printf '#!/bin/busybox sh\nexec /bin/busybox poweroff -f\n' >"$work/initrd/init"
chmod 755 "$work/initrd/init" "$work/initrd/bin/busybox"
(cd "$work/initrd" && printf '%s\n' . bin bin/busybox init | /bin/busybox cpio -o -H newc 2>/dev/null) |
    gzip >"$work/initrd.gz"
# The same busybox in a root of its own.
mkdir -p "$work/root"/{bin,dev,proc,sys,tmp,run,etc,lib/modules}
cp /bin/busybox "$work/root/bin/true"

bare_on() {
    echo "qemu-system-x86_64 -accel tcg -cpu max -m $memory -nographic -no-reboot -kernel $1" \
        "-initrd $work/initrd.gz -append 'console=ttyS0 panic=-1'"
}
ours() {
    local kernel=$1
    shift
    echo "$vmlab run -q --accel tcg -m ${memory}M -c 1 -k $kernel $*"
}
declare -A command=(
    [bare]=$(bare_on "$image")
    [cold]=$(ours "$kernel" --no-snapshot -- true)
    [first]=$(ours "$kernel" --cold -- true)
    [restored]=$(ours "$kernel" -- true)
    [small]=$(ours "$kernel" --rootfs "$work/root" --root-mode ro --no-cwd -- /bin/true)
)
order=(bare cold first restored small)

peers=()
if [ -n "${PEER_KERNEL:-}" ]; then
    [ -f "$PEER_KERNEL" ] || die "PEER_KERNEL=$PEER_KERNEL is not there"
    command[peer-bare]=$(bare_on "$PEER_KERNEL")
    command[peer-cold]=$(ours "$PEER_KERNEL" --no-snapshot -- true)
    command[peer-restored]=$(ours "$PEER_KERNEL" -- true)
    peers=(peer-bare peer-cold peer-restored)
    if has vmtest; then
        # It has no option to do without KVM, so it is run where there is none, as all others are.
        without_kvm "$work/without-kvm"
        command[vmtest]="$work/without-kvm vmtest -k $PEER_KERNEL true"
        peers+=(vmtest)
    fi
    if has vng; then
        # Where no udev runs, it finds no port for the exit status and gives 255; its console says the truth.
        vng=(vng --disable-kvm --memory "${memory}M" --cpus 1 --run "$PEER_KERNEL")
        script -qec "${vng[*]} -v --exec true" "$work/vng.console" </dev/null >/dev/null 2>&1 || true
        grep -q 'script exited with code 0' "$work/vng.console" ||
            die "vng failed: $(tail -n 5 "$work/vng.console")"
        # shellcheck disable=SC2016
        printf '#!/bin/sh\n%s --exec true\ncode=$?\n[ $code -eq 0 ] || [ $code -eq 255 ]\n' \
            "${vng[*]}" >"$work/vng-true"
        chmod 755 "$work/vng-true"
        command[vng]="$work/vng-true"
        peers+=(vng)
    fi
    order+=("${peers[@]}")
fi

cd "$work/cwd"
# All must really do their work before their time means anything.
bash -c "${command[bare]}" </dev/null >"$work/console" 2>&1 ||
    die "bare QEMU failed: $(tail -n 5 "$work/console")"
grep -q 'Power down' "$work/console" || die "bare QEMU did not power off: $(tail -n 5 "$work/console")"
for name in "${order[@]}"; do
    bash -c "${command[$name]}" </dev/null >"$work/$name.out" 2>&1 ||
        die "$name failed: $(tail -n 5 "$work/$name.out")"
done
proof=$(bash -c "$(ours "$kernel" -- 'uname -r')" </dev/null)
[ "$proof" = "$release" ] || die "vmlab ran under $proof and not under $release"
phases=$(bash -c "$(ours "$kernel" --json /dev/stdout -- true)" </dev/null)
grep -q '"restore"' <<<"$phases" || die "the run did not go on from a snapshot: $phases"

load=$(cut -d " " -f 1 /proc/loadavg)

# Short alternating rounds, so that a change in the machine's load meets all.
rounds=4
for round in $(seq "$rounds"); do
    args=()
    for name in "${order[@]}"; do
        args+=(-n "$name" "${command[$name]}")
    done
    hyperfine --style none -N --warmup 1 --runs "$(((runs + rounds - 1) / rounds))" \
        --export-json "$work/$round.json" "${args[@]}" >/dev/null
done

# Throughput: whole VMs, each with the host's root and the working directory.
begun=$(date +%s%N)
bash -c "$(ours "$kernel" --repeat "$repeat" --jobs 2 -- true)" </dev/null >/dev/null 2>"$work/repeat.out" ||
    die "--repeat failed: $(tail -n 5 "$work/repeat.out")"
ended=$(date +%s%N)

# own_memory PID: memory in MB that a process and its children have for themselves: what is not of a file.
own_memory() {
    local pid total=0 part
    for pid in "$1" $(pgrep -P "$1"); do
        part=$(awk '/^Pss_(Anon|Shmem):/ { sum += $2 } END { print int(sum / 1024) }' "/proc/$pid/smaps_rollup")
        total=$((total + part))
    done
    echo "$total"
}
# idle KERNEL OPTIONS: the same of a restored VM whose command does nothing.
idle() {
    local kernel=$1 pid
    shift
    "$vmlab" run -q --accel tcg -m "${memory}M" -c 1 -k "$kernel" "$@" -- true
    "$vmlab" run -q --accel tcg -m "${memory}M" -c 1 -k "$kernel" "$@" -- \
        sh -c 'echo up; exec sleep 30' >"$work/idle" 2>&1 </dev/null &
    pid=$!
    for _ in $(seq 100); do
        grep -q up "$work/idle" && break
        sleep 0.1
    done
    sleep 1
    own_memory "$pid"
    kill -INT "$pid"
    wait "$pid" || true
}

# times NAME: all times of one command in seconds, in order.
times() {
    awk -v name="$1" '
        /"command":/ { on = index($0, "\"" name "\"") }
        /"times":/ { list = on; next }
        /\]/ { list = 0 }
        list { gsub(/[ ,]/, ""); print }' "$work"/*.json | sort -n
}
median() { awk '{ t[NR] = $1 } END { print (t[int((NR + 1) / 2)] + t[int(NR / 2) + 1]) / 2 }'; }
# row TEXT NAME BASE WANTED
row() {
    local list
    list=$(times "$2")
    [ -n "$list" ] || die "hyperfine gave no times for $2"
    printf '| %s | %.2f s | %.2f s | %.2f s | **%.3f** | %s |\n' "$1" "$(median <<<"$list")" \
        "$(head -n 1 <<<"$list")" "$(tail -n 1 <<<"$list")" \
        "$(awk -v a="$(median <<<"$list")" -v b="$(times "$3" | median)" 'BEGIN { print a / b }')" "$4"
}

cd "$repo"
{
    heading
    echo
    echo "$(machine), guest kernel $release, $memory MB, one vCPU, TCG; load average $load before; $runs runs each."
    echo
    echo "| whole process | median | fastest | slowest | of bare QEMU | wanted |"
    echo "|---|---|---|---|---|---|"
    row "bare QEMU, busybox powers off" bare bare ""
    row "vmlab run, no snapshot" cold bare "0.65"
    row "the first run: boots, takes the snapshot, goes on from it" first bare ""
    row "restored, a busybox in a read-only root of its own" small bare "0.08"
    row "restored, the host's root and a writable working directory" restored bare "0.12"
    echo
    awk -v n="$repeat" -v ns="$((ended - begun))" \
        'BEGIN { printf "`--repeat %d --jobs 2 -- true`: **%.1f** VMs a second (wanted: 8).\n", n, n * 1e9 / ns }'
    echo
    echo "Memory that an idle restored VM has for itself, vmlab and QEMU together, beside the snapshot's file that" \
        "all share: $(idle "$kernel") MB over virtio-fs, whose server needs a copy;" \
        "$(idle debian:6.12 --share-via 9p) MB over 9p (debian:6.12; wanted: 60)."
    echo
    if [ ${#peers[@]} -gt 0 ]; then
        echo "On a kernel with 9p and virtio built in, beside peers:"
        echo
        echo "| whole process | median | fastest | slowest | of bare QEMU | wanted |"
        echo "|---|---|---|---|---|---|"
        row "bare QEMU, busybox powers off" peer-bare peer-bare ""
        row "vmlab run, no snapshot" peer-cold peer-bare ""
        row "vmlab run, restored" peer-restored peer-bare ""
        for name in vmtest vng; do
            [ -n "${command[$name]:-}" ] || continue
            row "\`$name\`" "$name" peer-bare ""
        done
        echo
    fi
} | publish boot
