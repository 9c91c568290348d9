#!/usr/bin/env bash
# From a fresh clone to a command in a VM: installs what is missing, builds vmlab, fetches a kernel
# and runs `uname -a` under it. Arguments are a command to run instead.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
. "$repo/scripts/lib.sh"
cd "$repo"

need_toolchain
need_vmlab
install_needed

say "Building vmlab ..."
cargo build --release --locked

vmlab=$(target_dir)/release/vmlab
kernel=debian:6.12
[ $# -gt 0 ] || set -- uname -a
say "\$ vmlab run -k $kernel -- $*"
"$vmlab" run -k "$kernel" -- "$@"

say
say "vmlab is at $vmlab"
say "Next: $vmlab shell -k $kernel"
