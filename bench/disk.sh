#!/usr/bin/env bash
# Disks: how long a VM's own copy of a disk takes, by shared blocks and by copying, and how fast vmlab's own device is
# beside QEMU's, on two files that are alike, in the same guest, in turn. One vCPU, TCG. Puts a table on top of
# bench/results/disk.md.
#
# Copies are measured by vmlab itself, around all that it does for them; the file system that shares blocks is a Btrfs on
# a loop device. Throughput is fio's, with O_DIRECT in the guest; on the host, both go through the page cache.
set -euo pipefail

# shellcheck source=bench/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

runs=${RUNS:-7}
rounds=${ROUNDS:-3}
seconds=${SECONDS_EACH:-5}
kernel=debian:6.12-cloud

[ "$(id -u)" -eq 0 ] || die "only root can mount the Btrfs: run this as root"
need_toolchain
need_vmlab
need fio fio
need btrfs-progs mkfs.btrfs
need python3 python3
install_needed

cargo build --release --locked --quiet
vmlab=$(target_dir)/release/vmlab
"$vmlab" kernel pull "$kernel"
load=$(cut -d " " -f 1 /proc/loadavg)

truncate -s 2G "$work/loop.raw"
mkfs.btrfs -q "$work/loop.raw"
mkdir "$work/btrfs" "$work/cwd"
mount -o loop "$work/loop.raw" "$work/btrfs"
trap 'umount "$work/btrfs" 2>/dev/null; rm -rf "$work"' EXIT
cd "$work/cwd"

# copies HOW: how long the copies of a new disk took in each of the runs, in ms.
copies() {
    for _ in $(seq "$runs"); do
        "$vmlab" run -q -k "$kernel" --disk "size=256M,fs=btrfs,clone=$1" --json "$work/run.json" -- true
        python3 - "$work/run.json" <<'PYTHON'
import json, sys
def spans(found):
    for span in found:
        yield span
        yield from spans(span["spans"])
timings = json.load(open(sys.argv[1]))["runs"][0]["report"]["timings"]
print(next(span["ms"] for span in spans(timings) if span["name"] == "copies of disks"))
PYTHON
    done
}
# The cache of this one is on the Btrfs, but for what is the same for all.
cache=${VMLAB_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/vmlab}
for kind in kernels boot-images initramfs configs snapshots; do ln -s "$cache/$kind" "$work/btrfs/$kind"; done
"$vmlab" run -q -k "$kernel" --disk size=256M,fs=btrfs -- true
copies copy >"$work/copy"
VMLAB_CACHE_DIR=$work/btrfs copies reflink >"$work/reflink"

for name in qemu own; do
    head -c 1G /dev/urandom >"$work/$name.raw"
done
cat >guest.sh <<'SCRIPT'
for round in $(seq "$1"); do
    for work in read write randread randwrite; do
        case $work in rand*) size=4k ;; *) size=1M ;; esac
        for name in qemu own; do
            echo "$work $name $(fio --name=x --filename=/dev/disk/by-id/virtio-$name --rw=$work --bs=$size \
                --ioengine=libaio --iodepth=16 --direct=1 --time_based --runtime="$2" --ramp_time=1 --size=1G \
                --output-format=json | python3 -c '
import json, sys
job = json.load(sys.stdin)["jobs"][0]
print(max(job["read"]["bw_bytes"], job["write"]["bw_bytes"]))')"
        done
    done
done
SCRIPT
"$vmlab" run -q -k "$kernel" -m 1G --timeout 20m \
    --disk "path=$work/qemu.raw,name=qemu,mode=rw" --disk "path=$work/own.raw,name=own,mode=rw,serve" \
    -- sh guest.sh "$rounds" "$seconds" >"$work/fio"

cd "$repo"
{
    heading
    echo
    echo "$(machine), 1 GB, one vCPU, TCG; load average $load before."
    echo
    python3 - "$work" <<'PYTHON'
import statistics, sys
work = sys.argv[1]
print("| a 256 MB Btrfs for a VM of its own | median | wanted |\n|---|---|---|")
for name, what, wanted in [("reflink", "blocks shared", "10 ms"), ("copy", "data copied", "50 ms")]:
    times = [float(line) for line in open(f"{work}/{name}")]
    print(f"| {what} | {statistics.median(times):.1f} ms ({min(times):.1f} to {max(times):.1f}) | {wanted} |")
found = {}
for line in open(f"{work}/fio"):
    kind, name, rate = line.split()
    found.setdefault(kind, {}).setdefault(name, []).append(int(rate))
print("\n| fio, 16 requests at once | QEMU's virtio-blk | vmlab's | vmlab / QEMU | wanted |\n|---|---|---|---|---|")
names = {"read": "read, 1 MiB each", "write": "write, 1 MiB each", "randread": "read, 4 KiB anywhere", "randwrite": "write, 4 KiB anywhere"}
for kind, what in names.items():
    qemu, own = (statistics.median(found[kind][name]) / 1e6 for name in ("qemu", "own"))
    print(f"| {what} | {qemu:.1f} MB/s | {own:.1f} MB/s | **{own / qemu:.2f}** | 1.0 |")
PYTHON
} | publish disk
