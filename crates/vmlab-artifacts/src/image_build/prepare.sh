# Runs before the packages are installed; $1 is the root. What is here shapes the initramfs.
set -eu
initramfs=$1/usr/share/initramfs-tools
config=$1/etc/initramfs-tools

# Only the modules that a VM's disk needs are loaded; without udev, which would look at every device
# only for systemd to do so again, the root is mounted seconds earlier under emulation.
mkdir -p "$initramfs/modules.d" "$config/conf.d" "$config/hooks"
mkdir -p "$config/scripts/init-top" "$config/scripts/init-bottom" "$config/scripts/local-block"
printf 'MODULES=list\nCOMPRESS=zstd\nRESUME=none\n' >"$config/conf.d/vmlab"
printf '%s\n' virtio_pci virtio_blk virtio_console ext4 >"$initramfs/modules.d/vmlab"

# Scripts here take the place of those with the same name that udev brings.
cat >"$config/scripts/init-top/udev" <<'END'
#!/bin/sh
# There is no udev in this initramfs: the kernel makes the device nodes.
exit 0
END
cat >"$config/scripts/init-bottom/udev" <<'END'
#!/bin/sh
[ "$1" = prereqs ] && exit 0
mount -n -o move /dev "$rootmnt/dev"
END
# Runs only where the root is not found: it is on another kind of disk.
cat >"$config/scripts/local-block/vmlab" <<'END'
#!/bin/sh
[ "$1" = prereqs ] && exit 0
for module in virtio_scsi ahci ata_piix nvme sd_mod usb_storage uas xhci_pci; do
    modprobe -q "$module" || true
done
END
cat >"$config/hooks/vmlab" <<'END'
#!/bin/sh
[ "$1" = prereqs ] && exit 0
. /usr/share/initramfs-tools/hook-functions
manual_add_modules virtio_scsi ahci ata_piix nvme sd_mod usb_storage uas xhci_pci
END
# Runs after udev's own, whose files are of no use without it.
cat >"$config/hooks/zz-vmlab" <<'END'
#!/bin/sh
[ "$1" = prereqs ] && echo udev && exit 0
rm -rf "$DESTDIR/usr/lib/udev" "$DESTDIR/lib/udev" "$DESTDIR/usr/lib/systemd" "$DESTDIR/lib/systemd"
rm -f "$DESTDIR/usr/bin/udevadm" "$DESTDIR/bin/udevadm"
END
chmod 755 "$config"/scripts/*/* "$config"/hooks/*
