#!/usr/bin/env bash
# How long twelve short targets under three kernels take: one vmtest.toml, which `vmlab test -j 2` runs side by
# side, and vmtest (danobi/vmtest), where it is in PATH, one after the other. Puts a table on top of
# bench/results/matrix.md.
#
# PEER_KERNEL names a bzImage that has what vmtest needs built in (9p, virtio). It is three kernels here by
# its arguments, for each of which vmlab has to boot and to keep a snapshot of its own.
set -euo pipefail

# shellcheck source=bench/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

runs=${RUNS:-3}

need_toolchain
need_vmlab
need qemu-guest-agent qemu-ga
install_needed

[ -f "${PEER_KERNEL:-}" ] || die "PEER_KERNEL names no bzImage with 9p and virtio built in"
cargo build --release --locked --quiet
vmlab=$(target_dir)/release/vmlab

# Of its own, so that nobody's snapshots are cleared.
export VMLAB_CACHE_DIR=$work/cache
mkdir "$work/cwd"
cd "$work/cwd"
cp "$PEER_KERNEL" bzImage
for kernel in 1 2 3; do
    for test in 'true' 'uname -r' 'test -d /mnt/vmtest' 'seq 1000 | sort -n | tail -n 1'; do
        printf '[[target]]\nname = "%s, %s"\nkernel = "./bzImage"\nkernel_args = "kernel=%s"\n' \
            "$test" "$kernel" "$kernel"
        printf 'command = "%s"\n[target.vm]\nnum_cpus = 1\nmemory = "512M"\n' "$test"
    done
done >vmtest.toml

# seconds COMMAND...: how long it takes, of which all targets have to pass.
seconds() {
    local begun ended
    begun=$(date +%s%N)
    "$@" </dev/null >"$work/out" 2>&1 || die "$* failed: $(tail -n 20 "$work/out")"
    ended=$(date +%s%N)
    awk -v ns="$((ended - begun))" 'BEGIN { printf "%.2f\n", ns / 1e9 }'
}
median() { sort -n | awk '{ t[NR] = $1 } END { print (t[int((NR + 1) / 2)] + t[int(NR / 2) + 1]) / 2 }'; }

peer=()
if has vmtest; then
    without_kvm "$work/without-kvm"
    peer=("$work/without-kvm" vmtest -c "$work/cwd/vmtest.toml")
fi
load=$(cut -d " " -f 1 /proc/loadavg)
for _ in $(seq "$runs"); do
    if [ ${#peer[@]} -gt 0 ]; then VMTEST_NO_UI=1 seconds "${peer[@]}" >>"$work/peer"; fi
    seconds "$vmlab" test -j 2 -c vmtest.toml --cold >>"$work/cold-each"
    "$vmlab" cache clear snapshots >/dev/null
    seconds "$vmlab" test -j 2 -c vmtest.toml >>"$work/cold"
    seconds "$vmlab" test -j 2 -c vmtest.toml >>"$work/warm"
done
grep -q '^12 passed' "$work/out" || die "not all targets passed: $(tail -n 20 "$work/out")"

# row TEXT FILE WANTED
row() {
    local ratio=""
    if [ -f "$work/peer" ]; then
        ratio=$(awk -v a="$(median <"$work/$2")" -v b="$(median <"$work/peer")" 'BEGIN { printf "**%.3f**", a / b }')
    fi
    printf '| %s | %.2f s | %s | %s |\n' "$1" "$(median <"$work/$2")" "$ratio" "$3"
}
cd "$repo"
{
    heading
    echo
    echo "$(machine), 512 MB, one vCPU, TCG; load average $load before; median of $runs."
    echo
    echo "| twelve targets under three kernels | median | of vmtest | wanted |"
    echo "|---|---|---|---|"
    if [ -f "$work/peer" ]; then row "vmtest, one after the other" peer ""; fi
    row "vmlab test -j 2, no snapshot there yet" cold "0.6"
    row "vmlab test -j 2, snapshots there" warm "0.25"
    row "vmlab test -j 2 --cold: each target boots and takes a snapshot" cold-each ""
} | publish matrix
