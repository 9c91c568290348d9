#!/usr/bin/env bash
# Every check there is: format, lints, licences, documentation, unit tests, and the end-to-end tests,
# which boot real VMs. Run by root, the end-to-end tests run a second time as an ordinary user.
# The last line is the count of tests: "N passed, N failed".
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
. "$repo/scripts/lib.sh"
cd "$repo"

# Pinned, so that a new release of it cannot fail an old commit.
cargo_deny_version=0.20.2
test_user=vmlab-test

need_toolchain
need_vmlab
need sudo sudo
need perl perl
need make make
need gcc gcc
need libelf1 /usr/lib/x86_64-linux-gnu/libelf.so.1
need iproute2 ip
need busybox-static busybox
need e2fsprogs /usr/sbin/mke2fs
need btrfs-progs mkfs.btrfs
need xfsprogs mkfs.xfs
need f2fs-tools mkfs.f2fs
need fio fio
need gpg gpg
need gpg-agent gpg-agent
need shellcheck shellcheck
need curl curl
need libxml2-utils xmllint
need chromium chromium
need mmdebstrap mmdebstrap
need dosfstools /usr/sbin/mkfs.vfat
need mtools mcopy
need uidmap newuidmap
need zstd zstd
need xz-utils xz
need fdisk /usr/sbin/sfdisk
need qemu-utils qemu-img
need passt passt
need util-linux lscpu
need ovmf /usr/share/OVMF/OVMF_CODE_4M.secboot.fd
need acpica-tools iasl
install_needed

target=$(target_dir)
export CARGO_TARGET_DIR=$target CARGO_TERM_COLOR=never
# In /tmp itself: an ordinary user must reach it, and TMPDIR may be private.
work=$(mktemp -d /tmp/vmlab-test.XXXXXX)
chmod 755 "$work"
user_made=
job=

cleanup() {
    local status=$?
    trap - EXIT INT TERM
    if [ -n "$job" ]; then
        kill -- "-$job" 2>/dev/null || true
        wait "$job" 2>/dev/null || true
    fi
    if [ -n "$user_made" ]; then
        as_root userdel "$test_user" >/dev/null 2>&1 || true
    fi
    rm -rf "$work"
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

failed_checks=()
passed=0
failed=0

# Runs a command as a process group of its own, so that a signal to this script ends all of it.
attend() {
    local status=0
    set -m
    "$@" </dev/null &
    job=$!
    set +m
    wait "$job" || status=$?
    job=
    return "$status"
}

# check NAME COMMAND...: one line when it is fine, all of its output when not.
check() {
    local name=$1 started=$SECONDS
    shift
    if attend "$@" >"$work/log" 2>&1; then
        say "ok    $name ($((SECONDS - started)) s)"
    else
        cat "$work/log"
        say "FAIL  $name: $*"
        failed_checks+=("$name")
    fi
}

# tests NAME COMMAND...: a command that prints the result lines of Rust's test harness.
tests() {
    local name=$1 started=$SECONDS status=0 ok bad
    shift
    attend "$@" >"$work/log" 2>&1 || status=$?
    ok=$(count passed)
    bad=$(count failed)
    # A test program that died has no result line.
    if [ "$status" -ne 0 ] && [ "$bad" -eq 0 ]; then bad=1; fi
    passed=$((passed + ok))
    failed=$((failed + bad))
    if [ "$status" -eq 0 ] && [ "$ok" -gt 0 ]; then
        say "ok    $name: $ok passed ($((SECONDS - started)) s)"
    else
        # Only what failed where there is such a part; everything where there is none.
        if grep -q '^failures:$' "$work/log"; then
            awk '/^(---- |failures:$)/ { on = 1 } on; /^test result:/ { on = 0 }' "$work/log"
            grep -E '^(error|test .* \.\.\. FAILED)' "$work/log" || true
        else
            tail -n 200 "$work/log"
        fi
        say "FAIL  $name: $ok passed, $bad failed ($((SECONDS - started)) s)"
        failed_checks+=("$name")
    fi
}

count() {
    sed -nE "s/^test result: .* ([0-9]+) $1[;.].*/\1/p" "$work/log" |
        awk '{ sum += $1 } END { print sum + 0 }'
}

clippy_and_rustfmt() {
    cargo fmt --version && cargo clippy --version && return
    rustup component add rustfmt clippy
}

deny() {
    local tools=$target/tools/cargo-deny-$cargo_deny_version
    if [ ! -x "$tools/bin/cargo-deny" ]; then
        cargo install --quiet --locked --root "$tools" "cargo-deny@$cargo_deny_version" || return 1
    fi
    cargo fetch --locked --quiet &&
        "$tools/bin/cargo-deny" --offline check licenses bans sources
}

# They are outside the workspace, and fuzzing needs another toolchain; that they still fit does not.
fuzz_targets() {
    # Nothing is linked, so libFuzzer itself need not be built.
    CUSTOM_LIBFUZZER_PATH=/nowhere/libfuzzer.a \
        cargo clippy --locked --manifest-path fuzz/Cargo.toml -- -D warnings
}

# The program of the end-to-end tests.
end_to_end_program() {
    cargo test --locked -p vmlab-cli --test e2e --no-run --message-format=json 2>/dev/null |
        sed -nE '/"kind":\["test"\]/s/.*"executable":"([^"]+)".*/\1/p'
}

# End-to-end tests of what a guest is, not of what the caller may do, or that only root can set up: root's run
# of them is enough.
once_only=(
    both::
    image_build::a_build_that_is_ended
    images::disks_come_to
    images::images_of_a_vmtest
    images::one_file
    images::secure_boot
    images::the_agent
    images::uefi_starts
    images::what_a_system
    modules::a_corrupted_list
    modules::a_module_that_keeps
    modules::a_modules_own_tests
    modules::modules_are_loaded
    native::
    nested::
    new_disks::a_full_disk
    new_disks::blocks_are_shared
    power_cuts::power_cuts_find
    rust_tests::cargo_tests
    served_disks::
    snapshots_apart::
    snapshots::a_pc_with_two_nodes
    snapshots::a_restored_guest_is_as
    snapshots::cloud_kernels
    snapshots::old_and_new_kernels
    snapshots::what_shapes_a_vm
    targets_harmed::
    timings::
)

say "vmlab $(git rev-parse --short HEAD 2>/dev/null || echo '(no git)'), $(cargo --version), as $(id -un)"
check "rustfmt and clippy are there" clippy_and_rustfmt
check "format" cargo fmt --all --check
check "shell scripts" shellcheck -x scripts/*.sh scripts/*/*.sh .ci/run bench/*.sh
# The settings of an image's scripts are put before them.
check "scripts of images" shellcheck -s sh -e SC2154 crates/vmlab-artifacts/src/*/*.sh
check "clippy" cargo clippy --locked --workspace --all-targets -- -D warnings
check "fuzz targets" fuzz_targets
check "documentation" env RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps
check "licences and duplicates" deny

mkdir -p "$work/tmp" "$work/state"
here=(env "TMPDIR=$work/tmp" "XDG_STATE_HOME=$work/state")
tests "all tests as $(id -un)" "${here[@]}" cargo test --locked --workspace --no-fail-fast

if [ "$(id -u)" -eq 0 ]; then
    program=$(end_to_end_program)
    if ! id "$test_user" >/dev/null 2>&1; then
        useradd --system --user-group --no-create-home --home-dir "$work/home" \
            --shell /bin/bash "$test_user"
        user_made=yes
    fi
    tests "end-to-end tests as $test_user" \
        "$repo/scripts/as-user.sh" "$work" "$repo" "$target" "$test_user" \
        "$program" "${once_only[@]/#/--skip=}"
else
    say "note  run by root, the end-to-end tests would run as root and as an ordinary user"
fi

if [ ${#failed_checks[@]} -gt 0 ]; then
    say "Failed: $(printf '%s; ' "${failed_checks[@]}")"
fi
say "$passed passed, $failed failed"
[ ${#failed_checks[@]} -eq 0 ] && [ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
