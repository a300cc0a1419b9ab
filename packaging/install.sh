#!/bin/sh
# install.sh [DESTDIR]: builds everything and installs it below DESTDIR, or here.
# Settings that are there stay. SYSTEMD and ZSH_SITE are for stage.sh.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
dest=${1:-}/
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM # not every sh does the above then

"$here/stage.sh" "$work/root"
if [ -e "$dest/etc/xapi-nbd.toml" ]; then
	rm "$work/root/etc/xapi-nbd.toml"
fi
mkdir -p "$dest"
# Folders that exist are not ours to change.
tar -c -C "$work/root" . | tar -x -C "$dest" --no-overwrite-dir --no-same-owner
