#!/usr/bin/env bash
# How long it takes from saving a module's only file until vmlab has built it, loaded it into a fresh VM, used it, unloaded
# it and looked for what is left: whole, and what the VM has of that. Beside it, in turn: `make` alone, and the same by hand, as
# `make` and a script of insmod, command and rmmod in a `vmlab run`. Puts a table on top of bench/results/module.md.
set -euo pipefail

# shellcheck source=bench/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

runs=${RUNS:-7}
kernel=debian:6.12

need_toolchain
need_vmlab
need make make
need gcc gcc
need python3 python3
install_needed

cargo build --release --locked --quiet
vmlab=$(target_dir)/release/vmlab
"$vmlab" kernel pull "$kernel" 2>/dev/null
cp -r examples/modules/good "$work/good"
cd "$work"
load=$(cut -d " " -f 1 /proc/loadavg)

# The number in a message changes with each save.
save() { sed -i "s/the number is %d now[^\\\\]*/the number is %d now, $1/" good/good.c; }
# Milliseconds since 1970.
now() { date +%s%3N; }
module() { "$vmlab" module test good -k "$kernel" -q --json "$work/out.json" -- cat /proc/good >"$work/said" || die "$(cat "$work/said")"; }

# The headers are where vmlab has unpacked them.
module
headers=$(find "${VMLAB_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/vmlab}/headers" -maxdepth 4 -name "linux-headers-$(of_kernel release "$kernel")" | head -n 1)
[ -d "$headers" ] || die "the headers of $kernel are not in the cache"
cp -r good byhand
rm -r byhand/tests
byhand() {
    make -s -C "$headers" M="$work/byhand" CONFIG_DEBUG_INFO_BTF_MODULES= modules >"$work/said" 2>&1 || die "$(cat "$work/said")"
}
loaded() {
    "$vmlab" run -q -m 512M -k "$kernel" -- \
        sh -c "insmod $work/byhand/good.ko && cat /proc/good && rmmod good" >"$work/said" 2>&1 || die "$(cat "$work/said")"
}
byhand
# The directory is the working directory's, which is shared.
loaded
for round in $(seq "$runs"); do
    save "$round"
    begun=$(now) && module && echo "test $(($(now) - begun))" >>samples
    python3 -c '
import json, sys
attempt = json.load(open(sys.argv[1]))["targets"][0]["attempts"][0]
print("build", attempt["build_ms"])' out.json >>samples
    begun=$(now) && module && echo "vm $(($(now) - begun))" >>samples
    sed -i "s/the number is %d now[^\\\\]*/the number is %d now, $round/" byhand/good.c
    begun=$(now) && byhand && echo "make $(($(now) - begun))" >>samples
    loaded && echo "byhand $(($(now) - begun))" >>samples
done

python3 - samples <<'PYTHON' >rows
import statistics, sys
times = {}
for line in open(sys.argv[1]):
    name, ms = line.split()
    times.setdefault(name, []).append(float(ms) / 1000)
median = {name: statistics.median(all) for name, all in times.items()}
def row(what, name, wanted=""):
    all = times[name]
    print(f"| {what} | {median[name]:.2f} s | {min(all):.2f} s | {max(all):.2f} s | **{median[name] / median['test']:.2f}** | {wanted} |")
print("| whole process | median | fastest | slowest | of the first | wanted |\n|---|---|---|---|---|---|")
row("from save to verdict: `vmlab module test`", "test", "2.5 s")
row("its build, while the VM starts", "build")
row("the same without a change: the VM alone", "vm", "0.5 s")
row("`make` alone, by hand", "make")
row("`make`, and `vmlab run` with insmod, the command and rmmod, which checks nothing", "byhand")
PYTHON
cd "$repo"
{
    heading
    echo
    echo "$(machine), $kernel, 512 MB, one vCPU, TCG; load average $load before; $runs rounds in turn."
    echo
    cat "$work/rows"
} | publish module
