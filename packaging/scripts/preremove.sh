#!/bin/sh
# Before removing: dpkg says "remove", rpm that none is left (0). On an upgrade
# the service goes on until the new one is there.
set -e

case "$1" in
remove | 0) ;;
*) exit 0 ;;
esac
command -v systemctl >/dev/null 2>&1 || exit 0

if [ -z "$DPKG_ROOT" ] && systemd-notify --booted; then
	# The units that start the service come first. Stopping it detaches every
	# VBD; what xapi does not let go of stays in the journal.
	systemctl stop xapi-nbd.path xapi-nbd.socket xapi-nbd.service || true
	# Processes that upgrades have replaced end with the service, unless it had crashed.
	xapi-nbd status --end-replaced >/dev/null || true
fi
systemctl ${DPKG_ROOT:+--root="$DPKG_ROOT"} disable xapi-nbd.path xapi-nbd.socket xapi-nbd.service >/dev/null 2>&1 || true
