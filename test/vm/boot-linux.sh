#!/bin/bash
# Runs a command in a guest with Debian's kernel: see boot.sh.
exec "$(dirname "$0")/boot.sh" linux "$@"
