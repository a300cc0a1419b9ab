#!/bin/sh
# Prints the time that packages carry, in seconds since 1970: SOURCE_DATE_EPOCH
# if it is set, else the date of the last commit, else that of the file VERSION,
# which in a source archive of build-rpm.sh is the same.
set -eu
cd "$(dirname "$0")/.."
if [ -n "${SOURCE_DATE_EPOCH:-}" ]; then
	echo "$SOURCE_DATE_EPOCH"
elif [ -e .git ] && git log -1 --format=%ct 2>/dev/null; then
	:
else
	stat -c %Y VERSION
fi
