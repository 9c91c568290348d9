#!/usr/bin/env bash
# vmlab's own monitor beside QEMU, both with KVM: time of a whole run that boots and of one that goes on from a
# snapshot, throughput of disks and files, and the monitor's own memory. The same kernel, memory and one vCPU, in turn, in
# one go. Puts a table on top of bench/results/hypervisor.md.
#
# Where /dev/kvm is none that works, all of it runs in a guest of vmlab's own that has one (docs/nested.md): slowly, so
# that only ratios mean something.
set -euo pipefail

# shellcheck source=bench/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

rounds=${RUNS:-7}
seconds=${SECONDS_EACH:-5}
kernel=debian:6.12-cloud
memory=512M

need_toolchain
need_vmlab
need hyperfine hyperfine
need fio fio
need python3 python3
need busybox-static /bin/busybox
install_needed

cargo build --release --locked --quiet
vmlab=$(target_dir)/release/vmlab
"$vmlab" kernel pull "$kernel"
image=$(of_kernel boot_image "$kernel")
[ -f "$image" ] || die "the boot image of $kernel, $image, is not there"
load=$(cut -d " " -f 1 /proc/loadavg)

mkdir -p "$work/initrd/bin" "$work/cwd" "$work/out"
cp /bin/busybox "$work/initrd/bin/busybox"
printf '#!/bin/busybox sh\nexec /bin/busybox reboot -f\n' >"$work/initrd/init"
chmod 755 "$work/initrd/init" "$work/initrd/bin/busybox"
(cd "$work/initrd" && printf '%s\n' . bin bin/busybox init | /bin/busybox cpio -o -H newc 2>/dev/null) |
    gzip >"$work/cwd/initrd.gz"
cp "$image" "$work/cwd/vmlinuz"
# Where a guest does not put a filesystem of its own over it.
cp "$vmlab" "$work/cwd/vmlab"

cat >"$work/cwd/measure.sh" <<'SCRIPT'
#!/bin/bash
# measure.sh OUT ROUNDS SECONDS KERNEL MEMORY: everything, where KVM works.
set -euo pipefail
out=$1 rounds=$2 seconds=$3 kernel=$4 memory=$5
here=$PWD
vm() { "$here/vmlab" run -q -m "$memory" -c 1 -k "$kernel" --hypervisor "$@"; }
of() { echo "$here/vmlab run -q -m $memory -c 1 -k $kernel --hypervisor $*"; }
bare="qemu-system-x86_64 -accel kvm -cpu host -m $memory -nographic -no-reboot -kernel $here/vmlinuz \
-initrd $here/initrd.gz -append 'console=ttyS0 panic=-1 quiet'"
mkdir -p empty && cd empty
# All must really do their work before their time means anything; the snapshots are taken here, too.
for hypervisor in kvm qemu; do
    for run in boots learns goes-on; do vm $hypervisor --json "$out/$hypervisor.json" -- true; done
    grep -q '"restore"' "$out/$hypervisor.json" || { echo "no snapshot of $hypervisor" >&2; exit 1; }
    grep -q "\"hypervisor\": *\"$hypervisor\"" "$out/$hypervisor.json" || { echo "not $hypervisor" >&2; exit 1; }
done
for round in $(seq "$rounds"); do
    hyperfine --style none -N --output inherit --runs 1 --export-json "$out/round$round.json" \
        -n bare "$bare" \
        -n cold-qemu "$(of qemu --no-snapshot -- true)" -n cold-kvm "$(of kvm --no-snapshot -- true)" \
        -n restore-qemu "$(of qemu -- true)" -n restore-kvm "$(of kvm -- true)" >/dev/null
    echo "round $round of $rounds" >&2
done
head -c 256M /dev/urandom >"$here/data"
cat >"$here/io.py" <<'PYTHON'
import os, sys, time
what = sys.argv[1]
block = bytearray(1 << 20)
began = time.monotonic()
total = 0
if what == "stat":
    for base, _, names in os.walk("/usr/share/zoneinfo"):
        for name in names:
            os.lstat(os.path.join(base, name))
            total += 1
elif what == "file-read":
    fd = os.open("/mnt/here/data", os.O_RDONLY)
    while count := os.readv(fd, [block]):
        total += count
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
else:
    fd = os.open("/mnt/here/written", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for _ in range(128):
        total += os.write(fd, block)
    os.fsync(fd)
print(what, total / (time.monotonic() - began))
PYTHON
cat >"$here/io.sh" <<'GUEST'
for work in read write randread randwrite; do
    case $work in rand*) size=4k ;; *) size=1M ;; esac
    echo "$work $(fio --name=x --filename=/dev/disk/by-id/virtio-data --rw=$work --bs=$size --ioengine=libaio \
        --iodepth=16 --direct=1 --time_based --runtime="$1" --ramp_time=1 --size=256M --output-format=json |
        python3 -c '
import json, sys
job = json.load(sys.stdin)["jobs"][0]
print(max(job["read"]["bw_bytes"], job["write"]["bw_bytes"]))')"
done
for round in 1 2 3; do
    for what in file-read file-write stat; do python3 /mnt/here/io.py "$what"; done
done
GUEST
for round in 1 2; do
    for hypervisor in qemu kvm; do
        vm $hypervisor --timeout 10m --share "$here:/mnt/here" --disk "path=$here/data,name=data,mode=discard,serve" \
            -- sh /mnt/here/io.sh "$seconds" | sed "s/^/$hypervisor /" >>"$out/io"
        echo "throughput with $hypervisor" >&2
    done
done
# The monitor's own memory: all that the process has for itself, but for the guest's.
"$here/vmlab" run -q -m "$memory" -c 1 -k "$kernel" --hypervisor kvm -- sh -c 'echo up; sleep 60' >up 2>&1 </dev/null &
pid=$!
for _ in $(seq 300); do grep -q up up && break; sleep 0.1; done
sleep 1
python3 - "$pid" >"$out/memory" <<'PYTHON'
import re, sys
own = guest = 0
name = ""
for line in open(f"/proc/{sys.argv[1]}/smaps"):
    if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
        name = line.split(None, 5)[5].strip() if len(line.split(None, 5)) > 5 else ""
    elif line.startswith(("Rss:", "Anonymous:")):
        kind, size = line.split()[0], int(line.split()[1])
        if "/snapshots/" in name:
            guest += size if kind == "Rss:" else 0
        elif kind == "Anonymous:":
            own += size
print(own / 1024, guest / 1024)
PYTHON
kill -INT "$pid"
wait "$pid" || true
SCRIPT
chmod 755 "$work/cwd/measure.sh"

if "$vmlab" doctor --json | python3 -c '
import json, sys
kvm = next(check for check in json.load(sys.stdin) if check["name"] == "kvm")
sys.exit(kvm["status"] != "good")'; then
    where="on this machine"
    (cd "$work/cwd" && ./measure.sh "$work/out" "$rounds" "$seconds" "$kernel" "$memory")
else
    where="nested, in a guest of QEMU under TCG with one CPU"
    # KERNELS/KEY/boot/vmlinuz-RELEASE
    entry=$(dirname "$(dirname "$image")")
    # The cache is on the root, as it is elsewhere: the page cache keeps what is there, unlike files of a share, and an
    # inner guest has its modules by the share of its root.
    "$vmlab" run -q -k "$kernel" --accel tcg -m 4G --module kvm-amd --timeout 80m --no-cwd \
        --share "$work/cwd:/mnt/bench" --share "$work/out:/mnt/out" \
        --share "$entry:/mnt/kernel:ro" -- bash -c "
            export VMLAB_CACHE_DIR=/var/cache/vmlab
            mkdir -p /var/cache/vmlab/kernels && cp -a /mnt/kernel /var/cache/vmlab/kernels/${entry##*/} &&
            mkdir /tmp/bench && cp /mnt/bench/* /tmp/bench && cd /tmp/bench &&
            ./measure.sh /mnt/out $rounds $seconds $kernel $memory"
fi

python3 - "$work/out" "$rounds" <<'PYTHON' >"$work/rows"
import glob, json, statistics, sys
out, rounds = sys.argv[1], int(sys.argv[2])
times = {}
for path in sorted(glob.glob(f"{out}/round*.json")):
    for result in json.load(open(path))["results"]:
        times.setdefault(result["command"], []).extend(result["times"])
def time(name):
    found = sorted(times[name])
    return f"{statistics.median(found):.2f} s | {found[0]:.2f} s | {found[-1]:.2f} s"
def ratio(name, base):
    return f"**{statistics.median(times[name]) / statistics.median(times[base]):.2f}**"
print("| whole process | median | fastest | slowest | of QEMU | wanted |\n|---|---|---|---|---|---|")
print(f"| bare QEMU, a busybox resets | {time('bare')} | {ratio('bare', 'cold-qemu')} | |")
print(f"| boot, QEMU | {time('cold-qemu')} | 1 | |")
print(f"| boot, the monitor | {time('cold-kvm')} | {ratio('cold-kvm', 'cold-qemu')} | 0.6 |")
print(f"| from a snapshot, QEMU | {time('restore-qemu')} | 1 | |")
print(f"| from a snapshot, the monitor | {time('restore-kvm')} | {ratio('restore-kvm', 'restore-qemu')} | 0.3 |")
rates = {}
for line in open(f"{out}/io"):
    hypervisor, what, rate = line.split()
    rates.setdefault((what, hypervisor), []).append(float(rate))
print("\n| in the guest | QEMU | the monitor | of QEMU | wanted |\n|---|---|---|---|---|")
names = {"read": "disk, 1 MiB reads", "write": "disk, 1 MiB writes", "randread": "disk, 4 KiB random reads",
         "randwrite": "disk, 4 KiB random writes", "file-read": "file in a share, read", "file-write": "file in a share, written",
         "stat": "names looked up"}
for what, name in names.items():
    qemu, kvm = (statistics.median(rates[what, hypervisor]) for hypervisor in ("qemu", "kvm"))
    shown = (lambda rate: f"{rate:.0f}/s") if what == "stat" else (lambda rate: f"{rate / 1e6:.1f} MB/s")
    print(f"| {name} | {shown(qemu)} | {shown(kvm)} | **{kvm / qemu:.2f}** | 1 |")
own, guest = map(float, open(f"{out}/memory").read().split())
print(f"\nMemory that the process has for itself beside the guest's, a restored idle VM: **{own:.1f} MB** (wanted: 10); of the guest's, {guest:.0f} MB are there.")
PYTHON
{
    heading
    echo
    echo "$(machine), $where, guest kernel $kernel, $memory, one vCPU, KVM; load average $load before; $rounds rounds."
    echo
    cat "$work/rows"
} | publish hypervisor
