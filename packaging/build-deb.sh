#!/bin/sh
# build-deb.sh DIR: builds the Debian package into DIR and prints its path. Nothing
# else is left behind, and nothing at all when it fails.
# Needs Go, and once the module proxy for the pinned nfpm.
set -eu

nfpm=github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.43.0

[ $# = 1 ] || {
	echo "usage: $0 DIR" >&2
	exit 2
}
case $1 in
/*) out=$1 ;;
*) out=$PWD/$1 ;;
esac
here=$(cd "$(dirname "$0")" && pwd)
go=${GO:-go}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM # not every sh does the above then

SOURCE_DATE_EPOCH=$("$here/epoch.sh")
VERSION=$(cat "$here/../VERSION")
ARCH=$($go env GOARCH)
export SOURCE_DATE_EPOCH VERSION ARCH

ZSH_SITE=/usr/share/zsh/vendor-completions SYSTEMD=new "$here/stage.sh" "$work/root"
doc=$work/root/usr/share/doc/xapi-nbd
cp "$here/debian/copyright" "$doc/copyright"
gzip -9 -n >"$doc/changelog.Debian.gz" <<END
xapi-nbd ($VERSION-1) unstable; urgency=medium

  * Version $VERSION: see CHANGELOG.md.

 -- xapi-nbd maintainers <maintainers@xapi-nbd.invalid>  $(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")
END
overrides=$work/root/usr/share/lintian/overrides
mkdir -p "$overrides"
cp "$here/debian/lintian-overrides" "$overrides/xapi-nbd"
chmod -R u=rwX,go=rX "$work/root"
find "$work/root" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
cp -r "$here/nfpm.yaml" "$here/scripts" "$work"
# Paths in nfpm.yaml are relative to where it runs.
cd "$work"
deb=xapi-nbd_${VERSION}-1_$ARCH.deb
$go run "$nfpm" package --config nfpm.yaml --packager deb --target "$deb" >&2
mkdir -p "$out"
mv "$deb" "$out"
echo "$out/$deb"
