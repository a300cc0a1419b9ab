#!/bin/bash
# Applies the mutation patches, one after the other, to a copy of the committed code, and
# runs the tests that must fail then. Exits with an error if they pass, or if a patch no
# longer applies. Arguments: names of patches without .patch; none means all.
#
# A patch begins with two lines for this script:
#   a description of the fault that it makes
#   arguments of go test
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
copy=$(mktemp -d)
# So that the build cache serves copies in other folders, too.
export GOFLAGS="${GOFLAGS:-} -trimpath"
trap 'rm -rf "$copy"' EXIT

unnoticed=0
for patch in "$here"/*.patch; do
	name=$(basename "$patch" .patch)
	[ $# = 0 ] || [[ " $* " == *" $name "* ]] || continue
	rm -rf "${copy:?}"/*
	git archive HEAD | tar -x -C "$copy"
	fault=$(sed -n 1p "$patch")
	args=$(sed -n 2p "$patch")
	if ! (cd "$copy" && patch -s -p1 -F0 --no-backup-if-mismatch <"$patch"); then
		echo "$name: the patch does not apply any more"
		unnoticed=1
		continue
	fi
	# Word splitting is intended.
	# shellcheck disable=SC2086
	if (cd "$copy" && go test -timeout 150s $args >out.txt 2>&1); then
		echo "$name ($fault): NOT NOTICED"
		unnoticed=1
		continue
	fi
	if grep -qE '\[(build|setup) failed\]' "$copy/out.txt"; then
		echo "$name: does not build"
		grep -v '^ok' "$copy/out.txt" | head -n 20
		unnoticed=1
		continue
	fi
	echo "$name ($fault): noticed by"
	grep -oE -- '^--- FAIL: [^ ]+' "$copy/out.txt" | sed 's/.*FAIL: /    /' | sort -u || true
	grep -oE '^panic: .*' "$copy/out.txt" | head -n 1 | sed 's/^/    /' || true
done
exit $unnoticed
