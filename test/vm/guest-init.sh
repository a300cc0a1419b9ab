#!/bin/bash
# The init of a guest: mounts file systems, starts xenstored under Xen,
# runs the job and reports its exit status. There is no udev, no systemd and no
# network; device nodes are the kernel's own.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8

mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for folder in /dev/shm /run /tmp; do
	mount -t tmpfs -o mode=1777 tmpfs $folder
done
ln -sfn /proc/self/fd /dev/fd
ln -sfn fd/0 /dev/stdin
ln -sfn fd/1 /dev/stdout
ln -sfn fd/2 /dev/stderr
hostname guest
ip link set lo up
modprobe loop

# start_xenstored makes a domain 0 of a kernel that runs on Xen.
start_xenstored() {
	modprobe -a xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs xen-blkback xen-blkfront
	mount -t xenfs xenfs /proc/xen
	mkdir -p /run/xen /run/xenstored /var/log/xen /var/lib/xen /var/lib/xenstored
	mount -t tmpfs -o mode=755 xenstored /var/lib/xenstored
	local bin
	bin=$(echo /usr/lib/xen-[0-9]*/bin)
	PATH=$bin:$PATH xenstored --pid-file /run/xenstored.pid
	local tries
	for tries in $(seq 100); do
		xenstore-read / >/dev/null 2>&1 && break
		sleep 0.1
	done
	[ "$tries" -lt 100 ] || echo 'guest: xenstored does not answer'
	"$bin/xen-init-dom0"
}
if grep -qw vm.kind=xen /proc/cmdline; then
	start_xenstored
fi

stty -F /dev/ttyS1 raw -echo
exec 5>/dev/ttyS1
(cd /job/files && exec setsid bash /job/command) </dev/null >&5 2>&1
printf '\n\036status %d\n' $? >&5
exec 5>&-

# QEMU runs with -no-reboot, so that this ends it, under Xen too.
echo 1 >/proc/sys/kernel/sysrq
echo b >/proc/sysrq-trigger
sleep 30
