#!/usr/bin/env bash
# How fast the host's files are in a guest over vmlab's file server, beside virtiofsd and QEMU's 9p: one
# guest has the host's root from each of the three and does the same work on each in turn, with
# one CPU, under TCG. Puts a table on top of bench/results/fs.md.
#
# Both virtio-fs servers get the same device of QEMU and `cache=auto`: names and attributes are
# remembered for a second. "Fixed" is vmlab as it shares what does not change, as the host's root. What
# "cold" is has been dropped from the guest's memory, not the host's. The kernel's 9p is mounted as vmlab
# would for a directory that is written to, and works once, for it takes as long as the rest together.
set -euo pipefail

# shellcheck source=bench/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

rounds=${ROUNDS:-3}
kernel=${KERNEL:-debian:6.12}
# Pinned, so that a table says the same next year.
virtiofsd_version=1.14.0

[ "$(id -u)" -eq 0 ] || die "only root can give virtiofsd what it needs: run this as root"
need_toolchain
need_vmlab
need libcap-ng-dev /usr/include/cap-ng.h
need libseccomp-dev /usr/include/seccomp.h
need git git
install_needed

cargo build --release --locked --quiet
cargo build --release --locked --quiet -p vmlab-devices --example share
target=$(target_dir)
tools=$target/tools/virtiofsd-$virtiofsd_version
if [ ! -x "$tools/bin/virtiofsd" ]; then
    cargo install --quiet --locked --root "$tools" "virtiofsd@$virtiofsd_version"
fi
vmlab=$target/release/vmlab
"$vmlab" kernel pull "$kernel"

# The source tree is that of everything that vmlab is built from, as a repository.
scratch=$work/scratch
mkdir -p "$scratch/crate/src"
cargo vendor --locked --quiet "$scratch/tree" >"$work/log" 2>&1 || die "cargo vendor: $(tail -n 3 "$work/log")"
git -C "$scratch/tree" init --quiet
git -C "$scratch/tree" add --force --all
git -C "$scratch/tree" -c user.name=bench -c user.email=bench@localhost commit --quiet -m tree
head -c 200M /dev/urandom >"$scratch/big"
cc -O2 -o "$scratch/files" bench/files.c
cat >"$scratch/crate/Cargo.toml" <<'TOML'
[package]
name = "small"
version = "0.1.0"
edition = "2024"
[workspace]
TOML
for number in $(seq 8); do
    echo "pub fn number() -> u32 { (0..$number).map(|n| n * n).sum() }" >"$scratch/crate/src/m$number.rs"
    echo "mod m$number;" >>"$scratch/crate/src/main.rs"
done
echo 'fn main() { println!("{}", m1::number() + m8::number()); }' >>"$scratch/crate/src/main.rs"

servers=()
stop_servers() {
    [ ${#servers[@]} -eq 0 ] || kill "${servers[@]}" 2>/dev/null || true
    rm -rf "$work"
}
trap stop_servers EXIT

# serve NAME COMMAND...: starts a server, and waits for its socket.
serve() {
    local name=$1
    shift
    "$@" >"$work/$name.log" 2>&1 &
    servers+=($!)
    for _ in $(seq 100); do
        [ -S "$work/$name.sock" ] && return
        sleep 0.1
    done
    die "$name does not serve: $(tail -n 3 "$work/$name.log")"
}
# It keeps a descriptor for every file that the guest knows, or a file handle, of which there is no end.
handles=never
if [ "$(ulimit -Hn)" != unlimited ] && [ "$(ulimit -Hn)" -lt 500000 ]; then handles=prefer; fi
serve virtiofsd "$tools/bin/virtiofsd" --socket-path "$work/virtiofsd.sock" --shared-dir / \
    --cache auto --inode-file-handles=$handles --log-level error
serve vmlab "$target/release/examples/share" "$work/vmlab.sock" / auto
serve fixed "$target/release/examples/share" "$work/fixed.sock" / fixed

device=()
for server in vmlab fixed virtiofsd; do
    device+=(--qemu-arg=-chardev --qemu-arg="socket,id=$server,path=$work/$server.sock")
    device+=(--qemu-arg=-device
        --qemu-arg="vhost-user-fs-pci,chardev=$server,tag=$server,queue-size=1024")
done
device+=(--qemu-arg=-fsdev --qemu-arg="local,id=nine,path=/,security_model=passthrough,multidevs=remap")
device+=(--qemu-arg=-device --qemu-arg="virtio-9p-pci,fsdev=nine,mount_tag=9p")

cargo run --release --locked --quiet -p vmlab-fuse --example passthrough_bench >"$work/alone"

load=$(cut -d " " -f 1 /proc/loadavg)
"$vmlab" run --accel tcg -m 4G -c 1 -k "$kernel" --share-via virtiofs --machine q35 \
    --boot-timeout 300s "${device[@]}" -- \
    bench/fs-guest.sh "$scratch" "$rounds" "$(rustc --print sysroot)" vmlab fixed virtiofsd 9p >"$work/times"

# median ROW SERVER: in milliseconds.
median() {
    awk -v row="$1" -v server="$2" '$1 == row && $2 == server { print $3 / 1000 }' "$work/times" |
        sort -n | awk '{ t[NR] = $1 } END { if (NR) printf "%.0f", (t[int((NR + 1) / 2)] + t[int(NR / 2) + 1]) / 2 }'
}
rows() {
    local fixed
    fixed=$(median "$1" fixed)
    awk -v what="$2" -v a="$(median "$1" vmlab)" -v f="${fixed:-0}" -v b="$(median "$1" virtiofsd)" \
        -v c="$(median "$1" 9p)" 'BEGIN {
        printf "| %s | %.2f s | %s | %.2f s | %.2f s | **%.2f** | **%.1f** |\n",
            what, a / 1000, f ? sprintf("%.2f s", f / 1000) : "", b / 1000, c / 1000, b / a, c / a }'
}

{
    heading
    echo
    echo "$(machine), $kernel, one vCPU, TCG, virtiofsd $virtiofsd_version" \
        "(\`--inode-file-handles=$handles\`), median of $rounds; load average $load before."
    echo
    echo "| in the guest | vmlab | fixed | virtiofsd | 9p | virtiofsd / vmlab | 9p / vmlab |"
    echo "|---|---|---|---|---|---|---|"
    rows find-cold "\`find /usr -xdev\`, cold"
    rows find-warm "the same, warm"
    rows grep "\`grep -r\` over $(find "$scratch/tree" -type f -not -path '*/.git/*' | wc -l) files, cold"
    rows git-status "\`git status\` there, cold"
    rows git-status-warm "the same, warm"
    rows write "200 MB written in order"
    rows read "200 MB read in order, cold"
    rows random "20,000 random reads of 4 KiB, cold"
    rows files-create "20,000 files of 100 bytes made"
    rows files-stat "20,000 files looked up"
    rows files-unlink "20,000 files removed"
    rows build "\`cargo build\` of a small crate, cold"
    echo
    echo "Wanted: at least 1 beside virtiofsd, 1.3 for the rows without data, and 3 beside 9p."
    echo
    echo "The file server alone, without a guest, in thousands a second, and the memory of its process:"
    echo
    cat "$work/alone"
    echo
} | publish fs
