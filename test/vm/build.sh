#!/bin/bash
# build.sh DIR: makes the files from which guests boot in DIR, from Debian packages, unless
# they exist:
#
#   vmlinux      Debian's kernel, unpacked, which saves the guest the time for it
#   xen.elf      Debian's Xen, unpacked: QEMU loads it as a multiboot kernel
#   initrd.cpio  busybox and the modules for the root disk
#   root.ext4    a small Debian with Xen's tools and NBD programs
#   versions     the packages in it
#
# It needs root, apt's package lists, and the programs of needed_programs below,
# none of which it installs.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=$1
PATH=$PATH:/usr/sbin:/sbin

suite=bookworm
xen=4.17
packages=kmod,e2fsprogs,util-linux,mount,iproute2,procps,xen-utils-$xen,xenstore-utils,nbd-client,libnbd-bin,qemu-utils,lvm2
modules="virtio_pci virtio_blk ext4 crc32c_generic crc32c-intel loop nbd dm-mod
	xen-blkfront xen-blkback xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs"
boot_modules="virtio_pci virtio_blk crc32c_generic ext4"

# program=Debian package
needed_programs="qemu-system-x86_64=qemu-system-x86 mmdebstrap=mmdebstrap busybox=busybox-static
	cpio=cpio depmod=kmod xz=xz-utils mke2fs=e2fsprogs"

log() { printf 'build: %s\n' "$*" >&2; }

require_programs() {
	local pair missing=''
	for pair in $needed_programs; do
		command -v "${pair%%=*}" >/dev/null || missing="$missing ${pair#*=}"
	done
	if [ -n "$missing" ]; then
		log "Debian packages missing:$missing"
		exit 1
	fi
	if ldd "$(command -v busybox)" >/dev/null 2>&1; then
		log "busybox is not static: the Debian package is busybox-static"
		exit 1
	fi
}

# fetch downloads the packages of kernel and Xen and unpacks them.
fetch() {
	log "kernel and Xen"
	apt-cache show linux-image-amd64 >/dev/null 2>&1 || apt-get update -qq
	local package
	package=$(apt-cache depends linux-image-amd64 | awk '/Depends: linux-image-[0-9]/ && !seen { print $2; seen = 1 }')
	release=${package#linux-image-}
	mkdir "$new/packages"
	(cd "$new/packages" && apt-get -qq -o APT::Sandbox::User=root download "$package" "xen-hypervisor-$xen-amd64")
	dpkg-deb -x "$new"/packages/linux-image-*.deb "$new/kernel"
	dpkg-deb -x "$new"/packages/xen-hypervisor-*.deb "$new/xen"
	gunzip -c "$new/xen/boot/xen-$xen-amd64.gz" >"$new/xen.elf"
	unpack_kernel "$new/kernel/boot/vmlinuz-$release" >"$new/vmlinux"
}

# number prints an unsigned little-endian number of a file: FILE OFFSET BYTES.
number() { od -An -v "-tu$3" -j "$2" -N "$3" "$1" | tr -d ' '; }

# unpack_kernel prints the kernel in a bzImage. Its header says how many sectors
# of set-up code there are and where behind them the payload is; the payload ends
# with four bytes that are not xz's.
unpack_kernel() {
	local sectors offset length
	sectors=$(number "$1" $((0x1f1)) 1)
	offset=$(((${sectors/#0/4} + 1) * 512 + $(number "$1" $((0x248)) 4)))
	length=$(($(number "$1" $((0x24c)) 4) - 4))
	dd if="$1" bs=1M iflag=skip_bytes,count_bytes skip="$offset" count="$length" status=none | xz -dc
}

# collect_modules copies the modules for guests, with all that they depend on.
collect_modules() {
	log "modules"
	depmod -b "$new/kernel" "$release"
	local to=$new/modules/usr/lib/modules/$release module file
	mkdir -p "$to"
	for module in $modules; do
		modprobe -d "$new/kernel" -S "$release" --ignore-install --show-depends "$module"
	done | awk '$1 == "insmod" { print $2 }' | sort -u >"$new/files"
	while read -r file; do
		file=${file#*"/lib/modules/$release/"}
		install -D -m 644 "$new/kernel/lib/modules/$release/$file" "$to/$file"
	done <"$new/files"
	cp "$new/kernel/lib/modules/$release"/modules.* "$to/"
	ln -s usr/lib "$new/modules/lib"
	depmod -b "$new/modules" "$release"
}

make_initrd() {
	log "initrd"
	local root=$new/initrd module file
	mkdir -p "$root/bin" "$root/dev" "$root/root" "$root/modules"
	cp "$(command -v busybox)" "$root/bin/busybox"
	install -m 755 "$here/initrd-init.sh" "$root/init"
	for module in $boot_modules; do
		modprobe -d "$new/modules" -S "$release" --show-depends "$module"
	done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$new/files"
	while read -r file; do
		cp "$file" "$root/modules/"
		echo "${file##*/}" >>"$root/modules/order"
	done <"$new/files"
	(cd "$root" && find . | cpio --quiet -o -H newc) >"$new/initrd.cpio"
}

make_root() {
	log "root file system"
	local root=$new/root sources=/etc/apt/sources.list.d/debian.sources
	[ -s "$sources" ] || sources=/etc/apt/sources.list
	mmdebstrap --quiet --mode=root --variant=essential --include="$packages" \
		--aptopt='APT::Install-Recommends "false"' \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' \
		"$suite" "$root" "$sources"
	cp -a "$new/modules/usr/lib/modules" "$root/usr/lib/"
	mkdir -p "$root/job"
	echo guest >"$root/etc/hostname"
	printf '127.0.0.1 localhost guest\n::1 localhost\n' >"$root/etc/hosts"
	: >"$root/etc/fstab"
	truncate -s 2G "$new/root.ext4"
	# Nothing that is written there outlives its guest.
	mke2fs -q -F -t ext4 -O ^has_journal,^metadata_csum -E lazy_itable_init=0 -m 0 -d "$root" "$new/root.ext4"
	(cd "$new/packages" && ls -- *.deb) >"$new/versions"
	dpkg-query --admindir="$root/var/lib/dpkg" -W >>"$new/versions"
}

require_programs
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
key=$(cat "$here/build.sh" "$here/initrd-init.sh" | sha256sum | cut -c -16)
if [ "$(cat "$cache/key" 2>/dev/null)" = "$key" ]; then
	exit 0
fi
begin=$SECONDS
rm -f "$cache/key"
new=$cache/new release=''
rm -rf "$new"
mkdir "$new"
{
	fetch
	collect_modules
	make_initrd
	make_root
} >&2
mv "$new/vmlinux" "$new/xen.elf" "$new/initrd.cpio" "$new/root.ext4" "$new/versions" "$cache/"
rm -rf "$new"
echo "$key" >"$cache/key"
log "done in $((SECONDS - begin)) s"
