// Package interop tests the service with clients of other projects: qemu, libnbd, nbdkit, fio,
// nbd-client and Xen Orchestra's. The service is a process beside the simulated host, and
// each client connects like a backup tool, with a session in the export name.
//
// TestPeers is a table: each client, in the clear and with TLS, with EXPORT_NAME and GO,
// reads the whole disk, at random, and past the end, and is killed. An action that a client
// does not have is in the table with the reason and is logged as a line "n/a:
// client/mode/action: reason". After each entry the service must have released everything.
// TestWriters is a table of clients that write a disk through the service.
// TestImages compares the reader of VHD images with those of libvhdi and Xen Orchestra.
// TestEnds records what clients do when the service ends their connections. The command in
// report writes docs/results/INTEROP.md and ENDS.md from runs.
package interop
