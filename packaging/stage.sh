#!/bin/sh
# stage.sh DIR: builds the programs, their man pages and completions, and lays
# everything out below DIR, which must be new or empty, as it is below / when
# installed. Both packages and install.sh are made of this.
#
# The same sources give the same files, byte for byte, with the times of
# SOURCE_DATE_EPOCH (see epoch.sh). Nothing is written outside of DIR.
#
# ZSH_SITE: where zsh looks for completions (Debian has a folder of its own)
# SYSTEMD: "old" (219, the default) or "new" (247 and later): which drop-in to
#          install; the other one goes to the documentation
set -eu

[ $# = 1 ] || {
	echo "usage: $0 DIR" >&2
	exit 2
}
mkdir -p "$1"
root=$(cd "$1" && pwd)
if [ -n "$(ls -A "$root")" ]; then
	echo "$0: $root is not empty" >&2
	exit 2
fi
cd "$(dirname "$0")/.."
umask 022

go=${GO:-go}
version=$(cat VERSION)
epoch=$(packaging/epoch.sh)
units=$root/usr/lib/systemd/system
doc=$root/usr/share/doc/xapi-nbd
man=$root/usr/share/man
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM # not every sh does the above then

build() { # PROGRAM PATH: a static program, the same wherever it is built
	mkdir -p "$(dirname "$root/$2")"
	CGO_ENABLED=0 $go build -trimpath -buildvcs=false \
		-ldflags "-s -w -X xapi-nbd/cmd/internal/buildinfo.version=$version" -o "$root/$2" "./cmd/$1"
}
build xapi-nbd usr/sbin/xapi-nbd
build nbd-tool usr/bin/nbd-tool

packaging/man.sh "$work/man" "$work/completion"
for section in 1 5 8; do
	install -d "$man/man$section"
	gzip -9 -n "$work/man/"*".$section"
	install -m 0644 "$work/man/"*".$section.gz" "$man/man$section"
done
for program in xapi-nbd nbd-tool; do
	install -D -m 0644 "$work/completion/$program.bash" "$root/usr/share/bash-completion/completions/$program"
	install -D -m 0644 "$work/completion/$program.zsh" "$root${ZSH_SITE:-/usr/share/zsh/site-functions}/_$program"
	install -D -m 0644 "$work/completion/$program.fish" "$root/usr/share/fish/vendor_completions.d/$program.fish"
done

install -D -m 0755 packaging/xapi-nbd-firewall "$root/usr/sbin/xapi-nbd-firewall"
install -D -m 0644 packaging/xapi-nbd.toml "$root/etc/xapi-nbd.toml"
for unit in service path socket; do
	install -D -m 0644 "packaging/xapi-nbd.$unit" "$units/xapi-nbd.$unit"
done
case "${SYSTEMD:-old}" in
old) dropin=memory.conf other=hardening.conf ;;
*) dropin=hardening.conf other=memory.conf ;;
esac
install -D -m 0644 "packaging/xapi-nbd.service.d/$dropin" "$units/xapi-nbd.service.d/$dropin"
install -D -m 0644 "packaging/xapi-nbd.service.d/$other" "$doc/$other"
install -D -m 0644 packaging/xapi-nbd.service.d/write.conf "$doc/write.conf"
packaging/documents.sh "$doc"
install -D -m 0644 packaging/grafana/xapi-nbd.json "$doc/grafana/xapi-nbd.json"
install -D -m 0644 packaging/prometheus/xapi-nbd.rules.yml "$doc/prometheus/xapi-nbd.rules.yml"

find "$root" -exec touch -h -d "@$epoch" {} +
