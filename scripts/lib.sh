# Shared by the scripts of this repository; sourced, not run.
# shellcheck shell=bash

say() { printf '%s\n' "$*"; }

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Runs a command as root.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "this needs root: $* (run the script as root, or install sudo)"
    fi
}

# Whether a program is there. System programs are not in every user's PATH.
has() {
    PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" command -v "$1" >/dev/null
}

# need PACKAGE PROGRAM: remembers that a program is needed, and the package that has it.
# need PACKAGE /FILE: the same for a file.
needed=()
need() { needed+=("$1 $2"); }

# The packages of what is needed and not there.
missing_packages() {
    local one package file
    for one in "${needed[@]}"; do
        read -r package file <<<"$one"
        case $file in
            /*) [ -e "$file" ] || echo "$package" ;;
            *) has "$file" || echo "$package" ;;
        esac
    done
}

# Installs what is missing; says nothing when nothing is. A package can take another's place that was there,
# of another version for example, so it is looked once more.
install_needed() {
    local missing
    for _ in 1 2; do
        mapfile -t missing < <(missing_packages)
        [ ${#missing[@]} -gt 0 ] || return 0
        install_packages "${missing[@]}"
    done
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -eq 0 ] || die "these are installed, but what is needed of them is not there: ${missing[*]}"
}

install_packages() {
    local packages=("$@") log
    has apt-get || die "these are missing, and only apt is known here: ${packages[*]}"
    say "Installing: ${packages[*]}"
    log=$(mktemp)
    if ! {
        as_root apt-get -q update &&
            as_root env DEBIAN_FRONTEND=noninteractive \
                apt-get -q -y install --no-install-recommends "${packages[@]}"
    } >"$log" 2>&1 </dev/null; then
        cat "$log" >&2
        rm -f "$log"
        die "apt-get could not install: ${packages[*]}"
    fi
    rm -f "$log"
}

# What building needs: a toolchain, and a C compiler that links and builds the compression libraries.
need_toolchain() {
    if ! command -v cargo >/dev/null && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
        PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    fi
    command -v cargo >/dev/null ||
        die "cargo is not in PATH; install a Rust toolchain, for example with rustup (https://rustup.rs)"
    need gcc cc
    need libc6-dev /usr/include/stdio.h
    need ca-certificates /etc/ssl/certs/ca-certificates.crt
}

# What running VMs needs.
need_vmlab() {
    need qemu-system-x86 qemu-system-x86_64
    need kmod depmod
}

# Where cargo puts what it builds, as an absolute path.
target_dir() {
    local dir=${CARGO_TARGET_DIR:-$repo/target}
    mkdir -p "$dir" && (cd "$dir" && pwd)
}
