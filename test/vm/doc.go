// Package vm runs tests that need another machine: domain 0 of Xen, a kernel whose NBD
// devices are free, and a systemd. The first two are emulated guests in QEMU, which need no
// support of the processor; the last runs in namespaces. See README.md. The tests
// themselves are in package guest.
package vm
