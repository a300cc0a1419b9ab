#!/bin/busybox sh
# The first process of a guest: finds the root disk, unpacks the job into it and
# hands over to the job's init, which is guest-init.sh.
b=/bin/busybox
$b mount -t devtmpfs dev /dev
for module in $($b cat /modules/order); do
	$b insmod "/modules/$module" || echo "initrd: $module: failed"
done
tries=0
until $b mount -t ext4 -o noatime /dev/vda /root 2>/dev/null; do
	tries=$((tries + 1))
	if [ $tries -gt 100 ]; then
		echo 'initrd: no root disk'
		$b reboot -f
	fi
	$b usleep 100000
done
$b tar -xf /dev/vdb -C /root/job
$b umount /dev
exec $b switch_root /root /job/init
