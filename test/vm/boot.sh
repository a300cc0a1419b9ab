#!/bin/bash
# Boots a guest in QEMU, runs one command there and exits with its status. Status 125 means
# that the command had none, or that the guest did not run, so that nothing was tested.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/xapi-nbd-vm}

log() { printf 'boot: %s\n' "$*" >&2; }

usage() {
	cat >&2 <<-END
	usage: boot-xen.sh|boot-linux.sh [-d DIR] [-m MIB] [-s CPUS] [-t SECONDS] COMMAND...
	       boot-xen.sh|boot-linux.sh -b
	  -d DIR      becomes the working directory of COMMAND, as a copy
	  -m MIB      memory of the machine
	  -s CPUS     its processors
	  -t SECONDS  after which the guest is ended
	  -b          only build what guests boot from
	COMMAND is a line for bash, which runs as root. What it prints is printed here.
	END
	exit 125
}

kind=${1:-}
[ "$kind" = xen ] || [ "$kind" = linux ] || usage
shift
dir='' memory=1536 cpus=1 limit=600 only_build=''
while getopts d:m:s:t:b option; do
	case $option in
	d) dir=$OPTARG ;;
	m) memory=$OPTARG ;;
	s) cpus=$OPTARG ;;
	t) limit=$OPTARG ;;
	b) only_build=1 ;;
	*) usage ;;
	esac
done
shift $((OPTIND - 1))
"$here/build.sh" "$cache" || exit 125
[ -z "$only_build" ] || exit 0
[ $# -gt 0 ] || usage

work=$(mktemp -d)
qemu=''
# Ending timeout ends QEMU as well.
cleanup() {
	[ -z "$qemu" ] || kill "$qemu" 2>/dev/null || true
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 125' INT TERM

# The job is a tar archive on a disk: the guest's init, the command, the files.
mkdir -p "$work/job/files"
printf '%s\n' "$*" >"$work/job/command"
install -m 755 "$here/guest-init.sh" "$work/job/init"
[ -z "$dir" ] || cp -a "$dir/." "$work/job/files/"
tar -cf "$work/job.tar" -C "$work/job" .
truncate -s %512 "$work/job.tar"

# Two serial ports: one for the console, one for the output of the job.
console=$work/console.log
: >"$console" >"$work/output"
machine=(
	-accel tcg,thread=multi -cpu max,smap=off # domain 0 dies with smap
	-smp "$cpus" -m "$memory" -nodefaults -no-user-config -no-reboot -display none
	-serial "file:$console" -serial "file:$work/output"
	-drive "file=$cache/root.ext4,format=raw,if=virtio,snapshot=on,cache=unsafe"
	-drive "file=$work/job.tar,format=raw,if=virtio,readonly=on"
)
kernel_args="quiet panic=-1 nokaslr mitigations=off vm.kind=$kind"
if [ "$kind" = linux ]; then
	machine+=(-kernel "$cache/vmlinux" -initrd "$cache/initrd.cpio" -append "console=ttyS0 $kernel_args")
else
	# Xen is a multiboot kernel, with domain 0's kernel and initrd as modules.
	dom0=$((memory - 256))M
	machine+=(
		-kernel "$cache/xen.elf" -initrd "$cache/vmlinux console=hvc0 $kernel_args,$cache/initrd.cpio"
		-append "console=com1 com1=115200,8n1 loglvl=warning dom0=pv dom0_mem=$dom0,max:$dom0 dom0_max_vcpus=$cpus spec-ctrl=no xpti=no ucode=no"
	)
fi

nice -n 10 timeout -k 5 "$limit" qemu-system-x86_64 "${machine[@]}" </dev/null >"$work/qemu.log" 2>&1 &
qemu=$!
tail -c +1 -s 0.2 -f --pid="$qemu" "$work/output" | sed -u '/^\x1estatus [0-9]*$/d' &
printer=$!
ended=0
wait "$qemu" || ended=$?
qemu=''
wait "$printer" || true

status=$(sed -n 's/^\x1estatus \([0-9]*\)$/\1/p' "$work/output" | sed -n '$p')
[ -z "$status" ] || exit "$status"
if [ "$ended" = 124 ]; then
	log "the guest was ended after $limit s"
fi
log "the guest gave no exit status (QEMU ended with $ended); the end of its console:"
tail -n 40 "$console" "$work/qemu.log" >&2
exit 125
