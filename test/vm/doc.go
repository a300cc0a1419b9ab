// Package vm runs tests where they need what the machine of the tests has not: in
// a domain 0 of Xen, and on a kernel whose NBD devices may be taken. Both are
// guests in QEMU, emulated, so that no support by the processor is needed; see
// README.md. The tests themselves are in package guest.
package vm
