#!/bin/sh
# man.sh DIR [COMPLETION_DIR]: writes the man pages into DIR, and shell completions
# into COMPLETION_DIR. Pages carry the date of epoch.sh, so the same sources give
# the same pages.
set -eu

[ $# = 1 ] || [ $# = 2 ] || {
	echo "usage: $0 DIR [COMPLETION_DIR]" >&2
	exit 2
}
mkdir -p "$1"
MAN_DIR=$(cd "$1" && pwd)
COMPLETION_DIR=
if [ $# = 2 ]; then
	mkdir -p "$2"
	COMPLETION_DIR=$(cd "$2" && pwd)
fi
cd "$(dirname "$0")/.."
SOURCE_DATE_EPOCH=$(packaging/epoch.sh)
export MAN_DIR COMPLETION_DIR SOURCE_DATE_EPOCH

# Tests write them, from the definitions of commands and settings. Here nobody
# insists on groff and the shells that would read them.
STRICT='' ${GO:-go} test -count=1 -run '^(TestManPages|TestManPagesSettings|TestCompletionScripts)$' \
	./cmd/xapi-nbd ./cmd/nbd-tool >&2
sed -e "s/@DATE@/$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%d)/" -e "s/@VERSION@/$(cat VERSION)/" \
	packaging/xapi-nbd-firewall.8 >"$MAN_DIR/xapi-nbd-firewall.8"
