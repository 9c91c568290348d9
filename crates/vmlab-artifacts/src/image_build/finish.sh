# Runs when the packages are installed; $1 is the root. Before it stand the settings.
set -eu
root=$1
phase() { echo "vmlab-phase: $*" >&2; }

phase "configure the system"
rm -f "$root/vmlinuz.old" "$root/initrd.img.old"
echo "UUID=$root_uuid / ext4 noatime 0 0" >"$root/etc/fstab"
echo "$suite" >"$root/etc/hostname"
printf '127.0.0.1 localhost %s\n::1 localhost ip6-localhost ip6-loopback\n' "$suite" >"$root/etc/hosts"
echo LANG=C.UTF-8 >"$root/etc/default/locale"
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id" "$root/etc/resolv.conf" "$root"/etc/ssh/ssh_host_*
ln -s /etc/machine-id "$root/var/lib/dbus/machine-id"
mkdir -p "$root/etc/systemd/journald.conf.d"
printf '[Journal]\nStorage=volatile\n' >"$root/etc/systemd/journald.conf.d/vmlab.conf"

# What does something for a machine that runs for weeks, or has other hardware, costs only time here.
mask() {
    for unit; do ln -sf /dev/null "$root/etc/systemd/system/$unit"; done
}
mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer man-db.timer
mask e2scrub_all.timer e2scrub_reap.service logrotate.timer
mask systemd-pcrphase.service systemd-pcrphase-sysinit.service systemd-pstore.service
mask systemd-repart.service systemd-update-utmp-runlevel.service modprobe@drm.service
rm -f "$root"/etc/systemd/system/*.wants/systemd-pstore.service
rm -f "$root"/etc/systemd/system/*.wants/e2scrub_reap.service
rm -f "$root"/etc/systemd/system/timers.target.wants/*
mkdir -p "$root/etc/systemd/system-generators"
for generator in bless-boot hibernate-resume gpt-auto system-update; do
    ln -sf /dev/null "$root/etc/systemd/system-generators/systemd-$generator-generator"
done

mkdir -p "$root/boot/grub"
cat >"$root/boot/grub/grub.cfg" <<END
# Read by GRUB under BIOS and UEFI alike. The links in / are those of the newest kernel.
linux /vmlinuz root=UUID=$root_uuid ro console=tty0 console=ttyS0
initrd /initrd.img
boot
END

phase "make what boots"
work=$root/tmp/vmlab-boot
mkdir "$work" "$work/files" "$work/out"
cd "$work"
if [ -n "$boot_packages" ]; then
    # shellcheck disable=SC2086 # They are words.
    APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get -qq -o APT::Sandbox::User=root download $boot_packages
    for deb in ./*.deb; do dpkg-deb -x "$deb" files; done
fi
if [ -n "$bios" ]; then
    # In the root, whose libraries are those that it was built with.
    libraries=/tmp/vmlab-boot/files/lib/x86_64-linux-gnu:/tmp/vmlab-boot/files/usr/lib/x86_64-linux-gnu
    grub=/tmp/vmlab-boot/files/usr/lib/grub/i386-pc
    chroot "$root" env "LD_LIBRARY_PATH=$libraries" /tmp/vmlab-boot/files/usr/bin/grub-mkimage \
        -d "$grub" -O i386-pc -p "(,gpt$root_number)/boot/grub" -o /tmp/vmlab-boot/out/core.img \
        biosdisk part_gpt ext2 normal configfile linux boot echo search_fs_uuid
    cp "$root$grub/boot.img" out/boot.img
fi
if [ -n "$uefi" ]; then
    cp files/usr/lib/shim/shimx64.efi.signed out/shim.efi
    cp files/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed out/grub.efi
fi
tar -C out -cf "/proc/self/fd/$boot_fd" .
cd /
rm -rf "$work"

# What the building itself needed or left.
printf '%s' "$apt_sources" >"$root/etc/apt/sources.list.d/debian.sources"
: >"$root/etc/apt/sources.list"
find "$root/etc/apt/sources.list.d" -type f ! -name debian.sources -delete
rm -f "$root"/etc/apt/apt.conf.d/*mmdebstrap "$root"/etc/dpkg/dpkg.cfg.d/*mmdebstrap
rm -rf "$root"/tmp/* "$root"/run/*
find "$root/var/lib/apt/lists" -type f -delete
rm -f "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb
rm -f "$root"/var/log/*.log "$root"/var/log/apt/* "$root/var/cache/ldconfig/aux-cache"
rm -f "$root"/var/cache/debconf/*-old "$root"/var/lib/dpkg/*-old
# As long as this runs, these two keep services from being started here.
rm -f "$root/usr/sbin/policy-rc.d"
if [ -e "$root/sbin/start-stop-daemon.REAL" ]; then
    mv "$root/sbin/start-stop-daemon.REAL" "$root/sbin/start-stop-daemon"
fi

phase "make the file system"
# Without what is mounted in it, which only a view of the directory from another place shows.
view=$root/mnt
mount --bind "$root" "$view"
trap 'umount "$view"' EXIT
epoch=$(date -d "$date" +%s)
# The first boot has nothing to bring up to date with /usr.
for dir in etc var; do echo "TIMESTAMP_NSEC=${epoch}000000000" >"$root/$dir/.updated"; done
# Times of what was made here would make two builds differ.
find "$view" -xdev -newermt "@$epoch" -exec touch --no-dereference --date "@$epoch" {} +
E2FSPROGS_FAKE_TIME=$epoch mke2fs -q -F -t ext4 -L root -U "$root_uuid" -m 0 -J size=16 \
    -E "hash_seed=$hash_seed,offset=$root_start,nodiscard,lazy_itable_init=1,root_owner=0:0" \
    -d "$view" "/proc/self/fd/$disk_fd" "${root_kib}k"
