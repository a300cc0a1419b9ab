#!/bin/sh
# After installing: dpkg says "configure" (and preinstall.sh has noted whether it
# is an upgrade), rpm says how many of this package there are now.
set -e

state=$DPKG_ROOT/var/lib/xapi-nbd
fresh=no
case "$1" in
configure)
	if [ -e "$state/installing" ]; then
		fresh=yes
		rm -f "$state/installing"
		rmdir "$state" 2>/dev/null || true
	fi
	;;
1) fresh=yes ;;
[2-9]*) ;;
*) exit 0 ;;
esac
command -v systemctl >/dev/null 2>&1 || exit 0

# The path unit, not the service: the service starts once the host has its
# certificate. On an upgrade the administrator's choice stands.
if [ "$fresh" = yes ]; then
	systemctl ${DPKG_ROOT:+--root="$DPKG_ROOT"} enable xapi-nbd.path >/dev/null 2>&1 || true
fi

# Nothing runs in a folder that is not this system's root, nor in a chroot.
if [ -z "$DPKG_ROOT" ] && systemd-notify --booted; then
	systemctl daemon-reload
	if [ "$fresh" = yes ]; then
		systemctl start xapi-nbd.path
	elif systemctl is-active --quiet xapi-nbd.service; then
		# The running service starts the new program and ends no transfer. One that is
		# too old for that (1) is restarted. With any other code the new program or its
		# settings do not work, or the answer was lost: the old one goes on, where a
		# restart would end every transfer and perhaps serve nobody.
		xapi-nbd upgrade || case $? in
		1) systemctl try-restart xapi-nbd.service ;;
		*) echo "xapi-nbd: the service was not restarted; see xapi-nbd status and journalctl -u xapi-nbd" >&2 ;;
		esac
	fi
fi
