#!/bin/sh
# Installs the programs and libraries that tests use besides Go, gcc and make, from
# Debian's archive. test/requires/tools.txt lists them.
#
# With NO_INSTALL=1, and without the right to install, it prints the missing packages and
# succeeds; tests that need them are skipped with the reason. With STRICT=1 it fails then.
set -eu

list=$(dirname "$0")/requires/tools.txt
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# has succeeds if a program is installed, or a library of OCaml (ocaml:NAME), or a module
# of Debian's Python (python:NAME).
has() {
	case $1 in
	ocaml:*) ocamlfind query "${1#ocaml:}" >/dev/null 2>&1 ;;
	python:*) /usr/bin/python3 -c "import ${1#python:}" >/dev/null 2>&1 ;;
	*) command -v "$1" >/dev/null ;;
	esac
}

# missing prints a line "PACKAGE PROGRAM HOW" for each program that is not installed; HOW
# is empty or "extract".
missing() {
	sed 's/#.*//' "$list" | while read -r program package how; do
		if [ -n "$program" ] && ! has "$program" </dev/null; then
			echo "$package $program $how"
		fi
	done
}

# packages prints the packages in the output of missing, each once.
packages() {
	cut -d' ' -f1 | sort -u | tr '\n' ' '
}

# as_root runs a command as root, and fails where sudo would ask for a password.
as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	else
		sudo -n "$@"
	fi
}

# install_tools fails if a package could not be installed; its errors are on standard error.
install_tools() {
	[ "${NO_INSTALL:-}" != 1 ] || return 1
	command -v apt-get >/dev/null || return 1
	as_root true 2>/dev/null || return 1
	echo "installing: $(echo "$missing" | packages)"
	# Once more, because some machines hold the lock while they update the lists after booting.
	as_root env DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes apt-get -qq update ||
		{ sleep 30 && as_root env DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes apt-get -qq update; } ||
		true # an old list may be enough
	packages=$(echo "$missing" | grep -v ' extract$' | packages)
	[ -z "$packages" ] || install_packages
	echo "$missing" | grep ' extract$' | while read -r package program _; do
		extract "$package" "$program"
	done
}

# install_packages installs $packages.
install_packages() {
	# Word splitting is intended.
	# shellcheck disable=SC2086
	as_root env DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes apt-get -qq -y --no-install-recommends \
		-o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120 install $packages >/dev/null
}

# extract takes a program out of a package without installing the package.
extract() {
	dir=$(mktemp -d)
	(cd "$dir" && apt-get -qq -o APT::Sandbox::User=root download "$1" && dpkg-deb -x ./*.deb .) </dev/null &&
		as_root install -m 0755 "$dir/usr/bin/$2" "/usr/local/bin/$2"
	rm -rf "$dir"
}

missing=$(missing)
[ -n "$missing" ] || exit 0
install_tools || true
missing=$(missing)
[ -n "$missing" ] || exit 0

echo "test tools missing, Debian packages: $(echo "$missing" | packages)" >&2
if [ "${STRICT:-}" = 1 ]; then
	exit 1
fi
echo "tests that need them will be skipped" >&2
