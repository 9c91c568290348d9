# vmlab-start 1
# Starts vmlab's agent in a booted system, whoever asks for it first: cloud-init, systemd or
# qemu-guest-agent. Run as `sh -c "$THIS" start [HOW]`.
#   detached       the agent of the seed drive, in a unit of its own (the default)
#   here           the agent of the seed drive, in place of this shell
#   stdin          the agent that standard input brings, in a unit of its own
# Whoever comes second finds the port taken, and says nothing. Exit codes for the others:
# 3: there is no port of vmlab; 4: there is no seed drive; 5: there is no place for the agent.
PATH="${PATH:-/bin}:/usr/sbin:/usr/bin:/sbin:/bin:/run/current-system/sw/bin"
export PATH
how=${1:-detached}
dir=/run/vmlab
agent=$dir/vmlab-agent

fail() {
    code=$1
    shift
    echo "vmlab: $*" >&2
    exit "$code"
}

# The link is udev's; without udev the kernel's own list tells the port.
find_port() {
    port=/dev/virtio-ports/vmlab
    [ -c "$port" ] && return
    for name in /sys/class/virtio-ports/*/name; do
        [ -r "$name" ] || continue
        read -r text <"$name"
        [ "$text" = vmlab ] || continue
        port=${name%/name}
        port=/dev/${port##*/}
        [ -c "$port" ] && return
    done
    return 1
}

# Other drives may have the label as well, so the seed's head counts: `vmlab-seed 1 BLOCK BLOCKS`
# of the agent, in 64 KiB. Reading the drive as it is takes no mount, and no driver for its file system.
find_drive() {
    for drive in /dev/disk/by-label/cidata /dev/sr[0-9]* /dev/vd[a-z]* /dev/sd[a-z]*; do
        [ -b "$drive" ] || continue
        head=$(dd if="$drive" bs=2048 skip=15 count=1 2>/dev/null | tr -d '\000')
        case $head in
            'vmlab-seed 1 '*)
                # Words of digits, by the seed's own maker.
                # shellcheck disable=SC2086
                set -- $head
                first=$3 blocks=$4
                return
                ;;
        esac
    done
    return 1
}

# What may run programs is not given: /run may be mounted noexec.
make_dir() {
    # What is above it is there.
    # shellcheck disable=SC2174
    mkdir -p -m 0700 "$dir" || return
    grep -q " $dir tmpfs " /proc/mounts && return
    mount -t tmpfs -o mode=0700,nosuid,nodev,exec,size=64m vmlab "$dir"
}

find_port || { modprobe -q virtio_console && sleep 1 && find_port; } \
    || fail 3 'there is no virtio port named vmlab'
[ "$how" = stdin ] || find_drive || fail 4 'there is no seed drive'
make_dir || fail 5 "cannot mount $dir"
case $how in
    stdin) cat ;;
    *) dd if="$drive" bs=65536 skip="$first" count="$blocks" 2>/dev/null ;;
esac >"$agent.$$" || fail 5 "cannot copy the agent to $dir"
# A running program cannot be written to, but its name can be given to another. Other users cannot come to it
# here, but the agent runs itself for them.
# shellcheck disable=SC2015
chmod 0755 "$agent.$$" && mv -f "$agent.$$" "$agent" || fail 5 "cannot put the agent into $dir"

if [ "$how" = here ]; then
    exec "$agent" guest
fi
if [ -d /run/systemd/system ]; then
    # It is there until the very end of the system, and a command that runs out of memory, or has
    # many processes, is no reason to end it.
    unit='--quiet --property=DefaultDependencies=no --property=After=basic.target'
    more='--collect --property=OOMPolicy=continue --property=TasksMax=infinity --property=IgnoreOnIsolate=yes'
    # shellcheck disable=SC2086
    systemd-run --unit=vmlab-agent --no-block $unit $more "$agent" guest 2>/dev/null \
        && exit 0
    systemctl is-active --quiet vmlab-agent.service 2>/dev/null && exit 0
    # Older ones know fewer properties, or a failed unit has the name.
    # shellcheck disable=SC2086
    systemd-run $unit "$agent" guest 2>/dev/null && exit 0
fi
if command -v setsid >/dev/null 2>&1; then
    setsid "$agent" guest </dev/null >/dev/null 2>&1 &
else
    (trap '' HUP; exec "$agent" guest </dev/null >/dev/null 2>&1) &
fi
exit 0
