#!/bin/sh
# After removing. The state folder stays, with the journal that another
# installation, or the original service, cleans up by. dpkg's "purge" removes
# it, if no VBD is left to clean up.
set -e

state=$DPKG_ROOT/var/lib/xapi-nbd
if [ "$1" = purge ] && [ -d "$state" ]; then
	if [ -s "$state/VBDs_to_clean_up" ]; then
		echo "xapi-nbd: $state names VBDs that are not cleaned up; it stays" >&2
	else
		rm -rf "$state"
	fi
fi
case "$1" in
remove | 0)
	if [ -z "$DPKG_ROOT" ] && command -v systemctl >/dev/null 2>&1 && systemd-notify --booted; then
		systemctl daemon-reload
	fi
	;;
esac
