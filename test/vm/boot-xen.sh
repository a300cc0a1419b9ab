#!/bin/bash
# Runs a command in a domain 0 with Debian's Xen and kernel: see boot.sh.
exec "$(dirname "$0")/boot.sh" xen "$@"
