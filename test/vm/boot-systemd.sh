#!/bin/bash
# Boots systemd as process 1 of new namespaces, on a Debian root file system that is removed
# afterwards, runs one command there and exits with its status. Status 125 means that the
# command had none, so that nothing was tested.
#
# It is not a virtual machine: the kernel is the host's. Processes, mounts, network and
# control groups are separate, and /proc/sys is read-only.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/xapi-nbd-vm}
suite=bookworm
packages=systemd,systemd-sysv,dbus,procps,iproute2,util-linux,rpm

log() { printf 'boot: %s\n' "$*" >&2; }

usage() {
	cat >&2 <<-END
	usage: boot-systemd.sh [-d DIR] [-t SECONDS] COMMAND...
	  -d DIR      becomes the working directory of COMMAND, as a copy
	  -t SECONDS  after which everything inside is ended
	COMMAND is a line for bash, which runs as root. What it prints is printed here.
	END
	exit 125
}

dir='' limit=600
while getopts d:m:s:t: option; do
	case $option in
	d) dir=$OPTARG ;;
	t) limit=$OPTARG ;;
	m | s) ;; # for machines
	*) usage ;;
	esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || usage

# The root file system is made once, and anew when the list of packages changes.
base=$cache/systemd-$(printf '%s' "$suite $packages" | sha256sum | cut -c -16)
mkdir -p "$cache"
exec 9>"$cache/lock-systemd"
flock 9
if [ ! -d "$base" ]; then
	log "root file system"
	sources=/etc/apt/sources.list.d/debian.sources
	[ -s "$sources" ] || sources=/etc/apt/sources.list
	rm -rf "$base.new"
	mmdebstrap --quiet --mode=root --variant=minbase --include="$packages" \
		--aptopt='APT::Install-Recommends "false"' \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' \
		"$suite" "$base.new" "$sources" >&2 || exit 125
	: >"$base.new/etc/machine-id"
	mv "$base.new" "$base"
fi
flock -u 9

# systemd needs a control group of version 2 for itself.
unified=$(findmnt -n -t cgroup2 -o TARGET | head -n 1)
[ -n "$unified" ] || {
	log "there is no cgroup2 file system"
	exit 125
}
group=$unified/xapi-nbd-systemd.$$
work=$(mktemp -d)
outer=''
cleanup() {
	if [ -n "$outer" ]; then
		kill -KILL "$(pgrep -P "$outer")" 2>/dev/null || true # process 1, and all others with it
		wait "$outer" 2>/dev/null || true
	fi
	for _ in $(seq 50); do
		find "$group" -depth -type d -exec rmdir {} + 2>/dev/null && break
		sleep 0.1
	done
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 125' INT TERM
mkdir "$group" "$work/layers" "$work/root"

cat >"$work/init" <<'END'
set -e
mount -t tmpfs layers "$work/layers"
mkdir "$work/layers/upper" "$work/layers/work"
mount -t overlay overlay -o "lowerdir=$base,upperdir=$work/layers/upper,workdir=$work/layers/work" "$work/root"
cd "$work/root"
mkdir job
[ -z "$dir" ] || cp -a "$dir/." job/
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,ro,bind proc/sys
mount -t sysfs -o ro sys sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs dev
for node in null zero full random urandom tty; do
	: >"dev/$node"
	mount --bind "/dev/$node" "dev/$node"
done
ln -s /proc/self/fd dev/fd
mkdir dev/shm dev/pts
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
ip link set lo up
mkdir old
pivot_root . old
umount -l old
exec env -i container=xapi-nbd PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
	/lib/systemd/systemd --log-target=journal --show-status=no </dev/null
END
export base work dir
(
	echo "$BASHPID" >"$group/cgroup.procs"
	exec unshare --pid --mount --uts --ipc --net --cgroup --fork --propagation private bash "$work/init"
) >"$work/console" 2>&1 9>&- &
outer=$!

init=''
inside() { nsenter -t "$init" --all --root --wd env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 HOME=/root "$@"; }
for _ in $(seq 600); do
	init=$(pgrep -P "$outer" || true)
	if [ -n "$init" ] && [ "$(cat "/proc/$init/comm" 2>/dev/null)" = systemd ] &&
		inside systemctl is-system-running 2>/dev/null | grep -Eq 'running|degraded'; then
		break
	fi
	kill -0 "$outer" 2>/dev/null || {
		log "systemd has not come up:"
		tail -n 40 "$work/console" >&2
		exit 125
	}
	sleep 0.1
done

status=0
inside timeout -k 5 "$limit" bash -c 'cd /job && eval "$1"' bash "$*" 9>&- || status=$?
[ "$status" != 124 ] || status=125
exit "$status"
