// Package interop proves the service on clients that others wrote: qemu,
// libnbd, nbdkit, fio, nbd-client and Xen Orchestra's own. The program runs as
// a process of its own beside the simulated host, and each client comes as a
// backup tool does, with a session in the export name.
//
// TestPeers is one table: each client × in the clear or with TLS × EXPORT_NAME
// or GO × the whole disk, random reads, reads past the end, abrupt death. What
// a client cannot do is in the table with the reason and is logged as a line
// "n/a: client/mode/what: reason". After each entry the service must have let
// go of everything. The command in report makes docs/INTEROP.md of a run.
package interop
