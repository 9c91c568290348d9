#!/bin/sh
# The init of examples/virtiofs.rs. It says what it finds; the program shows when.
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
echo started
mount -t virtiofs root /mnt && echo mounted
ls -l /mnt
cat /mnt/hello
echo "from the guest" >/mnt/written && cat /mnt/written
dd if=/dev/urandom of=/mnt/big bs=1M count=8 conv=fsync 2>&1 | tail -n 1
sha256sum /mnt/big
echo 3 >/proc/sys/vm/drop_caches
sha256sum /mnt/big
for module in /add/*.ko; do
    [ -e "$module" ] && insmod "$module"
done
cat /sys/class/misc/hw_random/rng_current
dd if=/dev/hwrng bs=64 count=4 2>/dev/null | md5sum
echo ready
sleep 1
echo "after: $(cat /mnt/hello 2>&1)"
poweroff -f
