#!/usr/bin/env bash
# How long a disk image takes until its agent answers, beside bare QEMU: the same image (Debian 12, built by
# `vmlab image build`), the same memory, one CPU, TCG, in one go. Puts a table on top of
# bench/results/images.md.
#
# Bare QEMU is what one would write by hand: the image under `snapshot=on`, and a socket on which
# qemu-guest-agent is asked until it answers; it has the processor and the random numbers that vmlab gives its
# guests, since the difference should be vmlab's own. vmlab also has its own agent started, which is what answers,
# and then runs a command with the working directory shared.
set -euo pipefail

# shellcheck source=bench/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

runs=${RUNS:-7}
memory=1024
kernel=debian:6.12-cloud

need_toolchain
need_vmlab
need python3 python3
install_needed

cargo build --release --locked --quiet
vmlab=$(target_dir)/release/vmlab
"$vmlab" kernel pull "$kernel"
image=$("$vmlab" image build debian:12)
[ -f "$image" ] || die "\`vmlab image build\` printed $image, which is no file"

mkdir -p "$work/cwd"
cd "$work/cwd"

# bare: seconds from QEMU's start until qemu-guest-agent answers.
cat >"$work/bare.py" <<'PYTHON'
import json, os, socket, subprocess, sys, time
image, memory, path = sys.argv[1:]
command = [
    "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-m", memory,
    "-cpu", "max,la57=off,erms=off,fsrm=off", "-device", "virtio-rng-pci", "-smp", "1",
    "-display", "none", "-no-reboot", "-serial", "null",
    "-drive", f"file={image},format=raw,if=virtio,snapshot=on",
    "-device", "virtio-serial", "-chardev", f"socket,path={path},server=on,wait=off,id=agent",
    "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
]
start = time.monotonic()
qemu = subprocess.Popen(command)
try:
    while not os.path.exists(path):
        time.sleep(0.005)
    agent = socket.socket(socket.AF_UNIX)
    agent.connect(path)
    agent.settimeout(0.1)
    answer, asked = b"", 0.0
    while b'"return"' not in answer:
        if qemu.poll() is not None or time.monotonic() - start > 600:
            sys.exit("qemu-guest-agent did not answer")
        if time.monotonic() - asked > 1:
            asked = time.monotonic()
            agent.sendall(json.dumps({"execute": "guest-ping"}).encode() + b"\n")
        try:
            answer += agent.recv(4096)
        except TimeoutError:
            pass
    print(time.monotonic() - start)
finally:
    qemu.kill()
    qemu.wait()
    os.path.exists(path) and os.unlink(path)
PYTHON
bare() { python3 "$work/bare.py" "$image" "$memory" "$work/agent"; }

# ours OPTIONS...: seconds until the agent answers, and of the whole run.
ours() {
    local begun ended
    begun=$(date +%s%N)
    "$vmlab" run -q --accel tcg -m "${memory}M" -c 1 --image "$image" --json "$work/run.json" "$@" -- true \
        </dev/null >/dev/null
    ended=$(date +%s%N)
    python3 - "$work/run.json" "$(((ended - begun) / 1000))" <<'PYTHON'
import json, sys
phases = json.load(open(sys.argv[1]))["runs"][0]["report"]["phases"]
until = sum(p["ms"] for p in phases if p["phase"] in ("kernel", "prepare", "boot", "restore"))
print(until / 1e3, int(sys.argv[2]) / 1e6)
PYTHON
}

load=$(cut -d " " -f 1 /proc/loadavg)
bare >/dev/null
for _ in $(seq "$runs"); do
    echo "bare $(bare)"
    echo "own $(ours)"
    echo "kernel $(ours -k "$kernel")"
done >"$work/times"

cd "$repo"
{
    heading
    echo
    echo "$(machine), $memory MB, one vCPU, TCG; load average $load before."
    echo
    python3 - "$work/times" <<'PYTHON'
import statistics, sys
times = {}
for line in open(sys.argv[1]):
    name, *numbers = line.split()
    times.setdefault(name, []).append([float(number) for number in numbers])
median = lambda name, column: statistics.median(row[column] for row in times[name])
bare = median("bare", 0)
rows = [
    ("bare QEMU until qemu-guest-agent answers", bare, ""),
    ("`vmlab run --image` until the agent answers", median("own", 0), "1.05"),
    ("`vmlab run --image -- true`, the whole run", median("own", 1), ""),
    ("`vmlab run --image -k debian:6.12-cloud -- true`, the whole run", median("kernel", 1), ""),
]
print("| Debian 12 | median of %d | of bare QEMU | wanted |\n|---|---|---|---|" % len(times["bare"]))
for name, value, wanted in rows:
    print(f"| {name} | {value:.2f} s | **{value / bare:.3f}** | {wanted} |")
spread = lambda name: f"{min(r[0] for r in times[name]):.2f} to {max(r[0] for r in times[name]):.2f} s"
print(f"\nUntil the agent answers: bare QEMU {spread('bare')}, vmlab {spread('own')}.")
PYTHON
} | publish images
