#!/usr/bin/env bash
# conformance.sh [KERNEL...]: public test suites of filesystems, and what developers do all day, in a guest on a
# share over virtio-fs. Run by root, once as root and once as an ordinary user. Without arguments, under
# Debian's 6.12. Takes about five minutes for each.
#
# What fails has to be in scripts/conformance/expected-failures.txt, and what is there has to fail; nothing may
# be skipped. Puts a table on top of bench/results/conformance.md.
set -euo pipefail

# shellcheck source=bench/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../bench/lib.sh"

# Pinned, for the list of failures is of these.
pjdfstest=0.2.2
fsx=0.3.2
limit=60m
test_user=vmlab-conformance
suites=(pjdfstest fsx stress-ng fio work)
expected=$repo/scripts/conformance/expected-failures.txt

[ $# -gt 0 ] || set -- debian:6.12

need_toolchain
need_vmlab
need stress-ng stress-ng
need fio fio
need sqlite3 sqlite3
need git git
need make make
need rsync rsync
need libacl1-dev /usr/include/sys/acl.h
install_needed

if [ -z "${VMLAB_BIN:-}" ]; then
    cargo build --release --locked --quiet
    VMLAB_BIN=$(target_dir)/release/vmlab
fi

tools=$(target_dir)/tools
installed() {
    [ -x "$tools/$1-$2/bin/$1" ] || cargo install --quiet --locked --root "$tools/$1-$2" "$1@$2"
}
installed pjdfstest "$pjdfstest"
installed fsx "$fsx"

# Where an ordinary user reaches it.
chmod 755 "$work"
mkdir "$work/tools"
cp "$tools/pjdfstest-$pjdfstest/bin/pjdfstest" "$tools/fsx-$fsx/bin/fsx" "$VMLAB_BIN" "$work/tools"
cp -r "$repo/scripts/conformance" "$work/configuration"

for kernel in "$@"; do
    "$VMLAB_BIN" kernel pull "$kernel"
done

as=(env)
user_made=
cleanup() {
    if [ -n "$user_made" ]; then userdel "$test_user" >/dev/null 2>&1 || true; fi
    rm -rf "$work"
}
trap cleanup EXIT

# From here on as an ordinary user, with the kernels that were fetched.
become_user() {
    local home=$work/home cache=${VMLAB_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/vmlab}
    if ! id "$test_user" >/dev/null 2>&1; then
        useradd --system --user-group --no-create-home --home-dir "$home" --shell /bin/bash "$test_user"
        user_made=yes
    fi
    mkdir -p "$home/.cache"
    cp -a --reflink=auto "$cache" "$home/.cache/vmlab"
    chown -R "$test_user:" "$home"
    as=(runuser -u "$test_user" -- env -i "PATH=$PATH" "HOME=$home" "USER=$test_user" "LANG=C.UTF-8")
}

failures=0
rows=
# run_suites KERNEL WHO
run_suites() {
    local share=$work/share-$2 log=$work/log status=0
    say "$1 as $2 ..."
    mkdir "$share"
    if [ -n "$user_made" ] && [ "$2" = user ]; then chown "$test_user:" "$share"; fi
    (cd "$share" && "${as[@]}" "$work/tools/vmlab" run -q --share-via virtiofs -k "$1" -m 1G --timeout "$limit" \
        --share "$work/tools:/mnt/tools:ro" --share "$work/configuration:/mnt/configuration:ro" \
        -- bash /mnt/configuration/guest.sh /mnt/tools /mnt/configuration) >"$log" 2>&1 </dev/null || status=$?
    if [ "$status" -ne 0 ] || [ "$(tail -n 1 "$log")" != "done" ]; then
        tail -n 50 "$log" >&2
        die "the suites under $1 as $2 ended with $status"
    fi
    rm -rf "$share"
    judge "$1" "$2" "$log"
}

# judge KERNEL WHO LOG: compares with the failures that are expected, and adds a row to the table.
judge() {
    local row="| $1 | $2 |" suite wrong
    sed -nE "s/^$2 ([^ ]+)$/\1/p" "$expected" | sort >"$work/wanted"
    sed -nE 's/^(FAIL|skip) ([^ ]+)$/\2/p' "$3" | sort >"$work/found"
    wrong=$(comm -13 "$work/wanted" "$work/found" && comm -23 "$work/wanted" "$work/found")
    if [ -n "$wrong" ]; then
        failures=$((failures + $(wc -l <<<"$wrong")))
        say "not as expected:"
        while read -r name; do
            awk -v name="$name" '$2 == name { on = 1; print; next } /^[^ ]/ { on = 0 } on' "$3"
        done <<<"$wrong"
    fi
    for suite in "${suites[@]}"; do
        row+=" $(grep -c "^ok $suite/" "$3" || true)"
        row+=" of $(grep -cE "^(ok|FAIL|skip) $suite/" "$3" || true) |"
    done
    rows+="$row $(sed -n '/./p' <<<"$wrong" | wc -l) |"$'\n'
    # A suite that has not run has no failures either.
    for suite in "${suites[@]}"; do
        grep -q "^ok $suite/" "$3" || die "nothing of $suite has run under $1 as $2"
    done
}

for kernel in "$@"; do run_suites "$kernel" "$([ "$(id -u)" -eq 0 ] && echo root || echo user)"; done
if [ "$(id -u)" -eq 0 ]; then
    become_user
    for kernel in "$@"; do run_suites "$kernel" user; done
fi

{
    heading
    echo
    echo "$(machine), one vCPU; pjdfstest $pjdfstest, fsx $fsx, $(stress-ng --version | cut -d ' ' -f 1-3 | tr -d ,), $(fio --version)."
    echo
    echo "| kernel | as | pjdfstest | fsx | stress-ng | fio | work | not as expected |"
    echo "|---|---|---|---|---|---|---|---|"
    printf '%s' "$rows"
    echo
} | publish conformance
[ "$failures" -eq 0 ] || die "$failures cases are not as expected"
