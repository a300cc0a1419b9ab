#!/bin/sh
# Before unpacking a Debian package. dpkg tells the postinst of an old version
# also when the package was removed meanwhile; only here it says "install", so
# here is noted that the unit has to be enabled.
set -e

state=$DPKG_ROOT/var/lib/xapi-nbd
if [ "$1" = install ]; then
	mkdir -p "$state"
	touch "$state/installing"
fi
