#!/bin/sh
# build-deb.sh DIR: builds the Debian package into DIR and prints its path.
# Needs Go, and once the module proxy for the pinned nfpm.
set -eu

nfpm=github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.43.0

[ $# = 1 ] || {
	echo "usage: $0 DIR" >&2
	exit 2
}
mkdir -p "$1"
out=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
go=${GO:-go}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

SOURCE_DATE_EPOCH=$("$here/epoch.sh")
VERSION=$(cat "$here/../VERSION")
ARCH=$($go env GOARCH)
export SOURCE_DATE_EPOCH VERSION ARCH

ZSH_SITE=/usr/share/zsh/vendor-completions SYSTEMD=new "$here/stage.sh" "$work/root"
cp -r "$here/nfpm.yaml" "$here/scripts" "$work"
# Paths in nfpm.yaml are relative to where it runs.
cd "$work"
deb=$out/xapi-nbd_${VERSION}-1_$ARCH.deb
$go run "$nfpm" package --config nfpm.yaml --packager deb --target "$deb" >&2
echo "$deb"
