#!/usr/bin/env bash
# Tests in Rust: forty trivial ones, each in a VM of its own, two at a time under nextest, with snapshots there, beside a
# boot of bare QEMU for each; and snapshots in the midst of a test, and going back to them. Puts a table on top of
# bench/results/tests.md.
set -euo pipefail

# shellcheck source=bench/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

runs=${RUNS:-3}
kernel=debian:6.12-cloud
count=40

need_toolchain
need_vmlab
need busybox-static busybox
need cpio cpio
need python3 python3
install_needed
command -v cargo-nextest >/dev/null || die "cargo-nextest is missing: cargo install --locked cargo-nextest"

cargo build --release --locked --quiet
"$(target_dir)/release/vmlab" kernel pull "$kernel"
image=$("$(target_dir)/release/vmlab" kernel inspect "$kernel" --json |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["kernel"]["boot_image"])')

mkdir -p "$work/crate/tests" "$work/root/bin" "$work/root/dev"
cat >"$work/crate/Cargo.toml" <<TOML
[package]
name = "many"
version = "0.1.0"
edition = "2024"
[lib]
path = "lib.rs"
[dev-dependencies]
vmlab = { path = "$repo/crates/vmlab" }
[package.metadata.vmlab]
kernel = "$kernel"
memory = "512M"
[workspace]
TOML
: >"$work/crate/lib.rs"
cp "$repo/Cargo.lock" "$work/crate/Cargo.lock"
for number in $(seq "$count"); do
    printf '#[vmlab::test]\nfn number_%s() {\n    assert!(std::process::id() > 1);\n}\n' "$number"
done >"$work/crate/tests/many.rs"

cat >"$work/crate/tests/back.rs" <<'RUST'
use std::time::Instant;
use vmlab::prelude::*;

#[vmlab::test(host)]
fn back(vm: &mut Vm, recorder: &Recorder) -> Result {
    let ms = |since: Instant| since.elapsed().as_secs_f64() * 1000.0;
    for number in 0..5 {
        let since = Instant::now();
        let snapshot = vm.snapshot()?;
        recorder.measure(&format!("snapshot {number}"), ms(since), "ms");
        for again in 0..5 {
            let since = Instant::now();
            vm.restore(&snapshot)?;
            vm.exec(["true"])?;
            recorder.measure(&format!("restore {number} {again}"), ms(since), "ms");
        }
    }
    let since = Instant::now();
    vm.reset()?;
    vm.exec(["true"])?;
    recorder.measure("reset", ms(since), "ms");
    Ok(())
}
RUST
cp "$(command -v busybox)" "$work/root/bin/busybox"
printf '#!/bin/busybox sh\nexec /bin/busybox poweroff -f\n' >"$work/root/init"
chmod 755 "$work/root/init"
(cd "$work/root" && find . | cpio --quiet -o -H newc) >"$work/initramfs"

seconds() {
    local begun
    begun=$(date +%s%N)
    "$@" >"$work/log" 2>&1 || die "$* failed: $(tail -n 20 "$work/log")"
    python3 -c 'import sys; print((int(sys.argv[2]) - int(sys.argv[1])) / 1e9)' "$begun" "$(date +%s%N)"
}
bare() {
    qemu-system-x86_64 -machine q35 -accel tcg -cpu max -m 512 -smp 1 -display none -no-reboot -serial null \
        -monitor none -kernel "$image" -initrd "$work/initramfs" -append "console=ttyS0 panic=-1"
}
cd "$work/crate"
CARGO_TARGET_DIR=$(target_dir)/bench-tests
export CARGO_TARGET_DIR
nextest() { cargo nextest run --release --test many --test-threads 2 --no-fail-fast; }
VMLAB_REPORT_DIR=$work/back cargo nextest run --release --test back >"$work/log" 2>&1 || die "$(tail -n 20 "$work/log")"
nextest >"$work/log" 2>&1 || die "$(tail -n 20 "$work/log")"
load=$(cut -d " " -f 1 /proc/loadavg)
for _ in $(seq "$runs"); do
    echo "tests $(seconds nextest)"
    echo "bare $(seconds bare)"
done >"$work/times"

cd "$repo"
{
    heading
    echo
    echo "$(machine), 512 MB, one vCPU, TCG; load average $load before; median of $runs."
    echo
    python3 - "$work/times" "$count" "$work/back" <<'PYTHON'
import glob, json, statistics, sys
times, count = {}, int(sys.argv[2])
for line in open(sys.argv[1]):
    name, seconds = line.split()
    times.setdefault(name, []).append(float(seconds))
bare, tests = (statistics.median(times[name]) for name in ("bare", "tests"))
each = tests / count
print(f"| {count} trivial tests, two at a time | seconds | for each | of a bare boot | wanted |\n|---|---|---|---|---|")
print(f"| bare QEMU, one boot | {bare:.2f} s | {bare:.2f} s | **1** | |")
print(f"| `cargo nextest run`, each test in a VM of its own | {tests:.2f} s | {each:.3f} s | **{each / bare:.3f}** | 0.3 s for each |")
result = json.load(open(glob.glob(f"{sys.argv[3]}/*.json")[0]))
def found(value):
    if isinstance(value, dict):
        yield from value.get("measurements") or []
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from found(part)
all = {}
for measured in found(result):
    all.setdefault(measured["name"].split()[0], []).append(measured["value"])
print("\n| in the midst of a test | median | from | to |\n|---|---|---|---|")
for name, what in (("snapshot", "`vm.snapshot()`"), ("restore", "`vm.restore(&snapshot)`, and a command"), ("reset", "`vm.reset()`, and a command")):
    times = all[name]
    print(f"| {what} | {statistics.median(times):.0f} ms | {min(times):.0f} ms | {max(times):.0f} ms |")
PYTHON
} | publish tests
