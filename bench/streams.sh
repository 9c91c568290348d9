#!/usr/bin/env bash
# How fast a command's output and input pass between guest and host, and in how much memory: one GiB
# of each, under TCG, in one go. Puts a table on top of bench/results/streams.md.
#
# What is measured is the time between the command's first byte and its last, as the reader on the
# host sees it: the boot is not part of it. Memory is the most that was ever resident: of the vmlab
# process on the host, and of the agent in the guest.
set -euo pipefail

# shellcheck source=bench/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

kernel=debian:6.12
wanted=100 # MB/s
size=$((1024 * 1024 * 1024))

need_toolchain
need_vmlab
need python3 python3
install_needed

if [ -z "${VMLAB_BIN:-}" ]; then
    cargo build --release --locked --quiet
    VMLAB_BIN=$(target_dir)/release/vmlab
fi
"$VMLAB_BIN" kernel pull "$kernel"

# Runs vmlab with a command, moves the bytes, and prints MB/s and both memories in MiB. The command
# waits at its end for a line (or the end of its input), so that vmlab can still be looked at.
cat >"$work/measure.py" <<'PYTHON'
import os, subprocess, sys, time

vmlab, kernel, size, direction = sys.argv[1:]
size = int(size)
MEMORY = r"sed -n 's/^VmHWM:[^0-9]*\([0-9]*\) kB/\1/p' /proc/1/status >&2; read x"
SCRIPTS = {
    "stdout": f"head -c {size} /dev/zero; {MEMORY}",
    "stderr": f"head -c {size} /dev/zero >&2; {MEMORY.replace('>&2', '>&1')}",
    "stdin": f"echo go >&2; head -c {size} >/dev/null; {MEMORY}",
}
run = [vmlab, "run", "-q", "--accel", "tcg", "-k", kernel, "--", "sh", "-c", SCRIPTS[direction]]
child = subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
flood, notes = child.stdout, child.stderr
if direction == "stderr":
    flood, notes = notes, flood
if direction == "stdin":
    assert notes.readline() == b"go\n"
    chunk, start = bytes(1 << 20), time.monotonic()
    for _ in range(size >> 20):
        child.stdin.write(chunk)
    child.stdin.flush()
    agent = int(notes.readline())
    took = time.monotonic() - start
else:
    count = len(os.read(flood.fileno(), 1))
    start = time.monotonic()
    while count < size:
        got = len(os.read(flood.fileno(), 1 << 20))
        assert got > 0, f"the stream ended after {count} bytes"
        count += got
    took = time.monotonic() - start
    agent = int(notes.readline())
status = open(f"/proc/{child.pid}/status").read()
vmlab_kb = int(status.split("VmHWM:")[1].split()[0])
child.stdin.write(b"\n")
child.stdin.close()
assert child.wait() == 0, child.returncode
print(f"{size / took / 1e6:.0f} {vmlab_kb / 1024:.1f} {agent / 1024:.1f}")
PYTHON

rows=
slowest=
load=$(cut -d " " -f 1 /proc/loadavg)
for direction in stdout stderr stdin; do
    say "$direction ..."
    line=$(python3 "$work/measure.py" "$VMLAB_BIN" "$kernel" "$size" "$direction")
    read -r speed vmlab agent <<<"$line"
    rows+="| $direction | $speed MB/s | $vmlab MiB | $agent MiB |"$'\n'
    if [ -z "$slowest" ] || [ "$speed" -lt "$slowest" ]; then slowest=$speed; fi
done

{
    heading
    echo
    echo "$(machine), $kernel, one vCPU, TCG; load average $load before."
    echo
    echo "| 1 GiB of zeros over | speed | vmlab's memory | the agent's memory |"
    echo "|---|---|---|---|"
    printf '%s' "$rows"
    echo
    echo "The slowest: **$slowest MB/s** (wanted: at least $wanted for stdout)."
    echo
} | publish streams
