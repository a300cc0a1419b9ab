#!/bin/sh
# build-rpm.sh DIR: makes a source archive with vendored modules of this tree,
# builds the source and binary packages from it with rpmbuild into DIR/SRPMS and
# DIR/RPMS, and prints their paths. Nothing else is left behind, and nothing at all
# when it fails.
set -eu

[ $# = 1 ] || {
	echo "usage: $0 DIR" >&2
	exit 2
}
case $1 in
/*) out=$1 ;;
*) out=$PWD/$1 ;;
esac
cd "$(dirname "$0")/.."
umask 022

go=${GO:-go}
version=$(cat VERSION)
name=xapi-nbd-$version
SOURCE_DATE_EPOCH=$(packaging/epoch.sh)
export SOURCE_DATE_EPOCH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM # not every sh does the above then

# What git knows or would add; a tree without git is taken as it is.
files() {
	if [ -e .git ]; then
		git ls-files --cached --others --exclude-standard
	else
		find . -type f ! -path './bin/*' ! -path './vendor/*'
	fi | while read -r file; do
		if [ -e "$file" ]; then echo "$file"; fi # not yet committed as gone
	done
}
mkdir "$work/$name"
files | tar -c -T - | tar -x -C "$work/$name"
(cd "$work/$name" && $go mod vendor)

top=$work/rpm
mkdir -p "$top/SOURCES" "$top/SPECS" "$top/tmp"
tar -c --sort=name --format=gnu --owner=0 --group=0 --numeric-owner --mode=go-w \
	--mtime="@$SOURCE_DATE_EPOCH" -C "$work" "$name" | gzip -9 -n >"$top/SOURCES/$name.tar.gz"
cp packaging/xapi-nbd.spec "$top/SPECS"
touch -d "@$SOURCE_DATE_EPOCH" "$top/SOURCES/$name.tar.gz" "$top/SPECS/xapi-nbd.spec"

# Go may be there without being an rpm.
nodeps=
if ! rpm -q golang >/dev/null 2>&1; then nodeps=--nodeps; fi
rpmbuild -ba $nodeps \
	--define "_topdir $top" \
	--define "_tmppath $top/tmp" \
	--define "_buildhost localhost" \
	--define "use_source_date_epoch_as_buildtime 1" \
	--define "clamp_mtime_to_source_date_epoch 1" \
	"$top/SPECS/xapi-nbd.spec" >&2
cd "$top"
mkdir -p "$out"
cp -r RPMS SRPMS "$out"
find RPMS SRPMS -name '*.rpm' | sort | sed "s|^|$out/|"
