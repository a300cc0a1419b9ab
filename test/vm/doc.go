// Package vm runs tests where they need what the machine of the tests has not: in
// a domain 0 of Xen, on a kernel whose NBD devices may be taken, and under a
// systemd. The first two are guests in QEMU, emulated, so that no support by the
// processor is needed; the last runs in namespaces. See README.md. The tests themselves are in package guest.
package vm
