#!/bin/sh
# Installs the programs and libraries that tests use besides Go, gcc and make, from
# Debian's archive. Which they are stands in one place, test/requires/tools.txt.
#
# Without the right to install, says what is missing and goes on (tests that
# need it are skipped with the reason); with STRICT=1 that is an error.
set -eu

list=$(dirname "$0")/requires/tools.txt
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# has tells whether a program is there, or a library of OCaml (ocaml:NAME).
has() {
	case $1 in
	ocaml:*) ocamlfind query "${1#ocaml:}" >/dev/null 2>&1 ;;
	*) command -v "$1" >/dev/null ;;
	esac
}

# missing prints the packages whose programs are not all there.
missing() {
	sed 's/#.*//' "$list" | while read -r program package; do
		if [ -n "$program" ] && ! has "$program" </dev/null; then
			echo "$package"
		fi
	done | sort -u | tr '\n' ' '
}

# as_root runs a command as root, and fails where that would need a question.
as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	else
		sudo -n "$@"
	fi
}

# install exits non-zero when something could not be had; what it printed of
# importance is on standard error.
install() {
	command -v apt-get >/dev/null || return 1
	as_root true 2>/dev/null || return 1
	echo "installing: $packages"
	# The second time for machines that update their lists themselves after booting.
	as_root env DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes apt-get -qq update ||
		{ sleep 30 && as_root env DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes apt-get -qq update; } ||
		true # an old list may do
	# Word splitting is meant.
	# shellcheck disable=SC2086
	as_root env DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes apt-get -qq -y --no-install-recommends \
		-o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120 install $packages >/dev/null
}

packages=$(missing)
[ -n "$packages" ] || exit 0
install || true
packages=$(missing)
[ -n "$packages" ] || exit 0

echo "test tools missing, Debian packages: $packages" >&2
if [ "${STRICT:-}" = 1 ]; then
	exit 1
fi
echo "tests that need them will be skipped" >&2
