#!/usr/bin/env bash
# action.sh prepare|build|run: the steps of action.yml, which says what the variables INPUT_* are.
#
# No input is ever evaluated: they are compared, written into a file as strings, or handed on as one argument.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
. "$repo/scripts/lib.sh"

# What vmlab itself gives when nothing could be run.
failed=125

# fail MESSAGE: shows it with the step, and ends.
fail() {
    local text=$1
    text=${text//%/%25}
    text=${text//$'\r'/%0D}
    text=${text//$'\n'/%0A}
    printf '::error title=vmlab::%s\n' "$text"
    exit "$failed"
}

# output NAME VALUE: an output of the step. The value may have any lines in it, as nobody knows the delimiter.
output() {
    local delimiter
    delimiter=$(</proc/sys/kernel/random/uuid)
    printf '%s<<%s\n%s\n%s\n' "$1" "$delimiter" "$2" "$delimiter" >>"$GITHUB_OUTPUT"
}

# group TITLE COMMAND...: its output, folded.
group() {
    local status=0
    printf '::group::%s\n' "$1"
    "${@:2}" || status=$?
    printf '::endgroup::\n'
    return "$status"
}

enter() {
    [ -z "$1" ] || cd -- "$1" || fail "the working directory cannot be entered: $1"
}

# absolute PATH: the same, from the root.
absolute() {
    case $1 in
        /*) printf '%s' "$1" ;;
        *) printf '%s/%s' "$PWD" "$1" ;;
    esac
}

# open_kvm DEVICE RULES: lets this user open the device, by a rule in this directory as GitHub's runners need
# it. Without KVM vmlab works, too, so nothing of it fails the step.
open_kvm() {
    if [ ! -e "$1" ]; then
        say "There is no $1: processors are emulated, which is slower."
        return
    fi
    if [ -r "$1" ] && [ -w "$1" ]; then return; fi
    (
        printf '%s\n' 'KERNEL=="kvm", GROUP="kvm", MODE="0666", OPTIONS+="static_node=kvm"' |
            as_root tee "$2/99-vmlab-kvm.rules" >/dev/null &&
            as_root udevadm control --reload-rules &&
            as_root udevadm trigger --name-match=kvm &&
            as_root udevadm settle
    ) || true
    if [ ! -w "$1" ]; then
        say "$1 cannot be opened: processors are emulated, which is slower."
    fi
}

# offer_debian APT: lets vmlab fetch Debian's kernels on another distribution. It uses the source with an apt
# of its own; the host's apt is told to take nothing from it.
offer_debian() {
    local keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    local archive=$INPUT_DEBIAN_ARCHIVE
    [ -n "$archive" ] || fail "Debian's kernels on another distribution need the input debian_archive"
    if grep -RqsF -- "$archive" "$1/sources.list" "$1/sources.list.d"; then return; fi
    need debian-archive-keyring "$keyring"
    install_needed
    printf '%s\n' 'Package: *' 'Pin: release o=Debian' 'Pin-Priority: -1' |
        as_root tee "$1/preferences.d/vmlab-debian" >/dev/null
    printf '%s\n' 'Types: deb' "URIs: $archive" 'Suites: stable' 'Components: main' \
        "Signed-By: $keyring" | as_root tee "$1/sources.list.d/vmlab-debian.sources" >/dev/null
}

# Whether one of Debian's kernels is asked for, here or in the file of targets.
wants_debian() {
    local files=(vmlab.toml vmtest.toml)
    [ -z "$INPUT_FILE" ] || files=("$INPUT_FILE")
    [[ $INPUT_KERNEL == *debian:* ]] || grep -qs -e 'debian:' -- "${files[@]}"
}

prepare() {
    local key system
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "vmlab runs on x86-64 Linux, not on $(uname -sm)"
    enter "$INPUT_WORKING_DIRECTORY"
    if [ "$INPUT_INSTALL" = true ]; then
        need_vmlab
        need curl curl
        [ -n "$INPUT_VMLAB" ] || need gcc cc
        [ -z "$(missing_packages)" ] || group "Install what vmlab needs" install_needed
        open_kvm /dev/kvm /etc/udev/rules.d
        # shellcheck source=/dev/null
        if wants_debian && [ "$(. /etc/os-release && printf '%s' "${ID:-}")" != debian ]; then
            offer_debian /etc/apt
        fi
    fi
    if [ -n "$INPUT_VMLAB" ]; then
        output program "$(absolute "$INPUT_VMLAB")"
        return
    fi
    # Programs are of a C library, and so of a release of the system.
    # shellcheck source=/dev/null
    system=$(. /etc/os-release && printf '%s-%s' "${ID:-linux}" "${VERSION_ID:-}")
    key=vmlab-$system-$(sources | sha256sum | cut -c 1-32)
    output key "$key"
    output program "${XDG_CACHE_HOME:-$HOME/.cache}/vmlab-action/$key/vmlab"
}

# What a build is made of.
sources() {
    (cd "$repo" && find Cargo.toml Cargo.lock crates -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum)
}

build() {
    # shellcheck disable=SC2153 # It is given by action.yml.
    if [ -x "$PROGRAM" ]; then return; fi
    group "Build vmlab" compile || fail "vmlab could not be built; the log says why"
}

compile() {
    local dir toolchain=() wanted found
    need_toolchain
    install_needed
    wanted=$(sed -nE 's/^rust-version = "(.*)"$/\1/p' "$repo/Cargo.toml")
    found=$(cargo --version | cut -d ' ' -f 2)
    if [ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -n 1)" != "$wanted" ]; then
        has rustup || die "vmlab needs Rust $wanted, and this is $found"
        rustup toolchain install stable --profile minimal || return
        toolchain=(+stable)
    fi
    dir=$(mktemp -d "${RUNNER_TEMP:-/tmp}/vmlab-build.XXXXXX")
    # In the sources' directory, whose cargo configuration is vmlab's and not the workspace's.
    (cd "$repo" && cargo "${toolchain[@]}" build --release --locked -p vmlab-cli --target-dir "$dir") || return
    mkdir -p "$(dirname "$PROGRAM")" && mv "$dir/release/vmlab" "$PROGRAM" || return
    rm -rf "$dir"
}

# lines ARRAY TEXT: its lines without the blanks around them, and without empty ones.
lines() {
    local -n into=$1
    local line
    into=()
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line%$'\r'}
        line=${line#"${line%%[![:blank:]]*}"}
        line=${line%"${line##*[![:blank:]]}"}
        [ -z "$line" ] || into+=("$line")
    done <<<"$2"
}

# fetch WHAT URL SHA256 DIR: downloads, and sets `fetched` to the file. Its name is kept, as it says what it is.
fetch() {
    local name=${2%%[?#]*} found wanted=${3,,}
    case $2 in
        https://* | file://*) ;;
        http://*) [ -n "$wanted" ] || fail "$1_url: http cannot be trusted without ${1}_sha256" ;;
        *) fail "$1_url: not a URL of https, http or file: $2" ;;
    esac
    name=${name##*/}
    name=${name//[!A-Za-z0-9._-]/_}
    mkdir "$4/$1"
    fetched=$4/$1/${name:-$1}
    curl --fail --silent --show-error --location --retry 3 --proto '=https,http,file' \
        --proto-redir '=https,http' --output "$fetched" --url "$2" ||
        fail "$1_url: this cannot be downloaded: $2"
    found=$(sha256sum <"$fetched")
    found=${found%% *}
    if [ -z "$wanted" ]; then
        say "$1_url: not checked; ${1}_sha256: $found would check it"
    elif [ "$found" != "$wanted" ]; then
        fail "$1_url: its SHA-256 is $found, but ${1}_sha256 is $wanted"
    fi
}

# toml TEXT: a string of TOML.
toml() {
    local LC_ALL=C text=$1 escape=\\ code char
    text=${text//"$escape"/"$escape$escape"}
    text=${text//'"'/"$escape\""}
    for code in {1..31} 127; do
        # shellcheck disable=SC2059 # The format is the character.
        printf -v char "\\x$(printf %x "$code")"
        text=${text//"$char"/"$escape$(printf 'u%04X' "$code")"}
    done
    printf '"%s"' "$text"
}

# key NAME TEXT: a line with a string, if there is one.
key() {
    [ -z "$2" ] || printf '%s = %s\n' "$1" "$(toml "$2")"
}

# describe IMAGE KERNEL...: a file with the one target that the inputs describe, or one for each kernel.
describe() {
    local image=$1 table=target kernel comma=
    shift
    [ $# -le 1 ] || table=matrix
    printf '[[%s]]\n' "$table"
    key name "$INPUT_NAME"
    if [ $# -eq 1 ]; then key kernel "$1"; fi
    if [ $# -gt 1 ]; then
        printf 'kernel = ['
        for kernel in "$@"; do
            printf '%s%s' "$comma" "$(toml "$kernel")"
            comma=', '
        done
        printf ']\n'
    fi
    key image "$image"
    if [ "$INPUT_UEFI" = true ]; then printf 'uefi = true\n'; fi
    key kernel-args "$INPUT_KERNEL_ARGS"
    key memory "$INPUT_MEMORY"
    [ -z "$INPUT_CPUS" ] || printf 'cpus = %s\n' "$INPUT_CPUS"
    key timeout "$INPUT_TIMEOUT"
    key command "$INPUT_COMMAND"
}

run() {
    local work options=() more kernels image=$INPUT_IMAGE one='' status=0 own reports json suite
    enter "$INPUT_WORKING_DIRECTORY"
    work=$(mktemp -d "${RUNNER_TEMP:-/tmp}/vmlab.XXXXXX")
    # Expanded now, as the variable is gone then.
    # shellcheck disable=SC2064
    trap "rm -rf $(printf %q "$work")" EXIT
    lines kernels "$INPUT_KERNEL"
    lines more "$INPUT_ARGS"

    if [ -z "$INPUT_COMMAND" ]; then
        [ -z "$INPUT_KERNEL$INPUT_KERNEL_URL$INPUT_IMAGE$INPUT_IMAGE_URL" ] ||
            fail "a kernel or an image needs a command; the targets of a file have their own"
        [ -z "$INPUT_FILE" ] || options+=("--config=$INPUT_FILE")
    else
        [ -z "$INPUT_FILE" ] || fail "there is a command and a file: one of them says what is run"
        [ ${#kernels[@]} -eq 0 ] || [ -z "$INPUT_KERNEL_URL" ] || fail "there is a kernel and a kernel_url"
        [ -z "$image" ] || [ -z "$INPUT_IMAGE_URL" ] || fail "there is an image and an image_url"
        [[ $INPUT_CPUS =~ ^[0-9]*$ ]] || fail "cpus is no number: $INPUT_CPUS"
        local index
        # The file that is written is elsewhere, and its paths are from there.
        for index in "${!kernels[@]}"; do
            case ${kernels[index]} in
                */* | .* | *.deb) kernels[index]=$(absolute "${kernels[index]}") ;;
                *) [ ! -e "${kernels[index]}" ] || kernels[index]=$(absolute "${kernels[index]}") ;;
            esac
        done
        [ -z "$image" ] || image=$(absolute "$image")
        if [ -n "$INPUT_KERNEL_URL" ]; then
            fetch kernel "$INPUT_KERNEL_URL" "$INPUT_KERNEL_SHA256" "$work"
            kernels=("$fetched")
        fi
        if [ -n "$INPUT_IMAGE_URL" ]; then
            fetch image "$INPUT_IMAGE_URL" "$INPUT_IMAGE_SHA256" "$work"
            image=$fetched
        fi
        # Reports are of the directory's name, as with a file that is in it.
        suite=$work/file/${PWD##*/}
        mkdir -p "$suite"
        describe "$image" "${kernels[@]}" >"$suite/vmlab.toml"
        options+=("--config=$suite/vmlab.toml")
        [ ${#kernels[@]} -gt 1 ] || one=yes
    fi
    [ -z "$INPUT_FILTER" ] || options+=("--filter=$INPUT_FILTER")
    [ -z "$INPUT_SHARD" ] || options+=("--shard=$INPUT_SHARD")
    [ -z "$INPUT_JOBS" ] || options+=("--jobs=$INPUT_JOBS")

    if [ -n "$INPUT_REPORTS" ]; then
        reports=$(absolute "$INPUT_REPORTS")
        mkdir -p "$reports" || fail "the directory for reports cannot be made: $reports"
    else
        reports=$(mktemp -d "${RUNNER_TEMP:-/tmp}/vmlab-reports.XXXXXX")
    fi
    json=$reports/results.json
    options+=("--json=$json" "--junit=$reports/junit.xml" "--html=$reports/html")
    # What an earlier run has left says nothing of this one.
    rm -f -- "$json"
    output reports "$reports"
    output json "$json"
    output junit "$reports/junit.xml"
    output html "$reports/html/index.html"

    local program=$PROGRAM
    # The command has the step's environment, and these are no part of it.
    unset PROGRAM "${!INPUT_@}"
    "$program" test "${options[@]}" "${more[@]}" || status=$?

    if [ "$status" -eq 1 ] && [ -n "$one" ]; then
        # Lines of vmlab's own JSON: those of a command's output are inside of strings, on one line with them.
        own=$(sed -nE 's/^ +"exit_code": ([0-9]+),?$/\1/p' "$json" | tail -n 1)
        [ "${own:-0}" -eq 0 ] || status=$own
    fi
    output exit_code "$status"
    # What failed is shown by vmlab itself, unless there was nothing that it could run.
    if [ "$status" -ne 0 ] && [ ! -s "$json" ]; then
        printf '::error title=vmlab::%s\n' "vmlab ended with code $status before it had results; the log says why"
    fi
    return "$status"
}

# Tests read the functions.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    case ${1:-} in
        prepare | build | run) "$1" ;;
        *) die "prepare, build or run" ;;
    esac
fi
